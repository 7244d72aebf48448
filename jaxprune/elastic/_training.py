"""Trains an elastic network: all phases as one call that resumes."""

import contextlib
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxprune import checkpoints, data, files, processes, sharding, training, trees
from jaxprune.data.pipeline import batches_of_indices
from jaxprune.elastic._gates import Space
from jaxprune.elastic._named import named
from jaxprune.elastic._phases import Phase, phases, sub_networks, trained_widths
from jaxprune.elastic._programs import Programs, Recipe, State, make_programs, parts, resized
from jaxprune.elastic._sorting import consumer_norms, sort_channels
from jaxprune.elastic._space import Choice, largest, smallest

_STATISTICS = 10  # batches that running statistics are measured from


class Stopped(Exception):
    """The error of a training that `should_stop` ended; its checkpoint is on disk.

    Example:
        >>> Stopped("stopped at step 7").args
        ('stopped at step 7',)
    """


class PhaseResult(NamedTuple):
    """What a phase has reached, measured at its end.

    Example:
        >>> PhaseResult("full", 100, 100, 0.9, 0.1).name
        'full'
    """

    name: str
    steps: int  # of the phase
    passes: int  # forward and backward passes of sub-networks in it
    full_accuracy: float  # on the test images, with statistics measured again
    smallest_accuracy: float  # the same for the smallest sub-network


class Trained(NamedTuple):
    """An elastic network after its training.

    Example:
        >>> Trained._fields
        ('space', 'variables', 'results')
    """

    space: Space
    variables: Any  # like `space.variables`; the statistics are those of the full network
    results: tuple[PhaseResult, ...]


class _Run(NamedTuple):
    """What does not change during a training."""

    space: Space
    dataset: data.Dataset
    recipe: Recipe
    phases: tuple[Phase, ...]
    programs: Programs
    rows: Any  # number of a step -> indices of its batch
    seed: int
    mesh: Mesh
    log_every: int
    on_log: Callable[[int, dict[str, Any]], None] | None
    should_stop: Callable[[], bool]


