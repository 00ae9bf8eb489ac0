"""The pictures in the report of `embedlab evaluate`: examples, confusions, the map."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

from embedlab.data.images import ImageError
from embedlab.retrieval.evaluation import Evaluation
from embedlab.retrieval.findings import Confusion, Example, confusions, example, examples, sampled_rows
from embedlab.retrieval.pictures import thumbnail
from embedlab.retrieval.subjects import Reading
from embedlab.serving.html import Html, joined, picture, section, tag
from embedlab.serving.report import file_picture

MAP_POINTS = 800  # images on the map
MAP_SIDE = 64  # pixels of their thumbnails
SIDE = 112  # pixels of the others
EXAMPLES = 6  # queries of a kind
DIFFERENCES = 4  # queries on which two encoders differ, of a kind
CONFUSIONS = 12  # pairs of classes with pictures
HUES = 10  # colours of the map


def row_picture(side: Reading, row: int, *, size: int = SIDE) -> bytes | None:
    """A small JPEG of one row; None where its pixels are nowhere to be found."""
    if side.source is None:
        paths = side.embeddings.paths
        return None if paths is None else file_picture(paths[row], side=size)
    try:
        return thumbnail(side.source.image(int(side.embeddings.ids[row])), side=size)
    except (ImageError, OSError):
        return None


def _framed(side: Reading, row: int, label: str, tone: str, caption: Sequence[Any]) -> Html:
    return tag(
        "figure",
        picture(row_picture(side, row), label),
        tag("figcaption", [tag("span", line) for line in caption]),
        class_=f"shot {tone}",
    )


def _example(found: Evaluation, one: Example, name: str | None = None) -> Html:
    label = found.labels[one.query]
    shots = [
        _framed(
            found.searched,
            row,
            found.searched_labels[row],
            "right" if right else "wrong",
            (found.searched_labels[row], f"{'✓' if right else '✗'} {cosine:.3f}"),
        )
        for row, cosine, right in zip(one.nearest, one.cosines, one.right, strict=True)
    ]
    if one.own is not None:
        row, cosine = one.own
        shots.append(_framed(found.searched, row, label, "own", ("its own nearest", f"{cosine:.3f}")))
    return tag(
        "div",
        _framed(found.query, one.query, label, "query", (label, name or "query")),
        tag("div", shots, class_="shots"),
        class_="example",
    )


def examples_section(found: Evaluation) -> Html:
    """The worst mistakes, queries that are right further down, and some that are right."""
    chosen = examples(found, each=EXAMPLES, seed=found.plan.seed)
    depth = found.nearest.shape[1]
    kinds = {
        "worst": ("Worst mistakes", "The nearest is wrong, and much nearer than the nearest of the right class."),
        "late": (
            "Right, but late",
            f"The nearest is wrong, and one of the {depth} nearest right; drawn by seed {found.plan.seed}.",
        ),
        "right": ("Right", f"The nearest is of the class; drawn by seed {found.plan.seed}."),
    }
    parts = []
    for kind, (title, words) in kinds.items():
        rows = chosen[kind]
        parts += [tag("h3", title, class_="sub"), tag("p", words if rows else "None.", class_="quiet")]
        parts += [_example(found, one) for one in rows]
    return section(
        "Examples",
        tag(
            "p",
            f"A query, its {depth} nearest and their cosines"
            + (f", by {found.name}." if found.name not in ("encoder", "vectors") else "."),
            class_="quiet",
        ),
        parts,
        name="examples",
    )


def disagreements_section(first: Evaluation, second: Evaluation) -> Html:
    """Queries that one gets right at rank 1 and the other wrong."""
    ours, theirs = (one.per_query["recall_at_1"] for one in (first, second))
    parts = []
    for better, worse, rows in (
        (first, second, np.flatnonzero((ours == 1) & (theirs == 0))),
        (second, first, np.flatnonzero((ours == 0) & (theirs == 1))),
    ):
        parts.append(tag("h3", f"Right by {better.name}, wrong by {worse.name}: {len(rows):,} queries", class_="sub"))
        shown = rows[list(sampled_rows(len(rows), DIFFERENCES, seed=first.plan.seed))].tolist()
        parts += [tag("div", [_one(side, row) for side in (first, second)], class_="versus") for row in shown]
    return section(
        "Where they differ",
        tag(
            "p",
            f"At most {DIFFERENCES} queries of a kind, drawn by seed {first.plan.seed}; each as seen by both.",
            class_="quiet",
        ),
        parts,
        name="differ",
    )


def _one(found: Evaluation, row: int) -> Html:
    return _example(found, example(found, row), found.name)


def confusions_section(found: Evaluation) -> Html:
    """The most frequent confusions of classes."""
    every = confusions(found, most=10**6)
    wrong = sum(row.times for row in every)
    shown = every[:CONFUSIONS]
    coarse = found.figures.get("coarse")
    near = (
        ""
        if coarse is None or coarse["near_misses"] is None
        else (f" {coarse['near_misses']:.1%} of the mistakes stay in the right {coarse['column']} class: near misses.")
    )
    return section(
        "Confusions",
        tag(
            "p",
            f"{wrong:,} {'query lies' if wrong == 1 else 'queries lie'} nearest to another class, in {len(every):,} "
            f"pairs of classes; the {len(shown)} most frequent, each with its nearest pair of images.{near}"
            if every
            else "No query lies nearest to another class.",
            class_="quiet",
        ),
        tag("div", [_confusion(found, row) for row in shown], class_="pairs two") if shown else None,
        name="confusions",
    )


def _confusion(found: Evaluation, row: Confusion) -> Html:
    badge = None
    if row.coarse_right is not None:
        badge = tag(
            "span", "near" if row.coarse_right else "far", class_=f"badge {'good' if row.coarse_right else 'warn'}"
        )
    return tag(
        "div",
        tag(
            "div",
            picture(row_picture(found.query, row.query), row.label),
            tag("h3", row.label),
            tag("span", f"{row.times} of {row.queries} queries", class_="quiet"),
        ),
        tag(
            "div",
            tag("b", f"{row.share:.0%}"),
            f"cosine {row.cosine:.3f}",
            [" ", badge] if badge else None,
            class_="between",
        ),
        tag(
            "div",
            picture(row_picture(found.searched, row.nearest), row.taken_for),
            tag("h3", row.taken_for),
            tag(
                "span",
                "never taken back"
                if not row.back
                else "taken back once"
                if row.back == 1
                else f"taken back {row.back} times",
                class_="quiet",
            ),
        ),
        class_="pair",
    )


def map_section(found: Sequence[Evaluation]) -> Html:
    """All queries, or as many as it holds, in the plane, once for each evaluation."""
    first = found[0]
    rows = list(sampled_rows(len(first.query.embeddings), MAP_POINTS, seed=first.plan.seed))
    pictures = [row_picture(first.query, row, size=MAP_SIDE) for row in rows]
    names, codes = np.unique(np.array([first.labels[row] for row in rows], dtype=object), return_inverse=True)
    few = len(names) <= HUES
    legend = (
        [tag("li", tag("span", class_=f"dot hue-{number}"), name) for number, name in enumerate(names.tolist())]
        if few
        else []
    )
    wrong = tag("li", tag("span", class_="dot wrong"), "nearest is wrong")
    total = len(first.query.embeddings)
    kept = sum(content is not None for content in pictures)
    return section(
        "Map",
        tag(
            "p",
            f"{'All' if len(rows) == total else f'{len(rows):,} of'} {total:,} images by t-SNE of their cosines (seed "
            f"{first.plan.seed}); near on the map is near in the embedding, far means little. "
            + ("Colours are classes. " if few else f"Colours are classes, {HUES} for {len(names):,} of them. ")
            + "Point at an image to see it, or walk with the arrow keys.",
            class_="quiet",
        ),
        tag("p", "The images' files are not here, so that there are no pictures.", class_="quiet")
        if not kept
        else None,
        [
            joined(
                tag("h3", one.name, class_="sub") if len(found) > 1 else None,
                _points(one, rows, codes.tolist(), pictures if number == 0 else None),
            )
            for number, one in enumerate(found)
        ],
        tag("ul", [*legend, wrong], class_="legend"),
        name="map",
    )


def _points(
    found: Evaluation, rows: Sequence[int], codes: Sequence[int], pictures: Sequence[bytes | None] | None
) -> Html:
    from embedlab.serving.pictures import project

    places = project(found.query.embeddings.vectors[list(rows)], seed=found.plan.seed)
    low, high = places.min(axis=0), places.max(axis=0)
    shares = (places - low) / np.where(high > low, high - low, 1)
    dots = []
    for number, (row, code, (across, down)) in enumerate(zip(rows, codes, shares.tolist(), strict=True)):
        label, wrong = found.labels[row], found.per_query["recall_at_1"][row] == 0
        said = found.searched_labels[int(found.nearest[row, 0])]
        content = pictures[number] if pictures else None
        dots.append(
            tag(
                "circle",
                tag("title", f"{label}, taken for {said}" if wrong else label),
                cx=f"{20 + 960 * across:.1f}",
                cy=f"{20 + 600 * down:.1f}",
                r=6,
                class_=f"hue-{code % HUES}" + (" wrong" if wrong else ""),
                data_row=row,
                data_label=label,
                data_taken=said if wrong else None,
                data_image=None if content is None else "data:image/jpeg;base64," + base64.b64encode(content).decode(),
            )
        )
    drawing = tag(
        "svg", dots, viewBox="0 0 1000 640", role="img", aria_label=f"Map of {len(rows)} images", class_="points"
    )
    return tag("div", drawing, class_="map", data_map=True)
