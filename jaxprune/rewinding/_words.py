"""Describes values and functions in words that are the same in every process.

A name alone does not suffice: two lambdas of one function share theirs. A function is described by
its module and name, its code, and every value that it closes over, refers to or has as a default.
"""

import dataclasses
import dis
import enum
import functools
import hashlib
import inspect
import os
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import processes

_PLAIN = (type(None), bool, int, float, complex, str, bytes, np.generic, type(Ellipsis))
_NO_CODE = (types.BuiltinFunctionType, types.MethodDescriptorType, np.ufunc)


def describe(value: Any, where: str, problems: list[str]) -> str:
    """Describes a value by what it holds.

    Functions of installed packages are described by their names; all others also by their code.

    Args:
        value: plain values, arrays, containers, functions, or objects made of these.
        where: the name of the value in `problems`.
        problems: receives a line for each part that cannot be described.

    Returns:
        Words that are the same for equal values in every process.

    Example:
        >>> import functools
        >>> from jaxprune import scores
        >>> describe(functools.partial(scores.magnitude, statistics=None), "rule", [])
        'jaxprune.scores.magnitude(statistics=None)'
    """
    return _words(value, where, problems, ())


def array_words(array: Any) -> str:
    """Describes an array by its dtype, shape and a hash of its contents.

    Args:
        array: an array or a number.

    Returns:
        Words such as `"float32[2] 6d4a1c6b1e0f"`.

    Example:
        >>> array_words(np.zeros(2, np.int32)) == array_words(jnp.zeros(2, jnp.int32))
        True
    """
    dtype = array.dtype if hasattr(array, "dtype") else jnp.result_type(array)
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    contents = np.ascontiguousarray(processes.on_host(array))
    return f"{dtype}{list(np.shape(array))} {_digest(contents.tobytes())}"


def _words(value: Any, where: str, problems: list[str], around: tuple[int, ...]) -> str:
    """Describes a value inside other values, whose ids are `around`."""
    if isinstance(value, _PLAIN) and not isinstance(value, enum.Enum):
        return repr(value)
    if id(value) in around:  # a function that calls itself
        return "itself"

    def inner(part: Any, name: str) -> str:
        return _words(part, f"{where}, {name}", problems, (*around, id(value)))

    if isinstance(value, (np.ndarray, jax.Array)) and value.dtype != object:
        return array_words(value)
    if isinstance(value, types.ModuleType):
        return _module(value)
    if isinstance(value, (type, enum.Enum, np.dtype, os.PathLike)):
        name = f"{value.__module__}.{value.__qualname__}" if isinstance(value, type) else str(value)
        return name
    if isinstance(value, Mapping):
        pairs = [f"{inner(k, 'a key')}: {inner(part, f'{k!r}')}" for k, part in value.items()]
        return f"{{{', '.join(sorted(pairs))}}}"
    if isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(inner(part, 'a member') for part in value))}}}"
    if isinstance(value, (tuple, list)):
        parts = ", ".join(inner(part, f"item {index}") for index, part in enumerate(value))
        name = "" if type(value) in (tuple, list) else _name(type(value))
        return f"{name}[{parts}]" if type(value) is list else f"{name}({parts})"
    if isinstance(value, functools.partial):
        parts = [inner(part, f"argument {index}") for index, part in enumerate(value.args)]
        named = sorted(value.keywords.items())
        parts += [f"{name}={inner(part, f'argument `{name}`')}" for name, part in named]
        return f"{inner(value.func, 'the function')}({', '.join(parts)})"
    if isinstance(value, _NO_CODE):
        return _name(value)
    if isinstance(value, types.MethodType):
        return f"{inner(value.__func__, 'the method')} of {inner(value.__self__, 'its object')}"
    if isinstance(value, types.FunctionType):
        return _function(value, inner)
    if callable(wrapped := getattr(value, "__wrapped__", None)):  # by `jax.jit` or `lru_cache`
        return f"wrapped {inner(wrapped, 'what is wrapped')}"
    return _object(value, inner, where, problems)


