"""Exact integers: the rounding rule, totals that add up, floors that can be met."""

import math
import re
from fractions import Fraction

import pytest
from flax import nnx
from hypothesis import assume, given
from hypothesis import strategies as st

from jaxprune import budgets, layouts, models, trees
from tests.support.reference import (
    erdos_renyi_densities,
    keep_count,
    largest_remainder,
    water_levels,
)

SIZES = st.integers(1, 10**8)
SPARSITIES = st.floats(0, 1, exclude_max=True)
SHAPES = st.lists(st.lists(st.integers(1, 12), max_size=4).map(tuple), min_size=1, max_size=6).map(
    lambda shapes: named(*shapes)
)

SIDE = st.integers(1, 12)
MATRIX = st.tuples(SIDE, SIDE)
# A window comes first and nothing else can be one.
CONVOLUTION = st.builds(
    lambda side, n_in, n_out: (side, side, n_in, n_out),
    st.sampled_from(range(1, 16, 2)),
    st.integers(2, 12),
    st.just(32),
)
MATRICES = st.lists(MATRIX | CONVOLUTION, min_size=1, max_size=6).map(lambda s: named(*s))
# What Erdos-Renyi takes without layouts.
KNOWN = st.lists(MATRIX | CONVOLUTION | st.tuples(SIDE) | st.just(()), min_size=1, max_size=6).map(
    lambda shapes: named(*shapes)
)
ERDOS_RENYI = pytest.mark.parametrize(
    "rule", [budgets.erdos_renyi, budgets.erdos_renyi_kernel], ids=["er", "erk"]
)
OWN = st.dictionaries(st.sampled_from("012345"), st.floats(0, 0.99), max_size=6)


def named(*shapes):
    """Paths "0", "1", ... for some shapes."""
    return {str(i): shape for i, shape in enumerate(shapes)}


def sizes_of(shapes):
    return [math.prod(shape) for shape in shapes.values()]


# ---- keep_count


@pytest.mark.parametrize("size", [1, 7, 99, 1000, 272_474, 11_689_512, 25_502_912, 2**31 - 1])
def test_keep_count_is_exact_for_decimals(size):
    # 25,502,912 prunable weights are those of ResNet-50.
    for digits in (2, 3):
        for i in range(10**digits):
            sparsity = i / 10**digits
            assert budgets.keep_count(size, sparsity) == keep_count(size, sparsity), sparsity


def test_halves_prune_one_more():
    assert [budgets.keep_count(size, 0.5) for size in (1, 3, 5, 7)] == [0, 1, 2, 3]
    assert [budgets.keep_count(2, s) for s in (0.25, 0.75)] == [1, 0]
    assert budgets.keep_count(50, 0.29) == 35  # 50 * 0.29 is below 14.5 in floating point


@given(size=SIZES, sparsity=SPARSITIES)
def test_keep_count_is_the_nearest_integer(size, sparsity):
    kept = budgets.keep_count(size, sparsity)
    assert type(kept) is int
    assert 0 <= kept <= size
    assert abs(size - kept - size * sparsity) <= 0.5 + 1e-6


@given(size=SIZES, low=SPARSITIES, high=SPARSITIES)
def test_keep_count_falls_with_sparsity(size, low, high):
    low, high = sorted((low, high))
    assert budgets.keep_count(size, low) >= budgets.keep_count(size, high)
    assert budgets.keep_count(size, 0.0) == size


# ---- uniform


@given(shapes=SHAPES, sparsity=SPARSITIES)
def test_uniform_gives_every_leaf_its_own_count(shapes, sparsity):
    budget = budgets.uniform(shapes, sparsity)
    assert budget.floors == tuple(
        max(1, budgets.keep_count(math.prod(s), sparsity)) for s in shapes.values()
    )
    assert budget.total == sum(budget.floors)


# ---- global_budget


@given(shapes=SHAPES, sparsity=st.floats(0, 0.99), floor=st.floats(0, 1))
def test_global_floors_can_be_met(shapes, sparsity, floor):
    sizes = sizes_of(shapes)
    total = budgets.keep_count(sum(sizes), sparsity)
    shares = [Fraction(floor) * total * n / sum(sizes) for n in sizes]
    try:
        budget = budgets.global_budget(floor)(shapes, sparsity)
    except ValueError as error:
        assert "`sparsity`" in str(error)
        assert sum(max(1, math.floor(share)) for share in shares) > total
        return
    assert budget.total == total
    assert sum(budget.floors) <= total
    for least, size, share in zip(budget.floors, sizes, shares, strict=True):
        assert 1 <= least <= size
        assert least == 1 or abs(least - math.floor(share)) <= (share.denominator > 1)


def test_floor_one_can_always_be_met_by_leaves_that_keep_something() -> None:
    rule = budgets.global_budget(1.0)
    assert rule(named(*[(3,)] * 10), 0.1) == budgets.Budget(27, (2,) * 10)


