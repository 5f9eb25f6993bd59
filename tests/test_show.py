"""What a browser shows: text of models is text, cards, drawings, and the page of a notebook, which loads nothing."""

import html
import re

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from savelib.analysis import worst_mistakes
from savelib.show.cards import cards
from savelib.show.html import folded, listing, table
from savelib.show.page import export
from savelib.show.svg import Chart, ticks
from savelib.show.text import escaped

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
    for markup in (table(frame).data, folded(NASTY, frame).data, cards(samples(prompt=NASTY, response=NASTY)).data):
        assert "<script" not in markup and 'example.org/x.png"' not in markup and "$" not in markup
        assert "alert(1)" in shown(markup)
    assert len(shown(table(pd.DataFrame({"a": ["long " * 100]})).data)) > 500, "nothing is cut"


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
