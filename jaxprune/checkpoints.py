"""Checkpoints of whole runs: state, data position and configuration in one atomic Orbax step.

Orbax ignores half-written steps but casts a wrong dtype silently. Each checkpoint therefore carries
a record of its leaves (shape, dtype, checksum), which `restore` checks before and after reading,
and a checksum of that record.
"""

import contextlib
import dataclasses
import gc
import hashlib
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from jaxprune import files
from jaxprune.files import read_json, schemas
from jaxprune.processes import on_first, on_host

__all__ = [
    "Damaged",
    "check_config",
    "check_writable",
    "delete_unfinished",
    "fields",
    "fingerprint",
    "open_manager",
    "quiet_orbax",
    "read_json",
    "read_newest",
    "read_record",
    "restore",
    "save",
    "stop_signals",
    "write_json",
    "write_text",
]

PyTree = Any
T = TypeVar("T")

_RECORD = schemas.record(
    {
        "record": schemas.table(schemas.anything),
        "leaves": schemas.table(schemas.each(schemas.anything, length=3)),  # see `_describe`
    }
)


class Damaged(ValueError):
    """The error of a checkpoint that cannot be read back.

    Example:
        >>> isinstance(Damaged("checkpoint 3 is corrupt"), ValueError)
        True
    """


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes JSON atomically: the file is either the old one or complete.

    Args:
        path: the file; its folder must exist.
        value: anything that `json` accepts.

    Example:
        >>> path = tempfile.mkdtemp() + "/a.json"
        >>> write_json(path, {"b": 1})
        >>> read_json(path)
        {'b': 1}
    """
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file so that it is either the old one or complete.

    Args:
        path: the file; its folder must exist.
        text: its new content.

    Example:
        >>> write_text(tempfile.mkdtemp() + "/a.txt", "b")
    """
    with files.replacing(path) as file:
        file.write(text)


def check_config(saved: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
    """Raises if a run would continue with options that differ from those it started with.

    Args:
        saved: fields of the configuration stored with the run.
        wanted: fields of the present configuration, without those that may change.
        where: the folder of the run, for the error.

    Raises:
        ValueError: if fields differ; it lists all of them.

    Example:
        >>> check_config({"seed": 0, "log_every": 5}, {"seed": 0}, "runs/a")
    """
    absent = "absent"
    differing = [
        f"  {name}: {saved.get(name, absent)!r} there, {value!r} now"
        for name, value in json.loads(json.dumps(wanted)).items()
        if saved.get(name, absent) != value
    ]
    if differing:
        raise ValueError(
            f"`workdir` {where} holds a run with a different configuration:\n"
            + "\n".join(differing)
            + "\n"
            "Continue with the same options, use a different folder, or delete that one."
        )


def fields(config: Any, leave_out: Collection[str] = ()) -> dict[str, Any]:
    """Converts the fields of a dataclass to JSON-ready values.

    Args:
        config: a dataclass instance.
        leave_out: names of fields to skip.

    Returns:
        Field name -> value; tuples become lists, and paths become strings.

    Example:
        >>> Config = dataclasses.make_dataclass("Config", ["seed", "workdir"])
        >>> fields(Config(1, "runs/a"), leave_out={"workdir"})
        {'seed': 1}
    """
    kept = {k: v for k, v in dataclasses.asdict(config).items() if k not in leave_out}
    return json.loads(json.dumps(kept, default=str))


def open_manager(
    folder: str | os.PathLike[str], keep: int = 2, always: Collection[int] = ()
) -> ocp.CheckpointManager:
    """Opens an Orbax manager of one run's checkpoints.

    Saving blocks, because the state is donated to the next step; when `save` returns, the
    checkpoint is on disk.

    Args:
        folder: folder of the checkpoints, made if it does not exist.
        keep: number of the newest checkpoints to keep.
        always: steps whose checkpoints are kept as well, however old they are.

    Returns:
        The manager; `latest_step()` is None for a new run. Close it when done.

    Raises:
        ValueError: if the folder cannot be written.

    Example:
        >>> open_manager(tempfile.mkdtemp()).latest_step() is None
        True
    """
    check_writable(folder)
    policies = ocp.checkpoint_managers
    policy = policies.AnyPreservationPolicy(
        [policies.LatestN(keep), policies.CustomSteps(list(always))]
    )
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policy, enable_async_checkpointing=False
    )
    return ocp.CheckpointManager(Path(folder).absolute(), options=options)


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Makes a folder and checks that files can be written into it.

    Args:
        folder: the folder, made with its parents if it does not exist.

    Raises:
        ValueError: if it cannot be made or written.

    Example:
        >>> check_writable(tempfile.mkdtemp())
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # on Linux it has no name that a kill could leave
            pass
    except OSError as error:
        raise ValueError(
            f"`folder` {folder} cannot be written ({error}); use a different one."
        ) from error


