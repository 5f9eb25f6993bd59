"""What a browser shows: text of models is text, cards, drawings, and the page of a notebook, which loads nothing."""

import base64
import html
import json
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from savelib import plots
from savelib.analysis import worst_mistakes
from savelib.method import partition, save_loss
from savelib.plots import moving
from savelib.plots.style import name_ends
from savelib.runs.folder import read_metrics, read_samples
from savelib.show import live
from savelib.show.cards import cards
from savelib.show.html import bullets, folded, listing, table
from savelib.show.page import export, markdown
from savelib.show.svg import Chart, ticks
from savelib.show.text import escaped
from savelib.training.algorithm import save_step

ROOT = Path(__file__).resolve().parent.parent
NASTY = (
    '<script>alert(1)</script><img src="https://example.org/x.png"> $x^2$ $$y$$ \\(z\\) \\begin{a}\\end{a} **b** `c` '
    "[d](https://example.org) \x1b[31mred\x1b[0m \x00\x07\x7f\x9b \u202eright to left \u2028 tab\tand\nline &amp;"
)


def shown(markup: str) -> str:
    """The text that a browser shows of some HTML."""
    return html.unescape(re.sub(r"<[^>]*>", "", markup))


def samples(**columns) -> pd.DataFrame:
    row = {"step": 1, "prompt_id": "p", "prompt": "say", "response": "so", "side": "positive", "gold": 0.0}
    return pd.DataFrame(row | {"reward": [1.0], "value": 0.0, "rm_advantage": 1.0} | columns)


@pytest.mark.parametrize("svg", [False, True])
def test_text_of_models_is_shown_as_it_is(svg):
    markup = escaped(NASTY, svg)
    assert not re.search(r"<(?!/?t?span>)", markup), "no element but the ones around single characters"
    assert not set("$\\*`[]") & set(markup), "nothing that mathematics or markdown begin with"
    assert all(c.isprintable() or c in "\n\t" for c in markup)
    signs = {"\x1b": "\u241b", "\0": "\u2400", "\x07": "\u2407", "\x7f": "\u2421", "\x9b": "(U+009B)"}
    signs |= {"\u202e": "(U+202E)", "\u2028": "(U+2028)"}
    assert shown(markup) == "".join(signs.get(c, c) for c in NASTY)
    escaped("\ud800").encode()  # half a surrogate pair can be written


def test_tables_and_folded_parts_escape_every_text():
    frame = pd.DataFrame({"response": [NASTY], "list": [[NASTY]], NASTY: [1.5]}, index=[NASTY])
    made = (table(frame), folded(NASTY, frame), bullets([NASTY]), cards(samples(prompt=NASTY, response=NASTY)))
    for markup in (part.data for part in made):
        assert "<script" not in markup and 'example.org/x.png"' not in markup and "$" not in markup
        assert "alert(1)" in shown(markup)
    assert len(shown(table(pd.DataFrame({"a": ["long " * 100]})).data)) > 500, "nothing is cut"


def test_a_listing_names_the_file_of_what_is_decorated():
    assert "save_step, from savelib/training/algorithm.py" in shown(listing(save_step).data)


def test_cards_have_one_axis_and_say_what_gold_says():
    rows = pd.concat([samples(), samples(reward=[3.0], gold=1.0, side="left out"), samples(value=None, gold=None)])
    markup = cards(rows).data
    assert [re.search(r"gold: (\w+)", part)[1] for part in markup.split("step 1")[1:]] == ["wrong", "right", "unknown"]
    assert "R +3.00 &middot; V +0.00 &middot; a +3.00" in markup
    assert len(set(re.findall(r"axis from (\S+ to \S+)\"", markup))) == 1
    assert "No response" in cards(rows.iloc[:0]).data


