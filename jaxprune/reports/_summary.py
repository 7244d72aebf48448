"""Parameters, non-zeros and bytes of a network, counted exactly."""

import io
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune import storage
from jaxprune.reports._tables import table
from jaxprune.trees import leaves_with_paths, raise_for


class Row(NamedTuple):
    """One leaf of a `Summary`, or its total (where `shape` is empty).

    Example:
        >>> Row("head/kernel", (2, 3), parameters=6, nonzeros=3, bytes=24).sparsity
        0.5
    """

    path: str
    shape: tuple[int, ...]
    parameters: int
    nonzeros: int
    bytes: int

    @property
    def sparsity(self) -> float:
        """Fraction of zeros, from 0 to 1."""
        return 1 - self.nonzeros / self.parameters if self.parameters else 0.0

    @property
    def density(self) -> float:
        """Fraction of non-zeros, from 0 to 1."""
        return 1 - self.sparsity

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, ready for `json.dumps`."""
        return self._asdict() | {"shape": list(self.shape), "sparsity": self.sparsity}


class Summary(NamedTuple):
    """Rows of all leaves; `str()` is an aligned table that ends with the total.

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
        """Sums over all leaves."""
        parameters, nonzeros, size = (
            sum(getattr(row, field) for row in self.rows)
            for field in ("parameters", "nonzeros", "bytes")
        )
        return Row("total", (), parameters, nonzeros, size)

    def to_dict(self) -> dict[str, Any]:
        """`{"leaves": [...], "total": {...}}` of plain Python values."""
        return {"leaves": [row.to_dict() for row in self.rows], "total": self.total.to_dict()}

    def __str__(self) -> str:
        cells = [
            row.to_dict()
            | {"shape": "x".join(map(str, row.shape)), "sparsity": f"{row.sparsity:.2%}"}
            for row in (*self.rows, self.total)
        ]
        lines = table(cells, ("path", "shape", *Row._fields[2:4], "sparsity", "bytes")).split("\n")
        return "\n".join([*lines[:-1], lines[1], lines[-1]])


def summarize(params: Any, masks: Any = None) -> Summary:
    """Counts parameters, non-zeros and bytes per leaf and in total.

    A weight counts as zero when its mask is False or, without `masks`, when its value is 0. Counts
    are exact at any size. Bytes are those of the dense arrays.

    Args:
        params: Any pytree of arrays: Linen dicts, `nnx.State`, lists.
        masks: Bools of the same tree, True where kept, as `jaxprune.get_masks` gives them: of the
            shapes of the leaves, or scalars. With masks, `params` may hold `jax.ShapeDtypeStruct`.

    Returns:
        A `Summary`: print it, or use its `rows`, `total` and `to_dict()`.

    Raises:
        ValueError: If `params` has no leaves, or `masks` does not match it (names every leaf).

    Example:
        >>> import numpy as np
        >>> params = {"bias": np.ones(2, "f4"), "conv": {"kernel": np.ones((2, 2), "f4")}}
        >>> masks = {"bias": np.ones(2, bool), "conv": {"kernel": np.eye(2, dtype=bool)}}
        >>> print(summarize(params, masks))
        path         shape  parameters  nonzeros  sparsity  bytes
        -----------  -----  ----------  --------  --------  -----
        bias             2           2         2     0.00%      8
        conv/kernel    2x2           4         2    50.00%     16
        -----------  -----  ----------  --------  --------  -----
        total                        6         4    33.33%     24
    """
    kept = None if masks is None else _checked(params, masks)
    rows = []
    for path, leaf in _leaves(params):
        leaf = leaf if hasattr(leaf, "shape") else np.asarray(leaf)
        counted = np.asarray(leaf) != 0 if kept is None else kept[path]
        size = int(np.prod(leaf.shape, dtype=object))
        rows.append(
            Row(
                path=path,
                shape=tuple(int(length) for length in leaf.shape),
                parameters=size,
                nonzeros=int(np.count_nonzero(counted)),
                bytes=size * leaf.dtype.itemsize,
            )
        )
    return Summary(tuple(rows))


def checkpoint_bytes(params: Any, masks: Any) -> tuple[int, int]:
    """Size of a file with these parameters, saved dense and saved sparse.

    Both files are really written, in memory, by `jaxprune.storage.save`, uncompressed. In the
    dense file every leaf has the mask True; the sparse file has `masks`, and what `params` hold
    where these are False does not matter.

    Args:
        params: Any pytree of arrays.
        masks: Bools of the same tree, True where kept, of the shapes of the leaves or scalars.

    Returns:
        `(dense_bytes, sparse_bytes)`.

    Raises:
        ValueError: If `params` has no leaves, or `masks` does not match it (names every leaf).

    Example:
        >>> import numpy as np
        >>> kernel, mask = np.ones(10_000, np.float32), np.arange(10_000) < 1_000
        >>> dense, sparse = checkpoint_bytes([kernel], [mask])
        >>> dense - 40_000 < 1_000, sparse - (4_000 + 10_000 // 8) < 1_000
        (True, True)
    """
    kept = _checked(params, masks)
    leaves = [(np.asarray(leaf), kept[path]) for path, leaf in _leaves(params)]
    build = jax.tree.structure(params).unflatten
    pruned = build([np.where(mask, leaf, np.zeros((), leaf.dtype)) for leaf, mask in leaves])
    everything = build([True] * len(leaves))
    return _file_bytes(params, everything), _file_bytes(pruned, masks)


def _file_bytes(params: Any, masks: Any) -> int:
    """Length of the file with these parameters and masks."""
    file = io.BytesIO()
    storage.save(file, params, masks)
    return file.tell()


def _leaves(params: Any) -> list[tuple[str, Any]]:
    """Path and leaf of every leaf; there must be one."""
    leaves = leaves_with_paths(params)
    if not leaves:
        raise ValueError("`params` must hold at least one array, but it has no leaves")
    return leaves


def _checked(params: Any, masks: Any) -> dict[str, np.ndarray]:
    """Masks on the host by path; every mismatch with the parameters is named in one error."""
    leaves = _leaves(params)
    given = {path: np.asarray(mask) for path, mask in leaves_with_paths(masks)}
    bad = []
    for path, leaf in leaves:
        mask = given.get(path)
        if mask is None:
            bad.append(f"{path}: has no mask")
        elif mask.dtype != bool:
            bad.append(f"{path}: its mask has dtype {mask.dtype}")
        elif mask.shape not in ((), np.shape(leaf)):
            bad.append(f"{path}: has shape {np.shape(leaf)}, its mask {mask.shape}")
        else:
            given[path] = np.broadcast_to(mask, np.shape(leaf))
    known = {path for path, _ in leaves}
    bad += [f"{path}: a mask without a parameter" for path in given if path not in known]
    raise_for(
        bad, "`masks` must be a tree of bools like `params`, as `jaxprune.get_masks` gives it"
    )
    return given
