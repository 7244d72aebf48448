"""Losses against a teacher: formulas, gradients, taught steps, and a pruned network that learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune
from jaxprune import sharding, training
from jaxprune.data import Split


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


def _linear(params, model_state, inputs):
    return inputs @ params["kernel"], {"seen": model_state["seen"] + 1}


def _teach(teacher, inputs):
    return inputs @ teacher["kernel"] + teacher["bias"][None]


def _taught(**options):
    """A step of SGD with a rate of 1, a state, a batch of 8 and two teachers."""
    draws = np.random.default_rng(0)
    made = [draws.normal(size=shape).astype(np.float32) for shape in ((8, 5), (5, 3), (5, 3), (3,))]
    images, kernel, *teacher = (jnp.asarray(array) for array in made)
    tx = optax.sgd(1.0)
    options = {"prepare": lambda key, images: 2 * images} | options
    step = training.make_train_step(_linear, tx, options.pop("prepare"), **options)
    params = {"kernel": kernel}
    start = training.TrainState(jnp.int32(0), params, {"seen": jnp.int32(0)}, tx.init(params))
    teacher = dict(zip(("kernel", "bias"), teacher, strict=True))
    return step, start, (images, jnp.arange(8) % 3, jax.random.key(0)), teacher


def _by_hand(weight, smoothing, start, batch, teacher):
    """Loss and kernel after a step."""
    x, labels = 2 * np.asarray(batch[0], np.float64), np.asarray(batch[1])
    kernel = np.asarray(start.params["kernel"], np.float64)
    logits = x @ kernel, x @ np.asarray(teacher["kernel"]) + np.asarray(teacher["bias"])
    q, p = (np.exp(own) / np.exp(own).sum(-1, keepdims=True) for own in logits)
    y = (1 - smoothing) * np.eye(3)[labels] + smoothing / 3
    cross, taught = -(y * np.log(q)).sum(-1), (p * np.log(p / q)).sum(-1)
    gradient = x.T @ ((1 - weight) * (q - y) + weight * (q - p)) / len(x)
    return ((1 - weight) * cross + weight * taught).mean(), kernel - gradient


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("remat", [False, True])
def test_a_step_with_a_teacher_by_hand(parts, weight, remat):
    options = {"parts": parts, "label_smoothing": 0.1, "remat": remat}
    step, start, batch, teacher = _taught(teach=_teach, teacher_weight=weight, **options)
    state, metrics = jax.jit(step)(start, *batch, teacher=teacher)
    loss, kernel = _by_hand(weight, 0.1, start, batch, teacher)
    assert float(metrics["train_loss"]) == pytest.approx(loss, rel=1e-5)
    np.testing.assert_allclose(state.params["kernel"], kernel, rtol=1e-4, atol=1e-5)
    assert int(state.model_state["seen"]) == parts


def test_a_weight_of_0_is_no_teacher_to_the_bit():
    alone, start, batch, _ = _taught()
    step, *_, teacher = _taught(teach=_teach, teacher_weight=0.0)
    expected = jax.jit(alone)(start, *batch)
    found = jax.jit(step)(start, *batch, teacher=teacher)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_teachers_are_an_argument_of_one_program():
    traces = []

    def teach(teacher, inputs):
        traces.append(inputs.shape)
        return _teach(teacher, inputs)

    step, start, batch, teacher = _taught(teach=teach)
    run, other = jax.jit(step), jax.tree.map(jnp.negative, teacher)
    first, second = run(start, *batch, teacher=teacher), run(start, *batch, teacher=other)
    assert traces == [(8, 5)]
    assert bool((first[0].params["kernel"] != second[0].params["kernel"]).any())
    # The augmentation is drawn once for both networks.
    noisy, *_ = _taught(teach=teach, prepare=lambda key, x: x + jax.random.normal(key, x.shape))
    same = {"kernel": start.params["kernel"], "bias": jnp.zeros(3)}
    kernel = noisy(start, *batch, teacher=same)[0].params["kernel"]
    alone, *_ = _taught(prepare=lambda key, x: x + jax.random.normal(key, x.shape))
    half = (start.params["kernel"] + alone(start, *batch)[0].params["kernel"]) / 2
    np.testing.assert_allclose(kernel, half, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_teacher_on_eight_devices_is_not_donated(parts):
    """Two steps in one call; the state is donated, the teacher is not."""
    found = []
    for devices in (1, 8):
        step, start, (images, labels, key), teacher = _taught(teach=_teach, parts=parts)
        mesh = sharding.make_mesh(devices=jax.devices()[:devices])
        run = training.make_chunk_step(step, mesh)
        images = jnp.concatenate([images, images + 1])
        split = Split(images, jnp.concatenate([labels, labels]))
        state, split, key, teacher = sharding.replicate((start, split, key, teacher), mesh)
        before = jax.device_get(teacher)
        rows = np.arange(16, dtype=np.int32).reshape(2, 8)
        state, metrics = run(state, split, rows, key, teacher=teacher)
        found.append(jax.device_get((state.params, metrics)))
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(teacher), before)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), *found)


def test_bad_teachers_are_named():
    for weight in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="`teacher_weight` must lie in"):
            _taught(teach=_teach, teacher_weight=weight)
    step, start, batch, teacher = _taught(teach=_teach)
    with pytest.raises(TypeError, match="`teacher` is missing: pass what `teach` takes"):
        step(start, *batch)
    alone, *_ = _taught()
    with pytest.raises(TypeError, match="unexpected keyword argument 'teacher'"):
        alone(start, *batch, teacher=teacher)
    with pytest.raises(ValueError, match="`logits` .* and `teacher` .* must have the same shape"):
        step(start, *batch, teacher={"kernel": jnp.ones((5, 4)), "bias": jnp.ones(4)})
