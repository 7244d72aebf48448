"""Runs one training on disk: starts, resumes, finishes or reads it.

Each training is a stage with a separate folder:

    stage.json      its history, see `_history.py`; a folder with a different history is an error
    checkpoints/    the newest one, and those that later stages need
    round.json      the result; a stage that has it is skipped

Both JSON files have a version and a checksum. A stage is locked while it is trained.
"""

import contextlib
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import checkpoints, files, processes, stats, trees
from jaxprune.files import schemas
from jaxprune.masks import apply_masks, get_masks, set_masks
from jaxprune.rewinding import _tasks
from jaxprune.rewinding._history import History, differences
from jaxprune.rewinding._steps import set_step, steps_of
from jaxprune.rewinding._tasks import Recipe, Round, Stopped, Task, get, replace

_VERSION = 2  # of stage.json and round.json; 1 had neither version nor checksum
_WHOLE = schemas.whole()
_STAGE = schemas.record(
    {"history": schemas.table(schemas.anything), "keep": schemas.each(_WHOLE, unique=True)}
)
_ROUND = schemas.record(
    {
        "method": schemas.text,
        "number": _WHOLE,
        "density": schemas.finite,
        "score": schemas.finite,
        "steps": _WHOLE,
        "total_steps": _WHOLE,
        "checkpoint_bytes": _WHOLE,
        "note": schemas.text,
    }
)


class Prune(Protocol):
    """A function that prunes between two rounds: `jaxprune.prune` with some arguments given.

    Example:
        >>> import functools
        >>> import jaxprune
        >>> prune: Prune = functools.partial(jaxprune.prune, budget=jaxprune.budgets.uniform)
    """

    def __call__(self, params: Any, sparsity: float, *, masks: Any) -> tuple[Any, Any]:
        """Returns the pruned parameters and their masks; weights pruned in `masks` remain so."""
        ...


class Options(TypedDict, total=False):
    """The keywords that all drivers share.

    Example:
        >>> options: Options = {"iterative": False, "save_every": 500}
    """

    name: str  # folder in the workdir and `Round.method`; default: the name of the driver
    iterative: bool  # True: each round prunes the one before it; False: the dense network
    prune: Prune  # default: global magnitude; give it the `prunable` of `fixed_mask_transform`
    rule: str  # a name for `prune`, needed if the driver says that it cannot describe it
    overwrite: bool  # replace stages of a different task, recipe or rule; default: raise an error
    save_every: int  # steps between two checkpoints of a training, default 1000
    on_round: Callable[[Round, Any], None]  # gets each trained network before its stage is done


class Stage(NamedTuple):
    """The training of one network.

    Example:
        >>> dense = Stage(Path("runs/dense"), 0, 1.0, Recipe("new", 0, 600), None, None, {})
        >>> dense.recipe.steps
        600
    """

    folder: Path
    number: int  # 0 is the dense training
    density: float
    recipe: Recipe
    before: "Stage | None"  # the stage whose network is pruned; None for the dense training
    prune: Prune | None  # None for the dense training
    history: History  # everything that decides its result


def run(
    task: Task, stage: Stage, total_steps: int, options: Options, keep: Collection[int] = ()
) -> Round:
    """Returns the result of a stage: reads it if the stage is done, otherwise trains the stage."""
    folder, overwrite = stage.folder, options.get("overwrite", False)
    checkpoints.check_writable(folder)
    keep = processes.on_first(lambda: claim(stage, keep, overwrite=overwrite))
    if (result := read_result(stage)) is not None:
        return result
    with locked_on_first(folder) as check:
        if (result := read_result(stage)) is not None:  # another process finished it meanwhile
            return result
        return _finish(task, stage, total_steps, options, keep, check)


@contextlib.contextmanager
def locked_on_first(folder: Path) -> Iterator[Callable[[], None]]:
    """Locks the folder of a stage, once for all processes.

    Yields:
        A function that raises on all of them if the folder was deleted meanwhile.
    """
    held: list[files.Lock] = []
    with contextlib.ExitStack() as stack:

        def lock() -> None:
            held.append(stack.enter_context(files.locked(folder, "the stage")))

        def check() -> None:
            processes.on_first(lambda: [own.check() for own in held])

        processes.on_first(lock)
        yield check


def _finish(
    task: Task,
    stage: Stage,
    total_steps: int,
    options: Options,
    keep: Collection[int],
    check: Callable[[], None],
) -> Round:
    """Trains a stage and writes its result; `check` tells whether its folder is still there."""
    folder = stage.folder
    state = _train(task, stage, keep, options.get("save_every", 1000), check)
    score = float(task.evaluate(state))
    done = Round(
        method=options.get("name", "dense") if stage.before else "dense",
        number=stage.number,
        density=_tasks.density_of(get_masks(get(state, "opt_state"))),
        score=processes.on_first(lambda: score),  # all processes must decide alike
        steps=stage.recipe.steps,
        total_steps=total_steps,
        checkpoint_bytes=_bytes(state) * len(saved_steps(stage)),
    )
    if not math.isfinite(done.score):
        raise ValueError(
            f"{folder}: `evaluate` must return a finite number, but returned {done.score}."
        )
    if hook := options.get("on_round"):
        hook(done, state)
    check()
    write_result(stage, done)
    return done


