"""What users of language models do, in loops that are theirs but for the lines that prune."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune
from jaxprune import masks, post_training, presets, structure, training, trees
from tests.support.language_clients import LANGUAGE_CLIENTS, texts

pytestmark = pytest.mark.slow

HELD_OUT = [jnp.asarray(texts(seed)) for seed in (10, 11)]
CALIBRATION = [jnp.asarray(texts(seed)) for seed in (20, 21)]


@functools.cache
def trained(name):
    """A client after some steps; tests must not train it on."""
    client = LANGUAGE_CLIENTS[name]()
    client.losses = client.fit(30)
    return client


@pytest.fixture(params=LANGUAGE_CLIENTS)
def client(request):
    return trained(request.param)


def kernels(client):
    """The paths that `presets.transformer` must choose, by the names of the client's framework."""
    found = [p for p in trees.leaf_by_path(client.params) if re.fullmatch(client.kernels, p)]
    assert len(found) in (6, 12)  # of a stack, or of two layers
    return found


def test_the_preset_chooses_attention_and_mlp(client):
    flags = trees.prunable_flags(client.params, presets.transformer)
    paths = trees.leaf_by_path(client.params)
    assert [path for path, flag in zip(paths, flags, strict=True) if flag] == kernels(client)


def test_training_prunes_and_learns(client):
    own = {p: m for p, m in trees.leaf_by_path(jaxprune.get_masks(client.opt_state)).items()}
    leaves = trees.leaf_by_path(client.params)
    sizes = {path: leaves[path].size for path in kernels(client)}
    assert sum(int(np.sum(own[path])) for path in sizes) == sum(sizes.values()) // 2
    for path, leaf in leaves.items():
        if path in sizes:
            np.testing.assert_array_equal(np.asarray(leaf) != 0, own[path])
        elif trees.is_array(leaf):
            assert np.all(own[path])
    assert jaxprune.check(client.params, client.opt_state).ok
    assert np.isfinite(client.losses).all() and client.losses[-1] < 0.7 * client.losses[0]


def test_sparsities_for_a_writer_of_metrics(client):
    found = jax.jit(lambda state: masks.sparsities(state, stacked=client.stacked))(client.opt_state)
    assert float(found["total"]) == 0.5
    copies = 2 if client.stacked else 1
    assert len(found) == copies * len(kernels(client)) + 1
    rows = jaxprune.summarize(client.params, stacked=client.stacked).rows
    measured = {row.path: row.sparsity for row in rows}
    for path in found.keys() - {"total"}:
        np.testing.assert_allclose(found[path], measured[path], rtol=1e-6)


def test_perplexity_after_one_shot(client):
    prunable = {"prunable": presets.transformer}
    shot = (client.apply, client.params, CALIBRATION)
    before = training.perplexity(client.apply, client.params, HELD_OUT)
    sparse = {
        "wanda": post_training.wanda(*shot, 0.6, **prunable)[0],
        "sparsegpt": post_training.sparsegpt(*shot, 0.6, **prunable)[0],
        "2:4": post_training.wanda(*shot, n_m=(2, 4), sequential=True, **prunable)[0],
        "random": jaxprune.prune(client.params, 0.6, score=jaxprune.scores.random(0), **prunable)[
            0
        ],
    }
    after = {
        name: training.perplexity(client.apply, params, HELD_OUT) for name, params in sparse.items()
    }
    assert 1 < before < 12 and np.isfinite(list(after.values())).all()
    assert max(after["wanda"], after["sparsegpt"]) < after["random"]
    leaves = trees.leaf_by_path(sparse["2:4"])
    assert all(float(jnp.mean(leaves[path] == 0)) >= 0.5 for path in kernels(client))


def test_heads_and_mlps_are_removed(client):
    tokens = HELD_OUT[0]
    groups = structure.find_groups(client.apply, client.params, tokens)
    scores = post_training.channel_scores(client.apply, client.params, CALIBRATION, groups)

    def is_stream(group):
        return any("emb" in member.path for member in group.members)

    # Equinox looks up single tokens, and so its stream belongs to no group.
    ignore = is_stream if any(map(is_stream, groups.values())) else None
    keep = structure.keep_uniform(groups, scores, 0.5, ignore=ignore)
    plan = groups.plan(keep)
    assert plan.verify(client.apply, client.params, tokens) < 1e-4
    small = plan.compact(client.params)
    count = sum(leaf.size for leaf in jax.tree.leaves(client.params))
    assert sum(leaf.size for leaf in jax.tree.leaves(small)) < 0.75 * count
    assert np.isfinite(training.perplexity(plan.wrap(client.apply), small, HELD_OUT))
