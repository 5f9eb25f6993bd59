"""Small drawings as SVG: data axes, lines, dots, bars, arrows. An `image` of one loads nothing and runs nothing."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Iterable, Sequence

from savelib.show.text import escaped

Range = tuple[float, float]


class Chart:
    """A drawing with linear axes, in pixels; what is added later lies on top.

    margin: pixels left, right, above and below of the field that x and y span.
    """

    def __init__(self, width: int, height: int, x: Range, y: Range, margin: Sequence[int] = (46, 12, 26, 34)):
        self.width, self.height, self.x_range, self.y_range = width, height, x, y
        self.left, self.right, self.top, self.bottom = margin
        self.parts: list[str] = []

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + (self.width - self.left - self.right) * (value - low) / ((high - low) or 1)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.height - self.bottom - (self.height - self.top - self.bottom) * (value - low) / ((high - low) or 1)

    def axes(self, title: str = "", xlabel: str = "", ylabel: str = "", y_ticks: bool = True) -> Chart:
        """The frame: title above, ticks with light lines, names of the axes."""
        left, base, end = self.left, self.height - self.bottom, self.width - self.right
        self.write(left, 15, title, anchor="start", size=14, weight="bold")
        for tick in ticks(*self.x_range):
            self._line(self.x(tick), self.top, self.x(tick), base, "#e6e6e6")
            self.write(self.x(tick), base + 13, f"{tick:g}")
        for tick in ticks(*self.y_range) if y_ticks else ():
            self._line(left, self.y(tick), end, self.y(tick), "#e6e6e6")
            self.write(left - 5, self.y(tick) + 4, f"{tick:g}", anchor="end")
        self._line(left, base, end, base, "#888888")
        self.write((left + end) / 2, base + 28, xlabel)
        if ylabel:
            at = f'transform="rotate(-90 12 {(self.top + base) / 2:.1f})"'
            self.write(12, (self.top + base) / 2, ylabel, more=at)
        return self

    def line(self, points: Iterable[tuple[float, float]], colour: str, width: float = 2, dash: str = "") -> Chart:
        path = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"{dashed}/>')
        return self

    def dot(self, x: float, y: float, colour: str, radius: float = 4, cross: bool = False) -> Chart:
        """A filled circle, or a cross."""
        px, py, r = self.x(x), self.y(y), radius
        if cross:
            self._line(px - r, py - r, px + r, py + r, colour, 2)
            self._line(px - r, py + r, px + r, py - r, colour, 2)
        else:
            self.parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="{r}" fill="{colour}"/>')
        return self

    def bar(self, x: Range, y: Range, colour: str, opacity: float = 1) -> Chart:
        """A filled rectangle over the ranges x and y."""
        (x0, x1), (y1, y0) = sorted(map(self.x, x)), sorted(map(self.y, y), reverse=True)
        size = f'x="{x0:.1f}" y="{y0:.1f}" width="{x1 - x0:.1f}" height="{y1 - y0:.1f}"'
        self.parts.append(f'<rect {size} fill="{colour}" fill-opacity="{opacity}"/>')
        return self

    def arrow(self, x0: float, x1: float, y: float, colour: str) -> Chart:
        """A horizontal arrow from x0 to x1."""
        start, end, py = self.x(x0), self.x(x1), self.y(y)
        head = math.copysign(min(6, abs(end - start)), end - start)
        self._line(start, py, end - head, py, colour, 2.5)
        tip = f"{end:.1f},{py:.1f} {end - head:.1f},{py - 4:.1f} {end - head:.1f},{py + 4:.1f}"
        self.parts.append(f'<polygon points="{tip}" fill="{colour}"/>')
        return self

    def text(self, x: float, y: float, text: str, shift: tuple[float, float] = (0, 0), **style: object) -> Chart:
        """Text at a place of the data, moved by pixels to the right and down; style as in `write`."""
        return self.write(self.x(x) + shift[0], self.y(y) + shift[1], text, **style)

    def write(
        self, x: float, y: float, text: str, *, anchor: str = "middle", size: float = 12, colour: str = "#333333",
        weight: str = "normal", more: str = "",
    ) -> Chart:  # fmt: skip
        """Text at a pixel; it may come from a model."""
        style = f'text-anchor="{anchor}" font-size="{size:g}" fill="{colour}" font-weight="{weight}" {more}'
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escaped(text, svg=True)}</text>')
        return self

    def _line(self, x0: float, y0: float, x1: float, y1: float, colour: str, width: float = 1) -> None:
        ends = f'x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"'
        self.parts.append(f'<line {ends} stroke="{colour}" stroke-width="{width}"/>')

    def svg(self) -> str:
        size = f'width="{self.width}" height="{self.height}" viewBox="0 0 {self.width} {self.height}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">'
        return head + '<rect width="100%" height="100%" fill="white"/>' + "".join(self.parts) + "</svg>"


def beside(*charts: Chart) -> Chart:
    """Several drawings in a row, as one."""
    row = Chart(sum(c.width for c in charts), max(c.height for c in charts), (0, 1), (0, 1))
    at = 0
    for chart in charts:
        row.parts.append(f'<g transform="translate({at} 0)">{"".join(chart.parts)}</g>')
        at += chart.width
    return row


def image(svg: str, alt: str) -> str:
    """An <img> that holds the drawing: nothing in it can run, and no style reaches in or out."""
    data = base64.b64encode(svg.encode()).decode()
    return f'<img alt="{html.escape(alt)}" style="max-width:100%" src="data:image/svg+xml;base64,{data}">'


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from low to high, at most `most`."""
    if not high > low:
        return [low]
    rough = (high - low) / (most - 1)
    power = 10 ** math.floor(math.log10(rough))
    step = next(k * power for k in (1, 2, 2.5, 5, 10) if k * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 10) for k in range(first, math.floor(high / step + 1e-9) + 1)]
