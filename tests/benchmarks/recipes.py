"""The tables of the recipes in docs/benchmarks.md: each trained over seeds, beside its baselines, with intervals.

    pip install 'embedlab[bench]'
    python tests/benchmarks/recipes.py faces --data FACES --out runs/benchmark-faces
    python tests/benchmarks/recipes.py products --data PRODUCTS --out runs/benchmark-products
    python tests/benchmarks/recipes.py characters --data CHARACTERS --out runs/benchmark-characters
    python tests/benchmarks/recipes.py defects --data PARTS --out runs/benchmark-defects

FACES is a folder with one folder per person, or a manifest. PRODUCTS is the folder of the Grocery Store data set, or a
manifest with the columns path, label, coarse, photo_set (train, test and, if there are any, iconic) and, if the roles
are given, split. CHARACTERS is a folder ALPHABET/CHARACTER/*.png. PARTS is the folder of the magnetic tiles (with its
index.csv), or a manifest with the columns path, label (one of them --positive) and group.

Every piece (a training, the vectors of an encoder) is done by the ordinary commands and kept under --out, so that a run
that was broken off goes on where it stopped. Further options, such as --trainer.max_epochs 1 for a look, go to
`embedlab fit`. --role calibrate measures on the calibrate identities: settings are chosen there, not on the test.

A figure is the mean over seeds, behind it the standard deviation over seeds and, in brackets, the 95 % interval by
resampling identities (people, products, characters, groups of parts) of the mean over seeds; where all is right, or
nothing, Wilson's with identities as trials.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import io
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from embedlab._ops import normalize
from embedlab._types import Embeddings
from embedlab.cli import main as embedlab
from embedlab.data import Source, folds_by_class, open_source, split_by_group, write_split
from embedlab.encoders import Encoder, Pixels, Whitening
from embedlab.metrics import (
    PairSample,
    average_precision,
    best_threshold,
    bootstrap_interval,
    bootstrap_statistic,
    classification_report,
    detection_identification_rate,
    draw_pairs,
    eer,
    hierarchical_distance,
    leave_identity_out,
    nearest_neighbours,
    retrieval_report,
    roc_auc,
    told_interval,
    verification_resamples,
)
from embedlab.retrieval import Gallery
from embedlab.retrieval.open_set import choose_templates, take

RECIPES = Path(__file__).parents[2] / "recipes"
PML = [
    "--model.init_args.loss.class_path=pytorch_metric_learning.losses.SupConLoss",
    "--model.init_args.loss.init_args={temperature: 0.1}",
]
RESAMPLES = 1000
OURS, THEIRS, UNTRAINED, RAW = "recipe", "with pytorch-metric-learning's loss", "untrained network", "raw pixels"
WHITENED = "raw pixels, whitened"


@dataclass
class Figure:
    """One cell: a value per seed, and the interval over identities of their mean."""

    values: list[float]
    interval: tuple[float, float] | None = None

    def __str__(self) -> str:
        if np.isnan(self.values).any():
            return "-"
        spread = f" ± {np.std(self.values, ddof=1):.3f}" if len(self.values) > 1 else ""
        interval = "" if self.interval is None else " [{:.3f}, {:.3f}]".format(*self.interval)
        return f"{np.mean(self.values):.3f}{spread}{interval}"


@dataclass
class Table:
    """Rows of figures, printed as Markdown."""

    title: str
    rows: dict[str, dict[str, Figure | str]] = field(default_factory=dict)

    def __str__(self) -> str:
        columns = list(dict.fromkeys(name for row in self.rows.values() for name in row))
        lines = [["", *columns], ["---"] * (len(columns) + 1)]
        lines += [[name, *(str(row.get(column, "-")) for column in columns)] for name, row in self.rows.items()]
        return f"{self.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def mean_figure(values: Sequence[Any], owners: Any) -> Figure:
    """The mean over samples: (seeds, N) one value per sample, NaN where there is none; the same samples each time."""
    samples = np.array(values, dtype=float)
    interval = bootstrap_interval(samples.mean(axis=0), owners)
    found = np.nanmean(samples, axis=1).tolist()
    return Figure(found, told(interval, found, owners))


def told(interval: tuple[float, float], values: Sequence[float], owners: Any) -> tuple[float, float] | None:
    """The interval, unless no draw differs from the others, which says nothing of how rare mistakes are.

    Where all is right, or nothing, it is then the score interval of a share over identities; elsewhere there is none.
    """
    share = float(np.mean(values))
    return told_interval(interval, owners, share=share if share in (0, 1) else None)


def figure(statistics: Sequence[Callable[[Any], float]], owners: Any) -> Figure:
    """Any figure of rows, a function of row numbers for each seed.

    It is a dash where the data do not support it, and has no interval where too many draws do not.
    """
    try:
        found = Figure([statistic(np.arange(len(owners))) for statistic in statistics])
    except ValueError as error:
        sys.stderr.write(f"no figure: {error}\n")
        return Figure([float("nan")])
    with contextlib.suppress(ValueError):
        interval = bootstrap_statistic(
            lambda rows: float(np.mean([statistic(rows) for statistic in statistics])),
            owners,
            resamples=RESAMPLES,
        )
        found.interval = told(interval, found.values, owners)
    return found


# ---- pieces --------------------------------------------------------------------------------------------------------


def command(*arguments: Any) -> dict[str, Any]:
    """Run embedlab with --json and return its document."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        code = embedlab([*map(str, arguments), "--json"])
    if code:
        raise SystemExit(f"embedlab {' '.join(map(str, arguments))} ended with {code}; see above.")
    result: dict[str, Any] = json.loads(shown.getvalue())
    return result


