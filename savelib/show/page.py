"""A notebook as one HTML page that needs no network: formulas are MathML, nothing is loaded from elsewhere."""

from __future__ import annotations

from pathlib import Path

from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath


def export(notebook: Path) -> Path:
    """Write the page of an .ipynb file beside it and return its path."""
    page, _ = HTMLExporter(**OPTIONS).from_filename(str(notebook))
    path = notebook.with_suffix(".html")
    path.write_text(page, encoding="utf-8")
    return path


def markdown(source: str) -> str:
    """HTML of a markdown cell."""
    return MarkdownWithMath(renderer=_Renderer(escape=False, exclude_anchor_links=True)).render(source)


class _Renderer(IPythonRenderer):
    """nbconvert's own, with formulas as MathML."""

    def inline_math(self, body: str) -> str:
        return _typeset(body, "inline")

    def block_math(self, body: str) -> str:
        return _typeset(body, "block")

    def latex_environment(self, name: str, body: str) -> str:
        return _typeset(f"\\begin{{{name}}}{body}\\end{{{name}}}", "block")


SPACES = {  # what latex2mathml writes -> the same with the spaces that TeX has
    '<mo stretchy="false">&#x0007C;</mo>': '<mo stretchy="false" lspace="0" rspace="0">|</mo>',
    "<mi>:</mi>": "<mo>:</mo>",
} | {f"<mi>{name}</mi>": f'<mo lspace="0" rspace="0.17em">{name}</mo>' for name in ("log", "ln", "exp")}


def _typeset(formula: str, display: str) -> str:
    made = convert(formula, display=display)
    for written, spaced in SPACES.items():
        made = made.replace(written, spaced)
    return made


OPTIONS = {  # of nbconvert's HTMLExporter, here and in notebooks/jupyter_nbconvert_config.py
    "template_name": "offline",  # the folder of this name beside this file
    "extra_template_basedirs": [str(Path(__file__).parent)],
    "filters": {"markdown2html": markdown},
    "preprocessors": ["nbconvert.preprocessors.CoalesceStreamsPreprocessor"],  # lines printed one by one are one output
}
