"""The stages of a run: a network that shrinks or grows while it trains, as images may do."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxprune import reports, sharding, structure, training, trees
from jaxprune.experiments.experiment import Experiment, Steps
from jaxprune.experiments.kernels import SparseSteps
from jaxprune.experiments.network import as_variables, variables_of
from jaxprune.experiments.teacher import read_teacher, write_teacher


class Compiled(NamedTuple):
    """The training steps of a stage, ready to run."""

    steps: Steps
    peak_bytes: int  # of a step, as XLA plans it, without the data set


class Stages:
    """What a run trains now, and what it will train next.

    `structure.Shrinking` decides, compiles in the background and switches; this class says how a
    stage of an experiment is compiled and where its arrays lie.

    Args:
        experiment: all parts of the run.
        record: from `to_record`, to resume.
        kernels: from `SparseSteps.to_record`, to resume a run with sparse kernels.
        teacher: file of the wide network's variables, with `--teacher`; written at the first cut.
    """

    def __init__(
        self,
        experiment: Experiment,
        record: Mapping[str, Any] | None = None,
        kernels: Mapping[str, Any] | None = None,
        teacher: Path = Path(),
    ) -> None:
        """Finds the stage to begin with; compiles nothing."""
        self._path = teacher
        self._teacher: Any = None  # variables of the wide network, after the first cut
        self.sparse: SparseSteps | None = None  # after `begin`, with sparse kernels
        self._record = kernels
        self.experiment, config = experiment, experiment.config
        self.shrinking = structure.Shrinking(
            experiment.groups,
            steps=experiment.steps,
            mask_updates=experiment.window.updates if config.compact else (),
            cost=experiment.macs,
            make_optimizer=experiment.make_optimizer,
            prepare=self._compile,
            functions={experiment.functions.train: (experiment.example,)},
            policy=structure.Policy(
                switch_steps=config.switch_steps,
                most=config.switches,
                saving=config.saving,
                delay=config.switch_delay,
                multiple=config.multiple or None,
            ),
            phases=experiment.phases,
            growth=experiment.growth(),
            describe=lambda _: self._figures(),
            record=record,
        )

    @property
    def stage(self) -> structure.Stage:
        """The present one."""
        return self.shrinking.stage

    @property
    def steps(self) -> Steps:
        """How the present network is trained and tested; after `begin`."""
        return self.shrinking.prepared.steps

    @property
    def peak_bytes(self) -> int:
        """The most bytes that a step of the present stage takes."""
        return self.shrinking.prepared.peak_bytes

    def like(self) -> training.TrainState:
        """Returns the shapes of the present state, to restore a checkpoint into."""
        return self.experiment.at(self.stage).like

    def create(self) -> training.TrainState:
        """Returns the state at step 0, at the widths that the run begins with."""
        state = self.experiment.create(self.experiment.config.seed)
        if self.stage.cut is None:
            return state
        variables = variables_of(sharding.replicate(state, self.experiment.mesh))
        own = self.stage.network.plan.compact(variables)
        opt_state = self.shrinking.optimizer.init(own["params"])
        return self._placed(state.step, own, opt_state, self.like())

    def begin(self, state: training.TrainState) -> None:
        """Compiles the present stage and, in a resumed run, the one that was decided on."""
        if self.experiment.is_taught(self.stage):
            self._read_teacher()
        self.shrinking.begin(int(state.step), state.opt_state)
        if self.steps.wrapped is not None:
            self.sparse = SparseSteps(self.experiment, self.steps.wrapped, self._record)
            self.sparse.begin(state)

    def advance(self, state: training.TrainState) -> training.TrainState:
        """Decides or switches, if it is time for that."""
        step, coming = int(state.step), self.shrinking.coming
        resizes = coming is not None and coming.step == step and coming.resizes
        if resizes:  # arrays of another size may be split differently
            state = sharding.replicate(state, self.experiment.mesh)
        wrapped, was_taught = self.steps.wrapped, self.experiment.is_taught(self.stage)
        own, opt_state = self.shrinking.advance(step, variables_of(state), state.opt_state)
        now = self.steps.wrapped
        if self.sparse is not None and now is not None and now is not wrapped:
            self.sparse.follow(now, state)  # of another size
        if self.experiment.is_taught(self.stage) and not was_taught:
            params = training.with_averages(state.params, state.opt_state)
            write_teacher(self._path, as_variables(params, state.model_state))
            self._read_teacher()  # so that a resumed run has the same, in arrays of its own
        if not resizes:
            return state
        return self._placed(state.step, own, opt_state, self.steps.like)

    def costs(self) -> dict[str, float]:
        """Returns what a step costs now, for the metrics."""
        known: dict[str, float] = {"peak_bytes": self.peak_bytes, "macs": self.shrinking.cost}
        if self.experiment.is_taught(self.stage):  # one pass forward, of the three of a step
            known["macs"] += self.experiment.macs(self.experiment.groups.plan({})) / 3
        if self.stage.groups:
            known["parameters"] = structure.count_parameters(self.stage.network.plan)
        known |= self.size()
        if self.experiment.config.parts > 1:
            known["parts"] = self.experiment.parts(self.stage)
        return known

    def size(self) -> dict[str, float]:
        """Returns the size of the images now, if it changes during the run."""
        return {"image_height": self.stage.phase[0]} if len(self.experiment.phases) > 1 else {}

    def sparsity(self, state: training.TrainState) -> float:
        """Returns the fraction of the dense parameters that is removed, or only masked so far."""
        network = self.stage.network
        keep = structure.masked_channels(network.groups, state.opt_state)
        left = network.plan.then(network.groups.plan(keep, multiple=1))
        dense = self.experiment.groups.plan({})
        return 1 - structure.count_parameters(left) / structure.count_parameters(dense)

    def describe_last(self) -> str:
        """Returns one line about the last switch."""
        last = self.shrinking.history[-1]
        text = len(last["image_size"]) == 1
        size = " x ".join(map(str, last["image_size"]))
        parts = [f"step {last['step']}: " + (f"{size} bytes" if text else f"images of {size}")]
        if last["parameters"] is not None:
            what = "example" if text else "image"
            grown = last["parameters"] > last["parameters_before"]
            old = f"grown from {last['parameters_before']:,} to " if grown else ""
            parts.append(
                f"{old}{last['parameters']:,} parameters, {last['macs']:,} MACs per {what}"
            )
        parts.append(f"{last['seconds']:.1f} s for the switch")
        if last["rounded"]:
            rounded = ", ".join(last["rounded"][:3]) + (", ..." if len(last["rounded"]) > 3 else "")
            parts.append(f"some masked channels are kept to fill up widths in {rounded}")
        return "; ".join(parts)

    def to_record(self) -> dict[str, Any]:
        """Returns what a checkpoint says of its stage."""
        return self.shrinking.to_record()

    def _placed(
        self, step: jax.Array, variables: Any, opt_state: Any, like: training.TrainState
    ) -> training.TrainState:
        """Returns the state of these variables, with each array where its stage has it."""
        rest = variables.get("model_state", {})
        state = training.TrainState(step, variables["params"], rest, opt_state)
        return jax.tree.map(lambda x, like: sharding.put(x, like.sharding), state, like)

    def _figures(self) -> dict[str, Any]:
        """Returns what the record of a switch compares."""
        costs = self.costs()
        figures = {name: costs.get(name) for name in ("parameters", "macs", "peak_bytes")}
        figures["macs"] = self.shrinking.cost  # of the network, without its teacher
        return {"image_size": list(self.stage.phase)} | figures

    def _teacher_like(self) -> Any:
        """Returns the shapes of the teacher, and where its arrays lie."""
        return variables_of(self.experiment.dense.like)

    def _read_teacher(self) -> None:
        """Reads the variables of the wide network onto the mesh."""
        self._teacher = read_teacher(self._path, self._teacher_like())

    def _compile(self, stage: structure.Stage) -> Compiled:
        """Compiles the training step for full chunks; chunks of other lengths compile when met."""
        experiment, steps = self.experiment, self.experiment.at(stage)
        mesh, data = experiment.mesh, experiment.train_set
        split = NamedSharding(mesh, PartitionSpec(None, mesh.axis_names))
        size = experiment.chunk, experiment.config.batch_size
        rows: Any = jax.ShapeDtypeStruct(size, jnp.int32, sharding=split)
        if data is None:
            source = experiment.source
            rows = tuple(
                jax.ShapeDtypeStruct((*size, *shape), dtype, sharding=split)
                for shape, dtype in zip((source.shape, source.label), source.dtypes, strict=True)
            )
        key = sharding.replicate(jax.random.key(0), mesh)
        given: dict[str, Any] = {} if steps.wrapped is None else {"indices": {}}  # of dense steps
        if is_taught := experiment.is_taught(stage):
            given |= {"teacher": self._teacher_like()}
        compiled = steps.run.lower(steps.like, data, rows, key, **given).compile()  # pyright: ignore
        data_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(data))

        def run(state: Any, data: Any, indices: Any, key: Any) -> tuple:
            own = compiled if jax.tree.leaves(indices)[0].shape[:2] == size else steps.run
            if is_taught:
                return own(state, data, indices, key, teacher=self._teacher)
            if self.sparse is None:
                return own(state, data, indices, key)
            own = own if self.sparse.is_dense() else steps.run
            return self.sparse.run(own, state, data, indices, key)

        peak = reports.measure_memory(compiled).peak - data_bytes
        return Compiled(steps._replace(run=run), peak)


def refused_updates(state: training.TrainState) -> int:
    """Returns at how many steps a due mask update was refused, as a value was not finite."""
    return sum(int(own) for own in trees.state_fields(state.opt_state, "refused"))


def unranked_groups(state: training.TrainState) -> int:
    """Returns how many groups had scores of 0 only at the last mask update."""
    return sum(int(own) for own in trees.state_fields(state.opt_state, "unranked"))
