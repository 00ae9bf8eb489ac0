"""Pictures of what a gallery decided, and of how an embedding lies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage

RIGHT, WRONG, REFUSED = "#1a7f37", "#cf222e", "#57606a"


@dataclass(frozen=True, eq=False)
class Decision:
    """One probe, what the gallery said, and what stands nearest.

    Args:
        image: (H, W) or (H, W, C) uint8.
        verdict: Short line over the probe, such as "right: Ж".
        color: Of the frame: `RIGHT`, `WRONG` or `REFUSED`.
        neighbours: Nearest templates, nearest first, as (image, caption).
    """

    image: np.ndarray
    verdict: str
    color: str
    neighbours: Sequence[tuple[np.ndarray, str]]


def draw_decisions(path: str | Path, decisions: Sequence[Decision], *, title: str, columns: int = 2) -> None:
    """Draw one row per probe, the probe framed by the colour of the verdict, its neighbours beside it.

    Args:
        path: PNG, SVG or PDF to write.
        decisions: At least one; rows run down the first column of blocks, then the next.
        title: Over the sheet.
        columns: Blocks side by side.
    """
    if not decisions:
        raise ValueError("draw_decisions needs at least one decision, got none.")
    width = 1 + max(len(decision.neighbours) for decision in decisions)
    rows = math.ceil(len(decisions) / columns)
    figure = Figure(figsize=(1.15 * columns * (width + 0.4), 1.35 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    blocks = figure.subfigures(1, columns, wspace=0.06, squeeze=False)[0]
    for block, start in zip(blocks, range(0, len(decisions), rows), strict=False):
        axes = block.subplots(rows, width, squeeze=False)
        for axis in axes.flat:
            axis.set_axis_off()
        for row, decision in zip(axes, decisions[start : start + rows], strict=False):
            _show(row[0], decision.image, decision.verdict, decision.color)
            for axis, (image, caption) in zip(row[1:], decision.neighbours, strict=False):
                _show(axis, image, caption, None)
    figure.savefig(path, dpi=130)


def _show(axis: Any, image: np.ndarray, caption: str, color: str | None) -> None:
    axis.set_axis_on()
    axis.set(xticks=[], yticks=[])
    axis.imshow(np.squeeze(image), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axis.set_title(caption, fontsize=7, color=color or "black", pad=2)
    for spine in axis.spines.values():
        spine.set(color=color or "#d0d7de", linewidth=2.5 if color else 0.8)


def project(vectors: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Place (N, D) vectors in the plane, (N, 2): t-SNE on the cosine distance, for few vectors two principal axes."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if len(vectors) < 10:
        padded = np.pad(vectors, ((0, 0), (0, max(0, 2 - vectors.shape[1]))))
        return np.asarray(PCA(2, random_state=seed).fit_transform(padded))
    perplexity = min(30.0, (len(vectors) - 1) / 3)
    tsne = TSNE(2, metric="cosine", init="random", perplexity=perplexity, random_state=seed, max_iter=750)
    return np.asarray(tsne.fit_transform(vectors))


def draw_map(
    path: str | Path,
    vectors: np.ndarray,
    images: np.ndarray,
    groups: Sequence[str],
    *,
    title: str,
    seed: int = 0,
) -> None:
    """Draw a 2-D map of an embedding with the images themselves as points.

    Args:
        path: PNG, SVG or PDF to write.
        vectors: (N, D), N of a few hundred.
        images: (N, H, W) or (N, H, W, C) uint8, row by row.
        groups: N names; images of one group have frames of one colour. The ten largest are in the legend.
        title: Over the map.
        seed: Of t-SNE.
    """
    places = project(vectors, seed=seed)
    names, counts = np.unique(np.asarray(groups), return_counts=True)
    names = names[np.argsort(-counts, kind="stable")]
    figure = Figure(figsize=(10, 10), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    palette = [f"C{number}" for number in range(10)]
    color = {name: palette[number % 10] for number, name in enumerate(names.tolist())}
    for name in names[:10].tolist():
        axis.scatter([], [], marker="s", color=color[name], label=name)
    axis.scatter(places[:, 0], places[:, 1], s=0)
    zoom = 18 / max(images.shape[1:3])
    for place, image, group in zip(places, images, groups, strict=True):
        picture = OffsetImage(np.squeeze(image), zoom=zoom, cmap="gray")
        frame = {"edgecolor": color[group], "linewidth": 1.2, "boxstyle": "square,pad=0.05"}
        axis.add_artist(AnnotationBbox(picture, tuple(place), frameon=True, pad=0.05, bboxprops=frame))
    axis.set(xticks=[], yticks=[], title=title)
    axis.legend(loc="upper left", fontsize=8, frameon=True)
    figure.savefig(path, dpi=110)
