"""Finds which indices must be kept or removed together: a union-find over arrays of integers."""

import numpy as np

FROZEN = 0  # the node of everything that must be kept


class Nodes:
    """A growing union-find over whole arrays of nodes; the root of a class is its least node.

    Every index of every dimension has a node. The nodes of a class are kept or removed together.

    Example:
        >>> nodes = Nodes()
        >>> a, b = nodes.new(3), nodes.new(3)
        >>> nodes.unite(a, b[::-1])
        >>> (nodes.root(b) == a[::-1]).all()
        np.True_
    """

    def __init__(self) -> None:
        """Starts with the frozen node alone."""
        self.parent = np.zeros(4096, np.int64)
        self.of_leaf = np.zeros(4096, bool)  # at roots: whether the class has an index of a leaf
        self.used = np.zeros(4096, bool)  # at roots: whether anything is computed from the class
        self.count = 1

    def new(self, count: int, of_leaf: bool = False) -> np.ndarray:
        """Adds `count` nodes, each in a class of its own, and returns them, int64 [count]."""
        while self.count + count > len(self.parent):
            self.parent = np.concatenate([self.parent, np.zeros_like(self.parent)])
            self.of_leaf = np.concatenate([self.of_leaf, np.zeros_like(self.of_leaf)])
            self.used = np.concatenate([self.used, np.zeros_like(self.used)])
        nodes = np.arange(self.count, self.count + count)
        self.parent[nodes] = nodes
        self.of_leaf[nodes], self.used[nodes] = of_leaf, False
        self.count += count
        return nodes

    def root(self, nodes: np.ndarray) -> np.ndarray:
        """Returns the least node of each node's class."""
        roots = self.parent[nodes]
        higher = self.parent[roots]
        if (roots == higher).all():  # the usual case
            return roots
        while (roots != higher).any():
            roots, higher = higher, self.parent[higher]
        self.parent[nodes] = roots
        return roots

    def first_roots(self, count: int) -> np.ndarray:
        """Returns the roots of the first `count` nodes after the frozen one; twice as fast."""
        own = self.parent[1 : count + 1]
        while (own != (higher := self.parent[own])).any():
            own[:] = higher
        return own

    def unite(self, a: np.ndarray, b: np.ndarray) -> None:
        """Puts `a[i]` and `b[i]` into one class, for each i."""
        while True:
            root_a, root_b = self.root(a), self.root(b)
            differ = root_a != root_b
            if not differ.any():
                return
            low = np.minimum(root_a, root_b)[differ]
            high = np.maximum(root_a, root_b)[differ]
            for flags in (self.of_leaf, self.used):
                np.logical_or.at(flags, low, flags[high])
            np.minimum.at(self.parent, high, low)

    def is_frozen(self, nodes: np.ndarray) -> np.ndarray:
        """Tells for each node whether it must be kept, as bools."""
        return self.root(nodes) == FROZEN


def rows_of(array: np.ndarray, axis: int) -> np.ndarray:
    """Returns a matrix whose row i holds the entries at index i of an axis."""
    return np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)
