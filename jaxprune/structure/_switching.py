"""One switch to a smaller or larger network while it trains: whether it pays, and how it is done.

A pruning transformation with `groups` masks channels step by step. A switch removes the masked ones
and costs one more compilation. The optimizer state is compacted as well, and the smaller function
is compared with the masked one before anything is replaced. `grow` is the same in the other
direction: a network that began without some channels gets them.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import optax

from jaxprune import trees
from jaxprune.jaxprs import split
from jaxprune.structure._groups import Groups, Multiple
from jaxprune.structure._growing import expand, expand_state
from jaxprune.structure._optimizer import compact_state
from jaxprune.structure._plans import Plan
from jaxprune.structure._traces import run


class Policy(NamedTuple):
    """The rules that say when a switch to a smaller network pays.

    Example:
        >>> Policy(switch_steps=100.0).most
        4
    """

    switch_steps: float  # the price of a switch, mostly compilation, in steps of the dense network
    most: int = 4  # switches in a run
    saving: float = 0.2  # fraction of a step that a switch must save at least
    delay: int = 10  # steps from the decision to the switch; the smaller step compiles meanwhile
    multiple: Multiple = None  # of the widths, see `structure.Groups.plan`


class Growth(NamedTuple):
    """A network that begins without some of its channels and gets them while it trains.

    Example:
        >>> Growth._fields
        ('step', 'plan', 'base')
    """

    step: int  # after which the channels are added, see `Shrinking`
    plan: Plan  # from the whole network to the one that the run begins with
    base: Callable[[], Any]  # () -> variables of the whole network; new entries are from them


class Network(NamedTuple):
    """A network at its present widths.

    Example:
        >>> Network._fields
        ('plan', 'groups')
    """

    plan: Plan  # from the dense network to this one
    groups: Groups  # the channels that this one has

    def smaller(self, plan: Plan) -> "Network":
        """Returns the network that a plan of the present groups keeps."""
        return Network(self.plan.then(plan), self.groups.compact(plan))


class Switch(NamedTuple):
    """The result of `shrink` or `grow`.

    Example:
        >>> Switch._fields
        ('network', 'variables', 'opt_state', 'restarted', 'rounded', 'difference')
    """

    network: Network
    variables: Any  # compacted, or expanded
    opt_state: Any  # the same
    restarted: tuple[str, ...]  # paths in the optimizer state that could not be sliced
    rounded: tuple[str, ...]  # groups that keep masked channels, to fill up a multiple
    difference: float  # between the outputs of both functions, relative to the largest


def dense_network(groups: Groups) -> Network:
    """Returns the network before any channel is removed.

    Args:
        groups: from `structure.find_groups`.

    Returns:
        A `Network` that keeps everything.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxprune import structure
        >>> w = {"in": jnp.ones((3, 8)), "out": jnp.ones((8, 2))}
        >>> groups = structure.find_groups(lambda w, x: x @ w["in"] @ w["out"], w, jnp.ones((1, 3)))
        >>> dense_network(groups).plan.shape("in")
        (3, 8)
    """
    return Network(groups.plan({}), groups)


def masked_channels(groups: Groups, opt_state: Any) -> dict[str, np.ndarray]:
    """Reads which channels `agip_transform` with `groups` keeps now.

    Args:
        groups: the groups that the transformation was made with.
        opt_state: the state of the whole optimizer.

    Returns:
        Name of a group -> bool [channels], for `Groups.plan`.

    Raises:
        ValueError: the state holds no channels, or those of other groups.

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
    """Says whether a switch saves more than it costs.

    While masks still change, a later switch will remove these channels and more. So the savings of
    this one count only until then, and the last of `most` switches is reserved for the final masks.

    Args:
        policy: the limits, and the price of a switch.
        cost: of a step now, relative to a step of the dense network, measured or in MACs.
        smaller: the same for a step after the switch.
        left: steps that are still to come.
        done: switches so far.
        changing: steps until the masks change for the last time.

    Returns:
        True if the switch saves at least the fraction `saving` of a step, if it saves more than
        `switch_steps` in all, and if there were fewer than `most` switches.

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
    multiple: Multiple = None,
    tolerance: float = 1e-3,
) -> Switch:
    """Removes masked channels from a network that is being trained.

    No argument is changed: if the switch is refused, training can continue as before.

    Args:
        network: the network at its present widths.
        keep: name of a group -> bool [channels], from `masked_channels`.
        functions: `function(variables, *args)` of the dense network -> the args of a batch on which
            the smaller function is compared with the present one.
        make_optimizer: function from groups to the optimizer; it made `opt_state` for the present
            groups.
        variables: a tree at the present widths.
        opt_state: the optimizer state at the present widths.
        params: the key of the trained parameters in the variables.
        multiple: widths are rounded up to it, see `structure.Groups.plan`.
        tolerance: the largest difference between outputs that is accepted, relative to the largest
            output.

    Returns:
        A `Switch`.

    Raises:
        ValueError: `keep` does not fit, or the functions differ by more than `tolerance`, because a
            channel that would be removed is not masked.

    Example:
        >>> import jax.numpy as jnp, jaxprune
        >>> from jaxprune import structure
        >>> def net(w, x):
        ...     return x @ w["params"]["in"] @ w["params"]["out"]
        >>> w, x = {"params": {"in": jnp.ones((3, 4)), "out": jnp.ones((4, 2))}}, jnp.ones((1, 3))
        >>> network = dense_network(structure.find_groups(net, w, x))
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
    smaller = network.smaller(step)
    compacted = step.compact(variables)
    difference = _difference(functions, (network, variables), (smaller, compacted))
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


