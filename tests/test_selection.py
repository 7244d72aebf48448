"""The search selects what a stable sort selects: values, ties, floors, devices."""

import functools
import math
import re
from unittest import mock

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxprune import counting, selection
from tests.support.reference import largest

# Compiled once for each list of shapes, so that most examples only run.
SELECT_ALONE = jax.jit(selection.largest, static_argnames="stacked")
# Another function, or JAX would take the first one's trace.
SELECT_JOINED = jax.jit(functools.partial(selection.largest), static_argnames="stacked")
SELECT_EACH = jax.jit(jax.vmap(lambda s, k, f: selection.largest(s, k, floors=f), (0, 0, None)))
SHAPES = [
    [()],
    [(1,), (), (1, 1)],
    [(13,), (3, 5)],
    [(2, 3, 2, 11), (9,), (4, 16), (1, 1, 1, 1)],
    [(3, 5), (9,), (3, 5), (2, 4), (9,), (3, 5)],
]


def _ties(rng, n):
    return rng.integers(0, 3, n)


def _outlier(rng, n):
    values = rng.random(n)
    values[rng.integers(n)] = 3e38
    return values


def _special(rng, n):
    return rng.choice([-np.inf, -1.5, -0.0, 0.0, 2.0, np.inf, np.nan, -np.nan], n)


# What makes a search on keys hard or wrong.
VALUES = {
    "normal": lambda rng, n: rng.normal(size=n),
    "ties": _ties,
    "equal": lambda rng, n: np.full(n, 0.25),
    "negative": lambda rng, n: -rng.random(n),
    "outlier": _outlier,
    "one binade": lambda rng, n: 1 + rng.integers(0, 2 * n, n) * 2.0**-23,
    "half zeros": lambda rng, n: rng.random(n) * (rng.random(n) < 0.5),
    "all binades": lambda rng, n: 10 ** rng.uniform(-37.9, 38.4, n),
    "both signs": lambda rng, n: rng.choice([-1, 1], n) * 10 ** rng.uniform(-37.9, 38.4, n),
    "special": _special,
    "infinite": lambda rng, n: np.full(n, np.inf),
    "nan": lambda rng, n: np.full(n, np.nan),
}


def _draw(kind, seed, shapes, dtype=np.float32):
    rng = np.random.default_rng(seed)
    values = VALUES[kind](rng, sum(map(math.prod, shapes)))
    ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
    parts = np.split(np.float32(values).astype(dtype), ends)
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def _select(scores, keep, **options):
    """The masks; leaves of one shape are searched as one array where they cannot be sharded."""
    masks = SELECT_ALONE(scores, keep, **options)
    with mock.patch.object(counting, "_may_be_sharded", lambda: False):
        joined = SELECT_JOINED(scores, keep, **options)
    chex.assert_trees_all_equal(masks, joined)
    return masks


def _equal(masks, wanted):
    assert len(masks) == len(wanted)
    for mask, want in zip(masks, wanted, strict=True):
        assert mask.dtype == bool
        np.testing.assert_array_equal(mask, want)


def _count(masks):
    return sum(int(np.sum(mask)) for mask in masks)


# ---- against the sort

EXAMPLES = {
    "shapes": st.sampled_from(SHAPES[::-1]),
    "kind": st.sampled_from(sorted(VALUES)),
    "seed": st.integers(0, 2**32 - 1),
}


@pytest.mark.slow
@hypothesis.settings(max_examples=2 * hypothesis.settings.default.max_examples)
@given(**EXAMPLES)
def test_keeps_what_a_stable_sort_keeps(shapes, kind, seed):
    scores = _draw(kind, seed, shapes)
    size = sum(score.size for score in scores)
    for keep in [0, size, size + 3, *np.random.default_rng(seed).integers(0, size + 1, 5)]:
        masks = _select(scores, int(keep))
        _equal(masks, largest(scores, keep))
        assert _count(masks) == min(keep, size)


