"""Text of models, shown as text: nothing in it is taken for HTML, markdown, mathematics or a terminal's command."""

from __future__ import annotations

import html
import unicodedata

MARKS = "$\\*_`~[]#|"  # what markdown or MathJax may read


def escaped(text: str, svg: bool = False) -> str:
    """HTML (or the text of an SVG element) that shows the text as it is, between any two tags.

    Characters that are not printable become signs: ESC is U+241B, others are written as (U+202E); lines and tabs stay.
    Each character of MARKS stands in an element of its own, so that no formula or emphasis reaches over it.
    """
    element = "tspan" if svg else "span"
    return "".join(f"<{element}>&#{ord(c)};</{element}>" if c in MARKS else html.escape(c) for c in visible(text))


def visible(text: str) -> str:
    """The text with a sign for each character that is not printable."""
    return "".join(c if c in "\n\t" or c.isprintable() else _sign(c) for c in text)


def _sign(c: str) -> str:
    if ord(c) < 32:
        return chr(0x2400 + ord(c))
    return "\u2421" if c == "\x7f" else " " if unicodedata.category(c) == "Zs" else f"(U+{ord(c):04X})"
