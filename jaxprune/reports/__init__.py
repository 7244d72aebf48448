"""Reports the size and cost of a network and the course of its training: tables, plots, pages.

Counts are exact Python integers, taken on the host. The plot functions need matplotlib (the extra
`train`) and import it when they are called.
"""

from jaxprune.reports._costs import (
    Comparison,
    Cost,
    Latency,
    Memory,
    compare,
    measure_latency,
    measure_memory,
)
from jaxprune.reports._page import write_page
from jaxprune.reports._plots import (
    plot_accuracy,
    plot_compaction,
    plot_densities,
    plot_fronts,
    plot_overlap,
    plot_retraining,
    plot_searches,
    plot_tradeoffs,
    plot_training,
)
from jaxprune.reports._summary import Row, Summary, checkpoint_bytes, summarize
from jaxprune.reports._tables import markdown_table, table
from jaxprune.reports._watching import pruning_metrics

__all__ = [
    "Comparison",
    "Cost",
    "Latency",
    "Memory",
    "Row",
    "Summary",
    "checkpoint_bytes",
    "compare",
    "markdown_table",
    "measure_latency",
    "measure_memory",
    "plot_accuracy",
    "plot_compaction",
    "plot_densities",
    "plot_fronts",
    "plot_overlap",
    "plot_retraining",
    "plot_searches",
    "plot_tradeoffs",
    "plot_training",
    "pruning_metrics",
    "summarize",
    "table",
    "write_page",
]
