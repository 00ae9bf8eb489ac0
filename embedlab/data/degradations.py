"""Bad conditions: what a camera, the weather, a codec or a passer-by does to a picture, at five severities each.

The idea of fixed kinds with five severities is that of ImageNet-C, Hendrycks and Dietterich 2019
(https://arxiv.org/abs/1903.12261). Here they are batched, work on images of any size, and draw their random numbers by
(seed, kind, image): the same on any batch, worker or rank, and the same at all severities, so that what grows from one
to the next is the harm alone (the same raindrops and more, the same noise and louder).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from embedlab._ops import keyed_uniform
from embedlab.data.views import to_float

SEVERITIES = (1, 2, 3, 4, 5)
Draw = Callable[[int], Tensor]  # number of columns to uniform numbers (n, columns)

_STREAM = 2**17  # of the keyed numbers, past those of views and mixtures
_STREAMS = 16  # of one view: one per kind, and the last for which kind it is
_CHUNK = 2**18  # numbers that are worked on at once: they and their temporaries stay in a core's cache

_FULL, _READ = 1000.0, 2.0  # electrons: a white pixel in good light, and the noise of reading a pixel out
_GAMMA = 2.2
_AIRLIGHT = 0.9
_DROPS, _GRID = 220, 96  # streaks of the heaviest rain, and cells that the shorter side has when they are drawn


@dataclass(frozen=True)
class Degradation:
    """One kind of harm.

    Args:
        apply: Images (n, C, H, W) in [0, 1], a strength, and where random numbers come from, to images of that shape.
        strengths: Of the severities 1 to 5.
        unit: What a strength is.
    """

    apply: Callable[[Tensor, float, Draw], Tensor]
    strengths: tuple[float, float, float, float, float]
    unit: str


def degrade(
    images: Tensor,
    index: Tensor,
    name: str,
    severity: int | Tensor,
    *,
    seed: int = 0,
    epoch: int = 0,
    view: int = 0,
) -> Tensor:
    """Degrade a batch of images.

    Args:
        images: (B, C, H, W) uint8, any C, H and W.
        index: (B,) numbers of the images, which choose their random numbers.
        name: One of `DEGRADATIONS`.
        severity: 0 (unchanged) to 5, one for all or (B,) int64.
        seed: Of the random numbers.
        epoch: See seed.
        view: See seed.

    Returns:
        (B, C, H, W) uint8, a new tensor.

    Raises:
        ValueError: No such kind or severity, images of another type or shape.

    Example:
        >>> images = torch.full((2, 3, 8, 8), 128, dtype=torch.uint8)
        >>> degrade(images, torch.arange(2), "low_light", 3)[0, 0, 0, :4].tolist()
        [55, 50, 51, 50]
    """
    if name not in DEGRADATIONS:
        raise ValueError(f"There is no degradation {name!r}; there are {', '.join(DEGRADATIONS)}.")
    if images.dtype != torch.uint8 or images.ndim != 4 or 0 in images.shape[1:]:
        raise ValueError(f"degrade takes images (B, C, H, W) of uint8, got {tuple(images.shape)} {images.dtype}.")
    severities = torch.as_tensor(severity, device=images.device).expand(len(images))
    wanted = sorted(set(severities.tolist()))
    if index.shape != (len(images),) or not set(wanted) <= {0, *SEVERITIES}:
        raise ValueError(
            f"degrade takes a severity from 0 to {SEVERITIES[-1]} and one number per image; got {wanted} and an index "
            f"of shape {tuple(index.shape)} for {len(images)} images."
        )
    kind = DEGRADATIONS[name]
    stream = _STREAM + _STREAMS * view + list(DEGRADATIONS).index(name)
    degraded = images.clone()
    for level in wanted:
        if level == 0:
            continue
        rows = (severities == level).nonzero().squeeze(1)
        for chunk in rows.split(max(1, _CHUNK // images[0].numel())):
            numbers = index[chunk]

            def draw(columns: int, numbers: Tensor = numbers) -> Tensor:
                return keyed_uniform(numbers, columns, seed=seed, epoch=epoch, stream=stream)

            degraded[chunk] = _to_bytes(kind.apply(to_float(images[chunk]), kind.strengths[level - 1], draw))
    return degraded


@dataclass(frozen=True)
class Degrade:
    """Degrade some of the training views, after all else that happens to them and at the size that the network sees.

    Kind and severity are drawn per image and view from (seed, epoch, sample, view). For `ImageData(degrade=...)`.

    Args:
        names: Kinds to draw from.
        severities: Severities to draw from, 1 to 5.
        probability: Of being degraded at all, for each view of each image.

    Example:
        >>> views, index = torch.rand(4, 3, 8, 8), torch.arange(4)
        >>> Degrade(names=("blur", "rain"), probability=1.0)(views, index).shape
        torch.Size([4, 3, 8, 8])
    """

    names: tuple[str, ...] = ("blur", "noise", "low_light", "haze", "jpeg", "downscale", "rain", "occlusion")
    severities: tuple[int, ...] = SEVERITIES
    probability: float = 0.5

    def __post_init__(self) -> None:
        chosen_kinds(self.names)
        chosen_severities(self.severities)
        if not 0 <= self.probability <= 1:
            raise ValueError(f"Degrade.probability is in [0, 1], got {self.probability}.")

    def __call__(self, views: Tensor, index: Tensor, *, seed: int = 0, epoch: int = 0, view: int = 0) -> Tensor:
        """Degrade.

        Args:
            views: (B, C, H, W) float in [0, 1], one view of each image.
            index: (B,) global sample numbers.
            seed: The run's seed.
            epoch: Epoch number.
            view: Number of the view.

        Returns:
            (B, C, H, W) float32 in [0, 1]; the degraded ones have 256 levels, as image files have.
        """
        stream = _STREAM + _STREAMS * view + _STREAMS - 1
        random = keyed_uniform(index, 3, seed=seed, epoch=epoch, stream=stream)
        kind = (random[:, 1] * len(self.names)).long()
        severity = torch.tensor(self.severities, device=views.device)[(random[:, 2] * len(self.severities)).long()]
        views = views.clone()
        for number, name in enumerate(self.names):
            rows = ((random[:, 0] < self.probability) & (kind == number)).nonzero().squeeze(1)
            some = degrade(_to_bytes(views[rows]), index[rows], name, severity[rows], seed=seed, epoch=epoch, view=view)
            views[rows] = to_float(some)
        return views


def chosen_kinds(names: Sequence[str] | None) -> list[str]:
    """Names of kinds, each once; None or "all" is every one.

    Raises:
        ValueError: An unknown name, or none.
    """
    wanted = list(DEGRADATIONS) if names is None or list(names) == ["all"] else list(dict.fromkeys(names))
    unknown = [name for name in wanted if name not in DEGRADATIONS]
    if unknown or not wanted:
        raise ValueError(
            f"There is no degradation {unknown[0] if unknown else ''!r}; there are {', '.join(DEGRADATIONS)}, or all."
        )
    return wanted


def chosen_severities(severities: Sequence[int]) -> list[int]:
    """Severities in rising order, each once.

    Raises:
        ValueError: None, or one outside 1 to 5.
    """
    wanted = sorted(set(severities))
    if not wanted or not set(wanted) <= set(SEVERITIES):
        raise ValueError(f"Severities go from 1 to {SEVERITIES[-1]}, got {list(severities)}; 0 is the image unchanged.")
    return wanted


def _to_bytes(images: Tensor) -> Tensor:
    return (255 * images).round_().clamp_(0, 255).to(torch.uint8)


def _shorter_side(images: Tensor) -> int:
    return min(images.shape[-2:])


def _normal(uniform: Tensor) -> Tensor:
    """Uniform numbers in [0, 1), of 24 bits, to standard normal ones."""
    return math.sqrt(2) * torch.erfinv(2 * uniform - (1 - 2**-24))


def _per_number(images: Tensor, draw: Draw) -> Tensor:
    """A standard normal number for every number of the images."""
    return _normal(draw(images[0].numel())).view_as(images)


# --- the kinds; sums of shifted pictures and not convolutions, which may round otherwise in another batch ---


def _blur(images: Tensor, share: float, draw: Draw) -> Tensor:  # noqa: ARG001
    """Out of focus: a Gaussian whose deviation is a share of the shorter side; edges are repeated."""
    sigma = share * _shorter_side(images)
    radius = math.ceil(3 * sigma)
    weights = [math.exp(-0.5 * (distance / sigma) ** 2) for distance in range(radius + 1)]
    total = weights[0] + 2 * sum(weights[1:])
    for axis, pad in ((2, (0, 0, radius, radius)), (3, (radius, radius, 0, 0))):
        side = images.shape[axis]
        padded = F.pad(images, pad, mode="replicate")
        images = padded.narrow(axis, radius, side) * (weights[0] / total)
        for distance in range(1, radius + 1):
            both = padded.narrow(axis, radius - distance, side) + padded.narrow(axis, radius + distance, side)
            images += both.mul_(weights[distance] / total)
    return images


def _noise(images: Tensor, sigma: float, draw: Draw) -> Tensor:
    """Sensor noise: independent Gaussian per pixel and channel (ImageNet-C's severities)."""
    return images + sigma * _per_number(images, draw)


def _low_light(images: Tensor, stops: float, draw: Draw) -> Tensor:
    """Too little light: linear light by a gamma of 2.2, halved per stop, counted in electrons, and encoded again.

    Noise is that of Foi et al. 2008 (https://doi.org/10.1109/TIP.2008.2001399): its variance is the number of electrons
    (the Gaussian limit of shot noise) plus that of reading out, with 1000 electrons for white in good light and 2 for
    reading out. The camera does not brighten the picture.
    """
    electrons = images.pow(_GAMMA).mul_(_FULL / 2**stops)
    noise = (electrons + _READ**2).sqrt_().mul_(_per_number(images, draw))
    return (electrons + noise).clamp_(min=0).div_(_FULL).pow_(1 / _GAMMA)


def _haze(images: Tensor, transmission: float, draw: Draw) -> Tensor:
    """Fog by the atmospheric scattering model: J t + A (1 - t) with t = exp(-beta depth).

    Narasimhan and Nayar 2002 (https://doi.org/10.1023/A:1016328200723). There is no depth map, so depth is made up: it
    grows from the lower edge (0.5) to the upper one (1.5), with a smooth random relief of +-0.3. The strength is t at
    depth 1; the airlight A is a grey of 0.9.
    """
    height, width = images.shape[-2:]
    relief = F.interpolate(draw(16).view(-1, 1, 4, 4), (height, width), mode="bilinear", align_corners=True)
    up = 1.5 - (torch.arange(height, device=images.device) + 0.5) / height
    clear = torch.exp(math.log(transmission) * (up[:, None] + 0.3 * (2 * relief - 1)))  # (n, 1, H, W)
    return _AIRLIGHT + (images - _AIRLIGHT) * clear


def _jpeg(images: Tensor, quality: float, draw: Draw) -> Tensor:  # noqa: ARG001
    """Coded by libjpeg with 4:2:0 colour at some quality (ImageNet-C's severities).

    Images that do not have three channels are coded channel by channel.
    """
    colour = images.shape[1] == 3
    layers = _to_bytes(images).cpu()
    layers = layers.permute(0, 2, 3, 1) if colour else layers.flatten(0, 1)  # (n, H, W, 3) or (n C, H, W)
    coded = []
    for layer in layers.contiguous().numpy():
        file = BytesIO()
        Image.fromarray(layer).save(file, "JPEG", quality=int(quality), subsampling="4:2:0" if colour else -1)
        coded.append(np.asarray(Image.open(file)))
    found = torch.from_numpy(np.stack(coded))
    found = found.permute(0, 3, 1, 2) if colour else found.view(images.shape)
    return to_float(found).to(images.device)


def _downscale(images: Tensor, share: float, draw: Draw) -> Tensor:  # noqa: ARG001
    """Few pixels: shrunk to a share of each side (antialiased bilinear, one pixel at least) and enlarged again."""
    height, width = images.shape[-2:]
    small = (max(1, round(share * height)), max(1, round(share * width)))
    shrunk = F.interpolate(images, small, mode="bilinear", antialias=True, align_corners=False)
    return F.interpolate(shrunk, (height, width), mode="bilinear", align_corners=False)


def _rain(images: Tensor, streaks: float, draw: Draw) -> Tensor:
    """Bright, half-transparent streaks that look like rain.

    Garg and Nayar 2007 (https://doi.org/10.1007/s11263-006-0028-6) say what rain looks like; this is far simpler. So
    many streaks start in or just above the picture, all slanted alike by up to 20 degrees, a tenth to a fifth of the
    shorter side long and a hundredth wide, each of its own brightness.
    """
    height, width = images.shape[-2:]
    scale = _GRID / _shorter_side(images)
    down, across = max(1, round(height * scale)), max(1, round(width * scale))
    random = draw(1 + 4 * _DROPS)
    slant = math.radians(20) * (2 * random[:, 0] - 1)
    place_y, place_x, length, light = random[:, 1:].view(-1, 4, _DROPS)[..., : int(streaks)].unbind(dim=1)
    longest = 0.2 * _GRID
    step = torch.linspace(0, 1, 2 * math.ceil(longest), device=images.device)  # half a cell apart
    along = (0.1 + 0.1 * length)[..., None] * _GRID * step  # (n, streaks, points)
    y = place_y[..., None] * (down + longest) - longest + along * slant.cos()[:, None, None]
    x = place_x[..., None] * across + (along - longest / 2) * slant.sin()[:, None, None]
    layer = images.new_zeros(len(images), down * across + 1)  # the last cell collects what lies outside
    for row, column in ((y.floor(), x.floor()), (y.floor() + 1, x.floor())):
        for cell in (column, column + 1):
            weight = (1 - (y - row).abs()) * (1 - (x - cell).abs()) * (0.5 + 0.5 * light[..., None])
            inside = (row >= 0) & (row < down) & (cell >= 0) & (cell < across)
            target = torch.where(inside, row * across + cell, down * across).long()
            layer.scatter_reduce_(1, target.flatten(1), weight.flatten(1), "amax")
    layer = layer[:, :-1].view(-1, 1, down, across)
    cover = F.interpolate(layer, (height, width), mode="bilinear", antialias=True, align_corners=False)
    return images + 0.7 * cover * (0.9 - images)


def _occlusion(images: Tensor, area: float, draw: Draw) -> Tensor:
    """Something in the way: a rectangle of one random colour covers a share of the area.

    Its shape is between 1:2 and 2:1 of the picture's own (as Random Erasing, Zhong et al. 2020,
    https://arxiv.org/abs/1708.04896). A larger one contains the smaller ones.
    """
    count, channels, height, width = images.shape
    random = draw(3 + channels)
    ratio = torch.exp(math.log(2) * (2 * random[:, 0] - 1))
    inside = []
    for side, share, place in (
        (height, (area / ratio).sqrt(), random[:, 1]),
        (width, (area * ratio).sqrt(), random[:, 2]),
    ):
        position = (torch.arange(side, device=images.device) + 0.5) / side
        start = (place * (1 - share))[:, None]
        inside.append((position >= start) & (position < start + share[:, None]))
    covered = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return torch.where(covered, random[:, 3:].view(count, channels, 1, 1), images)


DEGRADATIONS: dict[str, Degradation] = {  # the order chooses the random numbers: new ones go to the end
    "blur": Degradation(_blur, (0.01, 0.015, 0.022, 0.032, 0.045), "deviation as a share of the shorter side"),
    "noise": Degradation(_noise, (0.08, 0.12, 0.18, 0.26, 0.38), "deviation as a share of the range of values"),
    "low_light": Degradation(_low_light, (1, 2, 3, 4, 5), "stops of light lost"),
    "haze": Degradation(_haze, (0.8, 0.6, 0.45, 0.3, 0.2), "share of the light that comes through at mean depth"),
    "jpeg": Degradation(_jpeg, (25, 18, 15, 10, 7), "quality of libjpeg"),
    "downscale": Degradation(_downscale, (1 / 2, 1 / 3, 1 / 4, 1 / 6, 1 / 8), "share of the side that is kept"),
    "rain": Degradation(_rain, (20, 40, 80, 140, 220), "streaks"),
    "occlusion": Degradation(_occlusion, (0.05, 0.1, 0.2, 0.3, 0.45), "share of the area that is covered"),
}
