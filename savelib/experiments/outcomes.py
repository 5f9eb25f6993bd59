"""What came out of a study: gold against KL, paired differences to the reference, when to take which cell.

Points and percent throughout. Differences are taken run by run, intervals are Student's 95% over worlds, and resolved
means that the interval leaves out 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from savelib.benchmarks.statistics import interval_of_mean
from savelib.config import ConfigError
from savelib.experiments.cells import Study
from savelib.experiments.summary import read_tables
from savelib.method import ALGORITHMS
from savelib.paths import resolve

SHIPPED = ("remedies", "remedies_long")  # folders of data/results/studies; the first is T 60, the other T 240
DEVELOPMENT = "remedies_development"  # shown where neither is there
RUN = ["setting", "cell", "world", "seed"]
MEASURES = ("held-out pairs", "current responses", "gold", "best gold", "KL", "gold per nat")
JUDGED = ("held-out pairs", "current responses", "gold")  # what decides which remedy is taken
SHORT = {"held-out pairs": "pairs", "current responses": "responses"}
HARMED, COLLAPSED = 2.0, 10.0  # points of held-out pairs lost; percent of gold at the end
MORE = 2  # runs harmed or collapsed beyond the reference's from which on a remedy is one to avoid


def default_folders() -> list[str]:
    """The shipped folders of the verdict, else that of the development worlds."""
    there = [f for f in (f"data/results/studies/{name}" for name in SHIPPED) if Path(resolve(f)).is_dir()]
    return there or [f"data/results/studies/{DEVELOPMENT}"]


def read(folders: Iterable[str]) -> tuple[Study, pd.DataFrame, pd.DataFrame]:
    """(study, courses, cost) of one or more folders with the same cells, whose settings then end with their T.

    courses have two more columns: kl, of the batch in nats a response (0 at step 0), and final_kl, of kl.csv or nan.
    cost: cell, ratio to the reference's step, of cost.csv; empty where none is there.
    """
    parts, costs, studies = [], [], []
    for folder in folders:
        study, _, courses = read_tables(folder)
        place = Path(resolve(str(folder)))
        courses["kl"] = (
            (courses["policy/kl"] * courses["response/tokens"]).mask(courses["step"] == 0, 0.0).clip(lower=0)
        )
        final = _table(place / "kl.csv", [*RUN, "kl"]).rename(columns={"kl": "final_kl"})
        parts.append(courses.merge(final[[*RUN, "final_kl"]], on=RUN, how="left"))
        costs.append(_table(place / "cost.csv", ["cell", "seconds"]))
        studies.append(study)
    if any([c.name for c in study.cells] != [c.name for c in studies[0].cells] for study in studies):
        raise ConfigError(f"results: {', '.join(map(str, folders))} have other cells; name folders of one study")
    if len(parts) > 1:
        for part in parts:
            steps = f"T={part['step'].max()}"
            part["setting"] = [", ".join(filter(None, (setting, steps))) for setting in part["setting"]]
    seconds = pd.concat(costs).groupby("cell")["seconds"].mean()
    ratio = (seconds / seconds.get(studies[0].reference, math.nan)).rename("ratio").reset_index()
    together = pd.concat(parts).sort_values(
        "setting", key=lambda s: s.str.replace(r"(, )?T=\d+$", "", regex=True), kind="stable"
    )
    return studies[0], together.reset_index(drop=True), ratio


def _table(file: Path, columns: list[str]) -> pd.DataFrame:
    table = pd.read_csv(file) if file.is_file() else pd.DataFrame(columns=columns)
    return table.assign(setting=table["setting"].astype(object).fillna("")) if "setting" in table else table


def remedy(settings: dict[str, Any]) -> str:
    """What a cell's settings are a remedy by: the key of its colour."""
    if settings.get("algo", "grpo") != "grpo":
        return settings["algo"]
    if settings.get("ensemble", 1) > 1:
        return f"ensemble_{settings.get('ensemble_reward', 'mean')}"
    rule, shaping = settings.get("rule", "save"), settings.get("reward_shaping", "none")
    return rule if shaping == "none" else shaping if rule == "frozen" else f"{rule}_{shaping}"