@pytest.mark.slow
@hypothesis.settings(max_examples=2 * hypothesis.settings.default.max_examples)
@given(**EXAMPLES)
def test_floors_and_among_keep_what_a_stable_sort_keeps(shapes, kind, seed):
    scores = _draw(kind, seed, shapes)
    rng = np.random.default_rng(seed)
    for density in (0.0, 0.2, 0.5, 0.9, 1.0):
        floors = np.array([rng.integers(0, score.size + 2) for score in scores], np.int32)
        floors = np.where(rng.random(len(floors)) < 0.3, 0, floors)
        among = [rng.random(score.shape) < density for score in scores]
        able = [int(mask.sum()) for mask in among]
        for keep in rng.integers(0, sum(able) + 2, 3):
            masks = _select(scores, int(keep), floors=floors, among=among)
            _equal(masks, largest(scores, keep, floors, among))
            least = sum(min(f, n) for f, n in zip(floors, able, strict=True))
            assert _count(masks) == min(max(keep, least), sum(able))
            for mask, allowed, f, n in zip(masks, among, floors, able, strict=True):
                assert not np.any(mask & ~allowed)
                assert _count([mask]) >= min(f, n)


def test_ties_of_joined_leaves_go_to_the_first_leaf_and_not_to_the_first_shape():
    scores = [jnp.array([[1.0, 0.0]]), jnp.ones(3), jnp.array([[1.0, 1.0]])]
    masks = _select(scores, 3)
    _equal(masks, [[[True, False]], [True, True, False], [[False, False]]])
    masks = _select(scores, 5)
    _equal(masks, [[[True, False]], [True, True, True], [[True, False]]])


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1)])
def test_copies_in_joined_leaves(axes):
    shapes = [(2, 3, 4), (5,), (2, 3, 4), (2, 3, 4)]
    scores, stacked = _draw("ties", 7, shapes), (axes, (), axes, (1,))
    copies = [math.prod(s[a] for a in own) for s, own in zip(shapes, stacked)]
    floors = np.arange(sum(copies), dtype=np.int32) % 3
    masks = _select(scores, 31, floors=floors, stacked=stacked)
    parts = [np.moveaxis(s, own, range(len(own))) for s, own in zip(scores, stacked)]
    layers = [layer for part, n in zip(parts, copies) for layer in part.reshape(n, -1)]
    wanted = iter(largest(layers, 31, floors))
    for mask, own, n in zip(masks, stacked, copies):
        mask = np.moveaxis(np.asarray(mask), own, range(len(own))).reshape(n, -1)
        _equal(list(mask), [next(wanted) for _ in range(n)])


