"""Timetables: when masks change and to what counts, and the masks that follow from scores."""

from jaxprune.timetables._masks import renew, select
from jaxprune.timetables._tables import (
    Ranking,
    Timetable,
    entries_until,
    ever_grows,
    make_timetable,
    sparsities_at,
)

__all__ = [
    "Ranking",
    "Timetable",
    "entries_until",
    "ever_grows",
    "make_timetable",
    "renew",
    "select",
    "sparsities_at",
]
