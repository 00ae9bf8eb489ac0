"""More classes out of each: quarter turns and reflections of all its images, or one bending for all of them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import map_coordinates

from embedlab.data import ImageData, Source
from embedlab.data.embedding import identity_hash
from embedlab.data.views import FixedViews
from embedlab.encoders import ResNet
from embedlab.losses import NormSoftmaxLoss
from embedlab.methods import MetricLearning
from embedlab.methods.trainer import trained_encoder


def characters(classes: int = 5, each: int = 3) -> Source:
    images = np.random.default_rng(0).integers(0, 256, (classes * each, 8, 8, 1), dtype=np.uint8)
    return Source.from_arrays(images, [f"c{row // each}" for row in range(len(images))])


def prepared(source: object = None, **settings) -> ImageData:
    data = ImageData(
        characters() if source is None else source, image_size=8, channels=1, batch_size=12,
        **{"split": "none", "turns": 8, "images_per_class": 3} | settings,
    )  # fmt: skip
    data.trainer = SimpleNamespace(training=True, current_epoch=0, is_global_zero=False)
    data.setup()
    return data


def symmetry(image: np.ndarray, turn: int) -> np.ndarray:
    return np.rot90(image[:, ::-1] if turn >= 4 else image, turn % 4)


@pytest.mark.parametrize("turns", [1, 4, 8])
@pytest.mark.parametrize("cache_gib", [4.0, 0.0])
def test_classes_are_the_symmetries_of_the_square(turns, cache_gib) -> None:
    data = prepared(turns=turns, cache_gib=cache_gib)
    assert (data.num_classes, data.num_targets) == (5, 5 * turns)
    dataset = data.dataset("train")
    assert len(dataset) == 15 * turns
    batch = dataset[list(range(15 * turns))]
    assert batch.index.tolist() == list(range(15 * turns))
    assert batch.labels.tolist() == dataset.labels.tolist()
    pictures = np.asarray(data.source.pixels)[..., 0]
    for image, label, number in zip(batch.views[0], batch.labels.tolist(), batch.index.tolist(), strict=True):
        row, turn = divmod(number, turns)
        assert label == data.numbers[row] * turns + turn
        np.testing.assert_array_equal(image[0].numpy(), symmetry(pictures[row], turn))
    again = dataset[list(range(15 * turns))].views[0]
    assert torch.equal(again, batch.views[0])  # the cache is not turned along


def test_balanced_batches_hold_turned_classes_whole() -> None:
    seen = set()
    for batch in prepared().train_dataloader():
        labels, counts = batch.labels.unique(return_counts=True)
        assert counts.tolist() == [3, 3, 3, 3]
        assert torch.equal(batch.labels, torch.from_numpy(prepared().numbers)[batch.index // 8] * 8 + batch.index % 8)
        seen |= set(labels.tolist())
    assert len(seen) > 20
    assert max(seen) < 40


def test_a_skipped_image_takes_its_own_turns_along_alone(tmp_path) -> None:
    for number, image in enumerate(np.asarray(characters().pixels)[..., 0]):
        (tmp_path / f"c{number // 3}").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / f"c{number // 3}" / f"{number:02d}.png")
    (tmp_path / "c1" / "04.png").write_bytes(b"")
    data = prepared(tmp_path, cache_gib=0.0, on_error="skip")
    dataset = data.dataset("train")
    dataset.skipped[str(tmp_path / "c1" / "04.png")] = "empty"  # one of 15 is more than may be skipped
    batch = dataset[[3 * 8 + 1, 4 * 8 + 2, 5 * 8 + 3, 4 * 8, 3 * 8 + 5]]
    assert batch.index.tolist() == [25, 43, 29]
    assert batch.labels.tolist() == [9, 11, 13]
    for image, (row, turn) in zip(batch.views[0], [(3, 1), (5, 3), (3, 5)], strict=True):
        np.testing.assert_array_equal(image[0].numpy(), symmetry(np.asarray(characters().pixels)[row, ..., 0], turn))


def test_held_out_images_are_not_turned_and_the_encoder_remembers_the_datas_classes() -> None:
    data = prepared(split="class", fractions=(0.6, 0.2, 0.2))
    assert len(data.dataset("calibrate")) == 3
    method = MetricLearning(ResNet("resnet8", stem="small", width=0.125, in_channels=1))
    encoder = trained_encoder(method, data)
    assert encoder.identities == {identity_hash(name) for name in data.class_names[:3]}


WARPS = {"count": 3, "degrees": 20, "elastic": 0.1, "seed": 5}


@pytest.mark.parametrize("cache_gib", [4.0, 0.0])
def test_classes_are_bent_each_in_its_own_way(cache_gib) -> None:
    data = prepared(turns=4, warps=WARPS, cache_gib=cache_gib)
    assert (data.num_classes, data.num_targets) == (5, 5 * 4 * 3)
    dataset = data.dataset("train")
    assert len(dataset) == 15 * 12
    batch = dataset[list(range(15 * 12))]
    assert batch.labels.tolist() == dataset.labels.tolist()
    pictures, ways = np.asarray(data.source.pixels)[..., 0], {}
    for image, label, number in zip(batch.views[0], batch.labels.tolist(), batch.index.tolist(), strict=True):
        row, variant = divmod(number, 12)
        turn, way = divmod(variant, 3)
        assert label == data.numbers[row] * 12 + variant
        turned = symmetry(pictures[row], turn)
        if way == 0:
            np.testing.assert_array_equal(image[0].numpy(), turned)
            continue
        grid = FixedViews(**WARPS).drawn(torch.tensor([label]), 8)[0].double()
        ways.setdefault(label, grid)
        assert torch.equal(ways[label], grid)
        places = ((grid.numpy() + 1) * 8 - 1) / 2  # x, y in pixels
        bent = map_coordinates(turned.astype(float), [places[..., 1], places[..., 0]], order=1, mode="nearest")
        np.testing.assert_allclose(image[0].numpy(), bent, atol=0.51)
    assert len({tuple(grid.ravel().tolist()) for grid in ways.values()}) == 5 * 4 * 2
    some = dataset[[40, 7, 161]]  # a batch of others: the same pictures
    assert torch.equal(some.views[0], batch.views[0][[40, 7, 161]])
    assert torch.equal(dataset[list(range(15 * 12))].views[0], batch.views[0])  # the cache is not bent along


def test_held_out_images_are_not_bent() -> None:
    data = prepared(split="class", fractions=(0.6, 0.2, 0.2), warps=WARPS)
    assert len(data.dataset("calibrate")) == 3


def test_bending_without_labels_is_refused() -> None:
    data = prepared(Source.from_arrays(np.zeros((6, 8, 8, 1), np.uint8)), warps=WARPS)
    with pytest.raises(ValueError, match="warps makes further classes of each class, but .* has no labels"):
        data.dataset("train")


def test_other_numbers_of_turns_are_refused() -> None:
    with pytest.raises(ValueError, match=r"turns 1, 4 \(quarter turns\) or 8 \(also mirrored\), got 2"):
        ImageData("unused", turns=2)


def test_a_loss_for_too_few_classes_is_told_how_many_there_are() -> None:
    method = MetricLearning(ResNet("resnet8", stem="small", width=0.125, in_channels=1), loss=NormSoftmaxLoss(5, 32))
    method._trainer = SimpleNamespace(datamodule=prepared())
    with pytest.raises(ValueError, match="was made for 5 classes, the training data has 40; .* or to null"):
        method.setup("fit")


def test_a_loss_without_a_number_of_classes_gets_the_datas() -> None:
    loss = NormSoftmaxLoss(None, 32)
    method = MetricLearning(ResNet("resnet8", stem="small", width=0.125, in_channels=1), loss=loss)
    method._trainer = SimpleNamespace(datamodule=prepared())
    method.setup("fit")
    assert loss.proxies.shape == (40, 32)
    assert any(loss.proxies is parameter for group in method.parameter_groups() for parameter in group["params"])
    proxies = loss.proxies
    method.setup("fit")  # a second time nothing is drawn anew
    assert loss.proxies is proxies