@given(hundreds=st.lists(st.integers(1, 50), min_size=1, max_size=5), percent=st.integers(0, 99))
def test_floor_one_is_uniform_where_nothing_is_rounded(hundreds, percent):
    shapes = named(*((n, 100) for n in hundreds))
    rule = budgets.global_budget(1.0)
    assert rule(shapes, percent / 100) == budgets.uniform(shapes, percent / 100)


def test_floor_zero_leaves_one_weight_in_each_leaf():
    assert budgets.global_budget(0.0)(named((10, 10), (20,)), 0.9) == budgets.Budget(12, (1, 1))


def test_default_floor_is_a_tenth_of_the_uniform_budget():
    assert budgets.global_budget()(named((10, 100), (50, 10)), 0.5) == budgets.Budget(750, (50, 25))


# ---- erdos_renyi, erdos_renyi_kernel


@ERDOS_RENYI
@given(shapes=MATRICES, sparsity=SPARSITIES)
def test_densities_are_those_of_the_papers(rule, shapes, sparsity):
    kernel = rule is budgets.erdos_renyi_kernel
    total = keep_count(sum(sizes_of(shapes)), sparsity)
    densities = erdos_renyi_densities(list(shapes.values()), sparsity, kernel)
    shares = [d * n for d, n in zip(densities, sizes_of(shapes), strict=True)]
    assume(min(shares) >= 1)
    assert rule(shapes, sparsity) == (total, tuple(largest_remainder(shares, total)))


@ERDOS_RENYI
@given(shapes=KNOWN, sparsity=SPARSITIES)
def test_erdos_renyi_is_exact_and_empties_no_leaf(rule, shapes, sparsity):
    sizes = sizes_of(shapes)
    total = keep_count(sum(sizes), sparsity)
    if total < len(shapes):
        with pytest.raises(ValueError, match="fewer than one for each of"):
            rule(shapes, sparsity)
        return
    budget = rule(shapes, sparsity)
    assert budget.total == sum(budget.floors) == total
    assert all(1 <= k <= n for k, n in zip(budget.floors, sizes, strict=True))


@ERDOS_RENYI
def test_leaves_at_one_weight_leave_the_others_in_proportion(rule):
    # Total 33, rates 200, 40, 2, 2: shares in proportion would be 27.05, 5.41, .27, .27.
    shapes = named((100, 100), (20, 20), (1, 1), (1, 1))
    assert rule(shapes, 1 - 33 / 10402) == (33, (26, 5, 1, 1))


@ERDOS_RENYI
def test_leaves_that_would_exceed_one_are_dense(rule):
    # With 5550 of 11100, the factor 5550 / 330 asks for 1850 of 1000 and 336 of 100.
    shapes = named((100, 100), (100, 10), (10, 10))
    assert rule(shapes, 0.5) == (5550, (4450, 1000, 100))


@given(channels=st.integers(2, 64), sparsity=st.floats(0.05, 0.95))
def test_a_small_kernel_is_denser_than_a_large_one(channels, sparsity):
    shapes = {"1x1": (1, 1, channels, channels), "3x3": (3, 3, channels, channels)}
    small, large = budgets.erdos_renyi_kernel(shapes, sparsity).floors
    assert small * 9 > large


def test_erdos_renyi_does_not_look_at_the_kernel():
    shapes = {"1x1": (1, 1, 30, 50), "3x3": (3, 3, 30, 50)}
    assert budgets.erdos_renyi(shapes, 0.9) == (1500, (150, 1350))
    assert budgets.erdos_renyi_kernel(shapes, 0.9) == (1500, (732, 768))


def test_vectors_have_one_input_in_erdos_renyi():
    wide = {"vector": (99,), "matrix": (100, 100)}
    flat = {"vector": (1, 99), "matrix": (100, 100)}
    assert budgets.erdos_renyi(wide, 0.99) == budgets.erdos_renyi(flat, 0.99) == (101, (34, 67))
    assert budgets.erdos_renyi_kernel(wide, 0.99) == (101, (33, 68))
    assert budgets.erdos_renyi(named((), (10, 10)), 0.9).floors[0] == 1
    assert budgets.erdos_renyi_kernel(named((), (10, 10)), 0.9).floors[0] == 1


LAYOUTS = {
    "linen": layouts.Layout(inputs=(2,), outputs=(3,), positions=(0, 1)),
    "oihw": layouts.Layout(inputs=(1,), outputs=(0,), positions=(2, 3)),
    "query": layouts.Layout(inputs=(0,), outputs=(1, 2)),
    "out": layouts.Layout(inputs=(0, 1), outputs=(2,)),
    "layers": layouts.Layout(inputs=(1,), outputs=(2,), copies=(0,)),
    "queries": layouts.Layout(inputs=(1,), outputs=(2, 3), copies=(0,)),
    "middle": layouts.Layout(inputs=(0,), outputs=(2,), copies=(1,)),
    "weight": layouts.Layout(inputs=(1,), outputs=(0,)),
}


