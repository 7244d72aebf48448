"""The laws that every pruning transformation keeps, behind every kind of optimizer.

`TRANSFORMS` is the table of what is tested; a new method or switch is one more line. Every law
about transformations holds for every row. `INNER` has every optimizer of `optax` and
`optax.contrib`, each with one method in turn. Rows share what is compiled: `run` and `donated`.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune
from jaxprune import budgets, patterns, rates, schedules, scores, structure, testing
from tests.support.combinations import in_turn
from tests.support.optimizers import OPTIMIZERS, extra_of

SPARSITY, STEPS = 0.72, 9
WINDOW = {"every": 2, "start": 1, "stop": 6}  # mask updates at 1, 3, 5 and 6


def agip(sparsity: Any = SPARSITY, **options: Any) -> optax.GradientTransformationExtraArgs:
    return jaxprune.agip_transform(sparsity, **(WINDOW | options))


def windowed(transform: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """A transformation with the window of this file, as a function of the sparsity."""
    return lambda sparsity=SPARSITY: transform(sparsity, **(WINDOW | options))


def fixed(sparsity: float = SPARSITY) -> optax.GradientTransformationExtraArgs:
    return jaxprune.fixed_mask_transform(jaxprune.prune(make_params(), sparsity)[1])


def channels(sparsity: float = SPARSITY) -> optax.GradientTransformationExtraArgs:
    return agip(sparsity, groups=channel_groups(jax.config.jax_enable_x64))


@functools.cache
def channel_groups(x64: bool) -> Any:
    """The 16 hidden channels; their gates are the columns of the kernel `a` and its bias."""
    del x64  # groups hold indices of the width that there was when they were found
    groups = structure.find_groups(forward, make_params(), inputs(0))
    assert [group.size for group in groups.values()] == [16]
    return groups


# The kernel `a` holds eight layers of one vector each.
STACKED = {
    "stacked": lambda path, leaf: 0 if path.startswith("a") else None,
    "prunable": lambda path, leaf: path.endswith("kernel"),
}

TRANSFORMS: dict[str, Callable[..., optax.GradientTransformationExtraArgs]] = {
    "default": agip,
    "no average": functools.partial(agip, decay=None),
    "bfloat16 average": functools.partial(agip, dtype=jnp.bfloat16),
    "literal gradient": functools.partial(agip, score=scores.gradient),
    "magnitude": functools.partial(agip, score=scores.magnitude),
    "random": functools.partial(agip, score=scores.random(3)),
    "uniform budget": functools.partial(agip, budget=budgets.uniform),
    "no floor": functools.partial(agip, budget=budgets.global_budget(0.0)),
    "regrowth": functools.partial(agip, regrow=0.3),
    "rate by density": functools.partial(agip, rate=rates.by_density()),
    "rate by statistic": functools.partial(agip, rate=rates.by_statistic()),
    "everything": functools.partial(
        agip, regrow=0.3, rate=rates.by_statistic(), decay=None, budget=budgets.uniform
    ),
    "blocks, regrowth": functools.partial(agip, regrow=0.3, pattern=patterns.blocks((2, 2))),
    "stacked, regrowth": functools.partial(agip, regrow=0.3, **STACKED),
    "stacked rigl": windowed(jaxprune.rigl_transform, **STACKED),
    "magnitude_transform": windowed(jaxprune.magnitude_transform),
    "saliency_transform": windowed(jaxprune.saliency_transform),
    "random_transform": windowed(jaxprune.random_transform, seed=2),
    "set_transform": windowed(jaxprune.set_transform),
    "rigl_transform": windowed(jaxprune.rigl_transform),
    "rigl, global budget": windowed(jaxprune.rigl_transform, budget=budgets.global_budget()),
    "straight_through_transform": windowed(jaxprune.straight_through_transform),
    "straight through, random": windowed(
        jaxprune.straight_through_transform, score=scores.random(1)
    ),
    "acdc_transform": windowed(jaxprune.acdc_transform),
    "fixed_mask_transform": fixed,
    "channels": channels,
}

# Sparsity after each step, where it is not the cubic ramp.
PHASES = [0.0, SPARSITY, SPARSITY, 0.0, 0.0, 0.0] + [SPARSITY] * 3
SPARSITIES = {
    name: dict.fromkeys(range(STEPS), SPARSITY)
    for name in TRANSFORMS
    if name.startswith(("set", "rigl", "fixed", "stacked rigl"))
} | {"acdc_transform": dict(enumerate(PHASES))}

INNER: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "sgd": lambda prune: jaxprune.chain(optax.sgd(0.1), prune),
    "momentum": lambda prune: jaxprune.chain(optax.sgd(0.1, momentum=0.9), prune),
    "optax.chain": lambda prune: optax.chain(optax.sgd(0.1, momentum=0.9), prune),
    "weight decay, clipping": lambda prune: jaxprune.chain(
        optax.clip_by_global_norm(1.0),
        optax.add_decayed_weights(0.01),
        optax.sgd(0.1, momentum=0.9, nesterov=True),
        prune,
    ),
    "adamw": lambda prune: jaxprune.chain(optax.adamw(0.01, weight_decay=0.1), prune),
    "lion": lambda prune: jaxprune.chain(optax.lion(0.01, weight_decay=0.1), prune),
    "adafactor": lambda prune: jaxprune.chain(optax.adafactor(0.1), prune),
    "MultiSteps outside": lambda prune: optax.MultiSteps(
        jaxprune.chain(optax.sgd(0.1, momentum=0.9), prune), every_k_schedule=1
    ),
    "MultiSteps inside": lambda prune: jaxprune.chain(
        optax.MultiSteps(optax.sgd(0.1, momentum=0.9), every_k_schedule=2), prune
    ),
    "inject_hyperparams": lambda prune: jaxprune.chain(
        optax.inject_hyperparams(optax.sgd)(
            learning_rate=optax.linear_schedule(0.1, 0.0, STEPS), momentum=0.9
        ),
        prune,
    ),
    "apply_if_finite": lambda prune: optax.apply_if_finite(
        jaxprune.chain(optax.sgd(0.1, momentum=0.9), prune), max_consecutive_errors=3
    ),
    "partition": lambda prune: optax.partition(
        {"prune": jaxprune.chain(optax.sgd(0.1), prune), "dense": optax.adam(0.01)},
        lambda params: jax.tree.map(lambda leaf: "prune" if leaf.ndim > 1 else "dense", params),
    ),
    "named_chain": lambda prune: jaxprune.chain(
        optax.named_chain(("sgd", optax.sgd(0.1, momentum=0.9)), ("prune", prune))
    ),
    "adagrad": lambda prune: jaxprune.chain(optax.adagrad(0.1), prune),
    "flatten": lambda prune: jaxprune.chain(optax.flatten(optax.adam(0.01)), prune),
    "muon, schedule-free": lambda prune: jaxprune.chain(
        optax.contrib.schedule_free(optax.contrib.muon(0.1), 0.1), prune
    ),
    "masked": lambda prune: jaxprune.chain(
        optax.sgd(0.1, momentum=0.9),
        optax.masked(prune, lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)),
    ),
}

RECIPES = [*INNER]
INNER |= {
    f"optax: {name}": lambda prune, make=make: jaxprune.chain(make(), prune)
    for name, make in OPTIMIZERS.items()
}


class Run(NamedTuple):
    """Parameters and masks after each step, the last optimizer state, and compiled steps."""

    params: list[Any]
    masks: list[Any]
    state: Any
    programs: int = 0


def make_params(dtype: Any = jnp.float32) -> Any:
    random = np.random.default_rng(0)
    shapes = {"a": {"kernel": (8, 16), "bias": (16,)}, "b": {"kernel": (16, 8)}}
    return jax.tree.map(
        lambda shape: jnp.asarray(random.standard_normal(shape), dtype),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def forward(params: Any, x: jax.Array) -> jax.Array:
    hidden = jnp.tanh(x @ params["a"]["kernel"] + params["a"]["bias"][None])
    return hidden @ params["b"]["kernel"]


def loss(params: Any, x: jax.Array) -> jax.Array:
    return jnp.mean((forward(params, x) - 1) ** 2)


def inputs(step: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(step).standard_normal((8, 8)), jnp.float32)


def make_step(tx: optax.GradientTransformation, inner: str = "") -> Callable[..., Any]:
    optimizer = inner.removeprefix("optax: ")

    def step(params: Any, state: Any, x: jax.Array) -> Any:
        loss_of = functools.partial(loss, x=x)
        extra = extra_of(optimizer, loss_of, params)
        updates, state = tx.update(jax.grad(loss_of)(params), state, params, **extra)
        return optax.apply_updates(params, updates), state

    return step


@functools.cache
def built(transform: str, inner: str = "momentum") -> tuple[Any, Callable[..., Any]]:
    """The optimizer and its step: one function, which JAX traces once for all that jit it."""
    tx = INNER[inner](TRANSFORMS[transform]())
    return tx, make_step(tx, inner)


@functools.cache
def donated(transform: str) -> Callable[..., Any]:
    """A compiled step that takes over the arrays it is given."""
    return jax.jit(built(transform)[1], donate_argnums=(0, 1))


@functools.cache
def run(transform: str, inner: str = "momentum") -> Run:
    tx, step = built(transform, inner)
    step = jax.jit(step)
    params = make_params()
    state, result = tx.init(params), Run([], [], None)
    for i in range(STEPS):
        params, state = step(params, state, inputs(i))
        result.params.append(params)
        result.masks.append(jaxprune.get_masks(state))
    return result._replace(state=state, programs=step._cache_size())


def kernels(tree: Any) -> list[np.ndarray]:
    return [np.asarray(tree["a"]["kernel"]), np.asarray(tree["b"]["kernel"])]


def kept(masks: Any) -> int:
    return sum(int(mask.sum()) for mask in kernels(masks))


CASES = [(name, "momentum") for name in TRANSFORMS]
CASES += [(name, inner) for inner, name in in_turn(RECIPES, ["default", "rigl_transform"])]
CASES = list(dict.fromkeys(CASES))
# Not those that need a momentum, which few optimizers keep: see test_optimizers.py.
ANYWHERE = [name for name in TRANSFORMS if name not in ("no average", "everything")]
CASES += [
    pytest.param(name, f"optax: {inner}", marks=pytest.mark.slow)
    for inner, name in in_turn(OPTIMIZERS, ANYWHERE)
]


@pytest.mark.parametrize(("transform", "inner"), CASES)
def test_masked_weights_are_exactly_zero_after_every_step(transform: str, inner: str) -> None:
    result = run(transform, inner)
    assert kept(result.masks[-1]) < 256
    # The state of optax.lbfgs changes its weak types in the first step, without pruning as well.
    assert result.programs == (2 if inner == "optax: lbfgs" else 1)
    for params, masks in zip(result.params, result.masks):
        testing.assert_masked(params, masks)
        chex.assert_tree_all_finite(params)


def expected_counts(transform: str) -> list[int]:
    """What is kept after each step, over both kernels; what has no mask counts as one."""
    ramp = schedules.cubic(SPARSITY, WINDOW["start"], WINDOW["stop"])
    rule = budgets.uniform if transform in ("uniform budget", "everything") else None
    updates, expected = [1, 3, 5, 6], []
    for step in range(STEPS):
        last = max([t for t in updates if t <= step], default=None)
        sparsity = 0.0 if last is None else float(ramp(last))
        sparsity = SPARSITIES.get(transform, {}).get(step, sparsity)
        shapes = {"a": (8, 16), "b": (16, 8)}
        if transform == "channels":
            expected.append(8 * budgets.keep_count(16, sparsity) + 1)
        elif transform.startswith("blocks"):
            expected.append(4 * budgets.keep_count(64, sparsity))
        else:
            total = rule(shapes, sparsity).total if rule else budgets.keep_count(256, sparsity)
            expected.append(total)
    return expected


@pytest.mark.parametrize(("transform", "inner"), CASES)
def test_every_mask_update_keeps_exactly_k(transform: str, inner: str) -> None:
    assert [kept(mask) for mask in run(transform, inner).masks] == expected_counts(transform)


@functools.cache
def plain() -> tuple[optax.GradientTransformation, Callable[..., Any], Callable[..., Any]]:
    """The optimizer alone: itself, its update and the gradient, compiled."""
    tx = optax.sgd(0.1, momentum=0.9)
    return tx, jax.jit(tx.update), jax.jit(jax.grad(loss))


@pytest.mark.slow
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_sparsity_0_gives_the_plain_optimizer(transform: str) -> None:
    pruned, (tx, update, gradient) = INNER["momentum"](TRANSFORMS[transform](0.0)), plain()
    params = make_params()
    states, pruned_update = (pruned.init(params), tx.init(params)), jax.jit(pruned.update)
    for i in range(STEPS):
        gradients = gradient(params, inputs(i))
        updates, pruned_state = pruned_update(gradients, states[0], params)
        expected, plain_state = update(gradients, states[1], params)
        chex.assert_trees_all_equal(updates, expected)
        params, states = optax.apply_updates(params, updates), (pruned_state, plain_state)


@pytest.mark.slow
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_one_trace_same_trees_and_dtypes_and_donation(transform: str) -> None:
    tx, _ = built(transform)
    params = make_params()
    state = tx.init(params)
    given = jax.tree.leaves(params)
    before = jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), (params, state))
    step = donated(transform)
    programs = set()
    for i in range(STEPS):
        params, state = step(params, state, inputs(i))
        programs.add(step._cache_size())
    assert len(programs) == 1  # those that there are after the first step
    assert all(leaf.is_deleted() for leaf in given)
    after = jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), (params, state))
    assert before == after
    chex.assert_trees_all_equal(params, run(transform).params[-1])


@pytest.mark.slow
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_scan_and_vmap_give_the_numbers_of_the_loop(transform: str) -> None:
    tx, step = built(transform)
    batches = jnp.stack([inputs(i) for i in range(STEPS)])

    def train(params: Any) -> Any:
        carry = (params, tx.init(params))
        return jax.lax.scan(lambda c, x: (step(*c, x), None), carry, batches)[0]

    expected = run(transform)
    many = jax.tree.map(lambda x: jnp.stack([x, 1.1 * x, x]), make_params())
    params, state = jax.jit(jax.vmap(train))(many)
    masks = kernels(jaxprune.get_masks(state))
    for own in (0, 2):
        for mask, wanted in zip(masks, kernels(expected.masks[-1])):
            np.testing.assert_array_equal(mask[own] if wanted.ndim else mask, wanted)
        single = jax.tree.map(lambda leaf, own=own: np.asarray(leaf)[own], params)
        chex.assert_trees_all_close(single, expected.params[-1], rtol=1e-5, atol=1e-6)
    if transform in ("default", "everything", "channels"):  # without the batch, as users scan
        params, state = jax.jit(train)(make_params())
        chex.assert_trees_all_equal(jaxprune.get_masks(state), expected.masks[-1])
        chex.assert_trees_all_close(params, expected.params[-1], rtol=1e-5, atol=1e-6)


# Each row with one layout in turn, and some with both: a program for eight devices is expensive.
LAYOUTS = ["data parallel", "sharded parameters"]
ON_EIGHT = in_turn(TRANSFORMS, LAYOUTS)
ON_EIGHT += sorted(
    set(itertools.product(["default", "everything", "regrowth"], LAYOUTS)) - {*ON_EIGHT}
)


@pytest.mark.slow
@pytest.mark.parametrize(("transform", "layout"), ON_EIGHT)
def test_eight_devices_give_the_masks_of_one(transform: str, layout: str) -> None:
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    tx, step = built(transform)

    def place(leaf: jax.Array) -> jax.Array:
        shards = layout == "sharded parameters" and leaf.ndim == 2
        return jax.device_put(leaf, NamedSharding(mesh, P("x", "y") if shards else P()))

    params = jax.tree.map(place, make_params())
    state = jax.tree.map(place, tx.init(make_params()))
    step = jax.jit(step)
    expected = run(transform)
    for i in range(STEPS):
        x = jax.device_put(inputs(i), NamedSharding(mesh, P(("x", "y"))))
        params, state = step(params, state, x)
        testing.assert_same_masks(jaxprune.get_masks(state), expected.masks[i])
    chex.assert_trees_all_close(params, expected.params[-1], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_state_saves_restores_and_goes_on_bit_for_bit(transform: str, tmp_path: Any) -> None:
    tx, _ = built(transform)
    step = donated(transform)
    params = make_params()
    state = tx.init(params)
    for i in range(4):
        params, state = step(params, state, inputs(i))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", (params, state))
        checkpointer.wait_until_finished()
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, (params, state))
        params, state = checkpointer.restore(tmp_path / "saved", target)
    for i in range(4, STEPS):
        params, state = step(params, state, inputs(i))
    expected = run(transform)
    chex.assert_trees_all_equal(params, expected.params[-1])
    chex.assert_trees_all_equal(state, expected.state)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_optax_tools_understand_the_state(transform: str) -> None:
    tx = TRANSFORMS[transform]()
    params = make_params()
    state = tx.init(params)
    doubled = optax.tree_map_params(tx, lambda x: jnp.concatenate([x, x]), state)
    assert doubled.masks["a"]["kernel"].shape == (16, 16)
    if transform != "fixed_mask_transform":  # it counts nothing
        assert doubled.prune_step.shape == ()
        assert int(optax.tree.get(state, "prune_step")) == 0
    update = functools.partial(tx.update, unknown_extra_argument=1)
    updates, _ = jax.eval_shape(update, params, state, params)
    chex.assert_trees_all_equal_structs(updates, params)


# dtypes of parameters and updates; the projection, where they meet, is the same for all rows.
HALVES = [(row, jnp.bfloat16, jnp.bfloat16) for row in TRANSFORMS]
HALVES += [
    (row, *mixture)
    for row in ("default", "straight_through_transform", "fixed_mask_transform", "channels")
    for mixture in [(jnp.float32, jnp.bfloat16), (jnp.bfloat16, jnp.float32)]
]


@pytest.mark.slow
@pytest.mark.parametrize(("transform", "dtype", "update_dtype"), HALVES)
def test_half_precision_leaves_no_residue(transform: str, dtype: Any, update_dtype: Any) -> None:
    tx = TRANSFORMS[transform]()
    params = make_params(dtype)
    state = tx.init(params)

    @jax.jit
    def step(params: Any, state: Any, updates: Any) -> Any:
        updates, state = tx.update(updates, state, params)
        return optax.apply_updates(params, updates), state

    counts = []
    for i in range(STEPS):
        random = np.random.default_rng(i)
        updates = jax.tree.map(
            lambda p, r=random: jnp.asarray(0.1 * r.standard_normal(p.shape), update_dtype), params
        )
        params, state = step(params, state, updates)
        assert params["a"]["kernel"].dtype == dtype
        masks = jaxprune.get_masks(state)
        testing.assert_masked(params, masks)
        counts.append(kept(masks))
    assert counts == expected_counts(transform)


def test_an_average_of_the_parameters_is_masked_by_hand() -> None:
    result = run("default")
    average = jax.tree.map(lambda *p: sum(p) / len(p), *result.params)
    masked = jaxprune.apply_masks(average, result.masks[-1])
    for weight, mask in zip(kernels(masked), kernels(result.masks[-1])):
        np.testing.assert_array_equal(weight[~mask], 0.0)
        assert (weight[mask] != 0).all()


def test_flax_train_state() -> None:
    state = TrainState.create(apply_fn=None, params=make_params(), tx=INNER["momentum"](agip()))
    step = jax.jit(lambda s, x: s.apply_gradients(grads=jax.grad(loss)(s.params, x)))
    for i in range(STEPS):
        state = step(state, inputs(i))
    expected = run("default")
    chex.assert_trees_all_equal(jaxprune.get_masks(state.opt_state), expected.masks[-1])
    chex.assert_trees_all_close(state.params, expected.params[-1], rtol=1e-6)


def test_nnx_optimizer() -> None:
    class Model(nnx.Module):
        def __init__(self) -> None:
            params = make_params()
            self.a = nnx.Dict({k: nnx.Param(v) for k, v in params["a"].items()})
            self.b = nnx.Dict({"kernel": nnx.Param(params["b"]["kernel"])})

    model = Model()
    optimizer = nnx.Optimizer(model, INNER["momentum"](agip()), wrt=nnx.Param)

    @nnx.jit
    def step(model: Model, optimizer: nnx.Optimizer, x: jax.Array) -> None:
        gradients = nnx.grad(lambda m: loss(nnx.to_pure_dict(nnx.state(m, nnx.Param)), x))(model)
        optimizer.update(model, gradients)

    for i in range(STEPS):
        step(model, optimizer, inputs(i))
    expected = run("default")
    masks = jaxprune.get_masks(optimizer.opt_state)
    for mask, wanted in zip(jax.tree.leaves(masks), jax.tree.leaves(expected.masks[-1])):
        np.testing.assert_array_equal(mask, wanted)
    params = jaxprune.apply_masks(nnx.state(model, nnx.Param), masks)
    chex.assert_trees_all_close(nnx.to_pure_dict(params), expected.params[-1], rtol=1e-6, atol=1e-7)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Module:
    """Parameters that can be called, as the modules of Equinox can."""

    a: Any
    b: Any

    def __call__(self, x: jax.Array) -> jax.Array:
        return loss({"a": self.a, "b": self.b}, x)


@pytest.mark.slow
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_trees_that_can_be_called(transform: str) -> None:
    tx = TRANSFORMS[transform]()
    if transform == "fixed_mask_transform":  # its masks are such a tree as well
        tx = jaxprune.fixed_mask_transform(jaxprune.prune(Module(**make_params()), SPARSITY)[1])
    tx = INNER["momentum"](tx)
    step = jax.jit(lambda m, s, x: tx.update(jax.grad(lambda m: m(x))(m), s, m))
    params = Module(**make_params())
    state = tx.init(params)
    chex.assert_trees_all_equal_structs(
        jax.eval_shape(step, params, state, inputs(0)), (params, state)
    )
    if transform not in ("default", "rigl_transform", "fixed_mask_transform", "channels"):
        return  # the same numbers, and another program to compile
    for i in range(STEPS):
        updates, state = step(params, state, inputs(i))
        params = optax.apply_updates(params, updates)
    expected = run(transform).masks[-1]
    chex.assert_trees_all_equal(jaxprune.get_masks(state), Module(**expected))


@pytest.mark.slow
def test_nested_lists_and_tuples() -> None:
    flat = jax.tree.leaves(make_params())
    params = [(flat[0],), [flat[1], {"w": flat[2]}]]
    tx = jaxprune.chain(optax.sgd(0.1), agip())
    state = tx.init(params)
    for i in range(STEPS):
        gradients = jax.tree.map(lambda p, i=i: jnp.cos(p + i), params)
        updates, state = tx.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    masks = jaxprune.get_masks(state)
    chex.assert_trees_all_equal_structs(masks, params)
    assert sum(int(m.sum()) for m in jax.tree.leaves(masks) if m.ndim > 1) == budgets.keep_count(
        256, SPARSITY
    )
