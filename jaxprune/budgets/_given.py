"""What callers may give as `budget`: a rule, or a dict from names of leaves to their sparsities."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxprune import trees
from jaxprune.budgets._rules import (
    Budget,
    BudgetRule,
    Shape,
    at_all,
    decimal,
    kept_of,
    kept_of_parts,
    sizes_of,
    sparsities_of,
    with_all,
)

__all__ = ["GivenBudget", "Named", "check_budget", "named", "rule_of"]


class Named(NamedTuple):
    """Sparsities by name, and the rule for all other leaves; `named` makes one.

    Example:
        >>> Named({"head": 0.5}, None).sparsities
        {'head': 0.5}
    """

    sparsities: Mapping[str, float]
    others: BudgetRule | None  # None: they end at the sparsity of the run


# What may be given as `budget`; None is the default of the method.
GivenBudget = BudgetRule | Mapping[str, float] | Named | None

_FORM = "(shapes, sparsity) -> Budget"
_FIX = (
    "Take one from `jaxprune.budgets`: `budgets.uniform`, `budgets.erdos_renyi_kernel` or "
    '`budgets.global_budget(0.1)`; or give a dict of sparsities, `{"layer1": 0.98, "layer2": 0.9}`.'
)


def named(sparsities: Mapping[str, float], others: BudgetRule | None = None) -> Named:
    """Gives some leaves their sparsities, and divides the rest by a rule.

    Args:
        sparsities: final sparsity, in [0, 1), by names of leaves, modules or wildcards, as in a
            dict that is given as `budget`; see `rule_of`.
        others: rule for the leaves that no name means, such as `erdos_renyi_kernel`: these alone
            have the sparsity of the run. None prunes each of them to this sparsity.

    Returns:
        What may be given as `budget`.

    Raises:
        ValueError: if a sparsity is outside [0, 1), or `others` is no rule; when it is used, if
            `others` lets leaves compete, so that their shares are not fixed.

    Example:
        >>> import jaxprune
        >>> import numpy as np
        >>> from jaxprune import budgets
        >>> params = {"head": np.ones((10, 10)), "a": np.ones((100, 10)), "b": np.ones((10, 10))}
        >>> budget = budgets.named({"head": 0.5}, budgets.erdos_renyi_kernel)
        >>> _, masks = jaxprune.prune(params, 0.8, budget=budget)
        >>> {name: int(mask.sum()) for name, mask in masks.items()}
        {'a': 186, 'b': 34, 'head': 50}
    """
    found = Named(dict(sparsities), others)
    check_budget(found)
    return found


def rule_of(budget: Any, final: float, paths: Sequence[str]) -> BudgetRule:
    """Returns the budget rule of an argument `budget`.

    A dict gives the final sparsity of the leaves that its names mean (see `trees.means`): leaves,
    modules or wildcards; where several names mean a leaf, the most precise decides. All others end
    at the sparsity of the run. On the way there, each leaf has the same share of its final
    sparsity. A leaf keeps at least one weight.

    Args:
        budget: a function `(shapes, sparsity) -> Budget`, or a dict from names to sparsities in
            [0, 1), or the result of `named`.
        final: the largest sparsity of the run.
        paths: the paths of all leaves with a budget, and of their copies.

    Returns:
        A function `(shapes, sparsity) -> Budget`, which checks what a user's function returns.

    Raises:
        ValueError: if the budget is neither; if a sparsity is outside [0, 1) or a name means no
            leaf; if `final` is 0 and the budget is a dict; from the returned function, if the
            result of the user's is no `Budget`.

    Example:
        >>> shapes = {"layer1/kernel": (10, 10), "layer2/kernel": (10, 10), "head": (10, 10)}
        >>> rule = rule_of({"layer1": 0.98, "layer2": 0.5}, 0.9, list(shapes))
        >>> rule(shapes, 0.9)
        Budget(total=62, floors=(2, 50, 10))
        >>> rule(shapes, 0.45)
        Budget(total=181, floors=(51, 75, 55))
    """
    check_budget(budget)
    if isinstance(budget, Mapping):
        budget = Named(budget, None)
    if isinstance(budget, Named):
        return _of_names(budget, final, paths)

    def checked(shapes: Mapping[str, Shape], sparsity: float) -> Budget:
        found = budget(shapes, sparsity)
        floors = getattr(found, "floors", None)
        if floors is None or len(floors) != len(shapes):
            raise ValueError(
                f"`budget` must return a `Budget` with a floor for each of {len(shapes)} leaves, "
                f"but returned {found!r}. {_FIX}"
            )
        return found

    # The rules of this package compute the budgets of a long run at once.
    return with_all(checked, budget.at_all) if hasattr(budget, "at_all") else checked


def check_budget(budget: Any) -> None:
    """Raises unless an argument `budget` is None, a rule or a dict of sparsities.

    Args:
        budget: what the caller was given.

    Raises:
        ValueError: if it is anything else, or a sparsity is outside [0, 1).

    Example:
        >>> check_budget({"layer1": 0.98})
    """
    if isinstance(budget, Mapping):
        sparsities_of("budget", budget)
    elif isinstance(budget, Named):
        sparsities_of("sparsities", budget.sparsities)
        if budget.others is not None:
            trees.check_function("others", budget.others, _FORM, _FIX)
    elif budget is not None:
        trees.check_function("budget", budget, _FORM, _FIX)


def _of_names(given: Named, final: float, paths: Sequence[str]) -> BudgetRule:
    """Makes the rule of final sparsities by name."""
    if not final:
        raise ValueError(
            "`sparsity` must be above 0 if `budget` is a dict, because leaves that it does not "
            'name end at `sparsity`. To keep them dense, give all others 0: `{"layer1": 0.98, '
            '"*": 0}`.'
        )
    own = trees.by_name("budget", sparsities_of("budget", given.sparsities), paths)

    def rule(shapes: Mapping[str, Shape], sparsity: float) -> Budget:
        share = decimal(sparsity) / decimal(final)
        kept = {
            path: max(1, kept_of(math.prod(shape), decimal(own.get(path, final)) * share))
            for path, shape in shapes.items()
        }
        rest = {path: shape for path, shape in shapes.items() if path not in own}
        if given.others is not None and rest:
            kept |= dict(zip(rest, _fixed(given.others(rest, sparsity), rest), strict=True))
        return Budget(sum(kept.values()), tuple(kept.values()))

    def of_all(shapes: Mapping[str, Shape], sparsities: np.ndarray) -> Any:
        sizes = list(sizes_of(shapes).values())
        parts = [decimal(own.get(path, final)) / decimal(final) for path in shapes]
        floors = np.maximum(1, kept_of_parts(sizes, parts, sparsities))
        rest = {path: shape for path, shape in shapes.items() if path not in own}
        if given.others is not None and rest:
            totals, others = at_all(given.others, rest, sparsities.tolist())
            for row in np.flatnonzero(others.sum(axis=1) != totals)[:1]:
                _fixed(Budget(int(totals[row]), tuple(others[row].tolist())), rest)  # raises
            floors[:, [path in rest for path in shapes]] = others
        return floors.sum(axis=1), floors

    return with_all(rule, of_all)


def _fixed(budget: Budget, leaves: Mapping[str, Shape]) -> Sequence[int]:
    """Returns the floors of a budget; raises if they leave something to competition."""
    if sum(budget.floors) != budget.total or len(budget.floors) != len(leaves):
        raise ValueError(
            "`others` must fix the number of weights of each leaf, as `budgets.uniform` and "
            f"`budgets.erdos_renyi_kernel` do, but its floors add up to {sum(budget.floors)} of "
            f"{budget.total}. Next to leaves with sparsities of their own there is no global "
            "ranking."
        )
    return budget.floors