def test_inputs_of_equinox_convolutions_are_no_window():
    # Taken for [..., in, out], the first would have the rate 512 * 1024 * (3 + 3).
    oihw, hwio = named((1024, 512, 3, 3), (512, 512)), named((3, 3, 512, 1024), (512, 512))
    for rule in (budgets.erdos_renyi, budgets.erdos_renyi_kernel):
        assert rule(oihw, 0.9) == rule(hwio, 0.9)
    # Rates 9 * (512 + 1024) and 512 + 512, of 498,074 weights.
    assert budgets.erdos_renyi(oihw, 0.9) == (498_074, (463_724, 34_350))


@ERDOS_RENYI
def test_layouts_that_would_be_guessed_are_an_error_with_both_ways_out(rule):
    shapes = {
        "attention": (64, 4, 16),
        "layers": (12, 64, 256),
        "experts": (12, 8, 64, 256),
        "volume": (3, 3, 3, 64, 64),
        "matrix": (64, 4),
    }
    with pytest.raises(ValueError) as error:
        rule(shapes, 0.5)
    first, *lines = str(error.value).splitlines()
    assert f"`{rule.__name__}` must know" in first
    assert "If a leaf is a stack of layers, name the axes that number them" in first
    assert '`stacked=jaxprune.stacks.under("layers")` or `stacked=found.stacked`. If it' in first
    assert f"`budget=budgets.by_layout(budgets.{rule.__name__}, found)`" in first
    assert "`found = jaxprune.layouts.find(function, params, *args)`" in first
    assert lines == [f"  {path}: shape {shapes[path]}" for path in list(shapes)[:-1]]


@ERDOS_RENYI
@pytest.mark.parametrize(
    "shape",
    [
        (8, 8, 16, 32),  # 8 layers of 8 experts
        (4, 64, 16, 16),  # 4 layers of attention
        (8, 4, 4, 4),
        (2, 2, 4, 4),
        (16, 16, 3, 768),
        (3, 5, 64, 64),
        (1, 12, 64, 64),
        (17, 17, 8, 8),
        (24, 3, 64, 64),
    ],
)
def test_shapes_that_may_be_stacks_are_no_convolutions(rule, shape):
    with pytest.raises(ValueError, match=f"Not known for:\n  0: shape {re.escape(str(shape))}$"):
        rule(named(shape, (8, 8)), 0.5)


@ERDOS_RENYI
@pytest.mark.parametrize(
    "shape",
    [
        *((side, side, 64, 128) for side in (1, 3, 5, 7, 9, 11, 13, 15)),
        *((1, 7, 64, 128), (7, 1, 64, 128)),  # Inception
        *((128, 64, 3, 3), (128, 64, 1, 1)),
        *((7, 7, 3, 64), (3, 3, 1, 64), (64, 1, 3, 3), (1, 1, 8, 8)),
    ],
)
def test_windows_of_known_networks_are_convolutions(rule, shape):
    window_first = shape if max(shape[:2]) < 16 else (*shape[2:], *shape[:2])
    known = budgets.by_layout(rule, {"0": layouts.Layout((2,), (3,), (0, 1))})
    wanted = known(named(window_first, (64, 96)), 0.8)
    assert rule(named(shape, (64, 96)), 0.8) == wanted


@pytest.mark.slow
@ERDOS_RENYI
def test_networks_of_this_library_and_others_need_no_layouts(rule):
    vgg = named((3, 3, 3, 64), (3, 3, 64, 64), (3, 3, 512, 512), (25088, 4096), (4096, 1000))
    mobile = named((3, 3, 3, 32), (3, 3, 1, 32), (1, 1, 32, 64), (5, 5, 1, 960), (1280, 1000))
    own = {path: shape for path, (shape, _) in resnet50().items()}
    resnets = [kernels(name) for name in ("resnet8", "resnet56", "resnet18", "resnet101")]
    for shapes in (vgg, mobile, own, *resnets):
        assert rule(shapes, 0.5).total == keep_count(sum(sizes_of(shapes)), 0.5)


def test_a_window_at_both_ends_matters_to_erdos_renyi_only():
    shapes = named((3, 3, 15, 15), (20, 30))
    budgets.erdos_renyi_kernel(shapes, 0.5)
    with pytest.raises(ValueError, match=r"Not known for:\n  0: shape \(3, 3, 15, 15\)$"):
        budgets.erdos_renyi(shapes, 0.5)
    assert budgets.erdos_renyi(named((5, 5, 5, 5), (20, 30)), 0.5).total == 612
    linen = {"0": LAYOUTS["linen"]}
    budget = budgets.by_layout(budgets.erdos_renyi, linen)(shapes, 0.5)
    # Rates 9 * (15 + 15) and 20 + 30, of 1312 weights.
    assert budget == (1312, (1107, 205))
    assert budgets.erdos_renyi(named((3, 3, 16, 16), (20, 30)), 0.5) == (1452, (1237, 215))


