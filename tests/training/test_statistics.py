"""Running statistics measured again: by hand, in NNX and Linen, and what is no statistic."""

import dataclasses
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from jaxprune import structure, training


@pytest.fixture
def batches():
    rng = np.random.default_rng(0)
    return [rng.normal(3 * i, 1 + i, (16, 4)).astype(np.float32) for i in range(3)]


def by_hand(batches, kernels):
    """Means and variances of the inputs of each norm layer, whose batch statistics count."""
    found = []
    for kernel in kernels:
        inputs = [x.astype(np.float64) @ kernel for x in batches]
        found += [np.mean([x.mean(0) for x in inputs], 0), np.mean([x.var(0) for x in inputs], 0)]
        batches = [(x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) for x in inputs]
    return found


@pytest.mark.parametrize("momentum", [0.99, 0.9, 0.0])
def test_equals_statistics_computed_by_hand_in_nnx(batches, momentum):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = (nnx.Linear(4, 4, use_bias=False, rngs=rngs) for _ in range(2))
            norm = {"momentum": momentum, "epsilon": 1e-5, "rngs": rngs}
            self.norm_a, self.norm_b = (nnx.BatchNorm(4, **norm) for _ in range(2))
            self.drop = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.drop(self.norm_b(self.b(self.norm_a(self.a(x)))))

    functions = structure.from_nnx(Model(nnx.Rngs(0)))
    before = functions.variables
    found = training.measure_statistics(functions.train, before, iter(batches))
    kernels = [np.asarray(before["params"][name]["kernel"]) for name in "ab"]
    own = [found["state"][f"norm_{name}"][what] for name in "ab" for what in ("mean", "var")]
    for value, expected in zip(own, by_hand(batches, kernels), strict=True):
        np.testing.assert_allclose(value, expected, rtol=2e-4, atol=2e-4)
    # Neither parameters nor the counters of random keys change.
    jax.tree.map(np.testing.assert_array_equal, found["params"], before["params"])
    counts = [int(tree["state"]["drop"]["rngs"]["count"]) for tree in (found, before)]
    assert counts[0] == counts[1]


