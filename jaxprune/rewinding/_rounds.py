"""Runs the rounds of all drivers: prune, rewind, train again, repeat."""

import difflib
import operator
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Unpack

from jaxprune import trees
from jaxprune.masks import get_masks, set_masks
from jaxprune.rewinding import _history, _tasks
from jaxprune.rewinding._stages import (
    Options,
    Prune,
    Stage,
    delete_checkpoints,
    read_result,
    run,
    write_result,
)
from jaxprune.rewinding._steps import set_step
from jaxprune.rewinding._tasks import Guard, Recipe, Round, Task, get, whole


def train_dense(
    task: Task, workdir: str | Path, *, keep: Collection[int] = (), **options: Unpack[Options]
) -> Round:
    """Trains the dense network that the rounds of all drivers in a workdir start from.

    Drivers call this themselves. Call it first if several of them share a workdir and need weights
    of different steps.

    Args:
        task: the training.
        workdir: folder of the results; this uses its subfolder `dense`. A finished training there
            is read, not repeated.
        keep: steps whose checkpoints later rounds need, besides the last one.
        **options: `save_every`, `on_round` and `overwrite` of `Options`.

    Returns:
        The `Round` of the dense network.

    Raises:
        ValueError: if a step is not in the training, or the training went past it without keeping
            its checkpoint; and as for `retrain`.

    Example:
        >>> train_dense(task, workdir, keep=[2]).total_steps
        20
    """
    _check_options(options)
    keep = sorted({whole("keep", step) for step in keep} - {0})  # step 0 is `task.init(0)`
    if not all(0 < step <= task.steps for step in keep):
        raise ValueError(f"`keep` must hold steps of the training, 0 to {task.steps}; got {keep}.")
    return run(task, dense_stage(task, workdir), operator.index(task.steps), options, keep)


def retrain(
    task: Task,
    workdir: str | Path,
    recipe: Recipe,
    densities: Sequence[float],
    *,
    guard: Guard | None = None,
    **options: Unpack[Options],
) -> list[Round]:
    """Prunes to each density and trains again; every driver calls this with a recipe.

    Args:
        task: the training.
        workdir: folder of the results: a subfolder for the dense training and one for this method,
            with a stage for each density. A finished stage is skipped and a stopped one continues.
            A stage of a different task, recipe or pruning rule is an error, see
            `Options.overwrite`.
        recipe: weights, schedule and length of each training.
        densities: fraction of the weights that each round keeps, decreasing; see `densities`.
        guard: when to warn that learning-rate rewinding harms, and to rewind weights instead.
        **options: see `Options`.

    Returns:
        The `Round` of the dense network, then one for each density.

    Raises:
        ValueError: if the recipe does not fit the training, densities do not decrease, the
            optimizer has no schedule or no masks, a checkpoint is missing or belongs to a different
            model, the workdir holds a different run, or a training diverges.

    Example:
        >>> recipe = Recipe(weights_from="trained", schedule_from=10, steps=10)
        >>> rounds = retrain(task, workdir, recipe, [0.5], name="half", iterative=False)
        >>> rounds[-1].method, rounds[-1].total_steps
        ('half', 30)
    """
    _tasks.check_densities(densities)
    options.setdefault("name", "retrain")
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
    """Runs `retrain` without its rule that densities decrease."""
    _check_options(options)
    recipes = [_tasks.checked_recipe(task, recipe)]
    fallback = guard.weights_from if guard else None
    if fallback is not None:
        recipes.append(_tasks.checked_recipe(task, rewound(task, fallback)))
    early = {each.weights_from for each in recipes if isinstance(each.weights_from, int)} - {0}
    name, prune = options.get("name", "retrain"), options.get("prune", _tasks.prune_globally)
    rule = _history.rule_of(prune, options.get("rule"))
    dense = dense_stage(task, workdir)
    if read_result(dense) is None:
        _rehearse(task, prune, float(densities[0]))
    rounds, stages = [run(task, dense, dense.recipe.steps, options, early)], [dense]
    recipe, suffix = recipes[0], ""
    for number, density in enumerate(map(float, densities), start=1):
        last = -1 if options.get("iterative", True) else 0
        before, spent = stages[last], rounds[last].total_steps
        folder = Path(workdir) / name / f"round-{number}-density-{density:.6g}{suffix}"
        history = _history.of_round(before.history, number, density, recipe, rule)
        stage = Stage(folder, number, density, recipe, before, prune, history)
        done = run(task, stage, spent + recipe.steps, options)
        if guard and (note := _harm(guard, stage, rounds[0], done)):
            if fallback is not None:
                note += f"; from this round on, the weights are rewound to step {fallback}"
                harmful, recipe, suffix = stage, recipes[1], f"-weights-{fallback}"
                history = _history.of_round(before.history, number, density, recipe, rule)
                folder = Path(f"{folder}{suffix}")
                stage = stage._replace(folder=folder, recipe=recipe, history=history)
                done = run(task, stage, done.total_steps + recipe.steps, options)
                delete_checkpoints(harmful)
            warnings.warn(note, stacklevel=4)
            done = done._replace(note=note)
            write_result(stage, done)
        if number > 1:  # no later round starts from the stage before this one
            delete_checkpoints(stages[-1])
        stages.append(stage)
        rounds.append(done)
    return rounds