def _function(value: types.FunctionType, inner: Callable[[Any, str], str]) -> str:
    """Describes a function by its name and the values that it holds; the user's also by code."""
    code, held = value.__code__, {}
    for name, cell in zip(code.co_freevars, value.__closure__ or (), strict=True):
        held[name] = cell.cell_contents
    if _installed(value.__module__):
        words = _name(value)
    else:
        words = f"{_name(value)} {_code(code)}"
        named = _globals_of(code)
        held |= {name: value.__globals__[name] for name in named if name in value.__globals__}
        defaults = dict(enumerate(value.__defaults__ or ())) | (value.__kwdefaults__ or {})
        held |= {f"default {name}": part for name, part in defaults.items()}
    parts = [f"{name}={inner(part, f'`{name}`')}" for name, part in sorted(held.items())]
    return f"{words}[{', '.join(parts)}]" if parts else words


def _object(value: Any, inner: Callable[[Any, str], str], where: str, problems: list[str]) -> str:
    """Describes an object by its class and its fields, and its methods if they are the user's."""
    if dataclasses.is_dataclass(value):
        held = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif hasattr(value, "__dict__") and not _installed(type(value).__module__):
        held = vars(value)
    else:
        problems.append(f"{where}: a {_name(type(value))}")
        return "?"
    held, classes = dict(held), [c for c in type(value).__mro__ if not _installed(c.__module__)]
    for name in sorted({name for own in classes for name in vars(own)}):
        method = getattr(type(value), name, None)
        method = inspect.unwrap(getattr(method, "fget", None) or method) if method else None
        if isinstance(method, types.FunctionType) and not _installed(method.__module__):
            held[f"method {name}"] = method
    parts = [f"{name}={inner(part, f'`{name}`')}" for name, part in sorted(held.items())]
    return f"{_name(type(value))}({', '.join(parts)})"


def _module(module: types.ModuleType) -> str:
    """Describes a module by its name, and by its file if it is the user's."""
    path = Path(getattr(module, "__file__", None) or "/nowhere")
    if _installed(module.__name__) or not path.is_file():
        return f"module {module.__name__}"
    return f"module {module.__name__} {_digest(path.read_bytes())}"


@functools.cache
def _installed(module: str) -> bool:
    """Tells whether a package is known by its name: ours, Python's or an installed one."""
    root = (module or "").partition(".")[0]
    if root == "jaxprune" or root in sys.stdlib_module_names:
        return root != "__main__"
    path = Path(getattr(sys.modules.get(root), "__file__", None) or "/nowhere")
    return bool({"site-packages", "dist-packages"} & set(path.parts))


def _code(code: types.CodeType) -> str:
    """Hashes the code of a function, without line numbers."""
    return _digest(_code_bytes(code))


def _code_bytes(code: types.CodeType) -> bytes:
    """Collects instructions, names and constants of a function and of the functions inside it."""
    constants = [
        _code_bytes(part) if isinstance(part, types.CodeType) else _constant(part)
        for part in code.co_consts
    ]
    return b"\0".join([code.co_code, repr(code.co_names).encode(), *constants])


def _constant(part: Any) -> bytes:
    """Writes a constant; sets are sorted, as their order differs between processes."""
    return repr(sorted(map(repr, part)) if isinstance(part, frozenset) else part).encode()


def _globals_of(code: types.CodeType) -> set[str]:
    """Finds the names of globals that a function and the functions inside it use."""
    inside = [_globals_of(part) for part in code.co_consts if isinstance(part, types.CodeType)]
    own = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return own.union(*inside)


def _name(value: Any) -> str:
    """Returns module and name of a function or class."""
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", "?")
    module = getattr(value, "__module__", None) or "builtins"
    return f"{module}.{name}"


def _digest(contents: bytes) -> str:
    """Returns twelve digits of a SHA-256."""
    return hashlib.sha256(contents).hexdigest()[:12]