def piece(folder: Path, *arguments: Any, reads: Sequence[Path] = ()) -> dict[str, Any]:
    """Run `embedlab ... --run FOLDER` unless the folder holds what the same command made of the same files.

    A training that was broken off goes on at its last checkpoint; its seconds are then unknown (NaN).
    """
    read = hashlib.blake2b(b"".join(path.read_bytes() for path in reads), digest_size=8).hexdigest()
    made = {"arguments": [str(argument) for argument in arguments], "read": read}
    note = folder.with_name(f"{folder.name}.json")
    known = json.loads(note.read_text()) if note.is_file() else made
    if {name: known[name] for name in made} != made:
        raise SystemExit(
            f"{folder} was made by another command or recipe than the one asked for now ({note}); delete both, or "
            "choose another folder by --out."
        )
    if known.get("result"):
        result: dict[str, Any] = known["result"]
        return result
    sys.stderr.write(f"{folder}\n")
    if arguments[0] == "fit" and note.is_file() and list(folder.glob("checkpoints/*.ckpt")):
        result = command("fit", "--run", folder, "--resume") | {"seconds": float("nan")}
    else:
        shutil.rmtree(folder, ignore_errors=True)  # broken off before its first checkpoint
        folder.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(made))
        result = command(*arguments, "--run", folder)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    note.write_text(json.dumps(made | {"result": result}))
    return result


def mean_seconds(seconds: Sequence[float]) -> str:
    """Of those trainings that were not broken off."""
    known = [one for one in seconds if not np.isnan(one)]
    return f"{np.mean(known):.0f}" if known else "-"


def train(options: argparse.Namespace, name: str, manifest: Path, seed: int, *more: str) -> tuple[Encoder, float]:
    """`embedlab fit` of the table's recipe on a manifest with roles; the encoder, and seconds."""
    recipe = RECIPES / f"{options.table}.yaml"
    folder = options.out / "runs" / f"{name}-seed{seed}"
    arguments = ["fit", "-c", recipe, f"--data.init_args.root={manifest}", "--data.init_args.split=column"]
    arguments += [f"--seed_everything={seed}", f"--data.init_args.seed={seed}", "--trainer.logger=false"]
    result = piece(folder, *arguments, *more, *options.more, reads=[recipe, manifest])
    return Encoder.load(folder / "encoder"), float(result["seconds"])


