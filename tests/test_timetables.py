"""Plans: exact counts on the host, and the masks that follow from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune
from jaxprune import budgets, counting, patterns, timetables
from tests.support import reference
from tests.support.effort import calls

SHAPES = {"a": (6, 8), "b": (1, 1, 8, 8), "c": (10, 4)}
SIZES = [48, 64, 40]


def leaves(shapes=SHAPES):
    return {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}


def draw(seed, shapes=SHAPES):
    random = np.random.default_rng(seed)
    return [random.standard_normal(shape).astype(np.float32) for shape in shapes.values()]


def counts(masks):
    return [int(np.sum(mask)) for mask in masks]


def by_budget(budget, sparsities, moved=None, pattern=None):
    steps = range(len(sparsities))
    return timetables.make_timetable(
        leaves(), steps, sparsities, moved=moved, budget=budget, pattern=pattern
    )


@pytest.mark.slow
@pytest.mark.parametrize("budget", [budgets.uniform, budgets.erdos_renyi_kernel])
def test_select_keeps_the_largest_of_each_leaf_under_a_fixed_budget(budget):
    timetable = by_budget(budget, [0.3, 0.8])
    for index, sparsity in enumerate([0.3, 0.8]):
        total, floors = budget(SHAPES, sparsity)
        scores = draw(index)
        masks = timetables.select(timetable, index, list(map(jnp.asarray, scores)))
        wanted = reference.largest(scores, total, floors)
        for mask, expected in zip(masks, wanted, strict=True):
            np.testing.assert_array_equal(mask, expected)
        assert counts(masks) == list(floors)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_drop_and_grow_conserves_each_leaf_under_a_fixed_budget(seed):
    timetable = by_budget(budgets.uniform, [0.6, 0.6, 0.6], moved=[0.5, 0.3, 0.0])
    totals = [budgets.keep_count(size, 0.6) for size in SIZES]
    masks = reference.largest(draw(9), sum(totals), totals)
    for index, fraction in enumerate([0.5, 0.3, 0.0]):
        weights, growth = draw(10 * seed + index), draw(10 * seed + index + 5)
        moved = [int(np.floor(total * fraction + 0.5)) for total in totals]
        scores = [np.abs(w) for w in weights]
        new = timetables.renew(timetable, index, list(map(jnp.asarray, masks)), scores, growth)
        wanted = reference.drop_and_grow(weights, growth, masks, totals, moved)
        for mask, expected in zip(new, wanted, strict=True):
            np.testing.assert_array_equal(mask, expected)
        changed = [int((a & ~b).sum()) for a, b in zip(masks, wanted, strict=True)]
        assert changed == moved
        masks = wanted


@pytest.mark.slow
@settings(max_examples=12)
@given(
    before=st.integers(0, 100),
    after=st.integers(0, 100),
    fraction=st.sampled_from([0.0, 0.1, 0.5, 0.99]),
    budget=st.sampled_from(
        [
            budgets.uniform,
            budgets.erdos_renyi_kernel,
            budgets.global_budget(0.0),
            budgets.global_budget(0.9),
        ]
    ),
    pattern=st.sampled_from([None, patterns.blocks((2, 2)), patterns.channels(axis=-1)]),
    seed=st.integers(0, 3),
)
def test_any_masks_lead_to_exactly_the_total(before, after, fraction, budget, pattern, seed):
    """Whatever the masks are now, risen or fallen, refused or not."""
    before, after = min(before, 80) / 100, min(after, 80) / 100
    shapes = {path: patterns.unit_shape(pattern, shape) for path, shape in SHAPES.items()}
    try:
        total = budget(shapes, after).total
    except ValueError:  # floors of one unit in each leaf
        return
    timetable = by_budget(budget, [after], moved=[fraction], pattern=pattern)
    random = np.random.default_rng(seed)
    alive = [random.random(shape) >= before for shape in shapes.values()]
    masks = [
        patterns.expand(pattern, jnp.asarray(mask), shape)
        for mask, shape in zip(alive, SHAPES.values(), strict=True)
    ]
    new = timetables.renew(timetable, 0, masks, list(map(jnp.asarray, draw(seed))), draw(seed + 7))
    units = [patterns.any_kept(pattern, mask) for mask in new]
    assert sum(counts(units)) == total
    for mask, unit, shape in zip(new, units, SHAPES.values(), strict=True):
        np.testing.assert_array_equal(mask, patterns.expand(pattern, unit, shape))


def test_without_growth_nothing_comes_back():
    timetable = by_budget(budgets.global_budget(), [0.5, 0.7])
    first = timetables.select(timetable, 0, list(map(jnp.asarray, draw(0))))
    second = timetables.renew(timetable, 1, first, list(map(jnp.asarray, draw(1))))
    assert sum(counts(second)) == budgets.keep_count(152, 0.7)
    assert all(bool(jnp.all(a | ~b)) for a, b in zip(first, second, strict=True))


@pytest.mark.slow
def test_leaves_of_different_patterns_have_their_own_budgets():
    kinds = {
        "a": patterns.n_m(2, 4, axis=-2),
        "b": patterns.blocks((2, 2)),
        "c": patterns.channels(axis=-1),
    }
    shapes = {"a": (8, 6), "b": (4, 4, 4), "c": (10, 4)}
    timetable = timetables.make_timetable(
        leaves(shapes), [0, 1], [0.25, 0.5], pattern=lambda path, leaf: kinds[path]
    )
    for index, kept in enumerate([(36, 48, 30), (24, 32, 20)]):
        masks = timetables.select(timetable, index, list(map(jnp.asarray, draw(index, shapes))))
        assert counts(masks) == list(kept)
    groups = np.asarray(masks[0]).reshape(2, 4, 6).sum(1)
    np.testing.assert_array_equal(groups, 2)
    assert set(np.asarray(masks[2]).sum(0)) == {0, 10}


@pytest.mark.slow
def test_n_m_falls_with_the_ramp_and_moves_within_its_groups():
    timetable = timetables.make_timetable(
        leaves({"a": (16, 3)}), range(4), [0.0, 0.2, 0.5, 0.5], moved=[0, 0, 0, 0.5],
        pattern=patterns.n_m(2, 4, axis=-2),
    )  # fmt: skip
    scores, growth = (list(map(jnp.asarray, draw(seed, {"a": (16, 3)}))) for seed in (0, 1))
    masks, moved = [jnp.ones((16, 3), bool)], []
    for index, kept in enumerate([4, 3, 2, 2]):
        new = timetables.renew(timetable, index, masks, scores, growth)
        np.testing.assert_array_equal(np.asarray(new[0]).reshape(4, 4, 3).sum(1), kept)
        moved.append(int((new[0] & ~masks[0]).sum()))
        masks = new
    assert moved == [0, 0, 0, 12]  # one of the two in each of twelve groups
    grown = timetables.make_timetable(
        leaves({"a": (16, 3)}), [0], [0.25], pattern=lambda *_: patterns.n_m(3, 4, axis=-2)
    )
    (more,) = timetables.renew(grown, 0, masks, scores, growth)
    np.testing.assert_array_equal(np.asarray(more).reshape(4, 4, 3).sum(1), 3)
    assert bool(jnp.all(more | ~masks[0]))


def test_entries_until_counts_the_mask_updates_that_are_due():
    timetable = by_budget(None, [0.1, 0.2, 0.3])._replace(steps=np.array([2, 5, 6], np.int32))
    due = [int(timetables.entries_until(timetable, jnp.int32(step))) for step in range(8)]
    assert due == [0, 0, 1, 1, 1, 2, 3, 3]


def test_a_falling_sparsity_and_moves_grow():
    assert not timetables.ever_grows(by_budget(None, [0.1, 0.5]))
    assert timetables.ever_grows(by_budget(None, [0.5, 0.1]))
    assert timetables.ever_grows(by_budget(None, [0.5, 0.5], moved=[0.1, 0.0]))


# ---- errors


@pytest.mark.parametrize(
    ("sparsity", "part"),
    [
        (0.3, "`sparsity` 0.3 is too low for these patterns; raise it:\n  a: 2:4"),
        (0.9, "`sparsity` 0.9 is above that of these patterns; lower it to 1 - n / m:\n  a: 2:4"),
    ],
)
def test_n_m_must_be_what_the_sparsity_leads_to(sparsity, part):
    with pytest.raises(ValueError) as error:
        timetables.make_timetable(
            leaves({"a": (8, 4)}), [0], [sparsity], pattern=patterns.n_m(2, 4, axis=-2)
        )
    assert str(error.value) == part


@pytest.mark.slow
def test_another_leaf_may_be_sparser_than_an_n_m_pattern():
    timetable = timetables.make_timetable(
        leaves({"a": (8, 4), "b": (8, 4)}), [0], [0.75],
        pattern=lambda path, leaf: patterns.n_m(2, 4, axis=-2) if path == "a" else None,
    )  # fmt: skip
    masks = timetables.select(
        timetable, 0, list(map(jnp.asarray, draw(0, {"a": (8, 4), "b": (8, 4)})))
    )
    assert counts(masks) == [16, 8]


def test_all_leaves_that_do_not_fit_a_pattern_are_listed():
    with pytest.raises(ValueError) as error:
        timetables.make_timetable(leaves(), [0], [0.5], pattern=patterns.n_m(1, 3, axis=-2))
    text = str(error.value)
    assert "b: " in text and "c: " in text and "(1, 1, 8, 8)" in text and "\n  a: " not in text


def test_a_custom_budget_for_a_path_that_does_not_exist():
    with pytest.raises(ValueError, match=r"(?s)head/kernel.*a"):
        timetables.make_timetable(leaves(), [0], [0.5], budget=budgets.custom({"head/kernel": 0.2}))


def test_sparsities_must_be_fractions():
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\), but is:\n  1.5 at step 3"):
        timetables.sparsities_at(lambda step: 0.5 * step, [0, 3])


def test_a_budget_is_counted_once_for_each_sparsity():
    asked = []

    def rule(shapes, sparsity):
        asked.append(sparsity)
        return budgets.uniform(shapes, sparsity)

    timetable = by_budget(rule, [0.5, 0.0, 0.5, 0.0, 0.7])
    assert sorted(asked) == [0.0, 0.5, 0.7]
    assert timetable.rankings[0].keep.tolist() == [
        budgets.uniform(SHAPES, s).total for s in (0.5, 0, 0.5, 0, 0.7)
    ]


def test_counts_beyond_int32_are_exact():
    shapes = {name: jax.ShapeDtypeStruct((2**15, 2**15), jnp.float32) for name in "abc"}
    timetable = timetables.make_timetable(shapes, [0, 1], [0.0, 0.25])
    everything = 3 * 2**30
    assert timetable.rankings[0].keep.tolist() == [everything, budgets.keep_count(everything, 0.25)]
    assert timetable.rankings[0].floors[0].tolist() == [everything // 10 // 3] * 3


def test_a_tree_of_three_billion_weights_compiles_its_mask_update():
    """By shapes only; 2**31 entries are selected from in tests/test_selection.py."""
    shapes = {"table": jax.ShapeDtypeStruct((3, 2**30), jnp.float32)}
    for budget in (budgets.uniform, budgets.global_budget()):
        timetable = timetables.make_timetable(shapes, [0], [0.5], moved=[0.2], budget=budget)
        leaf = shapes["table"]
        mask = jax.ShapeDtypeStruct(leaf.shape, bool)
        for growth in (None, [leaf]):
            new = jax.eval_shape(
                lambda m, s, g, timetable=timetable: timetables.renew(timetable, 0, m, s, g),
                [mask],
                [leaf],
                growth,
            )
            assert [(m.shape, m.dtype) for m in new] == [(leaf.shape, bool)]


@pytest.mark.slow
@pytest.mark.parametrize("budget", [budgets.uniform, budgets.global_budget(0.0)])
@pytest.mark.parametrize("pattern", [None, patterns.channels(axis=-1)])
def test_64_bit_counters_lead_to_the_same_masks(budget, pattern, monkeypatch):
    shapes = {"a": (6, 8), "c": (10, 4)}
    timetable = timetables.make_timetable(
        leaves(shapes), [0], [0.5], moved=[0.4], budget=budget, pattern=pattern
    )
    scores, growth = ([jnp.asarray(x) for x in draw(seed, shapes)] for seed in (0, 1))
    masks = timetables.select(timetable, 0, scores)
    expected = timetables.renew(timetable, 0, masks, growth, scores)
    monkeypatch.setattr(counting, "width_of", lambda leaves: counting.WIDE)
    for mask, wanted in zip(timetables.select(timetable, 0, scores), masks, strict=True):
        np.testing.assert_array_equal(mask, wanted)
    renew = jax.jit(lambda masks: timetables.renew(timetable, 0, masks, growth, scores))
    for mask, wanted in zip(renew(masks), expected, strict=True):
        np.testing.assert_array_equal(mask, wanted)


def test_marks_tell_mask_updates_apart():
    def marks(steps, sparsities, **options):
        return timetables.make_timetable(leaves(), steps, sparsities, **options).marks.tolist()

    first = marks([0, 5], [0.2, 0.5])
    assert len({0, *first}) == 3
    assert marks([0, 5, 9], [0.2, 0.5, 0.6])[:2] == first
    assert marks([0, 6], [0.2, 0.5])[1] != first[1]  # another step
    assert marks([0, 5], [0.2, 0.51])[1] != first[1]  # another target
    assert marks([0, 5], [0.2, 0.5], budget=budgets.uniform)[1] != first[1]


# ---- long runs


@pytest.mark.slow
def test_a_mask_update_at_every_step_of_a_long_run_takes_no_time() -> None:
    # The kernels of a ResNet-50 and 30,000 mask updates: 39 s when budgets were made one by one.
    steps = 30_000
    shapes = [(7, 7, 3, 64), (2048, 1000), *[(1, 1, 64 * i, 256) for i in range(1, 25)]]
    shapes += [(3, 3, 32 * i, 32 * i) for i in range(1, 29)]
    params = {str(i): jax.ShapeDtypeStruct(shape, jnp.float32) for i, shape in enumerate(shapes)}

    def init():
        transform = jaxprune.straight_through_transform(0.9, every=1, stop=steps)
        transform.init({path: {"kernel": leaf} for path, leaf in params.items()})

    assert calls(init) < len(shapes) * steps  # 0.7 million: less than one a leaf and mask update


def test_marks_differ_where_what_is_kept_differs() -> None:
    leaves = {"a": jnp.zeros((8, 8)), "b": jnp.zeros((8, 4))}
    one = timetables.make_timetable(leaves, [0, 1, 2], [0.1, 0.5, 0.5])
    two = timetables.make_timetable(leaves, [0, 1, 3], [0.1, 0.6, 0.5])
    blocks = timetables.make_timetable(
        leaves, [0, 1, 2], [0.1, 0.5, 0.5], pattern=jaxprune.patterns.blocks((1, 1))
    )
    assert (one.marks > 0).all() and len(set(one.marks.tolist())) == 3
    assert (one.marks == two.marks).tolist() == [True, False, False]
    assert not (one.marks == blocks.marks).any()