def test_layouts_multiply_several_inputs_or_outputs_into_one():
    shapes = {"query": (64, 4, 16), "out": (4, 16, 64), "weight": (64, 64)}
    for rule in (budgets.erdos_renyi, budgets.erdos_renyi_kernel):
        known = budgets.by_layout(rule, LAYOUTS)
        assert known(shapes, 0.75).floors == (1024, 1024, 1024)
    seen = {}

    def spy(shapes, sparsity):
        seen.update(shapes)
        return budgets.uniform(shapes, sparsity)

    shapes |= {"linen": (3, 3, 5, 7), "oihw": (7, 5, 3, 2), "table": (9, 4), "vector": (4,)}
    shapes |= {"layers[3]": (8, 6), "middle[0]": (8, 6)}
    shapes |= {"queries[11]": (64, 4, 16)}
    budgets.by_layout(spy, LAYOUTS)(shapes, 0.5)
    assert seen == {
        "query": (64, 64),
        "out": (64, 64),
        "weight": (64, 64),
        "linen": (3, 3, 5, 7),
        "oihw": (3, 2, 5, 7),
        "table": (9, 4),
        "vector": (4,),
        "layers[3]": (8, 6),
        "middle[0]": (8, 6),
        "queries[11]": (64, 64),
    }
    assert list(seen) == list(shapes)


def test_leaves_that_do_not_fit_their_layouts_are_all_named():
    shapes = {"layers": (12, 64, 256), "query": (64, 64), "other": (2, 3, 4), "weight": (3, 4)}
    with pytest.raises(ValueError, match="`layouts` must say") as error:
        budgets.by_layout(budgets.erdos_renyi_kernel, LAYOUTS)(shapes, 0.5)
    assert "`stacked=found.stacked`" in str(error.value)
    assert "`found = jaxprune.layouts.find(function, params, *args)`" in str(error.value)
    assert str(error.value).splitlines()[1:] == [
        "  layers: shape (12, 64, 256), but one copy has 2 dimensions, and axes (0,) of the leaf "
        "number copies",
        "  query: shape (64, 64), but one copy has 3 dimensions",
        "  other: shape (2, 3, 4), no layout was found: not in `layouts`",
    ]


@given(
    sides=st.tuples(*[st.integers(1, 6)] * 2),
    ins=st.lists(st.integers(2, 5), min_size=1, max_size=2),
    outs=st.lists(st.integers(2, 5), min_size=1, max_size=2),
    order=st.permutations(range(6)),
    sparsity=st.floats(0, 0.8),
)
def test_the_order_of_the_axes_does_not_matter(sides, ins, outs, order, sparsity):
    parts = [*((n, "positions") for n in sides), *((n, "inputs") for n in ins)]
    parts += [(n, "outputs") for n in outs]
    stored = [parts[i] for i in order if i < len(parts)]
    axes = {
        name: tuple(axis for axis, (_, part) in enumerate(stored) if part == name)
        for name in ("positions", "inputs", "outputs")
    }
    shapes = {"kernel": tuple(size for size, _ in stored), "other": (7, 9)}
    plain = {"kernel": (*sides, math.prod(ins), math.prod(outs)), "other": (7, 9)}
    last = {"kernel": layouts.Layout((2,), (3,), (0, 1))}
    for rule in (budgets.erdos_renyi, budgets.erdos_renyi_kernel):
        known = budgets.by_layout(rule, {"kernel": layouts.Layout(**axes)})
        assert known(shapes, sparsity) == budgets.by_layout(rule, last)(plain, sparsity)


def kernels(name):
    """Shapes of the kernels of a model of this library."""
    model = nnx.eval_shape(lambda: getattr(models, name)(num_classes=10, rngs=nnx.Rngs(0)))
    leaves = trees.leaf_by_path(nnx.state(model, nnx.Param))
    return {path: leaf.shape for path, leaf in leaves.items() if path.endswith("kernel")}


def resnet50():
    """Shape and number of output positions of each layer; 3x3 convolutions have the strides."""
    layers, wide, side = {"stem": ((7, 7, 3, 64), 112**2)}, 64, 56
    for stage, (depth, width) in enumerate([(3, 64), (4, 128), (6, 256), (3, 512)]):
        for block in range(depth):
            name, before = f"{stage}/{block}", side
            side //= 2 if stage and not block else 1
            layers[f"{name}/conv1"] = ((1, 1, wide, width), before**2)
            layers[f"{name}/conv2"] = ((3, 3, width, width), side**2)
            layers[f"{name}/conv3"] = ((1, 1, width, 4 * width), side**2)
            if not block:
                layers[f"{name}/projection"] = ((1, 1, wide, 4 * width), side**2)
            wide = 4 * width
    return layers | {"classifier": ((wide, 1000), 1)}


def test_flops_of_resnet50_are_those_published_for_rigl():
    # Relative FLOPs at inference: .42 with the kernel distribution, .23 uniform, stem dense.
    layers = resnet50()
    shapes = {path: shape for path, (shape, _) in layers.items()}
    dense = sum(math.prod(shape) * places for shape, places in layers.values())
    assert sum(sizes_of(shapes)) == 25_502_912

    def relative(budget):
        places = [places for _, places in layers.values()]
        return sum(k * n for k, n in zip(budget.floors, places, strict=True)) / dense

    assert relative(budgets.erdos_renyi_kernel(shapes, 0.8)) == pytest.approx(0.42, abs=0.01)
    stem_dense = budgets.Budget(
        0, (math.prod(shapes["stem"]), *budgets.uniform(shapes, 0.8).floors[1:])
    )
    assert relative(stem_dense) == pytest.approx(0.23, abs=0.01)


