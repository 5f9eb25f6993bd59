"""Tables of runs, read from their files: settings, before and after, samples, comparison."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from savelib.analysis.glossary import BEFORE_AFTER, METRICS
from savelib.config import Config, ConfigError
from savelib.paths import runs_dir
from savelib.runs.folder import read_config, read_manifest, read_metrics

SEEDS = ("seed", "world_seed")  # runs that differ in these alone are repetitions of one another


BOOKKEEPING = (  # what changes no number, or only its last digits
    "run_id", "resume", "device", "threads", "checkpoint_every", "keep_checkpoints", "tracker", "num_processes",
    "backend", "gradient_checkpointing", "micro_batch_groups", "micro_batch_responses", "rollout_rows",
)  # fmt: skip


def config_table(config: Config, against: Config | None = None) -> pd.DataFrame:
    """One row per field: value, place in the paper, meaning. With `against`, only the fields that differ from it."""
    rows = {}
    for name, field in Config.model_fields.items():
        row = {"value": str(getattr(config, name))}  # as text: 1e-7 must not be shown as 0.0
        if against is not None:
            row[against.profile] = str(getattr(against, name))
        if len(set(row.values())) > 1 or against is None:
            rows[name] = row | {"paper section": field.json_schema_extra["paper"], "meaning": field.description}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("field")


def before_after(run: str | Path, frozen: str | Path | None = None) -> pd.DataFrame:
    """The evaluations of a run that matter, first and last, one row per measure; `frozen`: a run to set beside it."""
    metrics = read_metrics(run)
    rows = {}
    for column in BEFORE_AFTER:
        measured = metrics[column].dropna() if column in metrics else pd.Series(dtype=float)
        if len(measured):
            rows[METRICS[column][0]] = {"before": measured.iloc[0], "after": measured.iloc[-1]}
    table = pd.DataFrame.from_dict(rows, orient="index")
    table = table.assign(change=table["after"] - table["before"])
    return table if frozen is None else table.assign(**{"after, frozen": before_after(frozen)["after"]})


def in_words(table: pd.DataFrame) -> list[str]:
    """A sentence for each row of `before_after`."""
    said = []
    for name, row in table.iterrows():
        way = f"{'rose' if row['change'] > 0 else 'fell'} by {abs(row['change']):.3f}" if row["change"] else "stayed"
        beside = f"; with a frozen reward model to {row['after, frozen']:.3f}" if "after, frozen" in row else ""
        said.append(f"{name}: {way}, from {row['before']:.3f} to {row['after']:.3f}{beside}.")
    return said


def frozen_twin(run: str | Path) -> Path | None:
    """A finished run with the same settings and seeds whose reward model was frozen, if there is one."""

    def settings(config: Config) -> dict:
        return config.model_dump(exclude={"rule", *BOOKKEEPING})

    config = read_config(run)
    for folder in [] if config.rule == "frozen" else sorted(f.parent for f in runs_dir().glob("*/config.yaml")):
        other = read_config(folder)
        if other.rule == "frozen" and settings(other) == settings(config) and read_manifest(folder)["status"] == "done":
            return folder
    return None


def sample_group(samples: pd.DataFrame, step: int) -> pd.DataFrame:
    """The first logged group of a step, best reward first: response, R, V, a = R - V, side and gold."""
    rows = samples[samples["step"] == step]
    rows = rows[rows["prompt_id"] == rows["prompt_id"].iloc[0]].sort_values("reward", ascending=False)
    names = {"reward": "R", "value": "V", "rm_advantage": "a"}
    columns = ["prompt", "response", "reward", "value", "rm_advantage", "side", "gold"]
    return rows[columns].rename(columns=names).reset_index(drop=True).rename_axis(f"step {step}")


def worst_mistakes(samples: pd.DataFrame, most: int = 5) -> pd.DataFrame:
    """Rows of samples.jsonl that the reward model got most confidently wrong, each once, the farthest from V first.

    A mistake is above V and wrong by gold, or below V and right. Where the rule has no V, the mean reward of the
    group stands for it, and a column `anchor` says so. Empty where gold is unknown.
    """
    mean = samples.groupby(["step", "prompt_id"])["reward"].transform("mean")
    value = samples["value"].astype(float)
    rows = samples.assign(value=value.fillna(mean), anchor=value.isna().map({True: "mean R", False: "V"}))
    above, gold = rows["reward"] - rows["value"], rows["gold"].astype(float)
    wrong = gold.notna() & ((above > 0) != (gold > 0.5))
    worst = rows.assign(distance=above.abs())[wrong].sort_values("distance", ascending=False)
    return worst.drop_duplicates(["step", "prompt_id", "response"]).head(most)


def newest_run(but_not: tuple[str, ...] = ()) -> str | None:
    """Id of the run that finished last (status `done`), or None; ids that start with one of `but_not` do not count."""
    ids = [f.parent.name for f in runs_dir().glob("*/config.yaml")]
    finished = {run: read_manifest(run) for run in ids if not run.startswith(but_not)}
    done = {run: manifest["finished"] for run, manifest in finished.items() if manifest["status"] == "done"}
    return max(done, key=done.get) if done else None


def runs_table() -> pd.DataFrame:
    """One row per run, the newest last: state (running, done, failed, stopped, killed), steps, time, last evaluation.

    killed: no process trains it and none could write how it ended. unreadable: one of its files is damaged.
    """
    rows = {}
    folders = sorted((f.parent for f in runs_dir().glob("*/config.yaml")), key=lambda f: f.stat().st_mtime)
    for folder in folders:
        try:
            config, metrics, state = read_config(folder), read_metrics(folder), read_manifest(folder)["status"]
        except (ConfigError, OSError):  # a damaged file
            rows[folder.name] = {"state": "unreadable", "step": "-"}
            continue
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
        for word, of in (("first", at_start), ("last", at_end), ("mean", pd.Series.mean)):
            table[label, word] = {
                METRICS[c][0]: pd.Series([of(f[c].dropna()) for f in frames if has(f, c)]).mean() for c in columns
            }
    return pd.DataFrame(table).dropna(how="all")


def changes(groups: dict[str, list[pd.DataFrame]], column: str) -> pd.DataFrame:
    """How far each run's metric moved from its first to its last measurement: one row per group.

    Columns: runs, mean change, its standard error (nan for one run), runs that rose.
    """
    rows = {}
    for label, frames in groups.items():
        measured = [f[column].dropna() for f in frames if has(f, column)]
        moved = pd.Series([m.iloc[-1] - m.iloc[0] for m in measured], dtype=float)
        if len(moved):
            up = int((moved > 0).sum())
            rows[label] = {"runs": len(moved), "change": moved.mean(), "standard error": moved.sem(), "runs up": up}
    return pd.DataFrame.from_dict(rows, orient="index")


def has(metrics: pd.DataFrame, column: str) -> bool:
    return column in metrics and metrics[column].notna().any()


def at_start(values: pd.Series) -> float:
    """The mean of the first tenth of the measurements (at least one)."""
    return values.iloc[: max(1, len(values) // 10)].mean()


def at_end(values: pd.Series) -> float:
    """The mean of the last tenth of the measurements (at least one)."""
    return values.iloc[-max(1, len(values) // 10) :].mean()
