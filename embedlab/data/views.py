"""Views: random versions of a whole batch of images, made on the device, every image with its own parameters."""

from __future__ import annotations

import functools
import math
import random as python_random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from embedlab._ops import gather, keyed_uniform

# columns of the random numbers of one view of one image; a column never changes its meaning, new ones go to the end
_TRIES = 6  # boxes drawn per crop, of which the first that fits is taken
_AREA, _RATIO, _PLACE = slice(0, _TRIES), slice(_TRIES, 2 * _TRIES), slice(2 * _TRIES, 2 * _TRIES + 2)
_FLIP, _AFFINE, _COLOUR, _BLUR, _ERASE = 14, slice(15, 20), slice(20, 26), slice(26, 28), slice(28, 33)
_ORDER, _SOLARIZE, _MORE_AREA, _MORE_RATIO = slice(33, 37), 37, slice(38, 42), slice(42, 46)
_BEND, _STROKE, _QUARTER = slice(46, 78), 78, 79
_FEW_COLUMNS, _COLUMNS = 46, 80  # without and with the last three

_LATTICE = 4  # control points per side of the elastic distortion

_LUMA = (0.2989, 0.587, 0.114)  # torchvision's, as all numbers of the colour jitter
_CHUNK = 2**18  # numbers that are worked on at once: they and their temporaries stay in a core's cache
_PLANES = 6  # of memory for the hue; to ask the system for it anew costs more than the arithmetic
_NATIVE = 64**2  # pixels from which torch's own resizing beats two matrix products on a CPU
_MIX_STREAM = 2**16  # of the keyed numbers, past those of all views
_NEVER = 4  # stands for the step after which the hue turns where there is no jitter

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
    return images.float().div_(255) if images.dtype == torch.uint8 else images


