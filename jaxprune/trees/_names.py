"""Names that users give: which leaves a name means, functions as arguments, values inside `jit`."""

import difflib
import fnmatch
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.core import Tracer

from jaxprune.trees import _paths

# The end of a path that numbers a copy in a stacked leaf, or the dimension of a group's name.
_NUMBERS = re.compile(r"(\[[\d,]+\]|:\d+)$")


def is_names(x: Any) -> bool:
    """Returns whether an argument is a name, or a collection of names, rather than a tree.

    Args:
        x: anything.

    Returns:
        A bool; False for an empty collection.

    Example:
        >>> is_names("kernel"), is_names(["conv1", "conv2"]), is_names([True, False])
        (True, True, False)
    """
    if isinstance(x, str):
        return True
    several = isinstance(x, (list, tuple, set, frozenset)) and len(x) > 0
    return several and all(isinstance(name, str) for name in x)


def means(name: str, path: str) -> str | None:
    """Says what a name means at a path: the leaf, a module that holds the leaf, or nothing.

    A name is one or several neighbouring keys of the path, such as `"kernel"`, `"layer1"` or
    `"layer1/kernel"`; each key may have the wildcards `*`, `?` and `[...]`. A number at the end of
    the path, of a copy (`kernel[3]`) or of a dimension (`kernel:1`), may be left out.

    Args:
        name: the name.
        path: the path of a leaf, or the name of a group of channels.

    Returns:
        `"leaf"`, `"module"` or None.

    Example:
        >>> [means(name, "layer1/kernel[3]") for name in ("kernel", "layer?", "layer1/kernel", "b")]
        ['leaf', 'module', 'leaf', None]
    """
    wanted, found = name.strip("/").split("/"), None
    for shown in dict.fromkeys((path, _NUMBERS.sub("", path))):
        keys = shown.split("/")
        for start in range(len(keys) - len(wanted) + 1):
            own = keys[start : start + len(wanted)]
            if all(k == w or fnmatch.fnmatchcase(k, w) for k, w in zip(own, wanted, strict=True)):
                if start + len(wanted) == len(keys):
                    return "leaf"
                found = "module"
    return found


def named(argument: str, names: Iterable[str], paths: Sequence[str]) -> dict[str, dict[str, str]]:
    """Finds the names that mean each path.

    A name that is a whole path means this path alone, whatever other paths end in it.

    Args:
        argument: the name of the caller's argument, for the error.
        names: names, see `means`.
        paths: paths of leaves, or names of groups.

    Returns:
        Dict from path to a dict from name to `"leaf"` or `"module"`, in the order of the paths.

    Raises:
        ValueError: lists every name that means no path, with the closest that does.

    Example:
        >>> named("prunable", ["a", "*/kernel"], ["a/bias", "a/kernel"])
        {'a/bias': {'a': 'module'}, 'a/kernel': {'a': 'module', '*/kernel': 'leaf'}}
        >>> named("prunable", ["kernl"], ["layer1/kernel"])
        Traceback (most recent call last):
        ...
        ValueError: `prunable` must name leaves by their paths, by parts of these or by wildcards; \
change these:
          kernl: did you mean kernel?
    """
    known, given = set(paths), dict.fromkeys(names)
    parts = [name for name in given if name not in known]
    found = {path: {path: "leaf"} if path in given else {} for path in paths}
    unknown = dict.fromkeys(parts)
    for path in paths if parts else ():
        for name in parts:
            if kind := means(name, path):
                found[path][name] = kind
                unknown.pop(name, None)
    close = list(dict.fromkeys(key for path in paths for key in (path, *path.split("/"))))
    problems = []
    for name in unknown:
        (nearest,) = difflib.get_close_matches(name, close, n=1, cutoff=0.0) or [""]
        problems.append(f"{name}: did you mean {nearest}?" if nearest else name)
    _paths.raise_for(
        problems,
        f"`{argument}` must name leaves by their paths, by parts of these or by wildcards; "
        "change these:",
    )
    return found


