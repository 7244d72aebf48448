"""Holds which channels are kept; makes smaller trees, masked trees, and functions that fit them."""

import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import files, jaxprs, trees
from jaxprune.jaxprs import abstract, split
from jaxprune.structure._analysis import Analysis
from jaxprune.structure._execution import Execution
from jaxprune.structure._fitting import Fit, compare, relative_gap
from jaxprune.structure._nodes import FROZEN
from jaxprune.structure._slicing import take, uneven, zero
from jaxprune.structure._traces import (
    Model,
    Trace,
    Traced,
    analyze,
    run,
    trace_function,
)
from jaxprune.structure._values import Graph
from jaxprune.structure._zeros import LOST, PRESENT, ZERO, follow

VERSION = 3  # of what `to_dict` returns; 2 had no checksum


class Plan(NamedTuple):
    """The kept indices of every dimension of every leaf.

    A leaf of which nothing is kept disappears, as those of a removed block do.

    Example:
        >>> model = Model({"w": (2, 3)}, frozenset({"w"}))
        >>> plan = Plan(model, {"w": [np.array([True, True]), np.array([True, False, True])]})
        >>> plan.compact({"w": jnp.arange(6).reshape(2, 3)})["w"].tolist()
        [[0, 2], [3, 5]]
        >>> print(plan)
        w [2x3] -> [2x2]
        Parameters: 6 -> 4 (66.7%); leaves that stay as they are: 0 of 1
    """

    model: Model
    kept: dict[str, list[np.ndarray]]  # path of a leaf -> bool [size] for each dimension

    def __str__(self) -> str:
        """Lists every leaf that changes with its shapes before and after, then the totals."""

        def text(shape: tuple[int, ...]) -> str:
            return f"[{'x'.join(map(str, shape))}]"

        before, after = self.model.shapes, {path: self.shape(path) for path in self.kept}
        lines = [
            f"{path} {text(shape)} -> {'removed' if self.is_removed(path) else text(after[path])}"
            for path, shape in before.items()
            if after[path] != shape
        ]
        own = self.model.parameters
        counts = [sum(math.prod(shapes[path]) for path in own) for shapes in (before, after)]
        share = f" ({counts[1] / counts[0]:.1%})" if counts[0] else ""
        return "\n".join(
            [
                *lines,
                f"Parameters: {counts[0]:,} -> {counts[1]:,}{share}; leaves that stay as they "
                f"are: {len(before) - len(lines)} of {len(before)}",
            ]
        )

    def shape(self, path: str) -> tuple[int, ...]:
        """Returns the shape of a compacted leaf."""
        return tuple(int(own.sum()) for own in self.kept[path])

    def is_removed(self, path: str) -> bool:
        """Tells whether a leaf disappears, as those of a block that is removed do."""
        return any(len(own) and not own.any() for own in self.kept[path])

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the compacted leaves by path, without those that disappear."""
        return {path: self.shape(path) for path in self.kept if not self.is_removed(path)}

    def take(self, path: str, array: Any) -> Any:
        """Takes the kept entries of an array shaped like a leaf, such as its gradient.

        The result is None for a leaf that disappears.
        """
        return None if self.is_removed(path) else take(array, self.kept[path])

    def channels(self, group: Any) -> np.ndarray:
        """Tells which channels of a group of `find_groups` are kept, as bool [size]."""
        left = np.zeros(group.size, bool)
        for member in group.members:
            if not self.is_removed(member.path):
                own = member.channels[self.kept[member.path][member.dimension]]
                left[own[own >= 0]] = True
        return left

    def then(self, after: "Plan") -> "Plan":
        """Composes this plan with a later one; the result applies to the dense model.

        Args:
            after: a plan for the variables compacted by this one, such as from
                `Groups.compact(self)`.

        Returns:
            A plan that keeps what both keep.

        Raises:
            ValueError: if `after` belongs to variables with different paths or shapes; it lists all
                of them.
        """
        left = self.shapes
        problems = [
            f"{path}: shape {left.get(path, 'missing')} after this plan, "
            f"{after.model.shapes.get(path, 'missing')} in `after`"
            for path in left.keys() | after.kept.keys()
            if left.get(path) != after.model.shapes.get(path)
        ]
        trees.raise_for(
            sorted(problems), "`after` must be a plan for the variables compacted by this one:"
        )
        kept = {path: [own.copy() for own in flags] for path, flags in self.kept.items()}
        for path in left:
            for own, later in zip(kept[path], after.kept[path], strict=True):
                own[own] = later
        return self._replace(kept=kept)

    def compact(self, variables: Any) -> Any:
        """Removes the channels that the plan does not keep.

        Args:
            variables: tree like that of `find_groups`, at dense shapes.

        Returns:
            The same tree with smaller arrays, and None in place of the leaves of removed blocks.

        Raises:
            ValueError: if paths or shapes belong to a different model, or an array would no longer
                divide by the number of devices that it is split over; it lists all of them.
        """
        self._check(variables, self.model.shapes)
        leaves = trees.leaf_by_path(variables)
        problems = {path: uneven(leaves[path], shape) for path, shape in self.shapes.items()}
        trees.raise_for(
            [f"{path}: {problem}" for path, problem in problems.items() if problem],
            "`variables` must still divide over their devices after removal; make the plan with a "
            "`multiple` that does:",
        )
        return self._map(self.take, variables)

    def mask(self, variables: Any) -> Any:
        """Zeroes parameters and caches where `compact` removes entries; other state is unchanged.

        The dense function on this tree is the reference for the compacted one.

        Args:
            variables: tree like that of `find_groups`, at dense shapes.

        Returns:
            The same tree with zeros.

        Raises:
            ValueError: as for `compact`.
        """

        def zeroed(path: str, leaf: Any) -> Any:
            masked = path in self.model.parameters or path in self.model.caches
            return zero(leaf, self.kept[path]) if masked else leaf

        return self._map(zeroed, variables)

    def _map(self, change: Callable[[str, Any], Any], variables: Any) -> Any:
        self._check(variables, self.model.shapes)
        leaves = [
            change(path, leaf) if path in self.kept else leaf
            for path, leaf in trees.leaf_by_path(variables).items()
        ]
        return jax.tree.unflatten(jax.tree.structure(variables), leaves)

    def _check(self, variables: Any, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raises if the tree belongs to a different model.

        Numbers may be unknown: `find_groups` passes over those of Python, which `jit` makes arrays.
        """
        leaves = trees.leaf_by_path(variables)
        found = {path: trees.shape_of(leaf) for path, leaf in leaves.items()}
        problems = [f"{path}: missing" for path in shapes if path not in found]
        problems += [
            f"{path}: not in the plan" for path in found if path not in shapes and found[path]
        ]
        problems += [
            f"{path}: shape {found[path]}, must be {shape}"
            for path, shape in shapes.items()
            if path in found and found[path] != shape
        ]
        trees.raise_for(problems, "`variables` must be those of the plan:")

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Makes the same function for compacted variables.

        The function is traced at the dense shapes, checked against the plan, and then run on the
        smaller arrays. Call the result under `jax.jit`, as tracing takes time.

        Args:
            function: `function(variables, *args, **kwargs)`: one of those given to `find_groups`,
                or a different one that the plan fits.

        Returns:
            A function of compacted variables and the same arguments. What is no array among them,
            such as `train=True` or `mutable=["batch_stats"]`, is passed on as it is; under
            `jax.jit`, name it in `static_argnames`.

        Raises:
            ValueError: when the returned function is called, if the variables are not compacted by
                this plan or the function needs channels that the plan removes.
        """

        @functools.wraps(function)
        def compacted(variables: Any, *args: Any, **kwargs: Any) -> Any:
            self._check(variables, self.shapes)
            trace = Trace(function, args, kwargs=kwargs)
            traced, graph, execution, arrays = self.follow(trace, variables)
            states = self.states(len(graph.ins))
            return self._filled(traced, graph, execution, execution.graph(graph, arrays, states))

        return compacted

    def fits(
        self,
        function: Callable[..., Any],
        variables: Any,
        *args: Any,
        tolerance: float = 1e-4,
        **kwargs: Any,
    ) -> Fit:
        """Decides whether a function may run on the compacted arrays unchanged, without `wrap`.

        Code that reads a width from its arrays, such as the divisor of a mean, computes something
        different on smaller ones. Both functions are traced and compared, operation by operation
        and constant by constant. Where they differ, their outputs are compared if `variables` holds
        arrays.

        Args:
            function: see `wrap`.
            variables: dense or compacted, arrays or `jax.ShapeDtypeStruct`.
            *args: arguments of the function, arrays or `jax.ShapeDtypeStruct`.
            tolerance: largest difference allowed, relative to the largest entry of each output.
            **kwargs: keyword arguments of the function.

        Returns:
            A `Fit`, true if the function fits, with the reasons if it does not.

        Raises:
            ValueError: as for the function returned by `wrap`.
        """
        leaves = trees.leaf_by_path(variables)
        shapes = {path: trees.shape_of(leaves[path]) for path in self.kept if path in leaves}
        small = variables
        if shapes == self.model.shapes:
            is_concrete = all(hasattr(leaves[path], "__array__") for path in self.kept)
            small = self.compact(variables) if is_concrete else self._map(self._small, variables)
        return compare(function, self.wrap(function), small, args, kwargs, tolerance)

    def kept_outputs(
        self, function: Callable[..., Any], variables: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Tells which channels of a function's outputs are kept, such as those of `Trace.shrinks`.

        Args:
            function: see `wrap`.
            variables: dense arrays or `jax.ShapeDtypeStruct`.
            *args: arguments of the function, arrays or `jax.ShapeDtypeStruct`.
            **kwargs: keyword arguments of the function.

        Returns:
            A tree like the output, with a list in place of each array: bool [size] for each
            dimension, and bool [1] for one of symbolic size, which is kept whole.

        Raises:
            ValueError: as for the function returned by `wrap`.
        """
        self._check(variables, self.model.shapes)
        trace = Trace(function, args, kwargs=kwargs)
        traced, graph, execution, _ = self.follow(trace, variables)
        kept = [
            [
                np.ones(1, bool)
                if jaxprs.has_symbols((size,))
                else execution.kept(value, dimension)
                for dimension, size in enumerate(value.aval.shape)
            ]
            for value in graph.outs
        ]
        return traced.output(kept, False)

    def follow(self, trace: Trace, variables: Any) -> tuple[Traced, Graph, Execution, list[Any]]:
        """Traces a function on dense shapes and prepares its run on the kept indices.

        The last result holds the arrays among the variables and arguments, in the order of the run.
        """
        # Match leaves by path: string keys sort "10" before "2", integer keys do not.
        pairs, structure = jax.tree_util.tree_flatten_with_path(variables, is_leaf=_is_none)
        named = {trees.path_string(path): leaf for path, leaf in pairs}
        shapes = self.model.shapes
        trees.raise_for(
            [path for path in shapes if path not in named],
            "`variables` must have None in place of removed leaves, as `compact` puts it there:",
        )
        rest = [leaf for path, leaf in named.items() if path not in shapes]

        def function(leaves: list[Any], rest: list[Any], *args: Any, **kwargs: Any) -> Any:
            own, others = dict(zip(shapes, leaves, strict=True)), iter(rest)
            tree = structure.unflatten([own[p] if p in own else next(others) for p in named])
            return trace.function(tree, *args, **kwargs)

        dense = [self._dense(path, named[path]) for path in shapes]
        own = trace._replace(function=function, args=(rest, *trace.args))
        traced = trace_function(own, dense)
        analysis, graph = analyze(self.model, traced, outputs=False)
        ordered = [None if self.is_removed(path) else named[path] for path in shapes]
        arrays = [*ordered, *split((rest, trace.args, dict(trace.kwargs))).arrays]
        return traced, graph, Execution(analysis, self.kept_nodes(analysis)), arrays

    def _small(self, path: str, leaf: Any) -> Any:
        """Returns the type of a compacted leaf, or None for one that disappears."""
        return None if self.is_removed(path) else abstract(leaf, self.shape(path))

    def _dense(self, path: str, leaf: Any) -> Any:
        """Returns the type of a dense leaf, from the compacted one or None."""
        shape = self.model.shapes[path]
        if leaf is None:
            return jax.ShapeDtypeStruct(shape, self.model.dtypes.get(path, "float32"))
        return abstract(leaf, shape)

    def states(self, count: int) -> list[int]:
        """Returns what is known of the inputs of a traced function, see `_zeros`."""
        zero = self.model.parameters | self.model.caches
        own = [
            (ZERO if path in zero else LOST) if self.is_removed(path) else PRESENT
            for path in self.model.shapes
        ]
        return [*own, *[PRESENT] * (count - len(own))]

    def _filled(
        self, traced: Traced, graph: Graph, execution: Execution, results: Sequence[Any]
    ) -> Any:
        """Makes the output of a function whose results may be missing.

        The new value of a state that is removed is None. It has the path of that state at its end.
        Other results that are missing are 0.
        """
        if all(result is not None for result in results):
            return traced.output(results)
        state = [p for p in self.model.shapes if p not in self.model.parameters]
        gone = {path: self.model.shapes[path] for path in state if self.is_removed(path)}
        states = follow(graph, self.states(len(graph.ins))).outs
        paths = {
            index: path
            for path, index in trees.leaf_by_path(traced.output(range(len(results)), False)).items()
        }
        filled, problems = list(results), []
        for index, value in enumerate(graph.outs):
            here = f"/{paths[index]}"
            is_new = any(here.endswith(f"/{p}") and gone[p] == value.shape for p in gone)
            if results[index] is None and not is_new:
                filled[index] = execution.zeros(value)
                if states[index] == LOST:
                    problems.append(f"output {paths[index]}")
        trees.raise_for(
            problems,
            "the plan removes state that this function needs; make it from all functions that will "
            "run:",
        )
        return traced.output(filled)

    def kept_nodes(self, analysis: Analysis) -> np.ndarray:
        """Returns bools for the nodes of a function; raises if the plan does not fit it."""
        kept, problems = np.ones(analysis.nodes.count, bool), []
        dimensions = [
            (index, path, dimension, flags, analysis.root(leaf.nodes[dimension]))
            for index, (path, leaf) in enumerate(
                zip(self.model.shapes, analysis.leaves, strict=True)
            )
            if not self.is_removed(path)
            for dimension, flags in enumerate(self.kept[path])
        ]
        for index, path, dimension, flags, roots in dimensions:
            if (roots[~flags] == FROZEN).any():
                hits = [why for hit, why in analysis.freezes if (index, dimension) in hit]
                why = hits[0] if hits else "joined with a dimension that must be kept whole"
                problems.append(f"{path} dimension {dimension}: {why}")
            kept[roots[~flags]] = False
        kept[FROZEN] = True
        for _, path, dimension, flags, roots in dimensions:
            if (kept[roots] < flags).any():
                problems.append(f"{path} dimension {dimension}: would have to shrink as well")
        rule = "the plan does not fit this function; make it from all functions that will run:"
        trees.raise_for(problems, rule)
        return kept

    def verify(
        self,
        function: Callable[..., Any],
        variables: Any,
        *args: Any,
        updates: Callable[[Any], Any] | None = None,
        shrinks: Callable[[Any], Any] | None = None,
        tolerance: float = 1e-4,
        **kwargs: Any,
    ) -> float:
        """Compares the compacted function with the dense one on masked variables.

        Args:
            function: see `wrap`.
            variables: dense arrays.
            *args: arguments of the function.
            updates: see `Trace`.
            shrinks: see `Trace`.
            tolerance: largest difference allowed, relative to the largest entry of each output.
            **kwargs: keyword arguments of the function. If one of them has the name of an argument
                above, give a function that sets it.

        Returns:
            The largest relative difference.

        Raises:
            ValueError: if the difference is NaN or larger than the tolerance, or if an output that
                is no update has a different shape.
        """
        dense = split(run(function, self.mask(variables), *args, **kwargs))
        small = run(self.wrap(function), self.compact(variables), *args, **kwargs)
        outs = [dense.arrays, split(small).arrays]
        indices, gone = dense.tree(range(len(outs[0])), False), set[int]()
        if updates is not None:
            for path, index in trees.leaf_by_path(updates(indices)).items():
                outs[0][index] = self.take(path, outs[0][index])
                gone |= {index} if self.is_removed(path) else set()
        if shrinks is not None:
            kept = jax.tree.structure(indices).flatten_up_to(
                self.kept_outputs(function, variables, *args, **kwargs)
            )
            for index in jax.tree.leaves(shrinks(indices)):
                outs[0][index] = take(outs[0][index], kept[index])
        outs[0] = [out for index, out in enumerate(outs[0]) if index not in gone]
        shapes = [[jnp.shape(out) for out in own] for own in outs]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"outputs must have the shapes {shapes[0]}, but have {shapes[1]}; if some are new "
                "values of variables, name them with `updates`."
            )
        worst = float(np.max([0.0, *map(relative_gap, *outs)]))  # NaN if one is
        if not worst <= tolerance:
            raise ValueError(
                f"the compacted function differs from the masked one by {worst:.3g}, more than "
                f"`tolerance` {tolerance:g}; many layers can amplify rounding to a few times that: "
                "give a larger `tolerance` then; please report a difference that stays."
            )
        return worst

    def to_dict(self) -> dict[str, Any]:
        """Returns plain Python values with a checksum, ready for `json.dumps`; see `plan_of`."""
        dtypes = self.model.dtypes
        content = {
            "version": VERSION,
            "order": list(self.model.shapes),  # survives a writer that sorts the keys of `leaves`
            "parameters": sorted(self.model.parameters),
            "consumers": sorted(self.model.consumers),
            "caches": sorted(self.model.caches),
            "factors": [[*split, factor] for split, factor in self.model.factors],
            "leaves": {
                name: {
                    "shape": shape,
                    **({"dtype": dtypes[name]} if name in dtypes else {}),
                    "removed": [np.flatnonzero(~own).tolist() for own in self.kept[name]],
                }
                for name, shape in self.model.shapes.items()
            },
        }
        return files.seal(content)

    def save(self, path: str | Path) -> None:
        """Writes the plan as JSON; `load_plan` reads it.

        Args:
            path: the file; replaced atomically.
        """
        with files.replacing(path) as file:
            file.write(json.dumps(self.to_dict(), indent=1) + "\n")


def _is_none(node: Any) -> bool:
    return node is None