def train(
    network: str | Space,
    dataset: data.Dataset,
    *,
    steps: int = 0,
    workdir: str | Path | None = None,
    phases: Sequence[Phase] | None = None,
    recipe: Recipe | None = None,
    networks: int = 4,
    sandwich: bool = False,
    seed: int = 0,
    mesh: Mesh | None = None,
    save_every: int = 500,
    log_every: int = 50,
    on_log: Callable[[int, dict[str, Any]], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Trained:
    """Trains one network whose sub-networks all work, by progressive shrinking.

    First the full network, which is then the frozen teacher; then sub-networks with small kernels,
    fewer blocks and fewer channels, phase by phase. Each step draws sub-networks from (seed, step,
    number) and adds up the gradients of `cross-entropy + distillation * KL(teacher || network)`.
    Before a phase that opens widths, channels are sorted by importance. Batch norms use the
    statistics of the batch; running statistics are measured again before anything is tested.

    Args:
        network: the name of a network, see `elastic.named`; or a `Space` with a `train` function
            and a dict of variables that has "params".
        dataset: images in memory, such as `data.load("fashion_mnist")`.
        steps: steps of the optimizer over all phases; or give `phases`.
        workdir: folder of checkpoints; a run that finds one there resumes, to the bit. None keeps
            nothing.
        phases: from `elastic.phases`, or others.
        recipe: batch size, rates, losses and augmentation; None for `Recipe()`.
        networks: see `elastic.phases`.
        sandwich: see `elastic.phases`.
        seed: of the initial parameters of a name, of the data and of all draws.
        mesh: devices; None for all of them.
        save_every: steps between two checkpoints; the end of a phase has one as well.
        log_every: steps between two calls of `on_log`; it is called before each checkpoint as well.
        on_log: called with the step and {"phase", "learning_rate", "loss", "accuracy"}, means over
            the steps since the last call.
        should_stop: called after each step; True saves a checkpoint and raises `Stopped`. All
            processes must agree, see `processes.stop_together`.

    Returns:
        A `Trained`.

    Raises:
        ValueError: if the space cannot be trained, a number is out of range, `workdir` holds a run
            with a different space or configuration, or the loss is not finite.
        Stopped: if `should_stop` returned True.

    References:
        Cai et al. Once-for-All: train one network and specialize it for efficient deployment.
        arXiv:1908.09791.

    Example:
        >>> from jaxprune.elastic import extract, smallest, to_module
        >>> digits = data.load("digits")
        >>> trained = train("resnet8", digits, steps=6, networks=1, recipe=Recipe(batch_size=8))
        >>> [result.name for result in trained.results]
        ['full', 'width 1', 'width 2']
        >>> choice = smallest(trained.space.decisions)
        >>> small = extract(trained.space, trained.variables, choice)
        >>> to_module(trained.space, small).widths.stem
        16
    """
    recipe = Recipe() if recipe is None else recipe
    mesh = sharding.make_mesh() if mesh is None else mesh
    space = _space_for(network, dataset, seed) if isinstance(network, str) else network
    own = _planned(space, phases, steps, recipe, networks, sandwich)
    _check(space, own, recipe, mesh, save_every, log_every)
    run = _Run(
        space,
        dataset,
        recipe,
        own,
        make_programs(space, dataset, recipe, mesh, seed),
        batches_of_indices(len(dataset.train.labels), recipe.batch_size, seed=seed),
        seed,
        mesh,
        log_every,
        on_log,
        should_stop,
    )
    if workdir is None:
        return _train(run, None, save_every)
    folder = Path(workdir)
    checkpoints.check_writable(folder)
    with contextlib.ExitStack() as stack:

        def lock() -> None:
            stack.enter_context(files.locked(folder, "the elastic training"))

        processes.on_first(lock)
        checkpoints.delete_unfinished(folder / "checkpoints")
        begins = _teacher_step(own)
        kept = [] if begins is None else [begins]
        opened = checkpoints.open_manager(folder / "checkpoints", keep=1, always=kept)
        with contextlib.closing(opened) as manager:
            return _train(run, manager, save_every)


def _space_for(name: str, dataset: data.Dataset, seed: int) -> Space:
    """Returns the elastic network of a name for the images of a data set."""
    height, width, channels = dataset.train.images.shape[1:]
    if height != width:
        raise ValueError(
            f"`dataset` must have square images for a named network, but they are {height} x "
            f"{width}; give a `Space` instead."
        )
    return named(
        name,
        image_size=height,
        in_channels=channels,
        num_classes=dataset.num_classes,
        seed=seed,
    )


def _planned(
    space: Space,
    own: Sequence[Phase] | None,
    steps: int,
    recipe: Recipe,
    networks: int,
    sandwich: bool,
) -> tuple[Phase, ...]:
    """Returns the phases."""
    if (own is None) == (steps == 0):
        raise ValueError("give either `steps` or `phases`: phases have their own steps.")
    if own is not None:
        return tuple(own)
    return phases(
        space.decisions,
        steps,
        learning_rate=recipe.learning_rate,
        networks=networks,
        sandwich=sandwich,
    )


def _check(
    space: Space,
    own: Sequence[Phase],
    recipe: Recipe,
    mesh: Mesh,
    save_every: int,
    log_every: int,
) -> None:
    """Raises one error that lists all that training lacks."""
    problems = []
    if space.train is None:
        problems.append("`network` has no `train` function; give it to `make_space`")
    if not isinstance(space.variables, dict) or "params" not in space.variables:
        problems.append('`network` must have a dict of variables with "params"')
    if not space.decisions:
        problems.append("`network` has no decisions; train it as any other network")
    problems += [
        f"phase {phase.name}: {phase.steps} steps with {phase.networks} networks, must be positive"
        for phase in own
        if phase.steps < 1 or phase.networks < 1
    ]
    if min(save_every, log_every) < 1:
        problems.append(f"`save_every` {save_every} and `log_every` {log_every} must be positive")
    trees.raise_for(problems, "an elastic network cannot be trained like this:")
    sharding.check_batch(recipe.batch_size, mesh)


def _teacher_step(own: Sequence[Phase]) -> int | None:
    """Returns the step of the teacher: where the first phase that has one begins."""
    start = 0
    for phase in own:
        if phase.teaches:
            return start
        start += phase.steps
    return None


def _train(run: _Run, manager: Any, save_every: int) -> Trained:
    """Trains all phases, from the newest checkpoint if there is one."""
    state = run.programs.place(*parts(run.space.variables))
    step, state, results = _restored(run, manager, state)
    freezes = _teacher_step(run.phases)
    teacher, start = None, 0
    for index, phase in enumerate(run.phases):
        stop = start + phase.steps
        if phase.teaches and teacher is None and step < stop:
            if step == freezes:  # a copy, as the state is donated to the next step
                teacher = jax.tree.map(jnp.copy, (state.params, state.state))
            else:
                teacher = _read_teacher(run, manager, state, freezes)
        if step < stop:
            if step == start:
                state = _entered(run, index, state)
            while step < stop:
                due = min(stop, (step // save_every + 1) * save_every)
                state, step = _steps(run, phase, start, state, step, due, teacher)
                if step == stop:
                    results = (*results, _judged(run, phase, state))
                _save(run, manager, step, state, results)
                if step < due:
                    raise Stopped(f"stopped at step {step}; run the same call again to resume.")
        start = stop
    variables = _measured(run, state, largest(run.space.decisions))
    return Trained(run.space, variables, results)


def _entered(run: _Run, index: int, state: State) -> State:
    """Begins a phase: sorts channels if it opens widths, and starts the optimizer anew."""
    phase, space = run.phases[index], run.space
    params = state.params
    if phase.sort:
        before = run.phases[index - 1] if index else None
        buckets = trained_widths(space.decisions, space.units, before)
        variables = {**state.params, **state.state}
        scores = consumer_norms(space.groups, variables)
        evaluate = jax.jit(lambda own, x: space.masked(space.evaluate)(own, space.full(), x))
        images = run.programs.prepare(_row(run, 0), np.int32(0))[0]
        pixels = space.resolution(largest(space.decisions))
        variables = sort_channels(
            space.groups,
            variables,
            {name: scores[name] for name in buckets},
            buckets=buckets,
            apply=lambda own: evaluate(own, resized(images, pixels)),
        )
        params, rest = parts(variables)
        state = state._replace(state=rest)
    step = state.step
    return run.programs.place(params, state.state)._replace(step=step)


def _steps(
    run: _Run,
    phase: Phase,
    start: int,
    state: State,
    step: int,
    stop: int,
    teacher: Any,
) -> tuple[State, int]:
    """Trains up to a step of a phase that began at `start`; fewer if the run is to stop."""
    programs, decisions = run.programs, run.space.decisions
    sums, pending = programs.zeros(), []
    while step < stop:
        images, labels = programs.prepare(_row(run, step), np.int32(step))
        targets: dict[int | None, Any] = {}
        for choice in sub_networks(decisions, phase, run.seed, step):
            pixels = run.space.resolution(choice)
            if pixels not in targets:
                targets[pixels] = (
                    programs.teach(*teacher, images, pixels)
                    if phase.teaches
                    else np.zeros((len(labels), run.dataset.num_classes), np.float32)
                )
            weight = np.float32(run.recipe.distillation if phase.teaches else 0)
            gates = run.space.gates(choice)
            own = state.params, state.state, gates, images, labels, targets[pixels], weight
            sums, metrics, new = programs.accumulate(sums, *own, pixels)
            pending.append(metrics)
            if not phase.teaches:  # the running statistics of later phases would mix sub-networks
                state = state._replace(state=new)
        rate = phase.rate(step - start)
        state, sums = programs.update(state, sums, np.float32(rate))
        step += 1
        # Several devices on one CPU cannot meet if too many programs wait for their threads.
        if jax.default_backend() == "cpu" and run.mesh.size > 1:
            jax.block_until_ready(state.params)
        if step % run.log_every == 0 or step == stop:
            _log(run, phase, step, rate, pending)
            pending = []
        if run.should_stop():
            break
    return state, step


def _log(run: _Run, phase: Phase, step: int, rate: float, pending: Sequence[Any]) -> None:
    """Reports the means of metrics; raises if the loss is not finite."""
    rows = jax.device_get(list(pending))
    means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    if not np.isfinite(means["loss"]):
        raise ValueError(
            f"the loss is not finite in phase {phase.name} before step {step}; lower "
            "`learning_rate`. Earlier checkpoints are kept."
        )
    if run.on_log is not None:
        run.on_log(step, {"phase": phase.name, "learning_rate": rate, **means})


def _row(run: _Run, step: int) -> jax.Array:
    """Returns the indices of the batch of a step."""
    return sharding.put(run.rows[step], sharding.batch_sharding(run.mesh))


def _measured(run: _Run, state: State, choice: Choice) -> Any:
    """Returns variables with the running statistics of a sub-network."""
    variables = {**state.params, **state.state}
    if not state.state:
        return variables
    gates, pixels = run.space.gates(choice), run.space.resolution(choice)
    images = (
        run.programs.prepare(_row(run, step), np.int32(step))[0] for step in range(_STATISTICS)
    )
    batches = ((gates, resized(own, pixels)) for own in images)
    return training.measure_statistics(run.programs.train, variables, batches)


def _judged(run: _Run, phase: Phase, state: State) -> PhaseResult:
    """Tests the full and the smallest network."""
    found = []
    for choice in (largest(run.space.decisions), smallest(run.space.decisions)):
        own, rest = parts(_measured(run, state, choice))
        gates, pixels = run.space.gates(choice), run.space.resolution(choice)
        tested = run.programs.evaluate(own, rest, gates, run.dataset.test, pixels)
        found.append(tested["test_accuracy"])
    return PhaseResult(phase.name, phase.steps, phase.steps * phase.networks, *found)


def _save(run: _Run, manager: Any, step: int, state: State, results: Sequence[PhaseResult]) -> None:
    """Writes a checkpoint."""
    if manager is not None:
        record = {"run": _history(run), "results": [own._asdict() for own in results]}
        checkpoints.save(manager, step, state, record)


def _restored(run: _Run, manager: Any, like: State) -> tuple[int, State, tuple[PhaseResult, ...]]:
    """Returns step, state and results of the newest checkpoint, or the beginning."""
    if manager is None:
        return 0, like, ()

    def read(step: int) -> Any:
        where, record = str(manager.directory), checkpoints.read_record(manager, step)
        mine, theirs = _history(run), record["run"]
        if mine["space"] != theirs["space"]:
            lines = [f"{name}: {own}" for name, own in theirs["space"].items()]
            trees.raise_for(
                lines,
                f"`workdir` {where} holds the training of a different space; use a different "
                "folder, or the space that it was trained with:",
            )
        checkpoints.check_config(theirs, mine, where)
        return step, checkpoints.restore(manager, like, step)[0], record["results"]

    found = checkpoints.read_newest(manager, read)
    if found is None:
        return 0, like, ()
    step, state, results = found
    return step, state, tuple(PhaseResult(**own) for own in results)


def _read_teacher(run: _Run, manager: Any, like: State, step: int | None) -> tuple[Any, Any]:
    """Returns parameters and state of the teacher: the network as it was at a step."""
    state = (
        checkpoints.restore(manager, like, step)[0]
        if step
        else run.programs.place(*parts(run.space.variables))
    )
    return state.params, state.state


def _history(run: _Run) -> dict[str, Any]:
    """Describes everything that decides the result, ready for JSON."""
    images, labels = run.dataset.train
    return {
        "space": {own.name: [own.kind, list(own.options)] for own in run.space.decisions},
        "phases": [[own._asdict()[name] for name in Phase._fields] for own in run.phases],
        "recipe": run.recipe._asdict(),
        "seed": run.seed,
        "data": [zlib.crc32(images.tobytes()), zlib.crc32(labels.tobytes())],
    }
