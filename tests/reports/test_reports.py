"""Counts against NumPy, bytes against the files, errors that name every leaf, plots that open."""

import io
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

import jaxprune
from jaxprune import reports, storage
from jaxprune.reports import _plots

SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, max_side=5)
MASKS = st.lists(SHAPES.flatmap(lambda shape: hnp.arrays(bool, shape)), min_size=1, max_size=5)


def _network(seed: int = 0):
    """Parameters with no zeros and masks that keep about half of the kernel."""
    rng = np.random.default_rng(seed)
    kernel, bias = rng.normal(size=(3, 3, 8, 16)), rng.normal(size=16)
    params = {"conv": {"kernel": np.float32(kernel), "bias": np.float32(bias)}}
    masks = {"conv": {"kernel": kernel > 0, "bias": np.ones(16, bool)}}
    return params, masks


# ---- summarize


@given(masks=MASKS)
def test_counts_are_those_of_numpy(masks):
    params = [np.where(mask, 2.5, 0).astype(np.float32) for mask in masks]
    by_value, by_mask = reports.summarize(params), reports.summarize(params, masks)
    assert [row[:5] for row in by_value.rows] == [row[:5] for row in by_mask.rows]
    assert [row.kept for row in by_mask.rows] == [int(mask.sum()) for mask in masks]
    assert by_mask.total.masked_nonzeros == 0
    assert by_value.total.kept is None
    assert [row.parameters for row in by_mask.rows] == [mask.size for mask in masks]
    assert [row.nonzeros for row in by_mask.rows] == [int(mask.sum()) for mask in masks]
    assert [row.bytes for row in by_mask.rows] == [4 * mask.size for mask in masks]
    assert [row.shape for row in by_mask.rows] == [mask.shape for mask in masks]
    total = by_mask.total
    assert total.nonzeros == sum(int(mask.sum()) for mask in masks)
    assert total.sparsity == pytest.approx(1 - total.nonzeros / total.parameters)
    assert total.sparsity + total.density == 1


