"""Shared by all commands: options split at `--`, the record of a workdir, errors as one message."""

import argparse
import contextlib
import dataclasses
import functools
import shlex
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxprune import checkpoints, training
from jaxprune.experiments.config import Config
from jaxprune.files import schemas

# What summary.json of a run may say.
_SUMMARY = {
    **dict.fromkeys(("test_accuracy", "seconds_per_step"), schemas.maybe(schemas.number)),
    **dict.fromkeys(("sparsity", "seconds", "cpu_seconds"), schemas.finite),
    **dict.fromkeys(("steps", "parameters", "nonzeros", "dense_bytes"), schemas.whole()),
    "device": schemas.text,
    "versions": schemas.table(schemas.text),
    "switches": schemas.each(schemas.table(schemas.anything)),
}
# What config.json of a run may say: as other versions have other fields, none has to be there.
_KINDS = {bool: schemas.flag, int: schemas.whole(low=-(2**63)), str: schemas.text}
_CONFIG = schemas.record(
    {},
    optional={
        field.name: schemas.maybe(_KINDS.get(type(field.default), schemas.finite))
        for field in dataclasses.fields(Config)
    },
    more=True,
)
_COMMANDS = schemas.record({}, optional={"commands": schemas.each(schemas.text)}, more=True)


@contextlib.contextmanager
def plain_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Ends the program with one message if an error is the user's to mend, without a traceback.

    Args:
        *kinds: of such errors; default ValueError and OSError.
    """
    kinds = kinds or (ValueError, OSError)
    _settled_process()
    try:
        yield
    except kinds as error:
        sys.exit(f"error: {error}")


@functools.cache
def _settled_process() -> contextlib.ExitStack:
    """Silences Orbax for good, and keeps memory for the next step.

    Threads of Orbax complain until the process ends, after any error. Only a command may change the
    process like this; the result must not be collected.
    """
    training.keep_memory()
    stack = contextlib.ExitStack()
    stack.enter_context(checkpoints.quiet_orbax())
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    return stack


def split(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits a command line at the first `--` into its own words and those for the runs.

    Example:
        >>> split(["digits_resnet8", "--jobs", "2", "--", "--steps", "5"])
        (['digits_resnet8', '--jobs', '2'], ['--steps', '5'])
        >>> split(["digits_resnet8"])
        (['digits_resnet8'], [])
    """
    end = args.index("--") if "--" in args else len(args)
    return list(args[:end]), list(args[end + 1 :])


def parse(parser: argparse.ArgumentParser, args: Sequence[str]) -> argparse.Namespace:
    """Parses the words before `--`; the words after it become `training`."""
    own, training = split(args)
    options = parser.parse_args(own)
    options.training = training
    return options


def refuse(parser: argparse.ArgumentParser, own: Collection[str], words: Iterable[str]) -> None:
    """Ends the program if words for the runs hold options that the command sets itself.

    Args:
        parser: the parser of the command.
        own: names of such options, with hyphens and without the leading ones.
        words: the words for the runs.
    """
    given = {word.partition("=")[0].lstrip("-").replace("_", "-") for word in words
             if word.startswith("--")}  # fmt: skip
    if found := sorted(given & set(own)):
        parser.error(
            f"--{', --'.join(found)} may not be given to the runs: this command sets it, or it has "
            "no effect here"
        )


def record_command(
    path: Path,
    settings: Mapping[str, Any],
    words: Sequence[str],
    *,
    binding: bool = True,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Adds a command to the record of a workdir, or refuses a workdir with different settings.

    Args:
        path: the record, a JSON file in the workdir.
        settings: what must not change while results are added; JSON-ready.
        words: the command, such as `["python", "scripts/study.py", "digits_resnet8"]`.
        binding: whether the settings that are there count; False if nothing was made with them.
        check: raises if the command does not fit the workdir for another reason.

    Raises:
        ValueError: the workdir cannot be written or has different settings; nothing is recorded.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "study.json")
        >>> record_command(path, {"steps": 5}, ["study", "--seeds", "0"])
        >>> record_command(path, {"steps": 5}, ["study", "--seeds", "0 1"])
        >>> commands_in(path)
        ['study --seeds 0', "study --seeds '0 1'"]
    """
    checkpoints.check_writable(path.parent)
    saved = checkpoints.read_json(path)
    if saved is not None:
        _COMMANDS(saved, str(path))
    if saved is not None and binding:
        checkpoints.check_config(saved, settings, str(path.parent))
    check()
    commands = dict.fromkeys([*commands_in(path), shlex.join(words)])
    checkpoints.write_json(path, {**settings, "commands": list(commands)})


def commands_in(path: Path) -> list[str]:
    """Returns the commands of a record; none if there is no such file."""
    content = checkpoints.read_json(path)
    if content is None:
        return []
    _COMMANDS(content, str(path))
    return content.get("commands", [])


def read_config(workdir: Path) -> dict[str, Any] | None:
    """Reads config.json of a run; None if there is none.

    Raises:
        ValueError: the file is damaged: a field has another kind of value than `Config`.
    """
    path = workdir / "config.json"
    content = checkpoints.read_json(path)
    if content is not None:
        try:
            _CONFIG(content, str(path))
        except ValueError as error:
            raise ValueError(
                f"{error}; restore it from a copy, or use `--overwrite` where it trains again"
            ) from error
    return content


def read_summary(workdir: Path, needs: Iterable[str] = ()) -> dict[str, Any] | None:
    """Reads summary.json of a finished run; None if there is none.

    Args:
        workdir: the folder of the run.
        needs: names that must be there.

    Raises:
        ValueError: the file is damaged.
    """
    path = workdir / "summary.json"
    content = checkpoints.read_json(path)
    if content is not None:
        fields = {name: _SUMMARY.get(name, schemas.anything) for name in needs}
        schemas.record(fields, optional=_SUMMARY, more=True)(content, str(path))
    return content


def check_results(found: Collection[Any], workdir: Path) -> None:
    """Raises if `--report-only` found nothing to report.

    Example:
        >>> check_results([], Path("runs/a"))
        Traceback (most recent call last):
        ValueError: `workdir` runs/a holds no finished run to report
    """
    if not found:
        raise ValueError(f"`workdir` {workdir} holds no finished run to report")
