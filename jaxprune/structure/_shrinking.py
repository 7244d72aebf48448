"""The cycle of a run that removes or adds channels: decide, prepare, switch, resume."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import optax

from jaxprune.files import schemas
from jaxprune.structure._allocation import count_parameters
from jaxprune.structure._groups import Groups
from jaxprune.structure._plan_files import plan_of
from jaxprune.structure._plans import Plan
from jaxprune.structure._switching import (
    Growth,
    Network,
    Policy,
    dense_network,
    grow,
    masked_channels,
    pays,
    shrink,
)

_WHOLE, _STEP = schemas.whole(), schemas.maybe(schemas.whole())
_COMING = schemas.record(
    {
        "step": _WHOLE,
        "phase": _WHOLE,
        "keep": schemas.maybe(schemas.table(schemas.each(_WHOLE, unique=True))),
    },
    optional={"grows": schemas.flag},
)
_SWITCH = {"step": _WHOLE, "cost": schemas.number, "cost_before": schemas.number}
_RECORD = schemas.record(
    {
        "plan": schemas.anything,  # see `plan_of`
        "phase": _WHOLE,
        "cut": _STEP,
        "history": schemas.each(schemas.record(_SWITCH, more=True)),
        "coming": schemas.maybe(_COMING),
    }
)


class Stage(NamedTuple):
    """What a training step is made for: a network at its present widths, and a phase of the run.

    Example:
        >>> Stage._fields
        ('network', 'phase', 'cut')
    """

    network: Network
    phase: Any = None  # from `phases` of `Shrinking`, such as a size of images
    # Step of the last switch that removed channels; 0 if the run began without some; None if the
    # network has all.
    cut: int | None = None

    @property
    def groups(self) -> Groups:
        """The channels that the network has now, for `agip_transform(groups=)`."""
        return self.network.groups

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a function of the dense network as it runs on the present variables."""
        return function if self.cut is None else self.network.plan.wrap(function)


class Coming(NamedTuple):
    """A switch that is decided on and prepared, but not done."""

    step: int  # at which it happens
    stage: Stage
    keep: Mapping[str, np.ndarray] | None  # bool [channels] by group; None removes nothing
    prepared: Future
    grows: bool = False  # whether the channels that the run began without are added

    @property
    def resizes(self) -> bool:
        """Whether arrays change their sizes."""
        return self.grows or self.keep is not None


