import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import ks_2samp, kstest
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional
from torchvision.transforms.v2.functional import adjust_brightness, adjust_contrast, adjust_hue, adjust_saturation

from embedlab._ops import keyed_uniform
from embedlab._types import Batch
from embedlab.data import FixedViews, ImageData, Source, Views
from embedlab.data import views as module
from embedlab.data.views import _COLUMNS, Mix, PerImage, _turn_hue, color_statistics, keyed_views

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


def test_views_are_the_same_with_any_number_of_workers(tmp_path) -> None:
    for number, image in enumerate(pictures()):
        functional.to_pil_image(image).save(tmp_path / f"{number}.png")

    def epoch(workers: int) -> list[torch.Tensor]:
        data = ImageData(
            tmp_path, image_size=12, decode_size=16, split="none", batch_size=4, cache_gib=0.0, workers=workers,
            views=Views(count=2, degrees=20, blur=0.5),
        )  # fmt: skip
        data.trainer = SimpleNamespace(training=True, current_epoch=2, is_global_zero=False)
        data.setup()
        return [view for batch in data.train_dataloader() for view in data.on_after_batch_transfer(batch, 0).views]

    alone, two = epoch(0), epoch(2)
    assert len(alone) == len(two) == 4
    assert all(torch.equal(a, b) for a, b in zip(alone, two, strict=True))


def test_flip_mirrors() -> None:
    images = pictures()
    (view,) = Views(**{**STILL, "flip": 1.0})(images, torch.arange(8), size=16)
    torch.testing.assert_close(view, images.flip(-1) / 255)


def test_affine_crops_have_the_area_and_ratio_of_torchvision() -> None:
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    blank = torch.zeros(1, 400, 400)
    boxes = torch.tensor([RandomResizedCrop.get_params(blank, [0.2, 1.0], [0.75, 4 / 3]) for _ in range(4000)]).float()
    theta = Views(flip=0.0)._geometry(numbers(4000), 1.0)
    height, width = theta[:, 1, 1], theta[:, 0, 0]
    for ours, theirs in (
        (height * width, boxes[:, 2] * boxes[:, 3] / 400**2),
        (width / height, boxes[:, 3] / boxes[:, 2]),
    ):
        at = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
        torch.testing.assert_close(ours.quantile(at), theirs.quantile(at), atol=0.05, rtol=0.05)
    assert (theta[:, :, :2].abs().sum(2) + theta[:, :, 2].abs() <= 1 + 1e-5).all(), "a crop leaves the image"


def test_grayscale_is_the_luma_and_hue_keeps_the_brightest_and_darkest_channel() -> None:
    images, weights = pictures(), torch.tensor([0.2989, 0.587, 0.114])
    (gray,) = Views(**{**STILL, "grayscale": 1.0})(images, torch.arange(8), size=16)
    torch.testing.assert_close(gray[:, 0], (images / 255 * weights.view(1, 3, 1, 1)).sum(1))
    assert torch.equal(gray[:, 0], gray[:, 2])
    (view,) = Views(**{**STILL, "jitter": 1.0}, brightness=0, contrast=0, saturation=0)(
        images, torch.arange(8), size=16
    )
    torch.testing.assert_close(view.amax(1), images.amax(1) / 255)
    torch.testing.assert_close(view.amin(1), images.amin(1) / 255)
    assert (view - images / 255).abs().max() > 0.1


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
        ({"solarize": -0.1}, "Views.solarize is a probability"),
        ({"hue": 0.6}, r"hue in \[0, 0.5\]"),
        ({"blur_sigma": (0.0, 1.0)}, "blur_sigma 0 < low"),
        ({"small_count": -1}, "small_count >= 0"),
        ({"second": {"blur": 1.0}}, "second changes the second view, but count is 1"),
        ({"count": 2, "second": {"blurr": 1.0}}, "Views.second got blurr; it may set blur, blur_sigma"),
        ({"count": 2, "second": {"blur": 2.0}}, "Views.blur is a probability"),
        ({"small_count": 2, "small": {"count": 2}}, "Views.small got count"),
        ({"stroke": 1.5}, r"Views.stroke must lie in \[0, 1\]"),
        ({"elastic": -0.1}, "Views.elastic is a share of the side >= 0"),
    ],
)
def test_wrong_settings_are_explained(arguments, text) -> None:
    with pytest.raises(ValueError, match=text):
        Views(**arguments)


