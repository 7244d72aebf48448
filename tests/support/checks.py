"""What tests of compaction share: small layers, random choices, and the comparison with masks."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import structure, trees
from tests.support import jaxpr_numpy


def draw(*shape, seed=0):
    """Normal numbers, by NumPy: nothing has to be compiled for each shape."""
    numbers = np.random.default_rng((seed, *shape)).normal(size=shape)
    return jnp.asarray(numbers, jnp.float32)


X = draw(5, 6)


def halves(groups, seed=0):
    """About half of the channels of each group."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.permutation(np.arange(group.size) < (group.size + 1) // 2)
        for name, group in groups.items()
    }


def difference(a, b):
    scale = max([float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(a)] + [1e-3])
    gaps = jax.tree.map(lambda x, y: float(jnp.max(jnp.abs(x - y), initial=0.0)), a, b)
    return max(jax.tree.leaves(gaps)) / scale


def check(traces, variables, groups=None, plan=None, tolerance=2e-5):
    """Outputs, updates and gradients of compacted functions are those of masked ones."""
    groups = structure.find_groups(traces, variables) if groups is None else groups
    plan = groups.plan(halves(groups), multiple=1) if plan is None else plan
    dense, small = plan.mask(variables), plan.compact(variables)
    for trace in traces:
        wrapped = plan.wrap(trace.function)

        def run(function, variables, trace=trace):
            def loss(parameters, state):
                output = function(trees_merge(parameters, state), *trace.args)
                main = output if trace.updates is None else output[0]
                pairs = [jnp.sum(jnp.sin(3 * leaf)) for leaf in jax.tree.leaves(main)]
                return sum(pairs), output

            parameters, state = trees_split(variables, groups)
            return jax.jit(jax.value_and_grad(loss, has_aux=True))(parameters, state)

        (_, out), grads = run(trace.function, dense)
        (_, small_out), small_grads = run(wrapped, small)
        if trace.updates is not None:
            new, small_new = trace.updates(out), trace.updates(small_out)
            full = trees_update(variables, new)
            kept = trees_pick(plan.compact(full), small_new)
            assert difference(kept, small_new) < tolerance
            out, small_out = out[0], small_out[0]
        assert difference(out, small_out) < tolerance
        paths = trees.leaf_by_path(variables)
        full = {path: grads.get(path, leaf) for path, leaf in paths.items()}
        tree = jax.tree.unflatten(jax.tree.structure(variables), list(full.values()))
        kept = trees.leaf_by_path(plan.compact(tree))
        assert difference({p: kept[p] for p in small_grads}, small_grads) < tolerance
    return groups, plan


def trees_split(variables, groups):
    """Parameters by path, to take gradients of, and all else with the tree's structure."""
    named = trees.leaf_by_path(variables)
    parameters = {p: leaf for p, leaf in named.items() if p in groups.model.parameters}
    return parameters, variables


def trees_merge(parameters, state):
    named = trees.leaf_by_path(state)
    leaves = [parameters.get(path, leaf) for path, leaf in named.items()]
    return jax.tree.unflatten(jax.tree.structure(state), leaves)


def trees_update(variables, new):
    return trees_merge(trees.leaf_by_path(new), variables)


def trees_pick(variables, like):
    named = trees.leaf_by_path(variables)
    leaves = [named[path] for path in trees.leaf_by_path(like)]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def dense(w, x, name):
    return x @ w[name]["kernel"] + w[name]["bias"][None]


def layer(n_in, n_out, seed=0):
    return {"kernel": draw(n_in, n_out, seed=seed), "bias": draw(n_out, seed=seed + 1)}


def between(operation, width=8, out=None):
    """A layer of 8 channels, an operation, a layer to 3."""
    weights = {"a": layer(6, width), "b": layer(out or width, 3, seed=7)}
    return weights, lambda w, x: dense(w, operation(dense(w, x, "a")), "b")


# ---- the same comparison without compiling anything, for many programs


class Graded(NamedTuple):
    """A function with its gradients, as a jaxpr; called with leaves by path."""

    closed: Any
    structure: Any
    paths: tuple

    def __call__(self, leaves, args):
        flat = [leaves[path] for path in self.paths]
        outs = jaxpr_numpy.evaluate(self.closed, *flat, *jax.tree.leaves(args))
        return jax.tree.unflatten(self.structure, outs)


