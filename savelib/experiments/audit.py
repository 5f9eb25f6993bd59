"""The paper's own tables examined: averages, what 350 pairs can give, which differences its benchmarks can resolve.

The numbers come from data/paper/*.csv as printed. No row-level score is published, so a difference on the same rows is
judged by what its margins allow (`statistics.compare_published`).
"""

from __future__ import annotations

import pandas as pd

from savelib.analysis import paper_table
from savelib.benchmarks.statistics import Published, compare_published, half_up, possible_counts, smallest_difference
from savelib.config import check_names

FIGURES = ("RewardBench", "RewardBench 2", "RM-Bench", "PPE Preference", "PPE Correctness", "JudgeBench")
TABLES = ("table1_rm_benchmarks", "table2_rl_algorithms", "table4_learning_rates", "table5_group_size",
          "table6_initial_margin")  # fmt: skip


def sizes() -> dict[str, int]:
    """Rows of each benchmark. Ties among PPE Preference's votes do not enter its accuracy: its true size is smaller."""
    return paper_table("benchmark_sizes").set_index("benchmark")["rows"].to_dict()


def rows_of(name: str) -> pd.DataFrame:
    """A table with one label a row, made of the columns that are no figures."""
    table = paper_table(name)
    figures = {*sizes(), "Average"}
    words = [c for c in table.columns if c not in figures]
    label = table[words].astype(str).agg(", ".join, axis=1).str.removeprefix("none, ")
    return table[[c for c in table.columns if c in figures]].set_axis(label)


def averages() -> pd.DataFrame:
    """Each row of tables 1, 2, 4, 5, 6: the mean of its six figures beside the printed average."""
    parts = []
    for name in TABLES:
        table = rows_of(name)
        mean = table[list(FIGURES)].mean(axis=1)
        part = pd.DataFrame({"table": name.split("_")[0], "printed": table["Average"], "recomputed": mean.round(3)})
        part["agrees"] = [abs(a - b) < 0.0501 for a, b in zip(part["printed"], mean, strict=True)]
        parts.append(part)
    return pd.concat(parts).rename_axis("row")


def judgebench_counts() -> pd.DataFrame:
    """Each printed JudgeBench value, and the counts of right pairs of 350 that print so (none: it is no such share)."""
    rows = {}
    for name in TABLES:
        for label, value in paper_table(name)["JudgeBench"].set_axis(rows_of(name).index).items():
            found = possible_counts(f"{value:.1f}", sizes()["JudgeBench"])
            rows[name.split("_")[0], label] = {"printed": value, "right of 350": ", ".join(map(str, found)) or "none"}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["table", "row"])


def initial_judgebench() -> pd.Series:
    """The initial reward model's JudgeBench, from what its makers publish: the four categories, their mean (macro), and
    the share of all pairs (micro)."""
    table = paper_table("initial_rm_judgebench").set_index("category")
    shares = 100 * table["right"] / table["pairs"]
    micro = 100 * table["right"].sum() / table["pairs"].sum()
    return pd.concat([shares, pd.Series({"macro": shares.mean(), "micro": micro})])


def like_for_like() -> pd.DataFrame:
    """SAVE's gains in table 1 over the initial reward model: as printed, and with its JudgeBench by the micro rule."""
    table = rows_of("table1_rm_benchmarks")
    initial = table.iloc[0]
    micro = initial.copy()
    micro["JudgeBench"] = initial_judgebench()["micro"]
    micro["Average"] = micro[list(FIGURES)].mean()
    rows = {}
    for label, row in table[table.index.str.endswith(", SAVE")].iterrows():
        for column in ("JudgeBench", "Average"):
            rows[label, column] = {
                "SAVE": row[column],
                "initial, printed": initial[column],
                "gain, printed": row[column] - initial[column],
                "initial, micro": micro[column],
                "gain, like for like": row[column] - micro[column],
            }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["row", "figure"])


