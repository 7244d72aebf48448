"""Budgets: how many weights are kept, in total and at least in each leaf. Exact, on the host."""

from jaxprune.budgets._erdos_renyi import by_layout, erdos_renyi, erdos_renyi_kernel
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
    "at_all",
    "by_layout",
    "custom",
    "erdos_renyi",
    "erdos_renyi_kernel",
    "global_budget",
    "keep_count",
    "uniform",
]