# Overall density and share of the MACs -> what AMC keeps of each layer of a ResNet-50 after each of
# its four rounds, in ten-thousandths and in the order of `resnet50()`. From the plotting code of
# Renda et al., github.com/lottery-ticket/rewinding-iclr20-public.
AMC = {
    (0.5, 0.4826): """
        5935 5254 4623 5411 4955 5093 3844 5102 4505 5235 5577 5063 4853 5435 4784 5181 4578 4427
        4569 4353 4926 4574 4662 4784 4564 4559 4843 4990 5063 3917 4887 4476 4015 4456 4608 4583
        4192 5817 4172 5049 4936 4818 4476 4848 5151 5524 5612 5083 4554 5538 5817 5073 5724 4911
    """,
    (0.325, 0.333): """
        4053 3604 3240 3779 3442 3532 2741 3640 3154 3653 3748 3464 3262 3694 3312 3572 3110 3101
        3253 3024 3420 3199 3226 3276 3195 3096 3352 3424 3581 2737 3456 3195 2858 3159 3325 3213
        2957 4165 2853 3572 3487 3361 3118 3456 3195 3730 4183 3011 2808 3945 4278 3136 4121 1622
    """,
    (0.24375, 0.2888): """
        4073 3742 3353 3928 3208 3663 2849 3786 3253 2691 3886 3597 2577 3828 3437 3698 2488 3208
        3376 2428 3546 3318 2344 3399 3320 2025 3469 3052 3714 2011 3586 3318 1983 3278 3446 1955
        3066 3765 1973 3667 3604 1959 3229 3336 1729 1873 3975 1589 1561 2689 4431 1556 3397 1258
    """,
    (0.195, 0.2445): """
        4013 3512 3246 3347 2782 3549 2420 3136 3209 2250 3072 3347 2204 3600 3099 3310 2029 3081
        3264 1988 3076 3113 1924 3067 2782 1726 2961 2401 2925 1667 2883 2755 1653 2828 2677 1634
        2750 2617 1630 2681 2580 1630 2585 2337 1520 1579 2851 1405 1345 2103 3292 1364 2544 895
    """,
}


@pytest.mark.parametrize(("density", "macs"), AMC)
def test_densities_of_resnet50_are_those_of_amc(density, macs):
    layers = resnet50()
    keeps = [int(keep) / 10_000 for keep in AMC[density, macs].split()]
    sizes = [math.prod(shape) for shape, _ in layers.values()]
    own = {path: 1 - keep for path, keep in zip(layers, keeps, strict=True)}
    sparsity = sum(s * n for s, n in zip(own.values(), sizes, strict=True)) / sum(sizes)
    shapes = {path: shape for path, (shape, _) in layers.items()}
    total, kept = budgets.custom(own)(shapes, sparsity)
    assert total / sum(sizes) == pytest.approx(density, abs=1e-5)
    places = [places for _, places in layers.values()]
    dense = sum(n * p for n, p in zip(sizes, places, strict=True))
    sparse = sum(k * p for k, p in zip(kept, places, strict=True))
    assert sparse / dense == pytest.approx(macs, abs=1e-4)


# ---- custom


@given(shapes=SHAPES, own=OWN, sparsity=SPARSITIES)
def test_custom_is_water_filling(shapes, own, sparsity):
    own = {path: value for path, value in own.items() if path in shapes}
    assume(len(own) < len(shapes))
    sizes = sizes_of(shapes)
    most = [
        n - keep_count(n, own[path]) if path in own else n - 1
        for path, n in zip(shapes, sizes, strict=True)
    ]
    total = keep_count(sum(sizes), sparsity)
    pruned = sum(sizes) - total
    if pruned > sum(most):
        with pytest.raises(ValueError, match="cannot be reached"):
            budgets.custom(own)(shapes, sparsity)
        return
    gone = largest_remainder(water_levels(sizes, most, pruned), pruned)
    floors = tuple(n - k for n, k in zip(sizes, gone, strict=True))
    assert budgets.custom(own)(shapes, sparsity) == (total, floors)


def test_leaves_follow_the_ramp_until_their_own_sparsity():
    rule = budgets.custom({"dense": 0.0, "half": 0.5})
    shapes = {"half": (10, 10), "dense": (100,), "rest": (2, 50)}
    table = {0.0: (100, 100), 0.2: (70, 70), 0.3: (55, 55), 0.4: (50, 30), 0.49: (50, 3)}
    for sparsity, (half, rest) in table.items():
        assert rule(shapes, sparsity) == (half + 100 + rest, (half, 100, rest))


