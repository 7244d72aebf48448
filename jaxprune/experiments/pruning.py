"""The pruning of a configuration: its transformation, and when its masks change."""

import operator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import jaxprune
from jaxprune import (
    at_init,
    budgets,
    patterns,
    presets,
    processes,
    rates,
    schedules,
    scores,
    stacks,
    structure,
    training,
    trees,
)
from jaxprune.experiments.config import Config

if TYPE_CHECKING:
    from jaxprune.experiments.experiment import Experiment

AT_INIT = ("snip", "grasp", "synflow")


class Window(NamedTuple):
    """The mask updates of a run."""

    start: int  # step of the first
    stop: int  # step of the last, at the latest
    every: int  # steps between two

    @property
    def updates(self) -> list[int]:
        """The steps of the mask updates, from 0."""
        return schedules.mask_update_steps(self.start, self.stop, self.every)


def window_of(config: Config, steps: int) -> Window:
    """Returns the mask updates of a run of this many steps."""
    start, stop = (
        min(round(steps * part), steps - 1) for part in (config.prune_start, config.prune_stop)
    )
    return Window(start, stop, config.prune_every)


def pruning_of(
    experiment: "Experiment", stage: structure.Stage
) -> optax.GradientTransformation | None:
    """Returns the transformation of the configured method; None trains a dense network."""
    config = experiment.config
    if config.method in AT_INIT:
        masks = processes.from_first(masks_at_init(experiment))
        return jaxprune.fixed_mask_transform(masks)
    return pruning_while_training(config, experiment.steps, stage.groups)


def pruning_while_training(
    config: Config, steps: int, groups: structure.Groups
) -> optax.GradientTransformation | None:
    """Returns the transformation of a method that needs no images to prune."""
    method, window = config.method, window_of(config, steps)
    if method == "none":
        return None
    options: dict[str, Any] = window._asdict()
    if config.granularity == "channels":
        ranked = {"magnitude": scores.magnitude, "random": scores.random(config.seed)}
        options |= {"groups": groups, "score": ranked.get(method), "budget": budget_of(config)}
        options |= {"decay": config.decay, "regrow": config.regrow}
        channels = jaxprune.agip_transform(config.sparsity, **options)
        return _with_single_weights(channels, config, steps)
    options |= choice_of(config)
    if config.pattern != "weights":
        options |= {"pattern": pattern_of(config)}
    if method in ("agip", "gradient"):
        rules = {"none": None, "density": rates.by_density(), "statistic": rates.by_statistic()}
        options |= {"decay": config.decay, "regrow": config.regrow, "rate": rules[config.rate]}
        options |= {"score": scores.taylor if method == "agip" else scores.gradient}
        method = "agip"
    elif method in ("set", "rigl"):
        options |= {"drop": config.drop, "seed": config.seed}
    elif method == "random":
        options |= {"seed": config.seed}
    elif method == "acdc":
        options |= {"every": max(1, round(steps * config.phase))}
    return getattr(jaxprune, f"{method}_transform")(config.sparsity, **options)


def _with_single_weights(
    channels: optax.GradientTransformation, config: Config, steps: int
) -> optax.GradientTransformation:
    """Adds what prunes single weights by magnitude, once channels have gone."""
    if not config.fine_sparsity:
        return channels
    parts = config.fine_start, config.fine_stop
    start, stop = (min(round(steps * part), steps - 1) for part in parts)
    weights = jaxprune.magnitude_transform(
        config.fine_sparsity, start=start, stop=stop, every=config.prune_every
    )
    return jaxprune.chain(channels, weights)


def prunable_of(config: Config) -> trees.Prunable | None:
    """Returns what loses weights: of decoders the layers, not the embedding and the head."""
    if config.prunable == "pointwise":
        return presets.pointwise
    return presets.transformer if config.dataset == "text" else None


def choice_of(config: Config) -> dict[str, Any]:
    """Returns the keywords that say which single weights are pruned, and how many of a layer."""
    # The budgets of scanned layers are those of layers, not of stacks.
    stacked = stacks.under("layers") if config.scan else None
    return {"budget": budget_of(config), "prunable": prunable_of(config), "stacked": stacked}


def masks_at_init(experiment: "Experiment") -> Any:
    """Returns the masks of a method that prunes before training."""
    config, source, model = experiment.config, experiment.source, experiment.model
    if config.method == "synflow":
        model.eval()
    graphdef, *states = nnx.split(model, nnx.Param, ...)
    params, rest = map(nnx.to_pure_dict, states)
    # The last norm of a residual branch starts with the scale 0, so no weight before it would
    # count.
    params = jax.tree.map_with_path(
        lambda path, x: jnp.ones_like(x) if trees.path_string(path).endswith("scale") else x, params
    )
    images, labels = map(jnp.asarray, source.first(config.init_images))
    images = source.prepare(images)

    def apply(params: Any, images: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params, rest)(images)

    def loss(params: Any, temperature: float) -> jax.Array:
        return jnp.mean(training.cross_entropy(apply(params, images) / temperature, labels))

    options = choice_of(config)
    if config.method == "synflow":
        score = jax.jit(lambda params: at_init.synflow(apply, params, images[:1]))
        return jaxprune.prune_in_rounds(params, config.sparsity, score, **options)[1]
    # The temperature of GraSP's authors, and none for SNIP.
    temperature = 200.0 if config.method == "grasp" else 1.0
    score = jax.jit(lambda params: getattr(at_init, config.method)(loss, params, temperature))
    return jaxprune.prune(params, config.sparsity, score=score(params), **options)[1]


def budget_of(config: Config) -> budgets.BudgetRule | None:
    """Returns the budget rule; None is the method's own."""
    rules: dict[str, Any] = {"global": budgets.global_budget(), "uniform": budgets.uniform}
    if config.granularity == "weights":
        rules |= {"erdos_renyi_kernel": budgets.erdos_renyi_kernel}
    return rules.get(config.budget)


def pattern_of(config: Config) -> patterns.PatternRule:
    """Returns which weights of a kernel [..., inputs, outputs] are pruned together."""
    if config.pattern == "filters":
        return patterns.channels(axis=-1)
    # In layers that do not fit, such as the first one, single weights are pruned.
    if ":" in config.pattern:
        n, m = map(int, config.pattern.split(":"))
        return lambda path, leaf: patterns.n_m(n, m, axis=-2) if leaf.shape[-2] % m == 0 else None
    size = tuple(map(int, config.pattern.split("x")))

    def blocks(path: str, leaf: Any) -> patterns.Pattern:
        fits = all(map(operator.ge, leaf.shape[-2:], size))
        return patterns.blocks((None,) * (leaf.ndim - 2) + size) if fits else None

    return blocks
