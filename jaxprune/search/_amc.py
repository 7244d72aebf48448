"""AMC: an agent walks through the decisions, and learns from the score of the whole network."""

import math
from collections.abc import Callable
from typing import Any, Unpack

import numpy as np

from jaxprune.search._agent import FEATURES, Settings, Transitions, make_ddpg
from jaxprune.search._found import Found
from jaxprune.search._options import Options, check_count
from jaxprune.search._problems import Counts, Problem
from jaxprune.search._runs import Evaluate, Proposals, Reward, accuracy, run
from jaxprune.search._states import rest_of, state_of, static_features
from jaxprune.search._wall import widest

_PUBLISHED = Settings()


def amc(
    problem: Problem,
    evaluate: Evaluate,
    *,
    episodes: int = 400,
    warmup: int | None = None,
    seed: int = 0,
    reward: Reward = accuracy,
    settings: Settings = _PUBLISHED,
    **options: Unpack[Options],
) -> Found:
    """Searches with AMC's agent: DDPG with the action wall.

    An episode visits the decisions in order. At each one the agent sees its `State` and says which
    fraction to keep; the wall clips that, and what is really kept enters the next state. The score
    of the whole candidate becomes the reward of every decision of the episode. The first episodes
    draw fractions at random; then fractions are drawn from a normal distribution around the actor's
    answer, truncated to [0, 1], whose deviation is 0.5 * 0.95^(episode - warmup), and after each
    episode there is one update of the agent for each decision.

    Args:
        problem: from `channels` or `weights`.
        evaluate: see `run`.
        episodes: number of candidates. The paper has 400, its code 800.
        warmup: random episodes at first. Default: a quarter, which is 100 of 400, as published.
        seed: of the agent and of all draws.
        reward: `accuracy` for a fixed budget, or `guaranteed_accuracy` with `budget=1`; or any
            function of score and cost.
        settings: see `Settings`.
        **options: `journal`, `at_once` and `on_evaluation` of `run`. Only the random episodes can
            be evaluated together.

    Returns:
        A `Found`: the candidate with the highest reward of all episodes.

    Raises:
        ValueError: as for `run`, or if there is no episode or `warmup` is not below `episodes`.

    References:
        He, Lin, Liu, Wang, Li, Han. AMC: AutoML for model compression and acceleration on mobile
        devices. ECCV 2018, arXiv:1802.03494.

    Example:
        >>> found = amc(problem, evaluate, episodes=20, seed=0)
        >>> len(found.history), found.kept
        (20, {'first:1': 8, 'second:1': 16})
    """
    check_count("episodes", episodes)
    warmup = episodes // 4 if warmup is None else warmup
    check_count("warmup", warmup, 0)
    if warmup > episodes:
        raise ValueError(f"`warmup` must be at most `episodes` {episodes}, but is {warmup}.")
    identity = {"episodes": episodes, "warmup": warmup, "seed": seed} | settings._asdict()
    identity |= {"reward": getattr(reward, "__qualname__", "another function")}
    search = _episodes(problem, episodes, warmup, seed, reward, settings)
    return run(problem, evaluate, search, name="amc", settings=identity, reward=reward, **options)


def _episodes(
    problem: Problem, episodes: int, warmup: int, seed: int, reward: Reward, settings: Settings
) -> Proposals:
    generator = np.random.default_rng(seed)
    ddpg = make_ddpg(settings)
    agent = ddpg.init(seed)
    count = len(problem.decisions)
    static, rest = static_features(problem), rest_of(problem)
    memory = _Memory(settings.replay * count)

    def walk(choose: Callable[[np.ndarray], float]) -> tuple[Counts, Transitions]:
        return _walk(problem, static, rest, choose)

    walks = [walk(lambda _: generator.uniform()) for _ in range(warmup)]
    scores = yield [counts for counts, _ in walks]
    for (counts, steps), score in zip(walks, scores, strict=True):
        memory.add(steps, reward(score, problem.cost(counts)))
    for episode in range(warmup, episodes):
        deviation = settings.noise * settings.decay ** (episode - warmup)
        counts, steps = walk(
            lambda state: truncated(generator, float(ddpg.act(agent, state)), deviation)  # noqa: B023
        )
        (score,) = yield [counts]
        memory.add(steps, reward(score, problem.cost(counts)))
        agent = ddpg.update(agent, memory.sample(generator, count, settings.batch))


def _walk(
    problem: Problem, static: np.ndarray, rest: np.ndarray, choose: Callable[[np.ndarray], float]
) -> tuple[Counts, Transitions]:
    """Visits all decisions; returns the candidate and the steps, without their reward."""
    counts, states, actions = problem.floors, [], []
    for index in range(len(counts)):
        states.append(state_of(problem, static, rest, counts, index))
        actions.append(choose(states[-1]))
        kept = widest(problem, counts, index, actions[-1])
        counts = (*counts[:index], kept, *counts[index + 1 :])
    following = np.array([*states[1:], states[-1]])  # as published: the last one is its own next
    goes_on = np.arange(len(counts)) < len(counts) - 1

    def column(values: Any) -> np.ndarray:
        return np.asarray(values, np.float32)[:, None]

    zeros = np.zeros(len(counts))
    steps = Transitions(
        np.array(states), column(actions), column(zeros), following, column(goes_on)
    )
    return counts, steps


class _Memory:
    """The newest transitions, in a ring."""

    def __init__(self, capacity: int) -> None:
        sizes = FEATURES, 1, 1, FEATURES, 1
        self._rows = Transitions(*(np.zeros((capacity, size), np.float32) for size in sizes))
        self._capacity, self._count = capacity, 0

    def add(self, steps: Transitions, reward: float) -> None:
        """Stores the steps of an episode, each with the reward of all."""
        steps = steps._replace(rewards=np.full_like(steps.rewards, reward))
        places = (self._count + np.arange(len(steps.rewards))) % self._capacity
        for rows, own in zip(self._rows, steps, strict=True):
            rows[places] = own
        self._count += len(places)

    def sample(self, generator: np.random.Generator, updates: int, batch: int) -> Transitions:
        """Draws a batch for each update, without repetition within it where there are enough."""
        filled = min(self._count, self._capacity)
        draws = [generator.choice(filled, batch, replace=filled < batch) for _ in range(updates)]
        return Transitions(*(rows[np.array(draws)] for rows in self._rows))


def truncated(generator: np.random.Generator, mean: float, deviation: float) -> float:
    """Draws from a normal distribution that is truncated to [0, 1], by its inverse.

    Args:
        generator: source of the draw.
        mean: of the distribution before it is truncated, in [0, 1].
        deviation: of that distribution.

    Returns:
        The draw.

    Example:
        >>> 0 <= truncated(np.random.default_rng(0), 0.9, 0.5) <= 1
        True
    """

    def below(x: float) -> float:
        return 0.5 * (1 + math.erf((x - mean) / (deviation * math.sqrt(2))))

    wanted = generator.uniform(below(0.0), below(1.0))
    low, high = 0.0, 1.0
    for _ in range(50):  # to the last bit of a float
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) < wanted else (low, middle)
    return (low + high) / 2
