"""Writes a pruned and compacted network as a file, and serves it where jaxprune is not installed.

    pip install 'jaxprune[export]'
    python examples/export_and_serve.py

A small MLP on handwritten digits loses half of its channels and trains on. `export.jax` writes one
file for every batch size and several platforms; a new Python process, which imports JAX alone,
reads it and answers. Expected: about 97 % of the test images in that process, from a file of less
than half the bytes of the dense one.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune import data, export, structure

STEPS = 300
SERVER = """
import sys
from pathlib import Path
import jax, jax.export, numpy as np

run = jax.export.deserialize(bytearray(Path(sys.argv[1]).read_bytes())).call
images, labels = (np.load(sys.argv[2])[name] for name in ("images", "labels"))
found = [np.argmax(run(images[i : i + 50]), -1) for i in range(0, len(images), 50)]
assert not any(name.startswith(("jaxprune", "flax")) for name in sys.modules)
print(float(np.mean(np.concatenate(found) == labels)))
"""


def apply(params: Any, x: jax.Array) -> jax.Array:
    """Images to logits."""
    hidden = jax.nn.relu(x @ params["first"])
    return jax.nn.relu(hidden @ params["second"]) @ params["head"]


def train(params: Any, images: jax.Array, labels: jax.Array, steps: int) -> Any:
    """Trains parameters of any widths."""
    optimizer = optax.adam(2e-3)

    @jax.jit
    def step(params, state, rows):
        def loss(params):
            logits = apply(params, images[rows])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state, random = optimizer.init(params), np.random.default_rng(0)
    for _ in range(steps):
        params, state = step(params, state, random.integers(0, len(labels), 64))
    return params


def main(steps: int = STEPS) -> dict[str, float]:
    """Trains, removes channels, exports and serves; returns accuracy and the share of the bytes."""
    digits = data.load("digits")
    images, test_images = (
        jnp.asarray(part.images.reshape(-1, 64) / 255 - 0.3, jnp.float32)
        for part in (digits.train, digits.test)
    )
    labels = jnp.asarray(digits.train.labels)
    normal, keys = jax.nn.initializers.he_normal(), jax.random.split(jax.random.key(0), 3)
    shapes = {"first": (64, 128), "second": (128, 128), "head": (128, 10)}
    params = {name: normal(key, shape) for key, (name, shape) in zip(keys, shapes.items())}
    params = train(params, images, labels, steps)

    groups = structure.find_groups(apply, params, images[:1])
    scores = structure.normalized(structure.filter_norms(groups, params))
    plan = groups.plan(structure.keep_global(groups, scores, 0.5))
    small = train(plan.compact(params), images, labels, steps)  # `apply` runs on any widths

    spec = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, 64"), jnp.float32)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dense = export.jax(apply, params, spec, folder / "dense.jax", check=images[:7])
        report = export.jax(apply, small, spec, folder / "small.jax", check=images[:7])
        print(report)
        np.savez(folder / "test.npz", images=test_images, labels=digits.test.labels)
        command = [sys.executable, "-c", SERVER, str(report.path), str(folder / "test.npz")]
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    accuracy, share = float(answer), report.bytes / dense.bytes
    print(f"accuracy in the new process {accuracy:.1%}, {share:.2f} of the bytes")
    return {"accuracy": accuracy, "bytes": share}


if __name__ == "__main__":
    main()