def test_the_worst_mistakes_come_first():
    rows = pd.concat(
        [
            samples(response=name, reward=[r], gold=g)
            for name, r, g in (("a", 1.0, 0.0), ("b", 2.0, 1.0), ("c", -3.0, 1.0), ("d", 2.0, 0.0), ("e", -1.0, 0.0))
        ]
    )
    assert worst_mistakes(rows)["response"].tolist() == ["c", "d", "a"]
    assert worst_mistakes(rows, most=1)["response"].tolist() == ["c"]
    assert worst_mistakes(pd.concat([rows, rows]))["response"].tolist() == ["c", "d", "a"], "each once"
    without = worst_mistakes(rows.assign(value=None))  # the mean reward of the group, 0.2, stands for V
    assert without["response"].tolist() == ["c", "d", "a"] and set(without["anchor"]) == {"mean R"}
    assert without["value"].tolist() == pytest.approx([0.2] * 3)
    assert len(worst_mistakes(rows.assign(gold=None))) == 0


def test_a_chart_places_what_it_is_given():
    chart = Chart(200, 100, (0, 10), (-1, 1), (10, 10, 10, 10)).dot(5, 0, "#123456").bar((2, 4), (0, 1), "#abcdef")
    assert '<circle cx="100.0" cy="50.0"' in chart.svg()
    assert '<rect x="46.0" y="10.0" width="36.0" height="40.0" fill="#abcdef"' in chart.svg()
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0] and ticks(-3, 47) == [0, 10, 20, 30, 40] and ticks(2, 2) == [2]


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    """The page of a notebook with mathematics, text of a model, a listing and a wide line."""
    made = [cards(samples(response=NASTY)), listing(export)]
    cells = [
        new_markdown_cell("# Title\n\nInline $\\sigma(|a|) \\ge \\mu(t)$, code `$x$`.\n\n$$\\frac{a_1}{b*c} * d_2$$"),
        new_code_cell("1", outputs=[new_output("display_data", {"text/html": m.data}) for m in made]),
        new_code_cell("2", outputs=[new_output("stream", name="stdout", text="\x1b[31mred\x1b[0m <script>x</script>")]),
        new_code_cell("3", outputs=[new_output("stream", name="stdout", text=f"step {i} <b>\n") for i in range(20)]),
        new_code_cell("4"),
    ]  # fmt: skip
    path = tmp_path_factory.mktemp("page") / "some.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    return export(path).read_text()


def loads(page: str) -> list[str]:
    """Whatever in a page would be fetched from elsewhere."""
    tags = " ".join(re.findall(r"<[a-zA-Z][^>]*>", page))
    code = " ".join(re.findall(r"(?s)<(?:style|script)[^>]*>(.*?)</(?:style|script)>", page))
    found = re.findall(r"""(?:src|href|data|action|poster|srcset)\s*=\s*["']?\s*(?:https?:)?//[^\s>]*""", tags)
    return found + re.findall(r"""url\(\s*["']?\s*(?:https?:)?//[^)]*|@import|\bimport\s*\(|\bfetch\s*\(""", code)


def test_a_page_loads_nothing(page):
    assert loads('<script src="https://a.b/c.js"></script><style>a {background: url(//d/e)}</style>'), (
        "a test that can fail"
    )
    assert loads(page) == [] and "<script" not in page


def test_a_page_has_its_mathematics_typeset(page):
    body = page[page.index("<body") :]
    assert body.count("<math") == 2 and 'display="block"' in body and "<mfrac>" in body
    assert "$$" not in body and "<em>" not in body, "no star or underscore of a formula is taken for markdown"
    assert "<code>$x$</code>" in body
    assert "alert(1)" in shown(body) and "<script" not in body


def test_formulas_have_the_spaces_of_tex():
    bars, logarithm = markdown(r"$\sigma(|a|)$"), markdown(r"$\log\sigma$")
    assert bars.count('lspace="0" rspace="0">|</mo>') == 2 and 'rspace="0.17em">log</mo><mi>' in logarithm
    for markup in (bars, logarithm):
        ElementTree.fromstring(markup[markup.index("<math") : markup.index("</p>")])