class Shrinking:
    """A run that removes masked channels as soon as that pays, or that begins without some.

    After each mask update it decides whether a smaller network pays (`pays`). If so, it prepares
    the next training step in a background thread, and switches `policy.delay` steps later: always
    at the same step, whatever the machine does, so that a resumed run repeats the run bit for bit.

    Call `begin` once and `advance` after every step; train with `prepared`, which `prepare` made.
    Save `to_record()` with each checkpoint, and pass it as `record` to resume.

    Args:
        groups: of the dense network, from `structure.find_groups`.
        steps: training steps of the whole run.
        mask_updates: steps at which the optimizer updates its masks, counted from 0 as
            `schedules.mask_update_steps` does. Empty: nothing is removed.
        cost: function from a plan of `groups` to the cost of a step, such as `mac_cost` returns.
        make_optimizer: function from a `Stage` to the optimizer; pass `stage.groups` on to
            `agip_transform`.
        prepare: function from a `Stage` to what trains it, such as a compiled step. It runs in
            another thread, where no context of the caller holds, such as that of `jax.set_mesh` or
            `jax.default_matmul_precision`: enter them in `prepare`.
        functions: `function(variables, *args)` of the dense network -> the args of a batch on which
            both networks are compared at a switch.
        policy: when a switch pays; its `delay` is at least 1.
        phases: step -> value, what else changes during the run, such as the size of images.
            The value of step 0 is needed. A new phase begins with a switch, too: `policy.delay`
            steps after its step, or with the switch that is pending then.
        growth: the channels that the run begins without, and the step at which they are added, with
            a switch as for a new phase. `mask_updates` must be empty then. `stage.network` has the
            plan of the variables to begin with.
        params: the key of the trained parameters in the variables.
        describe: function from this object to figures of its stage, such as bytes; the record of a
            switch has each before and after. Default: `parameters` and `cost`.
        record: from `to_record`, to resume. The trees to restore a checkpoint into have the shapes
            of `stage`.

    Raises:
        ValueError: `phases` has no value for step 0, `policy.delay` is less than 1, `growth` does
            not fit the other arguments, or `record` does not.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprune
        >>> from jaxprune import structure
        >>> def net(w, x):
        ...     return jnp.tanh(x @ w["params"]["in"]) @ w["params"]["out"]
        >>> def draw(seed, *shape):
        ...     return jax.random.normal(jax.random.key(seed), shape)
        >>> w = {"params": {"in": draw(0, 3, 8), "out": draw(1, 8, 2)}}
        >>> x, y = draw(2, 16, 3), draw(3, 16, 2)
        >>> def make_optimizer(stage):
        ...     agip = jaxprune.agip_transform(0.5, every=1, start=2, stop=2, groups=stage.groups)
        ...     return jaxprune.chain(optax.sgd(0.1), agip)
        >>> def prepare(stage):
        ...     apply, optimizer = stage.wrap(net), make_optimizer(stage)
        ...     def step(w, state):
        ...         loss = lambda params: jnp.mean((apply({"params": params}, x) - y) ** 2)
        ...         grads = jax.grad(loss)(w["params"])
        ...         updates, state = optimizer.update(grads, state, w["params"])
        ...         return {"params": optax.apply_updates(w["params"], updates)}, state
        ...     return jax.jit(step)
        >>> groups = structure.find_groups(net, w, x)
        >>> run = Shrinking(
        ...     groups, steps=9, mask_updates=[2], cost=structure.mac_cost(groups, net, w, x),
        ...     make_optimizer=make_optimizer, prepare=prepare, functions={net: (x,)},
        ...     policy=structure.Policy(switch_steps=1, delay=2))
        >>> run.begin()
        >>> state = run.optimizer.init(w["params"])
        >>> for step in range(1, 10):
        ...     w, state = run.prepared(w, state)
        ...     w, state = run.advance(step, w, state)
        >>> w["params"]["in"].shape, run.history[0]["step"]
        ((3, 4), 5)
    """

    def __init__(
        self,
        groups: Groups,
        *,
        steps: int,
        mask_updates: Sequence[int],
        cost: Callable[[Plan], float],
        make_optimizer: Callable[[Stage], optax.GradientTransformation],
        prepare: Callable[[Stage], Any],
        functions: Mapping[Callable[..., Any], tuple[Any, ...]],
        policy: Policy,
        phases: Mapping[int, Any] | None = None,
        growth: Growth | None = None,
        params: str = "params",
        describe: Callable[["Shrinking"], Mapping[str, Any]] | None = None,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        """Finds the stage to begin with; prepares nothing yet."""
        phases = {0: None} if phases is None else phases
        if 0 not in phases:
            raise ValueError(f"`phases` must have a value for step 0, but has {sorted(phases)}.")
        if policy.delay < 1:
            raise ValueError(f"`policy.delay` must be at least 1; got {policy.delay}.")
        self.phases = dict(sorted(phases.items()))
        self.steps, self.policy = steps, policy
        # Steps done when masks have changed.
        self._changes = sorted(step + 1 for step in mask_updates)
        self._cost, self._make_optimizer, self._prepare = cost, make_optimizer, prepare
        self._functions, self._params = functions, params
        self._describe = _figures if describe is None else describe
        self._dense = dense_network(groups)
        self.coming: Coming | None = None
        self.prepared: Any = None
        self.history: list[dict[str, Any]] = []
        self.stage = Stage(self._dense, self.phases[0])
        self._growth = growth
        if growth is not None:
            self._check_growth(growth)
            self.stage = self.stage._replace(network=self._dense.smaller(growth.plan), cut=0)
        self._record = record
        self._due = 0  # the next step at which `advance` has something to do
        if record is not None:
            self._check_record(record)
            self.history = list(record["history"])
            self.stage = Stage(self._dense, self._values[record["phase"]], record["cut"])
            if record["plan"] is not None:
                plan = plan_of(record["plan"], "the record")
                self.stage = self.stage._replace(network=Network(plan, groups.compact(plan)))

    # ---- the cycle

    def begin(self, step: int = 0, opt_state: Any = None) -> None:
        """Prepares the present stage and, in a resumed run, the switch that was decided on.

        If checkpoints are saved before `advance` is called with their step, call it with that step
        right after this, because the switch may be due then; a second call does nothing.

        Args:
            step: steps done so far.
            opt_state: the restored state of the whole optimizer; not needed at step 0.
        """
        step = int(step)
        self.prepared = self._prepare(self.stage)
        record, self._record = self._record, None
        if record is not None:
            self._take_up(record["coming"], step, opt_state)
        self._due = self.next_step(step)

    def advance(self, step: int, variables: Any, opt_state: Any) -> tuple[Any, Any]:
        """Decides or switches, if it is time for that; call it after every step.

        If masks changed while a switch was prepared, and a channel that it would remove is kept
        again, that switch is given up and decided on anew.

        Arrays come back where slicing leaves them: with a mesh, put them where they belong.

        Args:
            step: steps done so far.
            variables: a tree at the present widths; not changed.
            opt_state: the state of the whole optimizer; not changed.

        Returns:
            Both, compacted if channels were removed, and expanded if some were added.

        Raises:
            ValueError: the next network computes something else, see `shrink` and `grow`, and
                nothing has changed; or a step at which something was due was left out.
        """
        step, due = int(step), self._due
        if step < due:
            return variables, opt_state
        if due < min(step, self.steps):
            raise ValueError(
                f"`advance` must be done with step {due} before step {step}: call it after every "
                "step, or with each step that `next_step` names; with the step of a checkpoint "
                "that was saved before it, call it right after `begin`."
            )
        if step >= self.steps:
            return variables, opt_state
        if self.coming is not None:
            if self._came_back(opt_state):
                self.coming = None
            else:
                variables, opt_state = self._switch(self.coming, variables, opt_state)
            self._decide(step, opt_state)  # masks may have changed while it was prepared
        else:
            self._decide(step, opt_state)
        self._due = self.next_step(step)
        return variables, opt_state

    def next_step(self, step: int) -> int:
        """Returns the next step at which `advance` may do something, or the last step."""
        if self.coming is not None:
            return min(self.coming.step, self.steps)
        return min([at for at in self._decisions() if at > step] + [self.steps])

    def to_record(self) -> dict[str, Any]:
        """Returns what a checkpoint needs to resume, ready for JSON."""
        coming = None
        if self.coming is not None:
            keep = self.coming.keep
            if keep is not None:
                keep = {name: np.flatnonzero(own).tolist() for name, own in keep.items()}
            phase = self._values.index(self.coming.stage.phase)
            coming = {"step": self.coming.step, "keep": keep, "phase": phase}
            coming |= {"grows": self.coming.grows}
        network, phase, cut = self.stage
        return {
            "plan": None if cut is None else network.plan.to_dict(),
            "phase": self._values.index(phase),
            "cut": cut,
            "history": list(self.history),
            "coming": coming,
        }

    # ---- what a run is now

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """The optimizer of the present stage."""
        return self._make_optimizer(self.stage)

    @property
    def cost(self) -> float:
        """The cost of a step now."""
        return self._cost(self.stage.network.plan)

    @property
    def _values(self) -> list[Any]:
        return list(self.phases.values())

    def _decisions(self) -> list[int]:
        """Steps after which a switch may be decided on."""
        changes = [at for at in self.phases if at and self._phase_at(at) != self.stage.phase]
        if self._growth is not None and self.stage.cut is not None:
            changes.append(self._growth.step)
        return sorted({*self._changes, *changes})

    def _phase_at(self, step: int) -> Any:
        return next(value for at, value in reversed(self.phases.items()) if at <= step)

    def _grows_at(self, step: int) -> bool:
        """Tells whether channels that the run began without are to be added by now."""
        growth = self._growth
        return growth is not None and self.stage.cut is not None and step >= growth.step

    def _check_growth(self, growth: Growth) -> None:
        """Raises if channels cannot be added as told."""
        if self._changes:
            raise ValueError(
                f"`mask_updates` must be empty with `growth`, but has {len(self._changes)}: a run "
                "removes channels or adds some; for both, train twice."
            )
        last = self.steps - 2 * self.policy.delay  # a switch may be pending at its step
        if not 1 <= growth.step <= last:
            raise ValueError(
                f"`growth.step` must be at least 1, and at most {last}: `steps` ({self.steps}) "
                f"without twice `policy.delay` ({self.policy.delay}); got {growth.step}."
            )
        if growth.plan.model == self._dense.groups.model and growth.plan.shapes == (
            self._dense.plan.shapes
        ):
            raise ValueError("`growth.plan` must leave channels out, but keeps all; omit `growth`.")

    def _check_record(self, record: Mapping[str, Any]) -> None:
        """Raises if a record is damaged, or of a run with other phases or of another network."""
        _RECORD(record, "`record`")
        coming, count = record["coming"], len(self.phases)
        last = max(own["phase"] for own in (record, coming) if own is not None)
        if last >= count:
            raise ValueError(
                f"`record` has phase number {last}, but `phases` has {count} values: resume with "
                "the phases that the run began with."
            )
        kept, groups = (coming or {}).get("keep"), self._dense.groups
        if kept is not None and kept.keys() != groups.keys():
            raise ValueError(
                f"`record` is of another network: it keeps channels of {sorted(kept)}, but "
                f"`groups` has {sorted(groups)}."
            )
        for name, own in (kept or {}).items():
            size = groups[name].size
            schemas.each(schemas.whole(high=size - 1))(own, f"`record`: `coming/keep/{name}`")
        if record["cut"] is not None:
            schemas.whole(high=self.steps)(record["cut"], "`record`: `cut`")
        grows = record["cut"] == 0 or (coming or {}).get("grows", False)
        if grows and self._growth is None:
            raise ValueError(
                "`record` is of a run that grows: pass `growth` as when the run began."
            )
        if (record["plan"] is None) != (record["cut"] is None):
            raise ValueError("`record` must have both `plan` and `cut`, or neither")

    # ---- what comes next

    def _take_up(self, coming: Mapping[str, Any] | None, step: int, opt_state: Any) -> None:
        """Prepares the switch that a record says is coming, or makes a decision that is due."""
        if coming is None:  # it may have been due, but not made when the checkpoint was saved
            if step in self._decisions():
                self._decide(step, opt_state)
            return
        keep = coming["keep"]
        if keep is not None:
            sizes = {name: group.size for name, group in self.stage.groups.items()}
            keep = {name: np.isin(np.arange(sizes[name]), own) for name, own in keep.items()}
        phase, grows = self._values[coming["phase"]], coming.get("grows", False)
        self._plan(coming["step"], keep, phase, grows)

    def _decide(self, step: int, opt_state: Any) -> None:
        """Prepares a switch if one is due: to other channels, to a new phase, or to both."""
        phase, grows = self._phase_at(step), self._grows_at(step)
        keep = self._masked_enough(step, opt_state) if self._changes else None
        if keep is not None or grows or phase != self.stage.phase:
            self._plan(step + self.policy.delay, keep, phase, grows)

    def _came_back(self, opt_state: Any) -> bool:
        """Tells whether masks keep a channel now that the pending switch would remove."""
        if self.coming is None or self.coming.keep is None:
            return False
        now, keep = masked_channels(self.stage.groups, opt_state), self.coming.keep
        return any(bool(np.any(now[name] & ~keep[name])) for name in keep)

    def _masked_enough(self, step: int, opt_state: Any) -> dict[str, np.ndarray] | None:
        """Returns the channels to keep, if removing all others pays."""
        network = self.stage.network
        keep = masked_channels(network.groups, opt_state)
        smaller = network.plan.then(network.groups.plan(keep, multiple=self.policy.multiple))
        dense = self._cost(self._dense.plan)
        worth = pays(
            self.policy,
            cost=self.cost / dense,
            smaller=self._cost(smaller) / dense,
            left=self.steps - step,
            done=sum(entry["cost"] != entry["cost_before"] for entry in self.history),
            changing=max(0, self._changes[-1] - step),
        )
        return keep if worth else None

    def _plan(
        self, step: int, keep: Mapping[str, np.ndarray] | None, phase: Any, grows: bool
    ) -> None:
        """Prepares the next stage in the background."""
        stage = self.stage._replace(phase=phase)
        if grows:
            stage = stage._replace(network=self._dense, cut=None)
        if keep is not None:
            plan = stage.groups.plan(keep, multiple=self.policy.multiple)
            stage = stage._replace(network=stage.network.smaller(plan), cut=step)
        pool = ThreadPoolExecutor(1)
        prepared = pool.submit(self._prepare, stage)
        pool.shutdown(wait=False)
        self.coming = Coming(step, stage, keep, prepared, grows)

    def _switch(self, coming: Coming, variables: Any, opt_state: Any) -> tuple[Any, Any]:
        """Replaces the stage; an error leaves everything as it was."""
        began = time.perf_counter()
        before, done = dict(self._describe(self)) | {"cost": self.cost}, None
        if coming.keep is not None:
            done = shrink(
                self.stage.network,
                coming.keep,
                self._functions,
                lambda groups: self._make_optimizer(
                    coming.stage._replace(network=coming.stage.network._replace(groups=groups))
                ),
                variables,
                opt_state,
                params=self._params,
                multiple=self.policy.multiple,
            )
        elif coming.grows and self._growth is not None:
            done = grow(
                self.stage.network,
                self._dense.groups,
                self._functions,
                self._make_optimizer(coming.stage),
                variables,
                opt_state,
                self._growth.base(),
                params=self._params,
            )
        if done is not None:
            variables, opt_state = done.variables, done.opt_state
        self.prepared = coming.prepared.result()
        self.stage, self.coming = coming.stage, None
        entry: dict[str, Any] = {"step": coming.step}
        for name, value in (dict(self._describe(self)) | {"cost": self.cost}).items():
            entry |= {name: value, f"{name}_before": before[name]}
        entry |= {"rounded": [], "restarted": []}
        if done is not None:
            entry["widths"] = {name: group.size for name, group in self.stage.groups.items()}
            entry |= {"rounded": list(done.rounded), "restarted": list(done.restarted)}
            entry["difference"] = done.difference
        self.history.append(entry | {"seconds": time.perf_counter() - began})
        return variables, opt_state


def _figures(run: Shrinking) -> dict[str, Any]:
    """Returns what is known of a stage without being told."""
    return {"parameters": count_parameters(run.stage.network.plan)}
