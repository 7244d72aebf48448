"""Reconstruction against numpy.linalg.lstsq, for dense layers, convolutions and stacked layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import search, structure
from tests.support.searching import planted, problem_of


def conv(x, kernel, stride=1, padding="SAME", groups=1):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def dense(w, x):
    return jax.nn.relu(x @ w["in"]) @ w["out"]


def convolved(w, x, stride=1, padding="SAME"):
    return conv(jax.nn.relu(x @ w["in"]), w["out"], stride, padding)


def variables_of(shapes, seed=0):
    generator = np.random.default_rng(seed)
    return {
        name: jnp.asarray(generator.normal(size=shape) / np.sqrt(np.prod(shape[:-1])), jnp.float32)
        for name, shape in shapes.items()
    }


CASES = {
    "dense": (dense, {"in": (5, 8), "out": (8, 3)}, (200, 5)),
    "1x1": (convolved, {"in": (5, 8), "out": (1, 1, 8, 3)}, (4, 6, 6, 5)),
    "3x3": (convolved, {"in": (3, 8), "out": (3, 3, 8, 4)}, (8, 7, 7, 3)),
    "5x5 of stride 2": (
        lambda w, x: convolved(w, x, 2, "VALID"),
        {"in": (3, 8), "out": (5, 5, 8, 4)},
        (60, 9, 9, 3),
    ),
}


def case(name):
    apply, shapes, batch = CASES[name]
    generator = np.random.default_rng(1)
    images = [jnp.asarray(generator.normal(size=batch), jnp.float32) for _ in range(3)]
    variables = variables_of(shapes)
    groups = structure.find_groups(apply, variables, images[0])
    return apply, variables, images, groups


@pytest.mark.parametrize("name", CASES)
def test_kernels_are_those_of_lstsq(name):
    apply, variables, images, groups = case(name)
    kept = np.arange(8) % 3 > 0
    plan = groups.plan({"in:1": kept})
    inputs = search.find_inputs(apply, variables, images[:2], groups)
    found = search.reconstruct(variables, plan, inputs, damping=0.0)
    rows = []
    for batch in images[:2]:
        hidden = np.maximum(np.asarray(batch) @ np.asarray(variables["in"]), 0)
        rows.append(_patches(name, hidden))
    features = np.concatenate(rows).astype(np.float64)
    kernel = np.asarray(variables["out"], np.float64)
    flat = kernel.reshape(-1, kernel.shape[-1])
    chosen = np.broadcast_to(kept[:, None], kernel.shape[-2:]).reshape(kernel.shape[-2:])
    chosen = np.broadcast_to(chosen, kernel.shape).reshape(flat.shape)[:, 0]
    wanted = np.zeros_like(flat)
    wanted[chosen] = np.linalg.lstsq(features[:, chosen], features @ flat, rcond=None)[0]
    np.testing.assert_allclose(
        np.asarray(found["out"]).reshape(flat.shape), wanted, rtol=2e-3, atol=2e-4
    )
    np.testing.assert_array_equal(found["in"], variables["in"])
    assert found["out"].dtype == jnp.float32


def _patches(name, hidden):
    """Rows of window positions times channels, cut out by hand."""
    size = {"dense": 0, "1x1": 1, "3x3": 3}.get(name, 5)
    if size == 0:
        return hidden
    stride = 2 if size == 5 else 1
    if size == 3:
        hidden = np.pad(hidden, ((0, 0), (1, 1), (1, 1), (0, 0)))
    places = range(0, hidden.shape[1] - size + 1, stride)
    rows = [
        hidden[:, i : i + size, j : j + size].reshape(len(hidden), -1)
        for i in places
        for j in places
    ]
    return np.concatenate(rows)


@pytest.mark.parametrize("name", CASES)
def test_the_error_on_other_inputs_falls(name):
    apply, variables, images, groups = case(name)
    # A low-dimensional input makes channels predictable from each other.
    plan = groups.plan({"in:1": np.arange(8) < 6}, multiple=1)
    inputs = search.find_inputs(apply, variables, images[:2], groups)
    fitted = search.reconstruct(variables, plan, inputs)
    wanted = apply(variables, images[2])

    def error(own):
        return float(jnp.mean((apply(plan.mask(own), images[2]) - wanted) ** 2))

    assert error(fitted) < 0.8 * error(variables)
    small = plan.wrap(apply)(plan.compact(fitted), images[2])
    np.testing.assert_allclose(small, apply(plan.mask(fitted), images[2]), rtol=1e-4, atol=1e-4)


def test_copies_are_replaced_exactly():
    """Of channels that are copies, one can take over the weights of the others."""
    w = variables_of({"in": (4, 4), "out": (8, 3)})
    w["in"] = jnp.concatenate([w["in"], w["in"]], 1)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(100, 4)), jnp.float32)
    groups = structure.find_groups(dense, w, x)
    plan = groups.plan({"in:1": np.arange(8) < 4}, multiple=1)
    fitted = search.reconstruct(w, plan, search.find_inputs(dense, w, [x], groups))
    np.testing.assert_allclose(dense(plan.mask(fitted), x), dense(w, x), atol=1e-4)
    assert float(jnp.abs(dense(plan.mask(w), x) - dense(w, x)).max()) > 0.1


def test_copies_are_free_for_a_search_that_reconstructs():
    own = planted((32, 32, 32))
    variables = dict(own.variables)
    variables["b"] = jnp.concatenate(
        [own.variables["b"][:, :8]] * 4, 1
    )  # eight channels, four times
    dense_outputs = own.apply(variables, own.images)

    @jax.jit
    def evaluate(variables):
        return -jnp.mean((own.apply(variables, own.images) - dense_outputs) ** 2)

    inputs = search.find_inputs(own.apply, variables, [own.images], own.groups)
    # Of each copy one is kept, whatever its norm: the order must be that of the first eight.
    scores = {name: -np.arange(32.0) for name in own.groups}
    answer = {"a:1": 32, "b:1": 8, "c:1": 32}
    plan = own.groups.plan({"b:1": np.arange(32) < 8})
    cost = structure.count_parameters
    share = cost(plan) / cost(own.groups.plan({}))
    problem = search.channels(
        own.groups,
        variables,
        own.layers,
        cost=cost,
        budget=share,
        scores=scores,
        refit=lambda variables, plan: search.reconstruct(variables, plan, inputs),
    )
    found = search.random(problem, evaluate, evaluations=200, seed=0)
    scale = float(jnp.mean(dense_outputs**2))
    assert found.kept == answer and found.score > -1e-5 * scale
    plain = search.random(problem._replace(refit=None), evaluate, evaluations=200, seed=0)
    assert plain.score < -1e-2 * scale
    together = search.random(problem, evaluate, evaluations=8, seed=0, at_once=4)
    np.testing.assert_allclose(
        [x.score for x in together.history],
        [x.score for x in found.history[:8]],
        rtol=1e-2,
        atol=1e-5,
    )


def test_stacked_layers_are_fitted_each_by_its_own_inputs():
    def apply(w, x):
        def block(x, own):
            return x + jax.nn.relu(x @ own["up"]) @ own["down"], None

        return jax.lax.scan(block, x, {"up": w["up"], "down": w["down"]})[0] @ w["head"]

    w = variables_of({"up": (3, 6, 8), "down": (3, 8, 6), "head": (6, 2)})
    x = jnp.asarray(np.random.default_rng(0).normal(size=(80, 6)), jnp.float32)
    groups = structure.find_groups(apply, w, x)
    (name,) = [own for own in groups if own.startswith("up") or own.startswith("down")]
    kept = np.arange(8) < 6
    plan = groups.plan({name: kept}, multiple=1)
    found = search.reconstruct(w, plan, search.find_inputs(apply, w, [x], groups), damping=0.0)
    state = np.asarray(x, np.float64)
    for layer in range(3):
        up, down = (np.asarray(w[own][layer], np.float64) for own in ("up", "down"))
        hidden = np.maximum(state @ up, 0)
        wanted = np.linalg.lstsq(hidden[:, kept], hidden @ down, rcond=None)[0]
        np.testing.assert_allclose(found["down"][layer][kept], wanted, rtol=2e-3, atol=2e-4)
        assert (np.asarray(found["down"][layer])[~kept] == 0).all()
        state = state + hidden @ down


def test_depthwise_kernels_stay():
    def apply(w, x):
        return jax.nn.relu(conv(jax.nn.relu(x @ w["in"]), w["depth"], groups=8)) @ w["out"]

    w = variables_of({"in": (3, 8), "depth": (3, 3, 1, 8), "out": (8, 2)})
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 5, 5, 3)), jnp.float32)
    groups = structure.find_groups(apply, w, x)
    plan = groups.plan({"depth:3": np.arange(8) < 4}, multiple=1)
    found = search.reconstruct(w, plan, search.find_inputs(apply, w, [x], groups))
    np.testing.assert_array_equal(found["depth"], w["depth"])
    assert (found["out"] != w["out"]).any()


def test_a_whole_plan_changes_nothing():
    apply, variables, images, groups = case("3x3")
    inputs = search.find_inputs(apply, variables, images, groups)
    found = search.reconstruct(variables, groups.plan({}), inputs)
    assert found["out"] is variables["out"]


def test_inputs_that_are_always_zero_are_solvable():
    apply, variables, images, groups = case("dense")
    variables = {**variables, "in": jnp.zeros((5, 8))}
    plan = groups.plan({"in:1": np.arange(8) < 4}, multiple=1)
    found = search.reconstruct(
        variables, plan, search.find_inputs(apply, variables, images, groups)
    )
    assert (found["out"] == 0).all()


def test_bad_input_is_refused():
    apply, variables, images, groups = case("dense")
    inputs = search.find_inputs(apply, variables, images, groups)
    plan = groups.plan({"in:1": np.arange(8) < 4}, multiple=1)
    with pytest.raises(ValueError, match="`damping` must be at least 0, but is -1"):
        search.reconstruct(variables, plan, inputs, damping=-1)
    other = {**variables, "out": jnp.ones((9, 3))}
    with pytest.raises(
        ValueError, match=r"`inputs` must be those of `variables`[\s\S]*out: \(8, 3\)"
    ):
        search.reconstruct(other, plan, inputs)
    zero = {**variables, "in": jnp.zeros((5, 8))}
    inputs = search.find_inputs(apply, zero, images, groups)
    with pytest.raises(ValueError, match=r"raise `damping`[\s\S]*out: Singular"):
        search.reconstruct(zero, plan, inputs, damping=0.0)


def test_problems_take_a_refit():
    own = planted()
    inputs = search.find_inputs(own.apply, own.variables, [own.images], own.groups)
    plain = search.uniform(problem_of(own), own.evaluate)
    fitted = search.uniform(
        problem_of(own, refit=lambda v, plan: search.reconstruct(v, plan, inputs)), own.evaluate
    )
    assert fitted.kept == plain.kept and fitted.score > plain.score
