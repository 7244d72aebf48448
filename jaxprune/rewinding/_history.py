"""Describes what leads to a training, so that files of a different training are never reused.

A history is a flat dict of words and numbers, ready for JSON. Whatever can be observed is measured:
the learning rates, the initial state, the pruning rule. The rest is the user's `Task.description`.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import processes, trees
from jaxprune.rewinding._tasks import Recipe, Task
from jaxprune.rewinding._words import array_words, describe

# name -> words, or words and numbers. Numbers are measured and machines round differently, so they
# count as equal within `_ROUNDING` of the largest one; words must be the same.
History = dict[str, str | list[Any]]
_ROUNDING = 1e-5
_PARTS = 100


def of_dense(task: Task) -> History:
    """Describes the dense training of a task; the same on all processes.

    Args:
        task: the training; its `init(0)` is called.

    Returns:
        The number of steps, the mean rate of each hundredth of the training, shape and norm of each
        leaf of the initial state (a hash of the contents if it is no float), and the description.

    Raises:
        ValueError: if the description or a leaf of the state cannot be described.

    Example:
        >>> history = of_dense(task)
        >>> history["steps"], len(history["learning rates"]), history["description: data"]
        ('20', 20, "'the identity'")
    """
    description = task.description
    if not isinstance(description, Mapping):
        description = {"": description}
    problems: list[str] = []
    history: History = {"steps": str(int(task.steps)), "learning rates": _rates(task)}
    for name, value in description.items():
        history[f"description: {name}".removesuffix(": ")] = describe(value, str(name), problems)
    trees.raise_for(
        problems, "`description` of the task must hold plain values and arrays, but has:"
    )
    history |= {f"initial {path}": of for path, of in _leaves(task.init(0)).items()}
    return processes.on_first(lambda: history)


def of_round(before: History, number: int, density: float, recipe: Recipe, rule: str) -> History:
    """Describes a round: the history of the network that it prunes, and the round itself.

    Args:
        before: history of the network that it prunes.
        number: number of the round.
        density: fraction of the weights that it keeps.
        recipe: how it trains.
        rule: the pruning rule in words.

    Returns:
        The history with the fields of the round.

    Example:
        >>> of_round({}, 1, 0.5, Recipe("trained", 0, 20), "magnitude")["round 1: density"]
        '0.5'
    """
    weights, start, steps = recipe
    own = {"density": f"{density:.6g}", "pruned by": rule, "weights": str(weights)}
    own |= {"schedule from": str(start), "steps": str(steps)}
    return before | {f"round {number}: {name}": words for name, words in own.items()}


def rule_of(prune: Any, name: str | None) -> str:
    """Describes the pruning rule by the name that the user gave, or else by its code and values.

    Args:
        prune: function as in `Options`.
        name: the user's name for it, or None.

    Returns:
        The rule in words.

    Raises:
        ValueError: if there is no name and parts of the rule cannot be described; it lists them.

    Example:
        >>> import functools
        >>> rule_of(functools.partial(max, 3), None), rule_of(max, "mine")
        ('builtins.max(3)', "named 'mine'")
    """
    if name is not None:
        return f"named {name!r}"
    problems: list[str] = []
    words = describe(prune, "`prune`", problems)
    trees.raise_for(
        problems,
        "`prune` cannot be told from other rules, so its results could be confused with theirs. "
        'Give `rule="..."`, a name that changes whenever the rule does. These parts cannot be '
        "described:",
    )
    return words


def differences(saved: Any, now: History) -> list[str]:
    """Compares the history of a folder with that of a call.

    Args:
        saved: history read from disk; a value that is no dict differs in all fields.
        now: history of the call.

    Returns:
        A line for each field that differs; empty if the folder belongs to this call.

    Example:
        >>> differences({"steps": "20", "rates": [0.3, 0.2]}, {"steps": "20", "rates": [0.3, 0.1]})
        ['rates: 0.2 there, 0.1 now']
    """
    saved = saved if isinstance(saved, dict) else {}
    lines = []
    for name in {**now, **saved}:
        a, b = saved.get(name, "absent"), now.get(name, "absent")
        if isinstance(a, list) and isinstance(b, list):
            scale = max((abs(x) for x in (*a, *b) if isinstance(x, float)), default=0.0)
            pairs = itertools.zip_longest(a, b, fillvalue="absent")
            a, b = next((pair for pair in pairs if not _close(*pair, scale)), (0, 0))
        if a != b:
            lines.append(f"{name}: {a} there, {b} now")
    return lines


def _close(a: Any, b: Any, scale: float) -> bool:
    """Tells whether two entries of a list are the same, numbers within rounding."""
    if isinstance(a, float) and isinstance(b, float):
        return a == b or abs(a - b) <= _ROUNDING * scale
    return a == b


def _rates(task: Task) -> list[Any]:
    """Computes the mean learning rate of each part of the dense training; every step counts."""
    steps = int(task.steps)
    try:
        rates = jax.jit(jax.vmap(lambda step: jnp.asarray(task.schedule(step))))(jnp.arange(steps))
    except TypeError:  # a schedule in Python, which cannot be traced
        rates = [float(jnp.asarray(task.schedule(step))) for step in range(steps)]
    rates = np.asarray(rates, np.float64).reshape(steps)
    return [float(part.mean()) for part in np.array_split(rates, min(steps, _PARTS))]


def _leaves(state: Any) -> History:
    """Describes each leaf of a state: shape and norm, or a hash of contents that are no floats."""
    found: History = {}
    problems: list[str] = []
    for path, leaf in trees.leaves_with_paths(state):
        if not (hasattr(leaf, "dtype") or isinstance(leaf, (bool, int, float, complex))):
            problems.append(f"{path}: {type(leaf).__name__}")
            continue
        dtype = getattr(leaf, "dtype", None) or jnp.result_type(leaf)
        if jnp.issubdtype(dtype, jnp.inexact):
            wide = np.promote_types(dtype, np.float32)
            values = processes.on_host(leaf).astype(wide, copy=False).ravel()
            found[path] = [f"{dtype}{list(jnp.shape(leaf))}", float(np.linalg.norm(values))]
        else:
            found[path] = array_words(leaf)
    trees.raise_for(
        problems,
        "the state from `init` must hold arrays and numbers only. Split a module first, for "
        "example with `equinox.partition(model, equinox.is_array)` or `nnx.split(model)`, and let "
        "`train` merge it. These leaves are neither:",
    )
    return found
