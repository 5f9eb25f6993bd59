"""What runs say, read from their files: a glossary of the metrics, before and after, comparison, warnings."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from savelib.config import Config, make_config
from savelib.paths import resolve, runs_dir
from savelib.runs.folder import read_config, read_manifest, read_metrics

# column of metrics.jsonl -> (what it is, which way is better: "higher", "lower" or "" where neither is)
METRICS: dict[str, tuple[str, str]] = {
    "seconds": ("seconds since the start", ""),
    "eval/rm_accuracy": ("reward model, held-out pairs (accuracy)", "higher"),
    "eval/rm_accuracy_current": ("reward model, current responses (accuracy)", "higher"),
    "eval/gold": ("policy, held-out prompts (gold)", "higher"),
    "eval/reward": ("policy, held-out prompts (reward)", ""),
    "eval/value_error": ("|V - mean R| on held-out prompts", "lower"),
    "eval/value_correlation": ("correlation of V with mean R over held-out prompts", "higher"),
    "eval/value_gold_correlation": ("correlation of V with mean gold over held-out prompts", "higher"),
    "eval/pseudo_label_accuracy": ("signs of R - V that agree with gold, held-out prompts", "higher"),
    "threshold": ("threshold mu(t), eq. 14", ""),
    "reward/mean": ("mean reward R of the batch", ""),
    "reward/std_in_group": ("spread of R within a group (sd)", ""),
    "reward/lead": ("mean reward of the batch above the preference pairs' (save_either_way)", ""),
    "reward/skew_in_group": ("skewness of R within a group", ""),
    "gold/success_rate": ("share of right responses in the batch (gold)", "higher"),
    "gold/pseudo_label_accuracy": ("pseudo-labels that agree with gold", "higher"),
    "filter/kept": ("share of responses kept, eq. 15", ""),
    "filter/positive": ("share of responses that are positive, eq. 16", ""),
    "filter/negative": ("share of responses that are negative, eq. 16", ""),
    "filter/valid_prompts": ("share of prompts with both sides, eq. 17", ""),
    "value/mean": ("mean prompt value V of the batch", ""),
    "value/error": ("|V - mean R| of the batch", "lower"),
    "value/loss": ("lambda_V L_V, eq. 21", "lower"),
    "force/pull": ("A: force on the positives, up", ""),
    "force/push": ("D: force on the negatives, down", ""),
    "rm/loss": ("loss of the reward model (L_R of eq. 20, or the rule's)", ""),
    "rm/grad_norm": ("gradient norm of the reward model", ""),
    "rm/groups": ("groups with a loss", ""),
    "rm/mirrored": ("1 in steps that push up instead of down (save_either_way, save_checked)", ""),
    "guard/z": ("at the end of a block: z of the guard pairs' margins against the last block that stayed", "higher"),
    "guard/accepted": ("blocks that stayed so far (save_checked)", ""),
    "guard/undone": ("blocks that were undone so far (save_checked)", ""),
    "guard/resting": ("1 in steps without an update of the reward model (save_checked)", ""),
    "guard/form": ("which loss the block runs: 0 SAVE, 1 its mirror image (save_checked)", ""),
    "rm/pairs": ("preference pairs with a loss", ""),
    "process/loss": ("loss of PRIME's process reward model", "lower"),
    "process/accuracy": ("responses that PRIME's process reward model puts on the outcome's side", "higher"),
    "policy/loss": ("loss of the policy", ""),
    "policy/kl": ("KL to the initial policy, a token", ""),
    "policy/grad_norm": ("gradient norm of the policy", ""),
    "policy/kept": ("share of responses kept by the updated reward model", ""),
    "policy/responses": ("responses that the policy learnt from", ""),
    "response/tokens": ("tokens a response", ""),
    "response/unfinished": ("share of responses without an end token, left out of the RM update (F.1)", "lower"),
    "time/rollout": ("seconds for sampling", "lower"),
    "time/reward_model": ("seconds for the reward model's update", "lower"),
    "time/policy": ("seconds for the policy's update", "lower"),
    "time/tokens_per_second": ("sampled tokens a second of the whole step, all processes", "higher"),
    "memory/peak_gb": (
        "peak memory in the step, of the process that needs most; on CUDA the allocator's (GiB)",
        "lower",
    ),
}
BEFORE_AFTER = ("eval/rm_accuracy", "eval/rm_accuracy_current", "eval/gold", "eval/reward")
SEEDS = ("seed", "world_seed")  # runs that differ in these alone are repetitions of one another
BOOKKEEPING = (  # what changes no number, or only its last digits
    "run_id", "resume", "device", "threads", "checkpoint_every", "keep_checkpoints", "tracker", "num_processes",
    "backend", "gradient_checkpointing", "micro_batch_groups", "micro_batch_responses", "rollout_rows",
)  # fmt: skip
DRIFT = 1.0  # how far the mean reward may move before it is worth a warning
WEAK_PUSH = -0.37  # A - D of a run's first third: above it SAVE may harm; from development runs, notebook 09 (b)


def axis_label(column: str, prefix: str = "") -> str:
    """What a metric is and which way is better, in lines short enough for an axis."""
    name, better = METRICS[column]
    return "\n".join([*textwrap.wrap(prefix + name, 34), *([f"({better} is better)"] if better else [])])


def config_table(config: Config, against: Config | None = None) -> pd.DataFrame:
    """One row a field: value, place in the paper, meaning. With `against`, only the fields that differ from it."""
    rows = {}
    for name, field in Config.model_fields.items():
        row = {"value": str(getattr(config, name))}  # as text: 1e-7 must not be shown as 0.0
        if against is not None:
            row[against.profile] = str(getattr(against, name))
        if len(set(row.values())) > 1 or against is None:
            rows[name] = row | {"paper section": field.json_schema_extra["paper"], "meaning": field.description}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("field")


def before_after(run: str | Path) -> pd.DataFrame:
    """The evaluations of a run that matter, first and last, one row a measure."""
    metrics = read_metrics(run)
    rows = {}
    for column in BEFORE_AFTER:
        measured = metrics[column].dropna() if column in metrics else pd.Series(dtype=float)
        if len(measured):
            rows[METRICS[column][0]] = {"before": measured.iloc[0], "after": measured.iloc[-1]}
    table = pd.DataFrame.from_dict(rows, orient="index")
    return table.assign(change=table["after"] - table["before"])


def sample_group(samples: pd.DataFrame, step: int) -> pd.DataFrame:
    """The first logged group of a step, best reward first: response, R, V, a = R - V, side and gold."""
    rows = samples[samples["step"] == step]
    rows = rows[rows["prompt_id"] == rows["prompt_id"].iloc[0]].sort_values("reward", ascending=False)
    names = {"reward": "R", "value": "V", "rm_advantage": "a"}
    columns = ["prompt", "response", "reward", "value", "rm_advantage", "side", "gold"]
    return rows[columns].rename(columns=names).reset_index(drop=True).rename_axis(f"step {step}")


def newest_run(but_not: str = "") -> str | None:
    """Id of the run that finished last (status `done`), or None; ids that start with `but_not` do not count."""
    ids = [f.parent.name for f in runs_dir().glob("*/config.yaml")]
    finished = {run: read_manifest(run) for run in ids if not (but_not and run.startswith(but_not))}
    done = {run: manifest["finished"] for run, manifest in finished.items() if manifest["status"] == "done"}
    return max(done, key=done.get) if done else None


def runs_table() -> pd.DataFrame:
    """One row a run, the newest last: state (running, done, failed, stopped, killed), steps, time, last evaluation.

    killed: no process trains it and none could write how it ended.
    """
    rows = {}
    folders = sorted((f.parent for f in runs_dir().glob("*/config.yaml")), key=lambda f: f.stat().st_mtime)
    for folder in folders:
        config, metrics, state = read_config(folder), read_metrics(folder), read_manifest(folder)["status"]
        row = {"state": state, "step": f"{int(metrics['step'].max()) if len(metrics) else 0}/{config.total_steps}"}
        row["minutes"] = metrics["seconds"].iloc[-1] / 60 if len(metrics) else float("nan")
        for name in ("eval/rm_accuracy", "eval/gold", "reward/mean"):
            known = metrics[name].dropna() if name in metrics else []
            row[name] = known.iloc[-1] if len(known) else float("nan")
        rows[folder.name] = row
    return pd.DataFrame.from_dict(rows, orient="index")


def group_runs(runs: Iterable[str | Path]) -> dict[str, list[pd.DataFrame]]:
    """label -> metrics of each run; runs that share all but the seeds are one group, named by what sets it apart."""
    runs = list(dict.fromkeys(str(run) for run in runs))
    settings = [read_config(run).model_dump(exclude={*SEEDS, *BOOKKEEPING}) for run in runs]
    profiles = {s["profile"] for s in settings}

    def differs(name: str) -> bool:  # between runs of one profile; what follows from the profile needs no word
        return any(len({str(s[name]) for s in settings if s["profile"] == p}) > 1 for p in profiles)

    apart = ["profile"] * (len(profiles) > 1) + [name for name in settings[0] if name != "rule" and differs(name)]
    groups: dict[str, list[pd.DataFrame]] = {}
    for run, values in zip(runs, settings, strict=True):
        words = [str(values[k]) if k == "profile" else f"{k}={values[k]}" for k in apart]
        groups.setdefault(", ".join([values["rule"], *words]), []).append(read_metrics(run))
    return groups


def compare(groups: dict[str, list[pd.DataFrame]], columns: Iterable[str]) -> pd.DataFrame:
    """first, last and mean of each metric (rows) for each group (columns), averaged over the group's runs.

    first and last are the means of the first and the last tenth of a run's measurements (at least one).
    """
    table = {}
    for label, frames in groups.items():
        for word, of in (("first", _first), ("last", _last), ("mean", pd.Series.mean)):
            table[label, word] = {
                METRICS[c][0]: pd.Series([of(f[c].dropna()) for f in frames if _has(f, c)]).mean() for c in columns
            }
    return pd.DataFrame(table).dropna(how="all")


def changes(groups: dict[str, list[pd.DataFrame]], column: str) -> pd.DataFrame:
    """How far each run's metric moved from its first to its last measurement: one row a group.

    Columns: runs, mean change, its standard error (nan for one run), runs that rose.
    """
    rows = {}
    for label, frames in groups.items():
        measured = [f[column].dropna() for f in frames if _has(f, column)]
        moved = pd.Series([m.iloc[-1] - m.iloc[0] for m in measured], dtype=float)
        if len(moved):
            up = int((moved > 0).sum())
            rows[label] = {"runs": len(moved), "change": moved.mean(), "standard error": moved.sem(), "runs up": up}
    return pd.DataFrame.from_dict(rows, orient="index")


def warnings(metrics: pd.DataFrame) -> list[str]:
    """Sentences on what went wrong, or may: label-free signs first, then those that need gold.

    Pitfall: none of them is a proof, and a run without a warning may still have harmed its reward model.
    """
    said = []
    if _has(metrics, "reward/mean"):
        first, last = _first(metrics["reward/mean"].dropna()), _last(metrics["reward/mean"].dropna())
        if abs(last - first) > DRIFT:
            said.append(f"drift: the mean reward went from {first:.2f} to {last:.2f}; it measures nothing across steps")
    net, always_down = early_signs(metrics)["net force"], not _has(metrics, "rm/mirrored")
    if net > WEAK_PUSH and always_down:
        said.append(
            f"net force: A - D is {net:.2f} over the first third, above {WEAK_PUSH}: few responses are pushed down, "
            "as where most of them are right, and there the paper's loss harms the reward model; watch held-out pairs, "
            "or run rule=save_checked"
        )
    if _has(metrics, "force/push") and _has(metrics, "gold/success_rate") and always_down:
        bad = (metrics["force/push"] > metrics["force/pull"]) & (metrics["gold/success_rate"] > 0.5)
        if bad.mean() > 0.1:  # a batch or two above one half are chance
            steps = metrics.loc[bad, "step"]
            said.append(
                f"D > A while most responses are right, in {bad.sum()} step(s) from {steps.min()} to {steps.max()}: "
                "the net push is down, on mostly good responses"
            )
    if _has(metrics, "gold/pseudo_label_accuracy"):
        last = _last(metrics["gold/pseudo_label_accuracy"].dropna())
        if last < 0.5:
            said.append(f"pseudo-labels: at the end only {last:.0%} of the kept responses are on gold's side")
    if _has(metrics, "eval/gold"):
        best, last = metrics["eval/gold"].max(), metrics["eval/gold"].dropna().iloc[-1]
        if last < best / 2:
            said.append(f"the policy's gold fell from {best:.3f} to {last:.3f}; look at the samples of the last step")
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

    courses: from `savelib.experiments.study.courses`. A last accuracy on current responses that cannot be measured (no
    right ones, or no wrong ones, are left) is nan.
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


def paper_table(name: str) -> pd.DataFrame:
    """A table or figure of the paper as printed there: `table1_rm_benchmarks`, `fig3_training_cost`, ..."""
    return pd.read_csv(resolve(f"data/paper/{name}.csv"))


def paper_changes(policy: str) -> pd.Series:
    """Table 1: rule -> change of the six-benchmark average in points, for one of the paper's two policies."""
    table = paper_table("table1_rm_benchmarks").query("policy in [@policy, 'none']").set_index("method")["Average"]
    names = {"save": "SAVE", "hl_bt": "HL-BT", "mean_reward": "Mean Reward", "offline_bt": "Continual Offline Training"}
    return pd.Series({rule: table[name] - table.iloc[0] for rule, name in names.items()} | {"frozen": 0.0})


def paper_defaults() -> Config:
    """Table 8 to the letter."""
    return make_config(profile="paper")


def _has(metrics: pd.DataFrame, column: str) -> bool:
    return column in metrics and metrics[column].notna().any()


def _first(values: pd.Series) -> float:
    return values.iloc[: max(1, len(values) // 10)].mean()


def _last(values: pd.Series) -> float:
    return values.iloc[-max(1, len(values) // 10) :].mean()
