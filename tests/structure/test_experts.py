"""Experts: products in which each row is multiplied by the kernel of its group."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune import structure
from tests.support.checks import draw, halves

WEIGHTS = {
    **{"words": 0.3 * draw(6, 12), "router": draw(12, 4), "last": draw(12, 3)},
    **{"up": 0.3 * draw(4, 12, 16), "down": 0.3 * draw(4, 16, 12)},
}
X = draw(10, 6)


def experts(w, x):
    """Each row goes to one expert; rows are sorted by it."""
    hidden = x @ w["words"]
    chosen = jnp.argmax(hidden @ w["router"], -1)
    order, sizes = jnp.argsort(chosen), jnp.bincount(chosen, length=4)
    inner = jax.nn.relu(lax.ragged_dot(hidden[order], w["up"], sizes))
    outer = lax.ragged_dot(inner, w["down"], sizes)
    return (hidden + jnp.zeros_like(outer).at[order].set(outer)) @ w["last"]


def slopes(w, x):
    moving = {name: leaf for name, leaf in w.items() if name != "router"}
    return jax.grad(lambda own: jnp.sum(jnp.sin(experts(w | own, x))))(moving)


def test_widths_of_experts_shrink_and_experts_stay():
    groups = structure.find_groups(experts, WEIGHTS, X)
    assert {name: (g.size, g.exact, g.multiple) for name, g in groups.items()} == {
        "up:2": (16, True, 8),
        "down:2": (12, True, 8),
    }
    assert [m.path for m in groups["up:2"].filters] == ["up"]
    reasons = {(f.path, f.dimension): f.reason for f in groups.frozen}
    assert "`ragged_dot_general` finds its groups by it" in reasons["up", 0]
    plan = groups.plan(halves(groups), multiple=1)
    assert plan.verify(experts, WEIGHTS, X) < 1e-5
    assert plan.verify(slopes, WEIGHTS, X, updates=lambda output: output) < 1e-5
    kept = plan.mask(WEIGHTS)
    np.testing.assert_allclose(
        plan.wrap(experts)(plan.compact(WEIGHTS), X), experts(kept, X), atol=1e-5
    )


def test_costs_of_experts_are_those_of_one_for_each_row():
    macs = structure.count_macs(experts, WEIGHTS, X)
    assert macs == 10 * (6 * 12 + 12 * 4 + 12 * 16 + 16 * 12 + 12 * 3)
    groups = structure.find_groups(experts, WEIGHTS, X)
    plan = groups.plan({"up:2": np.arange(16) < 4}, multiple=1)
    cost = structure.mac_cost(groups, experts, WEIGHTS, X)
    assert cost(plan) == 10 * (6 * 12 + 12 * 4 + 12 * 4 + 4 * 12 + 12 * 3)
    # A gradient of the kernels multiplies as often: one matrix for each group of rows.
    rows, sizes = draw(10, 12), jnp.array([3, 0, 5, 2])
    both = jax.grad(lambda w: jnp.sum(lax.ragged_dot(rows, w, sizes)))
    assert structure.count_macs(both, WEIGHTS["up"]) == 10 * 12 * 16


def test_what_groups_of_rows_are_contracted_over_stays():
    """The rows come from a parameter: they are what the groups are made of."""

    def function(w, sizes):
        return jax.vjp(lambda kernel: lax.ragged_dot(w["rows"], kernel, sizes), w["up"])[1](
            w["rows"] @ w["up"][0]
        )[0]

    weights = {"rows": draw(10, 12), "up": draw(4, 12, 16)}
    groups = structure.find_groups(function, weights, jnp.array([3, 0, 5, 2]))
    assert not groups
