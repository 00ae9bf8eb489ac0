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
    if isinstance(value, Html):
        return tag("td", value)
    shown = "-" if value is None else value if column.digits is None else f"{value:.{column.digits}f}"
    missing = "-1e9" if column.number else ""
    return tag("td", shown, class_="number" if column.number else None, data_value=missing if value is None else value)


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
        tone: "good", "warn" or "accent".
        dashed: For bounds.
    """

    name: str
    points: Sequence[tuple[float, float]]
    tone: str = "accent"
    dashed: bool = False


def line_chart(
    lines: Sequence[Line],
    *,
    x: str,
    y: str,
    mark: tuple[float, str] | None = None,
    percent: bool = True,
    description: str = "",
) -> Html:
    """Lines over one scale, drawn as SVG with a legend.

    Args:
        lines: At least one point among them.
        x: Under the chart.
        y: Above the axis.
        mark: A value of x with its name, drawn as an upright line.
        percent: Whether y is a share, shown as percent.
        description: For those who cannot see it.
    """
    points = [point for line in lines for point in line.points]
    if not points:
        raise ValueError("line_chart needs at least one point, got none.")
    across = [point[0] for point in points] + ([] if mark is None else [mark[0]])
    low, high, steps = nice_scale(min(across), max(across))
    floor, top, rungs = nice_scale(min(0.0, *(point[1] for point in points)), max(point[1] for point in points))

    def place(value: tuple[float, float]) -> tuple[float, float]:
        width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
        return LEFT + width * (value[0] - low) / (high - low), TOP + height * (1 - (value[1] - floor) / (top - floor))

    ladder = [
        joined(
            tag(
                "line",
                x1=LEFT,
                x2=WIDTH - RIGHT,
                y1=f"{place((low, rung))[1]:.1f}",
                y2=f"{place((low, rung))[1]:.1f}",
                class_="axis",
            ),
            tag("text", _tick(rung, percent), x=LEFT - 8, y=f"{place((low, rung))[1] + 4:.1f}", text_anchor="end"),
        )
        for rung in rungs
    ]
    ticks = [
        tag(
            "text", _tick(step, False), x=f"{place((step, floor))[0]:.1f}", y=HEIGHT - BOTTOM + 22, text_anchor="middle"
        )
        for step in steps
    ]
    paths = [
        tag("path", d=_path([place(point) for point in line.points]), class_=_tone(line))
        for line in lines
        if line.points
    ]
    marked = None
    if mark is not None:
        where = place((mark[0], floor))[0]
        left = where > (LEFT + WIDTH) / 2
        marked = joined(
            tag("line", x1=f"{where:.1f}", x2=f"{where:.1f}", y1=TOP, y2=HEIGHT - BOTTOM, class_="mark"),
            tag(
                "text",
                mark[1],
                x=f"{where + (-6 if left else 6):.1f}",
                y=TOP + 11,
                text_anchor="end" if left else "start",
                class_="mark-text",
            ),
        )
    drawing = tag(
        "svg",
        tag("title", description) if description else None,
        ladder,
        ticks,
        tag("text", x, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 8, text_anchor="middle"),
        paths,
        marked,
        class_="chart",
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=description or y,
    )
    legend = [
        tag(
            "li",
            tag(
                "svg", tag("line", x1=0, x2=22, y1=4, y2=4, class_=_tone(line)), viewBox="0 0 22 8", aria_hidden="true"
            ),
            line.name,
        )
        for line in lines
    ]
    return joined(drawing, tag("ul", legend, class_="legend"))


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
