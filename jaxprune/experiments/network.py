"""The network of a configuration: as a module, as pure functions, and the channels that it has."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from jaxprune import files, models, structure, training, trees
from jaxprune.experiments.config import Config
from jaxprune.experiments.sources import Source
from jaxprune.files import schemas

_WIDTH = schemas.whole(low=1)
_WIDTHS = schemas.record(
    {"stem": _WIDTH, "blocks": schemas.each(schemas.each(_WIDTH))},
    optional={"head": schemas.maybe(_WIDTH)},
)
_DECODER_WIDTHS = schemas.record(
    {"width": _WIDTH, "layers": schemas.each(schemas.each(schemas.whole(), length=3))}
)


class Network(NamedTuple):
    """The dense network of a run."""

    model: nnx.Module
    functions: structure.FromNNX
    groups: structure.Groups  # empty if only single weights are pruned
    macs: Callable[[structure.Plan], float]  # of one example of the data's size


def make_network(config: Config, source: Source) -> Network:
    """Builds the network of a configuration and, if channels are pruned, analyses it."""
    model = make_model(config, source, config.seed)
    functions, image = pure_functions(model), source.example[:1]
    if config.granularity == "channels":
        groups = find_groups(functions, source.example)
        macs = structure.mac_cost(groups, functions.evaluate, functions.variables, image)
        return Network(model, functions, groups, macs)
    counted = functions
    if getattr(model, "shifted", False):  # sums of shifted images are no convolutions to count
        counted = pure_functions(
            nnx.eval_shape(lambda: make_model(config, source, config.seed, shifted=False))
        )
    count = structure.count_macs(counted.evaluate, counted.variables, image)
    return Network(model, functions, no_groups(functions), lambda _: count)


def make_model(
    config: Config, source: Source, seed: int, shifted: bool | None = None
) -> nnx.Module:
    """Returns a new model of the configuration.

    Args:
        config: the configuration.
        source: the data.
        seed: of the initial parameters.
        shifted: of mobilenets, how depthwise convolutions are computed; None: fast on CPU, unless
            channels are removed.
    """
    if is_decoder(config.model):
        return getattr(models, config.model)(
            source.num_classes,
            widths=read_decoder_widths(config.widths) if config.widths else None,
            scanned=config.scan,
            remat=config.remat,
            dtype=config.dtype,
            rngs=nnx.Rngs(seed),
        )
    options: dict[str, Any] = {}
    if config.model.startswith("mobilenet"):
        if shifted is None:
            shifted = jax.default_backend() == "cpu" and config.granularity == "weights"
        options = {"padding": config.padding, "shifted": shifted}
    model = getattr(models, config.model)(
        num_classes=source.num_classes,
        in_channels=source.shape[-1],
        widths=read_widths(config.widths) if config.widths else None,
        dtype=config.dtype,
        rngs=nnx.Rngs(seed),
        **options,
    )
    model.train()
    return model


def read_widths(text: str) -> models.Widths:
    """Parses the widths of a configuration.

    Raises:
        ValueError: they are no JSON, or no `models.Widths`.

    Example:
        >>> read_widths('{"stem": 4, "blocks": [[2, 4]]}').stem
        4
    """
    try:
        widths = files.parse_json(text.encode())
        _WIDTHS(widths, "it")
    except ValueError as error:
        raise ValueError(f"`widths` must be JSON as in summary.json: {error}") from error
    return models.Widths(**widths)


def read_decoder_widths(text: str) -> tuple[int, list[tuple[int, int, int]]]:
    """Parses the widths of a decoder: of the residual stream, and of each layer.

    Raises:
        ValueError: they are no JSON of this form.

    Example:
        >>> read_decoder_widths('{"width": 64, "layers": [[4, 2, 96]]}')
        (64, [(4, 2, 96)])
    """
    try:
        widths = files.parse_json(text.encode())
        _DECODER_WIDTHS(widths, "it")
    except ValueError as error:
        raise ValueError(f"`widths` must be JSON as in summary.json: {error}") from error
    return widths["width"], [tuple(layer) for layer in widths["layers"]]


def widths_of(model: nnx.Module, params: Any) -> dict[str, Any]:
    """Returns the widths of a network, as `read_widths` or `read_decoder_widths` takes them.

    Args:
        model: the dense network.
        params: parameters of the same network, perhaps without some channels.
    """
    if isinstance(model, models.Decoder):
        layers = models.layers_of(params, model.head_dim)
        return {"width": params["head"]["kernel"].shape[0], "layers": [*map(list, layers)]}
    return models.widths_of(params)._asdict()


def is_decoder(name: str) -> bool:
    """Tells whether a model reads text."""
    return name.startswith("decoder")


def pure_functions(model: nnx.Module) -> structure.FromNNX:
    """Returns a model as functions of its variables, `{"params": ..., "model_state": ...}`."""
    return structure.from_nnx(model, state="model_state")


def variables_of(state: training.TrainState) -> dict[str, Any]:
    """Returns the variables that the functions of a network take."""
    return as_variables(state.params, state.model_state)


def as_variables(params: Any, model_state: Any) -> dict[str, Any]:
    """Returns parameters, and what else a network has, as its functions take them."""
    return {"params": params} | ({"model_state": model_state} if model_state else {})


def find_groups(
    functions: structure.FromNNX, images: jax.Array | jax.ShapeDtypeStruct
) -> structure.Groups:
    """Finds the channels that shrink together, in evaluation and in training."""
    return structure.find_groups(functions.traces(images), functions.variables)


def narrow_plan(groups: structure.Groups, config: Config) -> structure.Plan:
    """Returns the plan of the network that a run begins with if it grows: of each group the first.

    Raises:
        ValueError: there is nothing to add.
    """
    keep = {
        name: np.arange(group.size) < max(1, round(config.grow_from * group.size))
        for name, group in groups.items()
    }
    plan = groups.plan(keep, multiple=config.multiple or None)
    if plan.shapes == groups.plan({}).shapes:
        raise ValueError(
            f"`grow_from` {config.grow_from} leaves nothing to add: `model` {config.model} has "
            f"{len(groups)} groups of channels, and widths are rounded up to multiples of "
            f"{config.multiple or 8} (`multiple`); lower `grow_from` or `multiple`"
        )
    return plan


def no_groups(functions: structure.FromNNX) -> structure.Groups:
    """Returns the groups of a network whose channels all stay, without analysing it."""
    leaves = trees.leaf_by_path(functions.variables)
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    return structure.Groups(structure.Model(shapes, frozenset()), (), (), {})