@dataclass(frozen=True)
class Views:
    """Random views of a batch of uint8 images, with the distributions of torchvision's transforms.

    Every number comes from (seed, epoch, sample, view), so that a view does not depend on batch, worker or rank. The
    order is crop, flip, quarter turn, stroke, jitter, grey, blur, solarise, erase.

    Geometry is one resampling. A crop and a flip are torchvision's `RandomResizedCrop`, antialiased, to the pixel. With
    rotation, shear, shift, bending or a crop larger than the image it is one bilinear map whose crops lie between
    pixels; where that shrinks by more than 1.2 it takes the mean of several points per pixel. Colour images are
    jittered as by torchvision's `ColorJitter`: its four changes in random order, each cut off at [0, 1], hue by HSV.
    Images of another number of channels get brightness, then contrast, with one cut at the end.

    Args:
        count: Large views per image; 2 for SimCLR.
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
        blur: Probability of a Gaussian blur, its kernel a tenth of the side as SimCLR's.
        blur_sigma: Smallest and largest deviation of the blur in pixels of the view.
        solarize: Probability that all values from 0.5 on are inverted.
        erase: Probability that a rectangle of 5 to 25 % of the area turns into the image's mean.
        pad: What stands outside the image: "border" repeats the edge, "zeros" is black, "reflection" mirrors.
        second: Settings in which the second view differs from the others, such as BYOL's `{blur: 0.1, solarize: 0.2}`
            beside `blur: 1.0`.
        small_count: Small crops after the large views, as SwAV and DINO take them.
        small_size: Side of the small crops in pixels; None is half of the large ones'.
        small_scale: Their crop_scale.
        small: Settings in which they differ from the first view, such as DINO's `{blur: 0.5}`.
        elastic: Smooth bending as in handwriting: standard deviation of the shifts of 4 x 4 control points, as a share
            of the image's side.
        stroke: Strokes get up to this part of a pixel thicker or thinner at each edge, in [0, 1].
        quarter_turn: Probability of a turn by 90, 180 or 270 degrees, each as often; 0.75 for pictures of which no side
            is the upper one, such as surfaces, tissue and the ground from above.

    Example:
        >>> images, index = torch.zeros(5, 3, 32, 32, dtype=torch.uint8), torch.arange(5)
        >>> dino = Views(count=2, blur=1.0, second={"blur": 0.1, "solarize": 0.2}, small_count=4, small={"blur": 0.5})
        >>> [tuple(view.shape[2:]) for view in dino(images, index, size=32)]
        [(32, 32), (32, 32), (16, 16), (16, 16), (16, 16), (16, 16)]
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
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0
    second: dict[str, Any] | None = None
    small_count: int = 0
    small_size: int | None = None
    small_scale: tuple[float, float] = (0.05, 0.2)
    small: dict[str, Any] | None = None
    elastic: float = 0.0
    stroke: float = 0.0
    quarter_turn: float = 0.0

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        if not 0 < low <= high:
            raise ValueError(f"Views.crop_scale needs 0 < low <= high (shares of the area), got {self.crop_scale}.")
        if self.elastic < 0:
            raise ValueError(f"Views.elastic is a share of the side >= 0, got {self.elastic}; 0.02 to 0.05 bends.")
        if not 0 <= self.stroke <= 1:
            raise ValueError(f"Views.stroke must lie in [0, 1] (part of a pixel), got {self.stroke}.")
        for name in ("flip", "jitter", "grayscale", "blur", "solarize", "erase", "quarter_turn"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"Views.{name} is a probability in [0, 1], got {getattr(self, name)}.")
        if self.count < 1 or self.pad not in ("border", "zeros", "reflection"):
            raise ValueError(
                f"Views needs count >= 1 and pad border|zeros|reflection, got {self.count} and {self.pad!r}."
            )
        if not 0 <= self.hue <= 0.5 or not 0 < self.blur_sigma[0] <= self.blur_sigma[1]:
            raise ValueError(
                "Views needs hue in [0, 0.5] (half the colour circle) and blur_sigma 0 < low <= high, "
                f"got {self.hue} and {self.blur_sigma}."
            )
        self._check_others()

    def _check_others(self) -> None:
        if self.small_count < 0 or (self.small_size is not None and self.small_size < 1):
            raise ValueError(
                f"Views needs small_count >= 0 and small_size >= 1, got {self.small_count} and {self.small_size}."
            )
        if self.second and self.count < 2:
            raise ValueError(f"Views.second changes the second view, but count is {self.count}; set it to 2.")
        own = {"count", "second", "small_count", "small_size", "small_scale", "small"}
        allowed = {one.name for one in fields(self)} - own
        for name in ("second", "small"):
            unknown = sorted(set(getattr(self, name) or {}) - allowed)
            if unknown:
                raise ValueError(f"Views.{name} got {', '.join(unknown)}; it may set {', '.join(sorted(allowed))}.")
        list(self._groups(1))  # their settings are checked where they are built

    def _groups(self, size: int) -> Iterator[tuple[Views, int, list[int]]]:
        """Views that are drawn alike: their settings, side and numbers."""
        plain = replace(self, count=1, second=None, small_count=0, small=None) if self._has_others else self
        yield plain, size, [number for number in range(self.count) if number != 1 or not self.second]
        if self.second:
            yield replace(plain, **self.second), size, [1]
        if self.small_count:
            small = {"crop_scale": self.small_scale} | (self.small or {})
            numbers = list(range(self.count, self.count + self.small_count))
            yield replace(plain, **small), self.small_size or max(1, size // 2), numbers

    @property
    def _has_others(self) -> bool:
        return bool(self.second or self.small_count or self.small)

    def __call__(
        self,
        images: Tensor,
        index: Tensor,
        *,
        size: int,
        seed: int = 0,
        epoch: int = 0,
        normalize: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        """Draw the views.

        Args:
            images: (B, C, H, W) uint8, or float in [0, 1].
            index: (B,) global sample numbers.
            size: Side of the large views in pixels.
            seed: The run's seed.
            epoch: Epoch number; another epoch, other views.
            normalize: Applied to the views while they are in the cache, image by image.

        Returns:
            `count` tensors (B, C, size, size) and `small_count` of side small_size, float32 in [0, 1].
        """
        views: dict[int, Tensor] = {}
        for settings, side, numbers in self._groups(size):
            random = torch.cat(
                [keyed_uniform(index, settings._columns, seed=seed, epoch=epoch, stream=number) for number in numbers]
            )  # (V B, columns)
            drawn = settings._draw(images, random, side, normalize or _as_it_is)
            views.update(zip(numbers, drawn.chunk(len(numbers)), strict=True))
        return tuple(views[number] for number in sorted(views))

    @property
    def _columns(self) -> int:
        return _COLUMNS if self.elastic or self.stroke or self.quarter_turn else _FEW_COLUMNS

    def _draw(self, images: Tensor, random: Tensor, size: int, normalize: Callable[[Tensor], Tensor]) -> Tensor:
        """(V B, C, size, size) for (V B, columns) random numbers, those of each view in the order of the images."""
        cut, plan, channels = self._cutter(images, random, size), self._plan(random), images.shape[1]
        if images.device.type != "cpu":  # fixed shapes: no wait for the device
            everything = torch.arange(len(random), device=images.device)
            scratch = images.new_empty((_PLANES, len(random), size**2), dtype=torch.float32)
            views = self._recolour(self._redraw(cut(everything), random), plan, _hue_step(random), scratch)
            return normalize(_erase(views, random[:, _ERASE], self.erase) if self.erase else views)
        drawn = torch.empty(len(random), channels, size, size)
        most = max(1, _CHUNK // (channels * size**2))
        scratch = torch.empty(_PLANES, min(most, len(random)), size**2)
        for rows, step in self._chunks(random, channels, most):
            views = self._redraw(cut(rows), random[rows])
            views = self._recolour(views, plan[rows], step, scratch[:, : len(rows)])
            if self.erase:
                views = _erase(views, random[rows, _ERASE], self.erase)
            drawn[rows] = normalize(views)
        return drawn

    def _chunks(self, random: Tensor, channels: int, most: int) -> Iterator[tuple[Tensor, int]]:
        """Rows that are worked on together, and the step before which all of them turn their hue."""
        steps = torch.full((len(random),), _NEVER)
        if self.jitter and channels == 3:
            steps = torch.where(random[:, _COLOUR.start] < self.jitter, _hue_step(random), steps)
        rows = steps.argsort(stable=True)
        groups = torch.split(rows, torch.bincount(steps, minlength=_NEVER + 1).tolist())
        for step, group in enumerate(groups):
            if len(group):
                yield from ((chunk, step) for chunk in group.chunk(math.ceil(len(group) / most)))

    # --- geometry ---

    def _cutter(self, images: Tensor, random: Tensor, size: int) -> Callable[[Tensor], Tensor]:
        """A function from row numbers (n,) to their views (n, C, size, size) before any change of colour."""
        if self.degrees or self.shear or self.translate or self.elastic or self.crop_scale[1] > 1:
            return self._affine_cutter(images, random, size)
        boxes = self._boxes(random, *images.shape[-2:])
        mirror = random[:, _FLIP] < self.flip
        if (
            images.dtype == torch.uint8
            and images.device.type == "cpu"
            and images.shape[-2] * images.shape[-1] > _NATIVE
        ):
            corners = boxes.tolist()

            def cut(rows: Tensor) -> Tensor:
                views = torch.stack([_resize(images[row % len(images)], corners[row], size) for row in rows.tolist()])
                return to_float(_some(views, mirror[rows], lambda some, _: some.flip(-1)))

            return cut

        def multiply(rows: Tensor) -> Tensor:
            crops = to_float(images[rows % len(images)])
            count, channels, height, width = crops.shape
            top, left, tall, wide = boxes[rows].float().unbind(dim=1)
            across = _triangle(left, wide, width, size, mirror[rows])  # (n, size, W)
            down = _triangle(top, tall, height, size)  # (n, size, H)
            narrow = torch.bmm(crops.view(count, channels * height, width), across.transpose(1, 2))
            return down[:, None] @ narrow.view(count, channels, height, size)

        return multiply

    def _boxes(self, random: Tensor, height: int, width: int) -> Tensor:
        """(N, 4) top, left, height and width in whole pixels, drawn as torchvision draws them."""
        area = _between(torch.cat([random[:, _AREA], random[:, _MORE_AREA]], dim=1), *self.crop_scale)
        low, high = self.crop_ratio
        ratio = torch.cat([random[:, _RATIO], random[:, _MORE_RATIO]], dim=1)
        ratio = _between(ratio, math.log(low), math.log(high)).exp()
        area = area * (height * width)
        across, down = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()  # (N, tries)
        fits = (across > 0) & (across <= width) & (down > 0) & (down <= height)
        first = fits.byte().argmax(dim=1, keepdim=True)
        any_fits = fits.any(dim=1)
        whole = (min(height, round(width / low)), min(width, round(height * high)))  # where none fits
        down = torch.where(any_fits, down.gather(1, first).squeeze(1), whole[0])
        across = torch.where(any_fits, across.gather(1, first).squeeze(1), whole[1])
        place_x, place_y = torch.where(any_fits[:, None], random[:, _PLACE], 0.5).unbind(dim=1)
        room_y, room_x = height - down, width - across
        top = torch.minimum((place_y * (room_y + 1)).floor(), room_y)
        left = torch.minimum((place_x * (room_x + 1)).floor(), room_x)
        return torch.stack([top, left, down, across], dim=1).long()

    def _affine_cutter(self, images: Tensor, random: Tensor, size: int) -> Callable[[Tensor], Tensor]:
        theta = self._geometry(random, images.shape[-1] / images.shape[-2])
        largest = min(max(1.0, self.crop_scale[1]), math.sqrt(self.crop_scale[1] * max(self.crop_ratio)))
        points = max(1, math.ceil(largest * max(images.shape[-2:]) / size - 0.2))

        def cut(rows: Tensor) -> Tensor:
            shape = [len(rows), images.shape[1], size * points, size * points]
            grid = F.affine_grid(theta[rows], shape, align_corners=False)
            if self.elastic:
                grid = grid + self._bend(random[rows, _BEND], size * points)
            views = F.grid_sample(
                to_float(images[rows % len(images)]), grid, padding_mode=self.pad, align_corners=False
            )
            return F.avg_pool2d(views, points) if points > 1 else views

        return cut

    def _geometry(self, random: Tensor, aspect: float) -> Tensor:
        """(N, 2, 3) matrices from the view's coordinates to the image's, both in [-1, 1]."""
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

    def _bend(self, random: Tensor, side: int) -> Tensor:
        """(N, side, side, 2) shifts in the image's coordinates, which go from -1 to 1: cubic between control points."""
        lattice = (random - 0.5).mul(2 * self.elastic * math.sqrt(12)).view(-1, 2, _LATTICE, _LATTICE)
        between = _cubic(side, random.device)
        return (between @ lattice @ between.T).permute(0, 2, 3, 1)

    def _redraw(self, views: Tensor, random: Tensor) -> Tensor:
        """Quarter turns; strokes thicker or thinner: part of the way to the darkest or lightest neighbour."""
        if self.quarter_turn:
            turns = (random[:, _QUARTER] * (3 / self.quarter_turn)).floor()
            for number in range(3):
                views = _some(views, turns == number, functools.partial(_turn_quarters, number + 1))
        if not self.stroke:
            return views
        part = _spatial(random[:, _STROKE].mul(2).sub(1).mul(self.stroke))
        neighbours = torch.where(part > 0, _outermost(views, torch.maximum), _outermost(views, torch.minimum))
        return torch.lerp(views, neighbours, part.abs())

    def _box(self, random: Tensor, aspect: float) -> tuple[Tensor, Tensor]:
        """Width and height (N,) of the crops as shares of the image; as torchvision, the first drawn box that fits."""
        area = _between(random[:, _AREA], *self.crop_scale)
        ratio = _between(random[:, _RATIO], math.log(self.crop_ratio[0]), math.log(self.crop_ratio[1])).exp()
        sides = torch.stack([(area * ratio / aspect).sqrt(), (area / ratio * aspect).sqrt()])  # (2, N, tries)
        fits = (sides <= max(1.0, self.crop_scale[1]) + 1e-6).all(dim=0)
        first = fits.byte().argmax(dim=1)  # 0 where none fits; that box is cut to the image
        width, height = (
            sides.gather(2, first.expand(2, -1)[..., None]).squeeze(2).clamp(max=max(1.0, self.crop_scale[1]))
        )
        return width, height

    # --- colour ---

    def _plan(self, random: Tensor) -> Tensor:
        """(N, 16) what `_recolour` does: every image's numbers for all steps, drawn at once and not chunk by chunk."""
        numbers = random[:, _COLOUR]
        jittered = numbers[:, 0] < self.jitter
        order = random[:, _ORDER][:, :3].argsort(dim=1, stable=True)  # (N, 3) of 0 brightness, 1 contrast, 2 saturation
        most = (self.brightness, self.contrast, self.saturation)
        factors = [_between(numbers[:, 1 + way], max(0.0, 1 - one), 1 + one) for way, one in enumerate(most)]
        factor = torch.stack(factors, dim=1).gather(1, order)  # (N, 3) in the order of the steps
        factor = torch.where(jittered[:, None], factor, 1.0)
        toward_mean, toward_luma = (1 - factor) * (order == 1), (1 - factor) * (order == 2)
        turn = torch.where(jittered, self._spread(numbers[:, 4], 6 * self.hue), 0.0)
        brightness, contrast = (
            torch.where(jittered, 1 + self._spread(numbers[:, 1 + way], one), 1.0) for way, one in enumerate(most[:2])
        )
        choices = [
            numbers[:, 5] < self.grayscale,
            random[:, _BLUR.start] < self.blur,
            random[:, _SOLARIZE] < self.solarize,
        ]
        sigma = _between(random[:, _BLUR.start + 1], *self.blur_sigma)
        alone = torch.stack([turn, brightness, contrast, *choices, sigma], dim=1)  # (N, 7)
        return torch.cat([factor, toward_mean, toward_luma, alone], dim=1)

    def _recolour(self, views: Tensor, plan: Tensor, hue_step: int | Tensor, scratch: Tensor) -> Tensor:
        """All that follows the geometry but erasing; `views` and `scratch` (planes, n, P) may be overwritten."""
        turn, brightness, contrast, gray, blur, solarize, sigma = plan[:, 9:].unbind(dim=1)
        if views.shape[1] == 3:
            if self.jitter and not (isinstance(hue_step, int) and hue_step == _NEVER):
                self._jitter(views.flatten(2), plan, turn, hue_step, scratch)
            if self.grayscale:
                views = _some(views, gray > 0, lambda some, _: _gray(some))
        elif self.jitter or self.grayscale:
            offset = brightness * views.mean(dim=(1, 2, 3)) * (1 - contrast)
            views = (views * _spatial(brightness * contrast) + _spatial(offset)).clamp(0, 1)
        if self.blur:
            views = _some(views, blur > 0, lambda some, rows: _blur(some, sigma[rows]))
        if self.solarize:
            views = _some(views, solarize > 0, lambda some, _: torch.minimum(some, 1 - some))
        return views

    @staticmethod
    def _spread(random: Tensor, most: float) -> Tensor:
        return (2 * random - 1) * most

    def _jitter(self, pixels: Tensor, plan: Tensor, turn: Tensor, hue_step: int | Tensor, scratch: Tensor) -> None:
        """ColorJitter in place. Three changes are one step each; the hue turns before one of them or after all."""
        for step in range(4):
            if self.hue and isinstance(hue_step, Tensor):
                _turn_hue(pixels, torch.where(hue_step == step, turn, 0.0), scratch)
            elif self.hue and step == hue_step:
                _turn_hue(pixels, turn, scratch)
            if step < 3:
                _blend(pixels, *plan[:, step:9:3].unbind(dim=1), scratch=scratch)


