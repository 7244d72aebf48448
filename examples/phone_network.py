"""Removes channels of a network for phones in one shot, at several budgets of MACs.

    pip install 'jaxprune[examples]'
    python examples/phone_network.py

The network is EfficientNet-Lite0 with its published weights; the pictures are those that
scikit-image and scikit-learn carry. Crops of their left halves calibrate, crops of their right
halves are held out, or with --unseen other pictures. A row compares with the dense network: right
after removal; with norm statistics measured again; with kernels fitted to the dense outputs; and,
with --steps, after a little teaching. Expected at 0.9 of the MACs: the same first class for 0.7 of
the crops, for 0.05 with channels at random; at 0.75 for 0.2, and with fitted kernels for 0.45.
"""

import argparse
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxprune
from jaxprune import post_training, search, structure, training
from jaxprune.models import pretrained

SIZE = 160  # pixels


def pictures() -> list[np.ndarray]:
    """Colour photographs, uint8 [H, W, 3]."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    names = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "retina")
    return [getattr(data, name)()[..., :3] for name in names] + load_sample_images().images


def crops(images: list[np.ndarray], count: int, rng: np.random.Generator) -> jax.Array:
    """Random squares of random sizes, resized and mirrored by chance, as the network takes them."""
    made = []
    for i in range(count):
        image = images[i % len(images)]
        side = int(min(image.shape[:2]) * rng.uniform(0.35, 1.0))
        top, left = (rng.integers(0, n - side + 1) for n in image.shape[:2])
        crop = image[top : top + side, left : left + side][:, :: rng.choice([-1, 1])]
        made.append(jax.image.resize(crop.astype(np.float32), (SIZE, SIZE, 3), "linear"))
    return (jnp.stack(made) - 127) / 128


def agreement(logits: np.ndarray, dense: np.ndarray) -> dict[str, float]:
    """Returns how often the first class is the same, and the mean cosine of centred logits."""
    a, b = (x - x.mean(1, keepdims=True) for x in (logits, dense))
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    same, cosine = (a.argmax(1) == b.argmax(1)).mean(), (a * b).sum(1).mean()
    return {"same class": float(same), "cosine": float(cosine)}


def evaluated(function: Any, variables: Any, batches: list[Any]) -> np.ndarray:
    """Logits of all batches."""
    run = jax.jit(function)
    return np.concatenate([run(variables, batch) for batch in batches])


def taught(train: Any, variables: Any, batches: list[Any], wanted: list[Any], steps: int) -> Any:
    """The variables after some steps towards the logits of the dense network."""
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, steps))

    @jax.jit
    def step(params: Any, state: Any, opt_state: Any, x: jax.Array, logits: jax.Array) -> Any:
        def loss(params: Any) -> Any:
            own, rest = train({"params": params} | state, x)
            return training.distillation(own, logits, temperature=2.0).mean(), rest

        grads, rest = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), state | rest, opt_state

    params = variables["params"]
    state = {name: tree for name, tree in variables.items() if name != "params"}
    opt_state, pairs = optimizer.init(params), itertools.cycle(zip(batches, wanted))
    for x, logits in itertools.islice(pairs, steps):
        params, state, opt_state = step(params, state, opt_state, x, logits)
    return {"params": params} | state


def compare(seed: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each budget and each choice of channels."""
    rng, images = np.random.default_rng(seed), pictures()
    if options.unseen:
        order = [images[i] for i in rng.permutation(len(images))]
        seen, unseen = order[:5], order[5:]
    else:
        halves = [(image, image.shape[1] // 2) for image in images]
        seen, unseen = [x[:, :half] for x, half in halves], [x[:, half:] for x, half in halves]
    calibration = [crops(seen, 32, rng) for _ in range(options.batches)]
    held_out = [crops(unseen, 32, rng) for _ in range(options.batches)]

    functions = structure.from_nnx(pretrained.efficientnet_lite0())
    variables, evaluate, train = functions.variables, functions.evaluate, functions.train
    groups = structure.find_groups(functions.traces(calibration[0]), variables)
    cost = structure.mac_cost(groups, evaluate, variables, calibration[0][:1])
    scores = post_training.channel_scores(evaluate, variables, calibration, groups)
    choices = {
        "by what they contribute": structure.normalized(scores),
        "at random": {name: rng.random(len(own)) for name, own in scores.items()},
    }
    inputs = search.find_inputs(evaluate, variables, calibration, groups)
    dense = evaluated(evaluate, variables, held_out)
    wanted = [jax.jit(evaluate)(variables, batch) for batch in calibration]
    whole, rows = cost(groups.plan({})), []
    for budget in options.budgets:
        for choice, own in choices.items():
            plan = groups.plan(structure.keep_within(groups, own, budget * whole, cost, floor=0.1))
            small, row = plan.compact(variables), {"MACs": budget, "channels": choice}
            test, learn = plan.wrap(evaluate), plan.wrap(train)
            # Calibration data are few, so the fit is damped.
            fitted = plan.compact(search.reconstruct(variables, plan, inputs, damping=1e-2))
            measured = training.measure_statistics(learn, small, calibration)
            stages = {"removed": small, "measured again": measured, "fitted": fitted}
            if options.steps:
                stages["taught"] = taught(learn, fitted, calibration, wanted, options.steps)
            for stage, tree in stages.items():
                found = agreement(evaluated(test, tree, held_out), dense)
                row |= {f"{stage}, {name}": value for name, value in found.items()}
            rows.append(row | {"parameters": structure.count_parameters(plan)})
            print(jaxprune.reports.table(rows[-1:], list(rows[-1])), flush=True)
    return rows


def main() -> None:
    """Runs all budgets for each seed and prints the means."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.95, 0.9, 0.75, 0.5])
    parser.add_argument("--batches", type=int, default=4, help="batches of 32 crops, each part")
    parser.add_argument("--steps", type=int, default=0, help="steps of teaching")
    parser.add_argument("--seeds", type=int, default=2, help="draws of pictures and crops")
    parser.add_argument("--unseen", action="store_true", help="hold out whole pictures")
    options = parser.parse_args()
    runs = [compare(seed, options) for seed in range(options.seeds)]
    means = []
    for same in zip(*runs, strict=True):
        row = {name: same[0][name] for name in ("MACs", "channels", "parameters")}
        measured = [name for name in same[0] if name not in row]
        means.append(row | {name: f"{np.mean([r[name] for r in same]):.3f}" for name in measured})
    print(jaxprune.reports.table(means, list(means[0])))


if __name__ == "__main__":
    main()
