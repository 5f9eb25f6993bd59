"""What runs say, read from their files: a glossary of the metrics, before and after, comparison, warnings."""

from savelib.analysis.glossary import BEFORE_AFTER, METRICS, axis_label, better, in_title
from savelib.analysis.paper import paper_changes, paper_defaults, paper_table
from savelib.analysis.runs import (
    before_after,
    changes,
    compare,
    config_table,
    frozen_twin,
    group_runs,
    in_words,
    newest_run,
    runs_table,
    sample_group,
    worst_mistakes,
)
from savelib.analysis.signs import early_signs, signs_and_outcomes, threshold_of, warnings

__all__ = [
    "BEFORE_AFTER", "METRICS", "axis_label", "before_after", "better", "changes", "compare", "config_table",
    "early_signs", "frozen_twin", "group_runs", "in_title", "in_words", "newest_run", "paper_changes", "paper_defaults",
    "paper_table", "runs_table", "sample_group", "signs_and_outcomes", "threshold_of", "warnings", "worst_mistakes",
]  # fmt: skip
