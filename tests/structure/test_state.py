"""State and norm layers are found from what a function does with them, not by their names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

import jaxprune
from jaxprune import structure, trees
from jaxprune.structure import Trace
from tests.support.checks import check, draw, halves

WIDTH = 8


def new_state(output):
    return output[1]


def paths(members):
    return [member.path for member in members]


def the_only(groups):
    (group,) = groups.values()
    return group


# ---- batch norm as other frameworks keep it: other names, shapes and places


def batch_norm(h, scale, shift, averages):
    """With running averages, or with those of the batch if there are none."""
    mean, var = averages or (h.mean((0, 1, 2)), h.var((0, 1, 2)))
    spread = (None,) * (h.ndim - 1)
    mean, var, scale, shift = (x.reshape(-1)[spread] for x in (mean, var, scale, shift))
    return (h - mean) / jnp.sqrt(var + 1e-3) * scale + shift


def convolve(x, kernel):
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def haiku_like():
    """All vectors of a norm have four dimensions; averages are corrected for their start at 0."""
    vector = (1, 1, 1, WIDTH)
    params = {
        "conv": {"w": draw(3, 3, 2, WIDTH), "b": draw(WIDTH)},
        "norm": {"scale": 1 + draw(*vector) / 4, "offset": draw(*vector, seed=1)},
        "head": {"w": draw(WIDTH, 3)},
    }
    state = {
        f"norm/~/{name}_ema": {
            "average": 1e3 * jnp.arange(1.0, 1 + WIDTH)[::-1].reshape(vector),
            "hidden": jnp.ones(vector),
            "counter": jnp.int32(3),
        }
        for name in ("mean", "var")
    }

    def run(variables, x, train):
        w, new = variables["params"], {}
        h = convolve(x, w["conv"]["w"]) + w["conv"]["b"][None, None, None]
        measured = {"mean": h.mean((0, 1, 2)), "var": h.var((0, 1, 2))}
        for name, now in measured.items():
            old = variables["state"][f"norm/~/{name}_ema"]
            hidden = 0.9 * old["hidden"] + 0.1 * lax.stop_gradient(now).reshape(vector)
            count = old["counter"] + 1
            average = hidden / (1 - 0.9 ** count.astype(float))
            new[f"norm/~/{name}_ema"] = {"average": average, "hidden": hidden, "counter": count}
        running = [variables["state"][f"norm/~/{name}_ema"]["average"] for name in measured]
        h = batch_norm(h, w["norm"]["scale"], w["norm"]["offset"], None if train else running)
        return jax.nn.relu(h).mean((1, 2)) @ w["head"]["w"], {"state": new}

    return {"params": params, "state": state}, run


def equinox_like():
    """A weight and a bias; running statistics in a tuple, without names."""
    params = {
        "conv": {"weight": draw(3, 3, 2, WIDTH), "bias": draw(WIDTH, 1, 1)},
        "norm": {"weight": 1 + draw(WIDTH) / 4, "bias": draw(WIDTH, seed=1)},
        "head": {"weight": draw(3, WIDTH)},
    }
    state = (draw(WIDTH, seed=2), 1 + draw(WIDTH, seed=3) ** 2)

    def run(variables, x, train):
        w, running = variables["params"], variables["state"]
        h = convolve(x, w["conv"]["weight"]) + w["conv"]["bias"].reshape(1, 1, 1, -1)
        measured = h.mean((0, 1, 2)), h.var((0, 1, 2))
        new = tuple(0.9 * a + 0.1 * b for a, b in zip(running, measured))
        h = batch_norm(h, w["norm"]["weight"], w["norm"]["bias"], None if train else running)
        return jax.nn.relu(h).mean((1, 2)) @ w["head"]["weight"].T, {"state": new}

    return {"params": params, "state": state}, run


IMAGES = draw(4, 5, 5, 2)
LIKE = {
    "haiku": (haiku_like, "conv/w", "norm/scale", "norm/offset", 3),
    "equinox": (equinox_like, "conv/weight", "norm/weight", "norm/bias", 3),
}


def traces_of(run, *, train=True, evaluate=True):
    found = []
    if evaluate:
        found.append(Trace(lambda variables, x: run(variables, x, False)[0], (IMAGES,)))
    if train:
        found.append(Trace(lambda v, x: run(v, x, True), (IMAGES,), new_state))
    return found


@pytest.mark.parametrize("how", ["evaluate", "train", "both"])
@pytest.mark.parametrize("framework", LIKE)
def test_scores_and_gates_of_other_frameworks(framework, how):
    build, kernel, scale, shift, axis = LIKE[framework]
    variables, run = build()
    traces = traces_of(run, train=how != "evaluate", evaluate=how != "train")
    group = the_only(groups := structure.find_groups(traces, variables))
    leaves = trees.leaf_by_path(variables["params"])
    rows = np.moveaxis(np.asarray(leaves[kernel], float), axis, 0).reshape(WIDTH, -1)
    # Running averages of 1000 to 8000 would decide the order.
    found = structure.filter_norms(groups, variables)[group.name]
    np.testing.assert_allclose(found, np.abs(rows).sum(1))
    found = structure.norm_scales(groups, variables)[group.name]
    np.testing.assert_allclose(found, np.abs(leaves[scale]).reshape(-1), rtol=1e-6)
    gradients = jax.tree.map(lambda leaf: jnp.cos(leaf * 1.0), variables)
    found = structure.taylor(groups, variables, gradients)[group.name]
    products = [np.asarray(leaves[path], float).reshape(-1) for path in (scale, shift)]
    np.testing.assert_allclose(
        found, sum(w * np.cos(w) for w in products) ** 2, rtol=1e-5, atol=1e-9
    )
    # Neither running averages nor the bias before the norm are needed.
    assert sorted(paths(group.gates)) == sorted([f"params/{scale}", f"params/{shift}"])
    assert group.exact
    if how != "evaluate":
        assert all(path.startswith("params/") for path in groups.model.parameters)


@pytest.mark.slow
@pytest.mark.parametrize("framework", LIKE)
def test_other_frameworks_compact(framework):
    build, *_ = LIKE[framework]
    variables, run = build()
    groups, plan = check(traces_of(run), variables)
    gates = the_only(groups).gates
    flags = plan.channels(the_only(groups))
    closed = {m.path: np.where(m.channels >= 0, flags[m.channels], True) for m in gates}
    leaves = trees.leaf_by_path(variables)
    shut = [
        leaf * closed[path].reshape(leaf.shape) if path in closed else leaf
        for path, leaf in leaves.items()
    ]
    shut = jax.tree.unflatten(jax.tree.structure(variables), shut)
    for train in (False, True):
        small = plan.wrap(lambda v, x, train=train: run(v, x, train)[0])
        np.testing.assert_allclose(
            run(shut, IMAGES, train)[0], small(plan.compact(variables), IMAGES), atol=2e-5
        )


@pytest.mark.slow
@pytest.mark.parametrize("framework", LIKE)
def test_agip_takes_the_groups_of_a_function_in_evaluation_mode(framework):
    build, *_ = LIKE[framework]
    variables, run = build()
    groups = structure.find_groups(traces_of(run, train=False), variables)
    tx = jaxprune.agip_transform(0.5, groups=groups, every=1, start=0, stop=0)
    params = variables["params"]
    updates, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    (kept,) = state.channels.values()
    assert kept.sum() == WIDTH // 2


NAMES = st.lists(
    st.sampled_from("scale gamma weight g offset beta b bias mean var average p0 p1 x".split()),
    min_size=6,
    max_size=6,
    unique=True,
)
SHAPES = st.sampled_from([(WIDTH,), (1, WIDTH), (WIDTH, 1, 1), (1, 1, 1, WIDTH)])


@given(names=NAMES, shape=SHAPES)
def test_names_and_shapes_of_norms_do_not_matter(names, shape):
    kernel, scale, shift, mean, var, head = names
    variables = {
        kernel: draw(2, WIDTH),
        scale: draw(*shape, seed=1),
        shift: draw(*shape, seed=2),
        mean: draw(*shape, seed=3),
        var: draw(*shape, seed=4) ** 2,
        head: draw(WIDTH, 3),
    }

    def apply(w, x):
        averages = w[mean], w[var]
        return jax.nn.relu(batch_norm(x @ w[kernel], w[scale], w[shift], averages)) @ w[head]

    statistics = {mean, var}
    groups = structure.find_groups(
        apply, variables, draw(4, 2), parameters=lambda path, leaf: path not in statistics
    )
    group = the_only(groups)
    assert set(paths(group.gates)) == set(paths(group.norms)) == {scale, shift}
    assert paths(group.scales) == [scale] and paths(group.filters) == [kernel]


# ---- what is state


def test_what_no_gradient_reaches_is_state():
    variables = {
        "in": draw(2, 8),
        "shift": draw(8),
        "table": draw(8, seed=1),
        "steps": jnp.arange(8),
        "out": draw(8, 3),
    }

    def apply(w, x):
        def body(h, _):
            return h + jax.jit(lax.stop_gradient)(w["table"])[None], None

        h, _ = lax.scan(body, x @ w["in"], None, length=2)
        h = h + jnp.floor(w["shift"])[None] + w["steps"][None]
        return h @ w["out"]

    groups = structure.find_groups(apply, variables, draw(4, 2))
    assert groups.model.parameters == {"in", "out"}
    said = structure.find_groups(apply, variables, draw(4, 2), parameters=lambda *_: True)
    assert "table" in said.model.parameters


def test_a_function_without_gradients_proves_nothing():
    variables = {"in": draw(2, 8), "out": draw(8, 3)}

    def token(w, x):
        return jnp.argmax((x @ w["in"]) @ w["out"], -1)

    groups = structure.find_groups(token, variables, draw(4, 2))
    assert groups.model.parameters == {"in", "out"} and the_only(groups).size == 8


def test_parameters_among_the_updates_stay_parameters_if_nothing_changes_them():
    variables, run = equinox_like()

    def train(variables, x):
        output, new = run(variables, x, True)
        return output, {"params": jax.jit(lambda p: p)(variables["params"]), **new}

    groups = structure.find_groups([Trace(train, (IMAGES,), new_state)], variables)
    assert {path for path in groups.model.parameters if path.startswith("params/")} == {
        f"params/{path}" for path in trees.leaf_by_path(variables["params"])
    }
    assert not {path for path in groups.model.parameters if path.startswith("state/")}


def test_a_training_step_as_a_whole_has_to_say_what_its_parameters_are():
    variables = {"in": draw(2, 8), "out": draw(8, 3)}

    def step(w, x):
        slopes = jax.grad(lambda w: jnp.sum(((x @ w["in"]) @ w["out"]) ** 2))(w)
        return jax.tree.map(lambda a, b: a - 0.1 * b, w, slopes)

    trace = Trace(step, (draw(4, 2),), lambda output: output)
    with pytest.raises(ValueError, match="all of in, out are state.*`parameters=lambda path"):
        structure.find_groups([trace], variables)
    groups = structure.find_groups([trace], variables, parameters=lambda path, leaf: True)
    assert groups["in:1"].size == 8


def test_only_the_last_part_of_a_path_is_a_name():
    # The layer `mean` of a variational encoder is a layer.
    variables = {"mean": {"kernel": draw(2, 8)}, "out": draw(8, 3), "batch_stats": {"m": draw(8)}}

    def apply(w, x):
        return (x @ w["mean"]["kernel"] - 0 * w["batch_stats"]["m"][None]) @ w["out"]

    groups = structure.find_groups(apply, variables, draw(4, 2))
    assert groups.model.parameters == {"mean/kernel", "out"}


def vae(w, x):
    return jax.nn.relu(x @ w["enc"]) @ w["mean"] @ w["dec"]


def test_a_kernel_called_mean_is_a_parameter():
    # The layers of a variational encoder, as bare arrays.
    variables = {"enc": draw(6, 16), "mean": draw(16, 8), "dec": draw(8, 6)}
    groups = structure.find_groups(vae, variables, draw(4, 6))
    assert groups.model.parameters == {"enc", "mean", "dec"}
    assert sorted(group.size for group in groups.values()) == [8, 16]
    assert all(group.exact for group in groups.values())
    scores = structure.filter_norms(groups, variables)  # a group without filters would warn
    own = np.abs(np.asarray(variables["mean"], float)).sum(0)
    np.testing.assert_allclose(scores["mean:1"], own, rtol=1e-6)
    check([Trace(vae, (draw(4, 6),))], variables)


KERNELS = {
    "matrix": (draw(WIDTH, WIDTH), lambda h, w: h @ w),
    "transposed": (draw(WIDTH, WIDTH), lambda h, w: h @ w.T),
    "narrower type": (draw(WIDTH, WIDTH), lambda h, w: h @ w.astype("bfloat16").astype("float32")),
    "scaled": (draw(WIDTH, WIDTH), lambda h, w: h @ (w / jnp.sqrt((w**2).sum(0, keepdims=True)))),
    "heads": (draw(WIDTH, 4, 2), lambda h, w: jnp.einsum("bi,ihd->bhd", h, w).reshape(-1, WIDTH)),
    "product of two": (draw(WIDTH, WIDTH), lambda h, w: h @ (w @ w.T)),
    "convolution": (
        draw(3, WIDTH, WIDTH),
        lambda h, w: lax.conv_general_dilated(
            h[:, None], w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )[:, 0],
    ),
    "scan": (draw(3, WIDTH, WIDTH), lambda h, w: lax.scan(lambda h, w: (h @ w, None), h, w)[0]),
    "map": (
        draw(2, WIDTH, WIDTH),
        lambda h, w: jax.vmap(lambda h, w: h @ w)(jnp.stack([h, h]), w).sum(0),
    ),
    "inside of jit and remat": (
        draw(WIDTH, WIDTH),
        lambda h, w: jax.checkpoint(jax.jit(lambda h, w: h @ w))(h, w),
    ),
}
VECTORS = {
    "vector": (draw(WIDTH), lambda h, w: h - w[None]),
    "four dimensions": (draw(1, 1, 1, WIDTH), lambda h, w: h - w[0, 0]),
    "scan": (
        draw(3, WIDTH),
        lambda h, w: lax.scan(lambda h, w: (h - w[None], None), h, w)[0],
    ),
    "map": (
        draw(2, WIDTH),
        lambda h, w: jax.vmap(lambda h, w: h - w[None])(jnp.stack([h, h]), w).sum(0),
    ),
    "folded into a kernel": (draw(WIDTH), lambda h, w: h @ (jnp.eye(WIDTH) * w[None])),
    "folded into a stack of kernels": (
        draw(2, WIDTH),
        lambda h, w: jnp.einsum("bi,lio->bo", h, jnp.ones((2, WIDTH, WIDTH)) * w[:, None]),
    ),
    "an image": (draw(4, WIDTH), lambda h, w: (h - w) @ jnp.ones((WIDTH, WIDTH))),
}


def parameters_around(leaf, use, name):
    variables = {"in": draw(2, WIDTH), name: leaf, "out": draw(WIDTH, 3)}

    def apply(w, x):
        return use(jax.nn.relu(x @ w["in"]), w[name]) @ w["out"]

    return structure.find_groups(apply, variables, draw(4, 2)).model.parameters


@pytest.mark.parametrize("name", ["mean", "var"])
@pytest.mark.parametrize("kind", KERNELS)
def test_kernels_are_parameters_whatever_their_name(kind, name):
    assert parameters_around(*KERNELS[kind], name) == {"in", name, "out"}


@pytest.mark.parametrize("name", ["mean", "var"])
@pytest.mark.parametrize("kind", VECTORS)
def test_running_statistics_are_state_by_name(kind, name):
    assert parameters_around(*VECTORS[kind], name) == {"in", "out"}


def test_a_kernel_among_the_updates_or_without_gradient_is_state():
    variables = {"in": draw(2, WIDTH), "mean": draw(WIDTH, WIDTH), "out": draw(WIDTH, 3)}

    def apply(w, x, kernel):
        return x @ w["in"] @ kernel @ w["out"]

    def train(w, x):
        return apply(w, x, w["mean"]), {"mean": 0.9 * w["mean"]}

    def stopped(w, x):
        return apply(w, x, lax.stop_gradient(w["mean"]))

    x = draw(4, 2)
    for trace in (Trace(train, (x,), new_state), Trace(stopped, (x,))):
        groups = structure.find_groups([trace], variables)
        assert groups.model.parameters == {"in", "out"}


def test_names_that_leave_no_parameter_are_said():
    variables = {"mean": draw(WIDTH), "var": draw(WIDTH, seed=1)}

    def apply(w, x):
        return (x - w["mean"][None]) * w["var"][None]

    with pytest.raises(ValueError, match="all of mean, var are state.*`parameters=") as error:
        structure.find_groups(apply, variables, draw(4, WIDTH))
    assert "mean: the name `mean` is that of running statistics" in str(error.value)
    assert "var: the name `var` is that of running statistics" in str(error.value)
    assert "gradient" not in str(error.value)
    said = structure.find_groups(apply, variables, draw(4, WIDTH), parameters=lambda *_: True)
    assert said.model.parameters == {"mean", "var"}
    kernels = {"mean": draw(WIDTH, 6), "var": draw(6, WIDTH)}
    groups = structure.find_groups(lambda w, x: x @ w["mean"] @ w["var"], kernels, draw(4, WIDTH))
    assert groups.model.parameters == {"mean", "var"}


@pytest.mark.slow
def test_flax_batch_norms_in_a_stack_keep_their_statistics():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, h, _):
            h = nn.Dense(WIDTH)(h)
            return nn.relu(nn.BatchNorm(use_running_average=True)(h)), None

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            stack = nn.scan(
                Layer,
                variable_axes={"params": 0, "batch_stats": 0},
                split_rngs={"params": True},
                length=3,
            )
            return nn.Dense(3)(stack()(nn.Dense(WIDTH)(x), None)[0])

    with jax.numpy_rank_promotion("allow"):
        variables = Network().init(jax.random.key(0), draw(4, 2))
        # Without the name of the collection, the leaves still say it.
        renamed = {"params": variables["params"], "statistics": variables["batch_stats"]}

        def apply(w, x):
            return Network().apply({"params": w["params"], "batch_stats": w["statistics"]}, x)

        groups = structure.find_groups(apply, renamed, draw(4, 2))
    assert {path for path in groups.model.parameters if not path.startswith("params")} == set()


# ---- what is a norm


def test_scales_that_do_not_switch_a_channel_off_are_none():
    variables = {"in": draw(2, 8), "scale": draw(8), "out": draw(8, 3)}
    groups = structure.find_groups(
        lambda w, x: ((x @ w["in"]) * (1 + w["scale"])[None]) @ w["out"], variables, draw(4, 2)
    )
    assert the_only(groups).scales == the_only(groups).norms == ()
    with pytest.raises(ValueError, match="must have norm layers.*\n  in:1: no norm layers"):
        structure.norm_scales(groups, variables)


def test_groups_without_norms_stay_whole_and_are_named():
    variables = {"a": draw(2, 8), "gamma": draw(8), "b": draw(8, 6), "c": draw(6, 3)}

    def apply(w, x):
        return jax.nn.relu(((x @ w["a"]) * w["gamma"][None]) @ w["b"]) @ w["c"]

    groups = structure.find_groups(apply, variables, draw(4, 2))
    with pytest.warns(UserWarning, match="without scores are kept whole.*\n  b:1: no norm layers"):
        scores = structure.norm_scales(groups, variables)
    assert list(scores) == ["a:1"]
    plan = groups.plan(structure.keep_global(groups, scores, 0.5), multiple=1)
    assert plan.shape("b") == (4, 6)


def test_filters_are_missing_where_vectors_make_the_channels():
    variables = {"a": draw(8), "b": draw(8, 3)}
    groups = structure.find_groups(lambda w, x: (x * w["a"][None]) @ w["b"], variables, draw(4, 1))
    for score in (structure.filter_norms, structure.fpgm):
        with pytest.raises(ValueError, match="must have filters.*\n  a:0: no filters"):
            score(groups, variables)


def test_norms_of_a_stack_of_layers():
    layers = {"kernel": draw(3, 8, 8) / 4, "bias": draw(3, 8), "gain": draw(3, 8, seed=2)}
    layers |= {"mean": draw(3, 8, seed=3), "spread": draw(3, 8, seed=4) ** 2}
    variables = {"in": draw(2, 8), "first": draw(8), "layers": layers, "out": draw(8, 3)}

    def apply(w, x):
        def body(h, own):
            y = (jax.nn.relu(h) @ own["kernel"] - own["mean"][None]) / (own["spread"][None] + 1)
            return h + y * own["gain"][None] + own["bias"][None], None

        return lax.scan(body, (x @ w["in"]) * w["first"][None], w["layers"])[0] @ w["out"]

    group = the_only(groups := structure.find_groups(apply, variables, draw(4, 2)))
    assert set(paths(group.gates)) == {"first", "layers/bias", "layers/gain"}
    assert set(paths(group.filters)) == {"in", "layers/kernel"}
    sums = np.abs(variables["first"]) + np.abs(layers["gain"]).sum(0)
    np.testing.assert_allclose(
        structure.norm_scales(groups, variables)[group.name], sums, rtol=1e-6
    )
    plan = groups.plan(halves(groups), multiple=1)
    assert plan.verify(apply, variables, draw(4, 2)) < 1e-5


@pytest.mark.slow
def test_a_batch_norm_over_a_mapped_axis():
    # As Equinox maps a module over the examples: `psum` over a numbered axis is a sum.
    variables = {"in": draw(2, 8), "weight": draw(8), "out": draw(8, 3)}

    def apply(w, x):
        def one(row):
            h = row @ w["in"]
            h = h - lax.pmean(h, "batch")
            h = h / jnp.sqrt(
                lax.pmean(h**2, "batch")
                + lax.stop_gradient(lax.pmax(jnp.abs(lax.stop_gradient(h)), "batch"))
                + 1e-3
            )
            return (h * w["weight"]) @ w["out"]

        return jax.vmap(one, axis_name="batch")(x)

    groups, _ = check([Trace(apply, (draw(4, 2),))], variables)
    assert paths(the_only(groups).gates) == ["weight"]


# ---- the frameworks themselves


@pytest.mark.slow
def test_haiku():
    hk = pytest.importorskip("haiku")

    def network(x, train):
        h = hk.Conv2D(WIDTH, 3)(x)
        h = jax.nn.relu(hk.BatchNorm(True, True, 0.9)(h, train))
        return hk.Linear(3)(h.mean((1, 2)))

    with jax.numpy_rank_promotion("allow"):
        function = hk.transform_with_state(network)
        params, state = function.init(jax.random.key(0), IMAGES, True)

        def run(variables, x, train):
            output, new = function.apply(variables["params"], variables["state"], None, x, train)
            return output, {"state": new}

        variables = {"params": params, "state": state}
        for traces in (traces_of(run, train=False), traces_of(run)):
            group = the_only(groups := structure.find_groups(traces, variables))
            ends = {"params/batch_norm/scale", "params/batch_norm/offset"}
            assert set(paths(group.gates)) == ends
            assert paths(group.filters) == ["params/conv2_d/w"]
        assert {path for path in groups.model.parameters if path.startswith("state")} == set()
        structure.norm_scales(groups, variables)
        plan = groups.plan(halves(groups), multiple=1)
        for trace in traces:
            plan.verify(trace.function, variables, IMAGES, updates=trace.updates)


@pytest.mark.slow
def test_equinox():
    eqx = pytest.importorskip("equinox")

    class Network(eqx.Module):
        conv: eqx.nn.Conv2d
        norm: eqx.nn.BatchNorm
        head: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key)
            self.conv = eqx.nn.Conv2d(2, WIDTH, 3, key=keys[0])
            self.norm = eqx.nn.BatchNorm(WIDTH, "batch", mode="batch")
            self.head = eqx.nn.Linear(WIDTH, 3, key=keys[1])

        def __call__(self, x, state):
            x, state = self.norm(self.conv(x), state)
            return self.head(jax.nn.relu(x).mean((1, 2))), state

    module, state = eqx.nn.make_with_state(Network)(jax.random.key(0))
    params, static = eqx.partition(module, eqx.is_array)
    images = jnp.moveaxis(IMAGES, -1, 1)

    def mapped(variables, x, train):
        whole = eqx.combine(variables["params"], static if train else eqx.nn.inference_mode(static))
        call = jax.vmap(whole, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        output, new = call(x, variables["state"])
        return output, {"state": new}

    variables = {"params": params, "state": state}
    evaluate = Trace(lambda v, x: mapped(v, x, False)[0], (images,))
    train = Trace(lambda v, x: mapped(v, x, True), (images,), new_state)
    with jax.numpy_rank_promotion("allow"):
        for traces in ([evaluate], [evaluate, train]):
            group = the_only(groups := structure.find_groups(traces, variables))
            assert set(paths(group.gates)) == {"params/norm/weight", "params/norm/bias"}
            assert paths(group.filters) == ["params/conv/weight"]
            tx = jaxprune.agip_transform(0.5, groups=groups, every=1, start=0, stop=0)
            tx.init(params)
        assert {path for path in groups.model.parameters if path.startswith("state")} == set()
        plan = groups.plan(halves(groups), multiple=1)
        for trace in traces:
            plan.verify(trace.function, variables, images, updates=trace.updates)
