"""Reading the text of compiled programs: exchanges, arguments, tiles and FLOPs."""

import jax
import jax.numpy as jnp
import pytest

from jaxprune import programs
from jaxprune.programs import Argument, Collective
from tests.support.hlo import GPU_PROGRAM, TPU_PROGRAM


def test_collectives():
    gather = "jit(step)/optimizer/cond/branch_1_fun/sort"
    assert programs.collectives(TPU_PROGRAM) == [
        Collective("all-reduce", 8, (1, 1), "", True),
        Collective("all-gather", 64, (64,), gather, True),
        Collective("all-gather", 4 * 288, (288,), "jit(step)/jvp()/conv_general_dilated", False),
        Collective("all-reduce", 32, (8,), "jit(step)/transpose(jvp())/dot_general", False),
        Collective("all-gather", 16, (8,), "", False),
        Collective("collective-permute", 8 + 4, (2, 8), "", False),
    ]
    assert programs.collectives("") == []


def test_arguments():
    assert programs.arguments(TPU_PROGRAM) == [
        Argument("f32", (7,), 28, 512),
        Argument("pred", (3, 3, 2, 64), 1152, 9 * 8 * 128),
        Argument("u32", (2,), 8, 8),
        Argument("f32", (), 4, 4),
    ]


@pytest.mark.parametrize(
    ("shape", "layout", "entries"),
    [
        ((3, 3, 64, 64), "3,2,1,0:T(8,128)", 9 * 64 * 128),
        ((3, 3, 64, 64), "1,0,3,2:T(8,128)", 64 * 64 * 8 * 128),
        ((3, 3, 64, 64), "3,2,1,0", 9 * 64 * 64),
        ((3, 3, 1, 16), "3,2,1,0:T(1,128)", 9 * 128),
        ((1000,), "0:T(1024)", 1024),
        ((), ":T(128)", 128),
        ((5,), "0:T(8,128)", 8 * 128),
        ((16, 100), "1,0:T(8,128)(2,1)S(1)", 16 * 128),
    ],
)
def test_tiles(shape, layout, entries):
    assert programs.in_tiles(shape, layout) == entries


@pytest.mark.parametrize(
    ("dtype", "size"),
    [("pred", 8), ("s4", 4), ("bf16", 16), ("f8e4m3fn", 8), ("f32", 32), ("c64", 64), ("token", 0)],
)
def test_bits(dtype, size):
    assert programs.bits(dtype) == size


def test_asynchronous_exchanges():
    """Each counts once, by its end; the gather joins two arrays."""
    gather, scatter = programs.collectives(GPU_PROGRAM)
    assert gather[:3] == ("all-gather", 3 * 64, (64, 64))
    assert scatter[:3] == ("reduce-scatter", 4 * 64, (64,))


def test_arithmetic_of_a_program():
    convolution = 2 * 4 * 4 * 32 * 9 * 16  # the same for both of its gradients
    products = (4 + 1) * 64 * 256 * 128
    assert programs.costs(GPU_PROGRAM)["flops"] == 2 * (3 * convolution + products)
    assert programs.costs("")["flops"] == 0


def test_arithmetic_is_that_of_xla():
    """Where XLA counts, too: on a CPU, for a convolution without padding."""

    def apply(images, kernel, matrix):
        layout = "NHWC", "HWIO", "NHWC"
        out = jax.lax.conv_general_dilated(
            images, kernel, (2, 2), "VALID", dimension_numbers=layout, feature_group_count=2
        )
        return out.reshape(4, -1) @ matrix

    arrays = jnp.ones((4, 17, 17, 8)), jnp.ones((3, 3, 4, 16)), jnp.ones((1024, 10))
    compiled = jax.jit(apply).lower(*arrays).compile()
    found = programs.costs(compiled.as_text())["flops"]
    assert found == pytest.approx(compiled.cost_analysis()["flops"], rel=1e-3)