def resolvable(percents: pd.Series) -> pd.DataFrame:
    """What each benchmark's size can resolve near these percentages: standard error and smallest differences, points.

    paired: at two models that differ on a tenth of the rows.
    """
    rows = {}
    for name, n in sizes().items():
        if name in percents:
            p = float(percents[name])
            rows[name] = {
                "rows": n,
                "at": p,
                "standard error": (p * (100 - p) / n) ** 0.5,
                "smallest difference, unpaired": smallest_difference(n, p),
                "smallest difference, paired": smallest_difference(n, p, discordant=min(10.0, 2 * min(p, 100 - p))),
            }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("benchmark")


def compared(name: str, first: str, second: str, level: float = 0.95) -> pd.DataFrame:
    """Two rows of a table: the difference on each benchmark and whether its size resolves it.

    unpaired: the interval as if on different rows. resolved: yes, no, or cannot tell, on the same rows, over all ways
    in which the two may agree. Raises ConfigError for a label that is not in the table.
    """
    table, n = rows_of(name), sizes()
    check_names([first, second], table.index)
    a, b = table.loc[first], table.loc[second]
    rows = {}
    for column in [c for c in table.columns if c in n]:
        found = compare_published(a[column], b[column], n[column], level)
        rows[column] = _verdict(a[column], b[column], found)
    if "Average" in table:
        six = list(FIGURES)
        found = compare_published(list(a[six]), list(b[six]), [n[c] for c in six], level)
        rows["Average"] = _verdict(a["Average"], b["Average"], found)
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(f"{first} - {second}")


def _verdict(a: float, b: float, found: Published) -> dict[str, object]:
    low, high = found.unpaired
    return {
        "first": a,
        "second": b,
        "difference": found.difference,
        "unpaired": f"{half_up(low)} to {half_up(high)}",
        "resolved": found.resolved,
    }


def claims(level: float = 0.95) -> pd.DataFrame:
    """The claims of tables 1, 5 and 6: the average's difference, and on how many benchmarks one is resolved."""
    one = rows_of("table1_rm_benchmarks").index
    pairs = []
    for policy in ("Qwen2.5-3B-Instruct", "Qwen3-4B-Instruct-2507"):
        save = f"{policy}, SAVE"
        rivals = [x for x in one if x.startswith(policy) and x != save] + list(one[:2])
        pairs += [("table1_rm_benchmarks", save, rival) for rival in rivals]
    five, six = rows_of("table5_group_size").index, rows_of("table6_initial_margin").index
    pairs += [("table5_group_size", five[-1], x) for x in five[:-1]]
    pairs += [("table6_initial_margin", six[1], x) for x in (six[0], six[2])]
    rows = []
    for name, first, second in pairs:
        table = compared(name, first, second, level)
        parts = table.drop(index="Average")
        up, down, sure = parts["difference"] > 0, parts["difference"] < 0, parts["resolved"] == "yes"
        row = {"table": name.split("_")[0], "first": first, "second": second}
        row |= {"average": table.loc["Average", "difference"], "average resolved": table.loc["Average", "resolved"]}
        row |= {"better on": int(up.sum()), "resolved better": int((up & sure).sum())}
        rows.append(row | {"resolved worse": int((down & sure).sum())})
    return pd.DataFrame(rows)


def against_the_text(level: float = 0.95) -> pd.DataFrame:
    """Table 3, where the text has both SAVE variants above GRPO across benchmarks: the differences as printed."""
    table = rows_of("table3_policy")
    rows = {}
    for policy in ("Qwen2.5-3B-Instruct", "Qwen3-4B-Instruct-2507"):
        for variant in ("GRPO + SAVE", "GRPO + Improved RM"):
            found = compared("table3_policy", f"{policy}, {variant}", f"{policy}, GRPO", level)
            for benchmark, row in found.iterrows():
                rows[policy, variant, benchmark] = row.drop("unpaired").to_dict() | {"unpaired": row["unpaired"]}
    assert len(rows) == 2 * 2 * (len(table.columns))
    out = pd.DataFrame.from_dict(rows, orient="index").rename_axis(["policy", "variant", "benchmark"])
    out["as the text says"] = out["difference"] > 0
    return out