def test_names_of_lines_keep_apart():
    ax = Figure().add_subplot()
    ax.set_ylim(0, 1)
    name_ends(ax, [(0.5, "two\nlines", "b"), (0.51, "one", "g"), (0.1, "far", "r")])
    places = {text.get_text(): text.get_position()[1] for text in ax.texts}
    assert places["far"] == 0.1 and places["two\nlines"] == 0.5 and places["one"] == pytest.approx(0.62)


def test_runs_that_measured_at_other_steps_are_drawn_from_left_to_right():
    runs = [pd.DataFrame({"step": steps, "policy/kl": 0.1}) for steps in ([5, 6], [3, 4, 5, 6])]
    (line,) = plots.metric({"save": runs}, "policy/kl", Figure().add_subplot()).lines
    assert line.get_xdata().tolist() == [3, 4, 5, 6]


def test_figures_of_two_runs_show_running_means():
    samples = pd.DataFrame({"step": [1, 1, 2, 2], "response": ["a.c", "abc", "a.c", "a.c"]})
    (line,) = plots.saying("a.c", {"save": samples}, Figure().add_subplot()).lines
    assert line.get_ydata().tolist() == [0.5, 0.75], "the text itself, not a pattern; the mean of both steps"
    rows = pd.DataFrame({"policy/kl_response": [0.0, 1.0, 2.0], "gold/success_rate": [0.2, 0.4, 0.9]})
    line, end = plots.batch_gold_against_kl({"save": [rows]}, Figure().add_subplot(), window=2).lines
    assert line.get_xdata().tolist() == [0.5, 1.5] and line.get_ydata().tolist() == pytest.approx([0.3, 0.65])
    assert end.get_xdata().tolist() == [1.5]


def test_a_page_folds_code_without_a_result_and_long_output(page):
    assert "<summary>20 lines of output, the last: step 19 &lt;b&gt;</summary>" in page
    assert len(re.findall(r'<details class="code" open', page)) == 3 == page.count('<details class="code"') - 1


# figures that move


