"""Evaluates jaxprs with NumPy: thousands of small programs, where compiling each would take hours.

What has no rule here is run by JAX, operation by operation.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core


def evaluate(closed, *args):
    """The outputs of a closed jaxpr."""
    with np.errstate(all="ignore"):
        return _evaluate(closed.jaxpr, closed.consts, args)


def _evaluate(jaxpr, consts, args):
    known = dict(zip(jaxpr.constvars, map(_array, consts), strict=True))
    known.update(zip(jaxpr.invars, map(_array, args), strict=True))

    def read(atom):
        return np.asarray(atom.val) if isinstance(atom, core.Literal) else known[atom]

    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        operands = [read(atom) for atom in equation.invars]
        if name in ELEMENTWISE:
            results = [ELEMENTWISE[name](*operands)]
        elif name in RULES:
            results = RULES[name](operands, params)
        else:
            results = _by_jax(equation, operands)
        results = results if isinstance(results, list) else [results]
        for var, result in zip(equation.outvars, results, strict=True):
            known[var] = _cast(result, var.aval)
    return [read(atom) for atom in jaxpr.outvars]


def _array(x):
    is_key = hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.extended)
    return x if is_key else np.asarray(x)


def _cast(result, aval):
    if jnp.issubdtype(aval.dtype, jax.dtypes.extended):
        return result
    result = np.asarray(result)
    assert result.shape == aval.shape, (result.shape, aval)
    return result if result.dtype == aval.dtype else result.astype(aval.dtype)


def _by_jax(equation, operands):
    params = equation.primitive.get_bind_params(equation.params)
    functions, params = params if isinstance(params, tuple) else ([], params)
    results = equation.primitive.bind(*functions, *map(jnp.asarray, operands), **params)
    return list(results) if equation.primitive.multiple_results else [results]


# ---- entry by entry


def _divide(a, b):
    return a / b if np.issubdtype(a.dtype, np.inexact) else np.trunc(a / b)


def _select(which, *cases):
    return np.choose(which.astype(np.int64), np.broadcast_arrays(*cases))


def _convert(operands, params):
    x, dtype = operands[0], params["new_dtype"]
    to_real = np.iscomplexobj(x) and not np.issubdtype(dtype, np.complexfloating)
    return (x.real if to_real else x).astype(dtype)


def _logistic(x):
    return 1 / (1 + np.exp(-x))


def _polynomial(x, *coefficients):
    total = np.zeros_like(x)
    for coefficient in reversed(coefficients):
        total = total * x + coefficient
    return total


ELEMENTWISE = {
    "neg": np.negative, "sin": np.sin, "cos": np.cos, "tan": np.tan, "tanh": np.tanh,
    "exp": np.exp, "exp2": np.exp2, "log": np.log, "log1p": np.log1p, "expm1": np.expm1,
    "logistic": _logistic, "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x), "cbrt": np.cbrt,
    "abs": np.abs, "sign": np.sign, "floor": np.floor, "ceil": np.ceil, "square": np.square,
    "is_finite": np.isfinite, "not": np.invert, "asin": np.arcsin, "acos": np.arccos,
    "atan": np.arctan, "sinh": np.sinh, "cosh": np.cosh, "asinh": np.arcsinh,
    "erf": np.vectorize(math.erf, otypes=[float]), "add": np.add, "add_any": np.add,
    "sub": np.subtract, "mul": np.multiply, "div": _divide, "rem": np.fmod, "max": np.maximum,
    "min": np.minimum, "pow": np.power, "atan2": np.arctan2, "and": np.bitwise_and,
    "or": np.bitwise_or, "xor": np.bitwise_xor, "eq": np.equal, "ne": np.not_equal,
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "select_n": _select, "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
    "copy": lambda x: x, "copy_p": lambda x: x, "name": lambda x: x,
    "polynomial": _polynomial, "one_minus_square": lambda x: (1 + x) * (1 - x),
}  # fmt: skip


# ---- shapes


def _broadcast(operands, params):
    x, shape = operands[0], params["shape"]
    sizes = [1] * len(shape)
    for at, to in enumerate(params["broadcast_dimensions"]):
        sizes[to] = x.shape[at]
    return np.broadcast_to(x.reshape(sizes), shape)


def _reshape(operands, params):
    order = params["dimensions"] or range(operands[0].ndim)
    return np.transpose(operands[0], list(order)).reshape(params["new_sizes"])


def _pad(operands, params):
    x, filler = operands
    for axis, (low, high, between) in enumerate(params["padding_config"]):
        size = x.shape[axis]
        inside = size + max(size - 1, 0) * between
        whole = np.full((*x.shape[:axis], low + inside + high, *x.shape[axis + 1 :]), filler)
        places = low + np.arange(size) * (between + 1)
        there = (places >= 0) & (places < whole.shape[axis])
        index = (slice(None),) * axis
        whole[(*index, places[there])] = x[(*index, there)]
        x = whole
    return x


def _slice(operands, params):
    strides = params["strides"] or (1,) * operands[0].ndim
    ends = zip(params["start_indices"], params["limit_indices"], strides)
    return operands[0][tuple(slice(*own) for own in ends)]


def _window(x, sizes, starts):
    starts = [int(np.clip(s, 0, n - size)) for s, n, size in zip(starts, x.shape, sizes)]
    return tuple(slice(s, s + size) for s, size in zip(starts, sizes))


def _dynamic_slice(operands, params):
    return operands[0][_window(operands[0], params["slice_sizes"], operands[1:])]


def _dynamic_update_slice(operands, params):
    x = operands[0].copy()
    x[_window(x, operands[1].shape, operands[2:])] = operands[1]
    return x


def _iota(operands, params):
    shape, axis = params["shape"], params["dimension"]
    sizes = [-1 if d == axis else 1 for d in range(len(shape))]
    return np.broadcast_to(np.arange(shape[axis]).reshape(sizes), shape)


def _random_bits(operands, params):
    """Other bits than those of JAX, but the same for the same key and shape."""
    seed = np.asarray(jax.random.key_data(operands[0])).reshape(-1)
    width = params["bit_width"]
    numbers = np.random.default_rng(seed).integers(0, 2**width, params["shape"], np.uint64)
    return numbers.astype(f"uint{width}")


def _split(operands, params):
    return np.split(operands[0], np.cumsum(params["sizes"])[:-1], params["axis"])


def _places(numbers, kind, indices, x, sizes, mode):
    """Where each row of indices looks: pairs of a position and slices of `x`, None if outside."""
    batching = getattr(numbers, f"{kind}_batching_dims")
    starts, own = getattr(numbers, f"{kind}_dims"), numbers.indices_batching
    for at in np.ndindex(indices.shape[:-1]):
        corner = [0] * x.ndim
        for dimension, start in zip(starts, indices[at]):
            corner[dimension] = int(start)
        for dimension, where in zip(batching, own):
            corner[dimension] = at[where]
        last = [n - size for n, size in zip(x.shape, sizes)]
        inside = all(0 <= c <= n for c, n in zip(corner, last))
        if "CLIP" in str(mode):
            corner, inside = np.clip(corner, 0, last).tolist(), True
        yield at, tuple(slice(c, c + n) for c, n in zip(corner, sizes)) if inside else None


class _Numbers(NamedTuple):
    """Dimension numbers of gather and scatter under common names."""

    x_dims: tuple
    x_batching_dims: tuple
    indices_batching: tuple


def _gather(operands, params):
    (x, indices), numbers = operands, params["dimension_numbers"]
    sizes, gone = params["slice_sizes"], numbers.collapsed_slice_dims
    numbers_ = _Numbers(
        numbers.start_index_map, numbers.operand_batching_dims, numbers.start_indices_batching_dims
    )
    dropped = {*gone, *numbers.operand_batching_dims}
    window = [n for d, n in enumerate(sizes) if d not in dropped]
    fill = params["fill_value"]
    if fill is None:
        fill = np.nan if np.issubdtype(x.dtype, np.inexact) else np.iinfo(x.dtype).min
    out = np.full((*indices.shape[:-1], *window), fill, x.dtype)
    for at, where in _places(numbers_, "x", indices, x, sizes, params["mode"]):
        if where is not None:
            out[at] = x[where].reshape(window)
    batch = indices.ndim - 1
    order = [d for d in range(out.ndim) if d not in numbers.offset_dims]
    source = [*order, *numbers.offset_dims]
    return np.moveaxis(out, range(out.ndim), source[:batch] + list(numbers.offset_dims))


def _scatter(combine):
    def run(operands, params):
        (x, indices, updates), numbers = operands, params["dimension_numbers"]
        numbers_ = _Numbers(
            numbers.scatter_dims_to_operand_dims,
            numbers.operand_batching_dims,
            numbers.scatter_indices_batching_dims,
        )
        batch = [d for d in range(updates.ndim) if d not in numbers.update_window_dims]
        updates = np.transpose(updates, [*batch, *numbers.update_window_dims])
        dropped = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
        window = iter(updates.shape[len(batch) :])
        sizes = [1 if d in dropped else next(window) for d in range(x.ndim)]
        x = x.copy()
        for at, where in _places(numbers_, "x", indices, x, sizes, params["mode"]):
            if where is not None:
                x[where] = combine(x[where], updates[at].reshape(sizes))
        return x

    return run


def _sort(operands, params):
    axis = params["dimension"]
    if params["num_keys"] > 1:
        keys = operands[: params["num_keys"]][::-1]
        order = np.lexsort(keys, axis)
    else:
        order = np.argsort(operands[0], axis, kind="stable")
    return [np.take_along_axis(x, order, axis) for x in operands]


# ---- sums


def _reduction(function):
    return lambda operands, params: function(operands[0], axis=tuple(params["axes"]))


def _argument(function):
    return lambda operands, params: function(operands[0], axis=params["axes"][0])


def _cumulative(function):
    def run(operands, params):
        x, axis = operands[0], params["axis"]
        if params["reverse"]:
            return np.flip(function(np.flip(x, axis), axis=axis), axis)
        return function(x, axis=axis)

    return run


def _dot(operands, params):
    a, b = operands
    (contract_a, contract_b), (batch_a, batch_b) = params["dimension_numbers"]
    names_a, names_b = list(range(a.ndim)), list(range(20, 20 + b.ndim))
    for at, bt in [*zip(contract_a, contract_b), *zip(batch_a, batch_b)]:
        names_b[bt] = names_a[at]
    out = [names_a[at] for at in batch_a]
    out += [n for at, n in enumerate(names_a) if at not in {*contract_a, *batch_a}]
    out += [n for bt, n in enumerate(names_b) if bt not in {*contract_b, *batch_b}]
    return np.einsum(a, names_a, b, names_b, out)


def _convolution(operands, params):
    numbers = params["dimension_numbers"]
    x, kernel = (
        np.transpose(value, spec)
        for value, spec in zip(operands, (numbers.lhs_spec, numbers.rhs_spec))
    )
    batches, groups = params["batch_group_count"], params["feature_group_count"]
    if batches > 1:  # each group of the batch has filters of its own
        x = np.concatenate(np.split(x, batches), axis=1)
        groups = batches
    spread = [(0, 0, 0)] * 2
    x = _pad((x, x.dtype.type(0)), {"padding_config": [
        *spread, *((*ends, d - 1) for ends, d in zip(params["padding"], params["lhs_dilation"]))
    ]})  # fmt: skip
    kernel = _pad((kernel, kernel.dtype.type(0)), {"padding_config": [
        *spread, *((0, 0, d - 1) for d in params["rhs_dilation"])
    ]})  # fmt: skip
    windows = np.lib.stride_tricks.sliding_window_view(
        x, kernel.shape[2:], tuple(range(2, x.ndim))
    )[(slice(None), slice(None), *(slice(None, None, s) for s in params["window_strides"]))]
    inner = list(range(10, 10 + kernel.ndim - 2))  # names for einsum, which starts no threads
    outs = [
        np.einsum(
            own,
            [0, 1, *range(2, x.ndim), *inner],
            filters,
            [9, 1, *inner],
            [0, 9, *range(2, x.ndim)],
        )
        for own, filters in zip(np.split(windows, groups, 1), np.split(kernel, groups, 0))
    ]
    out = np.concatenate(outs, 1)
    return np.transpose(out, np.argsort(numbers.out_spec))


# ---- functions


def _call(name):
    def run(operands, params):
        inner = params[name]
        if isinstance(inner, core.ClosedJaxpr):
            return _evaluate(inner.jaxpr, inner.consts, operands)
        return _evaluate(inner, (), operands)

    return run


def _counts(operands, params):
    """How many operands of a scan are constants, and how many are carried."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].update(range(len(operands))).unpack()  # newer JAX
    return len(consts), len(carry)


