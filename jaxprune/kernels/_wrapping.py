"""Replaces the products of masked parameters in a function by sparse kernels."""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import masks as masks_of
from jaxprune import reports, trees
from jaxprune.jaxprs import abstract, on_arrays
from jaxprune.kernels import _operations as operations
from jaxprune.kernels import _table
from jaxprune.kernels._capacities import Capacities, capacity_of, still_fit
from jaxprune.kernels._rewriting import NO_EXPORT, evaluate
from jaxprune.kernels._sites import Key, Site, arranged, compute, compute_depthwise

__all__ = ["Layer", "Wrapped", "wrap"]

Table = _table.Table | Literal["always"] | None
_LEAST = 1.05  # a kernel must be expected to be this much faster
_FIX = "pass masks of these parameters, such as `jaxprune.get_masks(opt_state)`:"


@dataclasses.dataclass(frozen=True)
class Layer:
    """A masked leaf in one arrangement, and all products of the function that use it.

    Args:
        name: the path of the leaf; of further arrangements of the same leaf with a number.
        key: the arrangement.
        sites: the products.

    Example:
        >>> layer = Layer("w", Key("w", "product", (3, 4), ((), ())), ())
        >>> layer.size
        12
    """

    name: str
    key: Key
    sites: tuple[Site, ...]

    @property
    def size(self) -> int:
        """Number of weights, kept or not."""
        return int(np.prod(self.key.shape))

    @property
    def case(self) -> _table.Case:
        """The layer as the table of expected ratios knows it."""
        *window, inputs, outputs = self.key.shape
        rows = sum(site.rows for site in self.sites)
        stride = max(self.sites[0].strides) if window else 1
        features = int(np.prod(window)) * inputs
        return _table.Case(self.key.kind, rows, features, outputs, stride)

    @property
    def kernel(self) -> str:
        """The kernel in words."""
        *window, _, _ = self.key.shape
        return f"{window[0]}x{window[1]} convolution" if window else "product"


