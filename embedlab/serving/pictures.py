"""Pictures of what a gallery decided, and of how an embedding lies."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.offsetbox import AnnotationBbox, OffsetImage

from embedlab.retrieval.answers import Identification
from embedlab.retrieval.robustness import figure_of

if TYPE_CHECKING:
    from embedlab.data import Source
    from embedlab.encoders import Encoder
    from embedlab.retrieval.embedders import OnnxEmbedder

RIGHT, WRONG, REFUSED = "#1a7f37", "#cf222e", "#57606a"
MOST_ROWS = 24  # answers on one sheet
_PALETTE = ("#0969da", "#9a6700", "#6e7781", "#8250df", "#cf222e", "#1a7f37")
LONGEST_CAPTION = 22  # characters over a picture


@dataclass(frozen=True, eq=False)
class Decision:
    """One probe, what the gallery said, and what stands nearest.

    Args:
        image: (H, W) or (H, W, C) uint8; None where there is no picture, for a neutral tile.
        verdict: Short line over the probe, such as "right: Ж".
        color: Of the frame: `RIGHT`, `WRONG` or `REFUSED`.
        neighbours: Nearest templates, nearest first, as (image or None, caption).
        score: Of the best identity; None draws no scale.
        threshold: What the score had to reach; None where there is none.
    """

    image: np.ndarray | None
    verdict: str
    color: str
    neighbours: Sequence[tuple[np.ndarray | None, str]]
    score: float | None = None
    threshold: float | None = None


def draw_decisions(path: str | Path, decisions: Sequence[Decision], *, title: str, columns: int = 2) -> None:
    """Draw one row per probe: framed by the colour of the verdict, its score on a scale, its neighbours beside it.

    Args:
        path: PNG, SVG or PDF to write.
        decisions: At least one; rows run down the first column of blocks, then the next.
        title: Over the sheet.
        columns: Blocks side by side.

    Raises:
        ValueError: No decision.
    """
    if not decisions:
        raise ValueError("draw_decisions needs at least one decision, got none.")
    width = 1 + max(len(decision.neighbours) for decision in decisions)
    scores = [value for decision in decisions for value in (decision.score, decision.threshold) if value is not None]
    widths = [1.0] + [2.0] * bool(scores) + [1.0] * (width - 1)  # probe, scale, neighbours
    rows = math.ceil(len(decisions) / columns)
    figure = Figure(figsize=(1.15 * columns * (sum(widths) + 0.4), 1.35 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    blocks = figure.subfigures(1, columns, wspace=0.06, squeeze=False)[0]
    for block, start in zip(blocks, range(0, len(decisions), rows), strict=False):
        axes = block.subplots(rows, len(widths), squeeze=False, width_ratios=widths)
        for axis in axes.flat:
            axis.set_axis_off()
        for row, decision in zip(axes, decisions[start : start + rows], strict=False):
            _show(row[0], decision.image, decision.verdict, decision.color)
            if scores:
                _show_score(row[1], decision, (min(0.0, *scores), max(1.0, *scores)))
            for axis, (image, caption) in zip(row[len(widths) - width + 1 :], decision.neighbours, strict=False):
                _show(axis, image, caption, None)
    figure.savefig(path, dpi=130)


def _show(axis: Any, image: np.ndarray | None, caption: str, color: str | None) -> None:
    axis.set_axis_on()
    axis.set(xticks=[], yticks=[])
    if image is None:
        axis.set(facecolor="#f3f4f6", box_aspect=1)
        axis.text(0.5, 0.5, "no picture", transform=axis.transAxes, ha="center", va="center", fontsize=6, color=REFUSED)
    else:
        axis.imshow(np.squeeze(image), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axis.set_title(caption, fontsize=7, color=color or "black", pad=2, parse_math=False)
    for spine in axis.spines.values():
        spine.set(color=color or "#d0d7de", linewidth=2.5 if color else 0.8)


def _show_score(axis: Any, decision: Decision, ends: tuple[float, float]) -> None:
    """The score as a dot on a scale, the threshold as a line across it."""
    if decision.score is None:
        return
    low, high = ends
    axis.plot([low, high], [0, 0], color="#d0d7de", linewidth=5, solid_capstyle="round", zorder=1)
    axis.plot([decision.score], [0], "o", color=decision.color, markersize=8, zorder=3)
    axis.text(decision.score, 0.5, f"{decision.score:.3f}", ha="center", fontsize=7.5, color=decision.color)
    if decision.threshold is not None:
        axis.plot([decision.threshold] * 2, [-0.35, 0.35], color="black", linewidth=1.5, zorder=2)
        axis.text(decision.threshold, -0.85, f"threshold {decision.threshold:.3f}", ha="center", fontsize=6.5)
    margin = 0.12 * (high - low)
    axis.set(xlim=(low - margin, high + margin), ylim=(-1.6, 1.6))


def draw_identifications(
    path: str | Path,
    answers: Sequence[Identification],
    probes: Sequence[np.ndarray | None],
    template: Callable[[int], np.ndarray | None],
) -> None:
    """Draw what a gallery answered: one row per probe with the decision, its score on a scale, and the neighbours.

    Args:
        path: PNG, SVG or PDF to write.
        answers: Of `Gallery.identify`; the first 24 are drawn.
        probes: One picture (H, W) or (H, W, C) uint8 per answer, None where there is none.
        template: From the id of a template to its picture, or None.
    """
    rows = [
        Decision(
            image,
            _short("unknown" if answer.label is None else answer.label),
            REFUSED if answer.label is None else RIGHT,
            [
                (template(key), f"{_short(str(label))}\n{score:.3f}")
                for key, label, score in zip(
                    answer.neighbours.ids[0].tolist(),
                    answer.neighbours.labels[0],
                    answer.neighbours.scores[0],
                    strict=True,
                )
                if key >= 0
            ],
            score=None if math.isnan(answer.score) else answer.score,
            threshold=answer.threshold,
        )
        for answer, image in list(zip(answers, probes, strict=True))[:MOST_ROWS]
    ]
    title = "Probe (framed), its score, and the nearest templates"
    if any(not answer.calibrated for answer in answers):
        title += "; the gallery is not calibrated"
    if len(answers) > MOST_ROWS:
        title += f"; the first {MOST_ROWS} of {len(answers)}"
    draw_decisions(path, rows, title=title, columns=1)


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_CAPTION else text[: LONGEST_CAPTION - 1] + "\N{HORIZONTAL ELLIPSIS}"


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


def draw_robustness(path: str | Path, reports: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw figures over severity: one panel per kind of degradation, one colour per encoder, its interval as a band.

    Recall@1 is the solid line, and with an open-set trial detection the dashed and observed FPIR the dotted one.

    Args:
        path: PNG, SVG or PDF to write.
        reports: Of `evaluate_robustness`, by the name of the encoder.
    """
    first = next(iter(reports.values()))
    kinds = [name for name in first["means"] if name != "all"]
    columns = min(4, len(kinds))
    panels = math.ceil(len(kinds) / columns)
    figure = Figure(figsize=(2.9 * columns, 2.5 * panels + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(panels, columns, sharex=True, sharey=True, squeeze=False)
    for axis, kind in zip(axes.flat, kinds, strict=False):
        for color, report in zip(_PALETTE, reports.values(), strict=False):
            rows = [row for row in report["rows"] if row["degradation"] in ("clean", kind)]
            severities = [row["severity"] for row in rows]
            for name, line in (("recall_at_1", "-"), ("detection_rate", "--"), ("observed_fpir", ":")):
                values = [figure_of(row, name) for row in rows]
                if None in values:
                    continue
                axis.plot(severities, values, line, color=color, marker="o", markersize=2.5, linewidth=1.4)
                if name == "recall_at_1":
                    bands = [
                        row["intervals"].get(name, (value, value)) for row, value in zip(rows, values, strict=True)
                    ]
                    axis.fill_between(severities, *zip(*bands, strict=True), color=color, alpha=0.13, linewidth=0)
        axis.set_title(kind.replace("_", " "), fontsize=9)
        axis.grid(color="#d0d7de", linewidth=0.5)
        axis.tick_params(labelsize=7)
        axis.set(ylim=(0, 1), xlim=(0, None), xticks=range(6))
    for axis in axes[-1]:
        axis.set_xlabel("severity, 0 is clean", fontsize=8)
    for axis in list(axes.flat)[len(kinds) :]:
        axis.set_axis_off()
    handles = [Line2D([], [], color=color, label=name) for color, name in zip(_PALETTE, reports, strict=False)]
    handles += [Line2D([], [], color="black", linestyle="-", label="recall@1")]
    if "open_set" in first["rows"][0]:
        handles += [
            Line2D([], [], color="black", linestyle="--", label="detection"),
            Line2D([], [], color="black", linestyle=":", label="observed FPIR"),
        ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(handles)), fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)


def draw_degradation_sheet(
    path: str | Path,
    source: Source,
    encoder: Encoder | OnnxEmbedder,
    *,
    names: Sequence[str] | None = None,
    severities: Sequence[int] = (1, 2, 3, 4, 5),
    seed: int = 0,
) -> None:
    """Draw a contact sheet of what degradations do: kinds down, severities across, each row another picture.

    Args:
        path: PNG, SVG or PDF to write.
        source: Pictures to choose from, spread evenly.
        encoder: At whose input size they are shown.
        names: See `embed_degraded`, as for the other two.
        severities: From 1 to 5.
        seed: Of the random numbers.
    """
    import torch

    from embedlab.data.degradations import chosen_kinds, chosen_severities, degrade

    kinds, levels = chosen_kinds(names), [0, *chosen_severities(severities)]
    rows = np.linspace(0, len(source) - 1, len(kinds)).astype(np.int64)
    pixels, rows, _ = source.read(
        rows, encoder.image_size, channels=encoder.channels, how=encoder.fit, on_error="skip", skip_limit=None
    )
    figure = Figure(figsize=(1.25 * len(levels) + 0.5, 1.25 * len(kinds) + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(kinds), len(levels), squeeze=False)
    for number, (row, kind) in enumerate(zip(axes, kinds, strict=True)):
        place = slice(number % len(rows), number % len(rows) + 1)
        images, index = torch.from_numpy(pixels[place]), torch.from_numpy(rows[place])
        for axis, level in zip(row, levels, strict=True):
            picture = degrade(images, index, kind, level, seed=seed)[0].permute(1, 2, 0).numpy()
            axis.imshow(np.squeeze(picture), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.set_frame_on(False)
        row[0].set_ylabel(kind.replace("_", " "), fontsize=8)
    for axis, level in zip(axes[0], levels, strict=True):
        axis.set_title(f"severity {level}" if level else "clean", fontsize=8)
    figure.savefig(path, dpi=130)
