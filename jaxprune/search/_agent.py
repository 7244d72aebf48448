"""The agent of AMC: deep deterministic policy gradients (DDPG), as pure functions on one state."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxprune.search._states import State

FEATURES = len(State._fields)


class Settings(NamedTuple):
    """The settings of the agent; the defaults are those of the published code.

    Example:
        >>> Settings(hidden=(300, 300)).batch
        64
    """

    hidden: tuple[int, int] = (300, 300)  # widths of the two hidden layers, of actor and critic
    actor_rate: float = 1e-4  # Adam's learning rate for the actor
    critic_rate: float = 1e-3  # and for the critic
    tau: float = 0.01  # share of the new parameters in the targets, after each update
    discount: float = 1.0
    batch: int = 64  # transitions of an update
    replay: int = 100  # episodes whose transitions are remembered
    baseline: float = 0.5  # share of the newest batch in the moving average of rewards
    noise: float = 0.5  # deviation of the actions in the first episode after the random ones
    decay: float = 0.95  # of the deviation, with each episode


class Actor(nnx.Module):
    """Maps states [batch, 11] to actions [batch, 1] in (0, 1).

    Example:
        >>> Actor(Settings(hidden=(4, 4)), nnx.Rngs(0))(jnp.ones((2, 11))).shape
        (2, 1)
    """

    def __init__(self, settings: Settings, rngs: nnx.Rngs):
        one, two = settings.hidden
        self.first = _linear(FEATURES, one, rngs)
        self.second = _linear(one, two, rngs)
        self.last = _linear(two, 1, rngs)

    def __call__(self, states: jax.Array) -> jax.Array:
        hidden = nnx.relu(self.second(nnx.relu(self.first(states))))
        return nnx.sigmoid(self.last(hidden))


class Critic(nnx.Module):
    """Maps states [batch, 11] and actions [batch, 1] to expected rewards [batch, 1].

    Example:
        >>> critic = Critic(Settings(hidden=(4, 4)), nnx.Rngs(0))
        >>> critic(jnp.ones((2, 11)), jnp.ones((2, 1))).shape
        (2, 1)
    """

    def __init__(self, settings: Settings, rngs: nnx.Rngs):
        one, two = settings.hidden
        self.of_state = _linear(FEATURES, one, rngs)
        self.of_action = _linear(1, one, rngs)
        self.second = _linear(one, two, rngs)
        self.last = _linear(two, 1, rngs)

    def __call__(self, states: jax.Array, actions: jax.Array) -> jax.Array:
        hidden = nnx.relu(self.of_state(states) + self.of_action(actions))
        return self.last(nnx.relu(self.second(hidden)))


class Agent(NamedTuple):
    """All that an agent has learned.

    Example:
        >>> Agent._fields[:2]
        ('actor', 'critic')
    """

    actor: Any  # parameters, float32
    critic: Any
    target_actor: Any  # moving averages of the parameters
    target_critic: Any
    actor_state: optax.OptState
    critic_state: optax.OptState
    baseline: jax.Array  # float32 [], moving average of rewards; NaN before the first batch


class Transitions(NamedTuple):
    """Steps of episodes; the leading dimensions are the same in all fields.

    Example:
        >>> Transitions._fields
        ('states', 'actions', 'rewards', 'next_states', 'goes_on')
    """

    states: Any  # float32 [..., 11]
    actions: Any  # float32 [..., 1], before the wall
    rewards: Any  # float32 [..., 1], of the whole episode
    next_states: Any  # float32 [..., 11]
    goes_on: Any  # float32 [..., 1], 0 for the last decision of an episode, else 1


class Ddpg(NamedTuple):
    """The functions of an agent, from `make_ddpg`.

    Example:
        >>> Ddpg._fields
        ('init', 'act', 'update')
    """

    init: Callable[[int], Agent]  # seed -> a new agent
    act: Callable[[Agent, Any], jax.Array]  # (agent, state [11]) -> action []
    update: Callable[[Agent, Transitions], Agent]  # one update for each batch [updates, batch, ...]


def make_ddpg(settings: Settings) -> Ddpg:
    """Makes the functions of an agent; each compiles once for the same settings.

    An update of a batch of transitions (s, a, r, s'), with b the moving average of mean rewards:

        y = r - b + discount * (1 - done) * Q'(s', mu'(s'))
        critic: Adam on mean((Q(s, a) - y)^2), then actor: Adam on -mean(Q(s, mu(s)))
        targets: theta' <- (1 - tau) theta' + tau theta

    Args:
        settings: see `Settings`.

    Returns:
        The functions.

    References:
        Lillicrap et al., Continuous control with deep reinforcement learning, arXiv:1509.02971.
        He et al., AMC, arXiv:1802.03494, and its code, from which the baseline is.

    Example:
        >>> ddpg = make_ddpg(Settings(hidden=(4, 4)))
        >>> agent = ddpg.init(0)
        >>> 0 < float(ddpg.act(agent, jnp.ones(11))) < 1
        True
    """
    return _made(settings._replace(hidden=tuple(settings.hidden)))


@functools.cache
def _made(settings: Settings) -> Ddpg:
    """Makes the functions once for the same settings, which must be hashable."""
    actor_def, _ = nnx.split(Actor(settings, nnx.Rngs(0)))
    critic_def, _ = nnx.split(Critic(settings, nnx.Rngs(0)))
    actor_tx, critic_tx = optax.adam(settings.actor_rate), optax.adam(settings.critic_rate)

    def mu(params: Any, states: jax.Array) -> jax.Array:
        return nnx.merge(actor_def, params)(states)

    def q(params: Any, states: jax.Array, actions: jax.Array) -> jax.Array:
        return nnx.merge(critic_def, params)(states, actions)

    def init(seed: int) -> Agent:
        rngs = nnx.Rngs(seed)
        actor = nnx.split(Actor(settings, rngs))[1]
        critic = nnx.split(Critic(settings, rngs))[1]
        states = actor_tx.init(actor), critic_tx.init(critic)
        return Agent(actor, critic, actor, critic, *states, jnp.array(jnp.nan, jnp.float32))

    def step(agent: Agent, batch: Transitions) -> tuple[Agent, None]:
        mean = batch.rewards.mean()
        moved = agent.baseline + settings.baseline * (mean - agent.baseline)
        baseline = jnp.where(jnp.isnan(agent.baseline), mean, moved)
        following = mu(agent.target_actor, batch.next_states)
        later = q(agent.target_critic, batch.next_states, following)
        target = batch.rewards - baseline + settings.discount * batch.goes_on * later

        def critic_loss(critic: Any) -> jax.Array:
            return jnp.mean((q(critic, batch.states, batch.actions) - target) ** 2)

        updates, critic_state = critic_tx.update(
            jax.grad(critic_loss)(agent.critic), agent.critic_state, agent.critic
        )
        critic = optax.apply_updates(agent.critic, updates)

        def actor_loss(actor: Any) -> jax.Array:  # with the critic just updated
            return -jnp.mean(q(critic, batch.states, mu(actor, batch.states)))

        updates, actor_state = actor_tx.update(
            jax.grad(actor_loss)(agent.actor), agent.actor_state, agent.actor
        )
        actor = optax.apply_updates(agent.actor, updates)
        target_actor = optax.incremental_update(actor, agent.target_actor, settings.tau)
        target_critic = optax.incremental_update(critic, agent.target_critic, settings.tau)
        states = actor_state, critic_state
        return Agent(actor, critic, target_actor, target_critic, *states, baseline), None

    return Ddpg(
        init,
        jax.jit(lambda agent, state: mu(agent.actor, state[None])[0, 0]),
        jax.jit(lambda agent, batches: jax.lax.scan(step, agent, batches)[0]),
    )


def _linear(inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Linear:
    """Makes a layer with PyTorch's initial values, uniform in +-1 / sqrt(inputs)."""
    bound = inputs**-0.5

    def draw(key: Any, shape: Any, dtype: Any = jnp.float32, **_: Any) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return nnx.Linear(inputs, outputs, kernel_init=draw, bias_init=draw, rngs=rngs)
