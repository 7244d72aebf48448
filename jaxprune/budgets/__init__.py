"""Budgets: how many weights are kept, in total and at least in each leaf. Exact, on the host."""

from jaxprune.budgets._erdos_renyi import by_layout, erdos_renyi, erdos_renyi_kernel
from jaxprune.budgets._given import GivenBudget, Named, check_budget, named, rule_of
from jaxprune.budgets._rules import (
    Budget,
    BudgetRule,
    at_all,
    custom,
    global_budget,
    keep_count,
    uniform,
)

__all__ = [
    "Budget",
    "BudgetRule",
    "GivenBudget",
    "Named",
    "at_all",
    "by_layout",
    "check_budget",
    "custom",
    "erdos_renyi",
    "erdos_renyi_kernel",
    "global_budget",
    "keep_count",
    "named",
    "rule_of",
    "uniform",
]