def best_only(study: Study) -> set[str]:
    """Cells whose runs log the KL of their best responses alone."""
    return {cell.name for cell in study.cells if ALGORITHMS[cell.set.get("algo", "grpo")].best_only}


def runs(study: Study, courses: pd.DataFrame) -> pd.DataFrame:
    """One row per run: `MEASURES` at its end (best gold: of all evaluations), harmed, collapsed.

    KL is that of the final policy, else of the last batches, and nan where these hold the best responses alone.
    """
    by_run = courses.sort_values("step", kind="stable").groupby(RUN, sort=False)
    first, last, gold = by_run.first(), by_run.last(), 100 * by_run["eval/gold"].max()
    batch = last["kl"].mask(last.index.get_level_values("cell").isin(best_only(study)))
    table = pd.DataFrame(
        {
            "held-out pairs": 100 * last["eval/rm_accuracy"],
            "current responses": 100 * last["eval/rm_accuracy_current"],
            "gold": 100 * last["eval/gold"], "best gold": gold, "KL": last["final_kl"].astype(float).fillna(batch),
        }
    )  # fmt: skip
    table["gold per nat"] = 100 * (last["eval/gold"] - first["eval/gold"]) / table["KL"]
    table["harmed"] = table["held-out pairs"] < 100 * first["eval/rm_accuracy"] - HARMED
    table["collapsed"] = table["gold"] < COLLAPSED
    table["steps"] = last["step"]
    order = [cell.name for cell in study.cells]
    return table.reset_index().sort_values(["cell"], key=lambda c: c.map(order.index), kind="stable")


def against(table: pd.DataFrame, measure: str, reference: str, by: list[str]) -> pd.DataFrame:
    """By `by` (with "cell" last): mean of a measure, difference to the reference, low, high, resolved.

    table: `runs`. Runs of one world are averaged first, so that errors are clustered by world.
    """
    keys = [name for name in RUN if name != "cell"]
    value = table.set_index(RUN)[measure].rename("value").reset_index()
    other = value[value["cell"] == reference].set_index(keys)["value"].rename("other")
    value = value.join(other, on=keys)
    value["apart"] = value["value"] - value["other"]
    rows = {}
    for key, of in value.groupby(by, sort=False):
        apart = of.dropna(subset=["apart"]).groupby("world")["apart"].mean()
        low, high = interval_of_mean(apart)
        same = key[-1] == reference
        rows[key] = {
            "mean": of.groupby("world")["value"].mean().mean(), "difference": math.nan if same else apart.mean(),
            "low": low, "high": high, "resolved": bool(low > 0 or high < 0),
        }  # fmt: skip
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(by)


def turned_down(courses: pd.DataFrame) -> pd.DataFrame:
    """By setting and cell: the step at which gold, as the mean over worlds, is highest; what it loses until the end.

    loss, low, high: gold there minus gold at the end, over worlds. Pitfall: the step is chosen by the same runs, so a
    loss of a point or two is nothing.
    """
    rows = {}
    for key, of in courses.groupby(["setting", "cell"], sort=False):
        gold = 100 * of.pivot_table(index="step", columns="world", values="eval/gold")  # [steps, worlds]
        best = gold.mean(axis=1).idxmax()
        loss = gold.loc[best] - gold.iloc[-1]
        low, high = interval_of_mean(loss)
        rows[key] = {"best at": best, "loss": loss.mean(), "low": low, "high": high, "resolved": bool(low > 0)}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["setting", "cell"])


def curves(study: Study, courses: pd.DataFrame) -> pd.DataFrame:
    """Gold of the batch against its KL: setting, cell, step, kl, gold, means over the worlds, from the start on.

    Of cells that log the KL of their best responses alone only start and end are there, the end's KL from kl.csv.
    """
    start, logged = courses["step"] == 0, ~courses["cell"].isin(best_only(study))
    gold = courses["gold/success_rate"].mask(start, courses["eval/gold"])
    final = (
        courses["final_kl"].astype(float).where(courses["step"] == courses.groupby("setting")["step"].transform("max"))
    )
    kl = courses["kl"].where(logged | start, final)
    table = courses[["setting", "cell", "step", "world"]].assign(kl=kl, gold=100 * gold)
    means = (
        table.groupby(["setting", "cell", "step", "world"], sort=False)
        .mean()
        .groupby(level=[0, 1, 2], sort=False)
        .mean()
    )
    return means.dropna().reset_index()


