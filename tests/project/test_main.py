"""`python -m jaxprune` has every command of scripts/."""

import importlib
import sys
from pathlib import Path

import pytest

from jaxprune import __main__ as doors

SCRIPTS = Path(__file__).parents[2] / "scripts"


def test_the_commands_are_those_of_scripts() -> None:
    assert {path.stem for path in SCRIPTS.glob("*.py")} == {*doors.COMMANDS}
    for name, (module, _) in doors.COMMANDS.items():
        text = (SCRIPTS / f"{name}.py").read_text()
        assert f"from jaxprune.experiments.{module} import main" in text


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"]])
def test_help_lists_all(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    doors.main(args)
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in doors.COMMANDS)


def test_an_unknown_command_is_an_error_that_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        doors.main(["prune"])
    assert stopped.value.code == 2
    assert "'prune' is no command" in (shown := capsys.readouterr().err) and "train" in shown


def test_a_command_gets_the_rest_of_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from jaxprune.experiments.studies import search

    seen: list[list[str]] = []
    monkeypatch.setattr(search, "main", seen.append)
    monkeypatch.setattr(sys, "argv", ["x"])
    doors.main(["search", "runs/dense", "--budgets", "0.5"])
    assert seen == [["runs/dense", "--budgets", "0.5"]]


def test_what_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError("no module", name="orbax")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(SystemExit):
        doors.main(["train"])
    assert "needs orbax" in capsys.readouterr().err
