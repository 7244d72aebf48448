"""Encoder, ViT and Decoder: parity with NumPy, caches, stacked layers, removal of channels."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, traverse_util

import jaxprune
from jaxprune import models, structure, trees
from jaxprune.models.decoder import rotate

ENCODER = {"vocabulary": 50, "width": 24, "layers": [(3, 40), (2, 28)], "head_dim": 8}
VIT = {"width": 24, "layers": [(3, 40), (2, 28)], "head_dim": 8, "patch": 4, "image_size": 12}
DECODER = {"vocabulary": 50, "width": 24, "layers": [(4, 2, 40)] * 3, "head_dim": 8}
TOKENS = np.random.default_rng(0).integers(1, 50, (2, 11))


def filled(build, seed: int = 0):
    """A model with values from NumPy, no scale near zero; nothing is drawn or compiled."""
    model = nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0)))
    state, rng = nnx.state(model), np.random.default_rng(seed)
    for path, leaf in nnx.to_flat_state(state):
        spread = 1 / math.sqrt(leaf.shape[-2]) if path[-1] == "kernel" else 0.3
        values = rng.normal(size=leaf.shape) * spread + (path[-1] == "scale")
        leaf.set_value(jnp.asarray(values, jnp.float32))
    nnx.update(model, state)
    model.eval()
    return model


def leaves_of(model) -> dict[str, np.ndarray]:
    flat = nnx.to_flat_state(nnx.state(model))
    return {"/".join(map(str, path)): np.asarray(leaf[...], np.float64) for path, leaf in flat}


def encoder(**changes):
    return filled(partial(models.Encoder, **(ENCODER | changes)))


def vit(**changes):
    return filled(partial(models.ViT, **(VIT | changes), num_classes=7))


def decoder(**changes):
    return filled(partial(models.Decoder, **(DECODER | changes)))


# ---- parity with NumPy


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def layer_norm(leaves, path, x, epsilon):
    centred = x - x.mean(-1, keepdims=True)
    x = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
    return x * leaves[f"{path}/scale"] + leaves[f"{path}/bias"]


def linear(leaves, path, x):
    return x @ leaves[f"{path}/kernel"] + leaves.get(f"{path}/bias", 0.0)


def attention(leaves, path, x, mask):
    """One head at a time."""
    query, key, value = (linear(leaves, f"{path}/{name}", x) for name in ("query", "key", "value"))
    mixed = np.zeros_like(query)
    for start in range(0, query.shape[-1], 8):
        own = slice(start, start + 8)
        scores = query[..., own] @ key[..., own].swapaxes(1, 2) / math.sqrt(8)
        scores = np.where(mask[:, None, :], scores, -np.inf)
        mixed[..., own] = softmax(scores) @ value[..., own]
    return linear(leaves, f"{path}/out", mixed)


def mlp(leaves, path, x):
    hidden = linear(leaves, f"{path}/up", x)
    gelu = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    return linear(leaves, f"{path}/down", gelu)


def test_encoder_equals_numpy():
    model, mask = encoder(), np.arange(11) < np.array([[11], [6]])
    leaves = leaves_of(model)
    x = leaves["tokens/embedding"][TOKENS] + leaves["types/embedding"][0]
    x = layer_norm(leaves, "norm", x + leaves["positions/embedding"][:11], 1e-12)
    for index in range(2):
        here = f"layers/{index}"
        x = x + attention(leaves, f"{here}/attention", x, mask)
        x = layer_norm(leaves, f"{here}/norm1", x, 1e-12)
        x = layer_norm(leaves, f"{here}/norm2", x + mlp(leaves, here, x), 1e-12)
    np.testing.assert_allclose(model(TOKENS, mask)[mask], x[mask], atol=2e-5)
    mean = np.stack([row[own].mean(0) for row, own in zip(x, mask)])
    mean /= np.linalg.norm(mean, axis=-1, keepdims=True)
    np.testing.assert_allclose(model.embed(TOKENS, mask), mean, atol=2e-6)


def test_vit_equals_numpy():
    model = vit()
    leaves, x = leaves_of(model), np.random.default_rng(2).normal(size=(2, 12, 12, 3))
    patches = x.reshape(2, 3, 4, 3, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 9, 48)
    patches = patches @ leaves["patches/kernel"].reshape(48, 24) + leaves["patches/bias"]
    token = np.broadcast_to(leaves["token"], (2, 1, 24))
    y = np.concatenate([token, patches], axis=1) + leaves["positions"]
    for index in range(2):
        here, everything = f"layers/{index}", np.ones((2, 10), bool)
        own = layer_norm(leaves, f"{here}/norm1", y, 1e-6)
        y = y + attention(leaves, f"{here}/attention", own, everything)
        y = y + mlp(leaves, here, layer_norm(leaves, f"{here}/norm2", y, 1e-6))
    y = linear(leaves, "head", layer_norm(leaves, "norm", y, 1e-6)[:, 0])
    np.testing.assert_allclose(model(x.astype(np.float32)), y, atol=2e-5)


def test_decoder_equals_numpy():
    """One token and one head at a time; the rotation is a product of complex numbers."""
    model = decoder(layers=[(4, 2, 40), (3, 1, 16)])
    leaves = leaves_of(model)

    def norm(path, x):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * leaves[f"{path}/scale"]

    def turned(x, place):
        z = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * place * 10_000.0 ** (-np.arange(4) / 4))
        return np.concatenate([z.real, z.imag], -1)

    expected = []
    for tokens in TOKENS:
        x = leaves["tokens/embedding"][tokens]
        for index, (heads, kv_heads) in enumerate([(4, 2), (3, 1)]):
            here = f"layers/{index}"
            y = norm(f"{here}/norm1", x)
            query, key, value = (
                linear(leaves, f"{here}/{n}", y) for n in ("query", "key", "value")
            )
            mixed = np.zeros_like(query)
            for place in range(11):
                for head in range(heads):
                    own = slice(8 * head, 8 * head + 8)
                    group = head // (heads // kv_heads)
                    shared = slice(8 * group, 8 * group + 8)
                    q = turned(query[place, own], place)
                    ks = np.stack([turned(key[t, shared], t) for t in range(place + 1)])
                    weights = softmax(ks @ q / math.sqrt(8))
                    mixed[place, own] = weights @ value[: place + 1, shared]
            x = x + linear(leaves, f"{here}/out", mixed)
            y = norm(f"{here}/norm2", x)
            gate = linear(leaves, f"{here}/gate", y)
            y = gate / (1 + np.exp(-gate)) * linear(leaves, f"{here}/up", y)
            x = x + linear(leaves, f"{here}/down", y)
        expected.append(linear(leaves, "head", norm("norm", x)))
    np.testing.assert_allclose(model(TOKENS), np.stack(expected), atol=5e-5)


def test_rotated_products_depend_on_the_distance_alone():
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 8)).astype(np.float32)

    def product(i, j):
        return jnp.sum(rotate(q, jnp.array([i]), 1e4) * rotate(k, jnp.array([j]), 1e4))

    np.testing.assert_allclose(product(9, 4), product(5, 0), rtol=1e-4)
    assert abs(product(9, 4) - product(9, 5)) > 0.01


# ---- stacked layers and caches


def stacked(model: models.Decoder) -> models.Decoder:
    """The same decoder with its layers as one stack."""
    both = decoder(scanned=True)
    state = nnx.to_pure_dict(nnx.state(model))
    layers = [state["layers"][index] for index in range(3)]
    state["layers"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    nnx.update(both, state)
    return both


@pytest.mark.slow
@pytest.mark.parametrize("scanned", [False, True])
def test_a_text_in_pieces_gives_the_logits_of_the_whole(scanned):
    model = stacked(decoder()) if scanned else decoder()
    whole, cache, pieces = model(TOKENS), model.empty_cache(2, 13), []
    extend = nnx.jit(type(model).extend)
    for start, stop in ((0, 4), (4, 5), (5, 6), (6, 11)):
        logits, cache = extend(model, TOKENS[:, start:stop], cache)
        pieces.append(logits)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), whole, atol=2e-5)
    assert int(cache.length) == 11


def test_scanned_layers_compute_what_a_list_computes():
    model = decoder()
    np.testing.assert_allclose(stacked(model)(TOKENS), model(TOKENS), atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["agip_transform", "magnitude_transform"])
def test_scanned_layers_get_the_masks_of_a_list(method):
    """To the bit: the gradients are those of the list, stacked."""
    rng, model = np.random.default_rng(3), decoder()
    params = [nnx.to_pure_dict(nnx.state(m)) for m in (model, stacked(model))]

    def as_stack(tree):
        layers = [tree["layers"][index] for index in range(3)]
        stack = jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
        return tree | {"layers": stack}

    grads = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params[0])
    make = partial(getattr(jaxprune, method), 0.7, every=1, stop=3, budget=jaxprune.budgets.uniform)
    found = []
    for own, tree, options in (
        (params[0], grads, {}),
        (params[1], as_stack(grads), {"stacked": jaxprune.stacks.under("layers")}),
    ):
        tx = jaxprune.chain(optax.sgd(0.1, momentum=0.9), make(**options))
        state, update = tx.init(own), jax.jit(tx.update)
        for _ in range(4):
            updates, state = update(tree, state, own)
            own = optax.apply_updates(own, updates)
        found.append(jaxprune.get_masks(state))
    wanted = as_stack(jax.tree.map(np.asarray, found[0]))
    for path, mask in trees.leaf_by_path(wanted).items():
        np.testing.assert_array_equal(trees.leaf_by_path(found[1])[path], mask, err_msg=path)
    kernel = np.asarray(found[1]["layers"]["up"]["kernel"])
    assert kernel.shape == (3, 24, 40) and not kernel.all()


# ---- removal of channels


def classified():
    """An encoder whose text vector is classified, so that its width is free."""

    def function(variables, tokens):
        return model(variables, tokens) @ variables["classes"]

    functions = structure.from_nnx(encoder())
    model, classes = functions.evaluate, np.random.default_rng(5).normal(size=(24, 5))
    return function, functions.variables | {"classes": classes.astype(np.float32)}, TOKENS


def of_model(model, x):
    functions = structure.from_nnx(model)
    return functions.evaluate, functions.variables, x


CASES = {
    "encoder": classified,
    "vit": lambda: of_model(vit(), np.random.default_rng(4).normal(size=(2, 12, 12, 3))),
    "decoder": lambda: of_model(decoder(), TOKENS),
    "scanned decoder": lambda: of_model(stacked(decoder()), TOKENS),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_most_parameters_shrink_and_no_output_changes(name):
    function, variables, x = CASES[name]()
    x = jnp.asarray(x, jnp.float32) if np.issubdtype(x.dtype, np.floating) else x
    groups = structure.find_groups(function, variables, x)
    reached = {member.path for group in groups.values() for member in group.members}
    sizes = {path: np.size(leaf) for path, leaf in trees.leaf_by_path(variables).items()}
    missed = {path: size for path, size in sizes.items() if path not in reached}
    assert sum(missed.values()) <= 0.02 * sum(sizes.values()), missed
    keep = {g: np.arange(group.size) % 2 == 0 for g, group in groups.items()}
    plan = groups.plan(keep, multiple=1)
    plan.verify(function, variables, x)
    small = plan.compact(variables)
    assert sum(map(np.size, jax.tree.leaves(small))) < 0.45 * sum(sizes.values())


def with_cache(model):
    """A function that reads tokens with a cache, its variables, traces of prefill and decode."""
    graphdef = nnx.graphdef(model)

    def extend(variables, tokens, length):
        cache = models.decoder.Cache(*variables["cache"], length)
        network = nnx.merge(graphdef, variables["params"])
        logits, cache = network.extend(tokens, cache)
        return logits, {"cache": (cache.keys, cache.values)}

    cache = model.empty_cache(2, 12)
    variables = {
        "params": nnx.to_pure_dict(nnx.state(model)),
        "cache": (cache.keys, cache.values),
    }
    traces = [
        structure.Trace(extend, (TOKENS[:, :length], cache.length), lambda output: output[1])
        for length in (4, 1)
    ]
    return extend, variables, traces


def every_other(groups):
    return {name: np.arange(group.size) % 2 == 0 for name, group in groups.items()}


def reads_like_masked(plan, extend, variables):
    """Prefill and one token at a time, on smaller arrays against the masked dense ones."""
    small, dense = plan.compact(variables), plan.mask(variables)
    wrapped, traced = plan.wrap(extend), []

    @jax.jit
    def step(variables, tokens, length):
        traced.append(tokens.shape)
        return wrapped(variables, tokens, length)

    for start, stop in ((0, 4), (4, 5), (5, 6)):
        tokens, length = TOKENS[:, start:stop], jnp.int32(start)
        (wanted, new), (logits, less) = (
            f(v, tokens, length) for f, v in ((extend, dense), (step, small))
        )
        np.testing.assert_allclose(logits, wanted, atol=2e-5)
        small, dense = small | less, dense | new
    assert traced == [(2, 4), (2, 1)]  # prefill and decode, once each
    return small


@pytest.mark.slow
def test_heads_leave_the_cache_as_well():
    extend, variables, traces = with_cache(decoder())
    groups = structure.find_groups(traces, variables)
    assert sum(any("cache" in member.path for member in g.members) for g in groups.values()) == 3
    plan = groups.plan(every_other(groups), multiple=1)
    small = reads_like_masked(plan, extend, variables)
    assert {leaf.shape for leaf in jax.tree.leaves(small["cache"])} == {(2, 12, 1, 8)}
    dense, half = map(structure.cache_cost(variables), (groups.plan({}), plan))
    assert (
        dense == 2 * 12 * 2 * 3 * 2 * 8 * 4 and half == dense / 2
    )  # texts, tokens, 2, layers, ...


@pytest.mark.slow
@pytest.mark.parametrize("widths", [False, True])
def test_layers_of_a_list_leave_the_cache_as_well(widths):
    extend, variables, traces = with_cache(decoder())
    groups = structure.find_groups(traces, variables)
    names = list(groups.blocks)
    assert names == [f"params/layers/{n}/{k}/kernel" for n in range(3) for k in ("down", "key")]
    keep = {names[0]: [False], names[3]: [False]} | (every_other(groups) if widths else {})
    plan = groups.plan({k: np.array(v) for k, v in keep.items()}, multiple=1)
    small = reads_like_masked(plan, extend, variables)
    assert small["cache"][0][1] is None and small["params"]["layers"][0]["up"]["kernel"] is None
    cost = structure.cache_cost(variables)
    assert cost(plan) == sum(leaf.nbytes for leaf in jax.tree.leaves(small["cache"]))


@pytest.mark.slow
@pytest.mark.parametrize("widths", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_layers_of_a_stack_leave_the_cache_as_well(whole, widths):
    extend, variables, traces = with_cache(stacked(decoder()))
    groups = structure.find_groups(traces, variables)
    mlp, attention = groups.blocks
    rows = {attention: [True, False, True], mlp: [True, False, True] if whole else [True] * 3}
    keep = rows | (every_other(groups) if widths else {})
    plan = groups.plan({k: np.array(v) for k, v in keep.items()}, multiple=1)
    small = reads_like_masked(plan, extend, variables)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(small["cache"])} == {2}
    assert small["params"]["layers"]["up"]["kernel"].shape[0] == (2 if whole else 3)


def without_none(tree):
    flat = traverse_util.flatten_dict(tree)
    return traverse_util.unflatten_dict({k: v for k, v in flat.items() if v is not None})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["encoder", "vit", "decoder", "scanned decoder"])
def test_a_network_without_blocks_is_an_ordinary_one(name):
    """Blocks and MLP widths are removed, and the arrays are loaded into a module of that size."""
    build = {"encoder": encoder, "vit": vit}.get(name, decoder)
    model = stacked(decoder()) if name == "scanned decoder" else build()
    _, variables, x = of_model(model, TOKENS)
    if name == "vit":
        x = np.random.default_rng(4).normal(size=(2, 12, 12, 3)).astype(np.float32)
    functions = structure.from_nnx(model)
    groups = structure.find_groups(functions.evaluate, variables, x)
    blocks = list(groups.blocks)
    if name == "scanned decoder":
        keep = dict.fromkeys(blocks, np.array([True, False, True]))
    else:  # the MLP of the first layer, and all of the last
        last = max(int(b.split("/")[2]) for b in blocks)
        keep = {b: np.array([False]) for b in blocks if f"layers/{last}" in b or "/0/down" in b}
    keep |= {
        g: np.arange(own.size) % 2 == 0
        for g, own in groups.items()
        if g.split("/")[-2] in ("up", "gate")
    }
    plan = groups.plan(keep, multiple=1)
    plan.verify(functions.evaluate, variables, x)
    small = plan.compact(variables)["params"]
    layers = models.layers_of(small, head_dim=8)
    options = {"scanned": True} if name == "scanned decoder" else {}
    plain = build(layers=layers, **options)
    assert (
        layers
        == {
            "encoder": [(3, 0), (0, 0)],
            "vit": [(3, 0), (0, 0)],
            "decoder": [(4, 2, 0), (4, 2, 20), (0, 0, 0)],
            "scanned decoder": [(4, 2, 20)] * 2,
        }[name]
    )
    nnx.update(plain, without_none(small))
    wanted = plan.wrap(functions.evaluate)(plan.compact(variables), x)
    np.testing.assert_allclose(plain(x), wanted, atol=2e-5)


def test_stacks_that_lost_different_parts_are_no_module():
    layers = {"up": {"kernel": np.ones((3, 4, 8))}, "query": {"kernel": np.ones((2, 4, 8))}}
    with pytest.raises(ValueError, match="layers/query/kernel: 2 layers"):
        models.layers_of({"layers": layers}, head_dim=4)
    with pytest.raises(ValueError, match="`params` must have `layers`"):
        models.layers_of({}, head_dim=4)


@pytest.mark.parametrize("build", [encoder, vit])
def test_layers_without_heads_or_without_mlp_skip_that_part(build):
    def count(*layers):
        return sum(leaf.size for leaf in leaves_of(build(layers=list(layers))).values())

    assert count((2, 16), (0, 0)) < count((2, 16), (0, 8)) < count((2, 16), (2, 8))


def test_decoder_layers_without_heads_or_without_mlp_skip_that_part():
    whole = decoder(layers=[(4, 2, 40), (2, 1, 8)])
    skipped = decoder(layers=[(4, 2, 40), (0, 0, 0), (2, 1, 8)])
    state = nnx.to_pure_dict(nnx.state(whole))
    state["layers"][2] = state["layers"].pop(1)
    nnx.update(skipped, state)
    np.testing.assert_allclose(skipped(TOKENS), whole(TOKENS), atol=1e-6)
    _, cache = skipped.extend(TOKENS, skipped.empty_cache(2, 11))
    assert int(cache.length) == 11


# ---- bad input


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: encoder(layers=[(2, 8), (-1, 8), (2, 8, 3)]), r"layers/1: \(-1, 8\) must be"),
        (lambda: vit(patch=5), "`patch` 5 must divide `image_size` 12"),
        (lambda: vit()(jnp.zeros((1, 8, 8, 3))), "must be 12 x 12 pixels"),
        (lambda: decoder(layers=[(4, 3, 8)]), "layers/0: heads 4 must be a multiple of 3"),
        (lambda: decoder(layers=[(4, 0, 8)]), "layers/0: heads 4 must be a multiple of 0"),
        (lambda: decoder(layers=[(4, 8)]), r"layers/0: \(4, 8\) must be \(heads, kv_heads, mlp\)"),
        (lambda: decoder(layers=[]), "at least one layer"),
        (lambda: decoder(head_dim=7), "`head_dim` must be even"),
        (lambda: decoder(layers=[(4, 2, 8), (2, 2, 8)], scanned=True), "must be alike"),
    ],
)
def test_bad_arguments_are_named(build, text):
    with pytest.raises(ValueError, match=text):
        build()


@pytest.mark.parametrize("scanned", [False, True])
def test_layers_that_are_computed_again_give_the_same_gradients(scanned):
    def gradients(remat):
        model = models.Decoder(
            16, width=8, layers=[(2, 1, 12)] * 2, head_dim=4, scanned=scanned, remat=remat,
            rngs=nnx.Rngs(0),
        )  # fmt: skip
        graphdef, state = nnx.split(model)
        tokens = jnp.arange(10).reshape(2, 5)
        loss = lambda state: jnp.sum(nnx.merge(graphdef, state)(tokens) ** 2)  # noqa: E731
        return jax.grad(loss)(state), str(jax.make_jaxpr(jax.grad(loss))(state))

    kept, text = gradients(False)
    again, text_again = gradients(True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), kept, again)
    assert "= remat" in text_again and "= remat" not in text


@pytest.mark.parametrize(
    ("name", "parameters"), [("decoder_mini", 869_504), ("decoder_124m", 124_287_744)]
)
@pytest.mark.parametrize("scanned", [False, True])
def test_decoders_have_the_parameters_that_they_are_named_for(name, parameters, scanned):
    make = getattr(models, name)
    model = nnx.eval_shape(lambda: make(256, scanned=scanned, rngs=nnx.Rngs(0)))
    state = nnx.to_pure_dict(nnx.state(model))
    assert sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(state)) == parameters
    layers = models.layers_of(state, model.head_dim)
    width = state["head"]["kernel"].shape[0]
    again = nnx.eval_shape(lambda: make(256, widths=(width, layers), rngs=nnx.Rngs(0)))
    assert (
        models.layers_of(nnx.to_pure_dict(nnx.state(again)), 64 if "124" in name else 32) == layers
    )
