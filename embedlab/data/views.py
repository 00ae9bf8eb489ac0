"""Views: random versions of a whole batch of images, made on the device, every image with its own parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from embedlab._ops import keyed_uniform

# columns of the random numbers of one view of one image
_TRIES = 6  # boxes drawn per crop, of which the first that fits is taken
_AREA, _RATIO, _PLACE = slice(0, _TRIES), slice(_TRIES, 2 * _TRIES), slice(2 * _TRIES, 2 * _TRIES + 2)
_FLIP, _AFFINE, _COLOUR, _BLUR, _ERASE = 14, slice(15, 20), slice(20, 26), slice(26, 28), slice(28, 33)
_COLUMNS = 33

# luma and the YIQ transform; a rotation of (I, Q) turns the hue
_RGB_TO_YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def color_statistics(
    channels: int, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel; ImageNet's by default, their average where there are not 3 channels."""
    if mean is None:
        mean = IMAGENET_MEAN if channels == 3 else (sum(IMAGENET_MEAN) / 3,) * channels
    if std is None:
        std = IMAGENET_STD if channels == 3 else (sum(IMAGENET_STD) / 3,) * channels
    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise ValueError(f"mean and std need {channels} values each and std > 0, got {list(mean)} and {list(std)}.")
    return tuple(mean), tuple(std)


