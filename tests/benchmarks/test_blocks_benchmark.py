"""The benchmark of blocks: every way to compute a compact convolution against NumPy."""

import json
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import models, structure
from tests.support import benchmarks

# (size, stride, pixels, inputs, outputs), block, kept blocks of inputs; one number of outputs is
# not a multiple of anything, and images are smaller than the kernel or odd where the stride is 2.
SHAPES = {
    "blocks": ((3, 1, 5, 6, 8), (2, 4), 2),
    "stride 2, odd": ((3, 2, 7, 8, 6), (2, 3), 3),
    "one pixel": ((3, 2, 1, 4, 6), (2, 2), 1),
    "1x1": ((1, 1, 3, 9, 4), (3, 2), 2),
    "1x1, stride 2": ((1, 2, 5, 6, 10), (3, 5), 1),
    "7x7": ((7, 2, 9, 4, 4), (2, 2), 1),
    "fan-in": ((3, 1, 4, 5, 7), (1, 1), 2),
    "one block of outputs": ((3, 1, 4, 6, 5), (1, 5), 2),
    "everything": ((3, 1, 4, 5, 4), (5, 4), 1),
    "2:4": ((3, 1, 4, 8, 5), None, (2, 4)),
    "1:4, stride 2": ((3, 2, 6, 4, 3), None, (1, 4)),
}
WAYS = {"in place", "unrolled", "grouped", "patches"}