def test_color_statistics_need_a_value_per_channel() -> None:
    assert color_statistics(1)[0] == pytest.approx((0.449,))
    with pytest.raises(ValueError, match="need 3 values each"):
        color_statistics(3, [0.5], [0.5])


# --- beside torchvision ---


def real(count: int, side: int) -> torch.Tensor:
    """Smooth colour pictures with dark and bright parts, uint8."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    base = torch.rand(count, 1, 1, 1, generator=generator)
    fine = F.interpolate(coarse, (side, side), mode="bicubic", align_corners=False)
    return (((0.6 * base + 0.7 * (fine - 0.2)).clamp(0, 1)) * 255).byte()


def numbers(count: int, **key: int) -> torch.Tensor:
    return keyed_uniform(torch.arange(count), _COLUMNS, **{"seed": 0, **key})


@pytest.mark.parametrize("kind", ["uint8", "float"])
@pytest.mark.parametrize(("side", "size"), [((32, 32), 32), ((96, 96), 64), ((40, 56), 20)])
def test_crop_and_flip_are_torchvisions(kind: str, side: tuple[int, int], size: int) -> None:
    images = real(12, max(side))[:, :, : side[0], : side[1]]
    images = images if kind == "uint8" else images / 255
    views = Views(jitter=0.0, grayscale=0.0)
    (got,) = views(images, torch.arange(12), size=size)
    for image, view, box, flip in zip(
        images, got, views._boxes(numbers(12), *side), numbers(12)[:, 14] < 0.5, strict=True
    ):
        want = functional.resized_crop(image, *box.tolist(), [size, size], antialias=True)
        want = want.flip(-1) if flip else want
        if kind == "uint8" and side == (96, 96):  # the same kernel
            assert torch.equal(view, want / 255)
        else:  # torchvision rounds uint8 twice
            torch.testing.assert_close(
                view, want.float() / 255 if kind == "uint8" else want, atol=0.004 if kind == "uint8" else 1e-6, rtol=0
            )


@pytest.mark.parametrize(("height", "width"), [(32, 32), (96, 96), (60, 200)])
@pytest.mark.parametrize(
    ("scale", "ratio"), [((0.08, 1.0), (0.75, 4 / 3)), ((0.2, 1.0), (0.75, 4 / 3)), ((0.5, 0.9), (0.4, 1.1))]
)
def test_crops_are_drawn_as_by_torchvision(height: int, width: int, scale, ratio) -> None:
    torch.manual_seed(0)
    crop = v2.RandomResizedCrop(8, scale=scale, ratio=ratio)
    blank = torch.zeros(1, height, width)
    theirs = [crop.make_params([blank]) for _ in range(3000)]
    top, left, tall, wide = Views(crop_scale=scale, crop_ratio=ratio)._boxes(numbers(3000), height, width).double().T
    want = {name: np.array([one[name] for one in theirs], dtype=float) for name in ("top", "left", "height", "width")}
    pairs = {
        "area": (tall * wide, want["height"] * want["width"]),
        "ratio": (wide / tall, want["width"] / want["height"]),
        "top": (top, want["top"]),
        "left": (left, want["left"]),
        "right": (left + wide, want["left"] + want["width"]),
    }
    for name, (one, other) in pairs.items():
        assert ks_2samp(one.numpy(), other).pvalue > 0.002, name  # 45 comparisons, seeds fixed


def test_jitter_is_torchvisions_for_the_same_numbers() -> None:
    images = real(48, 16)
    views = Views(**{**STILL, "jitter": 0.9}, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.5)
    (got,) = views(images, torch.arange(48), size=16)
    drawn, changes = numbers(48), (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
    for image, view, row in zip(images / 255, got, drawn, strict=True):
        factors = [1 + (2 * row[column] - 1) * 0.8 for column in (21, 22, 23)] + [row[24] - 0.5]
        if row[20] < 0.9:
            for way in row[33:37].argsort():
                image = changes[way](image, float(factors[way]))
        torch.testing.assert_close(view, image, atol=3e-6, rtol=0)
    assert len({tuple(row.argsort().tolist()) for row in drawn[:, 33:37]}) > 15, "the order is not random"


def test_jitter_has_the_statistics_of_torchvision() -> None:
    images = real(16, 12).repeat(150, 1, 1, 1)  # 2,400
    strength = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
    (ours,) = Views(**{**STILL, "jitter": 0.8, "grayscale": 0.2}, **strength)(images, torch.arange(2400), size=12)
    torch.manual_seed(0)
    jitter = v2.Compose([v2.RandomApply([v2.ColorJitter(**strength)], p=0.8), v2.RandomGrayscale(0.2)])
    theirs = torch.stack([jitter(image) for image in images / 255])
    for name, measure in {
        "mean of a channel": lambda x: (x - images / 255).mean((2, 3)),
        "deviation of a channel": lambda x: x.std((2, 3)) - (images / 255).std((2, 3)),
        "colour": lambda x: (x.amax(1) - x.amin(1)).mean((1, 2))[:, None],
    }.items():
        one, other = measure(ours), measure(theirs)
        for channel in range(one.shape[1]):
            assert ks_2samp(one[:, channel].numpy(), other[:, channel].numpy()).statistic < 0.05, (name, channel)
        torch.testing.assert_close(one.mean(0), other.mean(0), atol=0.006, rtol=0)


def test_hue_turns_as_in_torchvision_all_around() -> None:
    pixels = torch.cat(
        [torch.rand(3, 500), torch.tensor([[0, 0, 0], [1, 1, 1], [0.5, 0.5, 0.2], [1, 0, 1], [0, 1, 1]]).T], 1
    )
    for turn in (-0.5, -0.31, -0.1, 0.0, 0.07, 0.25, 0.5):
        got = pixels[None].clone()
        _turn_hue(got, torch.tensor([6 * turn]), torch.empty(6, 1, 505))
        torch.testing.assert_close(got[0], adjust_hue(pixels[:, None], turn)[:, 0], atol=3e-6, rtol=0)


def test_blur_is_torchvisions_and_its_sigma_uniform() -> None:
    images = real(20, 40)
    (got,) = Views(**STILL, blur=0.6)(images, torch.arange(20), size=40)
    drawn = numbers(20)
    for image, view, row in zip(images / 255, got, drawn, strict=True):
        sigma = 0.1 + 1.9 * float(row[27])
        want = functional.gaussian_blur(image, [5, 5], [sigma, sigma]) if row[26] < 0.6 else image
        torch.testing.assert_close(view, want, atol=2e-6, rtol=0)
    assert kstest(numbers(3000)[:, 27].numpy(), "uniform").pvalue > 0.01


def test_solarize_inverts_what_is_bright() -> None:
    images = real(40, 8)
    (got,) = Views(**STILL, solarize=1.0)(images, torch.arange(40), size=8)
    assert torch.equal(got, functional.solarize(images / 255, 0.5))
    (some,) = Views(**STILL, solarize=0.2)(images, torch.arange(40), size=8)
    assert 2 <= (some != images / 255).flatten(1).any(1).sum() <= 16


def test_shrinking_by_an_affine_map_does_not_alias() -> None:
    stripes = (torch.arange(96) % 2 * 255).byte().expand(2, 3, 96, 96)
    for settings in ({"degrees": 1e-3}, {}):
        (view,) = Views(**STILL, **settings)(stripes, torch.arange(2), size=48)
        torch.testing.assert_close(view[..., 2:-2, 2:-2], torch.full((2, 3, 44, 44), 0.5), atol=0.02, rtol=0)


def test_bending_is_smooth_of_the_stated_size_and_about_nothing() -> None:
    """Seen on images of their own coordinates: what a view shows at a place is where it was taken from."""
    side, count = 24, 400
    place = ((torch.arange(side) + 0.5) / side).expand(count, 1, side, side)
    index = torch.arange(count)
    for ramp in (place, place.mT):
        (view,) = Views(**STILL, elastic=0.02, pad="border")(ramp.contiguous(), index, size=side)
        shift = (view - ramp)[..., 3:-3, 3:-3]  # a share of the side; the border is cut off at the last pixel
        assert shift.mean().abs() < 0.002
        corners = shift[:, 0, [4, 4, 12], [4, 12, 4]]  # near control points and between them
        assert 0.010 < corners.std() < 0.022
        assert shift.diff(dim=-1).abs().amax() < 0.03
        assert shift.diff(dim=-1).diff(dim=-1).abs().mean() < 0.001
        assert torch.corrcoef(shift.flatten(1)).fill_diagonal_(0).mean().abs() < 0.02  # every image its own


def test_strokes_get_thicker_and_thinner_by_half_a_pixel_at_most() -> None:
    line = torch.ones(300, 1, 15, 15)
    line[..., 6:9] = 0  # three dark pixels across
    (view,) = Views(**STILL, stroke=0.5)(line, torch.arange(300), size=15)
    width = (1 - view[:, 0, 7]).sum(dim=1)
    assert 2 <= width.min() < 2.1
    assert 3.9 < width.max() <= 4
    assert abs(width.mean() - 3) < 0.1
    torch.testing.assert_close(view[..., 0], line[..., 0])


@pytest.mark.parametrize("flip", [0.0, 0.5])
def test_quarter_turns_come_equally_often_and_move_no_pixel(flip) -> None:
    image = torch.rand(1, 3, 6, 6)
    settings = {**STILL, "flip": flip}
    (views,) = Views(**settings, quarter_turn=0.6)(image.expand(2000, -1, -1, -1), torch.arange(2000), size=6)
    mirrors = [image[0], image[0].flip(2)] if flip else [image[0]]
    kinds = [mirror.rot90(by, (1, 2)) for by in range(4) for mirror in mirrors]
    same = torch.stack([((views - kind).abs() < 1e-6).flatten(1).all(dim=1) for kind in kinds])
    assert same.sum(dim=0).eq(1).all(), "each is one of them"
    share = same.float().mean(dim=1).view(4, -1).sum(dim=1)
    torch.testing.assert_close(share, torch.tensor([0.4, 0.2, 0.2, 0.2]), atol=0.03, rtol=0)
    assert same.float().mean(dim=1).min() > 0.15 / len(mirrors)
    (still,) = Views(**settings)(image.expand(2000, -1, -1, -1), torch.arange(2000), size=6)
    unturned = same.view(4, len(mirrors), -1)[0].any(dim=0)
    torch.testing.assert_close(views[unturned], still[unturned])


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (2, 2), (3, 7), (9, 4)])
def test_the_outermost_neighbour_is_that_of_pooling(shape) -> None:
    images = torch.rand(3, 2, *shape)
    assert torch.equal(module._outermost(images, torch.maximum), F.max_pool2d(images, 3, 1, 1))
    assert torch.equal(module._outermost(images, torch.minimum), -F.max_pool2d(-images, 3, 1, 1))


def test_fixed_views_are_the_image_and_the_same_others_every_time() -> None:
    views = FixedViews(4, degrees=10, translate=0.1, crop_scale=[0.8, 1.2], elastic=0.03, seed=3)
    grids = views.grids(6)
    assert torch.equal(
        grids, FixedViews(4, degrees=10, translate=0.1, crop_scale=(0.8, 1.2), elastic=0.03, seed=3).grids(6)
    )
    image = torch.rand(1, 1, 6, 6)
    torch.testing.assert_close(F.grid_sample(image, grids[:1], align_corners=False), image)
    assert len({grid.numpy().tobytes() for grid in grids}) == 4
    other = FixedViews(4, degrees=10, translate=0.1, crop_scale=(0.8, 1.2), elastic=0.03, seed=4).grids(6)
    assert not torch.equal(grids[1:], other[1:])
    # saved encoders hold the settings alone: these numbers must never change
    pinned = [[0.77467, -0.73679], [0.86234, -1.03049], [1.01722, -0.82555]]
    torch.testing.assert_close(grids[1:, 0, 5], torch.tensor(pinned), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="FixedViews needs count >= 2"):
        FixedViews(1)
    with pytest.raises(ValueError, match="pad border"):
        FixedViews(2, pad="wrap")


# --- determinism ---

EVERYTHING = {"count": 2, "blur": 0.5, "solarize": 0.3, "erase": 0.3, "second": {"blur": 0.1}, "small_count": 2}


@pytest.mark.parametrize(
    "settings",
    [{}, {"degrees": 20.0}, {"hue": 0.0}, {"jitter": 0.0}, {"elastic": 0.05, "stroke": 0.5, "quarter_turn": 0.75}],
    ids=str,
)
@pytest.mark.parametrize(("channels", "size"), [(3, 13), (3, 32), (1, 13), (3, 64)])
@pytest.mark.parametrize("kind", ["uint8", "float"])
def test_a_view_has_the_same_bits_in_any_batch_chunk_and_thread(kind, channels, size, settings, monkeypatch) -> None:
    images, index = pictures(40, channels, size + 5), torch.arange(40) * 7
    images = images if kind == "uint8" else images / 255
    views = Views(**{**EVERYTHING, **settings})
    whole = views(images, index, size=size)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        again = views(images, index, size=size)
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(module, "_CHUNK", 3 * 3 * size**2)
    chunked = views(images, index, size=size)
    order = torch.tensor([31, 4, 0, 22, 17])
    part = views(images[order], index[order], size=size)
    alone = views(images[9:10], index[9:10], size=size)
    for a, b, c, d, e in zip(whole, again, chunked, part, alone, strict=True):
        assert torch.equal(a, b), "threads"
        assert torch.equal(a, c), "chunks"
        assert torch.equal(a[order], d), "part"
        assert torch.equal(a[9:10], e), "alone"


# --- several crops ---


def test_small_crops_come_after_the_large_ones_and_are_small() -> None:
    images = torch.arange(64).repeat(64, 1).expand(300, 3, 64, 64).byte()  # a ramp: its slope tells a crop's width
    views = Views(count=2, crop_scale=(0.5, 1.0), flip=0.0, jitter=0.0, grayscale=0.0, small_count=3, small_size=20)
    made = views(images, torch.arange(300), size=32)
    assert [tuple(view.shape) for view in made] == [(300, 3, 32, 32)] * 2 + [(300, 3, 20, 20)] * 3
    spans = [(view[:, 0, 0, -1] - view[:, 0, 0, 0]) * 255 for view in made]
    assert spans[0].min() > 35
    assert spans[2].max() < 34
    assert not torch.equal(made[2], made[3])
    assert Views(small_count=1)(images, torch.arange(300), size=32)[1].shape[-1] == 16


def test_the_second_view_and_small_crops_have_settings_of_their_own() -> None:
    images = real(30, 16)
    views = Views(**STILL, count=3, second={"solarize": 1.0}, small_count=1, small={"grayscale": 1.0})
    first, second, third, small = views(images, torch.arange(30), size=16)
    assert torch.equal(first, images / 255)
    assert torch.equal(third, images / 255)
    assert torch.equal(second, functional.solarize(images / 255, 0.5))
    torch.testing.assert_close(small[:, 0], small[:, 2])
    plain = Views(count=3)(images, torch.arange(30), size=16)
    other = Views(count=3, second={"blur": 1.0})(images, torch.arange(30), size=16)
    assert torch.equal(plain[0], other[0])
    assert torch.equal(plain[2], other[2])


# --- other people's transforms ---

SIMCLR = v2.Compose([v2.RandomResizedCrop(8), v2.RandomHorizontalFlip(), v2.ColorJitter(0.4, 0.4, 0.4, 0.1)])


def test_torchvisions_transforms_do_not_depend_on_the_batch() -> None:
    images, index, views = real(10, 16), torch.arange(10), keyed_views(SIMCLR)
    torch.manual_seed(5)
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    (whole,) = views(images, index, size=8, seed=1, epoch=2)
    assert whole.shape == (10, 3, 8, 8)
    assert whole.dtype == torch.float32
    order = torch.tensor([7, 2])
    assert torch.equal(whole[order], views(images[order], index[order], size=8, seed=1, epoch=2)[0])
    assert not torch.equal(whole, views(images, index, size=8, seed=1, epoch=3)[0])
    first, second = PerImage(SIMCLR, count=2)(images, index, size=8, seed=1, epoch=2)
    assert torch.equal(first, whole)
    assert not torch.equal(first, second)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    assert random.getstate() == before[2]


def test_any_callable_takes_whole_batches() -> None:
    images, index = real(6, 8), torch.arange(6)
    flip = keyed_views(lambda batch: batch.flip(-1))
    assert torch.equal(flip(images, index, size=8)[0], images.flip(-1) / 255)
    noisy = keyed_views(lambda batch: (batch, batch + torch.rand_like(batch)))
    once, again = noisy(images, index, size=8, seed=3), noisy(images, index, size=8, seed=3)
    assert len(once) == 2
    assert torch.equal(once[1], again[1])
    with pytest.raises(ValueError, match=r"a tensor of shape \(3, 8, 8\) for 6 images.*PerImage"):
        keyed_views(lambda batch: batch[0])(images, index, size=8)
    with pytest.raises(ValueError, match=r"views gave a ndarray, expected a tensor"):
        keyed_views(lambda batch: batch.numpy())(images, index, size=8)
    with pytest.raises(ValueError, match="expected Views or a transform"):
        keyed_views(3)


def test_kornia_and_albumentations() -> None:
    pytest.importorskip("kornia")
    import kornia.augmentation as K

    images, index = real(6, 16), torch.arange(6)
    views = keyed_views(K.AugmentationSequential(K.RandomResizedCrop((8, 8)), K.ColorJitter(0.4, 0.4, 0.4, 0.1)))
    (one,), (again,) = views(images, index, size=8), views(images, index, size=8)
    assert one.shape == (6, 3, 8, 8)
    assert torch.equal(one, again)


def test_albumentations_get_arrays() -> None:
    A = pytest.importorskip("albumentations")
    images, index = real(6, 16), torch.arange(6)
    views = keyed_views(A.Compose([A.RandomResizedCrop((8, 8)), A.HorizontalFlip(), A.ColorJitter()]))
    (whole,), (part,) = views(images, index, size=8), views(images[2:4], index[2:4], size=8)
    assert whole.shape == (6, 3, 8, 8)
    assert torch.equal(whole[2:4], part)


@pytest.mark.parametrize("views", [SIMCLR, PerImage(SIMCLR, count=2), lambda batch: batch[..., :8, :8]])
def test_image_data_takes_them(views) -> None:
    images = real(4, 16)
    data = ImageData(Source.from_arrays(images.permute(0, 2, 3, 1).numpy(), ["a", "b"] * 2), image_size=16, views=views)
    data.trainer = SimpleNamespace(training=True, current_epoch=0)
    made = data.on_after_batch_transfer(Batch((images,), None, torch.arange(4)), 0).views
    assert all(view.shape == (4, 3, 8, 8) for view in made)
    assert len(made) == getattr(views, "count", 1)
    assert made[0].min() < -0.5  # normalised


# --- mixtures ---


@pytest.mark.parametrize("kind", ["mixup", "cutmix", "mosaic"])
def test_mixtures_hold_the_stated_shares_and_are_the_same_on_any_number_of_ranks(kind, monkeypatch) -> None:
    index = torch.randperm(100, generator=torch.Generator().manual_seed(0))[:24]
    images = torch.eye(24)[:, :, None, None].expand(24, 24, 32, 32).contiguous()  # channel i is lit in image i alone
    mix = Mix(kind, probability=0.8)
    mixed, rows, shares = mix(images, index, seed=2, epoch=3)
    held = torch.zeros(24, 24).scatter_add_(1, rows, shares)
    torch.testing.assert_close(mixed.mean((2, 3)), held, atol=1e-5, rtol=0)
    torch.testing.assert_close(shares.sum(1), torch.ones(24))
    assert (rows[:, 0] == torch.arange(24)).all()
    assert len(set(rows[:, 1].tolist())) == 24, "everyone is a partner once"
    assert 1 <= (shares[:, 0] == 1).sum() <= 12
    assert not torch.equal(rows, mix(images, index, seed=2, epoch=4)[1])
    order = torch.cat([torch.arange(0, 24, 2), torch.arange(1, 24, 2)])  # how two ranks share this batch
    union = {images.shape[1:]: images[order], index.shape[1:]: index[order]}
    monkeypatch.setattr(module, "gather", lambda x: union[x.shape[1:]])
    for own in order.split([12, 12]):
        got, partners, share = mix(images[own], index[own], seed=2, epoch=3)
        assert torch.equal(got, mixed[own])
        assert torch.equal(order[partners], rows[own])
        assert torch.equal(share, shares[own])


def test_mixup_shares_are_beta() -> None:
    _, _, shares = Mix("mixup", alpha=0.4)(torch.zeros(3000, 1, 1, 1), torch.arange(3000))
    assert kstest(shares[:, 0].numpy(), "beta", args=(0.4, 0.4)).pvalue > 0.01
    _, _, shares = Mix("cutmix")(torch.zeros(3000, 1, 64, 64), torch.arange(3000))
    assert 0.6 < shares[:, 0].mean() < 0.75  # rectangles are cut at the edges


def test_wrong_mixtures_are_explained() -> None:
    with pytest.raises(ValueError, match="kind mixup"):
        Mix("blend")
    with pytest.raises(ValueError, match="stand in the batch twice"):
        Mix()(torch.zeros(3, 1, 4, 4), torch.tensor([1, 1, 2]))