def recorded(name: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    folder = ROOT / "data/recorded" / name
    return read_samples(folder), read_metrics(folder)


def still(figure: str) -> str:
    """The SVG of the first picture."""
    return base64.b64decode(re.search(r'<img [^>]*src="data:image/svg\+xml;base64,([^"]+)"', figure)[1]).decode()


def still_and_frames(figure: str) -> tuple[str, list[list[str]]]:
    """The SVG of the picture that is there without scripts, and the frames (label, SVG) of the script."""
    return still(figure), json.loads(re.search(r"const frames = (\[.*?\]), root =", figure)[1])


@pytest.fixture(scope="module")
def figures() -> dict[str, str]:
    samples, metrics = recorded("save")
    right, its_metrics = recorded("save-mostly-right")
    cells = pd.DataFrame([[10.0, -20.0], [30.0, -40.0]], index=[1.0, 2.0], columns=[0.2, 0.8])
    return {
        "threshold": moving.filter_by_threshold([2.0, 1.5, 0.0, -1.0], 0.625, list("abcd")).data,
        "run": moving.filter_over_run(samples, metrics).data,
        "histograms": moving.reward_histograms({"save": samples, "mostly right": right}).data,
        "phase": moving.run_in_phase_diagram(cells, its_metrics).data,
    }


@pytest.mark.parametrize("name, count", [("threshold", 46), ("run", 30), ("histograms", 30), ("phase", 30)])
def test_a_moving_figure_is_small_and_has_a_still_picture(name, count, figures):
    picture, frames = still_and_frames(figures[name])
    assert len(figures[name]) < 500_000 and loads(figures[name]) == []
    assert len(frames) == count and [picture] == [svg for _, svg in frames if svg == picture]
    assert len({svg for _, svg in frames}) == count, "every frame differs"
    for _, svg in frames:
        ElementTree.fromstring(svg)  # well-formed, else a browser shows nothing
    assert re.search(r"<div hidden[^>]*><button", figures[name]), "no controls without scripts"
    assert figures[name].count("</script>") == 1


def test_the_threshold_leaves_out_and_the_losses_push(figures):
    svgs = dict(still_and_frames(figures["threshold"])[1])
    assert svgs["mu = 0.50"].count("<polygon") == 4 and svgs["mu = 0.70"].count("<polygon") == 3
    assert svgs["mu = 0.95"].count("<polygon") == 0
    rewards, values = torch.tensor([[2.0, 1.5, 0.0, -1.0]], requires_grad=True), torch.tensor([0.625])
    loss = save_loss(rewards, values, partition(rewards.detach() - 0.625, 0.5))
    (gradient,) = torch.autograd.grad(loss, rewards)
    written = [float(x) for x in re.findall(r">([+-]\d\.\d\d)<", svgs["mu = 0.50"])]
    assert written == pytest.approx((-gradient[0]).tolist(), abs=0.006)


def test_histograms_count_the_responses_around_a_step(figures):
    samples, _ = recorded("save")
    near = samples[samples["step"].between(1, 3)]
    svg = dict(still_and_frames(figures["histograms"])[1])["step 1"]
    assert f"right: {int((near['gold'] > 0.5).sum())} of {len(near)}" in svg and "gold unknown" not in svg


def test_long_runs_have_no_more_frames_and_runs_without_gold_say_so():
    samples, metrics = recorded("save")
    long = pd.concat([samples.assign(step=samples["step"] + 30 * k) for k in range(4)])
    figure = moving.reward_histograms({"long": long}).data
    labels = [label for label, _ in still_and_frames(figure)[1]]
    assert len(labels) <= 31 and (labels[0], labels[-1]) == ("step 1", "step 120") and len(figure) < 500_000
    cells = pd.DataFrame([[1.0, 2.0]] * 2, index=[1.0, 2.0], columns=[0.2, 0.8])
    without = metrics.drop(columns="gold/success_rate")
    assert "Not measured" in moving.run_in_phase_diagram(cells, without).data
    assert "Not measured" in moving.filter_over_run(samples.assign(value=None), metrics).data


# the picture of a run as it goes


class FakeKernel:
    """A kernel whose front end may, or may not, ask a person for input."""

    def __init__(self, allow_stdin: bool):
        self.kernel, self.allow_stdin = self, allow_stdin

    def get_parent(self) -> dict:
        return {"content": {"allow_stdin": self.allow_stdin}}


class FakeDisplay(list):
    """What was displayed and updated: ("display" or "update", the data)."""

    def __call__(self, data, raw, display_id):
        self.append(("display", data))
        return self

    def update(self, data, raw):
        self.append(("update", data))


@pytest.mark.parametrize("kernel, watched", [(None, False), (FakeKernel(False), False), (FakeKernel(True), True)])
def test_the_live_picture_is_drawn_again_in_place_where_a_person_watches(kernel, watched, monkeypatch):
    shown = FakeDisplay()
    monkeypatch.setattr("IPython.get_ipython", lambda: kernel)
    monkeypatch.setattr("IPython.display.display", shown)
    picture, (_, metrics) = live.Picture(30), recorded("save")
    rows = metrics.to_dict("records")
    picture([], "starting")
    picture(rows[:5], "too soon after the first")
    picture(rows, "step 30/30 <b>", last=True)
    assert [kind for kind, _ in shown] == ["display", "update"] * watched
    if watched:
        assert shown[0][1]["text/plain"] == "starting" and "<img" not in shown[0][1]["text/html"]
        svg, _ = re.subn(r"</?tspan>", "", html.unescape(still(shown[1][1]["text/html"])))
        assert "<b>" not in shown[1][1]["text/html"]
        for name, metric in (("gold", "eval/gold"), ("accuracy, fixed pairs", "eval/rm_accuracy")):
            assert f"{name} {metrics[metric].dropna().iloc[-1]:.2f}" in svg
        assert "Mean reward of the batch" in svg and "kept share 1.00" in svg


def test_the_picture_of_a_run_that_measures_little_is_drawn():
    ElementTree.fromstring(live.draw([{"step": 0}], 10))
    ElementTree.fromstring(live.draw([{"step": s, "reward/mean": 1.0, "eval/gold": math.nan} for s in (0, 1)], 10))