def save(
    manager: ocp.CheckpointManager, step: int, state: PyTree, record: Mapping[str, Any]
) -> None:
    """Saves a checkpoint; returns when it is complete on disk.

    Args:
        manager: from `open_manager`.
        step: number of the step. An existing checkpoint of that step is not changed.
        state: tree of arrays.
        record: JSON-ready values to save with it, such as data position and configuration.

    Raises:
        OSError: if it cannot be written, such as to a full disk; earlier checkpoints are kept.

    Example:
        >>> manager = open_manager(tempfile.mkdtemp())
        >>> save(manager, 3, {"w": jnp.ones(2)}, {"epoch": 1})
        >>> manager.latest_step()
        3
    """
    if step in manager.all_steps():
        return
    record = files.seal({"record": record, "leaves": _describe(state, checksum=True)})
    items = {"state": ocp.args.StandardSave(state), "record": ocp.args.JsonSave(record)}
    reason = None
    try:
        with quiet_orbax():
            manager.save(step, args=ocp.args.Composite(**items))
    except (OSError, ValueError) as error:  # TensorStore raises ValueError for a full disk
        reason = _shortened(error)
    if reason is not None:
        raise OSError(
            f"checkpoint {Path(str(manager.directory)) / str(step)} cannot be written ({reason}); "
            "earlier checkpoints are kept: make room, and run the same command again."
        )


def restore(
    manager: ocp.CheckpointManager, like: PyTree, step: int | None = None
) -> tuple[PyTree, dict[str, Any]]:
    """Restores a checkpoint exactly, or says what is wrong with it; changes nothing on disk.

    Args:
        manager: from `open_manager`.
        like: tree of arrays or `jax.ShapeDtypeStruct` with the structure, shapes, dtypes and
            shardings that the checkpoint must have.
        step: step of the checkpoint; None for the newest.

    Returns:
        `(state, record)` as they were saved, the state with the shardings of `like`.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if leaves are missing, unknown or of a different shape or dtype (it lists all of
            them).
        Damaged: if the checkpoint is corrupt.

    Example:
        >>> manager = open_manager(tempfile.mkdtemp())
        >>> save(manager, 3, {"w": jnp.ones(2)}, {"epoch": 1})
        >>> restore(manager, {"w": jnp.zeros(2)})[1]
        {'epoch': 1}
    """
    step, folder, leaves, record = _read_record(manager, step)
    _check_leaves(leaves, _describe(like), folder)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)),
        like,
    )
    try:
        with quiet_orbax():
            items = manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
            )
    except Exception as error:
        raise _corrupt(folder, error) from error
    found = _describe(items["state"], checksum=True)
    if damaged := [path for path in leaves if found[path] != leaves[path]]:
        raise _corrupt(folder, f"checksums differ at {', '.join(damaged)}")
    return items["state"], record


def read_newest(
    manager: ocp.CheckpointManager,
    read: Callable[[int], T],
    *,
    say: Callable[[str], None] = warnings.warn,
) -> T | None:
    """Reads the newest checkpoint that is whole; those after it are renamed to `STEP.damaged`.

    With several processes only the newest one is tried, because they must all read the same one.

    Args:
        manager: from `open_manager`.
        read: function of a step that reads its checkpoint, such as with `restore`. It is called
            with earlier and earlier steps as long as it raises `Damaged`.
        say: is told of each checkpoint that is damaged.

    Returns:
        What `read` returns; None if there is no checkpoint.

    Raises:
        Damaged: if no checkpoint is whole; nothing was renamed.

    Example:
        >>> manager = open_manager(tempfile.mkdtemp())
        >>> for step in (1, 2):
        ...     save(manager, step, {"w": jnp.full(2, step)}, {})
        >>> _ = Path(str(manager.directory), "2", "record", "metadata").write_text("{}")
        >>> def read(step):
        ...     return restore(manager, {"w": jnp.ones(2, int)}, step)[0]
        >>> read_newest(manager, read, say=print)["w"].tolist()
        checkpoint ...2 is corrupt (...); it was renamed to 2.damaged, and the one before it is ...
        [1, 1]
    """
    damaged: list[tuple[int, Damaged]] = []
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            found = read(step)
        except Damaged as error:
            if jax.process_count() > 1:
                raise
            damaged.append((step, error))
            continue
        for later, error in damaged:
            name = _set_aside(Path(str(manager.directory)) / str(later))
            reason = str(error).partition(";")[0]
            say(f"{reason}; it was renamed to {name}, and the one before it is used.")
        if damaged:
            manager.reload()
        return found
    if damaged:
        raise damaged[0][1]
    return None


