"""Imports packages of extras when they are first used, with the command that installs them."""

import importlib
from typing import Any

_NOTES = {
    "litert": (
        " into an environment of its own, as it needs older versions of packages that other "
        "extras use (litert-converter exists for Linux on x86-64 and macOS on ARM only; convert "
        "on one of these)"
    ),
    "onnx": " into an environment of its own, as jax2onnx needs an older orbax-checkpoint",
}


def load(name: str, extra: str, user: str) -> Any:
    """Imports a module of an optional package.

    Args:
        name: the module, such as "ai_edge_litert.interpreter".
        extra: the extra of jaxprune that installs it.
        user: the function that needs it, for the error.

    Returns:
        The module.

    Raises:
        ModuleNotFoundError: if it is not installed.

    Example:
        >>> load("no_such_package.part", "litert", "export.litert")
        Traceback (most recent call last):
        ModuleNotFoundError: `export.litert` needs no_such_package, which is not installed; install
        it with `pip install 'jaxprune[litert]'` into an environment of its own, ...
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        if (error.name or "").partition(".")[0] != package:
            raise
        raise ModuleNotFoundError(
            f"`{user}` needs {package}, which is not installed; install it with "
            f"`pip install 'jaxprune[{extra}]'`{_NOTES.get(extra, '')}.",
            name=error.name,
        ) from error
