"""The simulation's tables, which notebook 09 draws: settings, forms and learning rates, seed by seed."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pandas as pd

from savelib.experiments.forms import FORMS
from savelib.experiments.simulation import MEASURED, Setting, simulate, trajectory
from savelib.experiments.tables import Tables

COMPARED = ("save", "mean_reward", "hl_bt", "save_zero_net_force", "spread")
LONG = (  # also at T 240
    *COMPARED, "save_either_way", "logistic", "fixed_filter", "gap_of_kept", "fourth_moment", "spread_around_v",
)  # fmt: skip
AXES = {
    "separation": (1.0, 1.5, 2.0, 3.0), "nuisance": (0.0, 1.0, 2.0, 3.0),
    "reward_scale": (0.5, 1.0, 2.0, 4.0), "label_noise": (0.0, 0.15, 0.3, 0.4),
}  # fmt: skip
SUCCESS = (0.1, 0.3, 0.5, 0.7, 0.9)
PATHS = ((0.2, None), (0.4, None), (0.6, None), (0.8, None), (0.35, 0.9))  # success rates that forms are judged at
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
TUNING, FRESH = range(8), range(100, 124)  # seeds


def over_seeds(rows: pd.DataFrame) -> pd.DataFrame:
    """`simulate`'s rows as one row per setting: means over the seeds, and the standard error of the change."""
    settings = rows.groupby("setting")
    means = settings[["initial", "change", "drift", "net_force"]].mean()
    return means.assign(standard_error=settings["change"].sem(), seeds=settings.size())


def phase_diagram(forms: Iterable[str] = ("save", "hl_bt", "spread"), seeds: Iterable[int] = FRESH) -> pd.DataFrame:
    """Change of accuracy over success rate and each of `AXES`, others at their defaults; one row per form and cell."""
    table = []
    for form, (axis, values) in itertools.product(forms, AXES.items()):
        for value in values:
            cells = over_seeds(simulate(form, [Setting(success=p, **{axis: value}) for p in SUCCESS], seeds))
            table.append(cells.assign(form=form, axis=axis, value=value, success=SUCCESS))
    return pd.concat(table, ignore_index=True)


def forms_table(total_steps: int, forms: Iterable[str]) -> pd.DataFrame:
    """Every form at every rate of `RATES` on the seeds `TUNING`, then at its best rate on `FRESH`; one row per cell.

    The best rate has the highest mean change over `PATHS`: one rate a form and T, as one would have to choose it.
    """
    table = []
    for form in forms:
        mean_of = {}
        for stage, seeds in (("tuning", TUNING), ("fresh", FRESH)):
            for lr in RATES if stage == "tuning" else [max(mean_of, key=mean_of.get)]:
                settings = [Setting(success=a, success_end=b, total_steps=total_steps, lr=lr) for a, b in PATHS]
                cells = over_seeds(simulate(form, settings, seeds))
                mean_of[lr] = cells["change"].mean()
                cells[["success", "success_end"]] = PATHS
                table.append(cells.assign(stage=stage, form=form, total_steps=total_steps, lr=lr))
    return pd.concat(table, ignore_index=True).assign(description=lambda t: [FORMS[f].description for f in t["form"]])


def courses(forms: Iterable[str] = COMPARED, seeds: Iterable[int] = FRESH) -> pd.DataFrame:
    """Means over seeds of every step's measurements, one row per form, success rate and step."""
    table = []
    for form in forms:
        shares = (0.1, 0.5, 0.9)
        steps = trajectory(form, [Setting(success=p) for p in shares], seeds)
        means = steps.groupby(["setting", "step"])[list(MEASURED)].mean().reset_index()
        table.append(means.assign(form=form, success=[shares[i] for i in means.pop("setting")]))
    return pd.concat(table, ignore_index=True)


def with_pairs(forms: Iterable[str] = ("save", "spread"), seeds: Iterable[int] = FRESH) -> pd.DataFrame:
    """Forms with the offline pairs mixed in, over the nuisance: does it keep a head from turning to style?"""
    table = []
    for form, nuisance in itertools.product(forms, AXES["nuisance"]):
        cells = list(itertools.product((0.0, 0.1, 0.3, 1.0), (0.2, 0.5, 0.8)))
        settings = [Setting(success=p, offline_weight=w, nuisance=nuisance, lr=1e-2) for w, p in cells]
        rows = over_seeds(simulate(form, settings, seeds)).assign(form=form, nuisance=nuisance)
        rows[["offline_weight", "success"]] = cells
        table.append(rows)
    return pd.concat(table, ignore_index=True)


def level(forms: Iterable[str] = ("save", "mean_reward", "hl_bt"), seeds: Iterable[int] = FRESH) -> pd.DataFrame:
    """Forms with a constant vector in all features, whose anchor follows the level of the rewards at once or lags.

    A lagging V is SAVE's brake: responses that all lie below it have one side only, and the group has no loss.
    """
    table = []
    for form in forms:
        cells = list(itertools.product((0.0, 6.0), (0.0, 0.9, 1.0), PATHS[:4]))
        settings = [Setting(success=p, offset=o, anchor_memory=m) for o, m, (p, _) in cells]
        rows = over_seeds(simulate(form, settings, seeds)).assign(form=form)
        rows[["offset", "anchor_memory", "success"]] = [(o, m, p) for o, m, (p, _) in cells]
        table.append(rows)
    return pd.concat(table, ignore_index=True)


TABLES = Tables(
    "simulation",
    {
        "courses": courses,
        "phase": phase_diagram,
        "with_pairs": with_pairs,
        "level": level,
        "forms": lambda: pd.concat([forms_table(60, FORMS), forms_table(240, LONG)], ignore_index=True),
    },
    "minutes",
)

if __name__ == "__main__":
    TABLES.main()
