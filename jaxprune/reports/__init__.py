"""What a pruned network weighs and how its training went: counts, bytes, tables and plots.

Counts are exact Python integers, taken on the host. The plot functions need matplotlib (the extra
`train`) and import it when they are called.
"""

from jaxprune.reports._plots import (
    plot_accuracy,
    plot_compaction,
    plot_densities,
    plot_retraining,
    plot_training,
)
from jaxprune.reports._summary import Row, Summary, checkpoint_bytes, summarize
from jaxprune.reports._tables import markdown_table, table

__all__ = [
    "Row",
    "Summary",
    "checkpoint_bytes",
    "markdown_table",
    "plot_accuracy",
    "plot_compaction",
    "plot_densities",
    "plot_retraining",
    "plot_training",
    "summarize",
    "table",
]
