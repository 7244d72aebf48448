"""The benchmark of memory: its table, and a small run."""

import platform

import pytest

from tests.support import benchmarks

bench = benchmarks.load("memory")


def test_ratios_are_those_of_the_same_round():
    records = [
        {"network": "narrow", "mode": mode, "seconds": seconds, "bytes": size * 2**30}
        for seconds_of_round in ([0.2, 0.1, 0.05], [0.4, 0.1, 0.2], [0.1, 0.1, 0.1])
        for mode, seconds, size in zip(bench.MODES, seconds_of_round, (1, 2, 3), strict=True)
    ]
    assert bench.rows_of(records) == [
        "| narrow | given back | 200 | 1.00 (1.00-1.00) | 1.00 |",
        "| narrow | kept | 100 | 0.50 (0.25-1.00) | 2.00 |",
        "| narrow | huge pages | 100 | 0.50 (0.25-1.00) | 3.00 |",
    ]


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs the GNU C library")
def test_each_mode_has_a_process(monkeypatch, capsys):
    words = "memory.py --rounds 1 --steps 2 --batch 2 --only narrow".split()
    monkeypatch.setattr(bench.sys, "argv", words)
    bench.main()
    rows = capsys.readouterr().out.splitlines()
    assert [row.split("|")[2].strip() for row in rows[2:]] == list(bench.MODES)