@given(shapes=SHAPES, values=st.lists(st.floats(0, 0.99), min_size=6, max_size=6))
def test_the_mean_of_all_own_sparsities_can_be_reached(shapes, values):
    own = dict(zip(shapes, values, strict=False))
    sizes = sizes_of(shapes)
    floors = tuple(keep_count(n, v) for n, v in zip(sizes, own.values(), strict=True))
    mean = sum(n * v for n, v in zip(sizes, own.values(), strict=True)) / sum(sizes)
    slack = 0.49 * len(sizes) / sum(sizes)
    for sparsity in (mean, mean + slack, max(mean - slack, 0.0)):
        if sparsity < 1 and keep_count(sum(sizes), sparsity) < sum(sizes):
            assert budgets.custom(own)(shapes, sparsity) == (sum(floors), floors)
    assert budgets.custom(own)(shapes, 0.0).floors == tuple(sizes)


def test_named_leaves_share_a_lower_sparsity_exactly():
    rule = budgets.custom({"0": 0.1, "1": 0.9})
    assert rule(named((100,), (100,)), 0.3) == (140, (90, 50))


def test_custom_keeps_its_own_copy_of_the_sparsities():
    own = {"0": 0.5}
    rule = budgets.custom(own)
    own["0"] = 0.0
    assert rule(named((10,), (10,)), 0.5) == (10, (5, 5))


# ---- laws of all rules


@pytest.mark.parametrize("name", ["uniform", "er", "erk", "custom"])
@given(shapes=KNOWN, own=OWN, low=SPARSITIES, high=SPARSITIES)
def test_floors_fall_with_sparsity_up_to_one_weight(name, shapes, own, low, high):
    rule = {
        "uniform": budgets.uniform,
        "er": budgets.erdos_renyi,
        "erk": budgets.erdos_renyi_kernel,
        "custom": budgets.custom({path: own[path] for path in own if path in shapes}),
    }[name]
    try:
        more, less = (rule(shapes, sparsity) for sparsity in sorted((low, high)))
    except ValueError:  # which sparsities are refused is tested above
        assume(False)
    assert more.total >= less.total
    assert all(a + 1 >= b for a, b in zip(more.floors, less.floors, strict=True))


@ERDOS_RENYI
def test_sparsity_zero_keeps_everything(rule):
    assert rule(named((3, 5), (4,)), 0.0) == (19, (15, 4))


def test_sparsity_zero_keeps_everything_even_near_the_mean_of_all_own():
    # The mean is .45, within half a weight of 0 for each of these tiny leaves.
    own = {str(i): 0.9 if i == 0 else 0.4 for i in range(10)}
    assert budgets.custom(own)(named(*[(1,)] * 10), 0.0) == (10, (1,) * 10)


@ERDOS_RENYI
def test_equal_remainders_go_to_the_earlier_leaf(rule):
    assert rule(named((3,), (3,)), 0.5) == (3, (2, 1))
    assert budgets.custom({})(named((3,), (3,)), 0.5) == (3, (1, 2))  # pruned: (2, 1)


@pytest.mark.parametrize(
    "rule",
    [
        budgets.uniform,
        budgets.global_budget(),
        budgets.erdos_renyi,
        budgets.erdos_renyi_kernel,
        budgets.custom({}),
    ],
    ids=["uniform", "global", "er", "erk", "custom"],
)
def test_no_leaves_need_no_weights(rule):
    assert rule({}, 0.5) == (0, ())


# ---- errors


@pytest.mark.parametrize("floor", [-0.1, 1.1, float("nan")])
def test_floor_must_be_a_share(floor):
    with pytest.raises(ValueError, match=r"`floor` must lie in \[0, 1\], but is"):
        budgets.global_budget(floor)


def test_a_budget_that_cannot_be_met_says_what_to_do():
    with pytest.raises(ValueError) as error:
        budgets.global_budget(0.0)({"b": (4,), "a": (3,), "c": (4,)}, 0.9)
    assert str(error.value) == (
        "`sparsity` 0.9 keeps 1 of 11 weights, fewer than the 3 that the floors of 3 leaves "
        "need. Lower `sparsity` or `floor`, or exclude small leaves with `prunable`. The smallest "
        "are:\n  a: size 3\n  b: size 4\n  c: size 4"
    )


@ERDOS_RENYI
def test_erdos_renyi_names_the_smallest_leaves(rule):
    with pytest.raises(ValueError) as error:
        rule({"b": (4, 4), "a": (2, 2)}, 0.95)
    assert str(error.value) == (
        "`sparsity` 0.95 keeps 1 of 20 weights, fewer than one for each of 2 leaves. Lower "
        "`sparsity`, or exclude small leaves with `prunable`. The smallest are:\n"
        "  a: size 4\n  b: size 16"
    )


def test_errors_name_eight_leaves_at_most():
    with pytest.raises(ValueError) as error:
        budgets.erdos_renyi(named(*[(2, 2)] * 20), 0.9)
    lines = str(error.value).splitlines()
    assert lines[1:] == [f"  {i}: size 4" for i in range(8)]


def test_own_sparsities_must_lie_in_the_unit_interval():
    own = {"a": 1.0, "b": 0.5, "c": -0.1, "d": float("nan")}
    with pytest.raises(ValueError) as error:
        budgets.custom(own)
    assert str(error.value) == (
        "`sparsities` must have one number in [0, 1) for each name; change these:\n"
        "  a: 1.0\n  c: -0.1\n  d: nan"
    )


