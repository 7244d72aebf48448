"""The contract of a pruning transformation: laws that hold for every method of the library."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxprune import masks, trees
from jaxprune.testing._asserts import (
    assert_masked,
    assert_same_masks,
    assert_sparsity,
    traced_once,
)
from jaxprune.transforms import chain

Make = Callable[[float], optax.GradientTransformation]


class Example(NamedTuple):
    """A small training, on which laws are checked.

    Example:
        >>> example = Example({"w": jnp.ones((4, 4))}, lambda params, x: jnp.sum(x @ params["w"]),
        ...                   batch=lambda step: jnp.full((8, 4), step + 1.0))
        >>> float(example.loss(example.params, example.batch(0)))
        128.0
    """

    params: Any  # tree of float32 arrays
    loss: Callable[[Any, Any], jax.Array]  # (params, batch) -> scalar
    batch: Callable[[int], Any]  # number of the step -> batch


def check_transform(
    make: Make,
    *,
    sparsity: float = 0.75,
    steps: int = 9,
    example: Example | None = None,
    laws: Iterable[str] | None = None,
) -> dict[str, str]:
    """Checks that a pruning transformation keeps the laws of the library's own methods.

    `LAWS` has them all; each is one sentence. They are checked on a training of a few steps, behind
    SGD with momentum and AdamW, in `jaxprune.chain`.

    Args:
        make: function from a sparsity to a new transformation, for example `lambda sparsity:
            jaxprune.agip_transform(sparsity, every=2, start=1, stop=6)`. Its schedule must end
            before the last step. Its state must have the field `masks`, a tree of bools like the
            parameters, as `jaxprune.get_masks` reads it.
        sparsity: fraction of zeros in the leaves with masks after the last step.
        steps: number of steps.
        example: parameters, loss and batches of your own. Default: two layers of 8 x 16 and 16 x 8
            weights, the first with a bias. The first dimension of batches must be
            divisible by the number of devices for the law `devices`.
        laws: names in `LAWS`. Default: all.

    Returns:
        Law -> "holds", or "not checked: " with the reason.

    Raises:
        AssertionError: if a law is broken; the error has every broken one with its sentence and
            what was seen.
        ValueError: if a law is unknown.

    Example:
        >>> import jaxprune
        >>> make = lambda sparsity: jaxprune.magnitude_transform(sparsity, every=2, start=1, stop=6)
        >>> check_transform(make, laws=["zero", "exact"])
        {'zero': 'holds', 'exact': 'holds'}
    """
    names = [*LAWS] if laws is None else [*laws]
    unknown = [name for name in names if name not in LAWS]
    trees.raise_for(unknown, f"`laws` must be of {', '.join(LAWS)}. Unknown:")
    subject = Subject(make, sparsity, steps, two_layers() if example is None else example)
    results, broken = {}, []
    for name in names:
        try:
            reason = LAWS[name](subject)
        except AssertionError as error:
            broken.append(f"{name}: {sentence(name)}\n    {error}")
        except Exception as error:
            broken.append(f"{name}: {sentence(name)}\n    {type(error).__name__}: {error}")
        else:
            results[name] = f"not checked: {reason}" if reason else "holds"
    if broken:
        listed = "\n  ".join(broken)
        raise AssertionError(f"the transformation breaks {len(broken)} laws:\n  {listed}")
    return results


def sentence(law: str) -> str:
    """Returns what a law says."""
    return (LAWS[law].__doc__ or "").splitlines()[0]


class Subject:
    """A transformation in a small training; what several laws need is computed once."""

    def __init__(self, make: Make, sparsity: float, steps: int, example: Example) -> None:
        self.make, self.sparsity, self.steps, self.example = make, sparsity, steps, example
        self.params = example.params

    def optimizer(self, sparsity: float | None = None, base: Any = None) -> Any:
        """Returns the optimizer with pruning, behind SGD with momentum by default."""
        base = optax.sgd(0.1, momentum=0.9) if base is None else base
        return chain(base, self.make(self.sparsity if sparsity is None else sparsity))

    def step(self, optimizer: Any) -> Callable[..., Any]:
        """Returns a training step `(params, state, batch) -> params, state`."""

        def step(params: Any, state: Any, batch: Any) -> Any:
            gradients = jax.grad(self.example.loss)(params, batch)
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        return step

    def batches(self) -> list[Any]:
        """Returns the batches of all steps."""
        return [self.example.batch(step) for step in range(self.steps)]

    def train(self, optimizer: Any) -> tuple[list[Any], list[Any], Any]:
        """Returns parameters and masks after each step, and the last state."""
        step, params = jax.jit(self.step(optimizer)), self.params
        state, history, kept = optimizer.init(params), [], []
        for batch in self.batches():
            params, state = step(params, state, batch)
            history.append(params)
            kept.append(masks.get_masks(state))
        return history, kept, state

    @functools.cached_property
    def trained(self) -> tuple[list[Any], list[Any], Any]:
        """The training behind SGD with momentum."""
        return self.train(self.optimizer())


def _zero(subject: Subject) -> None:
    """Masked weights are exactly 0 after every step, also behind AdamW with weight decay."""
    with_decay = subject.train(subject.optimizer(base=optax.adamw(0.01, weight_decay=0.1)))
    for history, kept, _ in (subject.trained, with_decay):
        for params, own in zip(history, kept, strict=True):
            assert_masked(params, own)
            _same_form(subject.params, own)


def _exact(subject: Subject) -> None:
    """At the end exactly as many weights are kept as the sparsity says."""
    assert_sparsity(subject.trained[1][-1], subject.sparsity)


def _plain(subject: Subject) -> None:
    """At sparsity 0 the updates are those of the optimizer alone, bit for bit."""
    optimizers = optax.sgd(0.1, momentum=0.9), subject.optimizer(0.0)
    # Apart from the gradient: fused with it, two programs may round differently.
    gradient = jax.jit(jax.grad(subject.example.loss))
    updates = [jax.jit(optimizer.update) for optimizer in optimizers]
    params, states = subject.params, [own.init(subject.params) for own in optimizers]
    for batch in subject.batches():
        gradients = gradient(params, batch)
        bare, pruned = [
            own(gradients, state, params) for own, state in zip(updates, states, strict=True)
        ]
        _equal(pruned[0], bare[0])
        params, states = optax.apply_updates(params, bare[0]), [bare[1], pruned[1]]


def _once(subject: Subject) -> None:
    """A step is traced once, keeps trees, shapes and dtypes, and can donate its arguments."""
    optimizer = subject.optimizer()
    step = jax.jit(traced_once(subject.step(optimizer)), donate_argnums=(0, 1))
    params = jax.tree.map(jnp.copy, subject.params)
    state = jax.tree.map(jnp.copy, optimizer.init(params))
    before = jax.tree.structure((params, state)), _forms((params, state))
    for batch in subject.batches():
        params, state = step(params, state, batch)
    after = jax.tree.structure((params, state)), _forms((params, state))
    assert before == after, f"{before} becomes {after}"
    _equal(params, subject.trained[0][-1])


def _mapped(subject: Subject) -> None:
    """`jax.lax.scan` over steps and `jax.vmap` over networks give what the loop gives."""
    optimizer = subject.optimizer()
    step, batches = subject.step(optimizer), _stacked(subject.batches())

    def train(params: Any) -> Any:
        start = params, optimizer.init(params)
        return jax.lax.scan(lambda carry, batch: (step(*carry, batch), None), start, batches)[0]

    many = _stacked([subject.params, jax.tree.map(lambda x: 1.1 * x, subject.params)])
    params, state = jax.jit(jax.vmap(train))(many)
    _close(jax.tree.map(lambda x: x[0], params), subject.trained[0][-1])
    expected = subject.trained[1][-1]
    own = jax.tree.map(lambda x, wanted: x[0] if jnp.ndim(wanted) else wanted,
                       masks.get_masks(state), expected)  # fmt: skip
    assert_same_masks(own, expected)


def _resumed(subject: Subject) -> None:
    """Parameters and state, saved as arrays and restored, go on bit for bit."""
    optimizer = subject.optimizer()
    step, params = jax.jit(subject.step(optimizer)), subject.params
    state = optimizer.init(params)
    for index, batch in enumerate(subject.batches()):
        if index == subject.steps // 2:
            arrays = [np.array(leaf) for leaf in jax.tree.leaves((params, state))]
            target = jax.tree.structure((params, state))
            optimizer = subject.optimizer()  # a new process has a new one
            step = jax.jit(subject.step(optimizer))
            params, state = jax.tree.unflatten(target, arrays)
        params, state = step(params, state, batch)
    _equal(params, subject.trained[0][-1])
    _equal(state, subject.trained[2])


def _tools(subject: Subject) -> None:
    """`optax.tree_map_params` finds the masks, and unknown extra arguments are ignored."""
    optimizer = subject.optimizer()
    state = optimizer.init(subject.params)
    twice = optax.tree_map_params(optimizer, lambda x: jnp.stack([x, x]), state)
    seen = trees.leaf_by_path(masks.get_masks(twice))
    for path, own in trees.leaf_by_path(masks.get_masks(state)).items():
        shape = (2, *own.shape)
        assert not own.ndim or seen[path].shape == shape, f"{path}: {seen[path].shape}, not {shape}"
    update = functools.partial(optimizer.update, unknown_argument=1)
    updates, _ = jax.eval_shape(update, subject.params, state, subject.params)
    assert jax.tree.structure(updates) == jax.tree.structure(subject.params), "other updates"


def _half(subject: Subject) -> None:
    """Parameters in bfloat16 keep their dtype, and masked ones are exactly 0."""
    halved = subject.example._replace(
        params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), subject.params)
    )
    other = Subject(subject.make, subject.sparsity, subject.steps, halved)
    history, kept, _ = other.train(other.optimizer())
    for params, own in zip(history, kept, strict=True):
        assert _forms(params) == _forms(other.params), "another dtype"
        assert_masked(params, own)


def _modules(subject: Subject) -> None:
    """Parameters may be a module that can be called, as those of Equinox."""
    params = _Module(subject.params)
    optimizer = subject.optimizer()
    loss = subject.example.loss

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        gradients = jax.grad(lambda own: loss(own.inner, batch))(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for batch in subject.batches():
        params, state = step(params, state, batch)
    assert_same_masks(masks.get_masks(state), subject.trained[1][-1])


def _devices(subject: Subject) -> str | None:
    """Sharded over all devices, training gives the masks of one device."""
    count = jax.device_count()
    if count == 1:
        return (
            "there is one device; `XLA_FLAGS=--xla_force_host_platform_device_count=8` makes more"
        )
    mesh = jax.make_mesh((count,), ("all",), axis_types=(jax.sharding.AxisType.Auto,))

    def place(leaf: Any) -> Any:
        fits = jnp.ndim(leaf) and leaf.shape[0] % count == 0
        own = PartitionSpec("all") if fits else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, own))

    optimizer = subject.optimizer()
    step = jax.jit(subject.step(optimizer))
    params, state = jax.tree.map(place, (subject.params, optimizer.init(subject.params)))
    for batch, expected in zip(subject.batches(), subject.trained[1], strict=True):
        params, state = step(params, state, jax.tree.map(place, batch))
        assert_same_masks(jax.device_get(masks.get_masks(state)), jax.device_get(expected))
    _close(params, subject.trained[0][-1])
    return None


# The laws by name: each takes a subject and returns why it was not checked, or None.
LAWS: dict[str, Callable[[Subject], str | None]] = {
    "zero": _zero,
    "exact": _exact,
    "plain": _plain,
    "once": _once,
    "mapped": _mapped,
    "resumed": _resumed,
    "tools": _tools,
    "half": _half,
    "modules": _modules,
    "devices": _devices,
}


@dataclasses.dataclass
class _Module:
    """Parameters as a module whose leaves have the same paths, so that masks by path fit it."""

    inner: Any

    def __call__(self) -> None:
        raise AssertionError("parameters were called as a function")


def _children(module: _Module) -> tuple[list[tuple[Any, Any]], Any]:
    """Returns what lies right below, with its keys, and what makes a module of it again."""
    below, treedef = jax.tree_util.tree_flatten_with_path(
        module.inner, is_leaf=lambda node: node is not module.inner
    )
    alone = jax.tree_util.GetAttrKey("inner")  # parameters that are one array have no key
    return [(path[0] if path else alone, child) for path, child in below], treedef


jax.tree_util.register_pytree_with_keys(
    _Module, _children, lambda treedef, children: _Module(treedef.unflatten(children))
)


def two_layers() -> Example:
    """Returns the example for those who have none."""

    def numbers(seed: int, *shape: int) -> jax.Array:
        return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        hidden = jnp.tanh(x @ params["a"]["kernel"] + params["a"]["bias"][None])
        return jnp.mean((hidden @ params["b"]["kernel"] - 1) ** 2)

    first = {"kernel": numbers(0, 8, 16), "bias": numbers(1, 16)}
    params = {"a": first, "b": {"kernel": numbers(2, 16, 8)}}
    return Example(params, loss, lambda step: numbers(step, 8, 8))


def _stacked(tree_list: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *tree_list)


def _forms(tree: Any) -> list[tuple[Any, ...]]:
    """Returns shapes, dtypes and weak types of all leaves."""
    types = [jax.typeof(leaf) for leaf in jax.tree.leaves(tree)]
    return [(own.shape, own.dtype, getattr(own, "weak_type", False)) for own in types]


def _same_form(params: Any, own: Any) -> None:
    """Asserts that masks are bools in the shapes of the parameters."""
    leaves = trees.leaf_by_path(params)
    for path, mask in trees.leaf_by_path(own).items():
        assert mask.dtype == bool, f"the mask of {path} must be bool, but is {mask.dtype}"
        wanted = leaves[path].shape if mask.ndim else ()
        assert mask.shape == wanted, f"the mask of {path} has shape {mask.shape}, not {wanted}"


def _equal(tree: Any, other: Any) -> None:
    _compare(tree, other, lambda x, y: np.array_equal(x, y, equal_nan=True))


def _close(tree: Any, other: Any) -> None:
    _compare(tree, other, lambda x, y: np.allclose(x, y, rtol=1e-4, atol=1e-5))


def _compare(tree: Any, other: Any, same: Callable[[Any, Any], bool]) -> None:
    """Asserts that two trees have the same leaves; the error names those that differ."""
    there, differ = trees.leaf_by_path(other), []
    for path, leaf in trees.leaf_by_path(tree).items():
        x, y = np.asarray(leaf, np.float64), np.asarray(there[path], np.float64)
        if x.shape != y.shape or not same(x, y):
            gap = float(np.max(np.abs(x - y), initial=0)) if x.shape == y.shape else "another shape"
            differ.append(f"{path} ({gap})")
    assert not differ, f"these leaves differ, by at most the number: {', '.join(differ)}"