@dataclasses.dataclass(frozen=True, eq=False)
class Wrapped:
    """A function whose masked products run as sparse kernels, from `wrap`; print it.

    It is called like the function, `wrapped(params, *args, **kwargs)`, and can be differentiated,
    compiled and mapped like it. The masks are data: `wrapped.indices` is a dict of arrays, and a
    compiled step takes it as an argument and passes it on, `wrapped(params, batch,
    indices=indices)`. Its structure says which layers have a kernel, and its shapes say for how
    many weights there is room, so new masks are a new program only where `update` says so.
    `indices={}` computes all products densely. (An object that holds the masks and is closed over
    by a compiled step would become constants of the program, and a step would not see new masks.)

    Args:
        function: the function.
        layers: the masked leaves that are used as kernels, by name.
        reasons: why other uses of masked leaves are left as they are, by path.
        densities: the fraction of weights that is kept, by path of a masked leaf.
        expected: the expected ratio of the times of the dense and the sparse kernel, by name.
        capacities: the layers with a sparse kernel, and their room.
        indices: the indices of their masks, by name: a tree of arrays.
        unavailable: why no kernel can run here; None where they can.
        shapes: the shapes of all masked leaves, by path.
        table: what the layers are chosen by.
        gradients: whether forward and backward pass together must pay.
        depthwise: number of depthwise convolutions, which have dense kernels of their own.

    Example:
        >>> import jax
        >>> masks = {"w": jnp.eye(4, dtype=bool)}
        >>> params, x = {"w": jnp.eye(4)}, jnp.ones((2, 4))
        >>> wrapped = wrap(lambda params, x: x @ params["w"], masks, params, x, table="always")
        >>> step = jax.jit(lambda params, x, indices: wrapped(params, x, indices=indices))
        >>> step(params, x, wrapped.indices).tolist()
        [[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]]
    """

    function: Callable[..., Any]
    layers: Mapping[str, Layer]
    reasons: Mapping[str, tuple[str, ...]]
    densities: Mapping[str, float]
    expected: Mapping[str, float]
    capacities: Capacities
    indices: dict[str, Any]
    unavailable: str | None
    shapes: Mapping[str, tuple[int, ...]]
    table: Table
    gradients: bool
    depthwise: int

    no_export = NO_EXPORT

    def __call__(
        self, params: Any, *args: Any, indices: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        """Computes the function.

        Args:
            params: the parameters; masked entries must be 0.
            *args: the other arguments.
            indices: of this object or of one that `update` returned; {}: no sparse kernel.
                Default: those of this object.
            **kwargs: keyword arguments of the function.

        Returns:
            The output of the function.

        Raises:
            ValueError: if masked leaves are missing in `params` or have a different shape, or
                `indices` names layers that the function does not have.
        """
        indices = self.indices if indices is None else indices
        if not indices and not self.depthwise:
            return self.function(params, *args, **kwargs)
        self._check(params, indices)
        names = {layer.key: name for name, layer in self.layers.items()}

        def replace(equation: Any, operands: list[jax.Array], site: Site, *finish: Any) -> Any:
            own = indices.get(names.get(site.key, ""))
            return None if own is None else compute(equation, operands, site, own, *finish)

        paths = {self.layers[name].key.path for name in indices}
        return evaluate(
            self.function,
            paths,
            replace,
            _ignore,
            params,
            *args,
            finish=not self.gradients,
            **kwargs,
        )

    def update(self, masks: Any, *, capacities: Capacities | None = None) -> "Wrapped":
        """Returns the same function for new masks.

        Layers and capacities stay as they are, and so does a compiled step that takes `indices` as
        an argument, unless a layer has no room for its weights, or the number of kept weights has
        changed by half since the layers were chosen: then all of them are chosen again.

        Args:
            masks: tree of bools like the parameters, True where a weight is kept.
            capacities: what to use instead, such as the capacities of a run that is resumed.

        Returns:
            A `Wrapped`.

        Raises:
            ValueError: if the masks do not fit, or a layer of `capacities` has no room for them.

        Example:
            >>> masks = {"w": jnp.eye(4, dtype=bool)}
            >>> params, x = {"w": jnp.eye(4)}, jnp.ones((2, 4))
            >>> wrapped = wrap(lambda params, x: x @ params["w"], masks, params, x, table="always")
            >>> others = {"w": jnp.eye(4, dtype=bool)[::-1]}
            >>> wrapped.update(others).capacities == wrapped.capacities
            True
        """
        by_path = self._masks(masks)
        counts = {
            name: int(np.count_nonzero(by_path[layer.key.path]))
            for name, layer in self.layers.items()
        }
        expected = {
            name: self._expected(layer, counts[name] / layer.size)
            for name, layer in self.layers.items()
        }
        if capacities is None:
            fits = still_fit(self.capacities, counts)
            capacities = self.capacities if fits else self._chosen(counts, expected)
        trees.raise_for(
            [
                f"{name}: not a layer of the function"
                if name not in counts
                else f"{name}: room for {room} weights, but {counts[name]} are kept"
                for name, room in capacities.by_layer.items()
                if counts.get(name, room + 1) > room
            ],
            "`capacities` must name layers of the function, with room for the weights that the "
            "masks keep; omit it to choose again:",
        )
        indices = {}
        for name, room in capacities.by_layer.items():
            key = self.layers[name].key
            of = "product_indices" if key.kind == "product" else "convolution_indices"
            indices[name] = getattr(operations, of)(arranged(by_path[key.path], key), capacity=room)
        densities = {path: float(np.mean(mask)) for path, mask in by_path.items()}
        return dataclasses.replace(
            self, densities=densities, expected=expected, capacities=capacities, indices=indices
        )

    def __str__(self) -> str:
        """Shows the kernel of each masked leaf, or why it has none."""
        rows = []
        for path, density in self.densities.items():
            own = [(name, layer) for name, layer in self.layers.items() if layer.key.path == path]
            for name, layer in own:
                rows.append(self._row(name, layer, density))
            reasons = self.reasons.get(path, ())
            for reason in reasons if reasons or own else ("the function never multiplies it",):
                rows.append({"leaf": path, "density": density, "why": f"dense: {reason}"})
        columns = {"leaf": "masked leaf", "kernel": "kernel", "density": "density"}
        columns |= {"expected": "expected ratio"}
        if any("why" in row for row in rows):
            columns |= {"why": ""}
        count = len({self.layers[name].key.path for name in self.indices})
        head = f"{count} of {len(self.densities)} masked leaves have sparse kernels"
        if self.depthwise:
            head += f", {self.depthwise} depthwise convolutions have dense ones"
        if self.unavailable is not None:
            head += f": {self.unavailable}"
        return f"{head}\n{reports.table(rows, columns)}"

    def to_dict(self) -> dict[str, Any]:
        """Returns what `print` shows, as plain Python values for JSON."""
        return {
            "unavailable": self.unavailable,
            "depthwise": self.depthwise,
            "layers": {
                name: {
                    "kernel": layer.kernel if name in self.indices else None,
                    "density": self.densities[layer.key.path],
                    "expected": self.expected[name] or None,
                }
                for name, layer in self.layers.items()
            },
            "dense": {path: list(reasons) for path, reasons in self.reasons.items()},
        }

    def _row(self, name: str, layer: Layer, density: float) -> dict[str, Any]:
        """Returns the line of a layer."""
        ratio = self.expected[name]
        row = {"leaf": name, "kernel": layer.kernel, "density": density}
        if ratio:
            row["expected"] = f"{ratio:.2f}x"
        if name in self.indices:
            return row
        reason = "does not pay at this density"
        if self.unavailable is not None:
            reason = "sparse kernels do not run here"
        elif ratio >= _LEAST:
            reason = "begins to pay; it is added when the layers are chosen again"
        return row | {"kernel": None, "why": f"dense: {reason}"}

    def _masks(self, masks: Any) -> dict[str, np.ndarray]:
        """Returns the masks of the masked leaves by path, as arrays of NumPy."""
        trees.check_known("masks", masks, "kernels.wrap")
        given = trees.places(masks)
        problems = [f"{path}: no mask" for path in self.shapes if path not in given]
        problems += [
            f"{path}: mask {np.shape(given[path])}, but the leaf has {shape}"
            for path, shape in self.shapes.items()
            if path in given and np.shape(given[path]) not in ((), shape)
        ]
        problems += [
            f"{path}: a mask that prunes a leaf which had none before"
            for path, mask in given.items()
            if path not in self.shapes and np.ndim(mask) and not np.all(mask)
        ]
        trees.raise_for(problems, f"`masks` must fit the leaves of this function; {_FIX}")
        return {
            path: np.broadcast_to(np.asarray(jax.device_get(given[path]), bool), shape)
            for path, shape in self.shapes.items()
        }

    def _expected(self, layer: Layer, density: float) -> float:
        """Returns the expected ratio of a layer; 0 if it is unknown."""
        if not isinstance(self.table, _table.Table):
            return 0.0
        ratio = _table.expected_ratio(self.table, layer.case, density)
        return ratio.training if self.gradients else ratio.forward

    def _chosen(self, counts: Mapping[str, int], expected: Mapping[str, float]) -> Capacities:
        """Chooses the layers that pay, with room for their weights."""
        always = self.table == "always"
        if self.unavailable is not None and not always:
            return Capacities({}, sum(counts.values()))
        rooms = {
            name: capacity_of(counts[name], layer.size)
            for name, layer in self.layers.items()
            if always or expected[name] >= _LEAST
        }
        return Capacities(rooms, sum(counts.values()))

    def _check(self, params: Any, indices: Mapping[str, Any]) -> None:
        """Raises if parameters or indices belong to something else."""
        unknown = [f"{name}: not a layer of this function" for name in indices]
        trees.raise_for(
            [line for line, name in zip(unknown, indices) if name not in self.layers],
            "`indices` must be those of this function, from `wrap` or `update`:",
        )
        found = {path: trees.shape_of(leaf) for path, leaf in trees.leaves_with_paths(params)}
        trees.raise_for(
            [
                f"{path}: shape {found[path]}, but {shape} when the function was wrapped"
                if path in found
                else f"{path}: missing"
                for path, shape in self.shapes.items()
                if found.get(path) != shape
            ],
            "`params` must have the masked leaves that the function was wrapped with; wrap it "
            "again for these parameters:",
        )


def wrap(
    function: Callable[..., Any],
    masks: Any,
    params: Any,
    *args: Any,
    table: Table = None,
    gradients: bool = True,
    capacities: Capacities | None = None,
    **kwargs: Any,
) -> Wrapped:
    """Makes a function use sparse kernels where they pay: `x @ (mask * w)` without the zeros.

    The function is traced, never run. Every matrix product (`dot_general`) and every convolution
    over two dimensions (`conv_general_dilated`) whose kernel is a masked leaf may be replaced,
    forward and backward; in between, the leaf may be cast, transposed, reshaped, and multiplied by
    masks and scales, inside of `jit`, `jax.checkpoint`, scans and branches. All else is left as it
    is, and `print(wrapped)` says why: grouped, dilated and transposed convolutions, layers that a
    scan stacks, layers that are too dense to pay. Depthwise convolutions, masked or not, are
    computed by `depthwise_convolution`, see `replace_depthwise`.

    Masked weights must be 0 in `params`, as they are in every training with a transformation of
    this library; then the result is that of the function to rounding. Where a kernel is used, the
    gradient of a masked weight is 0 instead of the dense gradient, so methods that regrow need
    dense products at mask updates: `indices={}`, see `Following`. A product that meets `inf` or
    NaN in its input differs: 0 times these is NaN, and a sparse kernel does not multiply by a
    masked weight.

    Args:
        function: `function(params, *args, **kwargs)`, such as a model or a loss.
        masks: tree of bools like `params`, True where a weight is kept. A scalar is the mask of a
            leaf, or of a branch, that is not pruned.
        params: tree of arrays, or of `jax.ShapeDtypeStruct`.
        *args: the other arguments; shapes are enough. Their batch decides what pays.
        table: from `measure_table`. None: the table of this machine, which is measured at the first
            use. "always": each layer that has a kernel uses it, paying or not.
        gradients: whether forward and backward pass together must pay (training), or the forward
            pass alone.
        capacities: `wrapped.capacities` of an earlier call, to get the same program as there: the
            layers with kernels, and the room for their weights.
        **kwargs: keyword arguments of the function.

    Returns:
        A `Wrapped`, called like the function.

    Raises:
        TypeError: if `function` cannot be called.
        ValueError: if the masks do not fit the parameters, none of them prunes by entries, or a
            masked leaf is not floating point; each error lists all such leaves.

    Example:
        >>> def apply(params, x):
        ...     return jax.nn.relu(x @ params["hidden"]) @ params["head"]
        >>> params = {"hidden": jnp.eye(8), "head": jnp.ones((8, 3))}
        >>> masks = {"hidden": jnp.eye(8, dtype=bool), "head": True}
        >>> clock = lambda case, density: _table.Ratio(0.3 / density, 0.4 / density)
        >>> table = _table.measure_table(clock=clock)
        >>> print(wrap(apply, masks, params, jnp.ones((2, 8)), table=table))
        1 of 1 masked leaves have sparse kernels
        masked leaf   kernel  density  expected ratio
        -----------  -------  -------  --------------
        hidden       product    0.125           3.20x
    """
    if not callable(function):
        raise TypeError(
            f"`function` must be a function `function(params, *args)`, but is {function!r:.80}"
        )
    trees.check_known("masks", masks, "kernels.wrap")
    by_path = masks_of.fitting(masks, params, f"`masks` must fit `params`; {_FIX}")
    leaves = trees.leaf_by_path(params)
    shapes = {
        path: trees.shape_of(leaf)
        for path, leaf in leaves.items()
        if trees.shape_of(by_path.get(path)) == trees.shape_of(leaf) != ()
    }
    if not shapes:
        raise ValueError(
            "`masks` must have a mask of the shape of its leaf for what is pruned, but no leaf has "
            "one: nothing is pruned."
        )
    trees.raise_for(
        [
            f"{path}: {leaves[path].dtype}"
            for path in shapes
            if not jnp.issubdtype(leaves[path].dtype, jnp.floating)
        ],
        "masked leaves must be floating point, because sparse kernels have gradients; give these "
        "the mask True:",
    )
    sites: dict[Key, dict[Any, Site]] = {}
    depthwise: dict[Any, None] = {}
    reasons: dict[str, dict[str, None]] = {}

    def record(equation: Any, operands: list[jax.Array], site: Site) -> None:
        # By the variable of its result, because a scan traces its body more than once.
        sites.setdefault(site.key, {})[equation.outvars[0]] = site

    def note(path: str, reason: str) -> None:
        reasons.setdefault(path, {})[reason] = None

    def count(equation: Any, operands: list[jax.Array]) -> jax.Array:
        depthwise[equation.outvars[0]] = None
        return compute_depthwise(equation, operands)

    def trace(params: Any, args: Any, kwargs: Any) -> None:
        evaluate(function, shapes, record, note, params, *args, depthwise=count, **kwargs)

    _trace(trace, params, args, kwargs)
    layers: dict[str, Layer] = {}
    for path in shapes:
        keys = [key for key in sites if key.path == path]
        for number, key in enumerate(keys, 1):
            name = path if number == 1 else f"{path} ({number})"
            layers[name] = Layer(name, key, tuple(sites[key].values()))
    unavailable = operations.available()
    if table is None:
        table = _table.saved_table() if unavailable is None else _table.Table({}, ())
    empty = Wrapped(
        function,
        layers,
        {path: tuple(own) for path, own in reasons.items()},
        densities={},
        expected={},
        capacities=Capacities({}, sys.maxsize),  # more than any masks keep: chosen again now
        indices={},
        unavailable=unavailable,
        shapes=shapes,
        table=table,
        gradients=gradients,
        depthwise=0 if unavailable is not None else len(depthwise),
    )
    return empty.update(by_path, capacities=capacities)


def _ignore(path: str, reason: str) -> None:
    """Notes nothing."""
    del path, reason


def _trace(function: Callable[..., None], *args: Any) -> None:
    """Traces a function for what it notes."""
    call, arrays, _ = on_arrays(function, *args)
    jax.eval_shape(call, list(map(abstract, arrays)))
