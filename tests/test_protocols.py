"""Protocols for pre-trained backbones on a toy: figures by hand, seeds, what is refused, the command."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from embedlab.cli import main
from embedlab.data import Source
from embedlab.encoders import Encoder, LinearHead, ResNet
from embedlab.tasks import evaluate_backbone
from embedlab.tasks.protocols import _few_labels

CLASSES = 4


def source(images: int = 25) -> Source:
    random = np.random.default_rng(0)
    colours = random.integers(30, 226, (CLASSES, 1, 1, 1, 3))
    pixels = (colours + random.normal(0, 60, (CLASSES, images, 8, 8, 3))).clip(0, 255).astype(np.uint8)
    labels = [f"class {number}" for number in range(CLASSES) for _ in range(images)]
    return Source.from_arrays(pixels.reshape(-1, 8, 8, 3), labels)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.manual_seed(0)
    backbone = ResNet("resnet8", stem="small", width=0.125, norm="group")
    return Encoder(backbone, LinearHead(3), image_size=8).eval()


@pytest.fixture(scope="module")
def parts() -> tuple[Source, Source]:
    whole = source()
    test = np.arange(len(whole)) % 5 == 0
    return whole.subset(~test), whole.subset(test)


def pixels(part: Source) -> torch.Tensor:
    return torch.from_numpy(np.stack([part.image(row) for row in range(len(part))]).transpose(0, 3, 1, 2).copy())


def test_figures_by_hand_on_backbone_features(encoder, parts) -> None:
    found = evaluate_backbone(encoder, *parts, protocols=["knn", "linear"], k=(5, 1), seeds=(0, 1), progress=False)
    with torch.no_grad():
        train, test = (
            torch.nn.functional.normalize(encoder.backbone((pixels(part) / 255 - encoder.mean) / encoder.std)).double()
            for part in parts
        )
    labels, wanted = np.array(parts[0].labels), np.array(parts[1].labels)
    nearest = (test @ train.T).argmax(dim=1).numpy()
    assert [row["k"] for row in found["knn"]] == [5, 1]
    assert found["knn"][1] == {"k": 1, "temperature": 0.1, "accuracy": (labels[nearest] == wanted).mean()}
    standard = StandardScaler().fit(train.numpy())
    for run in found["linear"]["runs"]:
        oracle = LogisticRegression(C=1 / (run["regularization"] * len(labels)), tol=1e-10, max_iter=10_000)
        oracle.fit(standard.transform(train.numpy()), labels)
        assert run["accuracy"] == oracle.score(standard.transform(test.numpy()), wanted)
    accuracies = [run["accuracy"] for run in found["linear"]["runs"]]
    assert found["linear"]["accuracy"] == np.mean(accuracies)
    assert found["linear"]["sd"] == np.std(accuracies, ddof=1)
    protocol = json.loads(json.dumps(found["protocol"]))
    assert protocol["encoder"] == encoder.fingerprint
    assert (protocol["feature_dim"], protocol["train_images"], protocol["test_images"]) == (32, 80, 20)
    assert (protocol["epoch"], protocol["seeds"], protocol["classes"]) == ("last", [0, 1], CLASSES)


def test_low_shot_repeats_by_seed_and_leaves_the_encoder_alone(encoder, parts) -> None:
    before = encoder.fingerprint
    settings = {"protocols": ["low-shot"], "shares": (0.01, 0.5), "steps": 15, "progress": False}
    found = evaluate_backbone(encoder, *parts, seeds=(0, 1), **settings)["low-shot"]
    assert [row["share"] for row in found] == [0.01, 0.5]
    assert [run["train_images"] for row in found for run in row["runs"]] == [4, 4, 40, 40], "one per class at least"
    again = evaluate_backbone(encoder, *parts, seeds=(1,), **settings)["low-shot"]
    assert [row["runs"][0] for row in again] == [row["runs"][1] for row in found]
    assert [row["sd"] for row in again] == [None, None]
    assert found[1]["accuracy"] > 1.5 / CLASSES
    assert encoder.fingerprint == before


def test_the_labels_that_are_kept_are_drawn_by_the_seed(encoder, parts) -> None:
    drawn = []
    for seed in (0, 0, 1):
        data = _few_labels(encoder, *parts, 0.25, seed, flip=0.5, on_error="stop")
        data.setup()
        names, counts = np.unique(np.array(data.source.labels)[data.roles == "train"], return_counts=True)
        assert (len(names), counts.tolist()) == (CLASSES, [5] * CLASSES)
        assert [name for name, role in zip(data.source.names, data.roles, strict=True) if role == "test"] == parts[
            1
        ].names
        drawn.append([name for name, role in zip(data.source.names, data.roles, strict=True) if role == "train"])
    assert drawn[0] == drawn[1] != drawn[2]


def test_errors_teach(encoder, parts) -> None:
    train, test = parts
    unlabelled = Source(["a.png"])
    for call, told in (
        (
            lambda: evaluate_backbone(encoder, train, test, protocols=["zero-shot"]),
            "knn, linear, low-shot; got 'zero-shot'",
        ),
        (lambda: evaluate_backbone(encoder, train, test, protocols=[]), "got 'none'"),
        (lambda: evaluate_backbone(encoder, train, test, shares=[10]), r"in \(0, 1\], got \[10\]; 1 % is 0.01"),
        (lambda: evaluate_backbone(encoder, train, test, seeds=[]), "means over seeds, and none was given"),
        (lambda: evaluate_backbone(encoder, train, unlabelled), "training and test images both need them"),
        (lambda: evaluate_backbone(encoder, train.subset(range(20)), test), "3 test classes have no training image"),
        (lambda: evaluate_backbone(encoder, train, train), "80 images are in both the training and the test set"),
        (
            lambda: evaluate_backbone(encoder, train, source(), protocols=["low-shot"], progress=False),
            "training and test images in one place",
        ),
    ):
        with pytest.raises(ValueError, match=told):
            call()


def test_the_command(encoder, parts, tmp_path, capsys) -> None:
    for name, part in zip(("train", "test"), parts, strict=True):
        for row, label in enumerate(part.labels):
            (tmp_path / name / label).mkdir(parents=True, exist_ok=True)
            Image.fromarray(part.image(row)).save(tmp_path / name / label / f"{row}.png")
    encoder.save(tmp_path / "encoder")
    command = ["evaluate", str(tmp_path / "test"), "--encoder", str(tmp_path / "encoder")]
    command += [
        "--protocol",
        "knn",
        "linear",
        "low-shot",
        "--knn-k",
        "7",
        "--shares",
        "0.2",
        "--seeds",
        "2",
        "--steps",
        "5",
    ]
    assert (
        main([*command, "--reference", str(tmp_path / "train"), "--json", "--out", str(tmp_path / "report.json")]) == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "report.json").read_text())
    direct = evaluate_backbone(encoder, *parts, k=(200, 7), protocols=["knn"], progress=False)
    assert found["knn"] == direct["knn"]
    assert [run["seed"] for run in found["low-shot"][0]["runs"]] == [0, 1]
    assert {"embedlab", "torch", "numpy"} <= found["protocol"]["versions"].keys()
    assert found["protocol"]["encoder"] == encoder.fingerprint
    assert main([*command, "--reference", str(tmp_path / "train")]) == 0
    assert "low-shot 20 %" in capsys.readouterr().out
    assert main(command) == 1
    assert "--protocol needs PATH, --encoder and --reference" in capsys.readouterr().err
