"""Whitening: an oracle, what it does to an encoder, and how a run ends with it."""

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from naive import naive_whitened
from PIL import Image
from test_methods import data, net, source, trainer

from embedlab.cli import main
from embedlab.data import FixedViews, Views
from embedlab.encoders import Encoder, LinearHead, MLPHead, ResNet, Whitening
from embedlab.encoders.whitening import _scatter
from embedlab.methods import MetricLearning, SimCLR
from embedlab.methods.trainer import SaveEncoder, _evenly


def scattered(count: int, size: int, labels: int, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    """Identities with much the same scatter in some directions and little in others; vectors of several lengths."""
    random = np.random.default_rng(seed)
    names = random.integers(0, labels, count)
    centres, spread = random.normal(size=(labels, size)), random.uniform(0.1, 2, size)
    vectors = (3 + centres[names] + spread * random.normal(size=(count, size))) * random.uniform(0.5, 2, (count, 1))
    return vectors.astype(np.float32), [f"name {name}" for name in names]


def cosines(vectors: torch.Tensor) -> np.ndarray:
    unit = torch.nn.functional.normalize(vectors.double())
    return (unit @ unit.T).numpy()


@pytest.mark.parametrize(("count", "size"), [(60, 5), (30, 40), (8, 50)])
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("power", [0, 0.5, 1])
def test_cosines_are_those_of_the_dense_covariance(count, size, labelled, power) -> None:
    vectors, labels = scattered(count, size, labels=4)
    images = scattered(6, size, labels=2, seed=1)[0]
    whitening = Whitening.fit(vectors, labels if labelled else None, power=power)
    unit = torch.nn.functional.normalize(torch.from_numpy(images))
    expected = naive_whitened(vectors, labels if labelled else None, power, images)
    np.testing.assert_allclose(cosines(whitening(unit)), expected, atol=2e-5)
    again = Whitening.fit(torch.from_numpy(vectors) * 7, labels if labelled else None, power=power)
    np.testing.assert_allclose(cosines(again(unit)), expected, atol=2e-5)


def test_pairs_of_a_label_are_shrunk_like_as_many_free_vectors() -> None:
    """Two vectors around their mean say as much of the scatter as one around a known mean."""
    random, spread = np.random.default_rng(0), np.linspace(0.5, 1.5, 12)
    found = []
    for _ in range(200):
        pairs = spread * random.normal(size=(40, 2, 12))
        around = (pairs - pairs.mean(axis=1, keepdims=True)).reshape(80, 12)
        free = spread * random.normal(size=(40, 12))
        found.append((_scatter(around, 40)[2], _scatter(free, 40)[2]))
    paired, single = np.mean(found, axis=0)
    assert paired == pytest.approx(single, rel=0.1)


def test_within_class_scatter_is_what_gets_small() -> None:
    """Identities differ in six directions, images of one identity in two others, and five times as much."""
    random = np.random.default_rng(0)
    names = np.repeat(np.arange(30), 10)
    vectors = np.ones((300, 8)) + 0.02 * random.normal(size=(300, 8))
    vectors[:, :6] += 0.1 * random.normal(size=(30, 6))[names]
    vectors[:, 6:] += 0.5 * random.normal(size=(300, 2))
    unit = torch.nn.functional.normalize(torch.from_numpy(vectors).float())
    same = names[:, None] == names

    def right(moved: torch.Tensor) -> float:
        scores = cosines(moved)
        np.fill_diagonal(scores, -2)
        return float(same[np.arange(300), scores.argmax(1)].mean())

    assert right(unit) < 0.6
    assert right(Whitening.fit(unit, names)(unit)) > 0.9 > 0.6 > right(Whitening.fit(unit, power=0)(unit))


@pytest.mark.parametrize(
    ("vectors", "labels", "power", "text"),
    [
        (np.ones((1, 3)), None, 1, r"N >= 2, and labels for all or none; got \(1, 3\), labels none"),
        (np.ones((4, 3)), ["a"], 1, r"got \(4, 3\), labels 1"),
        (np.ones(4), None, 1, r"got \(4,\), labels none"),
        (np.eye(4), None, 2, r"a power in \[0, 1\], got 2"),
        (np.full((4, 3), np.nan), None, 1, "got NaN or infinity; has the training diverged"),
        (np.eye(4), list("abcd"), 1, "needs two vectors of one label, but each of 4 labels has one"),
        (np.ones((4, 3)), None, 1, "they are all alike. A collapsed network"),
    ],
)
def test_what_cannot_be_whitened_says_why(vectors, labels, power, text) -> None:
    with pytest.raises(ValueError, match=text):
        Whitening.fit(vectors, labels, power=power)


def encoder(**options) -> Encoder:
    torch.manual_seed(0)
    return Encoder(ResNet("resnet8", stem="small", width=0.125), LinearHead(6), image_size=16, **options).eval()


def pictures(count: int = 12) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 3, 16, 16), dtype=np.uint8))


