"""Losses against a teacher: formulas, gradients, and a pruned network that learns from them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune
from jaxprune import training


def numpy_distillation(student, teacher, t):
    def softmax(x):
        x = np.exp(x / t - (x / t).max(-1, keepdims=True))
        return x / x.sum(-1, keepdims=True)

    q, p = softmax(student), softmax(teacher)
    return t**2 * (p * (np.log(p) - np.log(q))).sum(-1)


@pytest.mark.parametrize("t", [0.5, 1.0, 4.0])
def test_distillation_is_the_formula(t):
    student, teacher = np.random.default_rng(0).normal(size=(2, 3, 4, 7))
    found = training.distillation(jnp.asarray(student), jnp.asarray(teacher), temperature=t)
    assert found.shape == (3, 4) and found.dtype == jnp.float32
    np.testing.assert_allclose(found, numpy_distillation(student, teacher, t), rtol=2e-4)
    other = training.distillation(
        jnp.moveaxis(jnp.asarray(student), -1, 0),
        jnp.moveaxis(jnp.asarray(teacher), -1, 0),
        temperature=t,
        axis=0,
    )
    np.testing.assert_allclose(other, found, rtol=1e-5)


def test_equal_predictions_are_at_no_distance_and_half_precision_is_summed_in_float32():
    logits = 30 * jax.random.normal(jax.random.key(0), (2, 50_000)).astype(jnp.bfloat16)
    np.testing.assert_allclose(training.distillation(logits, logits), 0, atol=1e-6)
    far = training.distillation(logits, jnp.roll(logits, 1, axis=1))
    assert far.dtype == jnp.float32 and bool((far > 1).all()) and bool(jnp.isfinite(far).all())


def test_the_size_of_the_gradient_does_not_depend_on_the_temperature():
    """Hinton et al., section 2.1: for high temperatures it is that of the logits' difference."""
    student, teacher = jax.random.normal(jax.random.key(1), (2, 5))

    def gradient(t):
        return jax.grad(lambda s: training.distillation(s, teacher, temperature=t))(student)

    centred = (student - student.mean()) - (teacher - teacher.mean())
    np.testing.assert_allclose(gradient(300.0), centred / 5, atol=0.01)


def test_teachers_get_no_gradient():
    a, b = jnp.array([0.3, -1.0]), jnp.array([1.0, 2.0])
    for loss in (training.distillation, training.hidden_distance):
        ours, theirs = jax.grad(loss, argnums=(0, 1))(a, b)
        assert bool((ours != 0).any()) and not bool((theirs != 0).any())


def test_hidden_distance_is_relative_and_matched_by_path():
    states = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[1.0], [1.0]])}
    teacher = {"b": jnp.array([[1.0], [3.0]]), "a": jnp.array([1.0, 0.0])}
    assert float(training.hidden_distance(states, teacher)) == pytest.approx((4 / 1 + 4 / 10) / 2)
    assert float(training.hidden_distance([jnp.zeros(2)], [jnp.zeros(2)])) == 0


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: training.distillation(jnp.ones((2, 3)), jnp.ones((3, 3))), r"\(2, 3\) and `teach"),
        (
            lambda: training.distillation(jnp.ones(3), jnp.ones(3), temperature=0),
            "at least 1e-3; got 0",
        ),
        (lambda: training.distillation(jnp.ones(3), jnp.ones(3), temperature=np.nan), "got nan"),
        (lambda: training.hidden_distance({"a": jnp.ones(2)}, {"b": jnp.ones(2)}), "`states`"),
    ],
)
def test_bad_arguments_are_named(call, text):
    with pytest.raises(ValueError, match=text):
        call()


@pytest.mark.slow
def test_teaching_lowers_the_gap_on_held_out_data():
    """A pruned network without labels, with its masks fixed, against the same without teaching."""
    rng = np.random.default_rng(0)
    shapes = {"first": (16, 64), "second": (64, 64), "last": (64, 5)}
    dense = {
        n: jnp.asarray(rng.normal(size=s) / np.sqrt(s[0]), jnp.float32) for n, s in shapes.items()
    }
    inputs = jnp.asarray(rng.normal(size=(1200, 16)), jnp.float32)
    seen, held_out = inputs[:1000], inputs[1000:]

    def apply(params, x):
        hidden = jax.nn.relu(jax.nn.relu(x @ params["first"]) @ params["second"])
        return hidden @ params["last"], hidden

    def loss(params, x, weight):
        (logits, hidden), (wanted, states) = apply(params, x), apply(dense, x)
        taught = training.distillation(logits, wanted, temperature=2.0).mean()
        return taught + weight * training.hidden_distance(hidden, states)

    pruned, masks = jaxprune.prune(dense, 0.8)
    wanted = apply(dense, held_out)[0]
    start = float(training.distillation(apply(pruned, held_out)[0], wanted).mean())
    for weight in (0.0, 1.0):
        optimizer = jaxprune.chain(optax.adam(1e-3), jaxprune.fixed_mask_transform(masks))
        params, state = pruned, optimizer.init(pruned)

        @jax.jit
        def step(params, state, x, weight=weight, optimizer=optimizer):
            updates, state = optimizer.update(jax.grad(loss)(params, x, weight), state, params)
            return optax.apply_updates(params, updates), state

        for i in range(150):
            params, state = step(params, state, seen[100 * (i % 10) : 100 * (i % 10) + 100])
        logits = apply(params, held_out)[0]
        assert float(training.distillation(logits, wanted).mean()) < 0.5 * start
        assert all(bool((params[n] == 0)[~masks[n]].all()) for n in shapes)
