"""The table of expected ratios: between its points, in its file, and on a synthetic machine."""

import json

import pytest

from jaxprune import files, kernels
from jaxprune.kernels import _table
from jaxprune.kernels._table import CASES, Case, Entry, Ratio, Table
from tests.support.sparse import inverse


def counted(clock, calls):
    def counting(case, density):
        calls.append((case, density))
        return clock(case, density)

    return counting


def test_each_class_and_density_is_measured_once():
    calls = []
    table = kernels.measure_table(densities=(0.3, 0.1), clock=counted(inverse, calls))
    assert len(calls) == len(set(calls)) == 2 * len(CASES)
    assert table.entries[0].densities == (0.1, 0.3)


@pytest.mark.parametrize("density", [0.03, 0.05, 0.07, 0.1, 0.25, 0.35, 0.7, 1.0])
def test_a_power_of_the_density_is_interpolated_exactly(density):
    table = kernels.measure_table(clock=lambda case, own: Ratio(1.0, 0.4 / own**0.8))
    found = kernels.expected_ratio(table, CASES[0], density)
    assert found.forward == pytest.approx(1.0)
    assert found.training == pytest.approx(0.4 / max(density, 0.05) ** 0.8)


def test_a_ratio_never_rises_with_the_density_beyond_the_table():
    entry = Entry(CASES[0], (0.1, 0.2), (Ratio(1.0, 1.0), Ratio(2.0, 2.0)))  # a noisy clock
    assert entry.at(0.9).training == pytest.approx(2.0)


def test_the_most_similar_class_of_the_same_kind_decides():
    table = kernels.measure_table(
        clock=lambda case, density: Ratio(1.0, case.rows * 1e6 + case.inputs + case.stride / 10)
    )
    wide = kernels.expected_ratio(table, Case("product", 900, 1200, 800), 0.2)
    assert wide.training == pytest.approx(1024 * 1e6 + 1024.1)
    convolution = Case("convolution", 50_000, 9 * 16, 16)
    assert kernels.expected_ratio(table, convolution, 0.2).training == pytest.approx(
        64 * 28 * 28 * 1e6 + 144.1
    )
    strided = kernels.expected_ratio(table, convolution._replace(stride=2), 0.2)
    assert strided.training == pytest.approx(64 * 14 * 14 * 1e6 + 144.2)
    nothing = kernels.expected_ratio(Table({}, ()), convolution, 0.2)
    assert nothing == Ratio(0.0, 0.0) == kernels.expected_ratio(table, convolution, 0.0)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"densities must be in \(0, 1\]"):
        kernels.measure_table(densities=(0.0,), clock=inverse)
    with pytest.raises(ValueError, match="must not be empty"):
        kernels.measure_table([], clock=inverse)


def test_a_table_is_measured_once_and_saved(tmp_path, monkeypatch):
    calls = []
    clock = counted(inverse, calls)
    monkeypatch.setenv("JAXPRUNE_CACHE", str(tmp_path / "new"))
    first = _table.saved_table(clock=clock)
    count = len(calls)
    assert _table.saved_table(clock=clock) == first and len(calls) == count
    assert (tmp_path / "new" / "kernels.json").exists()


DAMAGES = {
    "cut": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "changed": lambda text: text.replace("0.35", "0.45", 1),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_table_is_measured_again(tmp_path, damage):
    wanted = _table.saved_table(tmp_path, clock=inverse)
    path = tmp_path / "kernels.json"
    path.write_text(DAMAGES[damage](path.read_text()))
    calls = []
    assert _table.saved_table(tmp_path, clock=counted(inverse, calls)) == wanted
    assert calls and _table.load_table(path) == wanted


def rewritten(path, change):
    content = json.loads(path.read_text())
    content.pop("crc32", None)
    change(content)
    path.write_text(json.dumps(files.seal(content)))


def test_a_table_of_another_machine_is_measured_again(tmp_path):
    _table.saved_table(tmp_path, clock=inverse)
    path = tmp_path / "kernels.json"
    rewritten(path, lambda content: content["machine"].update(jaxlib="0.0.1"))
    with pytest.raises(ValueError, match="a different machine, or with other versions"):
        _table.load_table(path)
    calls = []
    _table.saved_table(tmp_path, clock=counted(inverse, calls))
    assert calls


def test_values_of_a_file_are_checked(tmp_path):
    _table.saved_table(tmp_path, clock=inverse)
    path = tmp_path / "kernels.json"
    rewritten(path, lambda content: content["entries"][0]["forward"].pop())
    with pytest.raises(ValueError, match="one ratio above 0 for each density"):
        _table.load_table(path)
    rewritten(path, lambda content: content["entries"][0]["case"].update(kind="lookup"))
    with pytest.raises(ValueError, match="kind"):
        _table.load_table(path)


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    table = _table.saved_table(tmp_path / "file", clock=inverse)
    assert table.entries


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["product", "convolution"])
def test_a_layer_is_timed(kind):
    case = next(own for own in CASES if own.kind == kind)
    small = case._replace(rows=16 if kind == "product" else 28 * 28)
    ratio = _table.time_case(small, 0.2)
    assert ratio.forward > 0 and ratio.training > 0
