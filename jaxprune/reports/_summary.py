"""Counts parameters, non-zeros and bytes of a network exactly, and says what would be pruned."""

import io
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import processes, stacks, storage, trees
from jaxprune.reports._tables import table


class Row(NamedTuple):
    """A leaf in a `Summary`, or one copy of a stacked leaf, or the total (with an empty `shape`).

    Example:
        >>> Row("head/kernel", (2, 3), parameters=6, nonzeros=3, bytes=24).sparsity
        0.5
    """

    path: str
    shape: tuple[int, ...]
    parameters: int
    nonzeros: int  # counted from the values
    bytes: int  # bytes of the dense array
    kept: int | None = None  # counted from the mask; None without masks
    masked_nonzeros: int = 0  # number of weights that are masked but not 0; 0 if masks are applied
    reason: str | None = None  # why it is not prunable; None if it is

    @property
    def sparsity(self) -> float:
        """Fraction of zeros among the values, from 0 to 1."""
        return 1 - self.nonzeros / self.parameters if self.parameters else 0.0

    @property
    def density(self) -> float:
        """Fraction of non-zeros among the values, from 0 to 1."""
        return 1 - self.sparsity

    def to_dict(self) -> dict[str, Any]:
        """Returns plain Python values, ready for `json.dumps`."""
        return self._asdict() | {"shape": list(self.shape), "sparsity": self.sparsity}