def graded(trace, function, variables, parameters):
    """Outputs, updates, and gradients for parameters and for arguments."""

    def run(variables, args):
        def loss(moving, args):
            output = function(trees_merge(moving, variables), *args)
            new = {} if trace.updates is None else trees.leaf_by_path(trace.updates(output))
            main = output if trace.updates is None else output[0]
            floats = [x for x in jax.tree.leaves(main) if jnp.issubdtype(x.dtype, jnp.floating)]
            return sum(jnp.sum(jnp.sin(3 * x + 0.1)) for x in floats), (main, new)

        named = trees.leaf_by_path(variables)
        moving = {path: leaf for path, leaf in named.items() if path in parameters}
        gradients, (main, new) = jax.grad(loss, (0, 1), has_aux=True, allow_int=True)(moving, args)
        slopes = [g for g in jax.tree.leaves(gradients[1]) if g.dtype != jax.dtypes.float0]
        return jax.tree.leaves(main), new, gradients[0], slopes

    closed, shapes = jax.make_jaxpr(run, return_shape=True)(variables, trace.args)
    return Graded(closed, jax.tree.structure(shapes), tuple(trees.leaf_by_path(variables)))


def gap(a, b):
    """The largest difference relative to the largest entry of each array, and NaN if one is."""
    floor = 1e-6 * max([np.max(np.abs(leaf), initial=0.0) for leaf in jax.tree.leaves(a)] + [1e-6])
    worst = [0.0]
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.shape == y.shape, f"{x.shape} is not {y.shape}"
        x, y = np.asarray(x, float), np.asarray(y, float)
        worst.append(np.max(np.abs(x - y), initial=0.0) / (np.max(np.abs(x), initial=0.0) + floor))
    return float(np.max(worst))


def taken(leaves, kept):
    """Leaves without what goes, by NumPy; where a shape is not that of the leaf, as it is."""
    return {
        path: leaf[np.ix_(*kept[path])] if leaf.shape == tuple(map(len, kept[path])) else leaf
        for path, leaf in leaves.items()
        if not is_gone(kept[path])
    }


def is_gone(flags):
    """Whether nothing of a leaf is left."""
    return any(len(own) and not own.any() for own in flags)


def zeroed(leaves, kept, paths):
    """Leaves with zeros at what goes, by NumPy."""
    masks = {path: np.ones(leaves[path].shape, bool) for path in paths}
    for path, mask in masks.items():
        for dimension, flags in enumerate(kept[path]):
            np.moveaxis(mask, dimension, 0)[~flags] = False
    return {path: leaf * masks[path] if path in masks else leaf for path, leaf in leaves.items()}


def partly_zeroed(groups, plan, leaves, members):
    """Zeros where the plan removes from those members of each group that `members` names."""
    kept = {path: [np.ones(n, bool) for n in leaf.shape] for path, leaf in leaves.items()}
    for name, group in groups.units.items():
        flags = plan.channels(group)
        for member in group.members if name in groups.blocks else members(group):
            own = np.where(member.channels >= 0, flags[member.channels], True)
            kept[member.path][member.dimension] &= own
    return zeroed(leaves, kept, plan.model.parameters | plan.model.caches)


def compared(groups, plan, trace, call, variables):
    """How far a plan is from masks, by what is compared; None if masks give no finite numbers.

    `call` is the graded dense function, and `variables` a tree of NumPy arrays.
    """
    model, leaves = plan.model, trees.leaf_by_path(variables)
    small = taken(leaves, plan.kept)
    masked = zeroed(leaves, plan.kept, model.parameters | model.caches)
    main, new, gradients, slopes = outs = call(masked, trace.args)
    if not all(np.isfinite(np.asarray(leaf, float)).all() for leaf in jax.tree.leaves(outs)):
        return None
    wanted = main, taken(new, plan.kept), taken(gradients, plan.kept), slopes
    tree = jax.tree.unflatten(jax.tree.structure(variables), [small.get(p) for p in leaves])
    wrapped = graded(trace, plan.wrap(trace.function), tree, model.parameters)
    names = "outputs", "updates", "gradients", "gradients for arguments"
    gaps = dict(zip(names, map(gap, wanted, wrapped(small, trace.args)), strict=True))
    gaps["caches that are not 0"] = gap(new, zeroed(new, plan.kept, model.caches & new.keys()))
    for name, members in {"producers": producers, "gates": lambda group: group.gates}.items():
        fewer = partly_zeroed(groups, plan, leaves, members)
        gaps[f"outputs, zeroing {name}"] = gap(main, call(fewer, trace.args)[0])
    return gaps


def producers(group):
    """What has to be 0 if a group is exact, else all."""
    return [member for member in group.members if member.produces or not group.exact]
