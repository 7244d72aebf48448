"""Making a network smaller while it trains: when that pays, and the switch itself.

A pruning transformation with `groups` masks channels step by step. Each compaction removes those
that are masked, at the price of one more compilation. The optimizer state comes along, and the
smaller function is compared with the masked one before anything is replaced.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jaxprune import trees
from jaxprune.structure._groups import Groups
from jaxprune.structure._optimizer import compact_state
from jaxprune.structure._plans import Plan


class Policy(NamedTuple):
    """When a smaller network pays.

    Example:
        >>> Policy(switch_steps=100.0).most
        4
    """

    switch_steps: float  # what a switch costs, compilation above all, in steps of the dense network
    most: int = 4  # switches in a run
    saving: float = 0.2  # of a step, as a fraction: what a switch must save at least
    multiple: int | None = None  # of the widths, see `structure.Groups.plan`


class Network(NamedTuple):
    """A network at its present widths.

    Example:
        >>> Network._fields
        ('plan', 'groups')
    """

    plan: Plan  # from the dense network
    groups: Groups  # of what is left


class Switch(NamedTuple):
    """What `shrink` returns.

    Example:
        >>> Switch._fields
        ('network', 'variables', 'opt_state', 'restarted', 'rounded', 'difference')
    """

    network: Network
    variables: Any  # smaller
    opt_state: Any  # smaller
    restarted: tuple[str, ...]  # paths in the optimizer state that could not be sliced
    rounded: tuple[str, ...]  # groups that keep masked channels, to fill up a multiple
    difference: float  # between the outputs of both functions, relative to the largest


def start(groups: Groups) -> Network:
    """The dense network.

    Args:
        groups: from `structure.find_groups`.

    Returns:
        A `Network` that keeps everything.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxprune import structure
        >>> w = {"in": jnp.ones((3, 8)), "out": jnp.ones((8, 2))}
        >>> groups = structure.find_groups(lambda w, x: x @ w["in"] @ w["out"], w, jnp.ones((1, 3)))
        >>> start(groups).plan.shape("in")
        (3, 8)
    """
    return Network(groups.plan({}), groups)


def masked_channels(groups: Groups, opt_state: Any) -> dict[str, np.ndarray]:
    """Which channels are on, as `agip_transform` with `groups` left them.

    Args:
        groups: that the transformation was made with.
        opt_state: of the whole optimizer.

    Returns:
        Name of a group -> bool [channels], for `Groups.plan`.

    Raises:
        ValueError: the state has no channels, or those of other groups.

    Example:
        >>> import jax.numpy as jnp, jaxprune
        >>> from jaxprune import structure
        >>> w = {"in": jnp.ones((3, 4)), "out": jnp.ones((4, 2))}
        >>> groups = structure.find_groups(lambda w, x: x @ w["in"] @ w["out"], w, jnp.ones((1, 3)))
        >>> optimizer = jaxprune.agip_transform(0.5, stop=1, groups=groups)
        >>> masked_channels(groups, optimizer.init(w))["in:1"].tolist()
        [True, True, True, True]
    """
    found = trees.state_fields(opt_state, "channels")
    if len(found) != 1:
        raise ValueError(
            f"`opt_state` must hold the channels of one transformation, but has {len(found)}; use "
            "`agip_transform(..., groups=groups)`."
        )
    channels = {name: np.asarray(own) for name, own in found[0].items()}
    sizes = {name: group.size for name, group in groups.items()}
    problems = [
        f"{name}: {len(channels.get(name, ()))} channels in the state, {sizes.get(name, 0)} in it"
        for name in sorted(channels.keys() | sizes.keys())
        if len(channels.get(name, ())) != sizes.get(name, 0)
    ]
    trees.raise_for(problems, "`groups` must be those of the transformation:")
    return {name: channels[name] for name in groups}  # `jit` returns the state sorted by name


def pays(
    policy: Policy, *, cost: float, smaller: float, left: int, done: int, changing: int = 0
) -> bool:
    """Whether a switch saves more than it costs.

    While masks still change, a later switch removes what this one would have, and more. So what
    this one saves ends there, and the last of `most` switches is kept for it.

    Args:
        policy: limits, and the price of a switch.
        cost: of a step now, relative to a step of the dense network: measured, or by its MACs.
        smaller: of a step after the switch, likewise.
        left: steps that are still to come.
        done: switches so far.
        changing: steps until masks have changed for the last time.

    Returns:
        True if at least the fraction `saving` of a step is saved, if the steps that are saved by
        this switch save more than `switch_steps`, and if there were less than `most` switches.

    Example:
        >>> policy = Policy(switch_steps=50)
        >>> [pays(policy, cost=1, smaller=0.5, left=left, done=0) for left in (99, 101)]
        [False, True]
        >>> pays(policy, cost=1, smaller=0.5, left=900, done=0, changing=90)
        False
    """
    saved = cost - smaller
    most = policy.most - (changing > 0)
    steps = min(left, changing or left)
    return done < most and saved >= policy.saving * cost and saved * steps > policy.switch_steps


def shrink(
    network: Network,
    keep: Mapping[str, np.ndarray],
    functions: Mapping[Callable[..., Any], tuple[Any, ...]],
    make_optimizer: Callable[[Groups], optax.GradientTransformation],
    variables: Mapping[str, Any],
    opt_state: Any,
    *,
    params: str = "params",
    multiple: int | None = None,
    tolerance: float = 1e-3,
) -> Switch:
    """Removes channels from a network that is being trained.

    Nothing that is given is changed: if something is refused, training can go on as before.

    Args:
        network: what it is now.
        keep: name of a group -> bool [channels], from `masked_channels`.
        functions: `function(variables, *args)` of the dense network -> args of a batch on which the
            smaller function is compared with the present one.
        make_optimizer: from groups to the optimizer, as it made `opt_state` for the present ones.
        variables: at the present widths.
        opt_state: likewise.
        params: key of the trained parameters in the variables.
        multiple: of the widths, see `structure.Groups.plan`.
        tolerance: of the largest difference between outputs, relative to the largest output.

    Returns:
        A `Switch`.

    Raises:
        ValueError: `keep` does not fit, or the functions differ by more than `tolerance`: a channel
            that goes was not masked.

    Example:
        >>> import jax.numpy as jnp, jaxprune
        >>> from jaxprune import structure
        >>> def net(w, x):
        ...     return x @ w["params"]["in"] @ w["params"]["out"]
        >>> w, x = {"params": {"in": jnp.ones((3, 4)), "out": jnp.ones((4, 2))}}, jnp.ones((1, 3))
        >>> network = start(structure.find_groups(net, w, x))
        >>> (name,) = network.groups
        >>> w["params"]["in"] = w["params"]["in"].at[:, 1:].set(0)  # as a mask would
        >>> def make_optimizer(groups):
        ...     return optax.chain(jaxprune.agip_transform(0.5, stop=1, groups=groups))
        >>> state = make_optimizer(network.groups).init(w["params"])
        >>> keep = {name: np.arange(4) < 1}
        >>> switch = shrink(network, keep, {net: (x,)}, make_optimizer, w, state, multiple=1)
        >>> switch.variables["params"]["out"].shape
        (1, 2)
    """
    step = network.groups.plan(keep, multiple=multiple)
    smaller = Network(network.plan.then(step), network.groups.compact(step))
    compacted = step.compact(variables)
    gaps = [0.0]
    for function, args in functions.items():
        now = jax.jit(network.plan.wrap(function))(variables, *args)
        then = jax.jit(smaller.plan.wrap(function))(compacted, *args)
        gaps += _gaps(now, then)
    difference = float(np.max(gaps))  # NaN if one is
    if not difference <= tolerance:
        raise ValueError(
            f"the smaller network differs from the present one by {difference:.3g}, more than "
            f"`tolerance` {tolerance:g}; `keep` must keep every channel that is not masked"
        )
    state = compact_state(
        step,
        make_optimizer(smaller.groups),
        opt_state,
        variables[params],
        under=params,
        groups=network.groups,
    )
    rounded = [n for n, own in keep.items() if smaller.groups[n].size > np.asarray(own).sum()]
    return Switch(smaller, compacted, state.state, state.restarted, tuple(rounded), difference)


def _gaps(a: Any, b: Any) -> list[float]:
    """Largest differences of outputs of the same shape, relative to the largest entry of each."""
    pairs = zip(map(np.asarray, jax.tree.leaves(a)), map(np.asarray, jax.tree.leaves(b)))
    return [
        float(np.abs(x - y).max(initial=0) / (np.abs(x).max(initial=0) + 1e-30))
        for x, y in pairs
        if x.shape == y.shape and np.issubdtype(x.dtype, np.floating)
    ]
