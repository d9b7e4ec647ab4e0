"""Line charts as SVG: a panel for each group of lines, with whiskers, one legend below all.

write_chart(Path("x.svg"), [Panel("E2E", {"split": [Point("1", 2.5, 2.4, 2.6), ...]}, "held-out loss")])
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

COLOURS = ("#222222", "#d95f02", "#1b6ca8", "#2e9e5b", "#8e44ad", "#b8860b")
WIDTH, HEIGHT, LEFT, TOP, LOW = 380, 300, 58, 34, 44  # of a panel, and its margins
TICKS = 5
OFFSET = 5  # between the lines at one mark of the axis below, so that whiskers do not hide one another


class Point(NamedTuple):
    """At a mark of the axis below: the value, and where its whisker begins and ends."""

    at: str
    value: float
    low: float
    high: float


class Panel(NamedTuple):
    """A title, lines by name, and what the axes are."""

    title: str
    lines: Mapping[str, Sequence[Point]]
    below: str
    beside: str


def write_chart(file: Path, panels: Sequence[Panel]) -> None:
    """Write all panels side by side."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    width, height = WIDTH * len(panels), HEIGHT + 30
    parts = [part for number, panel in enumerate(panels) for part in drawn(panel, number * WIDTH, names)]
    for number, name in enumerate(names):
        x, y = LEFT + number * 130, HEIGHT + 12
        parts += [line(x, y, x + 20, y, COLOURS[number], 2.0), text(x + 26, y + 4, name, "start")]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
    body = [f'{head}font-size="11">', f'<rect width="{width}" height="{height}" fill="white"/>', *parts, "</svg>"]
    file.write_text("\n".join(body) + "\n", encoding="utf-8")


def drawn(panel: Panel, shift: float, names: Sequence[str]) -> Iterator[str]:
    """One panel, `shift` to the right."""
    points = [point for one in panel.lines.values() for point in one]
    marks = list(dict.fromkeys(point.at for point in points))
    low, high = min(p.low for p in points), max(p.high for p in points)
    margin = 0.06 * (high - low) or 0.1
    low, high = low - margin, high + margin
    left, right, bottom = shift + LEFT, shift + WIDTH - 14, HEIGHT - LOW

    def across(mark: str, name: str) -> float:
        place = left + (marks.index(mark) + 0.5) * (right - left) / len(marks)
        return place + OFFSET * (names.index(name) - (len(names) - 1) / 2)

    def up(value: float) -> float:
        return bottom - (value - low) / (high - low) * (bottom - TOP)

    yield text((left + right) / 2, TOP - 14, panel.title, "middle", bold=True)
    for number in range(TICKS):
        value = low + (high - low) * number / (TICKS - 1)
        yield line(left, up(value), right, up(value), "#dddddd")
        yield text(left - 6, up(value) + 4, f"{value:.2f}", "end")
    for mark in marks:
        middle = left + (marks.index(mark) + 0.5) * (right - left) / len(marks)
        yield text(middle, bottom + 16, mark, "middle")
    yield text((left + right) / 2, bottom + 34, panel.below, "middle")
    yield text(left - 40, TOP - 14, panel.beside, "start")
    for name, each in panel.lines.items():
        colour = COLOURS[names.index(name)]
        places = [(across(p.at, name), up(p.value)) for p in each]
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        yield f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="1.6"/>'
        for (x, y), p in zip(places, each, strict=True):
            yield line(x, up(p.low), x, up(p.high), colour)
            yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>'


def line(x: float, y: float, to_x: float, to_y: float, colour: str, width: float = 1.0) -> str:
    ends = f'x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width:.1f}"/>'


def text(x: float, y: float, words: str, anchor: str, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{weight}>{escape(words)}</text>'
