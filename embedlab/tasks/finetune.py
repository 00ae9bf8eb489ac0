"""Fine-tuning as one call: a saved encoder and labelled images to a classifier with its figures."""

from __future__ import annotations

import contextlib
import copy
import csv
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from torch import nn

from embedlab._json import plain
from embedlab._machine import processor_name, versions
from embedlab.data import ImageData, Source, Views, write_split
from embedlab.data.images import available_cores
from embedlab.data.sources import refuse_gaps
from embedlab.encoders import Encoder
from embedlab.methods.trainer import SaveEncoder, StepBar, fast_precision, quiet
from embedlab.metrics import (
    best_threshold,
    bootstrap_interval,
    bootstrap_statistic,
    classification_report,
    told_interval,
)
from embedlab.tasks.classification import Classification


def finetune(
    data: ImageData,
    encoder: Encoder,
    *,
    steps: int = 300,
    rate: float = 1e-2,
    backbone_rate: float = 0.03,
    weight_decay: float = 0.05,
    classifier: Literal["linear", "cosine"] = "cosine",
    loss: nn.Module | None = None,
    freeze: bool = False,
    precision: Literal["32-true", "bf16-mixed"] | None = None,
    positive: str | None = None,
    beta: float = 1.0,
    seed: int = 0,
    run: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train a classifier on a copy of the encoder's backbone and test it on the data's test role.

    Args:
        data: Labelled images with roles; mean, std and size as the encoder's (see `Encoder.preprocessing`).
        encoder: Where the backbone comes from; it stays as it is.
        steps: Optimizer steps.
        rate: Learning rate of the classifier, AdamW.
        backbone_rate: The backbone's, as a share of `rate`.
        weight_decay: Of AdamW.
        classifier: See `Classification`.
        loss: See `Classification`.
        freeze: Train the classifier only.
        precision: Of the network in training and test; None takes bf16-mixed where the hardware is fast at it.
        positive: Of two classes, the one that precision, recall, F1 and so on are about; None takes the mean over all
            classes, each against the rest. Where images have the role calibrate, the positive class is decided at the
            threshold with the best F-beta on these; without them at one half.
        beta: Weight of recall against precision in f_beta; 2 for missed defects that cost more than false alarms.
        seed: Of the classifier's weights.
        run: Folder for report.json, predictions.csv, encoder/ and checkpoints/; None keeps nothing. In predictions.csv
            `probability` is that of the class that was predicted; with `positive` it is `probability_of_LABEL`, that
            of the positive class, which the threshold decides by.
        progress: Show bars.

    Returns:
        The figures of the last step on the test role, with the protocol that made them. `intervals` are 95 %, by
        resampling the images, or the groups where the source has a column `group`; draws of one class only are left
        out. Where no draw differs from another, as where all is right, that of the accuracy is `wilson_interval` with
        images or groups as trials, and other figures have None; so have those that too few draws define.

    Raises:
        ValueError: No image to test on, a test image without a group where the source has groups, or `positive` for
            data that has not two classes with that one among them.
    """
    if positive is not None:
        data.setup()
        if (count := len(data.class_names)) != 2:
            raise ValueError(
                f"positive is for data of two classes; this has {count}, such as {data.class_names[:5]}, and got "
                f"positive {positive!r}. Leave it out for figures that are means over all classes."
            )
        if positive not in data.class_names:
            raise ValueError(f"positive names one of two classes; the data has {data.class_names}, got {positive!r}.")
    data.setup()
    if not (data.roles == "test").any():
        raise ValueError(f"Nothing to test on: no image has the role test (split {data.split}).")
    _owners(data, np.flatnonzero(data.roles == "test"))  # an error now, not after the work
    quiet()
    precision = precision or fast_precision()
    torch.manual_seed(seed)
    model = Classification(
        copy.deepcopy(encoder.backbone),
        classifier=classifier,
        loss=loss,
        freeze=freeze,
        backbone_rate=backbone_rate,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=rate, weight_decay=weight_decay),
    )
    model.start_from(encoder)
    trainer = pl.Trainer(
        max_steps=steps,
        devices=1,
        precision=precision,
        logger=False,
        enable_checkpointing=run is not None,
        callbacks=[
            *([StepBar("fine-tune")] if progress else []),
            *([SaveEncoder(Path(run) / "encoder")] if run else []),
        ],
        default_root_dir=run,
        enable_model_summary=False,
        enable_progress_bar=progress,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    started = time.perf_counter()
    trainer.fit(model, datamodule=data)
    seconds = time.perf_counter() - started
    device = trainer.strategy.root_device
    trainer.test(model, datamodule=data, verbose=False)
    probabilities, targets, rows = model.predictions()
    threshold = None if positive is None else _threshold(model, data, positive, beta, precision)
    predicted = _decided(probabilities, data, positive, threshold)
    names = np.array(data.class_names)
    report: dict[str, Any] = {
        **classification_report(
            names[predicted],
            names[targets],
            scores=_scores(probabilities, data, positive),
            positive=positive,
            beta=beta,
            classes=data.class_names,
        ),
        "positive": positive,
        "beta": beta,
        "threshold": threshold,
        "threshold_from": None if threshold is None else "calibrate" if (data.roles == "calibrate").any() else "half",
        "intervals": _intervals(probabilities, predicted, targets, _owners(data, rows), data, positive, beta),
        "test_images": len(targets),
        "train_images": len(data.dataset("train")),
        "classes": data.class_names,
        "path": None if isinstance(data.root, Source) else str(data.root),
        "select": data.select,
        "split": data.split,
        "fractions": None if data.split in ("column", "none") else data.fractions,
        "split_seed": data.seed,
        "labels_per_class": data.labels_per_class,
        "on_error": data.on_error,
        "skipped_images": _skipped(data, rows),
        "views": asdict(data.views) if isinstance(data.views, Views) else str(data.views),
        "batch_size": data.batch_size,
        "steps": steps,
        "seed": seed,
        "freeze": freeze,
        "classifier": classifier,
        "rate": rate,
        "backbone_rate": backbone_rate,
        "weight_decay": weight_decay,
        "loss": type(model.loss).__name__,
        "trainer_precision": precision,
        "encoder": encoder.fingerprint,
        "seconds": round(seconds, 2),
        "epoch": "last",
        "versions": versions("torch", "torchvision", "pytorch-lightning", "numpy", "pillow"),
        "hardware": {
            "processor": processor_name(),
            "cores": available_cores(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        },
    }
    if run is not None and trainer.is_global_zero:
        _write(Path(run), report, data, probabilities, predicted, targets, rows)
    return report


def _scores(probabilities: np.ndarray, data: ImageData, positive: str | None) -> np.ndarray:
    """What the AUC is of: the positive class's probability, or every class's."""
    return probabilities if positive is None else probabilities[:, data.class_names.index(positive)]


def _threshold(model: Classification, data: ImageData, positive: str, beta: float, precision: str) -> float:
    """The positive class's probability from which on it is decided for."""
    if not (data.roles == "calibrate").any():
        return 0.5
    dataset = data.dataset("calibrate")
    parts, labels = [], []
    model.eval()
    with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
        for start in range(0, len(dataset), data.batch_size):
            batch = dataset[list(range(start, min(start + data.batch_size, len(dataset))))].to(model.device)
            parts.append(model(data.plain(batch.views[0])).float().softmax(dim=1).cpu().numpy())
            assert batch.labels is not None
            labels.append(batch.labels.cpu().numpy())  # of those that could be read
    number = data.class_names.index(positive)
    return best_threshold(np.concatenate(parts)[:, number], np.concatenate(labels) == number, beta=beta)


def _skipped(data: ImageData, tested: np.ndarray) -> list[str]:
    """Images that could not be read, as far as this process knows: of those trained on, only if they were held."""
    assert data.source is not None
    lost = np.setdiff1d(np.flatnonzero(data.roles == "test"), tested)
    others = [
        name for role in ("train", "calibrate") if (data.roles == role).any() for name in data.dataset(role).skipped
    ]
    return list(dict.fromkeys([*others, *(data.source.names[row] for row in lost)]))


def _decided(probabilities: np.ndarray, data: ImageData, positive: str | None, threshold: float | None) -> np.ndarray:
    """(N,) class numbers."""
    if positive is None or threshold is None:
        return np.asarray(probabilities.argmax(axis=1))
    number = data.class_names.index(positive)
    return np.where(probabilities[:, number] >= threshold, number, 1 - number)


def _owners(data: ImageData, rows: np.ndarray) -> np.ndarray:
    """Whose rows they are: groups where the source knows them, else every image is its own."""
    assert data.source is not None
    if "group" not in data.source.columns:
        return rows
    groups = [data.source.columns["group"][row] for row in rows]
    refuse_gaps(groups, "group", [data.source.names[row] for row in rows])
    return np.array(groups)


def _intervals(
    probabilities: np.ndarray,
    predicted: np.ndarray,
    targets: np.ndarray,
    owners: np.ndarray,
    data: ImageData,
    positive: str | None,
    beta: float,
) -> dict[str, tuple[float, float] | None]:
    """By name; of many classes only the accuracy, whose bootstrap is cheap."""
    if len(set(owners.tolist())) < 2:
        return {}
    right = (predicted == targets).astype(float)
    found = {"accuracy": told_interval(bootstrap_interval(right, owners), owners, share=float(right.mean()))}
    if positive is None:
        return found
    number = data.class_names.index(positive)
    scores, guess, truth = probabilities[:, number], predicted == number, targets == number
    for name in ("auc", "average_precision", "f_beta", "mcc"):

        def figure(rows: np.ndarray, name: str = name) -> float:
            if truth[rows].all() or not truth[rows].any():
                return float("nan")
            return classification_report(guess[rows], truth[rows], scores=scores[rows], beta=beta)[name]

        found[name] = None
        with contextlib.suppress(ValueError):  # too few groups with a positive
            found[name] = told_interval(bootstrap_statistic(figure, owners), owners)
    return found


def _write(
    run: Path,
    report: dict[str, Any],
    data: ImageData,
    probabilities: np.ndarray,
    predicted: np.ndarray,
    targets: np.ndarray,
    rows: np.ndarray,
) -> None:
    assert data.source is not None
    write_split(run / "split.csv", data.source, data.roles)
    (run / "report.json").write_text(json.dumps(plain(report), indent=1), encoding="utf-8")
    with (run / "predictions.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        positive = report["positive"]
        writer.writerow(["path", "label", "predicted", f"probability_of_{positive}" if positive else "probability"])
        for number, row in enumerate(rows):
            label, guess = data.class_names[targets[number]], data.class_names[predicted[number]]
            told = probabilities[number, data.class_names.index(positive) if positive else predicted[number]]
            writer.writerow([data.source.names[row], label, guess, f"{told:.6f}"])
