"""Pieces of a notebook as HTML: tables of models' text, what unfolds, listings of our own source."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd
from IPython.display import HTML
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexer import Lexer
from pygments.lexers import PythonLexer

from savelib.show.text import escaped

ROOT = Path(__file__).resolve().parent.parent.parent


def table(frame: pd.DataFrame) -> HTML:
    """A table whose texts come from models or files: every text is shown as it is, from the left."""
    texts = {name for name, kind in frame.dtypes.items() if not pd.api.types.is_numeric_dtype(kind)}
    shown = frame.rename(index=_text, columns=lambda name: _left(_text(name)) if name in texts else _text(name))
    shown = shown.map(lambda value: _left(_text(value)))
    with pd.option_context("display.max_colwidth", None, "display.max_rows", None, "display.max_columns", None):
        return HTML(f'<div style="overflow-x:auto">{shown.to_html(escape=False)}</div>')


def bullets(sentences: Iterable[str]) -> HTML:
    """Sentences as a list."""
    return HTML(f"<ul>{''.join(f'<li>{escaped(sentence)}</li>' for sentence in sentences)}</ul>")


def folded(title: str, *parts: pd.DataFrame | HTML, open: bool = False) -> HTML:
    """Tables or HTML that unfold at a click on the title."""
    inside = "".join(part.data if isinstance(part, HTML) else table(part).data for part in parts)
    return HTML(f"<details{' open' * open}><summary>{escaped(title)}</summary>{inside}</details>")


def listing(thing: Callable, open: bool = False) -> HTML:
    """The source of a function or class as it runs, with the place of its file; it unfolds at a click."""
    thing = inspect.unwrap(thing)  # a decorated function is in its own file
    file = Path(inspect.getsourcefile(thing)).resolve()
    place = file.relative_to(ROOT) if file.is_relative_to(ROOT) else file.name
    return folded(f"{thing.__name__}, from {place}", coloured(inspect.getsource(thing), PythonLexer()), open=open)


def coloured(code: str, lexer: Lexer) -> HTML:
    """Code with its colours in the tags: a page's or a front end's style sheet is not needed."""
    lines = highlight(code, lexer, HtmlFormatter(noclasses=True, nobackground=True))
    return HTML(f'<div style="overflow-x:auto">{lines}</div>')


def _text(value: object) -> object:
    """Numbers stay as they are, so that pandas formats them; all else is text."""
    return value if pd.api.types.is_number(value) else escaped(str(value))


def _left(value: object) -> object:
    """A text from the left, at least 14 characters wide: a narrow page scrolls before each word has its own line."""
    if not isinstance(value, str):
        return value
    return f'<div style="text-align:left;min-width:{min(len(value), 14)}ch">{value}</div>'
