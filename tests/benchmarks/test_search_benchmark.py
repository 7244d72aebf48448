"""The benchmark of searches: its commands are valid, and dense networks are trained first."""

import runpy
from pathlib import Path

import pytest

from jaxprune.experiments.studies import search as study

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("words", [[], ["--tiny"], ["--only", "mobilenet_v1-latency"]])
def test_commands_are_valid_and_dense_networks_come_first(words, monkeypatch, tmp_path):
    module = runpy.run_path(str(ROOT / "benchmarks" / "search.py"))
    ran = []

    class Done:
        returncode = 0

    monkeypatch.setattr("subprocess.run", lambda command, cwd: ran.append(command[1:]) or Done)
    module["main"]([*words, "--workdir", str(tmp_path)])
    trained = set()
    for script, *own in ran:
        if script == "scripts/train.py":
            assert "--validation" in own
            trained.add(own[-1])
            continue
        options = study.parse(own)
        assert script == "scripts/search.py" and str(options.runs[0]) in trained
        assert options.evaluations >= 44 and len(options.seeds) >= 2
    assert len(ran) == (2 if "--only" in words else 5)


def test_a_failed_command_ends_it(monkeypatch, tmp_path):
    module = runpy.run_path(str(ROOT / "benchmarks" / "search.py"))
    ran = []

    class Failed:
        returncode = 3

    monkeypatch.setattr("subprocess.run", lambda command, cwd: ran.append(command) or Failed)
    with pytest.raises(SystemExit, match="3"):
        module["main"](["--workdir", str(tmp_path)])
    assert len(ran) == 1
