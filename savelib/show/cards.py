"""Responses as cards: what was said, how the reward model judged it, and gold, on one reward axis."""

from __future__ import annotations

import pandas as pd
from IPython.display import HTML

from savelib.show.colours import COLOURS
from savelib.show.svg import Chart, image
from savelib.show.text import escaped

CARD = (
    "border:1px solid #ddd;border-left:5px solid {};border-radius:4px;padding:5px 10px;margin:6px 0;max-width:880px;"
    "display:flex;flex-wrap:wrap;align-items:center;gap:2px 16px"
)
WORDS, BAR = "flex:1 1 320px;min-width:0", "flex:0 1 420px"  # beside one another where there is room, else below
SAID = "font-family:monospace;white-space:pre-wrap;overflow-wrap:anywhere;margin:2px 0"


def cards(rows: pd.DataFrame) -> HTML:
    """One card per row of samples.jsonl: prompt, response, and a bar from V to R; circle: right, cross: wrong by gold.

    All cards have one reward axis. The colour is the side.
    """
    if not len(rows):
        return HTML("<p>No response to show.</p>")
    ends = pd.concat([rows["reward"], rows["value"]]).dropna()
    room = 0.08 * (ends.max() - ends.min() or 1)
    axis = (ends.min() - room, ends.max() + room)
    return HTML("".join(_card(row, axis) for row in rows.to_dict("records")))


def _card(row: dict, axis: tuple[float, float]) -> str:
    colour, gold = COLOURS[row["side"]], _gold(row["gold"])
    figures = [f"R {row['reward']:+.2f}"]
    if not pd.isna(row["value"]):
        figures += [f"{row.get('anchor', 'V')} {row['value']:+.2f}", f"a {row['reward'] - row['value']:+.2f}"]
    figures += [row["side"], f"gold: {gold}"]
    head = f"step {row['step']} &middot; prompt: <code>{escaped(row['prompt'])}</code>"
    return (
        f'<div style="{CARD.format(colour)}"><div style="{WORDS}">'
        f'<div style="color:#666;font-size:90%">{head}</div><div style="{SAID}">{escaped(row["response"])}</div></div>'
        f'<div style="{BAR}">{_bar(row, colour, axis)}'
        f'<div style="color:#333;font-size:90%">{" &middot; ".join(figures)}</div></div></div>'
    )


def _bar(row: dict, colour: str, axis: tuple[float, float]) -> str:
    chart = Chart(420, 40, axis, (-1, 1), (8, 8, 12, 12))
    chart.line([(axis[0], 0), (axis[1], 0)], "#bbbbbb", 1)
    if not pd.isna(row["value"]):
        chart.bar((row["value"], row["reward"]), (-0.3, 0.3), colour, 0.45)
        chart.line([(row["value"], -0.8), (row["value"], 0.8)], "#333333", 2)
        chart.text(row["value"], -1, row.get("anchor", "V"), (0, 11), size=11)
    chart.dot(row["reward"], 0, colour, 5, cross=_gold(row["gold"]) == "wrong")
    chart.text(row["reward"], 1, "R", (0, -1), size=11)  # above, V below: where both are close neither is hidden
    return image(chart.svg(), f"R {row['reward']:.2f} on the reward axis from {axis[0]:.2f} to {axis[1]:.2f}")


def _gold(gold: float | None) -> str:
    return "unknown" if pd.isna(gold) else "right" if gold > 0.5 else "wrong"
