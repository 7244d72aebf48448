"""Models of the kinds that people publish, in Flax NNX and Linen, Equinox and Haiku: compaction
equals masking, and nearly all parameters can shrink."""

import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from jaxprune import models, structure, trees
from jaxprune.structure import Trace
from tests.support import zoo, zoo_linen, zoo_nnx
from tests.support.checks import (
    compared,
    draw,
    gap,
    graded,
    halves,
    taken,
    trees_update,
    zeroed,
)

FRAMEWORKS = {"linen": zoo_linen.MODELS, "nnx": zoo_nnx.MODELS}
BUILDERS = {f"{kind} {name}": own for kind, all in FRAMEWORKS.items() for name, own in all.items()}


class Examined(NamedTuple):
    """A case in double precision, its groups and a plan."""

    case: Any
    groups: Any
    plan: Any
    variables: Any  # caches are 0 where the plan removes, as they are from the start


def cast(tree, source, target):
    """Numbers of one type as another; keys and integers as they are."""
    return jax.tree.map(lambda x: x.astype(target) if x.dtype == source else x, tree)


def double(tree):
    return cast(tree, np.float32, np.float64)


def is_cache(path, leaf):
    """Counters of library caches are not masked."""
    return "cache" in path and jnp.issubdtype(leaf.dtype, jnp.floating)


def with_leaves(variables, leaves):
    return jax.tree.unflatten(jax.tree.structure(variables), leaves.values())


def masked_and_small(plan, variables):
    """By NumPy, as JAX would compile something for each shape."""
    leaves = trees.leaf_by_path(variables)
    zeroable = plan.model.parameters | plan.model.caches
    masked = zeroed(leaves, plan.kept, zeroable)
    masked |= {path: masked[path].astype(leaves[path].dtype) for path in zeroable}
    return with_leaves(variables, masked), with_leaves(variables, taken(leaves, plan.kept))


def planned(case, variables):
    """A plan for half of everything, from all entry points."""
    groups = structure.find_groups(list(case.traces.values()), variables, caches=is_cache)
    return groups.plan(halves(groups), multiple=1)


@pytest.fixture(scope="module", params=BUILDERS)
def model(request):
    with jax.enable_x64(True):
        case = BUILDERS[request.param]()
        traces = {n: t._replace(args=double(t.args)) for n, t in case.traces.items()}
        case = case._replace(variables=double(case.variables), traces=traces)
        groups = structure.find_groups(list(traces.values()), case.variables, caches=is_cache)
    plan = groups.plan(halves(groups), multiple=1)
    leaves = zeroed(trees.leaf_by_path(case.variables), plan.kept, groups.model.caches)
    return Examined(case, groups, plan, with_leaves(case.variables, leaves))


@pytest.mark.slow
def test_compaction_equals_masking(model):
    """Outputs, updates and gradients, of all entry points; at other sizes too."""
    case, traces = model.case, dict(model.case.traces)
    for name, args in case.others.items():
        traces[f"{name}, other sizes"] = traces[name]._replace(args=double(args))
    for name, trace in traces.items():
        with jax.enable_x64(True):
            parameters = model.groups.model.parameters
            call = graded(trace, trace.function, model.variables, parameters)
            gaps = compared(model.groups, model.plan, trace, call, model.variables)
        assert gaps is not None, f"{name}: masks give numbers that are not finite"
        assert max(gaps.values()) < case.tolerance, (name, gaps)


@pytest.mark.slow
def test_nearly_all_parameters_can_shrink(model):
    groups, shapes = model.groups, model.groups.model.shapes
    free = {member.path for group in groups.values() for member in group.members}
    sizes = {path: int(np.prod(shapes[path])) for path in groups.model.parameters}
    share = sum(sizes[path] for path in free & sizes.keys()) / sum(sizes.values())
    assert share > 0.99, str(groups)
    assert groups.unknown == {}
    assert {path for path in groups.model.caches if shapes[path]} <= free