class Pictures:
    """The images of a manifest, decoded once for each preprocessing, and their vectors, kept on the disk."""

    def __init__(self, manifest: Path, out: Path) -> None:
        self.source = open_source(manifest)
        self.roles = np.array(self.source.column("split"))
        self.out = out / "vectors"
        self.decoded: dict[str, Any] = {}

    def images(self, encoder: Encoder) -> Any:
        """(N, C, size, size) uint8."""
        key = json.dumps(encoder.preprocessing)
        if key not in self.decoded:
            size, channels = encoder.image_size, encoder.channels
            self.decoded[key] = self.source.read(None, size, channels=channels, how=encoder.fit)[0]
        return self.decoded[key]

    def vectors(self, encoder: Encoder) -> Embeddings:
        """Of all images."""
        names = hashlib.blake2b("\n".join(self.source.names).encode(), digest_size=8).hexdigest()
        kept = self.out / f"{encoder.fingerprint}-{names}.npy"
        if not kept.is_file():
            kept.parent.mkdir(parents=True, exist_ok=True)
            found = encoder.embed(self.images(encoder), progress=False).vectors
            np.save(kept.with_suffix(".part.npy"), found)
            kept.with_suffix(".part.npy").rename(kept)
        return Embeddings(np.load(kept), self.source.labels, np.arange(len(self.source)), self.source.names)

    def whitened(self, found: Embeddings, training: Source) -> Embeddings:
        """By the images that are trained on, and their labels."""
        seen = np.array(training.names)[np.array(training.column("split")) == "train"]
        rows = np.flatnonzero(np.isin(self.source.names, seen))
        whitening = Whitening.fit(found.vectors[rows], np.array(found.labels)[rows])
        moved = [normalize(whitening(normalize(part))) for part in torch.from_numpy(found.vectors).split(500)]
        return replace(found, vectors=torch.cat(moved).numpy())

    def baselines(self, like: Encoder, seed: int) -> dict[str, Encoder]:
        """An untrained network of the same kind, its batch statistics from training images; and no network at all."""
        rows = np.flatnonzero(self.roles == "train")
        some = torch.from_numpy(self.images(like)[rows[:: max(1, len(rows) // 256)]])
        pixels = Encoder(Pixels(like.image_size, in_channels=like.channels), **like.preprocessing)
        return {UNTRAINED: like.untrained(some, seed=seed), RAW: pixels}


def encoders(
    options: argparse.Namespace, pictures: Pictures, manifest: Path, name: str = "", *, peer: bool = True
) -> tuple[dict[str, list[Embeddings]], dict[str, list[float]]]:
    """For each row of a table the vectors by seed, and the seconds of the trainings."""
    found: dict[str, list[Embeddings]] = {}
    seconds: dict[str, list[float]] = {}
    for seed in options.seeds:
        kinds = {OURS: []} | ({THEIRS: PML} if peer and seed in options.seeds[: options.peer_seeds] else {})
        for kind, more in kinds.items():
            run = f"{name}{'ours' if kind == OURS else 'peer'}"
            encoder, took = train(options, run, manifest, seed, *more)
            found.setdefault(kind, []).append(pictures.vectors(encoder))
            seconds.setdefault(kind, []).append(took)
            if kind == OURS:
                ours = encoder
        for kind, encoder in pictures.baselines(ours, seed).items():
            if kind != RAW or kind not in found:
                found.setdefault(kind, []).append(pictures.vectors(encoder))
    if ours.whitening is not None:  # how much of it is linear
        found[WHITENED] = [pictures.whitened(found[RAW][0], open_source(manifest))]
    order = [kind for kind in (OURS, THEIRS, UNTRAINED, RAW, WHITENED) if kind in found]
    return {kind: found[kind] for kind in order}, {kind: seconds.get(kind, []) for kind in order}


# ---- faces ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Searches:
    """Searches of enrolled people and of strangers, retrieval, and the pictures, of one fold or of several joined."""

    scores: Any
    correct: Any
    known: Any
    who: Any
    hits: Any
    vectors: Any
    labels: Any

    def detection(self, fpir: float) -> Callable[[Any], float]:
        """Detection rate of any rows of the searches, at the threshold that these rows set."""
        return lambda rows: detection_identification_rate(
            self.scores[rows], self.correct[rows], self.known[rows], fpir=fpir
        )

    @staticmethod
    def joined(folds: Sequence[Searches]) -> Searches:
        """One after another: one threshold holds for all."""
        return Searches(*(np.concatenate([getattr(fold, name) for fold in folds]) for name in Searches.__annotations__))


def search_all(found: Embeddings, templates: int) -> Searches:
    """Leave-identity-out with some templates each, and leave-one-out retrieval."""
    labels = np.array(found.labels)
    enrolled = choose_templates(labels.tolist(), set(labels.tolist()), templates=templates, seed=0)
    searches = leave_identity_out(
        found.vectors[~enrolled], labels[~enrolled], found.vectors[enrolled], labels[enrolled]
    )
    hits = retrieval_report(found.vectors, labels, k=[1]).per_query["recall_at_1"]
    return Searches(*searches, hits, found.vectors, labels)


def pairs_within(folds: Sequence[Any]) -> PairSample:
    """All pairs of pictures within a fold; the rows count through all folds."""
    names = np.unique(np.concatenate(folds))
    parts, start = [], 0
    for labels in folds:
        pairs = draw_pairs(labels)
        parts.append((pairs.genuine + start, pairs.impostors + start, pairs.genuine_total, pairs.impostors_total))
        start += len(labels)
    codes = np.searchsorted(names, np.concatenate(folds))
    genuine, impostors, *totals = zip(*parts, strict=True)
    return PairSample(np.concatenate(genuine), np.concatenate(impostors), (codes, codes), *map(sum, totals))


def equal_errors(pairs: PairSample, vectors: Sequence[Any]) -> Figure:
    """Equal error rate of the vectors of each seed, at one threshold for all pairs."""
    values, draws = [], []
    for one in vectors:
        genuine, impostors = scores = pairs.scores(one)
        same = np.repeat([True, False], [len(genuine), len(impostors)])
        values.append(eer(np.concatenate(scores), same))
        draws.append(verification_resamples(pairs, scores, resamples=RESAMPLES)["eer"])
    low, high = np.nanquantile(np.mean(draws, axis=0), [0.025, 0.975])
    return Figure(values, (float(low), float(high)) if low < high else None)


def faces(options: argparse.Namespace) -> list[Table]:
    """One split, and all folds pooled."""
    source = open_source(options.data)
    if source.labels is None:
        raise SystemExit(f"{options.data} has no labels: one folder per person, or a manifest with a column label.")
    folds: dict[str, list[list[Searches]]] = {}  # by row, seed, fold
    times: dict[str, list[float]] = {}
    for number, roles in enumerate(folds_by_class(source.labels, options.folds)):
        manifest = options.out / f"fold{number}.csv"
        write_split(manifest, source, roles)
        pictures = Pictures(manifest, options.out)
        tested = np.flatnonzero(pictures.roles == options.role)
        # the peer's loss is compared on one split; it is the same function
        by_row, seconds = encoders(options, pictures, manifest, f"fold{number}-", peer=number == 0)
        for kind, seeds in by_row.items():
            rows = folds.setdefault(kind, [[] for _ in seeds])
            for place, found in enumerate(seeds):
                rows[place].append(search_all(take(found, tested), options.templates))
            times.setdefault(kind, []).extend(seconds[kind])
    one, pooled = Table("One split"), Table(f"{options.folds} folds pooled")
    for kind, by_seed in folds.items():
        time = {"training, s": mean_seconds(times[kind])}
        one.rows[kind] = _faces_row([found[:1] for found in by_seed], {"10 %": 0.1}) | time
        if kind != THEIRS:
            pooled.rows[kind] = _faces_row(by_seed, {"10 %": 0.1, "1 %": 0.01})
    return [one, pooled]


def _faces_row(by_seed: list[list[Searches]], rates: dict[str, float]) -> dict[str, Figure | str]:
    seeds = [Searches.joined(folds) for folds in by_seed]
    pairs = pairs_within([fold.labels for fold in by_seed[0]])
    row: dict[str, Figure | str] = {
        "recall@1": mean_figure([found.hits for found in seeds], seeds[0].labels),
        "EER": equal_errors(pairs, [found.vectors for found in seeds]),
    }
    for name, rate in rates.items():
        row[f"detection at FPIR {name}"] = figure([found.detection(rate) for found in seeds], seeds[0].who)
    return row


# ---- products ------------------------------------------------------------------------------------------------------


def read_groceries(root: Path) -> Source:
    """The lists of the Grocery Store data set; its folders are not its labels."""
    with (root / "classes.csv").open(encoding="utf-8", newline="") as file:
        classes = {row["Class ID (int)"]: row for row in csv.DictReader(file)}
    photos = []  # number of the class, path, photo set
    for photo_set in ("train", "val", "test"):
        for line in (root / f"{photo_set}.txt").read_text(encoding="utf-8").splitlines():
            path, number, _ = line.split(", ")
            photos.append((number, path, photo_set))
    photos += [(number, row["Iconic Image Path (str)"].lstrip("/"), "iconic") for number, row in classes.items()]
    rows = [classes[number] for number, _, _ in photos]
    return Source(
        [str(root / path) for _, path, _ in photos],
        [row["Class Name (str)"] for row in rows],
        columns={
            "coarse": [row["Coarse Class Name (str)"] for row in rows],
            "photo_set": [photo_set for _, _, photo_set in photos],
        },
    )


def product_roles(labels: Sequence[str]) -> list[str]:
    """Every third product in sorted order is unseen, every third of the rest calibrates."""
    names = sorted(set(labels))
    unseen = set(names[2::3])
    calibrate = set([name for name in names if name not in unseen][2::3])
    return ["test" if name in unseen else "calibrate" if name in calibrate else "train" for name in labels]


def products(options: argparse.Namespace) -> list[Table]:
    """Photographs of seen and of unseen products, and catalogue pictures, among the photographs of all products."""
    given = read_groceries(options.data) if (options.data / "classes.csv").is_file() else open_source(options.data)
    if given.labels is None or not {"coarse", "photo_set"} <= set(given.columns):
        raise SystemExit(
            f"{options.data} needs the columns label, coarse and photo_set; it has {sorted(given.columns)}."
        )
    manifest = options.out / "products.csv"
    roles = given.columns.get("split") or product_roles(given.labels)
    write_split(manifest, given, list(roles))
    pictures = Pictures(manifest, options.out)
    photo_set = np.array(pictures.source.column("photo_set"))
    # the photographs that nobody asks with: the network sees those of the training products
    training = options.out / "training.csv"
    chosen = photo_set == "train"
    write_split(training, pictures.source.subset(chosen), pictures.roles[chosen])
    by_row, seconds = encoders(options, pictures, training)
    asked = {
        "Seen products": (pictures.roles == "train") & (photo_set == "test"),
        "Unseen products": (pictures.roles == options.role) & (photo_set == "test"),
        "Catalogue pictures of unseen products": (pictures.roles == options.role) & (photo_set == "iconic"),
        "Catalogue pictures of all products": photo_set == "iconic",
    }
    tables = []
    parents = dict(zip(given.labels, given.column("coarse"), strict=True))
    for title, mask in asked.items():
        if mask.any():
            rows = {kind: _products_row(seeds, mask, chosen, parents) for kind, seeds in by_row.items()}
            for kind, row in rows.items():
                row["training, s"] = mean_seconds(seconds[kind])
            tables.append(Table(f"{title}: {mask.sum()} queries among {chosen.sum()} photographs", rows))
    return tables


def _products_row(
    seeds: list[Embeddings], mask: Any, searched: Any, parents: dict[str, str]
) -> dict[str, Figure | str]:
    names = np.array(seeds[0].labels)
    labels = names[mask]
    reports, distances = [], []
    for found in seeds:
        query, reference = found.vectors[mask], found.vectors[searched]
        reports.append(retrieval_report(query, labels, reference, names[searched], k=[1, 5]).per_query)
        nearest = nearest_neighbours(query, reference, k=1)[0][:, 0]
        distances.append(hierarchical_distance(names[searched][nearest], labels, parents))
    near = [np.where(distance == 0, np.nan, distance == 1) for distance in distances]

    def share(values: Any) -> Callable[[Any], float]:
        return lambda rows: float(np.nanmean(values[rows])) if not np.isnan(values[rows]).all() else float("nan")

    return {
        "recall@1": mean_figure([report["recall_at_1"] for report in reports], labels),
        "recall@5": mean_figure([report["recall_at_5"] for report in reports], labels),
        "MAP@R": mean_figure([report["map_at_r"] for report in reports], labels),
        "coarse class right": mean_figure([distance <= 1 for distance in distances], labels),
        "near misses of the mistakes": figure([share(values) for values in near], labels),
        "mean distance": mean_figure(distances, labels),
    }


# ---- characters ----------------------------------------------------------------------------------------------------


def turned(source: Source, root: Path, out: Path) -> Source:
    """Every picture in four quarter turns, each an identity of its own; as files, so that any command reads them."""
    assert source.labels is not None
    paths, labels, characters = [], [], []
    for name, label in zip(source.names, source.labels, strict=True):
        for turn in (0, 90, 180, 270):
            path = out / f"{label}@{turn}" / Path(name).with_suffix(".png").name
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.open(name).convert("L").rotate(turn, expand=True).save(path)
            paths.append(str(path))
            labels.append(f"{label}@{turn}")
            characters.append(label)
    return Source(paths, labels, columns={"group": characters})


def alphabet_roles(characters: Sequence[str], fold: int, folds: int) -> list[str]:
    """Every `folds`-th alphabet is held out; its characters are halved into calibrate and test, the others train."""
    alphabets = sorted({name.partition("/")[0] for name in characters})
    if len(alphabets) < folds:
        raise SystemExit(f"{folds} folds of alphabets need as many folders ALPHABET/CHARACTER, got {alphabets}.")
    held = set(alphabets[fold::folds])
    inside = [name for name in characters if name.partition("/")[0] in held]
    halves = dict(zip(inside, split_by_group(inside, (0.0, 0.5, 0.5)).tolist(), strict=True))
    return [halves.get(name, "train") for name in characters]


@dataclass(frozen=True, eq=False)
class Probes:
    """What calibrated galleries answered to the enrolled and to strangers, with the character of each probe."""

    right: Any
    accepted: Any
    known: Any
    character: Any


def ask_gallery(found: Embeddings, characters: Any, roles: Any, options: argparse.Namespace) -> Probes:
    """Twice: half of the test characters are enrolled, the other half strangers; then the other way round."""
    tested, strangers = np.flatnonzero(roles == "test"), take(found, roles == "calibrate")
    if options.role == "calibrate":
        tested, strangers = np.flatnonzero(roles == "calibrate"), take(found, roles == "test")
    here, own = take(found, tested), characters[tested]
    halves = np.array(split_by_group(own.tolist(), (0.5, 0.0, 0.5)))
    assert here.labels is not None
    parts = []
    for half in ("train", "test"):  # of the roles' names only that there are two matters here
        enrolled = {label for label, side in zip(here.labels, halves, strict=True) if side == half}
        chosen = choose_templates(here.labels, enrolled, templates=options.templates, seed=0)
        probes = take(here, ~chosen)
        with (
            tempfile.TemporaryDirectory(prefix="embedlab-") as place,
            Gallery.create(Path(place) / "gallery", dim=here.vectors.shape[1]) as gallery,
        ):
            gallery.enroll(embeddings=take(here, chosen))
            gallery.calibrate(embeddings=strangers, fpir=options.fpir)
            answers = gallery.identify(embeddings=probes.vectors, k=1)
        assert probes.labels is not None
        right = np.array([answer.best == label for answer, label in zip(answers, probes.labels, strict=True)])
        accepted = np.array([answer.label is not None for answer in answers])
        known = np.array([label in enrolled for label in probes.labels])
        parts.append((right, accepted, known, own[~chosen]))
    return Probes(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def characters(options: argparse.Namespace) -> list[Table]:
    """The open-set promise on alphabets never trained on."""
    source = open_source(options.data)
    if source.labels is None:
        raise SystemExit(f"{options.data} has no labels: expected folders ALPHABET/CHARACTER with pictures.")
    drawings = turned(source, options.data, options.out / "images")
    owners = drawings.column("group")
    trials: dict[str, list[list[Probes]]] = {}  # by row, seed, fold
    seconds: dict[str, list[float]] = {}
    counts = []
    for fold in range(options.folds):
        manifest = options.out / f"fold{fold}.csv"
        write_split(manifest, drawings, alphabet_roles(owners, fold, options.folds))
        pictures = Pictures(manifest, options.out)
        whose = np.array(pictures.source.column("group"))
        by_row, times = encoders(options, pictures, manifest, f"fold{fold}-")
        counts.append([len(set(np.array(drawings.labels)[pictures.roles == role])) for role in ("calibrate", "test")])
        for kind, seeds in by_row.items():
            rows = trials.setdefault(kind, [[] for _ in seeds])
            for place, found in enumerate(seeds):
                rows[place].append(ask_gallery(found, whose, pictures.roles, options))
            seconds.setdefault(kind, []).extend(times[kind])
    strangers, others = (" + ".join(str(count[place]) for count in counts) for place in (1, 0))
    table = Table(
        f"{strangers} strangers, each enrolled in another gallery too; thresholds from {others} others, promised FPIR "
        f"{options.fpir:g}"
    )
    for kind, by_seed in trials.items():
        joined = [_joined(parts) for parts in by_seed]
        known, whose = joined[0].known, joined[0].character
        table.rows[kind] = {
            "closed set": mean_figure([found.right[known] for found in joined], whose[known]),
            "detection": mean_figure([(found.right & found.accepted)[known] for found in joined], whose[known]),
            "observed FPIR": mean_figure([found.accepted[~known] for found in joined], whose[~known]),
            "training, s": mean_seconds(seconds[kind]),
        }
    return [table]


def _joined(parts: Sequence[Probes]) -> Probes:
    names = Probes.__annotations__
    return Probes(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


# ---- defects -------------------------------------------------------------------------------------------------------


def read_tiles(root: Path) -> Source:
    """The index of the magnetic tiles."""
    with (root / "index.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return Source(
        [str(root / row["image"]) for row in rows],
        ["defect" if row["defect"] == "1" else "whole" for row in rows],
        columns={"group": [row["group_guess"] for row in rows]},
    )


def patches(encoder: Encoder, images: Any, stage: str = "layer2") -> torch.Tensor:
    """(N, P, F) features of every 2 x 2 places of one stage."""
    caught: list[torch.Tensor] = []
    hook = getattr(encoder.backbone.net, stage).register_forward_hook(  # type: ignore[union-attr]
        lambda _module, _inputs, output: caught.append(torch.nn.functional.avg_pool2d(output, 2, ceil_mode=True))
    )
    encoder.eval()
    with torch.no_grad():
        for start in range(0, len(images), 64):
            encoder(torch.from_numpy(images[start : start + 64]))
    hook.remove()
    return torch.cat(caught).flatten(2).transpose(1, 2)


def patch_scores(encoder: Encoder, normal: Any, images: Any, *, places: int = 10_000, seed: int = 0) -> Any:
    """How far the strangest place of an image is from the nearest place of any normal image.

    PatchCore (Roth et al. 2022, https://arxiv.org/abs/2106.08265) with places drawn at random for its bank, where the
    authors choose them greedily, with standardised features and cosines, and without the weight by neighbours.
    """
    bank, found = patches(encoder, normal).flatten(0, 1), patches(encoder, images)
    mean, spread = bank.mean(dim=0), bank.std(dim=0) + 1e-6
    order = torch.randperm(len(bank), generator=torch.Generator().manual_seed(seed))[:places]
    bank, found = (torch.nn.functional.normalize((part - mean) / spread, dim=-1) for part in (bank[order], found))
    return np.concatenate([(1 - (part @ bank.T).amax(dim=2)).amax(dim=1).numpy() for part in found.split(8)])


def vote(bank: Any, positive: Any, queries: Any, *, k: int = 20, temperature: float = 0.1) -> Any:
    """Share of the positive class among the k nearest, weighted as in Wu et al. 2018."""
    cosines = queries @ bank.T
    nearest = np.argsort(-cosines, axis=1)[:, : min(k, len(bank))]
    weights = np.exp(np.take_along_axis(cosines, nearest, axis=1) / temperature)
    return (weights * positive[nearest]).sum(axis=1) / weights.sum(axis=1)


@dataclass(frozen=True, eq=False)
class Decisions:
    """Scores of the test images and the threshold set on the calibrate images."""

    scores: Any
    threshold: float

    def figures(self, truth: Any) -> dict[str, Callable[[Any], float]]:
        """AUC, average precision, and F2 and MCC at the threshold, of any rows."""

        def decided(name: str) -> Callable[[Any], float]:
            return lambda rows: classification_report(self.scores[rows] >= self.threshold, truth[rows], beta=2)[name]

        return {
            "AUC": lambda rows: roc_auc(self.scores[rows], truth[rows]),
            "average precision": lambda rows: average_precision(self.scores[rows], truth[rows]),
            "F2": decided("f_beta"),
            "MCC": decided("mcc"),
        }


@dataclass(frozen=True, eq=False)
class Parts:
    """The pictures of parts, which have a defect, and which are for what."""

    pictures: Pictures
    positive: Any
    training: Any
    held: Any
    tested: Any

    def decide(self, scores: Any) -> Decisions:
        """Scores of all pictures, NaN where nobody asks, and the threshold."""
        return Decisions(scores[self.tested], best_threshold(scores[self.held], self.positive[self.held], beta=2))


def read_parts(options: argparse.Namespace) -> tuple[Path, Parts]:
    """A manifest with roles by group, and its pictures."""
    given = read_tiles(options.data) if (options.data / "index.csv").is_file() else open_source(options.data)
    if given.labels is None or "group" not in given.columns or options.positive not in given.labels:
        raise SystemExit(
            f"{options.data} needs the columns label (with --positive {options.positive} among them) and group; it has "
            f"{sorted(given.columns)} and the labels {sorted(set(given.labels or []))[:5]}."
        )
    roles = split_by_group(given.columns["group"], (0.5, 0.2, 0.3))
    if options.role == "calibrate":  # half of them sets the threshold for the other half
        given, roles = given.subset(roles != "test"), roles[roles != "test"]
        halves = split_by_group(given.columns["group"], (0.0, 0.5, 0.5), seed=1)
        roles = np.where(roles == "train", roles, halves)
    manifest = options.out / "parts.csv"
    write_split(manifest, given, roles)
    pictures = Pictures(manifest, options.out)
    positive = np.array(pictures.source.labels) == options.positive
    return manifest, Parts(pictures, positive, *(pictures.roles == role for role in ("train", "calibrate", "test")))


def defects(options: argparse.Namespace) -> list[Table]:
    """{from scratch, self-supervised start} x {cross entropy, focal}, beside what needs no fine-tuning."""
    manifest, parts = read_parts(options)
    rows: dict[str, list[Decisions]] = {}
    seconds: dict[str, list[float]] = {}
    for seed in options.seeds:
        encoder, took = train(options, "ssl", manifest, seed)
        seconds.setdefault("pre-training", []).append(took)
        for start in ("scratch", "self-supervised"):
            for loss in ("cross-entropy", "focal"):
                found, took = _finetuned(options, manifest, parts, seed, start, loss)
                rows.setdefault(f"{start}, {loss}", []).append(found)
                seconds.setdefault(f"{start}, {loss}", []).append(took)
        for kind, one in _unsupervised(parts, encoder, seed).items():
            if RAW not in kind or seed == options.seeds[0]:
                rows.setdefault(kind, []).append(one)
    owners, truth = np.array(parts.pictures.source.column("group"))[parts.tested], parts.positive[parts.tested]
    rows[f"always {options.positive}"] = [Decisions(np.ones(len(truth)), 0.5)]
    table = Table(
        f"{len(truth)} pictures of {len(set(owners))} groups, {truth.mean():.0%} positive; "
        f"pre-training {mean_seconds(seconds['pre-training'])} s"
    )
    for kind, seeds in rows.items():
        time = mean_seconds(seconds.get(kind, []))
        table.rows[kind] = _defects_row(seeds, truth, owners) | {"training, s": time}
    return [table]


def _unsupervised(parts: Parts, encoder: Encoder, seed: int) -> dict[str, Decisions]:
    """A vote of neighbours with labels, and the distance to what is normal."""
    kinds = {"self-supervised": encoder, **parts.pictures.baselines(encoder, seed)}
    found = {}
    for kind, other in kinds.items():
        vectors = parts.pictures.vectors(other).vectors
        scores = vote(vectors[parts.training], parts.positive[parts.training], vectors)
        found[f"k-NN, {kind}"] = parts.decide(scores)
    for kind in ("self-supervised", UNTRAINED):
        images = parts.pictures.images(kinds[kind])
        scores, asked = np.full(len(images), np.nan), parts.held | parts.tested
        scores[asked] = patch_scores(kinds[kind], images[parts.training & ~parts.positive], images[asked], seed=seed)
        found[f"nearest normal patch, {kind}"] = parts.decide(scores)
    return found


def _defects_row(seeds: list[Decisions], truth: Any, owners: Any) -> dict[str, Figure | str]:
    by_seed = [one.figures(truth) for one in seeds]
    return {name: figure([figures[name] for figures in by_seed], owners) for name in by_seed[0]}


def _finetuned(
    options: argparse.Namespace, manifest: Path, parts: Parts, seed: int, start: str, loss: str
) -> tuple[Decisions, float]:
    """`embedlab finetune`; the scores come from its predictions.csv."""
    encoder = options.out / "runs" / f"ssl-seed{seed}" / "encoder"
    begin = ["--encoder", encoder] if start == "self-supervised" else ["--scratch-like", encoder]
    folder = options.out / "runs" / f"{start}-{loss}-seed{seed}"
    arguments = ["finetune", manifest, *begin, "--split", "column", "--positive", options.positive, "--beta", 2]
    arguments += ["--loss", loss, "--steps", options.steps, "--seed", seed]
    arguments += ["--backbone-rate", 0.3, "--crop", 0.5, "--quarter-turn", 0.75, "--batch-size", 32]
    report = piece(folder, *arguments, reads=[manifest, encoder / "encoder.json"])
    with (folder / "predictions.csv").open(encoding="utf-8", newline="") as file:
        found = {row["path"]: float(row[f"probability_of_{options.positive}"]) for row in csv.DictReader(file)}
    wanted = np.array(parts.pictures.source.names)[parts.tested]
    return Decisions(np.array([found[name] for name in wanted]), report["threshold"]), report["seconds"]


# ---- the command ---------------------------------------------------------------------------------------------------

TABLES = {"faces": faces, "products": products, "characters": characters, "defects": defects}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; those that are not known here go to `embedlab fit`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("table", choices=list(TABLES))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--role", choices=["test", "calibrate"], default="test", help="whom the figures are of")
    parser.add_argument("--peer-seeds", type=int, help="seeds for pytorch-metric-learning's loss (default: all)")
    parser.add_argument("--folds", type=int, help="of people (4) or of alphabets (2)")
    parser.add_argument("--templates", type=int, default=3, help="enrolled pictures of an identity")
    parser.add_argument("--fpir", type=float, default=0.05, help="promised on characters")
    parser.add_argument("--positive", default="defect", help="the label of parts with a defect")
    parser.add_argument("--steps", type=int, default=1500, help="of fine-tuning on parts")
    options, options.more = parser.parse_known_args(arguments)
    options.folds = options.folds or {"faces": 4, "characters": 2}.get(options.table)
    options.data, options.out = options.data.absolute(), options.out.absolute()
    if not options.data.exists():
        parser.error(f"--data {options.data} does not exist.")
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def main(arguments: Sequence[str] | None = None) -> list[Table]:
    """Make one table, print it, and leave it in the folder as tables.md."""
    options = parse(arguments)
    tables = TABLES[options.table](options)
    text = "\n".join(map(str, tables))
    (options.out / "tables.md").write_text(text, encoding="utf-8")
    print(text)
    return tables


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"recipes.py: error: {error}")