class Summary(NamedTuple):
    """The rows of all leaves; `str()` is an aligned table that ends with the total.

    Without masks its last column says which leaves would be pruned, and why the others would not.
    With masks a column counts the kept weights, and a line below the table warns if masked weights
    are not 0.

    Example:
        >>> import numpy as np
        >>> summary = summarize({"kernel": np.eye(4), "bias": np.ones(4)})
        >>> summary.total.parameters, summary.total.nonzeros
        (20, 8)
        >>> summary.to_dict()["total"]["sparsity"]
        0.6
    """

    rows: tuple[Row, ...]

    @property
    def total(self) -> Row:
        """The sums over all leaves."""

        def summed(field: str) -> int:
            return sum(getattr(row, field) for row in self.rows)

        masked = any(row.kept is not None for row in self.rows)
        return Row(
            "total",
            (),
            summed("parameters"),
            summed("nonzeros"),
            summed("bytes"),
            kept=summed("kept") if masked else None,
            masked_nonzeros=summed("masked_nonzeros"),
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns `{"leaves": [...], "total": {...}}` of plain Python values."""
        return {"leaves": [row.to_dict() for row in self.rows], "total": self.total.to_dict()}

    def __str__(self) -> str:
        total = self.total
        cells = [
            row.to_dict()
            | {"shape": "x".join(map(str, row.shape)), "sparsity": f"{row.sparsity:.2%}"}
            | {"pruned": f"no: {row.reason}" if row.reason else "yes"}
            for row in self.rows
        ]
        parts = [row.parameters for row in self.rows if row.reason is None]
        sums = {"shape": "", "sparsity": f"{total.sparsity:.2%}", "pruned": f"{sum(parts):,}"}
        columns = ["path", "shape", "parameters", "nonzeros", "kept", "sparsity", "bytes", "pruned"]
        columns.remove("kept" if total.kept is None else "pruned")
        lines = table([*cells, total.to_dict() | sums], columns).split("\n")
        lines = [*lines[:-1], lines[1], lines[-1]]
        if total.masked_nonzeros:
            lines += [
                f"{total.masked_nonzeros:,} weights are masked but not 0. Either the masks were "
                "never applied to these parameters, such as an",
                "average, or a transformation follows pruning in the chain: see `jaxprune.check`, "
                "or call `jaxprune.apply_masks(params, masks)`.",
            ]
        return "\n".join(lines)


def summarize(
    params: Any,
    masks: Any = None,
    *,
    prunable: trees.Prunable = None,
    stacked: trees.Stacked = None,
) -> Summary:
    """Counts parameters, non-zeros and bytes per leaf and in total, and says what is pruned.

    Called before training, it shows which leaves a transformation with this `prunable` would prune,
    which not, and why. Non-zeros are counted from the values and kept weights from the masks, both
    exactly at any size. Bytes are those of the dense arrays. Leaves that are no arrays are skipped.

    Args:
        params: any pytree of arrays: Linen dicts, `nnx.State`, modules, lists.
        masks: bools in the same tree, True where kept, as `jaxprune.get_masks` returns them: of the
            shapes of the leaves, or scalars, also for a whole branch. With masks, `params` may hold
            `jax.ShapeDtypeStruct`; the kept weights then count as non-zeros.
        prunable: as in the transformations, see `trees.prunable_flags`; None is the default rule.
        stacked: function `(path, leaf) -> axes` that number copies of a layer, see
            `jaxprune.stacks`. Each copy gets a separate row, such as `layers/kernel[3]`.

    Returns:
        A `Summary`: print it, or use its `rows`, `total` and `to_dict()`.

    Raises:
        ValueError: inside `jit`; if `params` has no arrays, or only shapes and no masks; if `masks`
            does not match it (it lists every leaf); if `prunable` or `stacked` matches nothing.

    Example:
        >>> import numpy as np
        >>> params = {"bias": np.ones(2, "f4"), "conv": {"kernel": np.eye(2, dtype="f4")}}
        >>> print(summarize(params))
        path         shape  parameters  nonzeros  sparsity  bytes           pruned
        -----------  -----  ----------  --------  --------  -----  ---------------
        bias             2           2         2     0.00%      8  no: 1 dimension
        conv/kernel    2x2           4         2    50.00%     16              yes
        -----------  -----  ----------  --------  --------  -----  ---------------
        total                        6         4    33.33%     24                4
        >>> masks = {"bias": np.ones(2, bool), "conv": {"kernel": np.eye(2, dtype=bool)}}
        >>> print(summarize(params, masks))
        path         shape  parameters  nonzeros  kept  sparsity  bytes
        -----------  -----  ----------  --------  ----  --------  -----
        bias             2           2         2     2     0.00%      8
        conv/kernel    2x2           4         2     2    50.00%     16
        -----------  -----  ----------  --------  ----  --------  -----
        total                        6         4     4    33.33%     24
    """
    _check_known(params, masks, "summarize")
    leaves = _leaves(params)
    kept = None if masks is None else _checked(params, masks)
    axes = stacks.axes_of(params, stacked)
    reasons = trees.reasons(params, axes)
    if prunable is not None:
        flags = trees.prunable_flags(params, prunable, stacked)
        chosen = dict(zip(trees.leaf_by_path(params), flags, strict=True))
        reasons = {path: None if flag else "not in `prunable`" for path, flag in chosen.items()}
    shapes = [path for path, leaf in leaves if isinstance(leaf, jax.ShapeDtypeStruct)]
    if masks is None:
        trees.raise_for(shapes, "`params` has shapes instead of values; give arrays or `masks`:")
    rows: list[Row] = []
    for path, leaf in leaves:
        mask = None if kept is None else kept[path]
        values = mask if isinstance(leaf, jax.ShapeDtypeStruct) else nonzero(leaf)
        counts = {"nonzeros": values, "kept": mask}
        if mask is not None:
            counts["masked_nonzeros"] = values & ~mask
        rows += _rows(path, leaf, axes[path], counts, reasons[path])
    return Summary(tuple(rows))


def _rows(
    path: str, leaf: Any, axes: tuple[int, ...], bits: dict[str, Any], reason: str | None
) -> list[Row]:
    """Makes a row for each copy in a leaf; `bits` are bools like the leaf, or None."""
    shape = tuple(int(size) for axis, size in enumerate(leaf.shape) if axis not in axes)
    size = int(np.prod(shape, dtype=object))
    others = tuple(axis for axis in range(len(leaf.shape)) if axis not in axes)
    counts = {
        name: np.count_nonzero(array, axis=others)
        for name, array in bits.items()
        if array is not None
    }
    rows = []
    copies = np.ndindex(*(leaf.shape[axis] for axis in axes))
    for copy, name in zip(copies, trees.copy_paths(path, leaf.shape, axes), strict=True):
        own = {name: int(np.asarray(count)[copy]) for name, count in counts.items()}
        rows.append(Row(name, shape, size, bytes=size * leaf.dtype.itemsize, reason=reason, **own))
    return rows


def checkpoint_bytes(params: Any, masks: Any) -> tuple[int, int]:
    """Measures the size of a file with these parameters, saved dense and saved sparse.

    Both files are written in memory by `jaxprune.storage.save`, uncompressed. In the dense file
    every leaf has the mask True. The sparse file has `masks`; the values of `params` where these
    are False do not matter.

    Args:
        params: any pytree of arrays.
        masks: bools in the same tree, True where kept, of the shapes of the leaves or scalars.

    Returns:
        `(dense_bytes, sparse_bytes)`.

    Raises:
        ValueError: if `params` has no leaves, or `masks` does not match it (it lists every leaf).

    Example:
        >>> import numpy as np
        >>> kernel, mask = np.ones(10_000, np.float32), np.arange(10_000) < 1_000
        >>> dense, sparse = checkpoint_bytes([kernel], [mask])
        >>> dense - 40_000 < 1_000, sparse - (4_000 + 10_000 // 8) < 1_000
        (True, True)
    """
    _check_known(params, masks, "checkpoint_bytes")
    kept = _checked(params, masks)
    pruned = [
        np.where(kept[path], np.asarray(leaf), np.zeros((), leaf.dtype)) if path in kept else leaf
        for path, leaf in trees.leaves_with_paths(params)
    ]
    pruned = jax.tree.structure(params).unflatten(pruned)
    everything = jax.tree.map(lambda _: True, params)
    return _file_bytes(params, everything), _file_bytes(pruned, masks)


def _check_known(params: Any, masks: Any, caller: str) -> None:
    """Raises inside `jit`, where values are not known."""
    trees.check_known("params", params, caller)
    trees.check_known("masks", masks, caller)


def _file_bytes(params: Any, masks: Any) -> int:
    """Returns the length of a file with these parameters and masks."""
    file = io.BytesIO()
    storage.save(file, params, masks, compression=None)
    return file.tell()


def nonzero(leaf: Any) -> np.ndarray:
    """Returns bools on the host, True where an array is not 0; random keys are never 0."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        return np.ones(leaf.shape, bool)
    with np.errstate(invalid="ignore"):  # NumPy warns of signalling NaN
        return processes.on_host(leaf) != 0


def _leaves(params: Any) -> list[tuple[str, Any]]:
    """Lists path and leaf of every array; raises if there is none."""
    leaves = [named for named in trees.leaves_with_paths(params) if trees.is_array(named[1])]
    if not leaves:
        raise ValueError("`params` must hold at least one array, but no leaf is one.")
    return leaves


def _checked(params: Any, masks: Any) -> dict[str, np.ndarray]:
    """Maps paths to masks on the host; one error lists every mismatch with the parameters."""
    leaves, places = _leaves(params), trees.places(params)
    given = trees.spread(masks, params)
    full, bad = {}, []
    for path, leaf in leaves:
        mask = given.get(path, False)
        mask = np.array(True) if mask is None else mask
        if path not in given or not trees.is_numeric(mask):
            bad.append(f"{path}: has no mask")
            continue
        mask = processes.on_host(mask)
        if mask.dtype != bool:
            bad.append(f"{path}: its mask has dtype {mask.dtype}")
        elif mask.shape not in ((), leaf.shape):
            bad.append(f"{path}: has shape {leaf.shape}, its mask {mask.shape}")
        else:
            full[path] = np.broadcast_to(mask, leaf.shape)
    bad += [
        f"{path}: a mask without a parameter"
        for path, mask in given.items()
        if path not in places or (places[path] is None and not trees.keeps_leaf(mask))
    ]
    trees.raise_for(
        bad, "`masks` must be a tree of bools like `params`, as `jaxprune.get_masks` returns it:"
    )
    return full