def test_unknown_paths_are_named_with_the_closest_ones():
    rule = budgets.custom({"conv/kernl": 0.5, "head/kernel": 0.1, "dens/kernel": 0.5})
    shapes = {"conv/kernel": (3, 3), "dense/kernel": (3, 3), "head/kernel": (3, 3)}
    with pytest.raises(ValueError) as error:
        rule(shapes, 0.5)
    assert str(error.value) == (
        "`sparsities` must name leaves by their paths, by parts of these or by wildcards; change "
        "these:\n"
        "  conv/kernl: did you mean conv/kernel?\n  dens/kernel: did you mean dense/kernel?"
    )
    with pytest.raises(ValueError, match="change these:\n  conv/kernl\n"):
        rule({}, 0.5)


def test_a_sparsity_beyond_the_own_ones_says_how_far_it_goes():
    rule = budgets.custom({"a": 0.75, "b": 0.9})
    shapes = {"a": (10, 10), "b": (10, 10)}
    with pytest.raises(ValueError) as error:
        rule(shapes, 0.95)
    assert str(error.value) == (
        "`sparsity` 0.95 cannot be reached: with these limits of single leaves it is at most "
        "0.825. Lower `sparsity`, raise limits, or remove leaves from `sparsities`:\n"
        "  a: 0.75 of 100 weights\n  b: 0.9 of 100 weights"
    )
    assert rule(shapes, 0.825).total == 35


def test_the_highest_sparsity_of_the_error_is_rounded_down():
    rule, shapes = budgets.custom({"a": 0.0}), {"a": (20_000,), "b": (10_001,)}
    with pytest.raises(ValueError, match=r"at most 0\.3333\. "):  # 10000 / 30001 is .33332
        rule(shapes, 0.5)
    assert rule(shapes, 0.3333).floors == (20_000, 2)


@given(shapes=SHAPES, own=OWN)
def test_the_highest_sparsity_of_the_error_can_be_used(shapes, own):
    rule = budgets.custom({path: own[path] for path in own if path in shapes})
    try:
        rule(shapes, 0.999999)
    except ValueError as error:
        highest = float(str(error).split("at most ")[1].split()[0].rstrip("."))
        assert rule(shapes, highest).total <= sum(sizes_of(shapes))


# ---- a dict of sparsities by name


SHAPES = {
    "layer1/kernel": (20, 30),
    "layer2/kernel": (30, 30),
    "layer2/norm/w": (4, 10),
    "head": (30, 7),
}


@pytest.mark.parametrize(
    ("own", "sparsities"),
    [
        ({"layer1": 0.98, "layer2": 0.9}, [0.98, 0.9, 0.9, 0.6]),
        ({"layer1": 0.98, "*": 0}, [0.98, 0, 0, 0]),
        ({"layer?": 0.7, "layer2/kernel": 0.5, "layer2/norm": 0.1}, [0.7, 0.5, 0.1, 0.6]),
        ({"kernel": 0.29, "head": 0}, [0.29, 0.29, 0.6, 0]),
        ({"*/kernel": 0.3}, [0.3, 0.3, 0.6, 0.6]),
    ],
)
@pytest.mark.parametrize("share", [0, Fraction(1, 6), Fraction(1, 2), 1])
def test_a_dict_gives_each_leaf_its_sparsity_and_all_rise_together(own, sparsities, share):
    rule = budgets.rule_of(own, 0.6, list(SHAPES))
    sizes = [math.prod(shape) for shape in SHAPES.values()]
    exact = [Fraction(str(own)) * share for own in sparsities]
    floors = tuple(
        max(1, size - math.floor(size * part + Fraction(1, 2)))
        for size, part in zip(sizes, exact, strict=True)
    )
    assert rule(SHAPES, float(Fraction("0.6") * share)) == (sum(floors), floors)


def test_the_name_of_a_stack_means_its_copies_and_one_of_them_may_differ():
    paths = [f"layers/kernel[{i}]" for i in range(3)]
    shapes = dict.fromkeys(paths, (10, 10))
    rule = budgets.rule_of({"layers": 0.5, "layers/kernel[1]": 0.9}, 0.5, paths)
    assert rule(shapes, 0.5).floors == (50, 10, 50)


@pytest.mark.parametrize(
    ("own", "final", "message"),
    [
        (
            {"layer1": 1.0},
            0.5,
            "`budget` must have one number in [0, 1) for each name; change these:\n  layer1: 1.0",
        ),
        ({"layer1": True}, 0.5, "change these:\n  layer1: True"),
        ({"layer1": "90%"}, 0.5, "change these:\n  layer1: '90%'"),
        ({"layr1": 0.5}, 0.5, "change these:\n  layr1: did you mean layer1?"),
        ({"layer1": 0.5}, 0.0, "`sparsity` must be above 0 if `budget` is a dict"),
        ({"laye?1": 0.5, "lay?r1": 0.1}, 0.5, "for one of them:\n  layer1/"),
    ],
)
def test_a_dict_that_says_nothing_clear_is_refused(own, final, message):
    with pytest.raises(ValueError) as error:
        budgets.rule_of(own, final, list(SHAPES))
    assert message in str(error.value)


