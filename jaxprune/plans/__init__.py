"""When masks change and to what counts, and the masks that follow from scores."""

from jaxprune.plans._masks import renew, select
from jaxprune.plans._tables import (
    Group,
    Plan,
    copy_paths,
    entries_until,
    ever_grows,
    make_plan,
    sparsities_at,
)

__all__ = [
    "Group",
    "Plan",
    "copy_paths",
    "entries_until",
    "ever_grows",
    "make_plan",
    "renew",
    "select",
    "sparsities_at",
]