@hypothesis.settings(max_examples=max(1, hypothesis.settings.default.max_examples // 6))
@given(
    shapes=st.lists(hnp.array_shapes(min_dims=0, max_dims=4, max_side=9), min_size=1, max_size=4),
    seed=st.integers(0, 999),
)
def test_any_shapes(shapes, seed):
    size = sum(map(math.prod, shapes))
    for i, kind in enumerate(("ties", "equal", "special", "normal")):
        scores = _draw(kind, seed, shapes)
        for keep in {0, 1, size // 2, size - 1, size, size + 5}:
            floors = np.array([(seed + i + keep) % (score.size + 1) for score in scores], np.int32)
            _equal(_select(scores, keep, floors=floors), largest(scores, keep, floors))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ties", "half zeros", "outlier", "all binades", "one binade"])
@pytest.mark.parametrize("floored", [False, True])
def test_two_hundred_thousand_entries(kind, floored):
    shapes = [(3, 3, 100, 150), (50_001,), (1, 15_000), (3,)]
    scores = _draw(kind, 0, shapes)
    size = sum(score.size for score in scores)
    for keep in (1, 1234, size // 3, size - 7):
        floors = np.array([s.size * keep // size // 2 * floored for s in scores], np.int32)
        masks = _select(scores, keep, floors=floors)
        assert _count(masks) == keep
        _equal(masks, largest(scores, keep, floors))


def test_floors_that_add_up_select_within_each_leaf():
    scores = _draw("normal", 0, SHAPES[3])
    floors = np.array([score.size // 2 for score in scores], np.int32)
    masks = _select(scores, floors.sum(), floors=floors)
    assert counting.count_kept(masks).tolist() == floors.tolist()
    alone = [largest([score], floor)[0] for score, floor in zip(scores, floors, strict=True)]
    _equal(masks, alone)


def test_floors_are_lowered_to_what_can_be_selected():
    scores, among = [jnp.arange(5.0), jnp.arange(10.0)], [jnp.arange(5) < 2, jnp.ones(10, bool)]
    masks = _select(scores, 6, floors=np.array([5, 0], np.int32), among=among)
    assert [mask.sum() for mask in masks] == [2, 4]


# ---- ties and special values


@pytest.mark.slow
@pytest.mark.parametrize("keep", range(18))
def test_ties_keep_the_lower_index_in_the_order_of_leaves(keep):
    tree = {"b": jnp.zeros((2, 1, 5)), "a": jnp.zeros((3, 2)), "c": jnp.zeros(())}
    masks = _select(tree, keep)
    flat = np.concatenate([np.ravel(masks[name]) for name in ("a", "b", "c")])
    assert flat.tolist() == [i < keep for i in range(17)]
    assert jax.tree.map(jnp.shape, masks) == jax.tree.map(jnp.shape, tree)


def test_ties_are_cut_after_the_larger_scores_of_later_leaves():
    masks = _select([jnp.array([1.0, 1.0, 1.0]), jnp.array([1.0, 2.0])], 3)
    _equal(masks, [[True, True, False], [False, True]])


def test_floors_take_ties_from_earlier_leaves():
    masks = _select([jnp.zeros(3), jnp.zeros(3)], 3, floors=np.array([0, 2], np.int32))
    _equal(masks, [[True, False, False], [True, True, False]])


def _order(scores):
    """Positions from the first to be kept to the last."""
    masks = [np.asarray(_select([scores], keep)[0]) for keep in range(scores.size + 1)]
    return [int(np.flatnonzero(b & ~a)[0]) for a, b in zip(masks, masks[1:])]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_order_of_special_values(dtype):
    scores = [jnp.nan, -jnp.inf, -1.0, -0.0, 0.0, 1.0, jnp.inf, -jnp.nan]
    assert _order(jnp.array(scores, dtype)) == [6, 5, 3, 4, 2, 1, 0, 7]


def test_nan_is_kept_only_where_nothing_else_is_left():
    scores = [jnp.array([jnp.nan, -jnp.inf]), jnp.array([jnp.nan, -3.0])]
    among = [jnp.array([True, False]), jnp.array([True, True])]
    _equal(_select(scores, 1, among=among), [[False, False], [False, True]])
    _equal(_select(scores, 2, among=among), [[True, False], [False, True]])
    _equal(_select(scores, 4, among=among), [[True, False], [True, True]])


def test_largest_finite_and_smallest_normal_numbers():
    info = np.finfo(np.float32)
    values = np.array([info.tiny, 0.0, info.max, -info.tiny, -info.max, np.inf], np.float32)
    assert _order(values) == [5, 2, 0, 1, 3, 4]


def test_denormal_numbers_never_beat_normal_ones():
    # XLA:CPU flushes them to zero, where they tie with it; a device that does not orders them.
    values = np.array([-1e-40, 0.0, 1e-40, np.finfo(np.float32).tiny, 3e-45], np.float32)
    order = _order(values)
    assert order[0] == 3
    assert order[1:] == ([0, 1, 2, 4] if jax.default_backend() == "cpu" else [2, 4, 1, 0])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_scores_are_compared_in_float32(dtype):
    scores = _draw("normal", 3, [(40, 7)], dtype) + _draw("ties", 3, [(11,)], np.float32)
    for keep in (1, 100, 290):
        _equal(_select(scores, keep), largest(scores, keep))
    if dtype == jnp.float16:
        tiny = jnp.array([1, 3, 2], jnp.float16) * jnp.float16(2.0**-24)
        assert _order(tiny) == [1, 2, 0]


# ---- cost


@pytest.mark.slow
@pytest.mark.parametrize("kind", VALUES)
def test_few_passes_over_the_scores(kind, monkeypatch):
    passes, total = [], counting._total
    monkeypatch.setattr(counting, "_total", lambda *args: passes.append(1) or total(*args))
    scores = _draw(kind, 0, [(100, 100)])
    with jax.disable_jit():
        _equal(selection.largest(scores, 2800), largest(scores, 2800))
    # Halving 32 bits of score and then 14 of index takes up to 46. In one binade, all scores lie
    # within 0.001 % of the keys.
    assert 0 < len(passes) <= (35 if kind == "one binade" else 25)


# ---- transformations


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["normal", "ties", "special"])
def test_eager_jit_and_vmap_agree(kind):
    shapes, keeps = SHAPES[2], np.array([0, 3, 9, 17, 28], np.int32)
    batch = [_draw(kind, seed, shapes) for seed in range(len(keeps))]
    stacked = [np.stack(leaves) for leaves in zip(*batch, strict=True)]
    floors = np.array([2, 1], np.int32)
    mapped = SELECT_EACH(stacked, keeps, floors)
    for i, (scores, keep) in enumerate(zip(batch, keeps, strict=True)):
        wanted = largest(scores, keep, floors)
        _equal([mask[i] for mask in mapped], wanted)
        _equal(_select(scores, keep, floors=floors), wanted)
    if kind == "ties":
        _equal(selection.largest(batch[2], 9, floors=[2, 1]), largest(batch[2], 9, [2, 1]))


def test_one_trace_for_every_keep_and_floor():
    chex.clear_trace_counter()
    select = jax.jit(chex.assert_max_traces(selection.largest, n=1))
    scores = _draw("normal", 0, SHAPES[2])
    for keep in (0, 5, 20, 28):
        floors = np.array([keep // 3, 1], np.int32)
        assert _count(select(scores, jnp.int32(keep), floors=floors)) == max(keep, floors.sum())


# ---- count_kept


@given(masks=st.lists(hnp.arrays(bool, st.sampled_from([(), (1,), (9,), (2, 3, 7)])), min_size=1))
def test_count_kept(masks):
    counts = counting.count_kept([jnp.asarray(mask) for mask in masks])
    assert counts.dtype == jnp.int32
    assert counts.tolist() == [int(mask.sum()) for mask in masks]


def test_counts_are_exact_beyond_the_integers_of_float32():
    assert counting.count_kept([jnp.ones(2**24 + 1, bool)]).tolist() == [2**24 + 1]


# ---- stacked leaves: each copy is a layer


@pytest.mark.slow
@given(
    seed=st.integers(0, 9),
    axes=st.sampled_from([(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]),
    kind=st.sampled_from(["normal", "ties"]),
    share=st.sampled_from([0.0, 0.4, 1.0]),
)
def test_a_stack_is_selected_from_like_its_copies(seed, axes, kind, share):
    (stack, single) = _draw(kind, seed, [(3, 4, 5), (7,)])
    rest = [axis for axis in range(3) if axis not in axes]
    moved = np.transpose(stack, (*axes, *rest))  # copies first
    copies = list(moved.reshape(-1, *(stack.shape[axis] for axis in rest)))
    floors = [int(share * 0.5 * copy.size) for copy in copies] + [2]
    keep = max(20, sum(floors))
    masks = jax.jit(selection.largest, static_argnames="stacked")(
        [stack, single], keep, floors=np.array(floors), stacked=(axes, ())
    )
    wanted = largest([*copies, single], keep, floors)
    whole = np.stack(wanted[:-1]).reshape(moved.shape)
    np.testing.assert_array_equal(np.transpose(masks[0], (*axes, *rest)), whole)
    np.testing.assert_array_equal(masks[1], wanted[-1])
    counts = counting.count_kept(masks, [axes, ()])
    assert counts.tolist() == [int(mask.sum()) for mask in wanted]


def test_a_sharded_stack_exchanges_counts_only():
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    scores = _draw("normal", 1, [(4, 16, 32)])
    floors = np.full(4, 40)
    wanted = largest(list(scores[0]), 300, floors)
    for spec in (P("x"), P(None, "x", "y"), P("y", None, "x")):
        sharding = NamedSharding(mesh, spec)
        placed = [jax.device_put(scores[0], sharding)]
        select = jax.jit(
            functools.partial(selection.largest, stacked=((0,),)), out_shardings=[sharding]
        )
        np.testing.assert_array_equal(select(placed, 300, floors=floors)[0], np.stack(wanted))
        text = select.lower(placed, 300, floors=floors).compile().as_text()
        exchanged = _exchanged(text)
        largest_message = max([size for sizes in exchanged.values() for size in sizes], default=0)
        assert largest_message <= 4, exchanged  # one count for each copy


# ---- trees of more entries than an int32 counts


@pytest.fixture
def narrow(monkeypatch):
    """int16 in place of int32, and int32 in place of int64: 2**15 entries are too many."""
    monkeypatch.setattr(counting, "NARROW", counting.Width(np.int16, np.uint32))
    monkeypatch.setattr(counting, "WIDE", counting.Width(np.int32, np.uint32))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "special"])
@pytest.mark.parametrize("shapes", [[(200, 150), (40, 100)], [(40_000,), (3,)]])
def test_counters_that_are_too_narrow_are_not_used(kind, shapes, narrow):
    scores = _draw(kind, 2, shapes)
    size = sum(score.size for score in scores)
    for keep in (5, 33_000, size - 1):
        floors = [min(keep, 33_000) // 2, 1]
        masks = selection.largest(scores, keep, floors=floors)
        _equal(masks, largest(scores, keep, floors))
    assert counting.count_kept(masks).dtype == jnp.int32


@pytest.mark.slow
def test_the_64_bit_path_selects_the_same(monkeypatch):
    scores = _draw("ties", 3, SHAPES[2])
    monkeypatch.setattr(counting, "width_of", lambda leaves: counting.WIDE)
    for compiled in (selection.largest, jax.jit(selection.largest)):
        _equal(compiled(scores, 11, floors=[2, 1]), largest(scores, 11, [2, 1]))
    mapped = jax.vmap(lambda s: selection.largest(s, 11))([jnp.stack([s, s]) for s in scores])
    _equal([mask[1] for mask in mapped], largest(scores, 11))


@pytest.mark.parametrize(
    "shapes",
    [
        [(2**16, 2**14)] * 2,  # 2**31 in all
        [(3, 2**31)],  # more than 2**32 in one leaf
        [(2**33,)],
        [(12, 2**14, 2**14), (2**31 - 1,)],
    ],
)
@pytest.mark.parametrize("x64", [False, True])
def test_any_number_of_entries_can_be_selected_from(shapes, x64):
    many = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    keep = math.prod(shapes[0]) // 3
    with jax.enable_x64(x64):
        masks = jax.eval_shape(lambda scores: selection.largest(scores, keep), many)
        stacked = [(0,)] + [()] * (len(many) - 1)
        if len(shapes[0]) == 3:
            jax.eval_shape(lambda scores: selection.largest(scores, keep, stacked=stacked), many)
    assert [(mask.shape, mask.dtype) for mask in masks] == [(s, bool) for s in shapes]


# ---- several devices

# Shapes and how they lie on a mesh of 4 x 2: whole and broken bytes of flags on each device.
SHARDED = {
    "several leaves": [
        ((32, 48), P("x", "y")),
        ((3, 3, 16, 32), P(None, None, "y", "x")),
        ((128, 7), P("x")),
        ((16, 32, 5), P("y", "x")),
        ((24,), P()),
        ((), P()),
    ],
    "equal shapes lie differently": [((16, 24), spec) for spec in (P("x"), P(None, "y"), P("y"))],
    "parts of 10": [((32, 40), P(None, "x"))],
    "parts of 5": [((32, 10), P("x", "y"))],
    "both axes on the last dimension": [((6, 24), P(None, ("x", "y")))],
    "both axes on the last dimension, swapped": [((9, 40), P(None, ("y", "x")))],
    "both axes on the first dimension": [((40, 9), P(("x", "y"))), ((8, 3, 3), P(("y", "x")))],
    "vector": [((256,), P("x"))],
    "vectors with odd parts": [((24,), P(("x", "y"))), ((12,), P("x")), ((10,), P("y"))],
    "odd rows": [((3, 2, 7), P(None, "y")), ((4, 3, 3, 6), P("x", None, None, "y"))],
}


def _exchanged(text):
    """Numbers of entries that the collectives of a compiled program return, by operation."""
    found = {}
    for result, name in re.findall(
        r"= (\S.*?) ((?:[a-z-]*all-|collective-|reduce-scatter)[a-z-]*)\(", text
    ):
        shapes = re.findall(r"\[([\d,]*)\]", result)
        sizes = [math.prod(int(n) for n in shape.split(",") if n) for shape in shapes]
        found.setdefault(name.removesuffix("-start"), []).extend(sizes)
    return found


def test_the_compilers_text_is_read_as_we_think():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    x = jax.device_put(jnp.arange(24.0), NamedSharding(mesh, P("x")))
    text = jax.jit(jnp.sort).lower(x).compile().as_text()
    assert max(_exchanged(text)["all-gather"]) == 24


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", SHARDED)
def test_sharded_leaves_get_the_masks_of_one_device_and_exchange_counts_only(name, dtype):
    shapes, specs = zip(*SHARDED[name], strict=True)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    shardings = [NamedSharding(mesh, spec) for spec in specs]
    scores = _draw("ties", 5, shapes, dtype)
    placed = jax.device_put(scores, shardings)
    select = jax.jit(selection.largest, out_shardings=shardings)
    size = sum(score.size for score in scores)
    for keep in (1, size // 3, size - 5):
        for floors in ([0] * len(scores), [score.size // 4 for score in scores]):
            masks = select(placed, keep, floors=np.array(floors, np.int32))
            _equal(masks, largest(scores, keep, floors))
            assert [mask.sharding.spec for mask in masks] == list(specs)
    text = select.lower(placed, 0, floors=np.zeros(len(scores), np.int32)).compile().as_text()
    exchanged = _exchanged(text)
    assert set(exchanged) == {"all-reduce"}
    assert max(exchanged["all-reduce"]) == 1


# ---- errors


EMPTY = np.zeros((0, 2), np.float32)


def test_bad_leaves_are_all_named():
    with pytest.raises(ValueError) as error:
        selection.largest({"a": jnp.arange(3, dtype=jnp.int32), "b": EMPTY, "c": jnp.zeros(2)}, 1)
    assert str(error.value).splitlines() == [
        "`scores` must be non-empty floating-point arrays:",
        "  a: dtype int32, 3 entries",
        "  b: dtype float32, 0 entries",
    ]


def test_a_tree_needs_leaves():
    with pytest.raises(ValueError, match="`scores` must have at least one leaf"):
        selection.largest([], 0)


@pytest.mark.parametrize("floors", [[1], 1, [1, 1, 1]])
def test_floors_need_one_entry_for_each_leaf(floors):
    with pytest.raises(ValueError, match="`floors` must have one entry for each of the 2 layers"):
        selection.largest([jnp.ones(2), jnp.ones(3)], 1, floors=floors)


def test_among_is_matched_by_path():
    """Text keys sort "10" before "2": the tree of a file has another order than a list."""
    scores = [jnp.full(2, float(number)) for number in range(12)]
    among = {str(number): jnp.full(2, number < 6) for number in range(12)}
    kept = selection.largest(scores, 8, among=among)
    assert [i for i, mask in enumerate(kept) if mask.all()] == [2, 3, 4, 5]


def test_among_needs_the_paths_and_shapes_of_the_scores():
    with pytest.raises(ValueError, match=r"`among` must have(.|\n)*1: missing"):
        selection.largest([jnp.ones(2), jnp.ones(3)], 1, among=[jnp.ones(2, bool)])


def test_programs_for_other_devices_join_no_leaves(monkeypatch):
    """As for an ahead-of-time compilation on a machine with one device."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    layouts = counting.stacks([jnp.ones((2, 3))] * 2, None)
    leaves = [jnp.ones((2, 3))] * 2
    assert len(counting.packs(layouts, leaves)) == 1
    with counting.for_devices(4):
        assert len(counting.packs(layouts, leaves)) == 2
    assert len(counting.packs(layouts, leaves)) == 1


def test_leaves_that_types_say_are_split_differently_are_not_joined(monkeypatch):
    monkeypatch.setattr(counting, "_may_be_sharded", lambda: False)
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Explicit,))
    scores = [
        jax.device_put(jnp.arange(6.0).reshape(2, 3) + i, NamedSharding(mesh, spec))
        for i, spec in enumerate([P("x", None), P(None, "x"), P("x", None)])
    ]
    masks = selection.largest(scores, 4)
    _equal(masks, largest([np.asarray(score) for score in scores], 4))
    counts = counting.count_kept([score > 2 for score in scores])
    assert counts.tolist() == [3, 4, 5]


def test_joined_leaves_of_several_networks(monkeypatch):
    """Under `vmap`, each network has numbers of its own by which leaves are taken from a pack."""
    monkeypatch.setattr(counting, "_may_be_sharded", lambda: False)
    shapes, keeps = SHAPES[-1], np.array([0, 7, 31, 60], np.int32)
    each = [_draw("ties", seed, shapes) for seed in range(len(keeps))]
    scores = [np.stack(parts) for parts in zip(*each, strict=True)]
    masks = jax.jit(jax.vmap(lambda s, k: selection.largest(s, k)))(scores, keeps)
    for i, keep in enumerate(keeps):
        _equal([mask[i] for mask in masks], largest(each[i], keep))