def _set_aside(folder: Path) -> str:
    """Renames the folder of a checkpoint so that Orbax no longer sees it; returns its name."""
    name, number = f"{folder.name}.damaged", 1
    while (folder.parent / name).exists():
        number += 1
        name = f"{folder.name}.damaged-{number}"
    folder.rename(folder.parent / name)
    return name


def delete_unfinished(folder: str | os.PathLike[str]) -> None:
    """Deletes the parts of checkpoints that killed runs have left, once for all processes.

    Call it where no other run can be writing, such as inside of `files.locked`.

    Args:
        folder: folder of the checkpoints; it need not exist.

    Example:
        >>> delete_unfinished("/nowhere")
    """

    def delete() -> None:
        for path in Path(folder).glob("*.orbax-checkpoint-tmp*"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)

    on_first(delete)


def read_record(manager: ocp.CheckpointManager, step: int | None = None) -> dict[str, Any]:
    """Reads only the record of a checkpoint, not its arrays.

    The record suffices to build the shapes to restore into.

    Args:
        manager: from `open_manager`.
        step: step of the checkpoint; None for the newest.

    Returns:
        The record.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        Damaged: if it is corrupt.

    Example:
        >>> manager = open_manager(tempfile.mkdtemp())
        >>> save(manager, 3, {"w": jnp.ones(2)}, {"epoch": 1})
        >>> read_record(manager)
        {'epoch': 1}
    """
    return _read_record(manager, step)[-1]


def fingerprint(manager: ocp.CheckpointManager, step: int | None = None) -> str:
    """Identifies the state of a checkpoint by a hash, without reading its arrays.

    Args:
        manager: from `open_manager`.
        step: step of the checkpoint; None for the newest.

    Returns:
        A hash of the paths, shapes, dtypes and checksums of all leaves, 12 hexadecimal digits.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        Damaged: if it is corrupt.

    Example:
        >>> manager = open_manager(tempfile.mkdtemp())
        >>> for step in (1, 2):
        ...     save(manager, step, {"w": jnp.full(2, step)}, {})
        >>> fingerprint(manager, 1) == fingerprint(manager)
        False
    """
    leaves = _read_record(manager, step)[2]
    return hashlib.sha256(json.dumps(leaves, sort_keys=True).encode()).hexdigest()[:12]


def _read_record(
    manager: ocp.CheckpointManager, step: int | None
) -> tuple[int, Path, dict[str, list], dict[str, Any]]:
    """Returns step, folder, description of the leaves, and record of a checkpoint."""
    step = manager.latest_step() if step is None else step
    if step is None:
        raise FileNotFoundError(f"{manager.directory} holds no checkpoint.")
    folder = Path(str(manager.directory)) / str(step)
    try:
        with quiet_orbax():
            items = manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))
        content = files.unseal(items["record"], "its record")
        _RECORD(content, "its record")
    except Exception as error:  # Orbax, JSON and the file system raise different kinds
        raise _corrupt(folder, error) from error
    return step, folder, content["leaves"], content["record"]


