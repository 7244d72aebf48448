"""Pruning in JAX as Optax gradient transformations: exact masks that live in the optimizer state.

Start with a transformation at the end of an optimizer, `jaxprune.chain(optax.adam(1e-3),
jaxprune.magnitude_transform(0.9))`, or with `jaxprune.prune(params, 0.9)`, which needs no training.
The modules form five families. All of them are there after `import jaxprune`; those marked (lazy)
load when they are first used, because they need more time or an extra.

Prune while training, before it, or after it:
    transforms     one Optax transformation for each method, and `chain`
    one_shot       `prune` and `prune_in_rounds`, without training
    at_init        SNIP, GraSP and SynFlow: scores before training
    post_training  Wanda and SparseGPT: weights and masks from activations
    masks          read masks from a state, set them, apply them
    checks         whether the masks of a state hold for parameters

Say what is pruned, how much, when, and by what:
    scores, stats         what a weight is worth, and averages of gradients
    budgets               how many weights each layer keeps
    schedules             how sparsity rises
    patterns              which weights are pruned together: N:M, blocks, channels
    layouts, stacks       which axes are inputs and outputs; which number copies of a layer
    rates                 how survivors' learning rates adapt
    presets               which leaves are pruned in a transformer
    timetables            all mask updates of a run, as tables (internal: may change)
    selection             the largest scores, exactly and sharded (internal: may change)

Make the network smaller:
    structure (lazy)      remove channels for real, after training or while it runs
    kernels (lazy)        sparse kernels on CPUs: time in proportion to the kept weights
    storage               sparse files
    export (lazy)         files for phones, browsers and servers
    browser (lazy)        a page that runs and measures networks
    rewinding (lazy)      prune, go back, train again
    search (lazy)         how much each layer keeps: AMC and simpler searches
    elastic (lazy)        one network whose smaller parts all work: Once-for-all

Train:
    training (lazy)       train state, step, loop, averaged parameters
    models (lazy)         ResNets for Flax NNX
    data (lazy)           data sets and batches
    sharding (lazy)       meshes, and where each array lies
    processes (lazy)      several processes that agree and stop together
    checkpoints (lazy)    atomic checkpoints with a record of the run
    logs (lazy)           metrics.jsonl, TensorBoard and progress

See what happened:
    reports               tables, plots, costs and pages; `summarize`
    programs (lazy)       compile for devices that are not here; read what a program does
    testing (lazy)        assertions and the contract of a transformation, for tests of your own

`jaxprune.experiments` holds the commands of scripts/; the library does not use it. `trees`,
`counting`, `files` and `jaxprs` are internal, too. Every other name follows the CHANGELOG: it
changes with a note there that says what to write instead.
"""

import importlib
import typing

from jaxprune import (
    at_init,
    budgets,
    checks,
    layouts,
    masks,
    one_shot,
    patterns,
    post_training,
    presets,
    rates,
    reports,
    schedules,
    scores,
    selection,
    stacks,
    stats,
    storage,
    timetables,
    transforms,
    trees,
)
from jaxprune.checks import check
from jaxprune.masks import apply_masks, get_masks, set_masks
from jaxprune.one_shot import prune, prune_in_rounds
from jaxprune.reports import summarize
from jaxprune.transforms import (
    AgipState,
    acdc_transform,
    agip_transform,
    chain,
    fixed_mask_transform,
    get_room,
    magnitude_transform,
    pack_state,
    random_transform,
    resize_state,
    rigl_transform,
    saliency_transform,
    set_transform,
    straight_through_transform,
)

if typing.TYPE_CHECKING:
    from jaxprune import (
        browser,
        checkpoints,
        data,
        elastic,
        experiments,
        export,
        kernels,
        logs,
        models,
        processes,
        programs,
        rewinding,
        search,
        sharding,
        structure,
        testing,
        training,
    )

__version__ = "0.1.0"

__all__ = [
    "AgipState",
    "acdc_transform",
    "agip_transform",
    "apply_masks",
    "at_init",
    "browser",
    "budgets",
    "chain",
    "check",
    "checkpoints",
    "checks",
    "data",
    "elastic",
    "experiments",
    "export",
    "fixed_mask_transform",
    "get_masks",
    "get_room",
    "kernels",
    "layouts",
    "logs",
    "magnitude_transform",
    "masks",
    "models",
    "one_shot",
    "pack_state",
    "patterns",
    "post_training",
    "presets",
    "processes",
    "programs",
    "prune",
    "prune_in_rounds",
    "random_transform",
    "rates",
    "reports",
    "resize_state",
    "rewinding",
    "rigl_transform",
    "saliency_transform",
    "schedules",
    "scores",
    "search",
    "selection",
    "set_masks",
    "set_transform",
    "sharding",
    "stacks",
    "stats",
    "storage",
    "straight_through_transform",
    "structure",
    "summarize",
    "testing",
    "timetables",
    "training",
    "transforms",
    "trees",
]

_LAZY = {
    "browser", "checkpoints", "data", "elastic", "experiments", "export", "kernels", "logs",
    "models", "processes", "programs", "rewinding", "search", "sharding", "structure", "testing",
    "training",
}  # fmt: skip


def __getattr__(name: str) -> typing.Any:
    """Imports a lazy module at its first use."""
    if name not in _LAZY:
        raise AttributeError(f"module 'jaxprune' has no attribute {name!r}")
    try:
        return importlib.import_module(f"jaxprune.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("jaxprune"):
            raise
        raise ModuleNotFoundError(
            f"`jaxprune.{name}` needs {error.name}, which is not installed; "
            "`pip install 'jaxprune[train]'` installs it.",
            name=error.name,
        ) from error


def __dir__() -> list[str]:
    """Lists lazy modules, too."""
    return sorted({*globals(), *__all__})