def rewound(task: Task, step: int) -> Recipe:
    """Makes the recipe of weights and schedule from a step, to the end of the schedule."""
    return Recipe(step, step, task.steps - step)


def dense_stage(task: Task, workdir: str | Path) -> Stage:
    """Makes the stage of the dense training of a task in a workdir."""
    recipe, history = Recipe("new", 0, operator.index(task.steps)), _history.of_dense(task)
    return Stage(Path(workdir) / "dense", 0, 1.0, recipe, None, None, history)


def _check_options(options: Options) -> None:
    """Raises for keywords and values that no driver accepts."""
    known = list(Options.__annotations__)
    for unknown in options.keys() - set(known):
        near = difflib.get_close_matches(unknown, known, n=1)
        hint = f"; did you mean `{near[0]}`?" if near else f"; use one of {', '.join(known)}"
        raise TypeError(f"unexpected keyword `{unknown}`{hint}")
    if options.get("save_every", 1) < 1:
        raise ValueError(f"`save_every` must be at least 1, but is {options.get('save_every')}.")
    name = options.get("name", "a")
    if not _is_folder_name(name):
        raise ValueError(
            f"`name` must be a folder name other than `dense`, `.` and `..`; got {name!r}."
        )
    if not (isinstance(options.get("rule", "a"), str) and options.get("rule", "a")):
        raise ValueError(f"`rule` must be a text that names `prune`; got {options.get('rule')!r}.")
    if not trees.is_rule(options.get("prune", _tasks.prune_globally)):
        raise ValueError(
            f"`prune` must be a function, but is a tree ({type(options.get('prune')).__name__}). "
            "If it holds scores, give `functools.partial(jaxprune.prune, score=...)`."
        )


def _is_folder_name(name: Any) -> bool:
    """Tells whether a name is that of a folder of rounds, and leads nowhere else."""
    if not isinstance(name, str) or name in ("", ".", "..", "dense"):
        return False
    return not any(char in name for char in ("/", "\\", "\0"))


def _rehearse(task: Task, prune: Prune, density: float) -> None:
    """Prunes and rewinds an untrained state, so that mistakes raise before the training."""
    state = task.init(0)
    opt_state = set_step(get(state, "opt_state"), 0)
    _, masks = prune(get(state, "params"), 1 - density, masks=get_masks(opt_state))
    set_masks(opt_state, masks)


def _harm(guard: Guard, stage: Stage, dense: Round, done: Round) -> str:
    """Returns the warning of a guard about a round, or an empty text."""
    loss, trained = dense.score - done.score, stage.recipe.weights_from == "trained"
    if not trained or stage.density < guard.density or loss <= guard.margin:
        return ""
    return (
        f"{done.method} lost {loss:.4f} of {dense.score:.4f} at density {done.density:.3f}, more "
        f"than the margin of {guard.margin:g}"
    )