def test_zeros_are_counted_beside_masks():
    """An average of the parameters is dense, whatever the masks say: no 89.9 % for it."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(100, 100)).astype(np.float32)
    mask = np.zeros(10_000, bool)
    mask[rng.choice(10_000, 1_010, replace=False)] = True
    mask = mask.reshape(100, 100)
    dense = reports.summarize({"kernel": kernel}, {"kernel": mask})
    assert dense.total.sparsity == 0
    assert dense.total[2:7] == (10_000, 10_000, 40_000, 1_010, 8_990)
    assert "89.9" not in str(dense)
    lines = str(dense).splitlines()
    assert lines[-2].startswith("8,990 weights are masked but not 0.")
    assert "jaxprune.apply_masks(params, masks)" in lines[-1]
    sparse = reports.summarize({"kernel": np.where(mask, kernel, 0)}, {"kernel": mask})
    assert sparse.total[2:7] == (10_000, 1_010, 40_000, 1_010, 0)
    assert "89.90%" in str(sparse) and "masked" not in str(sparse)


def test_a_kept_weight_may_be_zero():
    params = {"kernel": np.zeros((2, 3), np.float32)}
    masks = {"kernel": np.array([[True, False, True], [False, False, False]])}
    total = reports.summarize(params, masks).total
    assert (total.nonzeros, total.kept, total.masked_nonzeros) == (0, 2, 0)


def test_before_training_it_says_what_would_be_pruned():
    params = {
        "layers": {"norm": {"weight": np.ones((12, 4), "f4")}, "kernel": np.ones((12, 4, 4), "f4")},
        "embed": {"embedding": np.ones((9, 4), "f4"), "pos_embedding": np.ones((5, 4), "f4")},
        "head": {"kernel": np.ones((4, 3), "f4"), "bias": np.ones(3, "f4")},
        "count": np.ones((2, 2), "i4"),
        "fft": np.ones((2, 2), "c8"),
        "act": jax.nn.relu,
        "rate": 0.1,
    }
    summary = reports.summarize(params)
    wanted = {
        "count": "int32",
        "embed/embedding": None,
        "embed/pos_embedding": "positions",
        "fft": "complex64",
        "head/bias": "1 dimension",
        "head/kernel": None,
        "layers/kernel": None,
        "layers/norm/weight": "norm",
    }
    assert {row.path: row.reason for row in summary.rows} == wanted
    leaves = json.loads(json.dumps(summary.to_dict()))["leaves"]
    assert {leaf["path"]: leaf["reason"] for leaf in leaves} == wanted
    lines = str(summary).splitlines()
    assert lines[0].split()[-2:] == ["bytes", "pruned"]
    assert lines[-1].split()[-1] == f"{9 * 4 + 4 * 3 + 12 * 4 * 4}"
    assert [line.rpartition("  ")[2] for line in lines[2:-2]] == [
        f"no: {reason}" if reason else "yes" for reason in wanted.values()
    ]
    chosen = reports.summarize(params, prunable=lambda path, leaf: path.startswith("head"))
    assert [row.path for row in chosen.rows if row.reason is None] == ["head/bias", "head/kernel"]
    assert {row.reason for row in chosen.rows} == {None, "not in `prunable`"}
    with pytest.raises(ValueError, match="`prunable` matches no leaf"):
        reports.summarize(params, prunable=lambda path, leaf: False)


def test_each_copy_of_a_stack_has_its_row():
    kernel = np.ones((4, 12, 3), np.float32)
    for layer in range(12):
        kernel.reshape(4, 12, 3)[:, layer].flat[:layer] = 0
    params = {"layers": {"kernel": kernel, "scale": np.ones((12, 3))}, "head": np.ones((3, 2))}
    masks = {"layers": {"kernel": kernel != 0, "scale": True}, "head": True}

    def stacked(path, leaf):
        return {"layers/kernel": 1, "layers/scale": 0}.get(path)

    for some in (None, masks):
        summary = reports.summarize(params, some, stacked=stacked)
        rows = {row.path: row for row in summary.rows}
        assert len(rows) == 25
        for layer in range(12):
            row = rows[f"layers/kernel[{layer}]"]
            kept = None if some is None else 12 - layer
            assert row[1:] == ((4, 3), 12, 12 - layer, 48, kept, 0, None)
            assert rows[f"layers/scale[{layer}]"].reason == "1 dimension"
        assert summary.total[2:5] == reports.summarize(params).total[2:5]
    experts = reports.summarize([np.ones((2, 3, 4, 5))], stacked=lambda path, leaf: (0, 1))
    assert [row.path for row in experts.rows][-2:] == ["0[1,1]", "0[1,2]"]
    with pytest.raises(ValueError, match="`stacked` matches no leaf"):
        reports.summarize(params, stacked=lambda path, leaf: None)


def test_a_whole_module_counts_its_arrays():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(2, 3, rngs=rngs)
            self.norm = nnx.BatchNorm(3, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

    model = Model(nnx.Rngs(0))
    for tree in (model, nnx.state(model)):
        reasons = {row.path: row.reason for row in reports.summarize(tree).rows}
        assert reasons["norm/mean"] == "nnx.BatchStat"
        assert reasons["dropout/rngs/key"] == "nnx.RngKey"
        assert [path for path, reason in reasons.items() if reason is None] == ["linear/kernel"]
    parts = {"w": np.ones((2, 2), np.float32), "act": jax.nn.relu, "name": "same", "rate": 0.5}
    masks = {"w": np.eye(2, dtype=bool), "act": True, "name": True, "rate": True}
    pruned = parts | {"w": np.eye(2, dtype=np.float32)}
    for some in (masks, masks | {"act": None, "rate": None}, {"w": masks["w"]}):
        assert reports.summarize(pruned, some).total[2:6] == (4, 2, 16, 2)
    dense, sparse = reports.checkpoint_bytes(parts, masks)
    assert dense > sparse > 0


@pytest.mark.parametrize("function", ["summarize", "checkpoint_bytes", "save", "check", "masks"])
def test_what_counts_values_says_that_jit_has_none(function):
    state = jaxprune.fixed_mask_transform().init({"kernel": jnp.ones((2, 2))})
    call = {
        "summarize": reports.summarize,
        "masks": lambda params: reports.summarize({"kernel": np.ones((2, 2))}, params),
        "checkpoint_bytes": lambda params: reports.checkpoint_bytes(params, True),
        "save": lambda params: storage.save(io.BytesIO(), params),
        "check": lambda params: jaxprune.check(params, state),
    }[function]
    with pytest.raises(ValueError) as error:
        jax.jit(call)({"kernel": jnp.ones((2, 2))})
    name = {"save": "storage.save", "masks": "summarize"}.get(function, function)
    assert "must hold values, but inside `jit`" in str(error.value)
    assert f"Call `{name}` outside" in str(error.value)
    assert "\n  kernel: traced" in str(error.value)


def test_shapes_alone_are_not_counted():
    params = {"w": jax.ShapeDtypeStruct((2, 2), jnp.float32)}
    with pytest.raises(ValueError, match=r"shapes instead of values(.|\n)*w"):
        reports.summarize(params)
    assert reports.summarize(params, {"w": np.eye(2, dtype=bool)}).total.nonzeros == 2


def test_scalar_masks_stand_for_whole_leaves():
    params = {"a": np.ones((2, 3), np.float32), "b": np.ones(400, np.float32)}
    masks = {"a": np.array(True), "b": False}
    summary = reports.summarize(params, masks)
    assert [row.kept for row in summary.rows] == [6, 0]
    assert [row.masked_nonzeros for row in summary.rows] == [0, 400]
    dense, sparse = reports.checkpoint_bytes(params, masks)
    assert dense - sparse == pytest.approx(4 * 400 - 400 / 8, abs=20)  # the mask is stored


def test_scalar_masks_stand_for_whole_branches():
    params, masks = _network()
    params = params | {"head": {"kernel": np.ones((4, 4), "f4"), "bias": np.ones(4, "f4")}}
    for mask, kept in ((True, 20), (np.array(False), 0)):
        summary = reports.summarize(params, masks | {"head": mask})
        assert [row.kept for row in summary.rows[2:]] == ([4, 16] if kept else [0, 0])
    whole = {"head": {"kernel": True, "bias": True}}
    own = reports.checkpoint_bytes(params, masks | {"head": True})
    assert own == reports.checkpoint_bytes(params, masks | whole)
    with pytest.raises(ValueError, match="head/bias: has no mask\n  head/kernel: has no mask\n"):
        reports.summarize(params, masks | {"head": np.ones((4, 4), bool)})


def test_counts_stay_exact_where_float32_does_not():
    size = 2**24 + 3
    mask = np.ones(size, bool)
    mask[:2] = False
    total = reports.summarize([jax.ShapeDtypeStruct((size,), jnp.bfloat16)], [mask]).total
    assert (total.parameters, total.nonzeros, total.bytes) == (size, size - 2, 2 * size)
    assert type(total.nonzeros) is int
    huge = reports.summarize([jax.ShapeDtypeStruct((0,), jnp.float32)], [np.ones(0, bool)]).total
    assert huge.sparsity == 0.0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.int8])
def test_types_of_arrays(dtype):
    leaf = jnp.array([[0, 1], [-2, 0]], dtype)
    (row,) = reports.summarize({"w": leaf}).rows
    assert (row.path, row.nonzeros, row.bytes) == ("w", 2, 4 * jnp.dtype(dtype).itemsize)


def test_nnx_state_has_paths_without_value():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.blocks = nnx.List([nnx.Linear(2, 3, rngs=rngs), nnx.Linear(3, 1, rngs=rngs)])

    params = nnx.state(Model(nnx.Rngs(0)), nnx.Param)
    masks = jax.tree.map(lambda leaf: leaf > 0, params)
    summary = reports.summarize(jaxprune.apply_masks(params, masks), masks)
    assert {row.path for row in summary.rows} == {
        "blocks/0/kernel",
        "blocks/0/bias",
        "blocks/1/kernel",
        "blocks/1/bias",
    }
    assert summary.total.parameters == 6 + 3 + 3 + 1
    assert summary.total.nonzeros == sum(int(np.sum(leaf)) for leaf in jax.tree.leaves(masks))


def test_sharded_leaves_count_once():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    leaf = jax.device_put(np.eye(16, dtype=np.float32), sharding)
    assert reports.summarize([leaf]).total[2:5] == (256, 16, 1024)


def test_table_and_dictionary_agree():
    params, masks = _network()
    summary = reports.summarize(jaxprune.apply_masks(params, masks), masks)
    lines = str(summary).splitlines()
    kept = int(masks["conv"]["kernel"].sum())
    wanted = ["path", "shape", "parameters", "nonzeros", "kept", "sparsity", "bytes"]
    assert lines[0].split() == wanted
    assert lines[-1].split()[:3] == ["total", "1,168", f"{kept + 16:,}"]
    assert lines[-2] == lines[1]
    assert len({len(line) for line in lines}) == 1
    assert "3x3x8x16" in str(summary)
    as_dict = json.loads(json.dumps(summary.to_dict()))
    assert as_dict["total"]["nonzeros"] == kept + 16
    assert [leaf["path"] for leaf in as_dict["leaves"]] == [row.path for row in summary.rows]
    assert as_dict["leaves"][1]["shape"] == [3, 3, 8, 16]


@pytest.mark.parametrize("function", [reports.summarize, reports.checkpoint_bytes])
def test_every_mismatch_is_named(function):
    params = {name: np.ones((2, 2)) for name in ("good", "shape", "dtype", "missing")}
    masks = {
        "good": np.ones((2, 2), bool),
        "shape": np.ones((4, 1), bool),
        "dtype": np.ones((2, 2), np.float32),
        "extra": np.ones(1, bool),
    }
    with pytest.raises(ValueError, match="`masks`") as caught:
        function(params, masks)
    message = str(caught.value)
    for part in (
        "shape: has shape (2, 2), its mask (4, 1)",
        "dtype: its mask has dtype float32",
        "missing: has no mask",
        "extra: a mask without a parameter",
        "jaxprune.get_masks",
    ):
        assert part in message
    assert "good" not in message


def test_no_leaves_is_an_error():
    with pytest.raises(ValueError, match="`params` .* no leaf"):
        reports.summarize({})


# ---- checkpoint_bytes


@given(masks=MASKS)
def test_bytes_are_those_of_the_files(masks, tmp_path_factory):
    rng = np.random.default_rng(0)
    params = [rng.normal(size=mask.shape).astype(np.float32) for mask in masks]
    folder = tmp_path_factory.mktemp("files")
    pruned = [np.where(mask, leaf, np.float32(0)) for leaf, mask in zip(params, masks, strict=True)]
    storage.save(folder / "dense", params, [True] * len(masks), compression=None)
    storage.save(folder / "sparse", pruned, masks, compression=None)
    sizes = tuple((folder / name).stat().st_size for name in ("dense", "sparse"))
    assert reports.checkpoint_bytes(params, masks) == sizes
    assert reports.checkpoint_bytes(pruned, masks)[1] == sizes[1]


def test_sparse_file_is_as_small_as_it_says():
    values = np.ones((1000, 100), np.float32)
    masks = np.zeros((1000, 100), bool)
    masks[:280] = True
    dense, sparse = reports.checkpoint_bytes({"w": values}, {"w": masks})
    assert 0 < dense - 400_000 < 1000
    assert 0 < sparse - (28_000 * 4 + 100_000 // 8) < 1000


def test_bfloat16_takes_two_bytes_in_the_file():
    leaf, mask = jnp.ones((64, 64), jnp.bfloat16), np.ones((64, 64), bool)
    dense, sparse = reports.checkpoint_bytes([leaf], [mask])
    assert abs(dense - sparse) < 8  # both hold all values, one manifest counts them
    assert 0 < dense - 2 * 64 * 64 < 1000


# ---- tables


def test_table_aligns_and_formats():
    rows = [{"run": "dense", "n": 1234567, "x": 0.123456}, {"run": "agip", "n": np.int64(5)}]
    text = reports.table(rows, {"run": "run", "n": "weights", "x": "x"})
    assert text.splitlines() == [
        "run      weights       x",
        "-----  ---------  ------",
        "dense  1,234,567  0.1235",
        "agip           5       -",
    ]
    assert reports.markdown_table(rows, ["run", "n"]).splitlines() == [
        "| run | n |",
        "| --- | ---: |",
        "| dense | 1,234,567 |",
        "| agip | 5 |",
    ]


# ---- plots


def _history(final: float, sparsity: float | None):
    """A made-up run in the form of metrics.jsonl: training lines, and test lines now and then."""
    records = []
    for step in range(0, 401, 20):
        record = {"step": step, "loss": 2.3 / (1 + step), "train_accuracy": final * step / 400}
        if sparsity is not None:
            record["sparsity"] = sparsity * step / 400
        if step % 100 == 0:
            record["test_accuracy"] = final * (1 - 0.9 ** (step / 10))
        records.append(record)
    return records


def _ink(path) -> float:
    """Share of the pixels of a PNG that are not white."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"))
    assert min(pixels.shape[:2]) > 150
    return float((pixels < 250).any(axis=-1).mean())


