"""Tables of latencies on a synthetic clock, their file, and plans that they price."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import files, search, structure
from tests.support.searching import planted

OWN = planted()


def linear(layer, c, n):
    """A clock whose seconds are those of a bilinear function, so that interpolation is exact."""
    return 1e-6 + 1e-9 * c * n * layer.k**2


def phone():
    """A depthwise network."""

    def conv(x, kernel, groups=1):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )  # fmt: skip

    def apply(w, x):
        x = jax.nn.relu(conv(x, w["in"]))
        x = jax.nn.relu(conv(x, w["depth"], 16))
        return jnp.mean(jax.nn.relu(conv(x, w["point"])), (1, 2)) @ w["head"]

    shapes = {"in": (3, 3, 3, 16), "depth": (3, 3, 1, 16), "point": (1, 1, 16, 24), "head": (24, 4)}
    w = {name: jnp.ones(shape) for name, shape in shapes.items()}
    return apply, w, jnp.ones((2, 6, 6, 3))


def test_the_sum_of_a_table_is_that_of_the_clock():
    layers = search.find_layers(OWN.apply, OWN.variables, OWN.images)
    table = search.measure_latencies(layers, clock=linear)
    for counts in [(32, 32, 32), (16, 8, 24), (13, 29, 8)]:
        keep = {f"{name}:1": np.arange(32) < k for name, k in zip("abc", counts, strict=True)}
        plan = OWN.groups.plan(keep, multiple=1)
        a, b, c = counts
        wanted = sum(linear(layers[0], *own) for own in [(6, a), (a, b), (b, c), (c, 4)])
        assert table.cost(plan) == pytest.approx(wanted)


def test_depthwise_layers_are_priced_by_their_channels():
    apply, w, x = phone()
    groups = structure.find_groups(apply, w, x)
    layers = search.find_layers(apply, w, x)
    asked = []

    def clock(layer, c, n):
        asked.append((layer.path, c, n))
        return 1e-6 * n if layer.groups > 1 else 0.0

    table = search.measure_latencies(layers, points=4, clock=clock)
    assert [own[1:] for own in asked if own[0] == "depth"] == [(16, n) for n in (4, 8, 12, 16)]
    plan = groups.plan({"in:3" if "in:3" in groups else "depth:3": np.arange(16) < 10}, multiple=1)
    assert table.cost(plan) == pytest.approx(10e-6)
    assert table.cost(groups.plan({})) == pytest.approx(16e-6)


def test_a_wider_layer_never_counts_as_cheaper():
    layers = search.find_layers(OWN.apply, OWN.variables, OWN.images)
    generator = np.random.default_rng(0)
    table = search.measure_latencies(layers, clock=lambda *own: generator.uniform(1e-6, 2e-6))
    for own in table.layers.values():
        seconds = np.array(own.seconds)
        assert (np.diff(seconds, axis=0) >= 0).all() and (np.diff(seconds, axis=1) >= 0).all()


def test_layers_of_one_shape_are_measured_once():
    layers = search.find_layers(OWN.apply, OWN.variables, OWN.images)
    asked = []
    search.measure_latencies(
        layers, points=3, clock=lambda own, c, n: asked.append(own.path) or 1.0
    )
    assert set(asked) == {"a", "b", "out"}  # c has the shape of b
    assert len(asked) == 3 * 9


def test_every_search_keeps_a_budget_of_latency():
    layers = search.find_layers(OWN.apply, OWN.variables, OWN.images)
    table = search.measure_latencies(layers, clock=lambda own, c, n: 1e-6 * (c * n) ** 0.5)
    problem = search.channels(OWN.groups, OWN.variables, layers, cost=table.cost, budget=0.6)
    for found in (
        search.uniform(problem, OWN.evaluate),
        search.knapsack(problem, OWN.evaluate),
        search.ranking(problem, OWN.evaluate),
        search.greedy(problem, OWN.evaluate, evaluations=10),
        search.cross_entropy(problem, OWN.evaluate, evaluations=10, population=5),
    ):
        assert table.cost(found.plan) <= 0.6 * table.cost(OWN.groups.plan({}))


@pytest.mark.slow
def test_layers_are_timed_on_this_device():
    apply, w, x = phone()
    for layer in search.find_layers(apply, w, x):
        assert search.time_layer(layer, layer.c, max(layer.n // 2, 1)) > 0


def test_timed_layers_are_those_of_the_network(monkeypatch):
    """The program that is timed computes as many products as the layer of the smaller network."""
    from jaxprune import reports

    apply, w, x = phone()
    groups = structure.find_groups(apply, w, x)
    name = next(own for own in groups if groups[own].size == 16)
    plan = groups.plan({name: np.arange(16) < 8, "point:3": np.arange(24) < 8}, multiple=1)
    macs = []

    class Seconds:
        median = 1.0

    def count(function, *args):
        macs.append(structure.count_macs(function, *args))
        return Seconds

    monkeypatch.setattr(reports, "measure_latency", count)
    for layer, (c, n) in zip(
        search.find_layers(apply, w, x), [(3, 8), (16, 8), (8, 8), (8, 4)], strict=True
    ):
        search.time_layer(layer, c, n)
    small = structure.count_macs(plan.wrap(apply), plan.compact(w), x)
    assert sum(macs) == small


def test_tables_are_held_against_whole_networks():
    layers = search.find_layers(OWN.apply, OWN.variables, OWN.images)
    table = search.measure_latencies(layers, clock=linear)
    half = OWN.groups.plan({name: np.arange(32) < 16 for name in OWN.groups})
    plans = [OWN.groups.plan({}), half]
    shapes = []

    def clock(function, variables, images):
        shapes.append(variables["b"].shape)
        assert function(variables, images).shape == (64, 4)
        return 2 * table.cost(plans[len(shapes) - 1])

    checks = search.check_latencies(table, plans, OWN.apply, OWN.variables, OWN.images, clock=clock)
    assert [own.error for own in checks] == [-0.5, -0.5]
    assert shapes == [(32, 32), (16, 16)]


def test_files(tmp_path):
    layers = search.find_layers(OWN.apply, OWN.variables, OWN.images)
    table = search.measure_latencies(layers, clock=linear)
    table.save(tmp_path / "a.json")
    assert search.load_latencies(tmp_path / "a.json") == table


def test_a_table_of_another_device_is_refused_unless_told(tmp_path):
    layers = search.find_layers(OWN.apply, OWN.variables, OWN.images)
    table = search.measure_latencies(layers, clock=linear)
    table = table._replace(device=table.device | {"kind": "TPU v9", "jax": "0.1.0"})
    path = tmp_path / "a.json"
    table.save(path)
    with pytest.raises(ValueError, match=r"must have been measured on this device[\s\S]*TPU v9"):
        search.load_latencies(path)
    assert search.load_latencies(path, any_device=True) == table


def test_damaged_tables_are_refused(tmp_path):
    path = tmp_path / "a.json"
    search.Latencies(search.describe_device(), {}).save(path)
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(ValueError, match="is damaged"):
        search.load_latencies(path)
    path.write_text(json.dumps(files.seal({"version": 1, "device": {}, "layers": {"a": {}}})))
    with pytest.raises(ValueError, match="must have `c`"):
        search.load_latencies(path)


def test_bad_input_is_refused():
    layers = search.find_layers(OWN.apply, OWN.variables, OWN.images)
    with pytest.raises(ValueError, match="`points` must be an integer of at least 2"):
        search.measure_latencies(layers, points=1, clock=linear)
    with pytest.raises(ValueError, match="`layers` must have at least one"):
        search.measure_latencies([], clock=linear)
