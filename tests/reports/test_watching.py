"""Metrics of pruning while training, and the picture of two sets of masks."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune
from jaxprune import reports, stacks

PARAMS = {"a": {"kernel": jnp.array([[3.0, 0.0, 1.0], [4.0, 0.0, 0.0]])}, "bias": jnp.ones(3)}
MASK = {"a": {"kernel": np.array([[1, 0, 1], [1, 0, 0]], bool)}, "bias": np.bool_(True)}


def test_each_number_is_that_of_the_layer() -> None:
    found = reports.pruning_metrics(PARAMS, MASK)
    assert found == {
        "sparsity/a/kernel": 0.5,
        "dead/a/kernel": pytest.approx(1 / 3),
        "survivors/a/kernel": pytest.approx(np.sqrt(26 / 3)),
        "sparsity/total": 0.5,
        "dead/total": pytest.approx(1 / 3),
    }
    assert reports.pruning_metrics(PARAMS, MASK, axis=0)["dead/total"] == 0
    assert all(type(value) is float for value in json.loads(json.dumps(found)).values())


def test_churn_and_regrowth_compare_with_an_earlier_moment() -> None:
    before = {"a": {"kernel": np.array([[1, 1, 0], [1, 1, 0]], bool)}, "bias": np.bool_(True)}
    found = reports.pruning_metrics(PARAMS, MASK, before=before)
    assert found["churn/a/kernel"] == found["churn/total"] == 0.5  # two of four are gone
    assert found["regrown/a/kernel"] == pytest.approx(1 / 3)  # one of three is new
    same = reports.pruning_metrics(PARAMS, MASK, before=MASK)
    assert same["churn/total"] == same["regrown/total"] == 0


def test_a_state_gives_the_metrics_of_its_masks_at_every_moment() -> None:
    prune = jaxprune.rigl_transform(0.5, every=1, start=0, stop=5)
    optimizer = jaxprune.chain(optax.sgd(0.1), prune)
    params = {"kernel": jax.random.normal(jax.random.key(0), (16, 16))}
    state, before = optimizer.init(params), None
    for i in range(3):
        grads = {"kernel": jax.random.normal(jax.random.key(i), (16, 16))}
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        found = reports.pruning_metrics(params, state, before=before)
        before = jaxprune.get_masks(state)
        assert found["sparsity/kernel"] == 0.5
    assert found["churn/kernel"] == found["regrown/kernel"] > 0  # RigL moves as many as it removes


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_each_copy_in_a_stack_has_the_numbers_of_a_layer(axis: int) -> None:
    random = np.random.default_rng(0)
    values, masks, earlier = random.normal(size=(3, 4, 5)), *(random.random((2, 3, 4, 5)) < 0.4)
    masks[1] = False  # a layer without a weight, between two that have some

    def stack(own: np.ndarray) -> dict[str, np.ndarray]:
        return {"layers": np.moveaxis(own, 0, axis)}

    def alone(own: np.ndarray) -> dict[str, np.ndarray]:
        return {f"layers[{i}]": layer for i, layer in enumerate(own)}

    found = reports.pruning_metrics(
        stack(values),
        stack(masks),
        before=stack(earlier),
        stacked=stacks.under("layers", axis=axis),
    )
    assert found == reports.pruning_metrics(alone(values), alone(masks), before=alone(earlier))
    assert found["dead/layers[1]"] == found["sparsity/layers[1]"] == 1
    with pytest.raises(ValueError, match="`stacked` matches no leaf"):
        reports.pruning_metrics(PARAMS, MASK, stacked=stacks.under("layers"))


def test_nothing_pruned_and_wrong_arguments() -> None:
    dense = reports.pruning_metrics({"bias": jnp.ones(3)}, {"bias": np.bool_(True)})
    assert dense == {"sparsity/total": 0.0, "dead/total": 0.0}
    with pytest.raises(ValueError, match="must fit `params`"):
        reports.pruning_metrics(PARAMS, {"a": {"kernel": np.ones((2, 2), bool)}, "bias": True})
    with pytest.raises(ValueError, match="pruning_metrics"):
        jax.jit(lambda p: reports.pruning_metrics(p, MASK))(PARAMS)


def test_an_overlap_is_drawn_for_every_layer_that_is_pruned(tmp_path) -> None:
    random = np.random.default_rng(0)
    one, other = (
        {f"layer{i}": random.random((8, 8)) < 0.3 for i in range(12)} | {"bias": np.bool_(True)}
        for _ in range(2)
    )
    reports.plot_overlap(one, other, tmp_path / "new" / "overlap.png", names=("AGIP", "random"))
    assert (tmp_path / "new" / "overlap.png").stat().st_size > 5_000
    with pytest.raises(ValueError, match="keep everything"):
        reports.plot_overlap({"w": np.ones(3, bool)}, {"w": np.ones(3, bool)}, tmp_path / "x.png",
                             names=("a", "b"))  # fmt: skip
    with pytest.raises(ValueError, match="only in one of them"):
        reports.plot_overlap(one, {"w": np.ones(3, bool)}, tmp_path / "x.png", names=("a", "b"))


def test_a_summary_can_be_sorted_and_coloured() -> None:
    summary = jaxprune.summarize(PARAMS, MASK)
    assert [row.path for row in summary.sort("parameters").rows] == ["a/kernel", "bias"]
    assert [row.path for row in summary.sort("sparsity", reverse=False).rows] == [
        "bias",
        "a/kernel",
    ]
    with pytest.raises(ValueError, match="`by` must be one of"):
        summary.sort("colour")
    plain, coloured = str(summary), summary.coloured()
    lines = coloured.splitlines()
    assert "\x1b[32m" in lines[2] and "\x1b[2m" in lines[3]  # pruned in green, the rest dim
    assert [line.replace("\x1b[32m", "").replace("\x1b[2m", "").replace("\x1b[0m", "")
            for line in lines] == plain.splitlines()  # fmt: skip
    wrong = jaxprune.summarize({**PARAMS, "a": {"kernel": jnp.ones((2, 3))}}, MASK)
    assert "\x1b[31m" in wrong.coloured().splitlines()[2]  # masked weights that are not 0 in red