def to_float(images: Tensor) -> Tensor:
    """uint8 in [0, 255] to float32 in [0, 1]; floats pass."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


@dataclass(frozen=True)
class Views:
    """Random views of a batch of uint8 images.

    Geometry (crop, flip, rotation, shear) is one bilinear resampling, colour is one 3x3 matrix per image, and every
    number comes from (seed, epoch, sample, view), so that a view does not depend on batch, worker or rank.

    Args:
        count: Views per image; 2 for SimCLR.
        crop_scale: Share of the image's area that a crop covers, as torchvision's RandomResizedCrop.
        crop_ratio: Aspect ratio of the crop.
        flip: Probability of a left-right flip.
        degrees: Largest rotation to either side.
        shear: Largest shear to either side, as a slope.
        translate: Largest shift to either side, as a share of the image's side.
        brightness: Factor from [1 - b, 1 + b]; contrast and saturation alike.
        contrast: See brightness; around the image's mean luma.
        saturation: See brightness; colour images only.
        hue: Largest turn to either side as a share of the colour circle, up to 0.5; colour images only.
        jitter: Probability that brightness, contrast, saturation and hue are changed at all.
        grayscale: Probability that a colour image turns grey.
        blur: Probability of a Gaussian blur, its sigma from [0.1, 2] pixels.
        erase: Probability that a rectangle of 5 to 25 % of the area turns into the image's mean.
        pad: What stands outside the image: "border" repeats the edge, "zeros" is black, "reflection" mirrors.
    """

    count: int = 1
    crop_scale: tuple[float, float] = (0.2, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    flip: float = 0.5
    degrees: float = 0.0
    shear: float = 0.0
    translate: float = 0.0
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    jitter: float = 0.8
    grayscale: float = 0.2
    blur: float = 0.0
    erase: float = 0.0
    pad: str = field(default="reflection")

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        if not 0 < low <= high:
            raise ValueError(f"Views.crop_scale needs 0 < low <= high (shares of the area), got {self.crop_scale}.")
        for name in ("flip", "jitter", "grayscale", "blur", "erase"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"Views.{name} is a probability in [0, 1], got {getattr(self, name)}.")
        if self.count < 1 or self.pad not in ("border", "zeros", "reflection"):
            raise ValueError(
                f"Views needs count >= 1 and pad border|zeros|reflection, got {self.count} and {self.pad!r}."
            )

    def __call__(
        self, images: Tensor, index: Tensor, *, size: int, seed: int = 0, epoch: int = 0
    ) -> tuple[Tensor, ...]:
        """Draw the views.

        Args:
            images: (B, C, H, W) uint8, or float in [0, 1].
            index: (B,) global sample numbers.
            size: Side of the views in pixels.
            seed: The run's seed.
            epoch: Epoch number; another epoch, other views.

        Returns:
            `count` tensors (B, C, size, size), float32 in [0, 1].
        """
        images = to_float(images)
        return tuple(
            self._view(images, keyed_uniform(index, _COLUMNS, seed=seed, epoch=epoch, stream=view), size)
            for view in range(self.count)
        )

    def _view(self, images: Tensor, random: Tensor, size: int) -> Tensor:
        theta = self._geometry(random, images.shape[-1] / images.shape[-2])
        grid = F.affine_grid(theta, [len(images), images.shape[1], size, size], align_corners=False)
        views = F.grid_sample(images, grid, padding_mode=self.pad, align_corners=False)
        if self.jitter or self.grayscale:
            views = self._colour(views, random[:, _COLOUR])
        if self.blur:
            views = _blur(views, random[:, _BLUR], self.blur)
        if self.erase:
            views = _erase(views, random[:, _ERASE], self.erase)
        return views

    def _geometry(self, random: Tensor, aspect: float) -> Tensor:
        """(B, 2, 3) matrices from the view's coordinates to the image's, both in [-1, 1]."""
        width, height = self._box(random, aspect)
        angle, slope_x, slope_y, move_x, move_y = random[:, _AFFINE].mul(2).sub(1).unbind(dim=1)
        place_x, place_y = random[:, _PLACE].mul(2).sub(1).unbind(dim=1)
        shift_x = (1 - width).clamp(min=0) * place_x + 2 * self.translate * move_x
        shift_y = (1 - height).clamp(min=0) * place_y + 2 * self.translate * move_y
        mirror = torch.where(random[:, _FLIP] < self.flip, -1.0, 1.0)
        angle, slope_x, slope_y = math.radians(self.degrees) * angle, self.shear * slope_x, self.shear * slope_y
        cos, sin = angle.cos(), angle.sin()
        a, b = cos - sin * slope_y, cos * slope_x - sin
        c, d = sin + cos * slope_y, sin * slope_x + cos
        rows = [width * a * mirror, width * b, shift_x, height * c * mirror, height * d, shift_y]
        return torch.stack(rows, dim=1).view(-1, 2, 3)

    def _box(self, random: Tensor, aspect: float) -> tuple[Tensor, Tensor]:
        """Width and height (B,) of the crops as shares of the image; as torchvision, the first drawn box that fits."""
        area = _between(random[:, _AREA], *self.crop_scale)
        ratio = _between(random[:, _RATIO], math.log(self.crop_ratio[0]), math.log(self.crop_ratio[1])).exp()
        sides = torch.stack([(area * ratio / aspect).sqrt(), (area / ratio * aspect).sqrt()])  # (2, B, tries)
        fits = (sides <= max(1.0, self.crop_scale[1]) + 1e-6).all(dim=0)
        first = fits.byte().argmax(dim=1)  # 0 where none fits; that box is cut to the image
        width, height = (
            sides.gather(2, first.expand(2, -1)[..., None]).squeeze(2).clamp(max=max(1.0, self.crop_scale[1]))
        )
        return width, height

    @staticmethod
    def _spread(random: Tensor, most: float) -> Tensor:
        return (2 * random - 1) * most

    def _colour(self, views: Tensor, random: Tensor) -> Tensor:
        """Brightness, contrast, saturation, hue and grey as one matrix and one offset per image."""
        jittered = random[:, 0] < self.jitter
        brightness = torch.where(jittered, 1 + self._spread(random[:, 1], self.brightness), 1.0)
        contrast = torch.where(jittered, 1 + self._spread(random[:, 2], self.contrast), 1.0)
        if views.shape[1] != 3:
            mean = views.mean(dim=(1, 2, 3))
            offset = brightness * mean * (1 - contrast)
            return (views * _spatial(brightness * contrast) + _spatial(offset)).clamp(0, 1)
        saturation = torch.where(jittered, 1 + self._spread(random[:, 3], self.saturation), 1.0)
        saturation = torch.where(random[:, 5] < self.grayscale, 0.0, saturation)
        turn = torch.where(jittered, self._spread(random[:, 4], 2 * math.pi * self.hue), 0.0)
        to_yiq = torch.tensor(_RGB_TO_YIQ, device=views.device)
        to_rgb = torch.linalg.inv(to_yiq)
        zero, one = torch.zeros_like(turn), torch.ones_like(turn)
        cos, sin = saturation * turn.cos(), saturation * turn.sin()
        in_yiq = torch.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos], dim=1).view(-1, 3, 3)
        matrix = _matrix(brightness * contrast) * (to_rgb @ in_yiq @ to_yiq)  # (B, 3, 3)
        luma = (views.mean(dim=(2, 3)) * to_yiq[0]).sum(dim=1)
        offset = brightness * luma * (1 - contrast)
        return torch.baddbmm(_matrix(offset), matrix, views.flatten(2)).view_as(views).clamp(0, 1)


def _between(random: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * random


def _spatial(x: Tensor) -> Tensor:
    return x[:, None, None, None]


def _matrix(x: Tensor) -> Tensor:
    return x[:, None, None]


def _blur(views: Tensor, random: Tensor, probability: float) -> Tensor:
    """Separable Gaussian of a kernel of a tenth of the side, as SimCLR; a depthwise convolution per image."""
    batch, channels, height, width = views.shape
    radius = max(1, round(width / 20))
    sigma = torch.where(random[:, 0] < probability, _between(random[:, 1], 0.1, 2.0), 1e-3)
    taps = torch.arange(-radius, radius + 1, device=views.device)
    kernel = torch.exp(-0.5 * (taps / sigma[:, None]) ** 2)
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(channels, dim=0)  # (B C, 2 radius + 1)
    rows = views.reshape(1, batch * channels, height, width)
    rows = F.pad(rows, (radius, radius, radius, radius), mode="reflect")
    rows = F.conv2d(rows, kernel[:, None, None, :], groups=batch * channels)
    rows = F.conv2d(rows, kernel[:, None, :, None], groups=batch * channels)
    return rows.view(batch, channels, height, width)


def _erase(views: Tensor, random: Tensor, probability: float) -> Tensor:
    """A rectangle per image turns into the image's mean, as Random Erasing, Zhong et al. 2020."""
    size = views.shape[-1]
    area = _between(random[:, 1], 0.05, 0.25)
    ratio = _between(random[:, 2], math.log(0.5), math.log(2.0)).exp()
    half_width, half_height = (area * ratio).sqrt() / 2, (area / ratio).sqrt() / 2
    position = (torch.arange(size, device=views.device) + 0.5) / size
    in_columns = (position - random[:, 3:4]).abs() < half_width[:, None]  # (B, W)
    in_rows = (position - random[:, 4:5]).abs() < half_height[:, None]  # (B, H)
    erased = in_rows[:, None, :, None] & in_columns[:, None, None, :] & _spatial(random[:, 0] < probability)
    return torch.where(erased, views.mean(dim=(2, 3), keepdim=True), views)
