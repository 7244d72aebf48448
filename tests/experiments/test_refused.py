"""A run whose values are no longer finite says so, and ends before it trains for nothing."""

from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import optax
import pytest

import jaxprune
from jaxprune.experiments import train


class Running(SimpleNamespace):
    """What `Run.log` reads of a run that logs every 50 steps."""

    @classmethod
    def make(cls) -> Any:
        return cls(
            config=SimpleNamespace(log_every=50, rewarm_steps=0, learning_rate=0.1),
            stages=SimpleNamespace(stage=SimpleNamespace(cut=None), peak_bytes=0, costs=dict),
            experiment=SimpleNamespace(schedule=optax.constant_schedule(0.1)),
            metrics=SimpleNamespace(write=lambda step, values: None),
            show=lambda step, values: None,
            spent=dict,
            sparsity=lambda state: 0.5,
            peaks={},
            refused=0,
            stuck=0,
        )


def logged(run: Any, step: int, refused: int) -> dict[str, float]:
    params = {"kernel": jnp.ones((2, 2))}
    state = jaxprune.magnitude_transform(0.5, stop=9).init(params)
    state = SimpleNamespace(opt_state=state._replace(refused=jnp.int32(refused)))
    values = {"train_loss": 0.5}
    train.Run.log(run, step, state, values)  # pyright: ignore[reportArgumentType]
    return values


def test_refused_mask_updates_are_in_the_metrics() -> None:
    run = Running.make()
    assert "refused" not in logged(run, 50, 0)
    # Single ones, as a loss scale that adapts has them, may add up to any number.
    for i in range(1, 20):
        assert logged(run, 50 + 50 * i, 30 * i)["refused"] == 30 * i


def test_a_run_ends_after_a_hundred_refused_steps_in_a_row() -> None:
    run = Running.make()
    logged(run, 50, 20)
    assert logged(run, 100, 70)["refused"] == 70
    with pytest.raises(SystemExit, match="last 100 steps up to step 150, but a gradient or a"):
        logged(run, 150, 120)
