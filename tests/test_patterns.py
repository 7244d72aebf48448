"""Patterns: every group, block and channel against slow loops; errors; devices."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune
from jaxprune import layouts, patterns
from tests.support import reference

N_M_MASK = jax.jit(patterns.n_m_mask, static_argnums=(2, 3))

# Few distinct values make ties; the rest is what comparisons get wrong.
VALUES = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "ties": lambda rng, shape: rng.integers(-1, 2, shape),
    "special": lambda rng, shape: rng.choice(
        [-np.inf, -3e38, -1.5, -0.0, 0.0, 2.0, 3e38, np.inf, np.nan, -np.nan], shape
    ),
}


def _scores(kind, seed, shape, dtype=np.float32):
    return jnp.asarray(VALUES[kind](np.random.default_rng(seed), shape), dtype)


def _flags(seed, shape, density=0.5):
    return np.random.default_rng(seed + 1).random(shape) < density


# ---- N:M

# Compiled once for each shape, m and axis, so that most examples only run.
GROUPS = [((8,), 4, 0), ((3, 6), 3, 1), ((12, 5), 4, -2), ((2, 3, 8, 2), 2, 2), ((16, 3), 16, 0)]
GROUPS += [((4, 2), 1, -2), ((2, 16), 8, -1), ((6, 1, 5), 6, -3), ((0, 4), 4, -1)]


@pytest.mark.slow
@given(
    group=st.sampled_from(GROUPS),
    kind=st.sampled_from(sorted(VALUES)),
    seed=st.integers(0, 2**32 - 2),
    density=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
)
def test_n_m_keeps_what_sorting_every_group_keeps(group, kind, seed, density):
    shape, m, axis = group
    scores, among = _scores(kind, seed, shape), _flags(seed, shape, density)
    for n in {0, 1, m // 2, m - 1, m}:
        mask = N_M_MASK(scores, n, m, axis)
        assert mask.dtype == bool
        np.testing.assert_array_equal(mask, reference.n_m_mask(scores, n, m, axis))
        allowed = N_M_MASK(scores, n, m, axis, among)
        np.testing.assert_array_equal(allowed, reference.n_m_mask(scores, n, m, axis, among))


@pytest.mark.slow
@given(
    n=st.integers(1, 4),
    more=st.integers(0, 3),
    groups=st.integers(1, 3),
    sides=st.lists(st.integers(1, 3), max_size=3),
    place=st.integers(0, 3),
    seed=st.integers(0, 999),
)
def test_n_m_keeps_exactly_n_of_every_m_along_any_axis(n, more, groups, sides, place, seed):
    m, axis = n + more, place % (len(sides) + 1)
    shape = (*sides[:axis], groups * m, *sides[axis:])
    for kind in VALUES:
        scores = _scores(kind, seed, shape)
        mask = N_M_MASK(scores, n, m, axis)
        np.testing.assert_array_equal(mask, N_M_MASK(scores, n, m, axis - len(shape)))
        np.testing.assert_array_equal(mask, reference.n_m_mask(scores, n, m, axis))
        by_group = np.moveaxis(np.asarray(mask), axis, -1).reshape(-1, m)
        assert (by_group.sum(axis=1) == n).all()


def test_n_m_ties_keep_the_lower_index():
    mask = patterns.n_m_mask(jnp.zeros((8, 2)), 1, 4, axis=-2)
    assert mask.tolist() == [[row in (0, 4)] * 2 for row in range(8)]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_n_m_order_of_special_values(dtype):
    values = [jnp.nan, -jnp.inf, -1.0, -0.0, 0.0, 1.0, jnp.inf, -jnp.nan]
    masks = [np.asarray(N_M_MASK(jnp.array(values, dtype), n, 8, 0)) for n in range(9)]
    order = [int(np.flatnonzero(b & ~a)[0]) for a, b in zip(masks, masks[1:])]
    assert order == [6, 5, 3, 4, 2, 1, 0, 7]


def test_n_m_keeps_nan_before_what_is_not_allowed():
    scores = jnp.array([jnp.nan, jnp.inf, -jnp.inf, 5.0])
    among = jnp.array([True, False, True, False])
    kept = [N_M_MASK(scores, n, 4, 0, among).tolist() for n in range(5)]
    assert kept[1] == [False, False, True, False]
    assert kept[2] == kept[3] == kept[4] == [True, False, True, False]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_scores_are_compared_and_pooled_in_float32(dtype):
    scores = _scores("normal", 0, (16, 6), dtype)
    np.testing.assert_array_equal(
        N_M_MASK(scores, 2, 4, 0), reference.n_m_mask(scores.astype(np.float32), 2, 4, 0)
    )
    pooled = patterns.pool(patterns.blocks((16, 1), "sum"), jnp.ones((16 * 300, 1), dtype))
    assert pooled.dtype == jnp.float32
    # Above 256 bfloat16 cannot count in ones.
    whole = patterns.pool(patterns.blocks((None, 1), "sum"), jnp.ones((4801, 1), dtype))
    assert whole.tolist() == [[4801.0]]


def test_traced_n_needs_one_trace_and_is_clipped():
    chex.clear_trace_counter()
    scores = _scores("ties", 0, (8, 3))
    select = jax.jit(chex.assert_max_traces(lambda x, n: patterns.n_m_mask(x, n, 4, axis=-2), n=1))
    for n in (-300, -3, 0, 1, 3, 4, 5, 130, 257):
        wanted = reference.n_m_mask(scores, min(max(n, 0), 4), 4, 0)
        np.testing.assert_array_equal(select(scores, jnp.int32(n)), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(VALUES))
def test_n_m_eager_jit_and_vmap_agree(kind):
    scores, among = _scores(kind, 1, (3, 8, 5)), _flags(1, (3, 8, 5))
    counts = jnp.array([1, 2, 4])
    mapped = jax.vmap(lambda s, n, a: patterns.n_m_mask(s, n, 4, -2, a))(scores, counts, among)
    for i, n in enumerate((1, 2, 4)):
        wanted = reference.n_m_mask(scores[i], n, 4, -2, among[i])
        np.testing.assert_array_equal(mapped[i], wanted)
        np.testing.assert_array_equal(N_M_MASK(scores[i], n, 4, -2, among[i]), wanted)
        np.testing.assert_array_equal(patterns.n_m_mask(scores[i], n, 4, -2, among[i]), wanted)


def test_n_m_never_sorts():
    program = str(jax.make_jaxpr(lambda x: patterns.n_m_mask(x, 2, 4, axis=-2))(jnp.zeros((8, 2))))
    assert "sort" not in program and " ge " in program


# ---- blocks and channels


@st.composite
def _cases(draw):
    """A pattern, the shape of a leaf, and the block written out for every dimension."""
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=4)))
    how = draw(st.sampled_from(["mean", "max", "sum"]))
    if draw(st.booleans()):
        axis = draw(st.integers(-len(shape), len(shape) - 1))
        block = list(shape)
        block[axis] = 1
        return patterns.channels(axis, how), shape, tuple(block)
    own = draw(st.integers(1, len(shape)))
    steps = [draw(st.none() | st.integers(1, size)) for size in shape[-own:]]
    full = [size if step is None else step for step, size in zip(steps, shape[-own:])]
    return patterns.blocks(tuple(steps), how), shape, (*(1,) * (len(shape) - own), *full)


def _check_units(pattern, shape, block, seed):
    """Pool, expand and pack against loops."""
    scores = np.asarray(_scores("normal", seed, shape))
    wanted = reference.pool_units(scores, block, pattern.pool)
    assert patterns.unit_shape(pattern, shape) == wanted.shape
    pooled = patterns.pool(pattern, scores)
    assert pooled.dtype == jnp.float32
    np.testing.assert_allclose(pooled, wanted, rtol=1e-5, atol=1e-5)

    units = _flags(seed, wanted.shape)
    mask = patterns.expand(pattern, jnp.asarray(units), shape)
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, reference.expand_units(units, block, shape))
    np.testing.assert_array_equal(patterns.any_kept(pattern, mask), units)

    # One weight is enough to keep a unit.
    mask = _flags(seed, shape, 0.2)
    some = reference.pool_units(mask, block, "max") > 0
    np.testing.assert_array_equal(patterns.any_kept(pattern, mask), some)


@pytest.mark.slow
@given(case=_cases(), seed=st.integers(0, 999))
def test_units_against_loops(case, seed):
    _check_units(*case, seed)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["mean", "max", "sum"])
@pytest.mark.parametrize(
    "shape, block", [((9,), (2,)), ((5, 7), (3, 4)), ((2, 3, 8, 5), (1, 2, 3, 4)), ((4, 9), (3, 1))]
)
def test_ragged_blocks_against_loops(shape, block, how):
    for seed in range(3):
        _check_units(patterns.blocks(block, how), shape, block, seed)


@pytest.mark.slow
@given(case=_cases(), seed=st.integers(0, 99))
def test_exact_means_of_ragged_blocks(case, seed):
    pattern, shape, block = case
    # Equal weights have equal means however many of them a block holds.
    value = np.float32(seed - 50)
    pooled = patterns.pool(pattern._replace(pool="mean"), np.full(shape, value))
    assert np.unique(pooled).tolist() == [value]
    totals = patterns.pool(pattern._replace(pool="sum"), np.ones(shape, np.float32))
    assert totals.sum() == np.prod(shape)


@pytest.mark.parametrize("how", ["mean", "max", "sum"])
def test_edges_do_not_see_the_filling(how):
    scores = -jnp.arange(1.0, 16.0).reshape(3, 5)
    pooled = patterns.pool(patterns.blocks((2, 2), how), scores)
    wanted = {"mean": -15.0, "max": -15.0, "sum": -15.0}[how]
    assert pooled[1, 2] == wanted
    assert pooled[0, 2] == {"mean": -7.5, "max": -5.0, "sum": -15.0}[how]


@pytest.mark.parametrize("how", ["mean", "max", "sum"])
def test_nan_and_infinities_in_a_unit(how):
    scores = jnp.array([[1.0, jnp.nan], [-jnp.inf, -jnp.inf], [jnp.inf, 0.0]])
    pooled = patterns.pool(patterns.blocks((1, 2), how), scores)[:, 0]
    np.testing.assert_array_equal(pooled, [np.nan, -np.inf, np.inf])


def test_no_pattern_is_single_weights():
    scores, mask = _scores("normal", 0, (3, 4), jnp.bfloat16), jnp.asarray(_flags(0, (3, 4)))
    assert patterns.unit_shape(None, (3, 4)) == (3, 4)
    np.testing.assert_array_equal(patterns.pool(None, scores), scores.astype(jnp.float32))
    np.testing.assert_array_equal(patterns.expand(None, mask, (3, 4)), mask)
    np.testing.assert_array_equal(patterns.any_kept(None, mask), mask)
    assert patterns.expand(None, jnp.array(True), ()).tolist() is True


@pytest.mark.slow
@pytest.mark.parametrize("axis", [-1, 0, -2])
def test_channels_of_leaves_of_any_number_of_dimensions(axis):
    for shape in [(5, 2), (3, 3, 4, 5), (2, 3, 4)]:
        scores = _scores("normal", 0, shape)
        others = tuple(i for i in range(len(shape)) if i != axis % len(shape))
        pooled = patterns.pool(patterns.channels(axis), scores)
        np.testing.assert_allclose(pooled, np.mean(scores, others, keepdims=True), rtol=1e-5)
    assert patterns.unit_shape(patterns.channels(axis=-1), (7,)) == (7,)


@pytest.mark.slow
@pytest.mark.parametrize(
    "pattern",
    [patterns.blocks((2, 3), "max"), patterns.blocks((2, 2)), patterns.channels(-1, "sum")],
)
def test_units_eager_jit_and_vmap_agree(pattern):
    batch = _scores("ties", 0, (3, 6, 7))

    def through(scores):
        pooled = patterns.pool(pattern, scores)
        mask = patterns.expand(pattern, pooled > 0, scores.shape)
        return pooled, mask, patterns.any_kept(pattern, mask)

    eager = jax.tree.map(lambda *x: jnp.stack(x), *[through(scores) for scores in batch])
    chex.assert_trees_all_equal(jax.vmap(through)(batch), eager)
    chex.assert_trees_all_equal(jax.jit(jax.vmap(through))(batch), eager)


# ---- several devices

ON_DEVICES = {
    "both": P("x", "y"),
    "rows": P(("x", "y"), None),
    "columns": P(None, ("x", "y")),
    "kernel": P(None, None, "y", "x"),
}


def _placed(spec, sizes=(64, 64)):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    scores = _scores("ties", 0, (2, 3, *sizes)[-len(spec) :])
    return scores, jax.device_put(scores, NamedSharding(mesh, spec))


def _moves(function, *args):
    """What a compiled program does with arrays of other devices."""
    text = jax.jit(function).lower(*args).compile().as_text()
    return set(re.findall(r"(all-gather|all-to-all|collective-\w+|all-reduce)(?=[-\w]*\()", text))


@pytest.mark.slow
@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("name", ON_DEVICES)
def test_n_m_stays_on_each_device(name, axis):
    scores, placed = _placed(ON_DEVICES[name])
    select = functools.partial(patterns.n_m_mask, n=2, m=4, axis=axis, among=placed >= 0)
    mask = jax.jit(select)(placed)
    np.testing.assert_array_equal(mask, reference.n_m_mask(scores, 2, 4, axis, scores >= 0))
    assert mask.sharding.is_equivalent_to(placed.sharding, placed.ndim)
    assert _moves(select, placed) == set()


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_DEVICES)
@pytest.mark.parametrize("shape", [(4, 8), (8, 1), (1, 4)])
def test_whole_blocks_stay_on_their_devices(name, shape):
    pattern = patterns.blocks(shape)
    scores, placed = _placed(ON_DEVICES[name])

    def through(scores):
        pooled = patterns.pool(pattern, scores)
        mask = patterns.expand(pattern, pooled > 0, scores.shape)
        return pooled, mask, patterns.any_kept(pattern, mask)

    results = jax.jit(through)(placed)
    chex.assert_trees_all_equal(jax.device_get(results), jax.device_get(jax.jit(through)(scores)))
    assert results[1].sharding.is_equivalent_to(placed.sharding, placed.ndim)
    assert _moves(through, placed) == set()


def test_sharded_channels_exchange_their_sums_only():
    scores, placed = _placed(ON_DEVICES["both"])
    pool = functools.partial(patterns.pool, patterns.channels(axis=-1))
    np.testing.assert_allclose(jax.jit(pool)(placed), pool(scores), atol=1e-6)
    assert _moves(pool, placed) == {"all-reduce"}


def test_groups_and_blocks_across_devices_are_exchanged_and_right():
    # Six columns on each device: this also shows that `_moves` sees what the compiler writes.
    scores, placed = _placed(ON_DEVICES["columns"], (4, 48))
    select = functools.partial(patterns.n_m_mask, n=2, m=4, axis=-1)
    np.testing.assert_array_equal(jax.jit(select)(placed), reference.n_m_mask(scores, 2, 4, -1))
    assert _moves(select, placed)
    pool = functools.partial(patterns.pool, patterns.blocks((4, 4), "sum"))
    np.testing.assert_array_equal(jax.jit(pool)(placed), pool(scores))


# ---- rules

LEAVES = {
    "stem/kernel": jnp.zeros((3, 3, 3, 16)),
    "block/kernel": jnp.zeros((3, 3, 16, 16)),
    "head/kernel": jax.ShapeDtypeStruct((16, 10), jnp.bfloat16),
    "head/bias": np.zeros(10),
}


def test_patterns_of_resolves_one_pattern_or_a_function():
    assert patterns.patterns_of(LEAVES, None) == [None] * 4
    assert patterns.patterns_of(LEAVES, patterns.channels(-1)) == [patterns.channels(-1)] * 4
    assert patterns.patterns_of({}, lambda path, leaf: 1 / 0) == []

    def rule(path, leaf):
        if leaf.ndim < 2:
            return None
        return patterns.blocks((2, None)) if "head" in path else patterns.n_m(2, 4, -1)

    wanted = [patterns.n_m(2, 4, -1)] * 2 + [patterns.blocks((2, None)), None]
    assert patterns.patterns_of(LEAVES, rule) == wanted
    assert len({*wanted, *patterns.patterns_of(LEAVES, rule)}) == 3  # hashable, equal by value


def _lines(leaves, rule):
    with pytest.raises(ValueError) as error:
        patterns.patterns_of(leaves, rule)
    first, *lines = str(error.value).splitlines()
    assert first == (
        "each leaf must fit its pattern; exclude a leaf with `prunable`, or let `pattern` be a "
        "function of path and leaf that returns a different pattern, or None for single weights:"
    )
    return lines


def test_n_m_faults_are_all_named():
    assert _lines(LEAVES, patterns.n_m(2, 4, axis=-2)) == [
        "  stem/kernel: shape (3, 3, 3, 16), axis -2 has 3 entries, not a multiple of m = 4",
        "  head/bias: shape (10,), there is no axis -2",
    ]
    assert _lines({"a": jnp.zeros(4)}, patterns.n_m(1, 2, 1)) == [
        "  a: shape (4,), there is no axis 1"
    ]


def test_block_faults_are_all_named():
    assert _lines(LEAVES, patterns.blocks((4, 12))) == [
        "  stem/kernel: shape (3, 3, 3, 16), the block (4, 12) is larger along axis 2",
        "  head/kernel: shape (16, 10), the block (4, 12) is larger along axis 1",
        "  head/bias: shape (10,), the block (4, 12) has more dimensions",
    ]
    assert _lines({"a": jnp.zeros((4, 4))}, patterns.blocks((8, 9))) == [
        "  a: shape (4, 4), the block (8, 9) is larger along axes 0, 1"
    ]
    assert patterns.patterns_of({"a": jnp.zeros((4, 12))}, patterns.blocks((4, 12)))


def test_channel_faults_are_all_named():
    assert _lines(LEAVES, patterns.channels(2)) == [
        "  head/kernel: shape (16, 10), there is no axis 2",
        "  head/bias: shape (10,), there is no axis 2",
    ]
    assert _lines({"a": jnp.zeros(())}, patterns.channels(axis=-1)) == [
        "  a: shape (), there is no axis -1"
    ]


def test_what_a_rule_returns_is_checked():
    answers = {
        "stem/kernel": "2:4",
        "block/kernel": (2, 4, -2),
        "head/kernel": patterns.NM(5, 4, -2),
        "head/bias": patterns.Blocks((2,), "median"),
    }
    wanted = "the pattern must be None or made by `n_m`, `blocks` or `channels`, but is"
    assert _lines(LEAVES, lambda path, leaf: answers[path]) == [
        f"  stem/kernel: shape (3, 3, 3, 16), {wanted} '2:4'",
        f"  block/kernel: shape (3, 3, 16, 16), {wanted} (2, 4, -2)",
        "  head/kernel: shape (16, 10), `n` and `m` must be integers with 1 <= n <= m <= 32, "
        "but are 5 and 4",
        "  head/bias: shape (10,), `pool` must be one of mean, max, sum, but is 'median'",
    ]


def test_rule_must_be_a_pattern_or_a_function():
    message = r"^`pattern` must be None or made by .* but is '2:4'\. Write `pattern=.*n_m\(2, 4, "
    with pytest.raises(ValueError, match=message):
        patterns.patterns_of(LEAVES, "2:4")


# ---- layouts

PARAMS = {
    "attention": jnp.zeros((8, 3, 4)),  # d, heads, width
    "out": jnp.zeros((3, 4, 8)),
    "equinox": jnp.zeros((6, 8)),  # out, in
    "conv": jnp.zeros((3, 3, 8, 4)),
    "oihw": jnp.zeros((4, 8, 3, 3)),
    "transposed": jnp.zeros((2, 2, 6, 8)),  # out, in, as `transpose_kernel=True` wants it
    "layers": jnp.zeros((3, 8, 8)),
    "middle": jnp.zeros((8, 3, 8)),  # in, layers, out
    "table": jnp.zeros((5, 8)),
}


def _network(params, x, image):
    dimensions = ("NHWC", "HWIO", "NHWC")
    heads = jnp.einsum("nd,dhw->nhw", x, params["attention"])
    outputs = [jnp.einsum("nhw,hwd->nd", heads, params["out"]), params["table"][jnp.array([1])]]
    outputs += [
        x @ params["equinox"].T,
        jax.lax.conv_general_dilated(
            image, params["conv"], (1, 1), "SAME", dimension_numbers=dimensions
        ),
        jax.lax.conv_general_dilated(image.transpose(0, 3, 1, 2), params["oihw"], (1, 1), "SAME"),
        jax.lax.conv_transpose(
            image,
            params["transposed"],
            (2, 2),
            "SAME",
            dimension_numbers=dimensions,
            transpose_kernel=True,
        ),
    ]
    for layers in (params["layers"], jnp.moveaxis(params["middle"], 1, 0)):
        outputs.append(jax.lax.scan(lambda x, w: (x @ w, None), x, layers)[0])
    return outputs


FOUND = layouts.find(_network, PARAMS, jnp.zeros((1, 8)), jnp.zeros((1, 5, 5, 8)))
KERNELS = {path: leaf for path, leaf in PARAMS.items() if path != "table"}


def test_n_m_groups_lie_along_the_inputs_of_every_layout():
    found = patterns.patterns_of(KERNELS, patterns.n_m(2, 4, layouts=FOUND))
    inputs = {path: pattern.axis % KERNELS[path].ndim for path, pattern in zip(KERNELS, found)}
    assert inputs == {
        "attention": 0,
        "out": 1,
        "equinox": 1,
        "conv": 2,
        "oihw": 1,
        "transposed": 3,
        "layers": 1,
        "middle": 0,
    }
    assert {pattern[:2] for pattern in found} == {(2, 4)}
    # Equal to what the user would state, so that leaves of one kind share a program.
    assert found[3] == found[6] == patterns.n_m(2, 4, axis=-2)
    assert found[2] == patterns.n_m(2, 4, axis=-1)


@pytest.mark.slow
def test_pruned_groups_lie_along_inputs():
    params = {path: jax.random.normal(jax.random.key(0), x.shape) for path, x in KERNELS.items()}
    _, masks = jaxprune.prune(params, 0.5, pattern=patterns.n_m(2, 4, layouts=FOUND))
    for path, axis in [("attention", 0), ("out", 1), ("equinox", 1), ("transposed", 3)]:
        groups = np.moveaxis(np.asarray(masks[path]), axis, -1).reshape(-1, 4)
        assert (groups.sum(axis=1) == 2).all(), path


def test_channels_are_the_outputs_of_every_layout_and_of_every_copy():
    rule = patterns.channels(layouts=FOUND, pool="max")
    found = dict(zip(KERNELS, patterns.patterns_of(KERNELS, rule)))
    assert found == {
        "attention": patterns.blocks((None, 1, 1), "max"),
        "out": patterns.channels(-1, "max"),
        "equinox": patterns.channels(-2, "max"),
        "conv": patterns.channels(-1, "max"),
        "oihw": patterns.channels(-4, "max"),
        "transposed": patterns.channels(-2, "max"),
        "layers": patterns.blocks((1, None, 1), "max"),
        "middle": patterns.blocks((None, 1, 1), "max"),
    }
    units = {path: patterns.unit_shape(found[path], KERNELS[path].shape) for path in KERNELS}
    assert units["attention"] == (1, 3, 4) and units["layers"] == (3, 1, 8)


@pytest.mark.parametrize("make", [lambda **k: patterns.n_m(2, 4, **k), patterns.channels])
def test_leaves_without_layout_are_named_with_the_reason(make):
    leaves = {"table": PARAMS["table"], "equinox": PARAMS["equinox"], "quinox": jnp.zeros((6, 8))}
    assert _lines(leaves, make(layouts=FOUND)) == [
        "  table: shape (5, 8), no layout was found: used by `gather`",
        "  quinox: shape (6, 8), no layout was found: there is no such leaf among the parameters "
        "whose layouts were found; did you mean equinox?",
    ]
    plain = {"equinox": layouts.Layout(outputs=(0, 1))}
    assert _lines({"a": jnp.zeros((2, 2))}, make(layouts=plain)) == [
        "  a: shape (2, 2), no layout was found: it is not in `layouts`"
    ]


def test_inputs_that_a_layout_lacks_are_an_error():
    plain = {"a": layouts.Layout(outputs=(0, 1))}
    (line,) = _lines({"a": jnp.zeros((4, 4))}, patterns.n_m(2, 4, layouts=plain))
    assert line.startswith("  a: shape (4, 4), its layout has no inputs: Layout(")
    (line,) = _lines({"a": jnp.zeros(4)}, patterns.channels(layouts=plain))
    assert line.startswith("  a: shape (4,), its layout has 2 axes: Layout(")


def test_an_axis_that_would_be_guessed_is_an_error_with_both_ways_out():
    for call, wanted, axis in [("n_m(2, 4, ", "inputs", -2), ("channels(", "outputs", -1)]:
        make = patterns.channels if "channels" in call else lambda **k: patterns.n_m(2, 4, **k)
        with pytest.raises(ValueError, match=f"holds its {wanted}, but neither is given") as error:
            make()
        assert f"`{call}axis={axis})`" in str(error.value)
        assert f"`{call}layouts=jaxprune.layouts.find(" in str(error.value)
        with pytest.raises(ValueError, match="but both are given"):
            make(axis=0, layouts=FOUND)


# ---- arguments


@pytest.mark.parametrize("n, m", [(5, 4), (0, 4), (-1, 4), (1, 33), (2.0, 4), (2, 4.0), (True, 4)])
def test_n_m_numbers_are_checked(n, m):
    with pytest.raises(ValueError) as error:
        patterns.n_m(n, m, axis=-2)
    assert str(error.value) == (
        f"`n` and `m` must be integers with 1 <= n <= m <= 32, but are {n!r} and {m!r}."
    )


@pytest.mark.parametrize("make", [lambda axis: patterns.n_m(2, 4, axis), patterns.channels])
@pytest.mark.parametrize("axis", [1.0, "in", False])
def test_axis_must_be_an_integer(make, axis):
    with pytest.raises(ValueError, match=rf"^`axis` must be an integer, but is {axis!r}\.$"):
        make(axis)


@pytest.mark.parametrize("shape", [(), (0, 4), (2, -1), (2.0,), (True,), 4, "44"])
def test_block_shapes_are_checked(shape):
    with pytest.raises(ValueError) as error:
        patterns.blocks(shape)
    assert str(error.value) == (
        "`shape` must be a tuple of positive integers, or None for a whole dimension, but is "
        f"{shape!r}."
    )


@pytest.mark.parametrize("make", [patterns.blocks, patterns.channels])
def test_pool_names_are_checked(make):
    first = (2,) if make is patterns.blocks else -1
    with pytest.raises(ValueError, match=r"^`pool` must be one of mean, max, sum, but is 'avg'\.$"):
        make(first, "avg")


def test_limits_of_valid_arguments():
    assert patterns.n_m(32, 32, 0) == (32, 32, 0)
    assert patterns.n_m(np.int64(1), np.int64(1), axis=-2) == patterns.NM(1, 1, -2)
    assert patterns.blocks([None, 1]) == patterns.Blocks((None, 1), "mean")


def test_n_m_has_no_units():
    pattern, ones = patterns.n_m(2, 4, axis=-2), jnp.ones((8, 2))
    calls = [
        lambda: patterns.pool(pattern, ones),
        lambda: patterns.any_kept(pattern, ones > 0),
        lambda: patterns.expand(pattern, jnp.ones((2, 2), bool), (8, 2)),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"`pattern` must have units, .* use `n_m_mask`"):
            call()


@pytest.mark.parametrize(
    "call",
    [
        lambda x: patterns.unit_shape(patterns.blocks((3, 1)), x.shape),
        lambda x: patterns.pool(patterns.blocks((3, 1)), x),
        lambda x: patterns.any_kept(patterns.blocks((3, 1)), x > 0),
        lambda x: patterns.expand(patterns.blocks((3, 1)), x > 0, x.shape),
    ],
)
def test_patterns_that_do_not_fit_are_refused_everywhere(call):
    message = r"`pattern` must fit the leaf of shape \(2, 4\): the block \(3, 1\) is larger along"
    with pytest.raises(ValueError, match=message):
        call(jnp.ones((2, 4)))


def test_unit_mask_must_have_the_shape_of_the_units():
    with pytest.raises(ValueError, match=r"shape \(2, 2\) of the units .*, but has \(2, 1\)"):
        patterns.expand(patterns.blocks((2, 2)), jnp.ones((2, 1), bool), (3, 4))


@pytest.mark.parametrize(
    "select", [lambda x: patterns.pool(None, x), lambda x: N_M_MASK(x, 1, 2, 0)]
)
def test_scores_must_be_floating_point(select):
    with pytest.raises(ValueError, match="`scores` must be floating point, but are int(32|64)"):
        select(jnp.zeros((2, 2), int))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"n": 5, "m": 4}, "`n` must lie between 0 and m = 4, but is 5"),
        ({"n": -1, "m": 4}, "`n` must lie between 0 and m = 4, but is -1"),
        ({"n": 1.0, "m": 4}, "`n` must be one integer, but is 1.0"),
        ({"n": np.array([1, 2]), "m": 4}, "`n` must be one integer, but is array"),
        ({"n": 1, "m": 33}, "`m` must be an integer from 1 to 32, but is 33"),
        ({"n": 1, "m": 0}, "`m` must be an integer from 1 to 32, but is 0"),
        ({"n": 1, "m": 3}, "axis -2 has 8 entries, not a multiple of m = 3"),
        ({"n": 1, "m": 2, "axis": 2}, "there is no axis 2"),
        ({"n": 1, "m": 2, "among": np.ones((8, 1), bool)}, r"of the shape \(8, 2\) of `scores`"),
        ({"n": 1, "m": 2, "among": np.ones((8, 2))}, r"but is float64 \(8, 2\)"),
    ],
)
def test_arguments_of_n_m_mask_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        patterns.n_m_mask(jnp.zeros((8, 2)), **{"axis": -2, **arguments})