def test_an_encoder_keeps_it_and_comes_after_its_views(tmp_path) -> None:
    views = FixedViews(3, degrees=20)
    plain = encoder(test_views=views)
    vectors = plain(pictures()).detach()
    whitening = Whitening.fit(vectors)
    whitened = encoder(test_views=views, whitening=whitening)
    expected = torch.nn.functional.normalize(whitening(vectors))
    torch.testing.assert_close(whitened(pictures()), expected)
    assert whitened.fingerprint != plain.fingerprint
    whitened.save(tmp_path / "encoder")
    assert json.loads((tmp_path / "encoder" / "encoder.json").read_text())["version"] == 3
    again = Encoder.load(tmp_path / "encoder")
    torch.testing.assert_close(again(pictures()), expected)
    assert again.fingerprint == whitened.fingerprint
    assert again.untrained().whitening is None
    other = encoder(test_views=views, whitening=Whitening.fit(vectors, power=0.5))
    assert other.fingerprint != whitened.fingerprint
    with pytest.raises(ValueError, match="fitted to vectors of 5 numbers, the encoder gives 6"):
        encoder(whitening=Whitening(5, 2))


def test_an_encoder_without_it_is_what_it_was(tmp_path) -> None:
    encoder().save(tmp_path / "encoder")
    description = json.loads((tmp_path / "encoder" / "encoder.json").read_text())
    assert description["version"] == 1
    assert "whitening" not in description


def test_bfloat16_does_not_reach_into_it() -> None:
    vectors, labels = scattered(200, 24, labels=5)
    whitening = Whitening.fit(vectors, labels)
    unit = torch.nn.functional.normalize(torch.from_numpy(vectors))
    with torch.autocast("cpu", torch.bfloat16):
        inside = whitening(unit)
    assert torch.equal(inside, whitening(unit))


def ends_with(folder, method, whiten: float | None = 1.0, **options) -> Encoder:
    trainer(folder, callbacks=[SaveEncoder(whiten=whiten)]).fit(method, datamodule=data(**options))
    return Encoder.load(folder / "encoder")


@pytest.mark.parametrize("labelled", [True, False])
def test_a_run_ends_with_the_scatter_of_its_training_images_alone(tmp_path, labelled) -> None:
    method = MetricLearning(net(), MLPHead(8, norm="layer")) if labelled else SimCLR(net(), MLPHead(8, norm="layer"))
    found = ends_with(tmp_path, method, views=Views(count=1 if labelled else 2))
    module = data()
    module.setup()
    rows = np.flatnonzero(module.roles == "train")
    assert 0 < len(rows) < len(module.roles), "there are others, which are not seen"
    bare = Encoder.load(tmp_path / "encoder")
    bare.whitening = None
    vectors = bare.embed(source().subset(rows.tolist()), progress=False)
    expected = Whitening.fit(vectors.vectors, vectors.labels if labelled else None)
    torch.testing.assert_close(found.whitening.gain, expected.gain, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.whitening.mean, expected.mean, rtol=1e-3, atol=1e-4)


def test_without_it_a_run_ends_as_ever(tmp_path) -> None:
    assert ends_with(tmp_path, MetricLearning(net(), MLPHead(8, norm="layer")), whiten=None).whitening is None
    with pytest.raises(ValueError, match=r"takes whiten in \[0, 1\] or None, got 1.5"):
        SaveEncoder(whiten=1.5)