def _train(
    task: Task, stage: Stage, keep: Collection[int], every: int, check: Callable[[], None]
) -> Any:
    """Trains a stage to its end, from its newest checkpoint if it has one; returns the state."""
    like, stop = task.init(0), stage.recipe.schedule_from + stage.recipe.steps
    checkpoints.delete_unfinished(stage.folder / "checkpoints")
    opened = checkpoints.open_manager(stage.folder / "checkpoints", keep=1, always=keep)
    with contextlib.closing(opened) as manager:
        step, state = _start_or_restore(task, stage, manager, like)
        while step < stop:
            due = min([stop, (step // every + 1) * every, *(k for k in keep if k > step)])
            try:
                state = task.train(state, step, due, stage.number)
            except Stopped as stopped:
                _check_trained(stage, stopped.state, step, stopped.step)
                check()
                checkpoints.save(manager, stopped.step, stopped.state, {})
                raise
            _check_trained(stage, state, step, due)
            check()
            checkpoints.save(manager, due, state, {})
            step = due
    return state


def _start_or_restore(task: Task, stage: Stage, manager: Any, like: Any) -> tuple[int, Any]:
    """Returns step and state of the newest checkpoint of a stage, or those that it starts from."""

    def read(step: int) -> tuple[int, Any]:
        return step, checkpoints.restore(manager, _abstract(like), step)[0]

    found = checkpoints.read_newest(manager, read)
    if found is None:
        return stage.recipe.schedule_from, _placed(_begin(task, stage, like), like)
    return found[0], _placed(found[1], like)


def claim(stage: Stage, keep: Collection[int], *, overwrite: bool) -> list[int]:
    """Claims a folder for a stage; a folder with a different history is an error, or deleted.

    Returns:
        The steps whose checkpoints are kept: `keep`, and those that earlier calls asked for.
    """
    folder, path = stage.folder, stage.folder / "stage.json"
    try:
        saved, lines = read_sealed(path, _STAGE), []
        read_round(folder / "round.json")  # raises if it is damaged
        if saved is None and any((folder / n).exists() for n in ("round.json", "checkpoints")):
            saved = {}  # files of an unknown training
        if saved is not None:
            lines = differences(saved.get("history"), stage.history)
    except ValueError as error:
        if not overwrite:
            raise
        saved, lines = None, [str(error)]
    if lines:
        if not overwrite:
            trees.raise_for(
                lines,
                f"`workdir` holds a run with a different configuration in {folder}. Use a "
                "different `workdir` or `name`, or replace that run with `overwrite=True`. It "
                "differs in:",
            )
        with files.locked(folder, "the stage"):
            shutil.rmtree(folder)
        folder.mkdir()
        saved = None
    past = _steps_in(folder)
    keep = sorted({*keep, *(saved or {}).get("keep", [])})
    if missing := [step for step in keep if past and step < max(past) and step not in past]:
        raise ValueError(
            f"{folder} must have a checkpoint of step {missing[0]}, but its training went past "
            f"that step and kept {past}. Use a different `workdir` or delete that folder, and call "
            f"`train_dense(task, workdir, keep={keep})` before the drivers."
        )
    now = {"history": stage.history, "keep": keep}
    if saved != now:
        write_sealed(path, now)
    return keep


def write_result(stage: Stage, done: Round) -> None:
    """Marks a stage as done."""
    processes.on_first(lambda: write_sealed(stage.folder / "round.json", done._asdict()))


def read_result(stage: Stage) -> Round | None:
    """Reads the result of a stage; None before it is done."""
    found = processes.on_first(lambda: read_round(stage.folder / "round.json"))
    return None if found is None else Round(*found)


def read_round(path: str | os.PathLike[str]) -> Round | None:
    """Reads the result of a stage from its file.

    Args:
        path: the file `round.json` in the folder of the stage.

    Returns:
        The `Round`; None if there is no such file.

    Raises:
        ValueError: if the file is damaged or of a different version.

    Example:
        >>> from jaxprune import rewinding
        >>> done = rewinding.train_dense(task, workdir)
        >>> read_round(workdir / "dense" / "round.json") == done
        True
    """
    content = read_sealed(Path(path), _ROUND)
    return None if content is None else Round(**content)


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON with the version and a checksum."""
    checkpoints.write_json(path, files.seal({"version": _VERSION, **content}))


def read_sealed(path: Path, schema: schemas.Schema) -> dict[str, Any] | None:
    """Reads what `write_sealed` wrote, without the version; None if there is no such file."""
    content = files.read_json(path)
    if content is None:
        return None
    version = content.get("version", 1) if isinstance(content, dict) else 1
    if version != _VERSION:
        raise ValueError(
            f"{path} is of version {str(version)[:60]}, but this jaxprune reads {_VERSION}: use a "
            "different `workdir` or `name`, or replace that run with `overwrite=True`."
        )
    content = files.unseal(content, str(path))
    del content["version"]
    schema(content, str(path))
    return content


def saved_steps(stage: Stage) -> list[int]:
    """Lists the steps of a stage whose checkpoints are on disk."""
    return processes.on_first(lambda: _steps_in(stage.folder))


def delete_checkpoints(stage: Stage) -> None:
    """Deletes the checkpoints of a stage that no later stage can start from."""
    folder = stage.folder / "checkpoints"
    processes.on_first(lambda: shutil.rmtree(folder, ignore_errors=True))


def _begin(task: Task, stage: Stage, like: Any) -> Any:
    """Makes the state that a stage starts from."""
    if stage.before is None or stage.prune is None:
        return task.init(0)
    source = stage.recipe.weights_from
    trained = _restore(stage.before, like)
    held = get_masks(get(trained, "opt_state"))
    pruned, masks = stage.prune(get(trained, "params"), 1 - stage.density, masks=held)
    if source == "trained":
        state = replace(trained, params=_placed(pruned, get(like, "params")))
    elif source in ("new", 0):
        state = task.init(stage.number if source == "new" else 0)
    else:
        dense = stage.before
        while dense.before is not None:
            dense = dense.before
        state = _restore(dense, like, source)
    opt_state = set_step(get(state, "opt_state"), stage.recipe.schedule_from)
    opt_state = set_masks(opt_state, masks)  # places them on the devices of the old masks
    params = apply_masks(get(state, "params"), get_masks(opt_state))
    return replace(state, params=params, opt_state=opt_state)


def _check_trained(stage: Stage, state: Any, start: int, stop: int) -> None:
    """Raises if `train` returned a state that violates the contract of `Task`."""
    where = f"{stage.folder}, steps {start} to {stop}"
    if not stats.all_finite(get(state, "params")):
        raise ValueError(
            f"{where}: the parameters are not finite; lower the learning rate. The checkpoint of "
            f"step {start} is kept."
        )
    opt_state = get(state, "opt_state")
    if wrong := sorted({count for count in steps_of(opt_state) if count != stop}):
        raise ValueError(
            f"{where}: the schedule stands at step {wrong[0]} after it. One step of `train` must "
            "be one step of the schedule; inside `optax.MultiSteps`, that is one update."
        )
    if stage.before is None and _tasks.density_of(get_masks(opt_state)) < 1:
        raise ValueError(
            f"{where}: the dense training has pruned. The optimizer must hold masks and never "
            "change them: use `jaxprune.fixed_mask_transform()`."
        )


def _restore(stage: Stage, like: Any, step: Any = None) -> Any:
    """Restores a checkpoint of a stage, the newest if `step` is None."""
    saved = saved_steps(stage)
    if not saved or step not in (None, *saved):
        what = "a checkpoint" if step is None else f"a checkpoint of step {step}"
        raise ValueError(
            f"{stage.folder} must have {what} for a round to start from, but has {saved}. Use a "
            "different `workdir` or `name`."
        )
    opened = checkpoints.open_manager(stage.folder / "checkpoints", keep=len(saved))
    with contextlib.closing(opened) as manager:
        return checkpoints.restore(manager, _abstract(like), step)[0]


def _steps_in(folder: Path) -> list[int]:
    """Lists the steps whose checkpoints are in the folder of a stage."""
    found = (folder / "checkpoints").glob("*")
    return sorted(int(path.name) for path in found if path.name.isdecimal())


def _bytes(state: Any) -> int:
    """Sums the bytes of all arrays; those of files would differ from run to run."""

    def size(leaf: Any) -> int:
        if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
            return jax.random.key_data(leaf).nbytes
        return jnp.size(leaf) * jnp.result_type(leaf).itemsize

    return sum(size(leaf) for leaf in jax.tree.leaves(state))


def _abstract(state: Any) -> Any:
    """Returns shapes, dtypes and shardings of a state."""

    def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
        dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
        sharding = getattr(leaf, "sharding", None)
        return jax.ShapeDtypeStruct(jnp.shape(leaf), dtype, sharding=sharding)

    return jax.tree.map(abstract, state)


def _placed(state: Any, like: Any) -> Any:
    """Gives a state the dtypes, devices and commitment to devices that `init` gives."""
    leaves, structure = jax.tree.flatten(state)
    pairs = zip(leaves, jax.tree.leaves(like), strict=True)
    return jax.tree.unflatten(structure, [_placed_leaf(*pair) for pair in pairs])


def _placed_leaf(leaf: Any, like: Any) -> Any:
    if not isinstance(leaf, jax.Array):
        leaf = jnp.array(leaf, jnp.result_type(leaf))
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return leaf
    if leaf.weak_type:  # a checkpoint drops weak types, so drop them here too
        leaf = jax.lax.convert_element_type(leaf, leaf.dtype)
    if getattr(like, "committed", False):
        return jax.device_put(leaf, like.sharding)
    return jnp.asarray(np.asarray(leaf)) if leaf.committed else leaf
