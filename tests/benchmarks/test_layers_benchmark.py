"""The benchmark of stacked layers: its networks have the widths that it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import models
from tests.support import benchmarks


def test_widths_grow_from_layer_to_layer():
    layers = benchmarks.load("layers")
    own = layers.widths(4, 0.25, 1.0)
    assert own[0] == models.DecoderWidths(2, 1, 192) and own[-1] == models.DecoderWidths(8, 4, 768)
    assert layers.widest(own) == [models.DecoderWidths(8, 4, 768)] * 4


@pytest.mark.slow
def test_an_arm_is_compiled_and_run(monkeypatch):
    layers = benchmarks.load("layers")
    for name, value in {"HEAD_DIM": 4, "WIDTH": 16, "MLP": 16, "VOCABULARY": 32}.items():
        monkeypatch.setattr(layers, name, value)
    own = layers.widths(2, 0.5, 1.0)
    for scanned, widths in ((True, layers.widest(own)), (False, own)):
        each = layers.arm("arm", widths, scanned, jnp.ones((2, 5), int))
        before = jax.tree.map(np.asarray, each.state[0])
        layers.compiled(each)
        layers.run(each, 2)
        assert len(each.seconds["step, CPU s"]) == 2 and len(each.seconds["compile, s"]) == 1
        assert not np.allclose(before["head"]["kernel"], each.state[0]["head"]["kernel"])