@pytest.fixture(scope="module")
def blocks():
    """The benchmark as a module, with thin blocks allowed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmarks.load("compact_convolutions"), "MIN_WIDTH", 1)
        yield benchmarks.load("blocks")


def build(blocks, shape, block, kept):
    """A case, a mask and its pattern."""
    layer = blocks.Layer(*shape, first=False)
    mask = blocks.n_m_mask(layer, *kept) if block is None else blocks.block_mask(layer, block, kept)
    return (
        blocks.case_of(layer, 2, "float32"),
        mask,
        blocks.pattern_of(mask, block or (1, 1), block is not None),
    )


def masked_step(blocks, case):
    """The reference of the benchmark as a function of the mask."""
    return partial(jax.jit(partial(blocks.masked_step, case.layer)), *case[1:])


def convolution(layer, x, kernel, cotangent):
    """Output and gradients in double precision, one position of the kernel at a time."""
    x, kernel, cotangent = (np.asarray(array, np.float64) for array in (x, kernel, cotangent))
    edge = layer.size // 2
    padded = np.pad(x, ((0, 0), (edge, edge), (edge, edge), (0, 0)))
    y, gradient, by_kernel = np.zeros(cotangent.shape), np.zeros(padded.shape), 0 * kernel
    height, width = cotangent.shape[1:3]
    for i in range(layer.size):
        for j in range(layer.size):
            rows = slice(i, i + height * layer.stride, layer.stride)
            columns = slice(j, j + width * layer.stride, layer.stride)
            seen = padded[:, rows, columns]
            y += seen @ kernel[i, j]
            gradient[:, rows, columns] += cotangent @ kernel[i, j].T
            by_kernel[i, j] = np.einsum("bhwi,bhwo->io", seen, cotangent)
    pixels = slice(edge, edge + layer.pixels)
    return y, gradient[:, pixels, pixels], by_kernel


def run_all(blocks, case, pattern, wrong=None):
    """Pass -> way -> result, with the weights of the pattern in the places of the wrong one."""
    kept = jnp.asarray(blocks.gather(case.kernel, pattern))
    ways = blocks.ways_of(case.layer, len(case.x), pattern, kept.shape[-1], ())
    used = jax.tree.map(jnp.asarray, wrong or pattern)

    @jax.jit
    def run(x, kept, cotangent, used):
        return {
            which: {name: way(x, kept, cotangent, used) for name, way in own.items()}
            for which, own in ways.items()
        }

    return run(case.x, kept, case.cotangent, used)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_every_way_is_the_masked_convolution(blocks, name):
    case, mask, pattern = build(blocks, *SHAPES[name])
    masked = convolution(case.layer, case.x, case.kernel * mask, case.cotangent)
    masked = *masked[:2], masked[2] * mask
    for actual, right in zip(masked_step(blocks, case)(mask), masked, strict=True):
        np.testing.assert_allclose(actual, right, rtol=1e-4, atol=1e-4)
    y, input_gradient, kernel_gradient = masked
    expected = y, input_gradient, blocks.gather(kernel_gradient, pattern)
    results = run_all(blocks, case, pattern)
    for which, right in zip(blocks.PASSES, expected, strict=True):
        for way, actual in results[which].items():
            message = f"{which}, {way}"
            np.testing.assert_allclose(actual, right, rtol=1e-4, atol=1e-4, err_msg=message)
    # And none was left out.
    several = 1 < len(pattern.inputs)
    wanted = {"in place", "patches"}
    if pattern.readers is not None and name != "everything":
        wanted |= {"unrolled"} | ({"grouped"} if several else set())
    assert set(results["forward"]) == set(results["kernel gradient"]) == wanted
    turned = {"turned"} if pattern.readers is not None and len(pattern.readers) > 1 else set()
    assert set(results["input gradient"]) == wanted | turned


@pytest.mark.slow
@pytest.mark.parametrize("name", ["blocks", "1x1", "fan-in", "2:4"])
def test_one_wrong_index_is_noticed(blocks, name):
    case, mask, pattern = build(blocks, *SHAPES[name])
    y, input_gradient, kernel_gradient = masked_step(blocks, case)(mask)
    right = y, input_gradient, blocks.gather(kernel_gradient, pattern)

    def wrong(field):
        """The last block of outputs reads a channel that it should not; or a reader is another."""
        array = np.array(getattr(pattern, field))
        at = (-1, ..., -1) if field == "inputs" else (-1, 0)
        limit = {"inputs": case.layer.inputs, "readers": len(pattern.inputs), "places": 2}[field]
        array[at] = (array[at] + 1) % limit
        return pattern._replace(**{field: array})

    fields = ["inputs"] + ["readers", "places"] * (pattern.readers is not None)
    for field in fields:
        results = run_all(blocks, case, pattern, wrong(field))
        for which, expected in zip(blocks.PASSES, right, strict=True):
            for way, actual in results[which].items():
                if (way == "turned") == (field != "inputs"):
                    with pytest.raises(AssertionError, match=f"{way}: off by"):
                        blocks.check(way, actual, expected)
                else:
                    blocks.check(way, actual, expected)


def test_the_benchmark_stops_at_a_wrong_index(blocks, monkeypatch):
    case, mask, pattern = build(blocks, *SHAPES["blocks"])
    reference = masked_step(blocks, case)
    attempt = partial(blocks.patterned, case, reference, "arm", [None], mask, (2, 4))
    program = attempt(among={"forward": ["unrolled"], "input gradient": ["turned"],
                             "kernel gradient": ["patches"]})  # fmt: skip
    assert [list(own) for own in program.tried.values()] == [["unrolled"], ["turned"], ["patches"]]
    assert program.density == 2 / 3
    for actual, right in zip(program.run()[:2], reference(mask)[:2], strict=True):
        np.testing.assert_allclose(actual, right, rtol=1e-4, atol=1e-4)

    wrong = pattern._replace(inputs=(pattern.inputs + 1) % 6)
    monkeypatch.setattr(blocks, "pattern_of", lambda *args, **options: wrong)
    with pytest.raises(AssertionError, match="in place: off by"):
        attempt()


def test_blocks_are_dealt_out_evenly(blocks):
    compact_convolutions = benchmarks.load("compact_convolutions")
    for rows, columns, kept in [(4, 8, 2), (9, 4, 4), (5, 7, 3), (3, 1, 1), (2, 5, 2)]:
        mask = compact_convolutions.deal(rows, columns, kept, np.random.default_rng(1))
        assert (mask.sum(0) == kept).all() and np.ptp(mask.sum(1)) <= 1


def test_densities_and_the_nearest_that_a_shape_allows(blocks):
    assert blocks.kept_for([0.28, 0.5, 0.14], 4) == {1: [0.28, 0.14], 2: [0.5]}
    assert blocks.kept_for([0.28, 0.5, 0.14], 32) == {9: [0.28], 16: [0.5], 4: [0.14]}
    tried = {"forward": {"a": 1.0, "b": 2.0, "c": 2.1}}
    assert blocks.within(tried, 2) == {"forward": ["a", "b"]}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("resnet20", 32), ("resnet50", 64)])
def test_the_layers_are_those_of_the_network(blocks, name, size):
    layers = blocks.layers_of(name, size)
    assert sum(layer.first for layer in layers) == 1
    model = blocks.nnx.eval_shape(lambda: getattr(models, name)(rngs=blocks.nnx.Rngs(0)))
    graphdef, state = blocks.nnx.split(model)
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    macs = structure.count_macs(lambda s, x: blocks.nnx.merge(graphdef, s)(x), state, image)
    head = model.head.in_features * model.head.out_features
    assert sum(count * blocks.macs_of(layer) for layer, count in layers.items()) == macs - head


def test_totals_weigh_each_shape_by_how_often_it_occurs(blocks):
    first, second = (blocks.Layer(1, 1, 1, width, 1, False) for width in (1, 3))

    def record(arm, ms, ratio, density, asked=None):
        return {"arm": arm, "asked": [asked], "ms": ms, "time / dense": ratio,
                "MACs / dense": density}  # fmt: skip

    rows = blocks.totals(
        {first: 3, second: 1},
        {
            first: [record("dense", 2.0, 1.0, 1.0), record("half", 1.0, 0.5, 0.25, 0.3)],
            second: [record("dense", 4.0, 1.0, 1.0)],
        },
    )
    assert rows[0] == {"all layers": "dense", "asked": None, "layers": 4, "MACs / dense": 1.0,
                       "time / dense": 1.0}  # fmt: skip
    # 3 x 2 ms at a half and 4 ms dense; 3 MACs at a quarter and 3 dense.
    assert rows[1] == {"all layers": "half", "asked": 0.3, "layers": 3, "MACs / dense": 0.625,
                       "time / dense": pytest.approx(0.7)}  # fmt: skip


@pytest.mark.scripts
def test_the_benchmark_runs(blocks, monkeypatch, tmp_path, capsys):
    path = tmp_path / "record.json"
    monkeypatch.setattr(sys, "argv", ["blocks.py", "--quick", "--json", str(path)])
    blocks.main()
    record = json.loads(path.read_text())
    arms = {(own["layer"], own["arm"], *own["asked"]): own for own in record["layers"]}
    layer = "3x3, 16 to 16, 6 px"
    narrow, kept = arms[layer, "narrow", 0.28], arms[layer, "blocks 4x8", 0.28]
    assert narrow["MACs / dense"] == kept["MACs / dense"] == arms[layer, "1:4", 0.28][
        "MACs / dense"
    ] == 0.25  # fmt: skip
    assert arms[layer, "2:4", 0.5]["MACs / dense"] == 0.5
    assert set(kept["tried_ms"]["forward"]) == WAYS
    assert set(kept["tried_ms"]["input gradient"]) == WAYS | {"turned"}
    assert all(own["time / dense"] > 0 for own in record["layers"] + record["totals"])
    assert arms[layer, "dense", None]["count"] == 2
    assert f"| {layer} | blocks 4x8 | 0.25 |" in capsys.readouterr().out
