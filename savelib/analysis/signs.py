"""Signs of a run that goes wrong, without gold and with it, and how well they tell."""

from __future__ import annotations

import pandas as pd

from savelib.analysis.glossary import BEFORE_AFTER, METRICS
from savelib.analysis.runs import at_end, at_start, has

DRIFT = 1.0  # how far the mean reward may move before it is worth a warning
LAG = (
    1.0  # spreads by which V may lie above the rewards: at 1.4 half of the valid groups were lost, below 0.3 none were
)


WEAK_PUSH = -0.37  # A - D of a run's first third: above it SAVE may harm; from development runs, notebook 09 (b)

CHECKED = "recommended: rule=save_checked, which undoes blocks of steps that do not improve held-out pairs"


def warnings(metrics: pd.DataFrame) -> list[str]:
    """Sentences on what went wrong, or may: label-free signs first, then those that need gold.

    Pitfall: none of them is a proof, and a run without a warning may still have harmed its reward model.
    """
    said = []
    if has(metrics, "reward/mean"):
        first, last = at_start(metrics["reward/mean"].dropna()), at_end(metrics["reward/mean"].dropna())
        if abs(last - first) > DRIFT:
            said.append(f"drift: the mean reward went from {first:.2f} to {last:.2f}; it measures nothing across steps")
    net, always_down = early_signs(metrics)["net force"], not has(metrics, "rm/mirrored")
    if net > WEAK_PUSH and always_down:
        said.append(
            f"net force: A - D is {net:.2f} over the first third, above {WEAK_PUSH}: few responses are pushed down, "
            "as where most of them are right, and there the paper's loss harms the reward model; watch held-out pairs"
        )
    lag = metrics["value/lag"].mean() if has(metrics, "value/lag") else 0.0
    if lag > LAG:
        said.append(
            f"lag: V lies {lag:.1f} spreads of a group above the mean reward, more than {LAG}: the rewards' level "
            "falls faster than V follows, so few groups have both sides and the update stops; lower reward_head_lr and "
            "backbone_lr or raise value_head_lr"
        )
    if has(metrics, "force/push") and has(metrics, "gold/success_rate") and always_down:
        bad = (metrics["force/push"] > metrics["force/pull"]) & (metrics["gold/success_rate"] > 0.5)
        if bad.mean() > 0.1:  # a batch or two above one half are chance
            steps = metrics.loc[bad, "step"]
            said.append(
                f"D > A while most responses are right, in {bad.sum()} step(s) from {steps.min()} to {steps.max()}: "
                "the net push is down, on mostly good responses"
            )
    if has(metrics, "gold/pseudo_label_accuracy"):
        last = at_end(metrics["gold/pseudo_label_accuracy"].dropna())
        if last < 0.5:
            said.append(f"pseudo-labels: at the end only {last:.0%} of the kept responses are on gold's side")
    if has(metrics, "eval/gold"):
        best, last = metrics["eval/gold"].max(), metrics["eval/gold"].dropna().iloc[-1]
        if last < best / 2:
            said.append(f"the policy's gold fell from {best:.3f} to {last:.3f}; look at the samples of the last step")
    if said and has(metrics, "force/push") and not has(metrics, "guard/accepted"):
        said.append(CHECKED)
    return said


def early_signs(metrics: pd.DataFrame) -> dict[str, float]:
    """What the first third of a run's steps says without gold; ours. nan where a run has no such metric.

    metrics: of one run, or its rows of a study's courses.csv. skew: skewness of R within a group; positive share: of
    the responses kept, those that are positive; net force: A - D; drift: of the mean reward since the first
    evaluation; spread: sd of R within a group; kept: share of responses.
    Pitfall: they know the reward model's opinion alone. One that is wrong throughout looks like a good one.
    """
    third = metrics["step"].max() / 3
    early = metrics[metrics["step"].between(1, third)].reindex(columns=list(METRICS)).mean()
    start = metrics.get("eval/reward", pd.Series(dtype=float)).dropna()
    return {
        "skew": early["reward/skew_in_group"],
        "positive share": early["filter/positive"] / (early["filter/positive"] + early["filter/negative"]),
        "net force": early["force/pull"] - early["force/push"],
        "drift": early["reward/mean"] - (start.iloc[0] if len(start) else float("nan")),
        "spread": early["reward/std_in_group"],
        "kept": early["filter/kept"],
    }


def signs_and_outcomes(courses: pd.DataFrame) -> pd.DataFrame:
    """One row per run of a study: its early signs, and the change of accuracies and gold from first to last evaluation.

    courses: from `savelib.experiments.summary.courses`. A last accuracy on current responses that cannot be measured
    (no right ones, or no wrong ones, are left) is nan.
    """
    rows = {}
    for name, run in courses.groupby(["cell", "setting", "world", "seed"]):
        ends = run.sort_values("step").iloc[[0, -1]]
        rows[name] = early_signs(run) | {m: float(ends[m].iloc[1] - ends[m].iloc[0]) for m in BEFORE_AFTER}
    table = pd.DataFrame.from_dict(rows, orient="index")
    return table.rename_axis(["cell", "setting", "world", "seed"])


def threshold_of(values: pd.Series, bad: pd.Series) -> dict[str, float | str]:
    """The threshold on a sign that tells bad runs (bool) from the others best: threshold, side, balanced accuracy.

    side: "above" if runs above it are called bad. Balanced: the mean of the shares of bad and of other runs called
    rightly, .5 for a coin. Pitfall: the accuracy is that of the runs it was chosen on.
    """
    known = values.notna()
    values, bad = values[known], bad[known]
    levels = sorted(set(values))
    best = {"threshold": float("nan"), "side": "above", "balanced accuracy": 0.5}
    for low, high in zip(levels, levels[1:], strict=False):
        above = values > (low + high) / 2
        for side, called in (("above", above), ("below", ~above)):
            right = (called[bad].mean() + (~called[~bad]).mean()) / 2
            if right > best["balanced accuracy"]:
                best = {"threshold": (low + high) / 2, "side": side, "balanced accuracy": right}
    return best