def _stack(rows):
    is_key = jnp.issubdtype(rows[0].dtype, jax.dtypes.extended)
    return (jnp if is_key else np).stack(rows)


def _scan(operands, params):
    (first, count), closed = _counts(operands, params), params["jaxpr"]
    consts, carry = operands[:first], operands[first : first + count]
    rows, outs = operands[first + count :], [None] * params["length"]
    order = range(params["length"])
    for at in reversed(order) if params["reverse"] else order:
        results = _evaluate(closed.jaxpr, closed.consts, [*consts, *carry, *(r[at] for r in rows)])
        carry, outs[at] = results[:count], results[count:]
    return [*carry, *(_stack(own) for own in zip(*outs))]


def _while(operands, params):
    a, b = params["cond_nconsts"], params["body_nconsts"]
    test, body, carry = params["cond_jaxpr"], params["body_jaxpr"], operands[a + b :]
    while _evaluate(test.jaxpr, test.consts, [*operands[:a], *carry])[0]:
        carry = _evaluate(body.jaxpr, body.consts, [*operands[a : a + b], *carry])
    return carry


def _cond(operands, params):
    branches = params["branches"]
    branch = branches[int(np.clip(operands[0], 0, len(branches) - 1))]
    return _evaluate(branch.jaxpr, branch.consts, operands[1:])


