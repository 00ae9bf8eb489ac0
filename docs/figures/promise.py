"""Draws docs/images/promise.png: promised and observed false-positive identification on real pictures.

    python docs/figures/promise.py DATA [--encoder FOLDER] [--splits 200]

DATA holds omniglot_small1, att_faces and grocery_store_128 (those that are there are taken). Every split shares the
identities at random into enrolled, calibration strangers and test strangers; three pictures of each enrolled one are
templates, the others genuine probes. Four rules set the threshold:

- `Gallery.calibrate` for each target rate;
- the percentile: the (1 - target) quantile of the calibration strangers' scores;
- best F1: the cosine that tells "same" from "different" best among pairs of the calibration pictures;
- a constant cosine of 0.4.

Without an encoder the embedding is the picture itself, 32 x 32 grey pixels minus their mean.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from embedlab._types import Embeddings
from embedlab.data import open_source
from embedlab.data.images import read_images
from embedlab.retrieval import Gallery
from embedlab.retrieval.calibration import strangers_needed
from embedlab.retrieval.open_set import choose_templates, take

TARGETS = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2)
TEMPLATES = 3
CONSTANT = 0.4
SETS = {  # folder in DATA, identities to enroll; half of the others set the threshold
    "omniglot_small1": 16,
    "att_faces": 6,
    "grocery_store_128/train": 10,
}
COLOURS = {"calibrate": "#0072B2", "percentile": "#D55E00", "best F1": "#009E73", "0.4": "#7F7F7F"}


@dataclass
class Outcome:
    """One rule at one target in one split; rates are means over identities."""

    rule: str
    target: float
    fpir: float
    detection: float


def embed(folder: Path, encoder: str | None, most: int = 20) -> Embeddings:
    """Vectors of up to `most` pictures of each identity, the identity being the folder."""
    source = open_source(folder)
    assert source.labels is not None
    labels = np.array(source.labels, dtype=object)
    rows = np.sort(np.concatenate([np.flatnonzero(labels == name)[:most] for name in sorted(set(labels))]))
    paths, names = [source.names[row] for row in rows], labels[rows].tolist()
    if encoder is not None:
        from embedlab.encoders import Encoder

        return Embeddings(Encoder.load(encoder).embed(paths).vectors, names, np.arange(len(rows)))
    pixels = read_images(paths, 32, channels=1)[0].reshape(len(rows), -1).astype(np.float32)
    return Embeddings(pixels - pixels.mean(axis=1, keepdims=True), names, np.arange(len(rows)))


def best_f1(probes: Embeddings) -> float:
    """The cosine at or above which calling a pair "same" has the highest F1."""
    vectors = probes.vectors / np.linalg.norm(probes.vectors, axis=1, keepdims=True)
    first, second = np.triu_indices(len(vectors), 1)
    labels = np.array(probes.labels, dtype=object)
    same = labels[first] == labels[second]
    cosines = np.einsum("nd,nd->n", vectors[first], vectors[second])
    order = np.argsort(-cosines)
    hits = np.cumsum(same[order])
    return float(cosines[order][np.argmax(2 * hits / (np.arange(1, len(order) + 1) + same.sum()))])


def share(hits: np.ndarray, labels: list[str]) -> float:
    """Mean over identities."""
    codes = np.unique(labels, return_inverse=True)[1]
    return float((np.bincount(codes, hits) / np.bincount(codes)).mean())


def one_split(everything: Embeddings, enrolled: int, targets: list[float], seed: int) -> Iterator[Outcome]:
    names = np.random.default_rng(seed).permutation(sorted(set(everything.labels))).tolist()
    setting = (len(names) - enrolled) // 2
    groups = np.split(np.array(names, dtype=object), [enrolled, enrolled + setting])
    labels = np.array(everything.labels, dtype=object)
    templates = choose_templates(everything.labels, set(groups[0]), templates=TEMPLATES, seed=seed)
    own = take(everything, np.isin(labels, groups[0]) & ~templates)
    setters, test = (take(everything, np.isin(labels, group)) for group in groups[1:])
    with (
        tempfile.TemporaryDirectory() as place,
        Gallery.create(f"{place}/g", dim=everything.vectors.shape[1]) as gallery,
    ):
        gallery.enroll(embeddings=take(everything, templates))
        known, strange, seen = (gallery.identify(embeddings=probes, k=1) for probes in (own, test, setters))
        right = np.array([answer.best == label for answer, label in zip(known, own.labels, strict=True)])
        scores = [np.array([answer.score for answer in answers]) for answers in (known, strange, seen)]
        f1 = best_f1(setters)
        for target in targets:
            for rule, threshold in {
                "calibrate": gallery.calibrate(embeddings=setters, fpir=target).threshold,
                "percentile": np.quantile(scores[2], 1 - target),
                "best F1": f1,
                "0.4": CONSTANT,
            }.items():
                detected = share(right & (scores[0] >= threshold), own.labels)
                yield Outcome(rule, target, share(scores[1] >= threshold, test.labels), detected)


def table(name: str, outcomes: list[Outcome], targets: list[float]) -> str:
    """Mean observed rate, the share of splits above the target, and the detection rate, as Markdown."""
    lines = [
        f"| {name} | promised | observed: mean | 95 % of splits below | splits above the promise | detected |",
        "|---|---|---|---|---|---|",
    ]
    for rule in COLOURS:
        for target in targets:
            mine = [o for o in outcomes if (o.rule, o.target) == (rule, target)]
            rates = np.array([o.fpir for o in mine])
            lines.append(
                f"| {rule} | {target:.0%} | {rates.mean():.1%} | {np.quantile(rates, 0.95):.1%} | "
                f"{(rates > target).mean():.0%} | {np.mean([o.detection for o in mine]):.1%} |"
            )
    return "\n".join(lines)


def draw(results: dict[str, tuple[list[Outcome], list[float]]], path: Path) -> None:
    figure, axes = plt.subplots(1, len(results), figsize=(4.2 * len(results), 4), squeeze=False, layout="constrained")
    least, most = 0.002, 1.0
    for axis, (name, (outcomes, targets)) in zip(axes[0], results.items(), strict=True):
        axis.plot([least, most], [least, most], color="black", linewidth=0.8, linestyle=":")
        for rule, colour in COLOURS.items():
            rates = np.array([[o.fpir for o in outcomes if (o.rule, o.target) == (rule, t)] for t in targets])
            mean, low, high = (
                np.clip(v, least, 1) for v in (rates.mean(axis=1), *np.quantile(rates, [0.05, 0.95], axis=1))
            )
            places = np.array(targets) * 1.04 ** (list(COLOURS).index(rule) - 1.5)  # side by side
            error = np.clip([mean - low, high - mean], 0, None)
            axis.errorbar(places, mean, error, fmt="o-", color=colour, label=rule, markersize=4, elinewidth=0.8)
        axis.axvspan(0.008, 0.9 * targets[0], color="#F0F0F0", zorder=0)
        middle = np.sqrt(0.008 * 0.9 * targets[0])
        axis.text(middle, 0.3, "refused:\ntoo few\nstrangers", ha="center", va="center", color="#555555", fontsize=9)
        axis.set(xscale="log", yscale="log", xlim=(0.008, 0.25), ylim=(least, 1.1))
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("promised: at most this share of strangers")
        axis.set_xticks([0.01, 0.02, 0.05, 0.1, 0.2], ["1 %", "2 %", "5 %", "10 %", "20 %"])
        axis.set_yticks([0.002, 0.01, 0.05, 0.2, 1], ["0", "1 %", "5 %", "20 %", "100 %"])
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("observed: strangers taken for somebody")
    axes[0, -1].legend(frameon=False, fontsize=9, loc="lower left", title="mean, 5 to 95 % of splits", title_fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--encoder", help="folder of a saved encoder")
    parser.add_argument("--splits", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "images" / "promise.png")
    options = parser.parse_args()
    logging.getLogger("embedlab").setLevel(logging.ERROR)
    results = {}
    for name, enrolled in SETS.items():
        if not (options.data / name).is_dir():
            continue
        everything = embed(options.data / name, options.encoder)
        counts = {label: everything.labels.count(label) for label in set(everything.labels)}
        everything = take(everything, [row for row, label in enumerate(everything.labels) if counts[label] > TEMPLATES])
        setting = (len({*everything.labels}) - enrolled) // 2
        targets = [target for target in TARGETS if strangers_needed(target) <= setting]
        outcomes = [o for seed in range(options.splits) for o in one_split(everything, enrolled, targets, seed)]
        short = name.partition("/")[0]
        title = f"{short}: {enrolled} enrolled, {setting} set the threshold"
        results[title] = (outcomes, targets)
        print(table(f"{short} ({options.splits} splits)", outcomes, targets) + "\n", flush=True)
    draw(results, options.out)


if __name__ == "__main__":
    main()
