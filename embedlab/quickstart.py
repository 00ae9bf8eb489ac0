"""The guided first run: train an embedding, build a gallery, refuse strangers, move a backbone on to a new task.

Identities are printed characters of the DejaVu fonts that matplotlib ships; the new task is scikit-learn's handwritten
digits. Nothing is downloaded, and nothing beside the installed package is needed.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from embedlab import __version__
from embedlab._json import plain
from embedlab._types import Embeddings
from embedlab.data import ImageData, Source, Views, render_glyphs, split_glyphs
from embedlab.data.glyphs import Glyphs
from embedlab.encoders import Encoder, LinearHead, MLPHead, Pixels, ResNet
from embedlab.losses import SupConLoss
from embedlab.methods import Method, MetricLearning, SimCLR
from embedlab.methods.trainer import StepBar, fast_precision, quiet, trained_encoder
from embedlab.metrics import detection_identification_rate, knn_accuracy
from embedlab.retrieval import Gallery, OpenSetReport, evaluate_gallery
from embedlab.retrieval.calibration import refuse_if_unsupported
from embedlab.retrieval.evaluation import table
from embedlab.retrieval.open_set import choose_templates, halve_identities, open_set_trial, take
from embedlab.serving.pictures import REFUSED, RIGHT, WRONG, Decision, draw_decisions, draw_map
from embedlab.tasks import finetune

MARKER = ".embedlab-quickstart"  # a folder with this file is ours to empty
COPIES = 4  # distorted pictures of each training character in each style
TEMPLATES = 3  # enrolled pictures per identity
LABELS = (2, 10)  # labelled digits per class
STILL = Views(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0, jitter=0.0, grayscale=0.0)
DIGIT_VIEWS = Views(crop_ratio=(0.8, 1.25), flip=0.0, brightness=0.3, contrast=0.3, grayscale=0.0, pad="zeros")
PRETRAIN_VIEWS = replace(DIGIT_VIEWS, count=2, crop_scale=(0.4, 1.0), degrees=20.0, shear=0.3, translate=0.1, erase=0.5)
FINETUNE_VIEWS = replace(DIGIT_VIEWS, crop_scale=(0.6, 1.0), degrees=15.0, shear=0.2, translate=0.06)


@dataclass
class Run:
    """What the phases share.

    Args:
        out: The folder.
        seed: Of everything random.
        fpir: Promised false-positive identification rate.
        effort: Share of the training steps.
    """

    out: Path
    seed: int
    fpir: float
    effort: float
    seconds: dict[str, float] = field(default_factory=dict)

    def steps(self, full: int) -> int:
        """Steps at this effort."""
        return max(2, round(full * self.effort))

    @contextmanager
    def phase(self, name: str, told: str) -> Iterator[None]:
        """Say what happens and time it."""
        sys.stderr.write(f"\n{told}\n")
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 1)


def run(out: Path, *, seed: int = 0, fpir: float = 0.05, effort: float = 1.0) -> dict[str, Any]:
    """Run it all; returns the report, whose `text` is the table.

    Args:
        out: Folder for encoder/, gallery/, report.json and pictures; an earlier quickstart there, whole or broken off,
            is replaced.
        seed: Of everything random.
        fpir: Promised false-positive identification rate.
        effort: Share of the training steps; figures at less than 1 mean nothing.
    """
    if effort <= 0:
        raise ValueError(f"effort is a share of the training steps above 0, got {effort}.")
    if not 0 < fpir < 1:
        raise ValueError(f"fpir lies between 0 and 1, got {fpir}; 5 % is 0.05.")
    quiet()
    job = Run(_prepare(out), seed, fpir, effort)
    with job.phase("characters", "[1/6] Draw the printed characters of twelve font styles, each picture distorted"):
        glyphs = render_glyphs(seed=seed, copies=COPIES)
        split = split_glyphs(glyphs, seed)
        calibrate, test = (_first_copies(part) for part in (split.calibrate, split.test))
    refuse_if_unsupported(_identities(calibrate), len(calibrate), fpir)  # before minutes of training
    with job.phase("training", f"[2/6] Train on {_identities(split.train)} characters by supervised contrastive loss"):
        headed = _train_characters(job, split.train)
    with job.phase("choice", f"[3/6] Choose the gallery's layer on {_identities(calibrate)} other characters"):
        encoder, layer = _choose_layer(job, headed, calibrate)
        encoder.save(job.out / "encoder")
    with job.phase(
        "gallery", f"[4/6] Enroll half of {_identities(test)} characters of alphabets never seen, probe with all"
    ):
        trials, removal = _gallery(job, encoder, split.train, calibrate, test)
    with job.phase(
        "transfer", "[5/6] Pre-train on handwritten digits without labels, fine-tune with 2 and 10 labels a digit"
    ):
        transfer = _transfer(job)
    report = _report(job, layer, trials, removal, transfer)
    with job.phase("pictures", "[6/6] Draw the decisions and a map of the embedding"):
        _pictures(job, encoder, test)
    report["seconds"]["pictures"] = job.seconds["pictures"]
    report["seconds"]["total"] = round(sum(job.seconds.values()), 1)
    (job.out / "report.json").write_text(json.dumps(plain(report), indent=1, ensure_ascii=False), encoding="utf-8")
    return {**report, "out": str(out), "text": _text(report, out, encoder)}


# ---- phases --------------------------------------------------------------------------------------------------------


def _prepare(out: Path) -> Path:
    """An empty folder with our marker; what an earlier run left there is removed, anything else refused."""
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / MARKER).is_file()):
        raise ValueError(f"{out} exists and holds no quickstart; choose another folder by --out.")
    for name in ("encoder", "gallery"):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in ("report.json", "decisions.png", "map.png"):
        (out / name).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).write_text("embedlab quickstart may empty this folder\n", encoding="utf-8")
    return out


def _train_characters(job: Run, glyphs: Glyphs) -> Encoder:
    torch.manual_seed(job.seed)
    method = MetricLearning(
        _backbone(),
        LinearHead(128),
        loss=SupConLoss(0.1),
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=8e-3, betas=(0.9, 0.99), weight_decay=0.05),
    )
    data = ImageData(
        Source.from_arrays(glyphs.images, glyphs.labels),
        image_size=32,
        channels=1,
        mean=[0.3],
        std=[0.25],
        split="none",
        batch_size=256,
        images_per_class=4,
        views=STILL,
        seed=job.seed,
    )
    _train(method, data, job.steps(1500), "characters")
    return trained_encoder(method, data).eval()


def _backbone() -> ResNet:
    """Three stages, half width, one channel: the network of both halves."""
    return ResNet("resnet8", stem="medium", width=0.5, in_channels=1)


def _train(method: Method, data: ImageData, steps: int, told: str) -> None:
    trainer = pl.Trainer(
        max_steps=steps,
        precision=fast_precision(),
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        callbacks=[StepBar(told)],
    )
    trainer.fit(method, datamodule=data)
    method.cpu()


def _choose_layer(job: Run, headed: Encoder, glyphs: Glyphs) -> tuple[Encoder, str]:
    """Backbone features or head, by detection at equal FPIR among identities that are neither trained on nor tested."""
    backbone = Encoder(headed.backbone, identities=headed.identities, **headed.preprocessing).eval()
    candidates = {"head": headed, "backbone": backbone}
    enrolled, _ = halve_identities(glyphs.labels, seed=job.seed)
    chosen = choose_templates(glyphs.labels, enrolled, templates=TEMPLATES, seed=job.seed)
    rates = {}
    for name, encoder in candidates.items():
        found = _embed(encoder, glyphs)
        templates, probes = take(found, chosen), take(found, ~chosen)
        scores = probes.vectors @ templates.vectors.T
        nearest = [templates.labels[row] for row in scores.argmax(axis=1)]  # type: ignore[index]
        right = np.array(nearest) == np.array(probes.labels)
        known = np.array([label in enrolled for label in probes.labels or ()])
        rates[name] = detection_identification_rate(scores.max(axis=1), right, known, fpir=job.fpir)
    best = max(rates, key=lambda name: rates[name])
    return candidates[best], best


def _gallery(
    job: Run, encoder: Encoder, train: Glyphs, calibrate: Glyphs, test: Glyphs
) -> tuple[dict[str, OpenSetReport], dict[str, Any]]:
    enrolled, _ = halve_identities(test.labels, seed=job.seed)
    chosen = choose_templates(test.labels, enrolled, templates=TEMPLATES, seed=job.seed)
    templates, probes = test.take(np.flatnonzero(chosen)), test.take(np.flatnonzero(~chosen))
    with Gallery.create(job.out / "gallery", encoder, thumbnails=True) as gallery:
        gallery.enroll(images=_pixels(templates), labels=templates.labels, metadata=_styles(templates))
        gallery.calibrate(images=_pixels(calibrate), labels=list(calibrate.labels), fpir=job.fpir)
        trials = {"trained": evaluate_gallery(gallery, _embed(encoder, probes))}
        removal = _remove_and_enroll(gallery, templates, probes)
    settling = torch.from_numpy(_pixels(train)[:: max(1, len(train) // 2048)])
    baselines = {
        "raw pixels": Encoder(Pixels(32, in_channels=1), **encoder.preprocessing).eval(),
        "untrained": encoder.untrained(settling, seed=job.seed),
    }
    for name, baseline in baselines.items():
        parts = (_embed(baseline, part) for part in (templates, probes, calibrate))
        trials[name] = open_set_trial(*parts, fpir=job.fpir)
    return trials, removal


def _remove_and_enroll(gallery: Gallery, templates: Glyphs, probes: Glyphs) -> dict[str, Any]:
    """Take out the identity that is named most often, look at its pictures again, and enroll it anew."""
    answers = gallery.identify(images=_pixels(probes), k=1)
    named = [answer.label for answer, label in zip(answers, probes.labels, strict=True) if answer.label == label]
    names, counts = np.unique(np.array(named or [templates.labels[0]]), return_counts=True)
    name = str(names[counts.argmax()])
    pictures = _pixels(probes.take(np.flatnonzero(np.array(probes.labels) == name)))
    own = templates.take(np.flatnonzero(np.array(templates.labels) == name))

    def said() -> list[str | None]:
        return [answer.label for answer in gallery.identify(images=pictures, k=1)]

    before = said()
    gallery.remove(labels=[name])
    removed = said()
    gallery.enroll(images=_pixels(own), labels=own.labels, metadata=_styles(own))
    again = said()
    return {
        "identity": name,
        "pictures": len(pictures),
        "named_before": sum(label == name for label in before),
        "named_while_removed": sum(label == name for label in removed),
        "unknown_while_removed": sum(label is None for label in removed),
        "named_after_enrolling_again": sum(label == name for label in again),
    }


def _transfer(job: Run) -> dict[str, Any]:
    """SimCLR on two thirds of the digits, fine-tuning with few labels; everything is tested on the last third."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images / 16 * 255).astype(np.uint8)
    labels = [str(target) for target in digits.target]
    found: dict[str, dict[int, list[float]]] = {
        name: {n: [] for n in LABELS} for name in ("finetuned", "scratch", "raw")
    }
    for seed in range(job.seed, job.seed + 3):
        data = _digits(images, labels, seed)
        torch.manual_seed(seed)
        method = SimCLR(
            _backbone(),
            MLPHead(64),
            temperature=0.5,
            optimizer=lambda groups: torch.optim.AdamW(groups, lr=4e-3, weight_decay=0.05),
            warmup=0.05,
        )
        data.views = PRETRAIN_VIEWS
        _train(method, data, job.steps(400), f"digits without labels, seed {seed}")
        pretrained = Encoder(method.backbone, **data.preprocessing)  # type: ignore[arg-type]
        scratch = pretrained.untrained(seed=seed)
        for number in LABELS:
            for name, start, rate in (("finetuned", pretrained, 0.03), ("scratch", scratch, 0.3)):
                few = _digits(images, labels, seed, labels_per_class=number)
                few.views = replace(FINETUNE_VIEWS, count=max(1, 64 // (10 * number)))  # some 64 views per step
                figures = finetune(few, start, steps=job.steps(60), backbone_rate=rate, seed=seed, progress=False)
                found[name][number].append(float(figures["accuracy"]))
            found["raw"][number].append(_raw_pixels(few))
    return {
        name: {
            str(number): {"mean": float(np.mean(v)), "sd": float(np.std(v, ddof=1)), "seeds": v}
            for number, v in by.items()
        }
        for name, by in found.items()
    }


def _digits(images: np.ndarray, labels: list[str], seed: int, *, labels_per_class: int | None = None) -> ImageData:
    return ImageData(
        Source.from_arrays(images, labels),
        image_size=16,
        channels=1,
        mean=[0.3],
        std=[0.35],
        split="sample",
        fractions=(2 / 3, 0.0, 1 / 3),
        labels_per_class=labels_per_class,
        batch_size=128 if labels_per_class is None else min(64, 10 * labels_per_class),
        seed=seed,
    )


def _raw_pixels(data: ImageData) -> float:
    """1-nearest-neighbour on the pixels, with the same labelled images."""
    sets = {}
    for role in ("train", "test"):
        dataset = data.dataset(role)
        batch = dataset[list(range(len(dataset)))]
        sets[role] = (data.plain(batch.views[0]).flatten(1).numpy(), dataset.labels)
    return knn_accuracy(*sets["train"], *sets["test"], k=1)


def _pictures(job: Run, encoder: Encoder, test: Glyphs) -> None:
    """Probes with neighbours and decision, some right, some wrong, some refused; and a map of the test characters."""
    picture = {(label, style): image for label, style, image in zip(test.labels, test.styles, test.images, strict=True)}
    with Gallery.open(job.out / "gallery", encoder, read_only=True) as gallery:
        enrolled = set(gallery.labels())
        notes = gallery.metadata()
        named = gallery.embeddings()
        used = {(label, notes[key]["style"]) for key, label in zip(named.ids.tolist(), named.labels or [], strict=True)}
        rows = [row for row in range(len(test)) if (test.labels[row], test.styles[row]) not in used]
        probes = test.take(np.array(rows))
        answers = gallery.identify(images=_pixels(probes), k=5)
    groups: dict[str, list[Decision]] = {}
    for row in np.random.default_rng(job.seed).permutation(len(probes)):
        label, answer = probes.labels[row], answers[row]
        kind = _kind(label, answer.label, known=label in enrolled)
        color = RIGHT if kind in ("right", "stranger refused") else REFUSED if kind == "refused" else WRONG
        near = [
            (picture[name, notes[key]["style"]], f"{_letter(name)} {score:.2f}")
            for key, name, score in zip(
                answer.neighbours.ids[0].tolist(), answer.neighbours.labels[0], answer.neighbours.scores[0], strict=True
            )
            if name is not None
        ]
        groups.setdefault(kind, []).append(Decision(probes.images[row], f"{kind}: {_letter(label)}", color, near))
    kinds = ("right", "wrong name", "refused", "stranger refused", "stranger accepted")
    sheet = [decision for kind in kinds for decision in groups.get(kind, [])[:4]]
    title = (
        "Probe (framed) and its nearest templates with their cosine; green: as it should be, red: wrong, grey: refused"
    )
    draw_decisions(job.out / "decisions.png", sheet, title=title)
    shown = np.flatnonzero(np.array(test.styles) == "Sans")
    sample = test.take(np.concatenate([shown, np.flatnonzero(np.array(test.styles) == "Serif-Bold")]))
    draw_map(
        job.out / "map.png",
        _embed(encoder, sample).vectors,
        sample.images,
        sample.scripts,
        title="Characters of alphabets never trained on, by t-SNE of their embeddings; two font styles each",
        seed=job.seed,
    )


# ---- telling -------------------------------------------------------------------------------------------------------


def _report(
    job: Run, layer: str, trials: dict[str, OpenSetReport], removal: dict[str, Any], transfer: dict[str, Any]
) -> dict[str, Any]:
    trained = trials["trained"]
    means = {name: {number: row["mean"] for number, row in by.items()} for name, by in transfer.items()}
    baselines = {name.replace(" ", "_"): trials[name].to_dict() for name in ("raw pixels", "untrained")}
    baselines["raw_pixels"]["digits_accuracy"] = means["raw"]
    return {
        "seed": job.seed,
        "effort": job.effort,
        "versions": _versions(),
        "hardware": {
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
            "precision": fast_precision(),
        },
        "seconds": dict(job.seconds),
        "layer": layer,
        "closed_set_accuracy": trained.closed_set_accuracy,
        "detection_rate": trained.detection_rate,
        "target_fpir": trained.target_fpir,
        "observed_fpir": trained.observed_fpir,
        "threshold": trained.threshold,
        "intervals": trained.intervals,
        "open_set": trained.to_dict(),
        "unknown_after_removal": removal["unknown_while_removed"] / max(1, removal["pictures"]),
        "removal": removal,
        "finetuned_accuracy": means["finetuned"],
        "scratch_accuracy": means["scratch"],
        "transfer": transfer,
        "baselines": baselines,
    }


def _versions() -> dict[str, str]:
    names = ("torch", "torchvision", "pytorch-lightning", "faiss-cpu", "scikit-learn", "matplotlib", "numpy")
    found = {"embedlab": __version__, "python": platform.python_version()}
    return found | {name: importlib.metadata.version(name) for name in names}


def _text(report: dict[str, Any], out: Path, encoder: Encoder) -> str:
    trained = report["open_set"]
    columns = ["closed_set_accuracy", "detection_rate", "observed_fpir"]
    rows = {
        "trained": trained,
        "raw pixels": report["baselines"]["raw_pixels"],
        "untrained": report["baselines"]["untrained"],
    }
    low, high = trained["intervals"]["observed_fpir"]
    removal = report["removal"]
    transfer = {
        name: {f"{number} labels a digit": f"{row['mean']:.3f} ± {row['sd']:.3f}" for number, row in by.items()}
        for name, by in report["transfer"].items()
    }
    told = {
        "finetuned": "pre-trained without labels, then fine-tuned",
        "scratch": "the same network from scratch",
        "raw": "1-nearest-neighbour on raw pixels",
    }
    lines = [
        f"{trained['enrolled']} characters enrolled with {TEMPLATES} pictures each, {trained['genuine_probes']} other "
        f"pictures of them, {trained['stranger_probes']} of {trained['strangers']} strangers",
        "",
        table(rows, columns),
        "",
        f"promised: at most {trained['target_fpir']:.1%} of strangers accepted; observed: "
        f"{trained['observed_fpir']:.1%} [{low:.1%}, {high:.1%}]  (threshold {trained['threshold']:.3f}, set on "
        f"{trained['calibration_strangers']} others)",
        f"removed {removal['identity']}: {removal['unknown_while_removed']} of its {removal['pictures']} pictures "
        f"unknown ({removal['named_before']} named before, {removal['named_after_enrolling_again']} after enrolling "
        "it again)",
        "",
        "handwritten digits, test accuracy over three seeds".ljust(52)
        + "   ".join(f"{number:2d} labels a digit" for number in LABELS),
    ]
    lines += [
        told[name].ljust(52) + "   ".join(value.ljust(17) for value in by.values()) for name, by in transfer.items()
    ]
    lines += [
        "",
        f"{report['seconds']['total']:.0f} s in all. {out}/ holds encoder/ ({encoder.dim} numbers per image), "
        "gallery/, report.json, decisions.png, map.png",
        f"Next: embedlab gallery info {out}/gallery",
    ]
    return "\n".join(lines)


def _kind(label: str, said: str | None, *, known: bool) -> str:
    if known:
        return "right" if said == label else "refused" if said is None else "wrong name"
    return "stranger refused" if said is None else "stranger accepted"


def _letter(label: str | None) -> str:
    """The character behind "U+0416 CYRILLIC ..."."""
    return chr(int(label.split()[0][2:], 16)) if label else "-"


def _first_copies(glyphs: Glyphs) -> Glyphs:
    return glyphs.take(np.arange(0, len(glyphs), COPIES))


def _identities(glyphs: Glyphs) -> int:
    return len(set(glyphs.labels))


def _pixels(glyphs: Glyphs) -> np.ndarray:
    return glyphs.images[:, None]


def _styles(glyphs: Glyphs) -> list[dict[str, Any]]:
    return [{"style": style} for style in glyphs.styles]


def _embed(encoder: Encoder, glyphs: Glyphs) -> Embeddings:
    found = encoder.embed(_pixels(glyphs))
    return Embeddings(found.vectors, glyphs.labels, found.ids)