def test_a_rule_that_returns_no_budget_is_named():
    rule = budgets.rule_of(lambda shapes, sparsity: sparsity, 0.5, list(SHAPES))
    with pytest.raises(ValueError, match="must return a `Budget` with a floor for each of 4"):
        rule(SHAPES, 0.5)


# ---- sparsities by name on top of a rule


@pytest.mark.parametrize("share", [0.5, 1])
def test_a_rule_divides_what_is_not_named(share):
    budget = budgets.named({"layer2/norm": 0.1, "head": 0.5}, budgets.erdos_renyi_kernel)
    rest = {path: SHAPES[path] for path in ("layer1/kernel", "layer2/kernel")}
    rule = budgets.rule_of(budget, 0.8, list(SHAPES))
    wanted = dict(zip(rest, budgets.erdos_renyi_kernel(rest, 0.8 * share).floors, strict=True))
    wanted |= {"layer2/norm/w": 40 - round(4 * share), "head": 210 - math.floor(105 * share + 0.5)}
    floors = tuple(wanted[path] for path in SHAPES)
    assert rule(SHAPES, 0.8 * share) == (sum(floors), floors)


def test_a_rule_beside_names_must_fix_each_leaf():
    with pytest.raises(ValueError, match="`others` must be a function"):
        budgets.named({"head": 0.5}, budgets.global_budget)
    with pytest.raises(ValueError, match="`sparsities` must have one number"):
        budgets.named({"head": 1.5}, budgets.uniform)
    budget = budgets.named({"head": 0.5}, budgets.global_budget(0.1))
    with pytest.raises(ValueError, match="`others` must fix the number of weights of each leaf"):
        budgets.rule_of(budget, 0.8, list(SHAPES))(SHAPES, 0.8)


# ---- many sparsities at once

RULES = {
    "uniform": budgets.uniform,
    "global": budgets.global_budget(0.3),
    "pure global": budgets.global_budget(0.0),
    "erdos_renyi": budgets.erdos_renyi,
    "erdos_renyi_kernel": budgets.erdos_renyi_kernel,
    "by_layout": budgets.by_layout(budgets.erdos_renyi_kernel, {}),
    "custom": budgets.custom({"0": 0.2}),
    "custom, all": budgets.custom({"0": 0.6, "*": 0.8}),
    "named": budgets.rule_of({"0": 0.3}, 0.98, ["0"]),
    "named, uniform": budgets.rule_of(budgets.named({"0": 0.7}, budgets.uniform), 0.98, ["0"]),
}
ROUND = st.integers(0, 200).map(lambda i: i / 200)  # many halves


@pytest.mark.parametrize("rule", RULES)
@given(shapes=st.lists(MATRIX, min_size=1, max_size=6), values=st.lists(SPARSITIES | ROUND))
def test_all_budgets_at_once_are_those_of_one_sparsity(rule, shapes, values):
    shapes = {str(i): shape for i, shape in enumerate(shapes)}

    def of_one(sparsity):
        try:
            return RULES[rule](shapes, sparsity)
        except ValueError:
            return None

    found = {value: of_one(value) for value in values if value < 1}
    fine = [value for value, budget in found.items() if budget is not None]
    totals, floors = budgets.at_all(RULES[rule], shapes, [*fine, *fine])
    expected = [found[value] for value in [*fine, *fine]]
    assert totals.tolist() == [budget.total for budget in expected]
    assert [tuple(row) for row in floors.tolist()] == [budget.floors for budget in expected]
    for value in set(found) - set(fine):
        with pytest.raises(ValueError, match="`sparsity`"):
            budgets.at_all(RULES[rule], shapes, [*fine, value])


@pytest.mark.parametrize("rule", ["uniform", "erdos_renyi", "erdos_renyi_kernel"])
def test_all_budgets_at_once_are_exact_at_any_size(rule):
    # 2e15 weights, whose products with rates need more than 64 bits, and whose tenths 54.
    shapes = {"a": (10**7, 10**8 + 1), "b": (3, 10**4 + 1), "c": (10**6 + 3, 10**9)}
    sparsities = [0.0, 0.1, 0.29, 0.5, 0.875, 0.9999]
    sizes = sizes_of(shapes)

    def reference(sparsity):
        if rule == "uniform":
            return [keep_count(size, sparsity) for size in sizes]
        kernel = rule == "erdos_renyi_kernel"
        densities = erdos_renyi_densities(list(shapes.values()), sparsity, kernel)
        shares = [density * size for density, size in zip(densities, sizes, strict=True)]
        return largest_remainder(shares, keep_count(sum(sizes), sparsity))

    totals, floors = budgets.at_all(RULES[rule], shapes, sparsities)
    expected = [reference(sparsity) for sparsity in sparsities]
    assert totals.tolist() == [sum(own) for own in expected]
    assert floors.tolist() == expected
    assert [list(RULES[rule](shapes, s).floors) for s in sparsities] == expected
