"""What callers may give as `budget`: a rule, or a dict from names of leaves to their sparsities."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxprune import trees
from jaxprune.budgets._rules import Budget, BudgetRule, Shape, check_sparsities, decimal, kept_of

__all__ = ["GivenBudget", "check_budget", "rule_of"]

# What may be given as `budget`; None is the default of the method.
GivenBudget = BudgetRule | Mapping[str, float] | None

_FORM = "(shapes, sparsity) -> Budget"
_FIX = (
    "Take one from `jaxprune.budgets`: `budgets.uniform`, `budgets.erdos_renyi_kernel` or "
    '`budgets.global_budget(0.1)`; or give a dict of sparsities, `{"layer1": 0.98, "layer2": 0.9}`.'
)


def rule_of(budget: Any, final: float, paths: Sequence[str]) -> BudgetRule:
    """Returns the budget rule of an argument `budget`.

    A dict gives the final sparsity of the leaves that its names mean (see `trees.means`): leaves,
    modules or wildcards; where several names mean a leaf, the longest decides. All other leaves end
    at the sparsity of the run. On the way there, each leaf has the same share of its final
    sparsity. A leaf keeps at least one weight.

    Args:
        budget: a function `(shapes, sparsity) -> Budget`, or a dict from names to sparsities in
            [0, 1).
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

    return checked


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
        check_sparsities("budget", budget)
    elif budget is not None:
        trees.check_function("budget", budget, _FORM, _FIX)


def _of_names(sparsities: Mapping[str, float], final: float, paths: Sequence[str]) -> BudgetRule:
    """Makes the rule of a dict of final sparsities."""
    if not final:
        raise ValueError(
            "`sparsity` must be above 0 if `budget` is a dict, because leaves that it does not "
            'name end at `sparsity`. To keep them dense, give all others 0: `{"layer1": 0.98, '
            '"*": 0}`.'
        )
    own = trees.by_name("budget", sparsities, paths)

    def rule(shapes: Mapping[str, Shape], sparsity: float) -> Budget:
        share = decimal(sparsity) / decimal(final)
        floors = [
            max(1, kept_of(math.prod(shape), decimal(own.get(path, final)) * share))
            for path, shape in shapes.items()
        ]
        return Budget(sum(floors), tuple(floors))

    return rule