def test_a_run_that_cannot_be_whitened_still_leaves_its_encoder(tmp_path, caplog) -> None:
    one_each = source(classes=24, images=1)
    with caplog.at_level(logging.WARNING, "embedlab"):
        found = ends_with(
            tmp_path,
            MetricLearning(net(), MLPHead(8, norm="layer"), loss=SquaredLength()),
            root=one_each,
            split="none",
            images_per_class=None,
        )
    assert found.whitening is None
    assert "stays without its whitening. Whitening by labels needs two vectors of one label" in caplog.text


class SquaredLength(torch.nn.Module):
    """A loss that needs no positives."""

    def forward(self, embeddings, labels):
        return embeddings.square().sum(dim=1).mean()


def test_a_run_may_end_with_the_features_of_earlier_stages(tmp_path) -> None:
    method = MetricLearning(net(), MLPHead(8, norm="layer"), keep_head=False)
    callback = SaveEncoder(pool=[2, 1], whiten=0.5)
    trainer(tmp_path, callbacks=[callback]).fit(method, datamodule=data())
    found = Encoder.load(tmp_path / "encoder")
    assert found.dim == 32 * 4 + 64
    assert found.whitening.config["features"] == found.dim
    images = torch.rand(2, 3, 12, 12)
    late = found.backbone(images)[:, 128:]
    torch.testing.assert_close(late, torch.nn.functional.normalize(method.backbone.eval()(images)))
    assert method.backbone.config == net().config, "the method goes on as it was"
    with pytest.raises(ValueError, match="got ResNet and a MLPHead after it. Set model.init_args.keep_head to false"):
        trainer(tmp_path, callbacks=[callback]).fit(MetricLearning(net(), MLPHead(8)), datamodule=data())
    with pytest.raises(ValueError, match="one or a list for up to 4 last stages; got 0.125, 3 and 0"):
        trainer(tmp_path, callbacks=[SaveEncoder(pool=0)]).fit(method, datamodule=data())


def test_of_many_images_some_of_every_class_are_taken() -> None:
    labels = np.array(["big"] * 500 + ["small"] * 7 + ["middle"] * 50, dtype=object)
    counts = dict(zip(*np.unique(labels[_evenly(labels, len(labels), 100, seed=0)], return_counts=True), strict=True))
    assert counts == {"big": 33, "small": 7, "middle": 33}
    many = np.repeat([f"{number}" for number in range(300)], 3).astype(object)
    chosen = many[_evenly(many, len(many), 100, seed=0)]
    _, counts = np.unique(chosen, return_counts=True)
    assert (len(chosen), counts.max()) == (100, 2)
    assert 100 < np.median([int(label) for label in chosen]) < 200, "labels from the whole alphabet"
    assert (counts == 2).mean() > 0.9, "a class with one image tells nothing"
    assert len(_evenly(None, 1000, 100, seed=0)) == 100
    assert _evenly(labels[:60], 60, 100, seed=0).tolist() == list(range(60))


def test_a_recipe_asks_for_it(tmp_path) -> None:
    pixels = source()
    folder = tmp_path / "images"
    for number, (name, image) in enumerate(zip(pixels.labels, pixels.pixels, strict=True)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / name / f"{number}.png")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {class_path: embedlab.methods.MetricLearning, init_args: {backbone: {class_path: "
        "embedlab.encoders.ResNet, init_args: {name: resnet8, stem: small, width: 0.125}}}}\n"
        f"data: {{class_path: embedlab.data.ImageData, init_args: {{root: {folder}, image_size: 12, batch_size: 12, "
        "images_per_class: 3, split: none}}\n"
        "trainer: {max_epochs: 1, logger: false}\n"
        "encoder: {whiten: 0.5}\n"
    )
    assert main(["fit", "-c", str(recipe), "--run", str(tmp_path / "run")]) == 0
    first = Encoder.load(tmp_path / "run" / "encoder")
    assert first.whitening is not None
    shutil.rmtree(tmp_path / "run" / "encoder")  # as if it had been killed between its last step and this
    assert main(["fit", "--run", str(tmp_path / "run"), "--resume"]) == 0
    assert Encoder.load(tmp_path / "run" / "encoder").fingerprint == first.fingerprint
    assert main(["fit", "--run", str(tmp_path / "run"), "--resume", "--encoder.whiten=1"]) == 0
    assert Encoder.load(tmp_path / "run" / "encoder").fingerprint != first.fingerprint
