"""Masks to draw, and functions with sparse kernels held against masked dense ones."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import apply_masks, kernels, trees


def always(case, density):
    """A clock by which every kernel pays."""
    del case, density
    return kernels.Ratio(2.0, 2.0)


def inverse(case, density):
    """A clock by which kernels pay at less than 40 %."""
    del case
    return kernels.Ratio(0.3 / density, 0.4 / density)


def drawn_masks(tree, density=0.4, seed=0, under=""):
    """A random mask for each matrix and kernel of floats; the scalar True for the rest."""

    def mask(path, leaf):
        name = trees.path_string(path)
        shape = trees.shape_of(leaf)
        is_kernel = len(shape) >= 2 and min(shape[-2:]) > 1
        if not (is_kernel and jnp.issubdtype(leaf.dtype, jnp.floating) and name.startswith(under)):
            return True
        rng = np.random.default_rng((seed, *name.encode()))
        return rng.random(shape) < density

    return jax.tree.map_with_path(mask, tree)


def total(output):
    """A number that depends on every float of an output, each in a different way."""
    leaves = [x for x in jax.tree.leaves(output) if jnp.issubdtype(x.dtype, jnp.floating)]
    parts = [
        jnp.sum(x.astype(jnp.float32) * jnp.sin(jnp.arange(x.size)).reshape(x.shape))
        for x in leaves
    ]
    return sum(parts)


def gap(tree, other):
    """The largest difference of two trees, leaf by leaf relative to the largest entry."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    gaps = [0.0]
    for a, b in pairs:
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        if a.size:
            gaps.append(float(np.max(np.abs(a - b)) / max(1e-3, np.max(np.abs(b)))))
    return max(gaps)


def compare(function, masks, variables, *args, table="always", under=None):
    """Holds a wrapped function against the masked dense one; returns it, and the two gaps.

    `under` is the branch of the variables that is differentiated; None: all floats.
    """
    variables = apply_masks(variables, masks)
    wrapped = kernels.wrap(function, masks, variables, *args, table=table)

    def differentiable(path, leaf):
        name = trees.path_string(path)
        chosen = under is None or name.startswith(under)
        return chosen and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)

    flags = jax.tree.map_with_path(differentiable, variables)
    moving = jax.tree.map(lambda x, own: x if own else None, variables, flags)
    fixed = jax.tree.map(lambda x, own: None if own else x, variables, flags)

    def loss(function, moving, args):
        def pick(a, b):
            return b if a is None else a

        whole = jax.tree.map(pick, moving, fixed, is_leaf=lambda x: x is None)
        output = function(whole, *args)
        return total(output), output

    def masked(variables, *args):
        return function(apply_masks(variables, masks), *args)

    both = []
    for call in (wrapped, masked):
        grad = jax.jit(jax.grad(lambda m, a, call=call: loss(call, m, a), has_aux=True))
        gradients, output = grad(moving, args)
        by_path, kept = trees.places(gradients), trees.places(masks)
        gradients = [
            np.asarray(leaf) * np.asarray(kept[path])
            for path, leaf in by_path.items()
            if leaf is not None
        ]
        both.append((output, gradients))
    (output, gradients), (wanted, wanted_gradients) = both
    return wrapped, gap(output, wanted), gap(gradients, wanted_gradients)