def test_equals_statistics_computed_by_hand_in_linen(batches):
    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.Dense(4, use_bias=False)(x)
            return linen.BatchNorm(use_running_average=False)(x)

    model = Model()
    variables = model.init(jax.random.key(0), batches[0])
    found = training.measure_statistics(
        lambda v, x: model.apply(v, x, mutable="batch_stats"), variables, batches
    )
    mean, variance = by_hand(batches, [np.asarray(variables["params"]["Dense_0"]["kernel"])])
    own = found["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(own["mean"], mean, rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(own["var"], variance, rtol=2e-4, atol=2e-4)


def test_what_training_counts_is_no_statistic(batches):
    def train(variables, x):
        own = variables["stats"]
        mean = 0.5 * own["mean"] + 0.5 * x.mean(0)
        return x, {"stats": {"mean": mean, "seen": own["seen"] + 1.0, "steps": own["steps"] + 1}}

    stats = {"mean": jnp.zeros(4), "seen": jnp.float32(7), "steps": jnp.int32(3)}
    found = training.measure_statistics(train, {"params": {}, "stats": stats}, batches)["stats"]
    assert (float(found["seen"]), int(found["steps"])) == (7.0, 3)
    np.testing.assert_allclose(found["mean"], np.mean(batches, (0, 1)), rtol=1e-5)


def test_state_that_the_output_depends_on_keeps_its_value(batches):
    """Spectral norm divides by a vector that it updates; zeros in its place would give NaN."""

    def train(variables, x):
        kernel, own = variables["params"]["kernel"], variables["stats"]
        vector = own["vector"] / jnp.linalg.norm(own["vector"])
        x = x @ (kernel / jnp.linalg.norm(vector @ kernel))
        vector = kernel @ (vector @ kernel)
        return x, {"stats": {"mean": 0.9 * own["mean"] + 0.1 * x.mean(0), "vector": vector}}

    kernel = jax.random.normal(jax.random.key(0), (4, 4))
    stats = {"mean": jnp.full(4, 7.0), "vector": jnp.arange(1.0, 5.0)}
    variables = {"params": {"kernel": kernel}, "stats": stats}
    found = training.measure_statistics(train, variables, batches)["stats"]
    np.testing.assert_array_equal(found["vector"], stats["vector"])
    expected = np.mean([train(variables, x)[0].mean(0) for x in batches], 0)
    np.testing.assert_allclose(found["mean"], expected, rtol=1e-4, atol=1e-5)


def test_a_network_without_channels_is_measured(batches):
    model = nnx.Sequential(
        nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.BatchNorm(8, rngs=nnx.Rngs(0)), nnx.relu,
        nnx.Linear(8, 2, rngs=nnx.Rngs(1)),
    )  # fmt: skip
    functions = structure.from_nnx(model)
    variables = functions.variables
    groups = structure.find_groups(functions.traces(batches[0]), variables)
    plan = groups.plan({name: np.arange(group.size) % 2 == 0 for name, group in groups.items()})
    train = plan.wrap(functions.train)
    small = training.measure_statistics(train, plan.compact(variables), batches)
    whole = training.measure_statistics(functions.train, variables, batches)
    found, expected = (tree["state"]["layers"][1] for tree in (small, plan.compact(whole)))
    for name in ("mean", "var"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-4)


@pytest.fixture
def unequal():
    """Batches of 3, 16 and 7 rows with different means."""
    rng = np.random.default_rng(1)
    return [rng.normal(2 * i, 1 + i, (n, 4)).astype(np.float32) for i, n in enumerate((3, 16, 7))]


def pooled_by_hand(batches, kernels):
    """Means and variances of the inputs of each norm layer over the rows of all batches."""
    found = []
    for kernel in kernels:
        inputs = [x.astype(np.float64) @ kernel for x in batches]
        found += [np.concatenate(inputs).mean(0), np.concatenate(inputs).var(0)]
        batches = [(x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) for x in inputs]
    return found


@pytest.mark.parametrize("momentum", [0.99, 0.5])
def test_unequal_batches_count_as_one_large_batch(unequal, momentum):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = (nnx.Linear(4, 4, use_bias=False, rngs=rngs) for _ in range(2))
            norm = {"momentum": momentum, "epsilon": 1e-5, "rngs": rngs}
            self.norm_a, self.norm_b = (nnx.BatchNorm(4, **norm) for _ in range(2))

        def __call__(self, x):
            return self.norm_b(self.b(self.norm_a(self.a(x))))

    functions = structure.from_nnx(Model(nnx.Rngs(0)))
    before = functions.variables
    found = training.measure_statistics(
        functions.train, before, iter(unequal), mean_of=training.mean_beside
    )
    kernels = [np.asarray(before["params"][name]["kernel"]) for name in "ab"]
    own = [found["state"][f"norm_{name}"][what] for name in "ab" for what in ("mean", "var")]
    for value, expected in zip(own, pooled_by_hand(unequal, kernels), strict=True):
        np.testing.assert_allclose(value, expected, rtol=2e-4, atol=2e-4)
    # In the first layer this is the variance of all rows; the mean of variances is far from it.
    mean_of_variances = np.mean([np.var(x @ kernels[0], 0) for x in unequal], 0)
    assert np.abs(own[1] / mean_of_variances - 1).max() > 0.2


def test_batches_that_are_trees_need_a_weight(unequal):
    def train(variables, batch):
        scale, x = batch
        old, x = variables["stats"], scale * x
        mean, var = (0.9 * old[k] + 0.1 * getattr(x, k)(0) for k in ("mean", "var"))
        return x, {"stats": {"mean": mean, "var": var}}

    variables = {"stats": {"mean": jnp.zeros(4), "var": jnp.ones(4)}}
    batches = [(2.0, x) for x in unequal]
    options = {"mean_of": training.mean_beside, "weight": lambda batch: len(batch[1])}
    found = training.measure_statistics(train, variables, batches, **options)["stats"]
    rows = 2 * np.concatenate(unequal)
    np.testing.assert_allclose(found["mean"], rows.mean(0), rtol=1e-4)
    np.testing.assert_allclose(found["var"], rows.var(0), rtol=1e-4)
    with pytest.raises(ValueError, match="`batches` must hold arrays whose first axis"):
        training.measure_statistics(train, variables, batches, mean_of=training.mean_beside)


def test_the_mean_of_a_variance_must_be_a_statistic(batches):
    def train(variables, x):
        return x, {"stats": {"var": 0.9 * variables["stats"]["var"] + 0.1 * x.var(0)}}

    variables = {"stats": {"var": jnp.ones(4)}}
    with pytest.raises(ValueError, match="(?s)`mean_of` must name a statistic.*stats/var"):
        training.measure_statistics(train, variables, batches, mean_of=training.mean_beside)


def test_training_is_traced_once_for_all_parameters(batches):
    traces = []

    def train(variables, x):
        traces.append(1)
        old = variables["stats"]["mean"]
        return x, {"stats": {"mean": 0.9 * old + 0.1 * variables["params"]["w"] * x.mean(0)}}

    for scale in range(3):
        variables = {"params": {"w": jnp.full(4, scale)}, "stats": {"mean": jnp.zeros(4)}}
        found = training.measure_statistics(train, variables, batches)
        np.testing.assert_allclose(
            found["stats"]["mean"], scale * np.mean(batches, (0, 1)), rtol=1e-5
        )
    assert len(traces) == 1


def test_errors(batches):
    variables = {"params": {"w": jnp.ones(4)}, "stats": {"mean": jnp.zeros(4)}}
    with pytest.raises(ValueError, match="`batches` must hold at least one batch"):
        training.measure_statistics(lambda v, x: (x, v), variables, [])
    with pytest.raises(ValueError, match="`train` updates no running statistics"):
        training.measure_statistics(lambda v, x: (x, {}), variables, batches)
    with pytest.raises(ValueError, match="`train` updates no running statistics"):
        training.measure_statistics(lambda v, x: (x, {"stats": v["stats"]}), variables, batches)


def test_a_module_that_cannot_be_hashed_is_a_function_too(batches):
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass  # compares its arrays, so it has no hash
    class Module:
        decay: jax.Array

        def __call__(self, variables, x):
            moved = self.decay * variables["stats"]["mean"] + (1 - self.decay) * x.mean()
            return x, {"stats": {"mean": moved}}

    with pytest.raises(TypeError, match="unhashable"):
        hash(Module(jnp.float32(0.9)))
    found = training.measure_statistics(
        Module(jnp.float32(0.9)), {"stats": {"mean": jnp.float32(0)}}, batches
    )
    expected = np.mean([x.mean() for x in batches])
    np.testing.assert_allclose(found["stats"]["mean"], expected, rtol=1e-4)


def test_functions_of_earlier_calls_are_let_go(batches):
    class Large:
        """What a function may hold, such as the arrays of a network."""

    def call():
        held = Large()

        def train(variables, x):
            assert held is not None
            return x, {"stats": {"mean": 0.9 * variables["stats"]["mean"] + 0.1 * x.mean()}}

        training.measure_statistics(train, {"stats": {"mean": jnp.float32(0)}}, batches[:1])
        return weakref.ref(held)

    kept = [call() for _ in range(12)]
    gc.collect()
    assert sum(own() is not None for own in kept) <= 8
