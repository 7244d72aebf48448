"""Stacked layers as lists: the same results, and each layer has its own widths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from jaxprune import models, stacks, structure
from tests.models.test_transformers import TOKENS, decoder, stacked, with_cache
from tests.support.checks import check, dense, draw, layer

X = draw(5, 6)


def stack():
    layers = {"up": draw(3, 8, 12), "bias": draw(3, 12), "down": 0.3 * draw(3, 12, 8)}
    return {"in": layer(6, 8), "layers": layers, "out": layer(8, 3)}


def plain(own, x):
    return x + jax.nn.relu(x @ own["up"] + own["bias"][None]) @ own["down"]


def network(step=plain, cast=False, **options):
    def function(w, x):
        def body(x, own):
            return step(own, x), jnp.mean(x, axis=1)

        layers = (
            jax.tree.map(lambda leaf: leaf.astype(x.dtype), w["layers"]) if cast else w["layers"]
        )
        x, means = lax.scan(body, dense(w, x, "in"), layers, **options)
        return dense(w, x, "out"), means

    return function


@pytest.mark.parametrize(
    "function",
    [
        network(),
        network(cast=True),
        network(reverse=True),
        network(jax.checkpoint(plain)),
        jax.jit(network()),
        lambda w, x: jax.checkpoint(network())(w, x),
    ],
)
def test_each_layer_has_its_own_widths(function):
    variables = stack()
    layers = structure.unstack(variables, stacks.under("layers"))
    assert layers.stacked == ("layers/bias", "layers/down", "layers/up")
    by_layer = layers.wrap(function)
    for own, wanted in zip(
        jax.tree.leaves(by_layer(layers.variables, X)), jax.tree.leaves(function(variables, X))
    ):
        np.testing.assert_allclose(own, wanted, rtol=1e-5, atol=1e-6)
    groups = structure.find_groups(by_layer, layers.variables, X)
    keep = {f"layers/up/{n}:1": np.arange(12) < 4 + 3 * n for n in range(3)}
    assert keep.keys() <= groups.keys()
    plan = groups.plan(keep, multiple=1)
    check([structure.Trace(by_layer, (X,))], layers.variables, groups, plan)
    small = plan.compact(layers.variables)
    assert [leaf.shape for leaf in small["layers"]["up"]] == [(8, 4), (8, 7), (8, 10)]
    assert "scan[" not in str(jax.make_jaxpr(plan.wrap(by_layer))(small, X))


def test_what_uses_the_whole_stack_ties_its_layers():
    def function(w, x):
        return network()(w, x)[0] + jnp.sum(w["layers"]["up"] ** 2)

    layers = structure.unstack(stack(), stacks.under("layers"))
    by_layer = layers.wrap(function)
    groups = structure.find_groups(by_layer, layers.variables, X)
    members = groups["layers/up/0:1"].members
    assert {f"layers/up/{n}" for n in range(3)} <= {member.path for member in members}
    check([structure.Trace(by_layer, (X,))], layers.variables, groups)


def test_other_axes_and_rules_that_match_nothing_are_refused():
    with pytest.raises(ValueError, match="layers/bias: 1"):
        structure.unstack(stack(), stacks.under("layers", axis=1))
    with pytest.raises(ValueError, match="matches none"):
        structure.unstack(stack(), stacks.under("blocks"))


def row_of(tree, index):
    return jax.tree.map(lambda leaf: leaf[index], tree, is_leaf=lambda x: isinstance(x, list))


@pytest.mark.slow
def test_a_scanned_decoder_reads_with_its_own_heads_in_each_layer():
    """Prefill and decode equal the masked dense network, and a decoder of these widths."""
    extend, variables, _ = with_cache(stacked(decoder()))
    layers = structure.unstack(variables, stacks.under("params/layers", "cache"))
    by_layer = layers.wrap(extend, updates=lambda output: output[1])
    zero = jnp.int32(0)
    traces = [
        structure.Trace(by_layer, (TOKENS[:, :length], zero), lambda output: output[1])
        for length in (4, 1)
    ]
    groups = structure.find_groups(traces, layers.variables)
    heads, channels = ([1, 2, 1], [40, 10, 20])
    keep = {f"params/layers/gate/kernel/{n}:1": np.arange(40) < channels[n] for n in range(3)}
    for group in groups.values():
        for member in group.members:
            if "cache" in member.path and member.dimension == 2:
                index = int(member.path.split("/")[-1])
                keep[group.name] = np.arange(2) < heads[index]
    blocks = [f"params/layers/{name}/kernel/2" for name in ("down", "key")]
    for less in ({}, {blocks[0]: np.array([False])}):
        plan = groups.plan(keep | less, multiple=1)
        small, masked = plan.compact(layers.variables), plan.mask(layers.variables)
        assert [leaf.shape[2] for leaf in small["cache"][0]] == heads
        plain = decoder(layers=[(2 * heads[n], heads[n], channels[n]) for n in range(3)])
        if not less:
            parts = {n: row_of(small["params"]["layers"], n) for n in range(3)}
            nnx.update(plain, small["params"] | {"layers": parts})
            every = plain(TOKENS[:, :6])
        step = jax.jit(plan.wrap(by_layer))
        for start, stop in ((0, 4), (4, 5), (5, 6)):
            tokens, length = TOKENS[:, start:stop], jnp.int32(start)
            wanted, new = by_layer(masked, tokens, length)
            logits, now = step(small, tokens, length)
            np.testing.assert_allclose(logits, wanted, atol=2e-5)
            if not less:
                np.testing.assert_allclose(logits, every[:, start:stop], atol=2e-5)
            small, masked = small | now, masked | new
    assert isinstance(plain, models.Decoder)
