"""The benchmark of browsers: networks run in turns, and the table compares with the first."""

import itertools

import pytest

from tests.support import benchmarks


@pytest.fixture(scope="module")
def bench():
    return benchmarks.load("browser")


def test_networks_run_in_turns_and_five_rounds_do_not_count(bench):
    order, clock = [], itertools.count()
    runners = {name: lambda own=name: order.append(own) for name in ("dense", "sparse")}
    times = bench.in_turns(runners, 3, clock=lambda: float(next(clock)))
    assert order == ["dense", "sparse"] * 8
    assert times == {"dense": [1e3] * 3, "sparse": [1e3] * 3}


def test_table_shows_bytes_and_speed_ups(bench, tmp_path):
    (tmp_path / "sparse.tflite").write_bytes(bytes(12_345))
    times = {
        "xla": {"dense": [4.0, 4.0], "sparse": [2.0, 4.0]},
        "browser": {"dense": [3.0, 3.0], "sparse": [1.0, 1.0]},
    }
    assert bench.table(tmp_path, times).splitlines() == [
        "| network | kB | LiteRT.js, Chromium | XLA:CPU |",
        "| --- | --- | --- | --- |",
        "| dense |  | 3.000 ms (3.000) | 4.000 ms (4.000) |",
        "| sparse | 12 | 3.00x (3.00) | 2.00x (1.60) |",
    ]


def test_dense_networks_come_first(bench, tmp_path):
    for name in ("agip-80", "dense-seed1", "images", "narrow"):
        (tmp_path / f"{name}.npz").write_bytes(b"")
    assert bench.saved_names(tmp_path) == ["dense-seed1", "agip-80", "narrow"]
    with pytest.raises(SystemExit, match="holds no saved networks"):
        bench.saved_names(tmp_path / "none")


@pytest.mark.parametrize("words", [["--rounds", "0"], ["--runtimes", "webgpu"]])
def test_bad_options_are_refused(bench, words, capsys):
    with pytest.raises(SystemExit):
        bench.parse(words)
    assert "error" in capsys.readouterr().err