@pytest.fixture
def compiled_fast():
    """Most of the time of what follows would go to optimizing programs that run once."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


# ---- many steps with a cache


IDS = zoo.tokens(2, 9, below=50)


def steps_of(case, name):
    """Entry points and their arguments, one after the other."""
    if "state space" in name:
        return [("step", (IDS[:, at : at + 1],)) for at in range(6)]
    if "encoder" in name:
        ids, token = case.traces["start"].args
        steps = [("step", (ids, IDS[:, at : at + 1], np.int32(at))) for at in (1, 2, 3)]
        return [("start", (ids, token)), *steps]
    ways = ("decode", "decode, scatter")
    steps = [(ways[at % 2], (IDS[:, at : at + 1], np.int32(at))) for at in range(5, 9)]
    return [("prefill", (IDS[:, :5],)), *steps]


def follow(functions, case, variables, steps):
    """The outputs of all steps, each of which updates the variables."""
    outs = []
    for name, args in steps:
        output = functions[name](variables, *args)
        outs.append(output[0])
        variables = trees_update(variables, case.traces[name].updates(output))
    return jnp.concatenate(outs, 1), variables


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "whole"),
    [
        ("linen language model", "train"),
        ("nnx language model", "train"),
        ("nnx state space", "scan"),
        ("linen encoder and decoder", None),
        ("nnx encoder and decoder", None),
    ],
)
@pytest.mark.usefixtures("compiled_fast")
def test_steps_with_a_cache_are_those_of_the_masked_model(name, whole):
    case = BUILDERS[name]()
    leaves = trees.leaf_by_path(case.variables)
    empty = {path: np.zeros_like(x) if "cache" in path else x for path, x in leaves.items()}
    plan, steps = planned(case, case.variables), steps_of(case, name)
    masked, small = masked_and_small(plan, with_leaves(case.variables, empty))
    functions = {own: case.traces[own].function for own, _ in steps}
    dense = {own: jax.jit(function) for own, function in functions.items()}
    wrapped = {own: jax.jit(plan.wrap(function)) for own, function in functions.items()}
    outs, full = follow(dense, case, masked, steps)
    small_outs, left = follow(wrapped, case, small, steps)
    assert gap(outs, small_outs) < 1e-4
    full, left = (
        {path: np.asarray(x) for path, x in trees.leaf_by_path(tree).items() if "cache" in path}
        for tree in (full, left)
    )
    assert gap(taken(full, plan.kept), left) < 1e-4
    assert all(leaf.any() for leaf in left.values()), "all were written"
    if whole is not None:  # the steps do compute what the whole sequence gives
        at_once = jax.jit(case.traces[whole].function)(masked, IDS[:, : outs.shape[1]])
        assert gap(at_once, small_outs) < 1e-4


# ---- other types, no arrays, other processes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "entry"), [("linen vision transformer", "evaluate"), ("nnx language model", "train")]
)
@pytest.mark.usefixtures("compiled_fast")
def test_variables_of_half_precision(name, entry):
    case = BUILDERS[name]()
    function, args = case.traces[entry].function, case.traces[entry].args
    exact, _ = masked_and_small(planned(case, case.variables), case.variables)
    variables, few = (cast(tree, np.float32, jnp.bfloat16) for tree in (case.variables, args))
    plan = planned(case, variables)
    masked, small = masked_and_small(plan, variables)
    wanted, output = jax.jit(function)(masked, *few), jax.jit(plan.wrap(function))(small, *few)
    assert output.dtype == wanted.dtype
    # Both round; neither is much further from the numbers in single precision.
    exact = jax.jit(function)(exact, *args)
    error, own = gap(exact, wanted), gap(exact, output)
    assert own < 2 * error < 0.1, (own, error)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linen scan over layers", "nnx recurrent"])
def test_shapes_are_enough(name):
    case = BUILDERS[name]()
    traces = list(case.traces.values())
    found = structure.find_groups(traces, case.variables)
    variables, args = jax.eval_shape(lambda *x: x, case.variables, [t.args for t in traces])
    shaped = [trace._replace(args=own) for trace, own in zip(traces, args)]
    groups = structure.find_groups(shaped, variables)
    assert str(groups) == str(found) and groups.model == found.model
    plan = groups.plan(halves(groups), multiple=1)
    _, small = masked_and_small(plan, case.variables)
    shapes = jax.eval_shape(plan.compact, case.variables)
    assert jax.tree.map(np.shape, small) == jax.tree.map(np.shape, shapes)


SERVE = """
import sys
import jax, numpy as np
from jaxprune import structure, trees
from jaxprune.structure import Trace
from tests.support import zoo_linen

folder = sys.argv[1]
plan = structure.load_plan(folder + "/plan.json")
model = zoo_linen.ViT()
with np.load(folder + "/small.npz") as file:
    variables = {"params": {}}
    for path, leaf in file.items():
        *way, name = path.split("/")
        own = variables
        for key in way:
            own = own.setdefault(key, {})
        own[name] = leaf