# ---- what a reader takes from it


def judged(study: Study, table: pd.DataFrame) -> pd.DataFrame:
    """`against` the study's reference for each setting, cell and measure of `JUDGED`, the ceiling left out."""
    ceiling = [cell.name for cell in study.cells if cell.set.get("rule") == "oracle"]
    parts = {m: against(table, m, study.reference, ["setting", "cell"]) for m in JUDGED}
    found = pd.concat(parts, names=["measure"]).drop(index=[*ceiling, study.reference], level="cell", errors="ignore")
    return found.assign(sign=found["resolved"] * found["difference"].map(lambda d: 1 if d > 0 else -1))


def headline(study: Study, table: pd.DataFrame, found: pd.DataFrame) -> list[str]:
    """The answer in four sentences: who is better in gold, who harms, who collapses, who buys most gold per nat."""
    sign, size = found["sign"].xs("gold", level="measure").groupby("cell", sort=False), table["setting"].nunique()
    better, worse = (sign.agg(f).loc[lambda n: n > 0].sort_values(ascending=False) for f in (_ups, _downs))
    said = [
        f"Gold at the end, resolved better than {study.reference} in how many of {size} settings: {_numbered(better)}; "
        f"worse: {_numbered(worse)}."
    ]
    by_cell = table.groupby("cell", sort=False)
    for word, what in (
        ("harmed", f"whose reward model lost more than {HARMED:g} points"),
        ("collapsed", "that collapsed"),
    ):
        lost = by_cell[word].sum().loc[lambda n: n > 0].sort_values(ascending=False)
        said.append(f"Runs {what}, of {by_cell.size().max()}: {_numbered(lost)}.")
    nats = by_cell["gold per nat"].mean().sort_values(ascending=False)
    best = _numbered(nats.head(3).map("{:.0f}".format))
    return [*said, f"Most gold per nat of KL, in points: {best}; {study.reference}: {nats[study.reference]:.0f}."]


def _ups(signs: pd.Series) -> int:
    return int((signs > 0).sum())


def _downs(signs: pd.Series) -> int:
    return int((signs < 0).sum())


def _numbered(numbers: pd.Series) -> str:
    return ", ".join(f"{cell}: {n}" for cell, n in numbers.items()) or "none"


def counts(found: pd.DataFrame) -> pd.DataFrame:
    """By cell and measure: in how many settings it is resolved better and worse than the reference; empty: in none."""
    text = found["sign"].groupby(["cell", "measure"], sort=False).agg(_counted)
    return text.unstack("measure")[list(JUDGED)].loc[found.index.unique("cell")]


def _counted(signs: pd.Series) -> str:
    sides = {"better": _ups(signs), "worse": _downs(signs)}
    return ", ".join(f"{word} in {n}" for word, n in sides.items() if n)


def ranking(study: Study, table: pd.DataFrame, found: pd.DataFrame) -> pd.DataFrame:
    """By setting and measure: what is resolved better than the reference, best first, and what is resolved worse.

    After the best: which of the others it is not told apart from.
    """
    rows = {}
    for (measure, setting), of in found.groupby(["measure", "setting"], sort=False):
        of = of.droplevel(["measure", "setting"]).sort_values("difference", ascending=False)
        better, worse = of[of["sign"] > 0], of[of["sign"] < 0]
        rows[setting, measure] = {
            f"better than {study.reference}": _listed(better),
            "of these, not told apart from the first": ", ".join(_tied(table, measure, setting, list(better.index))),
            f"worse than {study.reference}": _listed(worse[::-1]),
        }
    return (
        pd.DataFrame.from_dict(rows, orient="index")
        .rename_axis(["setting", "measure"])
        .sort_index(sort_remaining=False)
    )


def _listed(rows: pd.DataFrame) -> str:
    return ", ".join(f"{cell} ({row.difference:+.1f})" for cell, row in rows.iterrows()) or "none"


