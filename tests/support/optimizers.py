"""Every optimizer of `optax` and `optax.contrib`, and what else the two modules offer.

`OPTIMIZERS`, `PARTS`, `WRAPPERS` and `CANNOT` name all of it; test_optimizers.py fails if a new
release brings another one, until it has its line here.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import optax

contrib = optax.contrib


def learning(factory: Callable[..., Any], **options: Any) -> Callable[[], Any]:
    return lambda: factory(0.1, **options)


# Optimizers that need nothing but a learning rate, if that.
PLAIN = (
    *("adabelief adadelta adafactor adagrad adam adamax adamaxw adamw adan amsgrad").split(),
    *("fromage lamb lars lion nadam nadamw novograd optimistic_adam_v2").split(),
    *("optimistic_gradient_descent radam rmsprop rprop sgd sign_sgd signum sm3 yogi").split(),
    *("acprop ademamix adopt cocob dadapt_adamw dog dowg galore madgrad muon prodigy").split(),
    *("schedule_free_adamw schedule_free_sgd simplified_ademamix").split(),
)


def plain(name: str) -> Callable[[], Any]:
    factory = getattr(optax, name, None) or getattr(contrib, name)
    needed = inspect.signature(factory).parameters.values()
    return learning(factory) if any(p.default is p.empty for p in needed) else factory


OPTIMIZERS: dict[str, Callable[[], Any]] = {name: plain(name) for name in PLAIN} | {
    "lbfgs": functools.partial(optax.lbfgs, linesearch=optax.scale_by_zoom_linesearch(6)),
    "noisy_sgd": learning(optax.noisy_sgd, key=jax.random.key(0)),
    "polyak_sgd": optax.polyak_sgd,
    "mechanize": lambda: contrib.mechanize(optax.sgd(0.1)),
    "momo": contrib.momo,
    "momo_adam": contrib.momo_adam,
    "normalize": lambda: optax.chain(contrib.normalize(), optax.sgd(0.1)),
    "reduce_on_plateau": lambda: optax.chain(optax.adam(0.1), contrib.reduce_on_plateau()),
    "sam": lambda: contrib.sam(optax.adam(0.1), optax.sgd(0.05), opaque_mode=True),
    "schedule_free": lambda: contrib.schedule_free(optax.sgd(0.1), 0.1),
    "sophia": learning(contrib.sophia),
    "split_real_and_imaginary": lambda: contrib.split_real_and_imaginary(optax.adam(0.1)),
}

# What these optimizers want besides the gradient, from the loss and the parameters.
Extra = Callable[[Callable[[Any], jax.Array], Any], dict[str, Any]]
EXTRA: dict[str, Extra] = {
    name: lambda loss, params: {"value": loss(params)}
    for name in ("polyak_sgd", "momo", "momo_adam", "reduce_on_plateau")
} | {
    "lbfgs": lambda loss, params: {
        "value": loss(params),
        "grad": jax.grad(loss)(params),
        "value_fn": loss,
    },
    "sam": lambda loss, params: {"grad_fn": lambda point, i: jax.grad(loss)(point)},
    "sophia": lambda loss, params: {"obj_fn": loss},
}


def offered() -> set[str]:
    """The transformations that `optax` and `optax.contrib` offer, asked of the modules."""
    found = set()
    for module in (optax, contrib):
        for name in dir(module):
            function = getattr(module, name)
            is_factory = inspect.isfunction(function) or isinstance(function, functools.partial)
            if name.startswith("_") or not is_factory:
                continue
            annotation = inspect.signature(function).return_annotation
            unknown = annotation is inspect.Signature.empty and module is contrib
            if unknown or "GradientTransformation" in str(annotation):
                found.add(name)
    return {name for name in found if not name.startswith("scale_by_")}


def extra_of(name: str, loss: Callable[[Any], jax.Array], params: Any) -> dict[str, Any]:
    """The extra arguments of an update with this optimizer; none for what is not named above."""
    return EXTRA[name](loss, params) if name in EXTRA else {}


# Links of the chains that the optimizers above are made of.
PARTS = {
    *("adaptive_grad_clip add_decayed_weights add_noise apply_every centralize clip").split(),
    *("clip_by_block_rms clip_by_global_norm ema identity keep_params_nonnegative").split(),
    *("measure_with_ema normalize_by_update_norm scale set_to_zero snapshot stateless").split(),
    *("stateless_with_tree_map trace with_extra_args_support zero_nans").split(),
}

# Transformations around others: the table INNER of test_contract.py, and the recipes below.
WRAPPERS = {
    *("apply_if_finite chain conditionally_mask conditionally_transform flatten freeze").split(),
    *("inject_hyperparams inject_stateful_hyperparams masked multi_transform named_chain").split(),
    *("partition selective_transform").split(),
}

CANNOT = {
    "lookahead": "updates two copies of the parameters: see the recipe",
    "dpsgd": "takes a gradient for each example: aggregate before the chain, see the recipe",
    "differentially_private_aggregate": "as dpsgd",
    "optimistic_adam": "deprecated for optimistic_adam_v2",
    "hutchinson_estimator_diag_hessian": "a part of sophia",
    "schedule_free_eval_params": "no transformation",
}