def _as_it_is(views: Tensor) -> Tensor:
    return views


def _between(random: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * random


def _spatial(x: Tensor) -> Tensor:
    return x[:, None, None, None]


def _matrix(x: Tensor) -> Tensor:
    return x[:, None, None]


def _some(views: Tensor, chosen: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Change the chosen images; all are computed where a look at the choice would mean waiting for the device."""
    if views.device.type != "cpu":
        return torch.where(_spatial(chosen), change(views, torch.arange(len(views), device=views.device)), views)
    rows = chosen.nonzero().squeeze(1)
    if len(rows):
        views[rows] = change(views[rows], rows)
    return views


def _turn_quarters(number: int, views: Tensor, _rows: Tensor) -> Tensor:
    return views.rot90(number, (2, 3))


def _resize(image: Tensor, box: Sequence[int], size: int) -> Tensor:
    """(C, H, W) uint8 to its crop (C, size, size) by torch's own kernel, which rounds to uint8 as Pillow's does."""
    top, left, height, width = box
    crop = image[None, :, top : top + height, left : left + width]
    return F.interpolate(crop, (size, size), mode="bilinear", antialias=True, align_corners=False)[0]


def _triangle(start: Tensor, length: Tensor, side: int, size: int, mirror: Tensor | None = None) -> Tensor:
    """(n, size, side) weights that resize `length` pixels from `start` on, with a wider filter where they shrink."""
    scale = length[:, None] / size  # (n, 1)
    target = (torch.arange(size, device=start.device) + 0.5).expand(len(start), -1)
    if mirror is not None:
        target = torch.where(mirror[:, None], size - target, target)
    center = start[:, None] + target * scale  # (n, size)
    pixel = torch.arange(side, device=start.device)
    inside = (pixel >= start[:, None]) & (pixel < (start + length)[:, None])  # (n, side): nothing around the crop
    weights = (pixel + 0.5) - center[..., None]  # (n, size, side)
    weights.mul_(1 / scale.clamp(min=1)[..., None]).abs_().sub_(1).clamp_(max=0).mul_(inside[:, None].float())
    return weights.div_(weights.sum(dim=2, keepdim=True))  # all signs are negative, so none is left


def _hue_step(random: Tensor) -> Tensor:
    """(n,) from 0 to 3: the number of other changes of the jitter that come before the hue's."""
    order = random[:, _ORDER]
    return (order[:, :3] < order[:, 3:]).sum(dim=1)


def _gray(views: Tensor) -> Tensor:
    """(n, 3, ...) with the luma in all channels."""
    red, green, blue = views.unbind(dim=1)
    luma = red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2]
    return luma[:, None].expand_as(views)


def _blend(pixels: Tensor, factor: Tensor, toward_mean: Tensor, toward_luma: Tensor, *, scratch: Tensor) -> None:
    """Multiply (n, 3, P) by a factor, add shares of the image's mean luma and of each pixel's, cut at [0, 1]; in place.

    Brightness, contrast and saturation alike. Only single additions and products: a matrix product would be as fast,
    but might round otherwise in another batch.
    """
    luma, term = scratch[:2]
    red, green, blue = pixels.unbind(dim=1)
    torch.mul(red, _LUMA[0], out=luma)
    luma.add_(torch.mul(green, _LUMA[1], out=term)).add_(torch.mul(blue, _LUMA[2], out=term))
    mean = luma.mean(dim=1)
    luma.mul_(toward_luma[:, None]).add_((toward_mean * mean)[:, None])
    pixels.mul_(_matrix(factor)).add_(luma[:, None]).clamp_(0, 1)


def _turn_hue(pixels: Tensor, turn: Tensor, scratch: Tensor) -> None:
    """Turn the hue of (n, 3, P) by (n,) sixths of the circle as HSV does, in place and without division or branch.

    On the hexagon of hues the position times the chroma is linear in the colours. Red falls off with the distance from
    0, green from 2, blue from -2, each cut off between the darkest and the brightest channel, which do not change.
    """
    red, green, blue = pixels.unbind(dim=1)
    top, low, chroma, third, hue, away = scratch  # six planes (n, P)
    torch.maximum(green, blue, out=top)
    torch.minimum(green, blue, out=low)
    torch.sub(top, red, out=away).add_(low)
    torch.maximum(top, red, out=top)
    torch.minimum(low, red, out=low)
    torch.sub(top, low, out=chroma)
    away.add_(chroma).sub_(low)  # distance of the hue from red: chroma + (brighter - red) + (darker - low)
    torch.sub(green, blue, out=hue)
    torch.copysign(away, hue, out=hue).add_(torch.mul(chroma, turn[:, None], out=third))  # in [-6, 6] chroma
    torch.mul(chroma, 3, out=third)
    torch.abs(hue, out=away).sub_(third).abs_().add_(low).sub_(chroma)
    torch.clamp(away, low, top, out=red)
    high = torch.sub(torch.add(low, third, out=away), chroma, out=away)
    torch.add(hue, chroma, out=green).abs_().sub_(third).abs_()
    torch.clamp(torch.sub(high, green, out=green), low, top, out=green)
    torch.sub(hue, chroma, out=blue).abs_().sub_(third).abs_()
    torch.clamp(torch.sub(high, blue, out=blue), low, top, out=blue)


def _outermost(views: Tensor, pick: Callable[..., Tensor]) -> Tensor:
    """The largest or smallest of 3 x 3 pixels; by twos, in a tenth of the time of torch's pooling on a CPU."""
    for dim in (2, 3):
        inner = views.shape[dim] - 2
        if inner < 0:
            continue
        pairs = pick(views.narrow(dim, 0, inner + 1), views.narrow(dim, 1, inner + 1))
        threes = pick(pairs.narrow(dim, 0, inner), pairs.narrow(dim, 1, inner))
        views = torch.cat([pairs.narrow(dim, 0, 1), threes, pairs.narrow(dim, inner, 1)], dim=dim)
    return views


def _blur(views: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian of a kernel of a tenth of the side, as SimCLR, mirrored at the edges; two products per channel."""
    count, channels, side, _ = views.shape
    paths = _paths(side, views.device)
    weight = torch.exp(-0.5 * (torch.arange(len(paths), device=views.device) / sigma[:, None]) ** 2)  # (n, radius + 1)
    weight = weight / (2 * weight[:, 1:].sum(dim=1, keepdim=True) + weight[:, :1])
    kernel = (weight @ paths.flatten(1)).view(-1, side, side)
    rows = torch.bmm(views.reshape(count, channels * side, side), kernel.transpose(1, 2))
    return kernel[:, None] @ rows.view(count, channels, side, side)


@functools.lru_cache(maxsize=16)
def _paths(side: int, device: torch.device) -> Tensor:
    """(radius + 1, side, side): how often a pixel is reached from another at a distance, also by the mirrors."""
    radius = min(max(1, round(side / 20)), side - 1)
    place = torch.arange(side, device=device)
    there, here = place[None, :], place[:, None]
    paths = [(there - here).abs(), there + here, 2 * (side - 1) - there - here]
    counted = [torch.ones_like(paths[0]), (there > 0).expand(side, -1), (there < side - 1).expand(side, -1)]
    distance = torch.arange(radius + 1, device=device)[:, None, None]
    hits = [(path == distance) * count for path, count in zip(paths, counted, strict=True)]
    return torch.stack(hits).sum(dim=0).float()


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


@functools.lru_cache(maxsize=16)
def _cubic(side: int, device: torch.device) -> Tensor:
    """(side, lattice): weights of the control points, of which the outermost lie on the edge."""
    one = torch.eye(_LATTICE, device=device)[None, :, None]
    return F.interpolate(one, (1, side), mode="bicubic", align_corners=True)[0, :, 0].T.contiguous()


# --- the same views every time ---


@dataclass(frozen=True)
class FixedViews:
    """The same few views of every image; an `Encoder` that has them gives the mean of their unit vectors.

    The first is the image itself, the others are drawn once, as `Views` draws them, from the seed alone. With the mean
    on both sides a cosine is, up to the lengths of the two means, the mean of the cosines over all pairs of views.
    Each image costs `count` forward passes.

    Args:
        count: Views per image, the plain one included; >= 2.
        crop_scale: As `Views`, for all that follow.
        crop_ratio: Aspect ratio of the crop.
        flip: Probability of a left-right flip.
        degrees: Largest rotation to either side.
        shear: Largest shear to either side, as a slope.
        translate: Largest shift to either side, as a share of the image's side.
        elastic: Bending, as a share of the image's side.
        pad: What stands outside the image.
        seed: Of the draw.

    Example:
        >>> FixedViews(4, degrees=10).grids(32).shape
        torch.Size([4, 32, 32, 2])
    """

    count: int = 8
    crop_scale: tuple[float, float] = (1.0, 1.0)
    crop_ratio: tuple[float, float] = (1.0, 1.0)
    flip: float = 0.0
    degrees: float = 0.0
    shear: float = 0.0
    translate: float = 0.0
    elastic: float = 0.0
    pad: str = "border"
    seed: int = 0

    @classmethod
    def of(cls, settings: FixedViews | Mapping[str, Any] | None) -> FixedViews | None:
        """Take what a file holds of them as well."""
        return cls(**settings) if isinstance(settings, Mapping) else settings

    def __post_init__(self) -> None:
        for name in ("crop_scale", "crop_ratio"):  # lists, where they come from a file
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.count < 2:
            raise ValueError(f"FixedViews needs count >= 2, the plain image and others, got {self.count}; null is one.")
        self._views()

    def _views(self) -> Views:
        """Their distribution, which checks its settings."""
        shared = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("count", "seed")}
        return Views(**shared, jitter=0.0, grayscale=0.0)

    def grids(self, size: int) -> Tensor:
        """Where each pixel (count, size, size, 2) lies in the image, whose sides go from -1 to 1: x, then y."""
        plain = F.affine_grid(torch.eye(2, 3)[None], [1, 1, size, size], align_corners=False)
        return torch.cat([plain, self.drawn(torch.arange(1, self.count), size)])

    def drawn(self, keys: Tensor, size: int) -> Tensor:
        """As `grids`, one for each of these numbers (N,)."""
        # saved encoders hold the settings, not these numbers: how they are drawn must never change
        views, random = self._views(), keyed_uniform(keys, _COLUMNS, seed=self.seed)
        grids = F.affine_grid(views._geometry(random, 1.0), [len(keys), 1, size, size], align_corners=False)
        return grids + views._bend(random[:, _BEND], size)


# --- mixtures of several images ---


@dataclass(frozen=True)
class Mix:
    """MixUp, CutMix or a mosaic of four, over the batch of all ranks; for a `training_step` with soft targets.

    MixUp is Zhang et al. 2018 (https://arxiv.org/abs/1710.09412), CutMix Yun et al. 2019
    (https://arxiv.org/abs/1905.04899); in the mosaic of Bochkovskiy et al. 2020 (https://arxiv.org/abs/2004.10934) the
    four quarters are equal here. Partners are the next ones in a ring through the global batch, its order and all other
    numbers keyed by (seed, epoch, sample): the same global batch gives the same mixtures on any number of ranks. For
    that the images of all ranks are gathered. A sample must not stand in the batch twice, so mix views one by one.

    Args:
        kind: "mixup", "cutmix" or "mosaic".
        alpha: The share of the own image comes from Beta(alpha, alpha); MixUp and CutMix only.
        probability: Of being mixed at all, for each image.

    Example:
        >>> images, index, classes = torch.rand(4, 3, 8, 8), torch.arange(4), torch.tensor([0, 1, 1, 2])
        >>> mixed, rows, shares = Mix("cutmix")(images, index)
        >>> targets = (shares[..., None] * F.one_hot(classes).float()[rows]).sum(dim=1)  # gather(classes) with ranks
        >>> mixed.shape, targets.sum(dim=1)
        (torch.Size([4, 3, 8, 8]), tensor([1., 1., 1., 1.]))
    """

    kind: str = "mixup"
    alpha: float = 1.0
    probability: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("mixup", "cutmix", "mosaic") or self.alpha <= 0 or not 0 <= self.probability <= 1:
            raise ValueError(
                "Mix needs kind mixup|cutmix|mosaic, alpha > 0 and a probability in [0, 1], got "
                f"{self.kind!r}, {self.alpha} and {self.probability}."
            )

    def __call__(
        self, images: Tensor, index: Tensor, *, seed: int = 0, epoch: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mix.

        Args:
            images: (B, C, H, W) float; on several ranks each rank's own.
            index: (B,) global sample numbers.
            seed: The run's seed.
            epoch: Epoch number.

        Returns:
            The mixtures (B, C, H, W); whose they are as rows of the global batch (B, K), K = 2 or 4, the own one first;
            and the shares (B, K), which add up to 1.
        """
        from scipy.special import betaincinv  # takes longer to import than all else here

        everyone = gather(images)
        rows = self._partners(index, seed, epoch)
        drawn = keyed_uniform(index, 4, seed=seed, epoch=epoch, stream=_MIX_STREAM)
        chosen = drawn[:, 0] < self.probability
        if self.kind == "mosaic":
            mixed, shares = _mosaic(everyone, rows)
        else:
            own = torch.from_numpy(betaincinv(self.alpha, self.alpha, drawn[:, 1].cpu().numpy())).to(images)
            mask = _rectangles(own, drawn[:, 2:], images) if self.kind == "cutmix" else _spatial(own).expand_as(images)
            mixed = torch.lerp(everyone[rows[:, 1]], images, mask)
            kept = mask.mean(dim=(1, 2, 3))
            shares = torch.stack([kept, 1 - kept], dim=1)
        alone = F.one_hot(torch.zeros_like(index), rows.shape[1]).to(shares)
        return torch.where(_spatial(chosen), mixed, images), rows, torch.where(chosen[:, None], shares, alone)

    def _partners(self, index: Tensor, seed: int, epoch: int) -> Tensor:
        """(B, K) rows of the global batch: the own one and its successors in the ring."""
        numbers = gather(index)
        high, low = keyed_uniform(numbers, 2, seed=seed, epoch=epoch, stream=_MIX_STREAM + 1).mul(2**24).long().T
        ring = (high * 2**24 + low).argsort(stable=True)  # row numbers in the order of the ring
        place = ring.argsort()
        own = torch.isin(numbers, index).nonzero().squeeze(1)  # in the order of the ranks' rows, as index
        if len(own) != len(index) or len(set(numbers.tolist())) != len(numbers):
            raise ValueError("Mix: a sample must not stand in the batch twice; mix the views of a batch one by one.")
        steps = torch.arange(4 if self.kind == "mosaic" else 2, device=index.device)
        partners: Tensor = ring[(place[own][:, None] + steps) % len(ring)]
        return partners


def _rectangles(own: Tensor, place: Tensor, images: Tensor) -> Tensor:
    """(B, C, H, W): 0 in a rectangle of the area 1 - own around a random centre, cut at the edges, and 1 elsewhere."""
    height, width = images.shape[-2:]
    inside = []
    for side, center in ((height, place[:, :1]), (width, place[:, 1:])):
        half = ((1 - own).sqrt() * side / 2)[:, None]
        inside.append((torch.arange(side, device=images.device) + 0.5 - center * side).abs() < half)
    return (~(inside[0][:, :, None] & inside[1][:, None, :]))[:, None].expand_as(images).to(images)


def _mosaic(everyone: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    height, width = everyone.shape[-2:]
    top, left = height // 2, width // 2
    sides = [(top, left), (top, width - left), (height - top, left), (height - top, width - left)]
    parts = [
        F.interpolate(everyone[rows[:, number]], side, mode="bilinear", antialias=True, align_corners=False)
        for number, side in enumerate(sides)
    ]
    mixed = torch.cat([torch.cat(parts[:2], dim=3), torch.cat(parts[2:], dim=3)], dim=2)
    shares = torch.tensor([a * b / (height * width) for a, b in sides], device=rows.device)
    return mixed, shares.expand(len(rows), -1)


# --- other people's transforms ---


@dataclass(frozen=True)
class PerImage:
    """A transform for one image in place of `Views`: torchvision's, albumentations', or any callable.

    It runs once per image and view, its random numbers (torch, NumPy, Python; for albumentations its own) seeded by
    (seed, epoch, sample, view), so that its views depend neither on the batch nor on workers or ranks. All outputs of
    one transform must have one size. The caller's random states are left as they were.

    Args:
        transform: (C, H, W) uint8 to (C, h, w) uint8 or float in [0, 1], or to several of them; it must not normalise.
            One of albumentations gets (H, W, C) NumPy arrays by its own convention, `transform(image=...)["image"]`.
        count: Views per image.

    Example:
        >>> from torchvision.transforms import v2
        >>> views = PerImage(v2.RandomResizedCrop(8), count=2)
        >>> [view.shape for view in views(torch.zeros(5, 3, 16, 16, dtype=torch.uint8), torch.arange(5), size=8)]
        [torch.Size([5, 3, 8, 8]), torch.Size([5, 3, 8, 8])]
    """

    transform: Callable[..., Any]
    count: int = 1

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"PerImage needs count >= 1, got {self.count}.")

    def __call__(
        self,
        images: Tensor,
        index: Tensor,
        *,
        size: int,  # noqa: ARG002 - the transform knows its own
        seed: int = 0,
        epoch: int = 0,
        normalize: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        """As `Views`; `size` is the transform's own affair."""
        apply = self._on_arrays if _is_from(self.transform, "albumentations") else self.transform
        views: list[Tensor] = []
        with _kept_random_states(images.device):
            for number in range(self.count):
                made = []
                for image, key in zip(images, _keys(index, seed, epoch, number), strict=True):
                    self._seed(key)
                    made.append(_as_tensors(apply(image)))
                views.extend(torch.stack(same) for same in zip(*made, strict=True))
        return tuple((normalize or _as_it_is)(to_float(view)) for view in views)

    def _seed(self, key: int) -> None:
        _seed_everything(key)
        if hasattr(self.transform, "set_random_seed"):  # albumentations keeps generators of its own
            self.transform.set_random_seed(key)

    def _on_arrays(self, image: Tensor) -> Tensor:
        made = self.transform(image=image.permute(1, 2, 0).contiguous().cpu().numpy())["image"]
        if isinstance(made, Tensor):  # by albumentations' own ToTensorV2
            return made.to(image.device)
        return torch.from_numpy(np.ascontiguousarray(made)).permute(2, 0, 1).to(image.device)


@dataclass(frozen=True)
class WholeBatch:
    """A transform of whole batches in place of `Views`, such as kornia's, run as it is.

    torch, NumPy and Python are seeded by (seed, epoch, first sample of the batch), so that a resumed run repeats its
    views. They do depend on the batch and so on the number of ranks; `PerImage` and `Views` do not.

    Args:
        transform: (B, C, H, W) float in [0, 1] to a view of B rows, or to a tuple of them. It must not normalise.
        count: How often it is called.
    """

    transform: Callable[..., Any]
    count: int = 1

    def __call__(
        self,
        images: Tensor,
        index: Tensor,
        *,
        size: int,  # noqa: ARG002 - the transform knows its own
        seed: int = 0,
        epoch: int = 0,
        normalize: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        """As `Views`; `size` is the transform's own affair."""
        views: list[Tensor] = []
        with _kept_random_states(images.device):
            for number in range(self.count if len(index) else 0):
                _seed_everything(_keys(index[:1], seed, epoch, number)[0])
                views.extend(_as_tensors(self.transform(to_float(images))))
        for view in views:
            if view.ndim != 4 or len(view) != len(index):
                raise ValueError(
                    f"views gave a tensor of shape {tuple(view.shape)} for {len(index)} images, expected "
                    f"({len(index)}, C, h, w): a transform for one image? Wrap it: embedlab.data.views.PerImage(...)."
                )
        return tuple((normalize or _as_it_is)(to_float(view)) for view in views)


Keyed = Views | PerImage | WholeBatch


def keyed_views(views: Keyed | Callable[..., Any]) -> Keyed:
    """Other people's transforms as something that is called like `Views`."""
    if isinstance(views, Views | PerImage | WholeBatch):
        return views
    if not callable(views):
        raise ValueError(f"views is {views!r}; expected Views or a transform that can be called.")
    return PerImage(views) if _is_from(views, "torchvision", "albumentations", "lightly") else WholeBatch(views)


def _is_from(transform: object, *packages: str) -> bool:
    return type(transform).__module__.split(".")[0] in packages


def _keys(index: Tensor, seed: int, epoch: int, number: int) -> list[int]:
    """A seed below 2^32 per sample; both halves of 16 bits are exact in float32."""
    halves = keyed_uniform(index, 2, seed=seed, epoch=epoch, stream=number).mul(2**16).long()
    keys: list[int] = (halves[:, 0] * 2**16 + halves[:, 1]).tolist()
    return keys


def _seed_everything(key: int) -> None:
    torch.manual_seed(key)
    np.random.seed(key)  # noqa: NPY002 - foreign transforms draw from the old global state
    python_random.seed(key)


@contextmanager
def _kept_random_states(device: torch.device) -> Iterator[None]:
    numpy_state, python_state = np.random.get_state(), python_random.getstate()  # noqa: NPY002
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            np.random.set_state(numpy_state)  # noqa: NPY002
            python_random.setstate(python_state)


def _as_tensors(made: Any) -> list[Tensor]:
    views = list(made) if isinstance(made, list | tuple) else [made]
    for view in views:
        if not isinstance(view, Tensor):
            raise ValueError(
                f"views gave a {type(view).__name__}, expected a tensor or a tuple of tensors; add "
                "torchvision.transforms.v2.ToImage() to the transform, or leave out what makes a PIL image of it."
            )
    return [view.as_subclass(Tensor) for view in views]
