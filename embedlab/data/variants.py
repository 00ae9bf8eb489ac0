"""More classes than there are: each class turned, mirrored, bent or joined with another, all its images alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from embedlab._ops import keyed_uniform
from embedlab.data.views import Views

_TURNS = 8  # four quarter turns of an image, and of its mirror image
_JOIN_STREAM = 2**17  # of the keyed numbers, past those of views and mixtures


@dataclass(frozen=True)
class ClassVariants:
    """Several classes out of each: rotations and reflections, and warps that are one and the same for a whole class.

    Where a turned picture shows something else, as with characters, it is one more class to tell from the others, and a
    few dozen classes become hundreds; Santoro et al. 2016 (https://arxiv.org/abs/1605.06065) did so first. Variants 0
    to 7 are the quarter turns of the image and of its mirror image, and so on in turn. From 8 on each is also changed
    by `warp`, and may be joined with another class of the data first, as drawn once for (seed, class, variant).

    Args:
        count: Classes made of each, the original included.
        warp: What changes a variant from 8 on, the same for all its images.
        join: Share of the variants from 8 on that are two classes in one picture, side by side or one above the other.
        seed: Of the warps and partners.

    Example:
        >>> turned = ClassVariants(8)(torch.arange(4).view(1, 1, 2, 2).byte(), torch.tensor([0]), torch.tensor([1]))
        >>> turned.flatten().tolist()
        [1, 3, 0, 2]
    """

    count: int = _TURNS
    warp: Views | None = None
    join: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 2 or not 0 <= self.join <= 1:
            raise ValueError(
                f"ClassVariants needs count >= 2 and join (a share) in [0, 1], got {self.count} and {self.join}."
            )
        if self.count > _TURNS and self.warp is None and self.join < 1:
            raise ValueError(
                f"ClassVariants has {_TURNS} turns and reflections; count {self.count} needs a warp, or variants would "
                "be alike."
            )
        if self.warp is not None and (self.warp.count != 1 or self.warp.small_count):
            raise ValueError("ClassVariants.warp makes one view of an image; leave out count and small_count.")

    def partners(self, classes: Tensor, variants: Tensor, num_classes: int) -> Tensor:
        """(B,) class numbers below num_classes that the images are joined with, -1 where they stay alone."""
        random = self._random(classes, variants)
        step = 1 + (random[:, 1] * (num_classes - 1)).long().clamp(max=max(0, num_classes - 2))
        joined = (variants >= _TURNS) & (random[:, 0] < self.join) & (num_classes > 1)
        return torch.where(joined, (classes + step) % max(1, num_classes), -1)

    def _random(self, classes: Tensor, variants: Tensor) -> Tensor:
        return keyed_uniform(classes * self.count + variants, 3, seed=self.seed, stream=_JOIN_STREAM)

    def __call__(
        self, images: Tensor, classes: Tensor, variants: Tensor, others: dict[int, Tensor] | None = None
    ) -> Tensor:
        """Make the variants.

        Args:
            images: (B, C, S, S) uint8.
            classes: (B,) class numbers.
            variants: (B,) numbers from 0 to count - 1.
            others: For each row that is to be joined, by its number, the image (C, S, S) of the partner.

        Returns:
            (B, C, S, S) uint8.
        """
        made = images.clone()
        beside = self._random(classes, variants)[:, 2] < 0.5
        for row, other in (others or {}).items():
            made[row] = _joined(images[row], other, beside=bool(beside[row]))
        for turn in range(1, _TURNS):
            rows = (variants % _TURNS == turn).nonzero().squeeze(1)
            turned = made[rows].flip(-1) if turn >= 4 else made[rows]
            made[rows] = turned.rot90(turn % 4, (2, 3))
        rows = (variants >= _TURNS).nonzero().squeeze(1)
        if self.warp is not None and len(rows):
            keys = (classes * self.count + variants)[rows]
            (warped,) = self.warp(made[rows], keys, size=images.shape[-1], seed=self.seed)
            made[rows] = warped.mul(255).round().byte()
        return made


def _joined(image: Tensor, other: Tensor, *, beside: bool) -> Tensor:
    """Both images (C, S, S), each squeezed into one half."""
    side = image.shape[-1]
    first = side // 2
    sizes = [(side, first), (side, side - first)] if beside else [(first, side), (side - first, side)]
    halves = [
        F.interpolate(part[None], size, mode="bilinear", antialias=True, align_corners=False)[0]
        for part, size in zip((image, other), sizes, strict=True)
    ]
    return torch.cat(halves, dim=2 if beside else 1)
