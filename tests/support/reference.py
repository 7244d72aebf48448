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


def erdos_renyi_densities(shapes, sparsity, kernel):
    """SET's and RigL's densities: leaves above 1 become dense until there is none, in Fractions."""
    raw = [
        Fraction(sum(s), math.prod(s)) if kernel else Fraction(s[-2] + s[-1], s[-2] * s[-1])
        for s in shapes
    ]
    dense = set()
    while True:
        free = [i for i in range(len(shapes)) if i not in dense]
        wanted = keep_count(sum(math.prod(s) for s in shapes), sparsity)
        wanted -= sum(math.prod(shapes[i]) for i in dense)
        if not free:
            return [Fraction(1)] * len(shapes)
        factor = wanted / sum(raw[i] * math.prod(shapes[i]) for i in free)
        above = {i for i in free if factor * raw[i] > 1}
        if not above:
            return [Fraction(1) if i in dense else factor * raw[i] for i in range(len(shapes))]
        dense |= above


def water_levels(sizes, most, amount):
    """Pours `amount` over leaves in proportion to their sizes; what overflows goes to the rest."""
    full = set()
    while len(full) < len(sizes):
        free = [i for i in range(len(sizes)) if i not in full]
        level = Fraction(amount - sum(most[i] for i in full), sum(sizes[i] for i in free))
        over = {i for i in free if level * sizes[i] > most[i]}
        if not over:
            break
        full |= over
    return [Fraction(m) if i in full else level * sizes[i] for i, m in enumerate(most)]


def largest_remainder(shares, total):
    """Integers near the shares: one more to the largest remainder until the total is met."""
    counts = [math.floor(share) for share in shares]
    while sum(counts) < total:
        remainders = [share - count for share, count in zip(shares, counts, strict=True)]
        counts[remainders.index(max(remainders))] += 1
    return counts


def conv_patches(image, window, strides, padding, dilation):
    """Rows of a convolution, [batch x out positions, window x channels], one entry at a time."""
    image = np.pad(image, [(0, 0), *padding, (0, 0)])
    rows = []
    for example in image:
        spans = [(w - 1) * d for w, d in zip(window, dilation, strict=True)]
        corners = [
            range(0, size - span, stride)
            for size, span, stride in zip(example.shape, spans, strides, strict=False)
        ]
        for top in corners[0]:
            for left in corners[1]:
                row = []
                for i in range(window[0]):
                    for j in range(window[1]):
                        row.extend(example[top + i * dilation[0], left + j * dilation[1]])
                rows.append(row)
    return np.array(rows)


def wanda(weights, inputs, sparsity=None, n_m=None):
    """Mask of a matrix (features, outputs) from inputs (rows, features), output by output."""
    norms = np.sqrt((inputs.astype(float) ** 2).sum(axis=0))
    mask = np.zeros(weights.shape, bool)
    features, outputs = weights.shape
    for i in range(outputs):
        score = np.abs(weights[:, i]) * norms
        width, keep = (features, keep_count(features, sparsity)) if n_m is None else n_m[::-1]
        for start in range(0, features, width):
            order = np.argsort(-score[start : start + width], kind="stable")
            mask[start + order[:keep], i] = True
    return mask