images = np.load(folder + "/images.npy")
apply = jax.jit(plan.wrap(lambda variables, x: model.apply(variables, x, train=False)))
np.save(folder + "/logits.npy", apply(variables, images))
"""


def test_another_process_needs_the_plan_and_the_model_alone(environment, tmp_path):
    case = zoo_linen.vision_transformer()
    plan, images = planned(case, case.variables), case.others["evaluate"][0]
    masked, small = masked_and_small(plan, case.variables)
    plan.save(tmp_path / "plan.json")
    np.savez(tmp_path / "small.npz", **trees.leaf_by_path(small))
    np.save(tmp_path / "images.npy", images)
    subprocess.run([sys.executable, "-c", SERVE, tmp_path], env=environment, check=True)
    wanted = jax.jit(case.traces["evaluate"].function)(masked, images)
    assert gap(wanted, np.load(tmp_path / "logits.npy")) < 1e-4


# ---- other frameworks


def compare(traces, variables, **options):
    """Outputs, updates and gradients of what has no case; returns the sizes of the groups."""
    with jax.enable_x64(True):
        variables, traces = double(variables), [t._replace(args=double(t.args)) for t in traces]
        groups = structure.find_groups(traces, variables, **options)
        plan = groups.plan(halves(groups), multiple=1)
        for trace in traces:
            call = graded(trace, trace.function, variables, groups.model.parameters)
            gaps = compared(groups, plan, trace, call, variables)
            assert gaps is not None and max(gaps.values()) < 1e-8, gaps
    return {name: group.size for name, group in groups.items()}


def test_equinox():
    eqx = pytest.importorskip("equinox")

    class Net(eqx.Module):
        """Convolution, attention, a recurrent cell."""

        patches: Any
        norms: list
        attention: Any
        feed: Any
        cell: Any
        head: Any

        def __init__(self, key):
            keys = iter(jax.random.split(key, 9))
            self.patches = eqx.nn.Conv2d(3, 20, 4, 4, key=next(keys))
            self.norms = [eqx.nn.GroupNorm(5, 20), eqx.nn.LayerNorm(20), eqx.nn.LayerNorm(20)]
            self.attention = eqx.nn.MultiheadAttention(
                4, 20, qk_size=7, vo_size=6, output_size=20, use_query_bias=True, key=next(keys)
            )
            self.feed = eqx.nn.MLP(20, 20, 36, 2, key=next(keys))
            self.cell = eqx.nn.GRUCell(20, 14, key=next(keys))
            self.head = eqx.nn.Linear(14, 10, key=next(keys))

        def __call__(self, image):
            x = self.norms[0](self.patches(image)).reshape(20, -1).T
            y = jax.vmap(self.norms[1])(x)
            x = x + self.attention(y, y, y)
            x = x + jax.vmap(self.feed)(jax.vmap(self.norms[2])(x))
            state, _ = jax.lax.scan(lambda h, row: (self.cell(row, h), None), jnp.zeros(14), x)
            return self.head(state)

    arrays, rest = eqx.partition(
        eqx.filter_eval_shape(Net, jax.random.key(0)), lambda x: isinstance(x, jax.ShapeDtypeStruct)
    )

    def evaluate(arrays, images):
        return jax.vmap(eqx.combine(arrays, rest))(images)

    assert compare([Trace(evaluate, (zoo.draw(2, 3, 8, 8),))], zoo.filled(arrays)) == {
        "patches/weight:0": 5,  # groups of four channels: their norm looks at a group at once
        "attention/query_proj/weight:0": 4,  # heads
        "feed/layers/0/weight:0": 36,
        "feed/layers/1/weight:0": 36,
        "cell/weight_ih:0": 14,
    }


@pytest.mark.slow
def test_haiku():
    hk = pytest.importorskip("haiku")

    def net(images, train):
        x = hk.Conv2D(12, 3, with_bias=False)(images)
        x = jax.nn.relu(hk.BatchNorm(True, True, 0.9)(x, train))
        x = hk.Conv2D(20, 4, 4)(x).reshape(images.shape[0], -1, 20)
        x = x + hk.MultiHeadAttention(4, 7, w_init=hk.initializers.RandomNormal(), model_size=20)(
            *[hk.LayerNorm(-1, True, True)(x)] * 3
        )
        x = x + hk.nets.MLP([36, 20])(hk.LayerNorm(-1, True, True)(x))
        core = hk.LSTM(14)
        state = jax.tree.map(lambda h: h.astype(x.dtype), core.initial_state(x.shape[0]))
        x, _ = hk.dynamic_unroll(core, x, state, time_major=False)
        return hk.Linear(10)(x[:, -1])

    model, images = hk.without_apply_rng(hk.transform_with_state(net)), zoo.draw(2, 8, 8, 3)
    shapes = jax.eval_shape(lambda *x: model.init(*x, True), jax.random.key(0), images)
    params, state = map(zoo.filled, shapes)
    variables = {"params": params, "state": jax.tree.map(np.abs, state)}  # it holds variances

    def evaluate(variables, images):
        return model.apply(variables["params"], variables["state"], images, False)[0]

    def train(variables, images):
        output, state = model.apply(variables["params"], variables["state"], images, True)
        return output, {"state": state}

    traces = [Trace(evaluate, (images,)), Trace(train, (images,), zoo.second)]
    sizes = compare(traces, variables, parameters=lambda path, _: path.startswith("params"))
    assert sizes == {
        "params/batch_norm/offset:3": 12,
        "params/conv2_d_1/w:3": 20,
        "params/lstm/linear/w:1": 14,
        "params/mlp/~/linear_0/w:1": 36,
        "params/multi_head_attention/key/w:1": 4,  # heads
    }


# ---- whole layers


class LinenLayer(nn.Module):
    """A transformer layer to be scanned."""

    @nn.compact
    def __call__(self, x, _):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(y, y)
        return x + nn.Dense(8)(nn.gelu(nn.Dense(12)(nn.LayerNorm()(x)))), None


class LinenStack(nn.Module):
    """Rematerialised layers in a scan."""

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            nn.remat(LinenLayer), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return nn.Dense(3)(scan()(nn.Dense(8)(x), None)[0])


def haiku_stack(x):
    import haiku as hk
    from haiku.experimental import layer_stack

    def layer(x):
        y = hk.LayerNorm(-1, True, True)(x)
        init = hk.initializers.VarianceScaling(1.0)
        x = x + hk.MultiHeadAttention(2, 4, w_init=init)(y, y, y)
        return x + hk.Linear(8)(jax.nn.relu(hk.Linear(12)(x)))

    return hk.Linear(3)(layer_stack(3)(layer)(hk.Linear(8)(x)))


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["linen", "haiku"])
def test_stacks_of_frameworks_lose_layers_and_are_unstacked(framework):
    net: Any = LinenStack()
    if framework == "haiku":
        hk = pytest.importorskip("haiku")
        net = hk.without_apply_rng(hk.transform(haiku_stack))
    x, rng = draw(2, 5, 6), np.random.default_rng(0)
    variables = net.init(jax.random.key(0), x)
    variables = jax.tree.map(lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape), variables)
    variables = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), variables)
    groups = structure.find_groups(net.apply, variables, x)
    assert [block.size for block in groups.blocks.values()] == [3, 3]
    rows = [[True, False, True], [False, False, True]]
    plan = groups.plan({name: np.array(own) for name, own in zip(groups.blocks, rows)})
    assert plan.verify(net.apply, variables, x) < 1e-6
    layers = structure.unstack(
        variables, lambda path, leaf: 0 if "tack" in path or "Scan" in path else None
    )
    by_layer = layers.wrap(net.apply)
    groups = structure.find_groups(by_layer, layers.variables, x)
    assert len(groups.blocks) == 6
    keep = {name: rng.random(group.size) < 0.5 for name, group in groups.items()}
    keep = {name: own | (np.arange(len(own)) == 0) for name, own in keep.items()}
    keep |= {name: np.array([False]) for name in list(groups.blocks)[::2]}
    assert groups.plan(keep, multiple=1).verify(by_layer, layers.variables, x) < 1e-5


@pytest.mark.slow
def test_blocks_of_a_resnet_go_with_their_statistics():
    """Those with an identity as shortcut; a projection is no stream."""
    model = models.resnet8(num_classes=4, rngs=nnx.Rngs(0))
    pure, images = structure.from_nnx(model), draw(2, 8, 8, 3)
    groups = structure.find_groups(pure.traces(images), pure.variables)
    (block,) = groups.blocks.values()
    assert {member.path for member in block.members if not member.produces} == {
        f"state/blocks/0/norm{n}/{name}" for n in (1, 2) for name in ("mean", "var")
    }
    plan = groups.plan({block.name: np.array([False])})
    plan.verify(pure.evaluate, pure.variables, images)
    plan.verify(pure.train, pure.variables, images, updates=lambda output: output[1])
