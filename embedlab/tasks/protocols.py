"""What a frozen or pre-trained backbone is worth: weighted k-NN, linear probe, fine-tuning with few labels."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Sequence
from typing import Any, Literal, get_args

import numpy as np

from embedlab.data import ImageData, Source, Views
from embedlab.data.images import OnError
from embedlab.encoders import Encoder
from embedlab.metrics import fit_linear_probe, knn_accuracy
from embedlab.tasks.finetune import finetune

Protocol = Literal["knn", "linear", "low-shot"]
_OF_TUNING = ("accuracy", "train_images", "rate", "backbone_rate", "classifier", "loss", "trainer_precision")


def evaluate_backbone(
    encoder: Encoder,
    train: Source,
    test: Source,
    *,
    protocols: Collection[Protocol] = get_args(Protocol),
    k: Sequence[int] = (200, 20),
    temperature: float = 0.1,
    shares: Sequence[float] = (0.01, 0.1),
    seeds: Sequence[int] = (0, 1, 2),
    steps: int = 300,
    flip: float = 0.5,
    batch_size: int = 128,
    precision: Literal["float32", "bfloat16"] = "float32",
    on_error: OnError = "stop",
    progress: bool = True,
) -> dict[str, Any]:
    """Test accuracy of an encoder's backbone by the usual protocols; the head, if there is one, is left behind.

    `knn` is the weighted vote of Wu et al. 2018 and `linear` the logistic regression of `fit_linear_probe`, both on
    backbone features of one plain view, of unit length. `low-shot` fine-tunes the whole network by `finetune` with a
    share of the labels, at least one image of each class, and tests its last step. Seeds choose the rows that set the
    probe's penalty, the labels that are kept, and the classifier's start; the k-NN has nothing to draw.

    Args:
        encoder: As left by `embedlab fit`, which saves the weights of the last epoch.
        train: Labelled images.
        test: Labelled images, none of which is in `train`.
        protocols: Which ones.
        k: Voters of the k-NN, a figure each.
        temperature: Of the k-NN's weights.
        shares: Of the labels, in (0, 1].
        seeds: Mean and standard deviation are over these.
        steps: Of fine-tuning.
        flip: Probability of a left-right flip in fine-tuning; 0 for text.
        batch_size: Images per forward pass of the features.
        precision: Of the features.
        on_error: What an unreadable image does.
        progress: Show bars.

    Returns:
        `knn`, `linear` and `low-shot`, as far as asked for, and `protocol` with all that made them.

    Raises:
        ValueError: No labels, test classes or images that do not fit the training set, a setting out of range.
    """
    _check(train, test, protocols, shares, seeds)
    started = time.perf_counter()
    result: dict[str, Any] = {}
    if {"knn", "linear"} & set(protocols):
        backbone = Encoder(encoder.backbone, **encoder.preprocessing).to(encoder.mean.device)
        parts = [
            backbone.embed(part, batch_size=batch_size, precision=precision, on_error=on_error, progress=progress)
            for part in (train, test)
        ]
        sets = [found for part in parts for found in (part.vectors, part.labels)]
        if "knn" in protocols:
            result["knn"] = [
                {
                    "k": number,
                    "temperature": temperature,
                    "accuracy": knn_accuracy(*sets, k=number, temperature=temperature),
                }
                for number in k
            ]
        if "linear" in protocols:
            result["linear"] = _linear(sets, seeds)
    if "low-shot" in protocols:
        result["low-shot"] = []
        for share in shares:
            runs = []
            for seed in seeds:
                data = _few_labels(encoder, train, test, share, seed, flip=flip, on_error=on_error)
                report = finetune(data, encoder, steps=steps, seed=seed, progress=progress)
                runs.append({"seed": seed, **{name: report[name] for name in _OF_TUNING}})
            result["low-shot"].append({"share": share, **_over_seeds(runs)})
    result["protocol"] = {
        "encoder": encoder.fingerprint,
        "architecture": encoder.architecture["backbone"],
        "preprocessing": encoder.preprocessing,
        "features": "backbone, one plain view, unit length; standardised for the probe",
        "feature_dim": int(encoder.backbone.out_features),  # type: ignore[arg-type]
        "epoch": "last",
        "train_images": len(train),
        "test_images": len(test),
        "classes": len(set(train.labels or ())),
        "seeds": list(seeds),
        "precision": precision,
        "steps": steps,
        "flip": flip,
        "seconds": round(time.perf_counter() - started, 2),
    }
    return result


def _check(
    train: Source, test: Source, protocols: Collection[str], shares: Sequence[float], seeds: Sequence[int]
) -> None:
    unknown = sorted(set(protocols) - set(get_args(Protocol)))
    if unknown or not protocols:
        raise ValueError(f"protocols are {', '.join(get_args(Protocol))}; got {unknown[0] if unknown else 'none'!r}.")
    if any(not 0 < share <= 1 for share in shares):
        raise ValueError(f"shares of the labels are in (0, 1], got {list(shares)}; 1 % is 0.01.")
    if not seeds:
        raise ValueError("Low-shot and linear figures are means over seeds, and none was given.")
    _check_sets(train, test)


def _check_sets(train: Source, test: Source) -> None:
    if train.labels is None or test.labels is None:
        raise ValueError("The protocols compare labels: training and test images both need them.")
    unseen = sorted(set(test.labels) - set(train.labels))
    if unseen:
        raise ValueError(
            f"{len(unseen)} test classes have no training image, first {unseen[0]!r}: two folders of different layout? "
            "A class is named by its folder relative to the one given. For classes never seen, use 'embedlab evaluate' "
            "without --protocol."
        )
    shared = {os.path.realpath(name) for name in train.names} & {os.path.realpath(name) for name in test.names}
    if shared and train.pixels is test.pixels:
        raise ValueError(
            f"{len(shared)} images are in both the training and the test set, first {min(shared)}: the figure would be "
            "of what was learned by heart. Choose disjoint folders, or rows by --select and --reference-select."
        )


def _linear(sets: list[Any], seeds: Sequence[int]) -> dict[str, Any]:
    train, train_labels, test, test_labels = sets
    runs: list[dict[str, Any]] = []
    for seed in seeds:
        probe = fit_linear_probe(train, train_labels, seed=seed)
        right = probe.predict(test) == np.asarray(test_labels)
        runs.append({"seed": seed, "accuracy": float(right.mean()), "regularization": probe.regularization})
    return _over_seeds(runs)


def _over_seeds(runs: list[dict[str, Any]]) -> dict[str, Any]:
    found = [run["accuracy"] for run in runs]
    spread = float(np.std(found, ddof=1)) if len(found) > 1 else None
    return {"accuracy": float(np.mean(found)), "sd": spread, "runs": runs}


def _few_labels(
    encoder: Encoder, train: Source, test: Source, share: float, seed: int, *, flip: float, on_error: OnError
) -> ImageData:
    """A share of each training class, drawn with the seed, and all test images."""
    labels = np.array(train.labels)
    order = np.random.default_rng(seed).permutation(len(labels))
    kept = []
    for name in np.unique(labels):
        rows = order[labels[order] == name]
        kept.append(rows[: max(1, round(share * len(rows)))])
    chosen = np.sort(np.concatenate(kept))
    return ImageData(
        _joined(train.subset(chosen), test),
        split="column",
        batch_size=min(64, len(chosen)),
        views=Views(crop_scale=(0.5, 1.0), flip=flip),
        seed=seed,
        on_error=on_error,
        **encoder.preprocessing,
    )


def _joined(train: Source, test: Source) -> Source:
    """One source with the roles in its column `split`."""
    if train.pixels is not test.pixels:
        raise ValueError(
            "low-shot needs training and test images in one place: both as files, or both as rows of one array or data "
            "set (Source.subset), or one manifest with the column split."
        )
    rows = None if train.rows is None or test.rows is None else np.concatenate([train.rows, test.rows])
    return Source(
        [*train.names, *test.names],
        [*(train.labels or ()), *(test.labels or ())],
        columns={"split": ["train"] * len(train) + ["test"] * len(test)},
        pixels=train.pixels,
        rows=rows,
    )
