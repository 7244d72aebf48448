"""Slow and obvious NumPy versions of what the library computes, written from the formulas."""

import math
from fractions import Fraction

import numpy as np


def largest(scores, keep, floors=None, among=None):
    """Masks of the `keep` largest entries: sort everything, floors first, then the rest."""
    leaf = np.concatenate([np.full(s.size, i) for i, s in enumerate(scores)])
    value = np.concatenate([np.asarray(s, np.float32).reshape(-1) for s in scores])
    allowed = np.ones(value.size, bool)
    if among is not None:
        allowed = np.concatenate([np.asarray(m).reshape(-1) for m in among])
    floors = [0] * len(scores) if floors is None else floors

    # Stable: descending values with NaN at the end, equal values by index.
    order = np.argsort(-value, kind="stable")
    order = order[allowed[order]]
    chosen = np.zeros(value.size, bool)
    for i, floor in enumerate(floors):
        chosen[order[leaf[order] == i][:floor]] = True
    rest = order[~chosen[order]]
    chosen[rest[: max(0, keep - chosen.sum())]] = True
    ends = np.cumsum([s.size for s in scores])[:-1]
    return [part.reshape(s.shape) for part, s in zip(np.split(chosen, ends), scores, strict=True)]


def keep_count(size, sparsity):
    """How many stay, by rational arithmetic on the decimal that is written."""
    return size - math.floor(size * Fraction(str(sparsity)) + Fraction(1, 2))


def cubic(step, initial, final, start, stop):
    """Zhu and Gupta's ramp, held constant outside of its window."""
    if step >= stop:
        return final
    if step <= start:
        return initial
    return final + (initial - final) * (1 - (step - start) / (stop - start)) ** 3


def cosine(step, initial, start, stop):
    """RigL's fraction of connections that move, held constant outside of its window."""
    if step >= stop:
        return 0.0
    if step <= start:
        return initial
    return initial / 2 * (1 + math.cos(math.pi * (step - start) / (stop - start)))


def gradient_average(gradients, decay):
    """`S <- decay * S + (1 - decay) * |g|` from 0, entry by entry in double precision."""
    average = np.zeros(np.shape(gradients[0]))
    for gradient in gradients:
        for index in np.ndindex(average.shape):
            if math.isfinite(gradient[index]):
                average[index] = decay * average[index] + (1 - decay) * abs(gradient[index])
    return average