@contextlib.contextmanager
def stop_signals(*signals: signal.Signals) -> Iterator[list[signal.Signals]]:
    """Records termination signals instead of exiting, so that a loop can save first.

    A second signal of the same kind acts as usual. Use it in the main thread, as Python demands.

    Args:
        *signals: signals to record; default SIGTERM and SIGINT.

    Yields:
        A list to which each signal that arrives is appended.

    Example:
        >>> import os
        >>> with stop_signals() as stopped:
        ...     os.kill(os.getpid(), signal.SIGTERM)
        >>> stopped == [signal.SIGTERM]
        True
    """
    received: list[signal.Signals] = []
    before: dict[signal.Signals, Any] = {}

    def note(number: int, frame: Any) -> None:
        del frame
        received.append(signal.Signals(number))
        signal.signal(number, before[signal.Signals(number)])

    for kind in signals or (signal.SIGTERM, signal.SIGINT):
        before[kind] = signal.signal(kind, note)
    try:
        yield received
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Silences what Orbax prints of errors that it raises as well, inside a `with` block.

    It logs an error in each of its threads, with tracebacks, and drops coroutines that complain
    when the garbage collector finds them. After an error they are therefore collected at once. The
    functions of this module that save and restore do so in such a block, and leave loggers and
    `sys.unraisablehook` as they were.

    Yields:
        Nothing.

    Example:
        >>> with quiet_orbax():
        ...     logging.getLogger("asyncio").error("Exception was never retrieved: /orbax/a.py")
    """
    before, working = sys.unraisablehook, True

    def keeps(record: logging.LogRecord) -> bool:
        error, text = record.exc_info[1] if record.exc_info else None, record.getMessage()
        is_of_orbax = "_SignalingThread" in text or "orbax" in text and "never retrieved" in text
        return not (is_of_orbax or is_of_loop(error))

    def is_of_loop(error: Any) -> bool:
        return isinstance(error, RuntimeError) and "Event loop is closed" in str(error)

    def quiet(found: Any) -> None:
        code = getattr(found.object, "cr_code", None)  # that of a coroutine
        is_of_orbax = code is not None and "orbax" in code.co_filename
        if not (working and (is_of_orbax or is_of_loop(found.exc_value))):
            before(found)

    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    sys.unraisablehook = quiet
    for logger in loggers:
        logger.addFilter(keeps)
    failed = True
    try:
        yield
        failed = False
    finally:
        if failed:
            gc.collect()
        working = False
        for logger in loggers:
            logger.removeFilter(keeps)
        if sys.unraisablehook is quiet:  # nobody has put another one around it
            sys.unraisablehook = before


def _describe(tree: PyTree, checksum: bool = False) -> dict[str, list[Any]]:
    """Maps the path of each leaf to [shape, dtype] or [shape, dtype, CRC-32 of its bytes]."""
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        row = [list(leaf.shape), str(leaf.dtype)]
        if checksum:
            is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            values = jax.random.key_data(leaf) if is_key else leaf
            row.append(zlib.crc32(on_host(values).tobytes()))
        leaves[jax.tree_util.keystr(path, simple=True, separator="/")] = row
    return leaves


def _check_leaves(saved: dict[str, list], wanted: dict[str, list], folder: Path) -> None:
    """Raises an error that lists every leaf whose presence, shape or dtype differs."""
    bad = [f"  {path}: not in the checkpoint" for path in wanted if path not in saved]
    bad += [f"  {path}: only in the checkpoint" for path in saved if path not in wanted]
    for path in wanted:
        if path in saved and saved[path][:2] != wanted[path]:
            (shape, dtype), (shape_now, dtype_now) = saved[path][:2], wanted[path]
            bad.append(f"  {path}: {dtype}{shape} in the checkpoint, {dtype_now}{shape_now} now")
    if bad:
        raise ValueError(
            f"checkpoint {folder} belongs to a different model or optimizer:\n"
            + "\n".join(bad)
            + "\n"
            "Use the same options as that run, or a different folder."
        )


def _corrupt(folder: Path, reason: Any) -> Damaged:
    """Makes the error for a checkpoint that cannot be read back."""
    reason = _shortened(reason) if isinstance(reason, Exception) else reason
    unreadable = ", ".join(_unreadable(folder))
    return Damaged(
        f"checkpoint {folder} is corrupt ({f'{unreadable}: ' if unreadable else ''}{reason}); move "
        "it away to continue from the checkpoint before it, or start again in a different folder."
    )


def _shortened(error: Exception) -> str:
    """Returns kind and message of an error in one line; that of TensorStore may have pages."""
    # The source of an error comes last in "...: No space left on device [OS error 28: ...]".
    text = f"{type(error).__name__}: {error}".partition(" [source locations=")[0]
    text = " ".join(text.split()).replace(";", ",")
    return text if len(text) <= 300 else f"{text[:150]} ... {text[-150:]}"


def _unreadable(folder: Path) -> list[str]:
    """Lists the files of a checkpoint that must be JSON and are not."""
    names = ["record/metadata", "state/_METADATA", "state/_sharding"]
    with contextlib.suppress(OSError):
        names += [f"state/array_metadatas/{p.name}" for p in folder.glob("state/array_metadatas/*")]
    found = []
    for name in names:
        try:
            if read_json(folder / name) is None and name == "record/metadata":
                found.append(name)
        except (OSError, ValueError):
            found.append(name)
    return found
