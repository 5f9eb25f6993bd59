"""Figures, drawn from files and tensors by matplotlib. One style; axes say which way is better.

Every function draws into a given Axes (or the current one) and returns it.
"""

from savelib.plots.formulas import (
    bt_curve,
    by_threshold,
    calibration,
    epoch_losses,
    filtered_groups,
    forces_by_share,
    kept_over_time,
    margin_histogram,
    pushes,
    thresholds,
    value_against_reward,
)
from savelib.plots.outcomes import changes_by_cell
from savelib.plots.runs import (
    batch_gold_against_kl,
    change_dots,
    intervals,
    lines,
    metric,
    push_against_success,
    sample_rewards,
    saying,
)
from savelib.plots.studies import (
    VERDICTS,
    cell_colours,
    course,
    gold_against_kl,
    over_worlds,
    paired_differences,
    paired_panels,
    remedy_looks,
    verdict_dots,
)
from savelib.plots.style import PAPER, nothing_to_show, use_style
from savelib.show.colours import COLOURS, LINES

__all__ = [
    "COLOURS", "LINES", "PAPER", "VERDICTS", "batch_gold_against_kl", "bt_curve", "by_threshold", "calibration",
    "cell_colours", "change_dots", "changes_by_cell", "course", "epoch_losses", "filtered_groups", "forces_by_share",
    "gold_against_kl", "intervals", "kept_over_time", "lines", "margin_histogram", "metric", "nothing_to_show",
    "over_worlds", "paired_differences", "paired_panels", "push_against_success", "pushes", "remedy_looks",
    "sample_rewards", "saying", "thresholds", "use_style", "value_against_reward", "verdict_dots",
]  # fmt: skip
