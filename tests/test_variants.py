"""More classes out of each: what is done to one image of a class is done to all of them, and to nothing else."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from embedlab.data import ClassVariants, ImageData, Source, Views
from embedlab.data.embedding import identity_hash
from embedlab.encoders import ResNet
from embedlab.losses import NormSoftmaxLoss
from embedlab.methods import MetricLearning
from embedlab.methods.trainer import trained_encoder

BENT = Views(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0, jitter=0, grayscale=0, degrees=20, elastic=0.05)


def pictures(count: int = 6, side: int = 8) -> torch.Tensor:
    return torch.randint(0, 256, (count, 1, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_the_first_eight_are_the_symmetries_of_the_square() -> None:
    image = pictures(1)
    made = ClassVariants(8)(image.expand(8, -1, -1, -1), torch.zeros(8, dtype=torch.long), torch.arange(8))
    array = image[0, 0].numpy()
    want = [np.rot90(mirrored, turn) for mirrored in (array, array[:, ::-1]) for turn in range(4)]
    np.testing.assert_array_equal(made[:, 0].numpy(), np.stack(want))
    assert len({one.tobytes() for one in made.numpy()}) == 8


def test_a_warp_is_one_for_a_class_and_another_for_each_variant() -> None:
    variants, images = ClassVariants(24, warp=BENT), pictures(1).expand(6, -1, -1, -1)
    classes, numbers = torch.tensor([3, 3, 3, 4, 3, 3]), torch.tensor([9, 9, 17, 9, 1, 9])
    made = variants(images, classes, numbers)
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[5])
    assert torch.equal(made[4], images[0].rot90(1, (1, 2)))  # the first eight are not warped
    assert len({made[row].numpy().tobytes() for row in (0, 2, 3, 4)}) == 4
    alone = variants(images[:1], classes[:1], numbers[:1])
    assert torch.equal(alone[0], made[0])
    assert not torch.equal(ClassVariants(24, warp=BENT, seed=1)(images[:1], classes[:1], numbers[:1])[0], made[0])


def test_partners_are_other_classes_the_same_for_all_images_in_the_stated_share() -> None:
    variants = ClassVariants(108, warp=BENT, join=0.4)
    classes, numbers = torch.arange(50).repeat_interleave(108), torch.arange(108).repeat(50)
    partners = variants.partners(classes, numbers, 50)
    assert (partners[numbers < 8] == -1).all()
    share = (partners[numbers >= 8] >= 0).float().mean()
    assert abs(share - 0.4) < 0.03
    assert (partners != classes).all()
    assert partners.max() == 49
    assert len(set(partners[partners >= 0].tolist())) == 50
    assert torch.equal(variants.partners(classes[500:900], numbers[500:900], 50), partners[500:900])
    assert (variants.partners(classes[:200] * 0, numbers[:200], 1) == -1).all()  # one class has no other


def test_joined_pictures_show_both_halves() -> None:
    white, black = torch.full((1, 8, 8), 255, dtype=torch.uint8), torch.zeros(1, 8, 8, dtype=torch.uint8)
    variants = ClassVariants(40, join=1.0)
    seen = set()
    for number in range(8, 40, 8):  # not turned
        made = variants(white[None], torch.tensor([0]), torch.tensor([number]), {0: black})[0, 0]
        assert (made == 255).sum() == (made == 0).sum() == 32
        seen.add(made.numpy().tobytes())
    assert len(seen) == 2  # side by side, and one above the other
    assert all(np.frombuffer(one, np.uint8)[0] == 255 for one in seen)  # the class's own comes first


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"count": 1}, "count >= 2"),
        ({"join": 1.5}, r"join \(a share\) in \[0, 1\]"),
        ({"count": 9}, "count 9 needs a warp"),
        ({"count": 9, "warp": Views(count=2)}, "warp makes one view"),
    ],
)
def test_wrong_settings_are_explained(arguments, text) -> None:
    with pytest.raises(ValueError, match=text):
        ClassVariants(**arguments)


def characters(classes: int = 5, each: int = 3) -> Source:
    images = np.random.default_rng(0).integers(0, 256, (classes * each, 8, 8, 1), dtype=np.uint8)
    return Source.from_arrays(images, [f"c{row // each}" for row in range(len(images))])


def prepared(**settings) -> ImageData:
    data = ImageData(
        characters(), image_size=8, channels=1, split="none", batch_size=12, images_per_class=3, **settings
    )
    data.trainer = SimpleNamespace(training=True, current_epoch=0, is_global_zero=False)
    data.setup()
    return data


def test_batches_hold_whole_variants() -> None:
    data = prepared(variants=ClassVariants(16, warp=BENT, join=0.5))
    assert (data.num_classes, data.num_targets) == (5, 80)
    dataset, seen = data.dataset("train"), set()
    assert len(dataset) == 15 * 16
    for batch in data.train_dataloader():
        labels, counts = batch.labels.unique(return_counts=True)
        assert counts.tolist() == [3, 3, 3, 3]
        assert labels.max() < 80
        seen |= set(batch.index.tolist())
        rows, variant = batch.index // 16, batch.index % 16
        assert torch.equal(batch.labels, torch.from_numpy(data.numbers)[rows] * 16 + variant)
        for image, row, number in zip(batch.views[0], rows, variant, strict=True):
            if number < 8:
                turned = dataset.cache[row].flip(-1) if number >= 4 else dataset.cache[row]
                assert torch.equal(image, turned.rot90(int(number) % 4, (1, 2)))
    assert len(seen) > 120
    again = {int(label): image for label, image in zip(batch.labels, batch.views[0], strict=True)}
    (same,) = dataset[[int(batch.index[-1])]].views
    assert torch.equal(same[0], again[int(batch.labels[-1])])


def test_joined_images_of_a_class_share_the_partner_class_but_not_its_image() -> None:
    images = np.repeat(np.arange(15, dtype=np.uint8)[:, None, None, None] * 10, 8, axis=1).repeat(8, axis=2)
    source = Source.from_arrays(images, [f"c{row // 3}" for row in range(15)])
    data = ImageData(source, image_size=8, channels=1, split="none", variants=ClassVariants(9, join=1.0))
    data.setup()
    batch = data.dataset("train")[[row * 9 + 8 for row in range(15)]]
    for number in range(5):
        values = [sorted(set(image.unique().tolist())) for image in batch.views[0][3 * number : 3 * number + 3]]
        partners = {tuple(v // 30 for v in two if v // 30 != number) for two in values}
        assert len(partners) == 1
        assert [two[0] // 10 % 3 for two in values] == [two[1] // 10 % 3 for two in values] == [0, 1, 2]


def test_the_encoder_remembers_classes_and_not_variants() -> None:
    data = ImageData(characters(), image_size=8, channels=1, split="class", variants=ClassVariants(8))
    data.setup()
    method = MetricLearning(ResNet("resnet8", stem="small", width=0.125, in_channels=1))
    encoder = trained_encoder(method, data)
    trained = set(data.class_names[: data.num_classes])
    assert encoder.identities == {identity_hash(name) for name in trained}
    assert len(trained) == 3


def test_a_loss_for_too_few_classes_is_told_how_many_there_are() -> None:
    data = prepared(variants=ClassVariants(8))
    method = MetricLearning(ResNet("resnet8", stem="small", width=0.125, in_channels=1), loss=NormSoftmaxLoss(5, 32))
    method._trainer = SimpleNamespace(datamodule=data)
    with pytest.raises(ValueError, match="was made for 5 classes, the training data has 40"):
        method.setup("fit")


def test_a_loss_without_a_number_of_classes_gets_the_datas() -> None:
    data, loss = prepared(variants=ClassVariants(8)), NormSoftmaxLoss(None, 32)
    method = MetricLearning(ResNet("resnet8", stem="small", width=0.125, in_channels=1), loss=loss)
    method._trainer = SimpleNamespace(datamodule=data)
    method.setup("fit")
    assert loss.proxies.shape == (40, 32)
    assert any(loss.proxies is parameter for group in method.parameter_groups() for parameter in group["params"])
    proxies = loss.proxies
    method.setup("fit")  # a second time nothing is drawn anew
    assert loss.proxies is proxies


def test_variants_need_labels_and_a_cache() -> None:
    unlabelled = ImageData(
        Source.from_arrays(np.zeros((4, 8, 8, 1), np.uint8)), image_size=8, channels=1, split="none",
        variants=ClassVariants(),
    )  # fmt: skip
    unlabelled.setup()
    with pytest.raises(ValueError, match="variants are made of classes"):
        unlabelled.dataset("train")
    with pytest.raises(ValueError, match=r"15 images do not fit into cache_gib=0.0"):
        prepared(variants=ClassVariants(), cache_gib=0.0).dataset("train")
