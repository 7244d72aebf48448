"""The one routine behind all drivers: prune, go back to a state and a step, train again, repeat.

Each training is a stage with a folder of its own:

    stage.json      what leads to it; a folder with another history is refused
    checkpoints/    the newest one, and those that later stages need
    round.json      the result; a stage that has it is skipped
"""

import math
import shutil
import warnings
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypedDict, Unpack

import jax

from jaxprune import checkpoints, stats
from jaxprune.masks import apply_masks, get_masks, set_masks
from jaxprune.rewinding import _tasks
from jaxprune.rewinding._steps import set_step
from jaxprune.rewinding._tasks import Guard, Recipe, Round, Task, get, replace


class Prune(Protocol):
    """What prunes between two rounds: `jaxprune.prune` with some arguments given.

    Example:
        >>> import functools
        >>> import jaxprune
        >>> prune: Prune = functools.partial(jaxprune.prune, budget=jaxprune.budgets.uniform)
    """

    def __call__(self, params: Any, sparsity: float, *, masks: Any) -> tuple[Any, Any]:
        """The pruned parameters and their masks; what `masks` prunes stays pruned."""
        ...


class Options(TypedDict, total=False):
    """Keywords that all drivers share.

    Example:
        >>> options: Options = {"iterative": False, "save_every": 500}
    """

    name: str  # folder in the workdir and `Round.method`; default the name of the driver
    iterative: bool  # True: each round prunes the one before it; False: the dense network
    prune: Prune  # default global magnitude; give it the `prunable` of `fixed_mask_transform`
    save_every: int  # steps between two checkpoints of a training, default 1000
    on_round: Callable[[Round, Any], None]  # gets each trained network, before it counts as done


class Stage(NamedTuple):
    """The training of one network.

    Example:
        >>> dense = Stage(Path("runs/dense"), 0, 1.0, Recipe("new", 0, 600), before=None)
        >>> dense.recipe.steps
        600
    """

    folder: Path
    number: int  # 0 is the dense training
    density: float
    recipe: Recipe
    before: "Stage | None"  # whose network is pruned; None for the dense training


def train_dense(
    task: Task, workdir: str | Path, *, keep: Collection[int] = (), **options: Unpack[Options]
) -> Round:
    """Trains the dense network that the rounds of all drivers in a workdir start from.

    Drivers call this themselves. Call it first where several of them share a workdir and need
    weights of different steps.

    Args:
        task: the training.
        workdir: gets the folder `dense`. What is done there is not done again.
        keep: steps whose checkpoints later rounds need, besides the last one.
        **options: `save_every` and `on_round` of `Options`.

    Returns:
        The `Round` of the dense network.

    Raises:
        ValueError: if a step is not in the training, or the training went past it without
            keeping its checkpoint; and as `retrain`.

    Example:
        >>> train_dense(task, workdir, keep=[2]).total_steps
        20
    """
    keep = sorted(set(keep) - {0})  # step 0 is `task.init(0)`
    if not all(0 < step <= task.steps for step in keep):
        raise ValueError(f"`keep` must hold steps of the training, 0 to {task.steps}; got {keep}.")
    stage = _dense_stage(task, workdir)
    saved = _saved_steps(stage)
    if missing := [step for step in keep if saved and step < max(saved) and step not in saved]:
        raise ValueError(
            f"{stage.folder} has no checkpoint of step {missing[0]}, and its training went past "
            f"it: it has {saved}. Use another workdir, or delete that folder; call "
            f"`train_dense(task, workdir, keep={keep})` before the drivers."
        )
    return _run(task, stage, task.steps, options, always=keep)