def _recorded(monkeypatch) -> list:
    """The figures that are saved from now on."""
    figures = []
    save = _plots._save
    monkeypatch.setattr(
        _plots, "_save", lambda figure, path: (figures.append(figure), save(figure, path))
    )
    return figures


def test_plot_training_draws_each_run(tmp_path, monkeypatch):
    figures = _recorded(monkeypatch)
    runs = {"dense": _history(0.98, None), "agip": _history(0.97, 0.72)}
    reports.plot_training(runs, tmp_path / "new" / "training.png")
    assert _ink(tmp_path / "new" / "training.png") > 0.01
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["training.png"]
    top, bottom = figures[0].axes
    tested = [line for line in top.lines if line.get_linewidth() > 1]
    assert [list(line.get_xdata()) for line in tested] == [[0, 100, 200, 300, 400]] * 2
    assert [len(line.get_xdata()) for line in top.lines] == [21, 5, 21, 5]
    assert [line.get_ydata()[-1] for line in bottom.lines] == [0.72]
    labels = [text.get_text() for text in top.get_legend().get_texts()]
    assert [label.split(":")[0] for label in labels] == ["dense", "agip"]


def test_plot_training_takes_what_was_measured(tmp_path):
    records = [{"step": 1, "loss": 2.0}, {"step": 2, "train_accuracy": 0.5}]
    reports.plot_training({"run": records}, tmp_path / "a.png")
    assert _ink(tmp_path / "a.png") > 0.005
    with pytest.raises(ValueError, match="`histories` .*'run'"):
        reports.plot_training({"run": records[:1]}, tmp_path / "b.png")
    assert not (tmp_path / "b.png").exists()