def grow(
    network: Network,
    groups: Groups,
    functions: Mapping[Callable[..., Any], tuple[Any, ...]],
    optimizer: optax.GradientTransformation,
    variables: Mapping[str, Any],
    opt_state: Any,
    base: Mapping[str, Any],
    *,
    params: str = "params",
    tolerance: float = 1e-3,
) -> Switch:
    """Adds the channels that a network lacks while it is being trained; see `expand`.

    No argument is changed: if the switch is refused, training can continue as before.

    Args:
        network: the network at its present widths.
        groups: of the whole network, from `find_groups`.
        functions: `function(variables, *args)` of the whole network -> the args of a batch on which
            it is compared with the present one.
        optimizer: of the whole network; one of the same kind made `opt_state`.
        variables: a tree at the present widths.
        opt_state: the optimizer state at the present widths. What it holds, such as momentum and
            counts, stays; entries of new channels are those of `optimizer.init`.
        base: variables of the whole network, such as a fresh initialization: the new entries.
        params: the key of the trained parameters in the variables.
        tolerance: the largest difference between outputs that is accepted, relative to the largest
            output.

    Returns:
        A `Switch` to the whole network.

    Raises:
        ValueError: if trees do not fit, see `expand` and `expand_state`, or the functions differ by
            more than `tolerance`, because values are not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxprune import structure
        >>> def net(w, x):
        ...     return x @ w["params"]["in"] @ w["params"]["out"]
        >>> w, x = {"params": {"in": jnp.ones((3, 4)), "out": jnp.ones((4, 2))}}, jnp.ones((1, 3))
        >>> groups, optimizer = structure.find_groups(net, w, x), optax.sgd(0.1, momentum=0.9)
        >>> network = dense_network(groups)
        >>> network = network.smaller(groups.plan({"params/in:1": np.arange(4) < 1}))
        >>> small = network.plan.compact(w)
        >>> state = optimizer.init(small["params"])
        >>> switch = grow(network, groups, {net: (x,)}, optimizer, small, state, w)
        >>> switch.variables["params"]["out"].shape, switch.opt_state[0].trace["in"].shape
        ((4, 2), (3, 4))
    """
    whole, grown = dense_network(groups), expand(groups, network.plan, variables, base)
    difference = _difference(functions, (network, variables), (whole, grown))
    if not difference <= tolerance:
        raise ValueError(
            f"the larger network differs from the present one by {difference:.3g}, more than "
            f"`tolerance` {tolerance:g}; `variables` and `base` must hold finite values"
        )
    state = expand_state(
        network.plan, opt_state, optimizer.init(grown[params]), grown[params], under=params
    )
    return Switch(whole, grown, state, (), (), difference)


def _difference(
    functions: Mapping[Callable[..., Any], tuple[Any, ...]],
    now: tuple[Network, Any],
    then: tuple[Network, Any],
) -> float:
    """Returns the largest difference between the outputs of two networks; NaN if one is."""
    gaps = [0.0]
    for function, args in functions.items():
        a, b = (run(own.plan.wrap(function), variables, *args) for own, variables in (now, then))
        gaps += _gaps(a, b)
    return float(np.max(gaps))


def _gaps(a: Any, b: Any) -> list[float]:
    """Returns the largest difference of each pair of outputs, relative to the largest entry."""
    pairs = zip(map(np.asarray, split(a).arrays), map(np.asarray, split(b).arrays))
    return [
        float(np.abs(x - y).max(initial=0) / (np.abs(x).max(initial=0) + 1e-30))
        for x, y in pairs
        if x.shape == y.shape and np.issubdtype(x.dtype, np.floating)
    ]
