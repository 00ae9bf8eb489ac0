import pytest
import torch

from embedlab._ops import keyed_uniform
from embedlab.data import Views
from embedlab.data.views import color_statistics

STILL = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "flip": 0.0, "jitter": 0.0, "grayscale": 0.0}


def pictures(count: int = 8, channels: int = 3, side: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, side, side), dtype=torch.uint8, generator=generator)


def test_nothing_switched_on_changes_nothing() -> None:
    images = pictures()
    (view,) = Views(**STILL)(images, torch.arange(8), size=16)
    torch.testing.assert_close(view, images / 255)


def test_a_view_depends_on_seed_epoch_and_sample_only() -> None:
    images, index, views = pictures(), torch.arange(8), Views(count=2, degrees=20, blur=0.5, erase=0.5)
    whole = views(images, index, size=12, seed=3, epoch=5)
    order = torch.tensor([6, 1, 4])
    part = views(images[order], index[order], size=12, seed=3, epoch=5)
    for a, b in zip(whole, part, strict=True):
        torch.testing.assert_close(a[order], b)
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(whole[0], views(images, index, size=12, seed=3, epoch=6)[0])
    assert not torch.equal(whole[0], views(images, index, size=12, seed=4, epoch=5)[0])


def test_flip_mirrors() -> None:
    images = pictures()
    (view,) = Views(**{**STILL, "flip": 1.0})(images, torch.arange(8), size=16)
    torch.testing.assert_close(view, images.flip(-1) / 255)


def test_crops_have_the_area_and_ratio_of_torchvision() -> None:
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    blank = torch.zeros(1, 400, 400)
    boxes = torch.tensor([RandomResizedCrop.get_params(blank, [0.2, 1.0], [0.75, 4 / 3]) for _ in range(4000)]).float()
    theta = Views(flip=0.0)._geometry(keyed_uniform(torch.arange(4000), 33, seed=0), 1.0)
    height, width = theta[:, 1, 1], theta[:, 0, 0]
    for ours, theirs in (
        (height * width, boxes[:, 2] * boxes[:, 3] / 400**2),
        (width / height, boxes[:, 3] / boxes[:, 2]),
    ):
        at = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
        torch.testing.assert_close(ours.quantile(at), theirs.quantile(at), atol=0.05, rtol=0.05)
    assert (theta[:, :, :2].abs().sum(2) + theta[:, :, 2].abs() <= 1 + 1e-5).all(), "a crop leaves the image"


def test_grayscale_and_hue_keep_the_luma() -> None:
    images, weights = pictures(), torch.tensor([0.299, 0.587, 0.114])
    images = images // 2 + 64  # away from the limits, where clamping changes the luma
    before = (images / 255 * weights.view(1, 3, 1, 1)).sum(1)
    (gray,) = Views(**{**STILL, "grayscale": 1.0})(images, torch.arange(8), size=16)
    torch.testing.assert_close(gray[:, 0], before, atol=1e-3, rtol=0)
    torch.testing.assert_close(gray[:, 0], gray[:, 2], atol=1e-3, rtol=0)
    turned = Views(**{**STILL, "jitter": 1.0}, brightness=0, contrast=0, saturation=0, hue=0.05)
    (view,) = turned(images, torch.arange(8), size=16)
    torch.testing.assert_close((view * weights.view(1, 3, 1, 1)).sum(1), before, atol=5e-3, rtol=0)
    assert (view - images / 255).abs().max() > 0.02


def test_erase_covers_the_stated_area() -> None:
    images = torch.cat([torch.zeros(64, 1, 32, 16), torch.ones(64, 1, 32, 16)], dim=3)
    (view,) = Views(**{**STILL, "erase": 1.0})(images, torch.arange(64), size=32)
    share = ((view - 0.5).abs() < 0.2).float().mean((1, 2, 3))
    assert share.min() > 0.01
    assert share.max() < 0.3


def test_blur_is_a_mean_and_single_channels_work() -> None:
    images = pictures(channels=1, side=20)
    (view,) = Views(**{**STILL, "blur": 1.0})(images, torch.arange(8), size=20)
    assert view.shape == (8, 1, 20, 20)
    assert view.std() < (images / 255).std()
    torch.testing.assert_close(view.mean(), (images / 255).mean(), atol=0.02, rtol=0)


def test_keyed_numbers_are_uniform_and_uncorrelated() -> None:
    numbers = keyed_uniform(torch.arange(20_000), 6, seed=1, epoch=2)
    assert ((numbers >= 0) & (numbers < 1)).all()
    torch.testing.assert_close(numbers.mean(0), torch.full((6,), 0.5), atol=0.01, rtol=0)
    torch.testing.assert_close(numbers.var(0), torch.full((6,), 1 / 12), atol=0.003, rtol=0)
    correlation = torch.corrcoef(torch.cat([numbers[:-1], numbers[1:]], dim=1).T) - torch.eye(12)
    assert correlation.abs().max() < 0.03


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"crop_scale": (0.0, 1.0)}, "crop_scale needs 0 < low <= high"),
        ({"flip": 1.5}, "Views.flip is a probability"),
        ({"count": 0}, "count >= 1"),
        ({"pad": "wrap"}, "pad border"),
    ],
)
def test_wrong_settings_are_explained(arguments, text) -> None:
    with pytest.raises(ValueError, match=text):
        Views(**arguments)


def test_color_statistics_need_a_value_per_channel() -> None:
    assert color_statistics(1)[0] == pytest.approx((0.449,))
    with pytest.raises(ValueError, match="need 3 values each"):
        color_statistics(3, [0.5], [0.5])