@pytest.mark.slow
def test_plot_retraining_draws_each_method_in_both_panels(tmp_path, monkeypatch):
    figures = _recorded(monkeypatch)
    dense = {"method": "none", "density": 1.0, "accuracy": 0.9, "SD": 0.01, "epochs": 2.0}
    rows = [dense]
    for method, kept in ("fine_tune", 0.5), ("retrain_dense", 1.0):
        for number in (1, 2):
            more = {"density": kept**number, "accuracy": 0.8, "epochs": 2.0 + number, "SD": None}
            rows.append(dense | {"method": method} | more)
    reports.plot_retraining(rows, tmp_path / "a.png")
    assert _ink(tmp_path / "a.png") > 0.01
    left, right = figures[0].axes
    drawn = [
        {bars.get_label(): list(bars.lines[0].get_xdata()) for bars in axes.containers}
        for axes in (left, right)
    ]
    assert drawn[0] == {"fine_tune": pytest.approx([np.log(2), np.log(4)], abs=0.03)}
    assert drawn[1] == {"fine_tune": [3.0, 4.0], "retrain_dense": [3.0, 4.0]}
    assert {label.get_text() for label in left.get_xticklabels()} == {"2", "4"}
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert sorted(labels) == ["dense", "fine_tune", "retrain_dense"]
    with pytest.raises(ValueError, match="`rows`"):
        reports.plot_retraining([], tmp_path / "b.png")


