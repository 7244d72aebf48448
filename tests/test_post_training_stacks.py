"""Stacked layers that are pruned one after the other: as a list of layers, at its memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxprune import post_training
from jaxprune.post_training import _inputs, _layers

METHODS = {"wanda": post_training.wanda, "sparsegpt": post_training.sparsegpt}
AMOUNTS = {"half": {"sparsity": 0.5}, "2:4": {"n_m": (2, 4)}}
RNG = np.random.default_rng(0)
LAYERS, WIDTH, HIDDEN = 3, 8, 12


def draw(*shape):
    return RNG.normal(size=shape).astype(np.float32)


STACK = {"down": draw(LAYERS, HIDDEN, WIDTH) / 3, "up": draw(LAYERS, WIDTH, HIDDEN)}
BATCHES = [draw(10, WIDTH), draw(7, WIDTH)]


def block(x, w):
    return x + jnp.tanh(x @ w["up"]) @ w["down"]


def body(x, w):
    return block(x, w), None


def scanned(w, x, **options):
    return lax.scan(body, x, w, **options)[0]


def checkpointed(w, x):
    return jax.jit(lambda w, x: lax.scan(jax.checkpoint(body), x, w)[0])(w, x)


def last_axis(w, x):
    """The layers are the last axis of each leaf."""
    return scanned(jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 2, 0), w), x)


def repeated(w, x):
    """All layers twice, in a scan that does not run over the leaves."""
    return lax.scan(lambda x, _: (scanned(w, x), None), x, None, length=2)[0]


def unrolled(order, w, x):
    for i in order:
        x = block(x, w[i])
    return x


ORDER = range(LAYERS)
# The function of the stack, the order of its layers, and the axis that numbers them.
CASES = {
    "scanned": (scanned, ORDER, 0),
    "reverse": (functools.partial(scanned, reverse=True), ORDER[::-1], 0),
    "unroll": (functools.partial(scanned, unroll=2), ORDER, 0),
    "checkpointed": (checkpointed, ORDER, 0),
    "last axis": (last_axis, ORDER, 2),
    "repeated": (repeated, [*ORDER, *ORDER], 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CASES)
def test_in_sequence_a_stack_is_pruned_as_a_list_of_layers(name, method, amount):
    apply, order, axis = CASES[name]
    layers = [{kind: leaf[i] for kind, leaf in STACK.items()} for i in ORDER]
    stack = {kind: np.moveaxis(leaf, 0, axis) for kind, leaf in STACK.items()}
    prune = functools.partial(METHODS[method], sequential=True, **AMOUNTS[amount])
    wanted, masks = prune(functools.partial(unrolled, order), layers, BATCHES)
    pruned, own = prune(apply, stack, BATCHES)
    for kind in STACK:
        listed = np.stack([layer[kind] for layer in masks], axis)
        np.testing.assert_array_equal(own[kind], listed)
        listed = np.stack([layer[kind] for layer in wanted], axis)
        np.testing.assert_allclose(pruned[kind], listed, rtol=1e-4, atol=1e-5)
    # The later layers see other inputs than those of the dense network.
    _, at_once = METHODS[method](apply, stack, BATCHES, **AMOUNTS[amount])
    assert not np.array_equal(own["up"], at_once["up"])


def test_other_uses_of_a_stack_are_pruned_all_at_once():
    """Of a leaf with a use beside the scan, and of one that an index picks."""

    def beside(w, x):
        each = jnp.einsum("lbi,lio->lbo", jnp.stack([x] * LAYERS), w["up"])
        return scanned(w, x + jnp.tanh(each[0])[:, :WIDTH])

    def indexed(w, x):
        for i in ORDER:
            x = block(x, jax.tree.map(lambda leaf, i=i: leaf[i], w))
        return x

    def after(w, x):
        x = scanned(w, x)
        return jnp.einsum("lbi,lio->lbo", jnp.stack([x] * LAYERS), w["up"])

    for apply, ordered in ((beside, {"down"}), (after, {"down"}), (indexed, set())):
        scans = _inputs.scans_of(apply, STACK, BATCHES[0], (True, True))
        assert {kind for kind, scan in scans.items() if scan} == ordered
        pruned, masks = METHODS["wanda"](apply, STACK, BATCHES, 0.5, sequential=True)
        for kind, leaf in STACK.items():
            assert int(masks[kind].sum()) == leaf.size // 2
            np.testing.assert_array_equal(pruned[kind], np.where(masks[kind], leaf, 0))


def test_two_scans_over_a_stack_prune_it_in_the_order_of_the_first():
    def twice(w, x):
        return scanned(w, scanned(w, x), reverse=True)

    layers = [{kind: leaf[i] for kind, leaf in STACK.items()} for i in ORDER]
    order = [*ORDER, *ORDER[::-1]]
    listed = functools.partial(unrolled, order)
    _, wanted = METHODS["wanda"](listed, layers, BATCHES, 0.5, sequential=True)
    _, masks = METHODS["wanda"](twice, STACK, BATCHES, 0.5, sequential=True)
    for kind in STACK:
        np.testing.assert_array_equal(masks[kind], np.stack([layer[kind] for layer in wanted]))


FEATURES = 64


def stack_of(layers):
    return {"w": draw(layers, FEATURES, FEATURES + 1)}


def wide(w, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w)[:, :FEATURES], None), x, w["w"])[0]


def grams():
    """The number of Gram matrices that are alive."""
    square = (FEATURES, FEATURES)
    return sum(x.size // FEATURES**2 for x in jax.live_arrays() if x.shape[-2:] == square)


@pytest.mark.parametrize(("sequential", "expected"), [(True, 1), (False, 6)])
def test_the_statistic_of_one_layer_is_alive(sequential, expected, monkeypatch):
    before, seen, prune = grams(), [], _layers._prune

    def spied(*args):
        seen.append(grams() - before)
        return prune(*args)

    monkeypatch.setattr(_layers, "_prune", spied)
    batches = [draw(9, FEATURES), draw(5, FEATURES)]
    post_training.sparsegpt(wide, stack_of(6), batches, 0.5, sequential=sequential)
    assert max(seen) == expected


def test_the_program_of_one_layer_does_not_grow_with_their_number():
    def size(layers, step):
        capture = _inputs.capture_of(wide, (True,), post_training.gram)
        lowered = capture.lower(stack_of(layers), draw(9, FEATURES), step)  # pyright: ignore
        memory = lowered.compile().memory_analysis()
        return memory.temp_size_in_bytes + memory.output_size_in_bytes

    gram = 4 * FEATURES**2
    one = jnp.asarray(1)
    assert size(3, one) < 4 * gram and size(12, one) - size(3, one) < gram
    assert size(12, None) - size(3, None) >= 9 * gram


def test_copies_share_one_program(monkeypatch):
    made, capture_of = [], _layers.capture_of

    def spied(*args):
        capture = capture_of(*args)
        made.append(capture)
        return capture

    monkeypatch.setattr(_layers, "capture_of", spied)
    stack = jax.tree.map(jnp.asarray, STACK)
    METHODS["wanda"](scanned, stack, BATCHES, 0.5, sequential=True)
    # One for each of two leaves, and one for each shape of a batch.
    assert [capture._cache_size() for capture in made] == [2, 2]


def test_a_copy_without_inputs_is_named():
    stack = {"w": draw(3, 4, 4)}
    stack["w"][1] = 0.0  # so the third copy sees zeros

    def apply(w, x):
        return lax.scan(lambda x, w: (x @ w, None), x, w["w"])[0]

    with pytest.warns(UserWarning, match=r"pruned by magnitude; .*\n  w\[2\]$"):
        _, masks = METHODS["wanda"](apply, stack, [draw(5, 4)], 0.5, sequential=True)
    largest = np.argsort(-np.abs(stack["w"][2]), axis=0)[:2]
    assert np.take_along_axis(np.asarray(masks["w"][2]), largest, axis=0).all()