def _same(operands, params):
    return list(operands)


RULES = {
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "transpose": lambda ins, params: np.transpose(ins[0], params["permutation"]),
    "squeeze": lambda ins, params: np.squeeze(ins[0], params["dimensions"]),
    "rev": lambda ins, params: np.flip(ins[0], params["dimensions"]),
    "concatenate": lambda ins, params: np.concatenate(ins, params["dimension"]),
    "stack": lambda ins, params: np.stack(ins, params["axis"]),
    "tile": lambda ins, params: np.tile(ins[0], params["reps"]),
    "pad": _pad,
    "slice": _slice,
    "split": _split,
    "iota": _iota,
    "random_bits": _random_bits,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    "scatter": _scatter(lambda old, new: new),
    "scatter-add": _scatter(np.add),
    "scatter-mul": _scatter(np.multiply),
    "scatter-max": _scatter(np.maximum),
    "scatter-min": _scatter(np.minimum),
    "sort": _sort,
    "convert_element_type": _convert,
    "integer_pow": lambda ins, params: ins[0].astype(float) ** params["y"],
    "reduce_sum": _reduction(np.sum),
    "reduce_max": _reduction(np.max),
    "reduce_min": _reduction(np.min),
    "reduce_prod": _reduction(np.prod),
    "reduce_and": _reduction(np.all),
    "reduce_or": _reduction(np.any),
    "argmax": _argument(np.argmax),
    "argmin": _argument(np.argmin),
    "cumsum": _cumulative(np.cumsum),
    "cumprod": _cumulative(np.cumprod),
    "cummax": _cumulative(np.maximum.accumulate),
    "cummin": _cumulative(np.minimum.accumulate),
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "jit": _call("jaxpr"),
    "pjit": _call("jaxpr"),
    "closed_call": _call("call_jaxpr"),
    "checkpoint": _call("jaxpr"),
    "remat2": _call("jaxpr"),
    "custom_jvp_call": _call("call_jaxpr"),
    "custom_vjp_call": _call("call_jaxpr"),
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "optimization_barrier": _same,
    "stop_gradient": _same,
    "reduce_precision": _same,
}
