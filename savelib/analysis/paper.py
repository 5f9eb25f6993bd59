"""The paper's printed tables and defaults."""

from __future__ import annotations

import pandas as pd

from savelib.config import Config, make_config
from savelib.paths import resolve


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
