"""What pruning and the optimizers of Optax pass to each other; their laws are in test_contract.py.

A new release of Optax that brings another optimizer fails the first test until it has its line.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune
from tests.support.optimizers import CANNOT, OPTIMIZERS, PARTS, WRAPPERS, extra_of, offered
from tests.transforms.test_contract import inputs, loss, make_params

contrib = optax.contrib
# How each optimizer moves a momentum of the shape of its parameter; all others have none, or two.
ONE_MOMENTUM = {
    *("adabelief adam adamax adamaxw adamw amsgrad lamb lars lion nadam nadamw novograd").split(),
    *("optimistic_adam_v2 radam yogi acprop adopt muon").split(),
    *("reduce_on_plateau sam sophia split_real_and_imaginary").split(),
}


def test_the_tables_name_everything_that_optax_offers() -> None:
    tables = [set(OPTIMIZERS), PARTS, WRAPPERS, set(CANNOT)]
    assert offered() == set().union(*tables), "give each new optimizer its line in a table"
    assert sum(map(len, tables)) == len(offered())


def traced(tx: Any, name: str = "", **options: Any) -> Any:
    """The types of updates and state after one update of the network of the contract."""
    params = make_params()

    def update(params: Any, state: Any) -> Any:
        value = lambda params: loss(params, inputs(0))  # noqa: E731
        extra = extra_of(name, value, params) | options
        return tx.update(jax.grad(value)(params), state, params, **extra)

    return jax.eval_shape(update, params, tx.init(params))


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_an_average_there_is_one_momentum_or_an_error(name: str) -> None:
    agip = jaxprune.agip_transform(0.5, stop=1, decay=None)
    tx = jaxprune.chain(OPTIMIZERS[name](), agip)
    if name in ONE_MOMENTUM:
        traced(tx, name)
        return
    with pytest.raises(ValueError, match=r"(?s)`decay=None` reads .* have exactly one.*a/kernel: "):
        traced(tx, name)


@pytest.mark.parametrize("shape", [(8, 8), (6, 8)])
def test_the_projected_momentum_of_galore_is_none_of_the_weights(shape: Any) -> None:
    params = {"kernel": jnp.ones(shape)}
    prune = jaxprune.agip_transform(0.5, stop=1, decay=None)
    tx = jaxprune.chain(contrib.galore(0.1, rank=8), prune)
    with pytest.raises(ValueError, match=r"(?s)exactly one.*  kernel: no momentum"):
        jax.eval_shape(tx.update, params, tx.init(params), params)


# ---- extra arguments

PRUNERS: dict[str, Any] = {
    "magnitude": jaxprune.magnitude_transform(0.5, stop=0),
    "agip": jaxprune.agip_transform(0.5, stop=0),
    "rigl": jaxprune.rigl_transform(0.5, stop=1),
}
FORMS = {
    "inside": lambda member, prune: jaxprune.chain(optax.chain(member, optax.scale(1.0)), prune),
    "with pruning": lambda member, prune: jaxprune.chain(optax.chain(member, prune)),
    "chain in chain": lambda member, prune: jaxprune.chain(jaxprune.chain(member, prune)),
}


@pytest.mark.slow
@pytest.mark.parametrize("prune", PRUNERS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["sam", "lbfgs", "reduce_on_plateau", "sophia"])
def test_members_of_a_chain_get_no_argument_that_they_do_not_know(
    name: str, form: str, prune: str
) -> None:
    tx = FORMS[form](OPTIMIZERS[name](), PRUNERS[prune])
    if (name, form) == ("lbfgs", "with pruning"):  # nothing would forget the value that it keeps
        with pytest.raises(ValueError, match=r"Write `jaxprune.chain\(optax.lbfgs\(\), pruning\)`"):
            traced(tx, name)
        return
    updates, state = traced(tx, name)
    structure = jax.tree.structure(tx.init(make_params()))
    assert (jax.tree.structure(state), updates["a"]["kernel"].shape) == (structure, (8, 16))


def recorder(seen: list[set[str]]) -> optax.GradientTransformationExtraArgs:
    """A member that accepts everything, and notes what it gets."""

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        del params
        seen.append(set(extra))
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def test_what_the_chain_adds_goes_to_members_that_use_it() -> None:
    def named(updates: Any, state: Any, params: Any = None, *, grad: Any, **extra: Any) -> Any:
        del params, extra
        return jax.tree.map(jnp.add, updates, grad), state

    seen: list[set[str]] = []
    adds = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), named)
    tx = jaxprune.chain(recorder(seen), adds, jaxprune.magnitude_transform(0.0, stop=0))
    params = make_params()
    updates, _ = tx.update(params, tx.init(params), params, value=1.0)
    np.testing.assert_allclose(updates["b"]["kernel"], 2 * params["b"]["kernel"], rtol=1e-6)
    tx.update(params, tx.init(params), params, value=1.0, grad=params)
    assert seen == [{"value"}, {"value", "grad"}]


@pytest.mark.parametrize("prune", PRUNERS)
def test_a_gradient_for_each_example_is_refused(prune: str) -> None:
    private = contrib.differentially_private_aggregate(1.0, 0.1, key=jax.random.key(0))
    dpsgd = optax.chain(private, optax.sgd(0.1))
    params = make_params()
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), params)
    tx = jaxprune.chain(dpsgd, PRUNERS[prune])
    match = r"(?s)one for each example.*a/kernel: shape \(2, 8, 16\), but the parameter has \(8, 16"
    with pytest.raises(ValueError, match=match):
        tx.update(many, tx.init(params), params)
    alone = jaxprune.chain(dpsgd)  # without pruning there is nothing to refuse
    alone.update(many, alone.init(params), params)