def retrain(
    task: Task,
    workdir: str | Path,
    recipe: Recipe,
    densities: Sequence[float],
    *,
    guard: Guard | None = None,
    **options: Unpack[Options],
) -> list[Round]:
    """Prunes to each density and trains again; every driver is this with a recipe.

    Args:
        task: the training.
        workdir: gets a folder for the dense training and one for this method, with a stage for
            each density. A stage that is done is skipped, one that was stopped goes on.
        recipe: weights, schedule and length of each training.
        densities: fraction of the weights that each round keeps, falling; see `densities`.
        guard: when to warn, and to rewind weights instead.
        **options: see `Options`.

    Returns:
        The `Round` of the dense network, then one for each density.

    Raises:
        ValueError: if the recipe does not fit the training, densities do not fall, the optimizer
            has no schedule or no masks, a checkpoint is missing or of another model, the workdir
            holds another run, or a training diverges.

    Example:
        >>> recipe = Recipe(weights_from="trained", schedule_from=10, steps=10)
        >>> rounds = retrain(task, workdir, recipe, [0.5], name="half", iterative=False)
        >>> rounds[-1].method, rounds[-1].total_steps
        ('half', 30)
    """
    _tasks.check_densities(densities)
    return run_rounds(task, workdir, recipe, densities, guard=guard, **options)


def run_rounds(
    task: Task,
    workdir: str | Path,
    recipe: Recipe,
    densities: Sequence[float],
    *,
    guard: Guard | None = None,
    **options: Unpack[Options],
) -> list[Round]:
    """`retrain` for any densities."""
    method = options.setdefault("name", "retrain")
    fallback = None if guard is None or guard.weights_from is None else guard.weights_from
    recipes = [recipe] if fallback is None else [recipe, rewound(task, fallback)]
    for each in recipes:
        _tasks.check_recipe(task, each)
    early = {each.weights_from for each in recipes if isinstance(each.weights_from, int)}
    rounds = [train_dense(task, workdir, keep=early, **options)]
    stages = [_dense_stage(task, workdir)]
    for number, density in enumerate(densities, start=1):
        last = -1 if options.get("iterative", True) else 0
        before, spent = stages[last], rounds[last].total_steps
        folder = Path(workdir) / method / f"round-{number}-density-{density:.6g}"
        stage = Stage(folder, number, density, recipe, before)
        done = _run(task, stage, spent + recipe.steps, options)
        if guard and (note := _harm(guard, recipe, rounds[0], done)):
            if fallback is not None:
                note += f"; from here on the weights are rewound to step {fallback}"
                _delete_checkpoints(stage)
                recipe = recipes[1]
                folder = folder.with_name(f"{folder.name}-weights-{fallback}")
                stage = Stage(folder, number, density, recipe, before)
                done = _run(task, stage, done.total_steps + recipe.steps, options)
            warnings.warn(note, stacklevel=4)
            done = done._replace(note=note)
        if number > 1:  # nothing goes back to it any more
            _delete_checkpoints(stages[-1])
        stages.append(stage)
        rounds.append(done)
    return rounds


def rewound(task: Task, step: int) -> Recipe:
    """Weights and schedule from a step, to the end of the schedule."""
    return Recipe(step, step, task.steps - step)


def _dense_stage(task: Task, workdir: str | Path) -> Stage:
    return Stage(Path(workdir) / "dense", 0, 1.0, Recipe("new", 0, task.steps), None)