def by_name(argument: str, values: Mapping[str, Any], paths: Sequence[str]) -> dict[str, Any]:
    """Gives each path the value of the name that means it; where several do, of the most precise.

    A whole path is more precise than a part of it, a name without wildcards more than one with
    them, and otherwise the name with more keys, such as `layer1/kernel` beside `layer1`. Of two
    names with wildcards and as many keys, the one with more other characters is more precise.

    Args:
        argument: the name of the caller's argument, for errors.
        values: name -> value, see `means`.
        paths: paths of leaves, or names of groups.

    Returns:
        Dict from path to value, in the order of the paths; paths that no name means are left out.

    Raises:
        ValueError: if a name means no path, or two equally precise names mean a path and have
            different values; it lists all of them.

    Example:
        >>> by_name("budget", {"*": 0.5, "b": 0.9, "[a-c]": 0.7}, ["a/kernel", "b/kernel"])
        {'a/kernel': 0.7, 'b/kernel': 0.9}
    """
    chosen, problems = {}, []
    for path, names in named(argument, values, paths).items():
        if not names:
            continue
        ranks = {name: _precision(name, path) for name in names}
        best = [name for name, rank in ranks.items() if rank == max(ranks.values())]
        chosen[path] = values[best[0]]
        if any(values[name] != chosen[path] for name in best):
            problems.append(f"{path}: {', '.join(best)}")
    _paths.raise_for(
        problems,
        f"`{argument}` must have one value for each leaf, but names that are equally precise give "
        "different values to these; write more of the path, as in layer1/kernel, for one of them:",
    )
    return chosen


def _precision(name: str, path: str) -> tuple[Any, ...]:
    """Returns how precisely a name means a path; of two names, the larger is more precise."""
    without_sets, sets = re.subn(r"\[[^]]*\]", "", name)
    literal = re.sub(r"[*?]", "", without_sets)
    plain = literal == name
    wild = (0, 0, 0) if plain else (len(literal), sets, without_sets.count("?"))
    return name == path, plain, name.count("/"), wild


def check_function(argument: str, value: Any, form: str, fix: str) -> None:
    """Raises unless an argument can be called with the parameters that its form shows.

    Args:
        argument: the name of the caller's argument.
        value: what was given.
        form: the parameters in parentheses, and what is returned, such as
            `"(params, statistics) -> scores"`.
        fix: a sentence that says what to write.

    Raises:
        ValueError: if the value is no function, or takes other parameters.

    Example:
        >>> check_function("rate", 0.5, "(statistic, mean, density) -> factor",
        ...     "Write `rates.by_density()`.")
        Traceback (most recent call last):
        ...
        ValueError: `rate` must be a function `(statistic, mean, density) -> factor`, but is 0.5. \
Write `rates.by_density()`.
    """
    rule = f"`{argument}` must be a function `{form}`, but "
    if not callable(value):
        raise ValueError(f"{rule}is {_shown(value)}. {fix}")
    count = form[: form.index(")")].count(",") + 1
    try:
        inspect.signature(value).bind(*range(count))
    except TypeError:
        takes = f"({', '.join(inspect.signature(value).parameters)})"
        name = getattr(value, "__name__", type(value).__name__)
        raise ValueError(f"{rule}`{name}` takes `{takes}`. {fix}") from None
    except ValueError:  # a function of C without a signature
        return


def check_known(argument: str, tree: Any, caller: str) -> None:
    """Raises if a tree has traced leaves, whose values nobody knows yet.

    Args:
        argument: the name of the caller's argument.
        tree: any pytree.
        caller: the name of the public function, for the error.

    Raises:
        ValueError: if a leaf is traced; it names the first eight.

    Example:
        >>> check_known("params", {"kernel": 1.0}, "summarize")
    """
    traced = [path for path, leaf in _paths.leaves_with_paths(tree) if isinstance(leaf, Tracer)]
    _paths.raise_for(
        [f"{path}: traced" for path in traced[:8]],
        f"`{argument}` must hold values, but inside `jit`, `grad`, `vmap` or `scan` they are not "
        f"known yet. Call `{caller}` outside, on what the compiled function returns. The first "
        "such leaves are:",
    )


def without_settings(params: Any, updates: Any) -> Any:
    """Takes what has no update and is no array out of the parameters, as `equinox.filter` does.

    A module of Equinox has functions and settings among its leaves, and derivatives have None in
    their place. Optax accepts the whole module as `params` of `update` all the same.

    Args:
        params: the parameters, or a whole module.
        updates: tree like the parameters, or with None where they have settings.

    Returns:
        The parameters, with None in place of such leaves.

    Example:
        >>> without_settings({"kernel": 1.0, "activation": abs}, {"kernel": 0.1})
        {'activation': None, 'kernel': 1.0}
    """
    if params is None or all(map(_paths.is_array, jax.tree.leaves(params))):
        return params
    moved = _paths.leaf_by_path(updates)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            leaf if _paths.is_array(leaf) or _paths.path_string(path) in moved else None
        ),
        params,
    )


def _shown(value: Any) -> str:
    """Returns a value in at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
