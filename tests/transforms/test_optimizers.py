"""Pruning behind every optimizer of Optax: which work, what each needs, and what must be refused.

`OPTIMIZERS`, `PARTS`, `WRAPPERS` and `CANNOT` name all that `optax` and `optax.contrib` offer. A
new release that brings another one fails the first test until it has its line.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune
from jaxprune import budgets
from tests.support.combinations import in_turn

contrib = optax.contrib
SPARSITY, STEPS = 0.6, 4
SHAPES = {"hidden": {"kernel": (6, 8), "bias": (8,)}, "head": {"kernel": (8, 2)}}
SIZE = 48  # the hidden kernel alone is pruned: more selections would compile for minutes
OPTIONS: dict[str, Any] = {
    "every": 1,
    "start": 1,
    "stop": 2,
    "prunable": lambda path, leaf: path == "hidden/kernel",
}

PRUNERS: dict[str, Callable[..., optax.GradientTransformationExtraArgs]] = {
    name: functools.partial(getattr(jaxprune, f"{name}_transform"), SPARSITY, **OPTIONS)
    for name in ("magnitude", "agip", "rigl")
}


def make_params() -> Any:
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda shape: jnp.asarray(random.standard_normal(shape), jnp.float32) / 2,
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def loss(params: Any) -> jax.Array:
    x = jnp.asarray(np.random.default_rng(1).standard_normal((5, 6)), jnp.float32)
    hidden = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"][None])
    return jnp.mean((hidden @ params["head"]["kernel"] - 1) ** 2)


def pruned(tree: Any) -> np.ndarray:
    return np.asarray(tree["hidden"]["kernel"])


def check_zeros(params: Any, masks: Any) -> None:
    assert pruned(masks).dtype == bool
    np.testing.assert_array_equal(pruned(params)[~pruned(masks)], 0.0)


def make_step(tx: Any, extra: Callable[[Any], dict[str, Any]] = lambda params: {}) -> Any:
    def step(params: Any, state: Any) -> Any:
        updates, state = tx.update(jax.grad(loss)(params), state, params, **extra(params))
        return optax.apply_updates(params, updates), state

    return jax.jit(step)


# ---- the tables


def learning(factory: Callable[..., Any], **options: Any) -> Callable[[], Any]:
    return lambda: factory(0.1, **options)


# Optimizers that need nothing but a learning rate, if that.
PLAIN = (
    *("adabelief adadelta adafactor adagrad adam adamax adamaxw adamw adan amsgrad").split(),
    *("fromage lamb lars lion novograd optimistic_adam_v2").split(),
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

# What these optimizers want besides the gradient.
EXTRA: dict[str, Callable[[Any], dict[str, Any]]] = {
    name: lambda params: {"value": loss(params)}
    for name in ("polyak_sgd", "momo", "momo_adam", "reduce_on_plateau")
} | {
    "lbfgs": lambda params: {
        "value": loss(params),
        "grad": jax.grad(loss)(params),
        "value_fn": loss,
    },
    "sam": lambda params: {"grad_fn": lambda point, i: jax.grad(loss)(point)},
    "sophia": lambda params: {"obj_fn": loss},
}

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


def offered() -> set[str]:
    found = set()
    for module in (optax, contrib):
        for name in dir(module):
            function = getattr(module, name)
            if name.startswith("_") or not inspect.isfunction(function):
                continue
            annotation = inspect.signature(function).return_annotation
            unknown = annotation is inspect.Signature.empty and module is contrib
            if unknown or "GradientTransformation" in str(annotation):
                found.add(name)
    return {name for name in found if not name.startswith("scale_by_")}


def test_the_tables_name_everything_that_optax_offers() -> None:
    tables = [set(OPTIMIZERS), PARTS, WRAPPERS, set(CANNOT)]
    assert offered() == set().union(*tables), "give each new optimizer its line in a table"
    assert sum(map(len, tables)) == len(offered())


# Each optimizer with one method in turn, and one that looks at all it is given with each of them.
CASES = {*in_turn(OPTIMIZERS, PRUNERS), *(("lbfgs", pruner) for pruner in PRUNERS)}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "pruner"), sorted(CASES))
def test_every_optimizer_of_optax(name: str, pruner: str) -> None:
    tx = jaxprune.chain(OPTIMIZERS[name](), PRUNERS[pruner]())
    params = make_params()
    state = tx.init(params)
    step = make_step(tx, EXTRA.get(name, lambda params: {}))
    for _ in range(STEPS):
        params, state = step(params, state)
        masks = jaxprune.get_masks(state)
        check_zeros(params, masks)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    assert int(pruned(masks).sum()) == budgets.keep_count(SIZE, SPARSITY)
    # The state of optax.lbfgs changes its weak types in the first step, without pruning as well.
    assert step._cache_size() == (2 if name == "lbfgs" else 1)