def sparsegpt(weights, inputs, sparsity=None, n_m=None, block=128, damping=0.01):
    """Weights (features, outputs) and mask after the paper's sweep, in double precision."""
    weights, inputs = weights.astype(float).copy(), inputs.astype(float)
    features, outputs = weights.shape
    hessian = 2 * inputs.T @ inputs / len(inputs)
    for j in range(features):
        if hessian[j, j] == 0:
            hessian[j, j], weights[j] = 1, 0
    hessian += damping * np.mean(np.diag(hessian)) * np.eye(features)
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    mask = np.zeros(weights.shape, bool)
    width = block if n_m is None else n_m[1]
    for j in range(features):
        if j % width == 0:
            scores = np.array([weights[k] ** 2 / upper[k, k] ** 2 for k in range(features)])
            scores = scores[j : j + width]
            if n_m is None:
                order = np.argsort(-scores.reshape(-1), kind="stable")
                kept = order[: keep_count(scores.size, sparsity)]
                mask[j + kept // outputs, kept % outputs] = True
            else:
                for i in range(outputs):
                    order = np.argsort(-scores[:, i], kind="stable")
                    mask[j + order[: n_m[0]], i] = True
        error = np.where(mask[j], 0, weights[j]) / upper[j, j]
        for k in range(j + 1, features):
            weights[k] -= upper[j, k] * error
        weights[j] = np.where(mask[j], weights[j], 0)
    return weights, mask


def n_m_mask(scores, n, m, axis, among=None):
    """Sorts every group of `m`: larger first, NaN last, equal scores by index; keeps `n`."""
    scores = np.moveaxis(np.asarray(scores, np.float32), axis, -1)
    allowed = (
        np.ones(scores.shape, bool) if among is None else np.moveaxis(np.asarray(among), axis, -1)
    )
    mask = np.zeros(scores.shape, bool)
    for row in np.ndindex(scores.shape[:-1]):
        for start in range(0, scores.shape[-1], m):
            able = [i for i in range(start, start + m) if allowed[row][i]]
            able.sort(key=lambda i: (np.isnan(scores[row][i]), -scores[row][i], i))
            mask[row][able[:n]] = True
    return np.moveaxis(mask, -1, axis)


def unit_of(index, block):
    """Which block a weight belongs to."""
    return tuple(i // step for i, step in zip(index, block, strict=True))


def pool_units(scores, block, how):
    """Mean, maximum or sum over each block, weight by weight, in double precision."""
    members = {}
    for index in np.ndindex(scores.shape):
        members.setdefault(unit_of(index, block), []).append(float(scores[index]))
    units = np.zeros([i + 1 for i in max(members)])
    for unit, values in members.items():
        units[unit] = {"mean": np.mean, "max": np.max, "sum": np.sum}[how](values)
    return units


def expand_units(units, block, shape):
    """Every weight gets the flag of its block."""
    mask = np.zeros(shape, bool)
    for index in np.ndindex(shape):
        mask[index] = units[unit_of(index, block)]
    return mask


def slopes(function, weights, step=1e-5):
    """The gradient of a function of a list of arrays, by central differences."""
    found = [np.zeros(np.shape(w)) for w in weights]
    for i, w in enumerate(weights):
        for index in np.ndindex(np.shape(w)):
            moved = []
            for sign in (1, -1):
                copies = [np.array(v, np.float64) for v in weights]
                copies[i][index] += sign * step
                moved.append(function(copies))
            found[i][index] = (moved[0] - moved[1]) / (2 * step)
    return found


def snip(loss, weights):
    """How the loss depends on a mask of ones on every weight; the sizes, divided by their sum."""
    ones = [np.ones(np.shape(w)) for w in weights]
    by_mask = slopes(lambda masks: loss([m * w for m, w in zip(masks, weights)]), ones)
    total = sum(np.abs(s).sum() for s in by_mask)
    return [np.abs(s) / total for s in by_mask]


def grasp(loss, weights):
    """`w * (H g)`, where `H g` is how the gradient changes along itself; sizes sum to 1."""
    g = slopes(loss, weights)
    step = 1e-3 / math.sqrt(sum((s**2).sum() for s in g))
    ahead = slopes(loss, [w + step * s for w, s in zip(weights, g)])
    behind = slopes(loss, [w - step * s for w, s in zip(weights, g)])
    scores = [w * (a - b) / (2 * step) for w, a, b in zip(weights, ahead, behind)]
    total = sum(np.abs(s).sum() for s in scores)
    return [s / total for s in scores]


def synflow(kernels):
    """Share of all paths from input to output, weighed by their products, through each weight."""
    sizes = [np.abs(np.asarray(kernel, np.float64)) for kernel in kernels]
    into, out_of = [np.ones(sizes[0].shape[0])], [np.ones(sizes[-1].shape[1])]
    for size in sizes[:-1]:
        into.append(into[-1] @ size)
    for size in sizes[:0:-1]:
        out_of.insert(0, size @ out_of[0])
    paths = [np.outer(a, b) * size for a, size, b in zip(into, sizes, out_of)]
    return [p / sum(p.sum() for p in paths) for p in paths]


def drop_and_grow(weights, growth, masks, totals, moved):
    """RigL and SET in one leaf after another: drop the smallest weights, grow the rest's best."""
    new = []
    for w, g, mask, total, count in zip(weights, growth, masks, totals, moved, strict=True):
        count = min(count, mask.size - mask.sum())
        (kept,) = largest([np.abs(w)], total - count, among=[mask])
        (grown,) = largest([np.asarray(g)], total - kept.sum(), among=[~mask])
        new.append(kept | grown)
    return new


def straight_through(weight, gradients, rate, keeps):
    """Dense SGD on the gradients of a sparse network; `keeps[t]` values are in use at step t."""
    dense, used = weight.astype(np.float64), np.ones(weight.shape, bool)
    for gradient, keep in zip(gradients, keeps, strict=True):
        dense = dense - rate * gradient
        if keep is not None:
            (used,) = largest([np.abs(dense)], keep)
    return np.where(used, dense, 0), used


def hashed(word, size):
    """`lowbias32` of a position, keyed, as uniform float32; one position after another."""

    def mix(x):
        x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
        x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
        return x ^ (x >> 16)

    return np.array([(mix(mix(i) ^ int(word)) >> 8) / 2**24 for i in range(size)], np.float32)