def _tied(table: pd.DataFrame, measure: str, setting: str, cells: list[str]) -> list[str]:
    """Those of the cells after the first whose difference to it is not resolved."""
    if len(cells) < 2:
        return []
    apart = against(table[table["setting"] == setting], measure, cells[0], ["cell"])
    return [cell for cell in cells[1:] if not apart.loc[cell, "resolved"].item()]


def decisions(study: Study, table: pd.DataFrame, found: pd.DataFrame) -> pd.DataFrame:
    """By setting: which remedies the data let one take, and which to avoid.

    take: resolved better than the reference in a measure of `JUDGED`, worse in none, no run harmed or collapsed; those
    that are better in most measures first, then by gold. avoid: worse in one, or `MORE` runs more than with the
    reference harmed or collapsed.
    """
    lost = table.groupby(["setting", "cell"])[["harmed", "collapsed"]].sum()
    rows = {}
    for setting, of in found.groupby("setting", sort=False):
        signs = of["sign"].droplevel("setting").unstack("measure")[list(JUDGED)].rename(columns=SHORT)
        gold = of["difference"].xs(("gold", setting), level=["measure", "setting"])
        mine = lost.loc[setting].reindex(signs.index)
        more = mine - lost.loc[(setting, study.reference)]
        good = (signs > 0).any(axis=1) & (signs >= 0).all(axis=1) & (mine == 0).all(axis=1)
        bad = (signs < 0).any(axis=1) | (more >= MORE).any(axis=1)
        order = pd.DataFrame({"better": (signs > 0).sum(axis=1), "gold": gold})[good]
        take = list(order.sort_values(["better", "gold"], ascending=False).index)
        rows[setting] = {
            "take": "; ".join(f"{cell}: {_names(signs.loc[cell] > 0)}" for cell in take)
            or f"{study.reference}: nothing is resolved better without harm",
            "not told apart from the first in gold": ", ".join(_tied(table, "gold", setting, take)),
            "avoid": "; ".join(f"{cell}: {_faults(signs.loc[cell], more.loc[cell])}" for cell in signs.index[bad])
            or "none",
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("setting")


def _names(which: pd.Series) -> str:
    return ", ".join(which.index[which])


def _faults(signs: pd.Series, more: pd.Series) -> str:
    worse = f"worse in {_names(signs < 0)}" if (signs < 0).any() else ""
    return ", ".join(filter(None, (worse, *(f"{n} more {word}" for word, n in more.items() if n >= MORE))))


def shown(study: Study, table: pd.DataFrame, cost: pd.DataFrame, setting: str | None = None) -> pd.DataFrame:
    """The table of a setting, or of all together (mean over the settings of a world), as text.

    The reference's row has its means, the others their differences to it, with intervals.
    """
    of = table if setting is None else table[table["setting"] == setting]
    by_cell, ratios = of.groupby("cell", sort=False), cost.set_index("cell")["ratio"]
    result = pd.DataFrame(index=pd.Index(of["cell"].unique(), name=""))
    for measure in MEASURES:
        rows = against(of, measure, study.reference, ["cell"])
        result[measure] = [_text(row, 2 if measure == "KL" else 1) for row in rows.itertuples()]
    for word in ("harmed", "collapsed"):
        result[word] = [f"{n} of {size}" for n, size in zip(by_cell[word].sum(), by_cell.size(), strict=True)]
    result["step / GRPO's"] = [f"{ratios[cell]:.2f}" if cell in ratios else "not measured" for cell in result.index]
    return result


def _text(row: Any, decimals: int) -> str:
    """+12.3 (2.1 to 22.5) *, the star where it is resolved; the mean where there is no difference."""
    if math.isnan(row.difference):
        return "not measured" if math.isnan(row.mean) else f"{row.mean:.{decimals}f}"
    if math.isnan(row.low):
        return "same" if row.difference == 0 else f"{row.difference:+.{decimals}f}"
    interval = f"({row.low:.{decimals}f} to {row.high:.{decimals}f})"
    return f"{row.difference:+.{decimals}f} {interval}" + " *" * bool(row.resolved)
