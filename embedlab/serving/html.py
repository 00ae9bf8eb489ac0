"""Pieces of reports: one HTML file that asks nobody for anything, escapes what it is given and prints well.

Every piece returns `Html`; text of any other kind is escaped where it goes in, so that no label becomes markup.
"""

from __future__ import annotations

import base64
import hashlib
import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VOID = frozenset({"br", "img", "input", "meta"})
WIDTH, HEIGHT = 640, 300  # units of a chart
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 16, 56  # margins of its frame
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def tag(name: str, /, *content: Any, **attributes: Any) -> Html:
    """One element; content and attributes are escaped unless they are `Html`.

    Args:
        name: Of the element.
        content: Texts, numbers, `Html`, or lists of them; None is left out.
        attributes: `class_` stands for class, `data_name` for data-name; None and False are left out.

    Example:
        >>> tag("p", "a < b", tag("b", 1), class_="quiet")
        '<p class="quiet">a &lt; b<b>1</b></p>'
    """
    named = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{html.escape(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    inner = joined(*content)
    return Html(f"<{name}{named}>" if name in VOID and not inner else f"<{name}{named}>{inner}</{name}>")


def joined(*content: Any) -> Html:
    """Pieces one after another, escaped unless they are `Html`."""
    parts: list[str] = []
    for piece in content:
        if isinstance(piece, Html):
            parts.append(piece)
        elif isinstance(piece, list | tuple):
            parts.append(joined(*piece))
        elif piece is not None:
            parts.append(html.escape(str(piece)))
    return Html("".join(parts))


def page(title: str, *content: Any) -> str:
    """A whole document; its content security policy lets it load nothing and run nothing but its own script."""
    style, script = (Path(__file__).with_name(f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Html(style)),
    )
    body = tag("body", *content, tag("script", Html(script)))
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def section(title: str, *content: Any, name: str | None = None) -> Html:
    """A card with a heading; `name` is what a link points at."""
    return tag("section", tag("h2", title), *content, class_="card", id=name)


def figures(pairs: Sequence[tuple[Any, str]]) -> Html:
    """Large figures with what they are."""
    return tag(
        "div",
        [tag("div", tag("b", value), tag("span", what), class_="figure") for value, what in pairs],
        class_="figures",
    )


@dataclass(frozen=True)
class Column:
    """A column of a `table`.

    Args:
        title: Over it.
        number: Whether it holds numbers: to the right, and sorted as such.
        digits: Behind the point; None shows a number as it is.
    """

    title: str
    number: bool = False
    digits: int | None = None


def table(columns: Sequence[Column], rows: Sequence[Sequence[Any]]) -> Html:
    """Rows of cells; those of `Html`, such as pictures, are not sorted by."""
    cells = [[_cell(column, value) for column, value in zip(columns, row, strict=True)] for row in rows]
    kinds = [
        None if any(isinstance(row[place], Html) for row in rows) else "number" if column.number else "text"
        for place, column in enumerate(columns)
    ]
    head = [
        tag("th", column.title, scope="col", data_sort=kind, class_="number" if column.number else None)
        for column, kind in zip(columns, kinds, strict=True)
    ]
    body = tag("tbody", [tag("tr", row) for row in cells])
    return tag("div", tag("table", tag("thead", tag("tr", head)), body), class_="scroll", tabindex=0)


def _cell(column: Column, value: Any) -> Html:
    aligned = "number" if column.number else None
    if isinstance(value, Html):
        return tag("td", value, class_=aligned)
    shown = "-" if value is None else value if column.digits is None else f"{value:.{column.digits}f}"
    missing = "-1e9" if column.number else ""
    return tag("td", shown, class_=aligned, data_value=missing if value is None else value)


def picture(content: bytes | None, label: str, *, title: str | None = None) -> Html:
    """A JPEG or PNG as a tile; without one, a neutral tile with the first letter of the label."""
    if content is None:
        return tag("span", label[:1].upper(), class_="picture", title=title or label, aria_hidden="true")
    kind = "png" if content.startswith(b"\x89PNG") else "jpeg"
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return tag("span", tag("img", src=source, alt=title or label, title=title or label), class_="picture")


def strip(pictures: Sequence[Html]) -> Html:
    """Pictures side by side."""
    return tag("div", list(pictures), class_="strip")


@dataclass(frozen=True)
class Line:
    """A line of a `line_chart`.

    Args:
        name: In the legend.
        points: (x, y), in the order in which they are joined.
        tone: "good", "warn", "bad" or "accent".
        dashed: For bounds.
        filled: Down to the bottom, for distributions.
        band: (x, low, high), an area around the line, such as its interval.
        dots: Whether points are marked: for few of them, between which nothing was measured.
    """

    name: str
    points: Sequence[tuple[float, float]]
    tone: str = "accent"
    dashed: bool = False
    filled: bool = False
    band: Sequence[tuple[float, float, float]] = ()
    dots: bool = False


@dataclass(frozen=True)
class Axis:
    """An axis of a `line_chart`.

    Args:
        title: Beside it.
        percent: Whether values are shares, shown as percent; not with `log`.
        log: Powers of ten instead of even steps; values that are not above 0 are left out.
        low: Where it starts at the latest; None starts at the lowest value.
        exact: Starts and ends with the values instead of on round numbers.
        values: Whether numbers stand at the steps.
    """

    title: str
    percent: bool = False
    log: bool = False
    low: float | None = None
    exact: bool = False
    values: bool = True


class _Scale:
    """From values of an axis to a share of its length."""

    def __init__(self, axis: Axis, values: Sequence[float]) -> None:
        self.axis = axis
        if axis.log:
            positive = [value for value in values if value > 0] or [0.1]
            self.low = float(math.floor(math.log10(min(positive)) + 1e-9))
            self.high = max(self.low + 1, float(math.ceil(math.log10(max(positive)) - 1e-9)))
            every = math.ceil((self.high - self.low) / 5)
            self.steps = [10.0**power for power in range(int(self.high), int(self.low) - 1, -every)]
        else:
            lowest = min(values) if axis.low is None else min(axis.low, *values)
            alike = axis.percent and max(values) <= lowest
            self.low, self.high, self.steps = nice_scale(*((0.0, 1.0) if alike else (lowest, max(values))))
            if axis.exact and max(values) > lowest:
                self.low, self.high = lowest, max(values)
                self.steps = [step for step in self.steps if self.low <= step <= self.high]

    def shows(self, value: float) -> bool:
        return not self.axis.log or value > 0

    def share(self, value: float) -> float:
        place = math.log10(value) if self.axis.log else value
        return (place - self.low) / (self.high - self.low)

    def label(self, step: float) -> str:
        if not self.axis.values:
            return ""
        if self.axis.log:
            return "1" if step == 1 else "10" + str(round(math.log10(step))).translate(_RAISED)
        return _tick(step, self.axis.percent)


class _Frame:
    """Where values lie in a chart whose scales hold all points of some lines, and the mark."""

    def __init__(self, lines: Sequence[Line], across: Axis, up: Axis, mark: float | None, wide: int) -> None:
        points = [point for line in lines for point in (*line.points, *((p[0], h) for p in line.band for h in p[1:]))]
        if not points:
            raise ValueError("line_chart needs at least one point, got none.")
        self.across = _Scale(across, [point[0] for point in points] + ([] if mark is None else [mark]))
        self.up = _Scale(up, [point[1] for point in points])
        self.wide = wide

    def x(self, value: float) -> float:
        return LEFT + (self.wide - LEFT - RIGHT) * self.across.share(value)

    def y(self, value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - self.up.share(value))

    def places(self, points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        """Those that can be shown."""
        return [(self.x(x), self.y(y)) for x, y in points if self.across.shows(x) and self.up.shows(y)]

    def steps(self) -> list[Html]:
        """Lines across with their values, and the values below."""
        ladder = [
            joined(
                tag("line", x1=LEFT, x2=self.wide - RIGHT, y1=_units(level), y2=_units(level), class_="axis"),
                tag("text", self.up.label(rung), x=LEFT - 8, y=_units(level + 4), text_anchor="end"),
            )
            for rung in self.up.steps
            for level in [self.y(rung)]
        ]
        return ladder + [
            tag("text", self.across.label(step), x=_units(self.x(step)), y=HEIGHT - BOTTOM + 22, text_anchor="middle")
            for step in self.across.steps
        ]

    def draw(self, line: Line) -> list[Html]:
        """Its band, the area under it, itself and its dots."""
        drawn, there = [], self.places(line.points)
        edge = self.places([(p[0], p[2]) for p in line.band]) + self.places([(p[0], p[1]) for p in line.band])[::-1]
        if edge:
            drawn.append(tag("path", d=_path(edge) + "Z", class_=f"area tone-{line.tone}"))
        if line.filled and there:
            bottom = float(HEIGHT - BOTTOM)
            area = [(there[0][0], bottom), *there, (there[-1][0], bottom)]
            drawn.append(tag("path", d=_path(area) + "Z", class_=f"area tone-{line.tone}"))
        if there:
            drawn.append(tag("path", d=_path(there), class_=_tone(line)))
        if line.dots or len(there) == 1:  # a path through one point shows nothing
            drawn += [tag("circle", cx=_units(x), cy=_units(y), r=4, class_=f"dot tone-{line.tone}") for x, y in there]
        return drawn


def line_chart(
    lines: Sequence[Line],
    *,
    x: str | Axis,
    y: str | Axis,
    mark: tuple[float, str] | None = None,
    percent: bool = True,
    description: str = "",
    narrow: bool = False,
) -> Html:
    """Lines over one scale, drawn as SVG with a legend.

    Args:
        lines: At least one point among them.
        x: Under the chart.
        y: Above the axis; a title alone means an axis that starts at 0 at the latest.
        mark: A value of x with its name, drawn as an upright line.
        percent: Whether y, if it is a title, is a share, shown as percent.
        description: For those who cannot see it.
        narrow: For two charts side by side.

    Raises:
        ValueError: No point at all.
    """
    across = x if isinstance(x, Axis) else Axis(x)
    up = y if isinstance(y, Axis) else Axis(y, percent=percent, low=0.0)
    wide = 460 if narrow else WIDTH
    frame = _Frame(lines, across, up, None if mark is None else mark[0], wide)
    drawing = tag(
        "svg",
        tag("title", description) if description else None,
        frame.steps(),
        tag("text", across.title, x=(LEFT + wide - RIGHT) / 2, y=HEIGHT - 8, text_anchor="middle"),
        [frame.draw(line) for line in lines],
        None if mark is None else _mark(frame.x(mark[0]), mark[1], (LEFT + wide) / 2),
        class_="chart narrow" if narrow else "chart",
        viewBox=f"0 0 {wide} {HEIGHT}",
        role="img",
        aria_label=description or up.title,
    )
    title = tag("div", up.title, class_="chart-title") if isinstance(y, Axis) else None
    return tag("div", title, drawing, _legend(lines), class_="drawing")


def _legend(lines: Sequence[Line]) -> Html:
    entries = [
        tag(
            "li",
            tag(
                "svg", tag("line", x1=0, x2=22, y1=4, y2=4, class_=_tone(line)), viewBox="0 0 22 8", aria_hidden="true"
            ),
            line.name,
        )
        for line in lines
    ]
    return tag("ul", entries, class_="legend")


def _mark(where: float, text: str, middle: float) -> Html:
    left = where > middle
    return joined(
        tag("line", x1=_units(where), x2=_units(where), y1=TOP, y2=HEIGHT - BOTTOM, class_="mark"),
        tag(
            "text",
            text,
            x=_units(where + (-6 if left else 6)),
            y=TOP + 11,
            text_anchor="end" if left else "start",
            class_="mark-text",
        ),
    )


def _units(length: float) -> str:
    return f"{length:.1f}"


def nice_scale(low: float, high: float, *, steps: int = 5) -> tuple[float, float, list[float]]:
    """A range that ends on round numbers, with about so many of them.

    Example:
        >>> nice_scale(0.13, 0.92)
        (0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    """
    if high <= low:
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / steps
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    values = [round(number * step, 12) for number in range(first, last + 1)]
    return values[0], values[-1], values


def _tick(value: float, percent: bool) -> str:
    return f"{100 * value:.4g}%" if percent else f"{value:.4g}"


def _tone(line: Line) -> str:
    return f"tone-{line.tone}" + (" dashed" if line.dashed else "")


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{across:.1f} {down:.1f}" for across, down in points)