def test_plot_densities_draws_a_bar_a_kernel(tmp_path, monkeypatch):
    figures = _recorded(monkeypatch)
    params, masks = _network()
    summary = reports.summarize(jaxprune.apply_masks(params, masks), masks)
    reports.plot_densities(summary, tmp_path / "one.png")
    reports.plot_densities({"a": summary, "b": reports.summarize(params)}, tmp_path / "two.png")
    assert min(_ink(tmp_path / "one.png"), _ink(tmp_path / "two.png")) > 0.01
    kept = masks["conv"]["kernel"].mean()
    widths = [[bar.get_width() for bar in figure.axes[0].patches] for figure in figures]
    assert widths[0] == [pytest.approx(kept)]
    assert widths[1] == [pytest.approx(kept), 1.0]
    reports.plot_densities(reports.summarize([np.ones(3)]), tmp_path / "biases.png")
    assert len(figures[2].axes[0].patches) == 1
    with pytest.raises(ValueError, match="`summaries`"):
        reports.plot_densities({}, tmp_path / "none.png")


def test_failed_plot_leaves_the_old_one(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    (tmp_path / "plot.png").write_bytes(b"old")
    monkeypatch.setattr(Figure, "savefig", _full_disk)
    with pytest.raises(OSError, match="full"):
        reports.plot_densities(reports.summarize([np.ones((2, 2))]), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]


def _full_disk(figure, file, **_):
    """Writes the start of a file, then fails as a full disk does."""
    file.write_bytes(b"half") if hasattr(file, "write_bytes") else file.write(b"half")
    raise OSError("disk full")


@pytest.mark.slow
def test_plots_leave_pyplot_alone(tmp_path):
    code = (
        "import sys, numpy as np; from jaxprune import reports;"
        "assert 'matplotlib' not in sys.modules;"
        f"reports.plot_densities(reports.summarize([np.eye(3)]), {str(tmp_path / 'a.png')!r});"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_nothing_beats_is_joined(monkeypatch, tmp_path):
    """By time dense, narrow and fast; by parameters dense and narrow."""
    drawn = []
    monkeypatch.setattr(_plots, "_save", lambda figure, path: drawn.append(figure))
    rows = [
        {"arm": name, "accuracy": accuracy, "seconds": seconds, "parameters": parameters}
        | {"accuracy SD": 0.01, "seconds SD": None}
        for name, accuracy, seconds, parameters in [
            ("dense", 1.0, 1.0, 1.0),
            ("narrow", 0.98, 0.5, 0.25),
            ("worse", 0.97, 0.6, 0.25),
            ("fast", 0.9, 0.2, 0.25),
        ]
    ]
    reports.plot_tradeoffs(rows, tmp_path / "unused.png")
    panels = drawn[0].axes
    lines = [axes.lines[-1].get_xydata().tolist() for axes in panels]
    assert lines == [[[0.2, 0.9], [0.5, 0.98], [1.0, 1.0]], [[0.25, 0.98], [1.0, 1.0]]]
    assert all(len(axes.containers) == 4 for axes in panels)
    with pytest.raises(ValueError, match="`rows`"):
        reports.plot_tradeoffs([], tmp_path / "unused.png")


def test_fronts_are_joined_in_the_order_of_their_costs(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(_plots, "_save", lambda figure, path: drawn.append(figure))
    cut = [{"cost": 0.8, "accuracy": 0.9, "SD": None}, {"cost": 0.2, "accuracy": 0.7, "SD": 0.01}]
    alone = [{"cost": 0.5, "accuracy": 0.85}]
    reports.plot_fronts({"cut": cut, "alone": alone, "none": []}, tmp_path / "unused.png")
    (axes,) = drawn[0].axes
    lines = {own.get_label(): own.lines[0].get_xydata().tolist() for own in axes.containers}
    assert lines == {"cut": [[0.2, 0.7], [0.8, 0.9]], "alone": [[0.5, 0.85]]}
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["cut", "alone"]
    reports.plot_fronts({"cut": cut}, tmp_path / "unused.png", lowest=0.8)
    bottoms = [figure.axes[0].get_ylim()[0] for figure in drawn]
    assert bottoms[0] < 0.7 and bottoms[1] == 0.8
    with pytest.raises(ValueError, match="`fronts`"):
        reports.plot_fronts({"none": []}, tmp_path / "unused.png")