def _run(
    task: Task, stage: Stage, total_steps: int, options: Options, always: Collection[int] = ()
) -> Round:
    """The result of a stage: read from its folder, or trained from its newest checkpoint on."""
    folder, recipe, history = stage.folder, stage.recipe, {"history": _history(stage)}
    if (saved := checkpoints.read_json(folder / "stage.json")) is None:
        checkpoints.check_writable(folder)
        checkpoints.write_json(folder / "stage.json", history)
    else:
        checkpoints.check_config(saved, history, str(folder))
    if (result := checkpoints.read_json(folder / "round.json")) is not None:
        return Round(**result)

    like = jax.tree.map(_abstract, task.init(0))
    manager = checkpoints.open_manager(folder / "checkpoints", keep=1, always=always)
    step, stop = manager.latest_step(), recipe.schedule_from + recipe.steps
    if step is None:
        step = recipe.schedule_from
        state = _placed(_begin(task, stage, like, options), like)
    else:
        state, _ = checkpoints.restore(manager, like, step)
    every = options.get("save_every", 1000)
    while step < stop:
        due = min([stop, (step // every + 1) * every, *(k for k in always if k > step)])
        state = task.train(state, step, due, stage.number)
        if not stats.all_finite(get(state, "params")):
            raise ValueError(
                f"{folder}: the parameters are not finite after step {due}; lower the learning "
                f"rate. Everything up to step {step} is kept."
            )
        checkpoints.save(manager, due, state, {})
        step = due
    manager.close()
    done = Round(
        method=options.get("name", "dense") if stage.before else "dense",
        number=stage.number,
        density=_tasks.density_of(get_masks(get(state, "opt_state"))),
        score=float(task.evaluate(state)),
        steps=recipe.steps,
        total_steps=total_steps,
        checkpoint_bytes=_bytes(folder / "checkpoints"),
    )
    if not math.isfinite(done.score):
        raise ValueError(f"{folder}: `evaluate` must return a finite number, but gave {done.score}")
    if hook := options.get("on_round"):
        hook(done, state)
    checkpoints.write_json(folder / "round.json", done._asdict())
    return done


def _begin(task: Task, stage: Stage, like: Any, options: Options) -> Any:
    """The state that a stage starts from."""
    source = stage.recipe.weights_from
    if stage.before is None:
        return task.init(0)
    trained = _restore(stage.before, like)
    prune = options.get("prune", _tasks.prune_globally)
    held = get_masks(get(trained, "opt_state"))
    _, masks = prune(get(trained, "params"), 1 - stage.density, masks=held)
    if source == "trained":
        state = trained
    elif source in ("new", 0):
        state = task.init(stage.number if source == "new" else 0)
    else:
        dense = stage.before
        while dense.before is not None:
            dense = dense.before
        state = _restore(dense, like, source)
    opt_state = set_step(get(state, "opt_state"), stage.recipe.schedule_from)
    return replace(
        state,
        params=apply_masks(get(state, "params"), masks),
        opt_state=set_masks(opt_state, masks),
    )


def _restore(stage: Stage, like: Any, step: Any = None) -> Any:
    """A checkpoint of a stage, the newest unless told."""
    saved = _saved_steps(stage)
    if not saved or step not in (None, *saved):
        what = "checkpoint any more" if step is None else f"checkpoint of step {step}"
        raise ValueError(
            f"{stage.folder} has no {what}, and a round needs it to start from. Use another "
            "workdir or another `name`."
        )
    manager = checkpoints.open_manager(stage.folder / "checkpoints", keep=len(saved))
    state, _ = checkpoints.restore(manager, like, step)
    manager.close()
    return state


def _history(stage: Stage) -> list[Any]:
    """Density and recipe of all stages up to this one, as JSON."""
    own = [stage.density, list(stage.recipe)]
    return [own] if stage.before is None else [*_history(stage.before), own]


def _harm(guard: Guard, recipe: Recipe, dense: Round, done: Round) -> str:
    """What a guard says of a round; empty if nothing."""
    loss = dense.score - done.score
    if recipe.weights_from != "trained" or done.density < guard.density or loss <= guard.margin:
        return ""
    return (
        f"{done.method} lost {loss:.4f} of {dense.score:.4f} at density {done.density:.3f}, more "
        f"than the margin of {guard.margin:g}"
    )


def _saved_steps(stage: Stage) -> list[int]:
    """Steps of a stage whose checkpoints are on disk."""
    folders = (stage.folder / "checkpoints").glob("*")
    return sorted(int(folder.name) for folder in folders if folder.name.isdecimal())


def _delete_checkpoints(stage: Stage) -> None:
    shutil.rmtree(stage.folder / "checkpoints", ignore_errors=True)


def _bytes(folder: Path) -> int:
    """Size on disk of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding of an array."""
    sharding = getattr(leaf, "sharding", None)
    return jax.ShapeDtypeStruct(jax.numpy.shape(leaf), leaf.dtype, sharding=sharding)


def _placed(state: Any, like: Any) -> Any:
    """The state on the devices that it is trained on; pruning may have moved some of it."""
    leaves, structure = jax.tree.flatten(state)
    shardings = [leaf.sharding for leaf in jax.tree.leaves(like)]
    placed = [jax.device_put(*pair) for pair in zip(leaves, shardings, strict=True)]
    return jax.tree.unflatten(structure, placed)
