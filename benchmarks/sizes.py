"""Measures how many bytes pruned networks take in files, as fractions of the dense float32 weights.

    .venv/litert/bin/python benchmarks/sizes.py

ResNet-20 (272 thousand weights, pruned by magnitude) in files of `storage`, and MobileNet V1 (3.2
million weights, 10 classes, 96 pixels, 1x1 filters pruned by magnitude) in files of LiteRT. Weights
are those of a new network: trained ones are a little less regular. `make litert-check` makes the
environment.
"""

import io
import tempfile
from pathlib import Path

import jax
import numpy as np
from flax import nnx

import jaxprune
from jaxprune import export, models, storage, structure

SPARSITIES = (0, 0.7, 0.8, 0.9, 0.95)


def row(name: str, *cells: float) -> None:
    """Prints a row of a table in Markdown."""
    print(f"| {name} | {' | '.join(f'{cell:.3f}' for cell in cells)} |", flush=True)


def storage_sizes() -> None:
    """Files of `storage.save` for ResNet-20."""
    model = models.resnet20(num_classes=10, in_channels=1, rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    dense = 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
    pruned = [jaxprune.prune(params, own) if own else (params, None) for own in SPARSITIES]
    print(f"ResNet-20: {dense:,} bytes in all")
    for name, options in {
        "not compressed": {"compression": None},
        "exact": {},
        "bfloat16": {"values": "bfloat16"},
        "int8": {"values": "int8"},
        "int8 with zlib": {"values": "int8", "compression": "zlib"},
    }.items():
        sizes, errors = [], []
        for own, masks in pruned:
            file = io.BytesIO()
            saved = storage.save(file, own, masks, **options)
            sizes.append(file.tell() / dense)
            errors.append(saved.error)
        row(f"{name} (error {min(errors):.2%} to {max(errors):.2%})", *sizes)


def litert_sizes() -> None:
    """Files of `export.litert` for MobileNet V1."""
    model = models.mobilenet_v1(num_classes=10, rngs=nnx.Rngs(0))
    model.eval()
    own = structure.from_nnx(model)
    images = np.random.default_rng(0).uniform(-1, 1, (4, 96, 96, 3)).astype(np.float32)
    dense = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "net.tflite")
        for values in export.VALUES:
            sizes, errors = [], []
            for sparsity in SPARSITIES:
                variables = dict(own.variables)
                if sparsity:
                    names = [f"blocks/{k}/project/conv/kernel" for k in range(13)]
                    variables["params"], _ = jaxprune.prune(
                        variables["params"], sparsity, prunable=names
                    )
                report = export.litert(
                    own.evaluate,
                    variables,
                    images[:1],
                    path,
                    values=values,
                    check=images,
                    overwrite=True,
                )
                dense = dense or report.bytes
                sizes.append(report.bytes / dense)
                assert report.error is not None and report.scale is not None  # `check` was given
                errors.append(report.error / report.scale)
            if values == "float32":
                print(f"MobileNet V1: {dense:,} bytes dense")
            row(f"{values} (error {min(errors):.1e} to {max(errors):.1e} of outputs)", *sizes)


if __name__ == "__main__":
    storage_sizes()
    litert_sizes()
