"""Miners: which pairs and triplets of a batch a loss learns from.

A miner is the `mining` argument of a pair loss: an object of this file, or its name. It is asked tile by tile, so it
costs no more memory than the loss. Losses over pairs get from it how often each pair is taken: a soft-max over pairs
takes it or leaves it, a mean counts it as often as it was chosen. `TripletLoss` and `MarginLoss` get triplets.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from embedlab._ops import keyed_uniform
from embedlab.losses._tiles import Tile


class _Distance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, similarity: Tensor) -> Tensor:
        far = torch.rsub(similarity, 2, alpha=2).clamp_(min=1e-8).sqrt_()
        ctx.save_for_backward(far)
        return far

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (far,) = ctx.saved_tensors
        slope: Tensor = (grads[0] / far).neg_()
        if far.is_cuda or not far.numel() or float(far.amin()) <= 1e-4:  # to look is cheaper than to fill
            slope.masked_fill_(far <= 1e-4, 0)
        return slope


def distance(similarity: Tensor) -> Tensor:
    """Euclidean distance of unit vectors from their cosine; its slope at 0 is cut off, where it would be infinite."""
    far: Tensor = _Distance.apply(similarity)
    return far


class Miner(nn.Module):
    """Base of all miners; a miner that goes by pairs adds `pairs`, one that goes by triplets is a `TripletMiner`."""

    def pairs(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """How often each pair is taken: of the anchor's own class (r, w), of the negatives (r, M)."""
        raise NotImplementedError

    def advance(self) -> None:
        """A training step of the loss is done; miners that draw move on to other numbers."""


class SelectingMiner(Miner):
    """A miner that takes at most one positive and one negative of each anchor."""

    def select(self, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
        """For each anchor (r,): column of the positive in `tile.own`, column of the negative, whether both exist."""
        raise NotImplementedError

    def pairs(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """The selected pairs, once."""
        positive, negative, exists = self.select(tile)
        taken = exists.to(tile.own.dtype).unsqueeze(1)
        chosen = torch.zeros_like(tile.similarity).scatter_(1, negative.unsqueeze(1), taken)
        if not tile.own.shape[1]:
            return tile.own, chosen
        return torch.zeros_like(tile.own).scatter_(1, positive.unsqueeze(1), taken), chosen


class TripletMiner(Miner):
    """A miner that takes an anchor's negatives depending on the positive."""

    def keep(self, tile: Tile, column: Tensor) -> Tensor:
        """Which negatives (r, M) to take with the positive in `column` (r, 1) of `tile.own`."""
        raise NotImplementedError

    def pairs(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """How many of the triplets each pair is part of."""
        most = int(tile.positive.sum(1).amax()) if tile.positive.numel() else 0
        columns = tile.positive.int().topk(most, dim=1, sorted=True).indices  # (r, most): positives first
        positive, negative = torch.zeros_like(tile.own), torch.zeros_like(tile.similarity)
        for number in range(most):
            column = columns[:, number, None]
            triplets = (self.keep(tile, column) & tile.positive.gather(1, column)).to(positive.dtype)
            negative += triplets
            positive.scatter_add_(1, column, triplets.sum(1, keepdim=True))
        return positive, negative


def _farthest_positive(tile: Tile) -> Tensor:
    return tile.own.masked_fill(~tile.positive, math.inf)  # (r, w), least first


class BatchHardMiner(SelectingMiner):
    """Farthest positive and nearest negative of each anchor, Hermans et al. 2017, eq. 5.

    https://arxiv.org/abs/1703.07737

    Example:
        >>> from embedlab.losses import ContrastiveLoss
        >>> ContrastiveLoss(mining=BatchHardMiner())(torch.eye(4), torch.tensor([0, 0, 1, 1]))
        tensor(1.4142)
    """

    def select(self, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
        """See the base class."""
        positive = _first(_farthest_positive(tile).min(1).indices if tile.own.shape[1] else None, tile)
        return positive, tile.similarity.max(1).indices, (tile.mates > 0) & (tile.strangers > 0)


def _first(columns: Tensor | None, tile: Tile) -> Tensor:
    """Columns of `own`, all zero where it has none."""
    return torch.zeros_like(tile.anchor) if columns is None else columns


class EasyPositiveMiner(SelectingMiner):
    """Nearest positive, and the nearest negative that is farther away than it, Xuan et al. 2020, section 3.2.

    https://arxiv.org/abs/1904.04370. Classes may stay spread out: each image need only be near one of its own. Anchors
    whose negatives are all nearer than their nearest positive are left out, as in pytorch-metric-learning's
    BatchEasyHardMiner.

    Example:
        >>> from embedlab.losses import TripletLoss
        >>> TripletLoss(margin=1.0, mining=EasyPositiveMiner())(torch.eye(4) + 0.1, torch.tensor([0, 0, 1, 1]))
        tensor(0.)
    """

    def select(self, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
        """See the base class."""
        if not tile.own.shape[1]:
            nothing = torch.zeros_like(tile.anchor)
            return nothing, nothing, nothing.bool()
        nearest, positive = tile.own.masked_fill(~tile.positive, -math.inf).max(1)
        farther = tile.similarity.masked_fill(tile.similarity >= nearest.unsqueeze(1), -math.inf)
        best, negative = farther.max(1)
        return positive, negative, (tile.mates > 0) & (best > -math.inf)


class SemiHardMiner(TripletMiner):
    """Triplets whose negative is farther than the positive, but by no more than a margin, Schroff et al. 2015, eq. 4.

    https://arxiv.org/abs/1503.03832; all such triplets, as in pytorch-metric-learning's TripletMarginMiner.

    Args:
        margin: In units of distance between unit vectors, > 0.

    Example:
        >>> from embedlab.losses import ContrastiveLoss
        >>> ContrastiveLoss(mining=SemiHardMiner(margin=0.2))(torch.eye(4), torch.tensor([0, 0, 1, 1]))
        tensor(0.)
    """

    def __init__(self, margin: float = 0.2) -> None:
        super().__init__()
        if margin <= 0:
            raise ValueError(f"SemiHardMiner needs margin > 0, got {margin}; with 0 there is nothing between.")
        self.margin = margin

    def keep(self, tile: Tile, column: Tensor) -> Tensor:
        """See the base class."""
        beyond = distance(tile.similarity) - distance(tile.own.gather(1, column))
        return (beyond > 0) & (beyond <= self.margin)


class AngularMiner(TripletMiner):
    """Triplets whose negative sees anchor and positive under a wide angle, Wang et al. 2017, eq. 4.

    https://arxiv.org/abs/1708.01682: ``atan(|a - p| / (2 |n - (a + p) / 2|))`` is above the angle.

    Args:
        margin_degrees: The angle, in (0, 90).

    Example:
        >>> from embedlab.losses import TripletLoss
        >>> TripletLoss(margin=0.2, mining=AngularMiner())(torch.eye(4), torch.tensor([0, 0, 1, 1]))
        tensor(0.2000)
    """

    def __init__(self, margin_degrees: float = 20.0) -> None:
        super().__init__()
        if not 0 < margin_degrees < 90:
            raise ValueError(f"AngularMiner needs margin_degrees in (0, 90), got {margin_degrees}.")
        self.margin_degrees = margin_degrees

    def keep(self, tile: Tile, column: Tensor) -> Tensor:
        """See the base class."""
        positive = tile.candidates[tile.columns.gather(1, column).squeeze(1)]  # (r, D)
        near = tile.own.gather(1, column)  # (r, 1)
        # |n - (a + p) / 2|^2 of unit vectors, by their cosines
        squared = 1 + (1 + near) / 2 - tile.similarity - positive @ tile.candidates.T
        wide = (2 - 2 * near).clamp(min=0) > 4 * math.tan(math.radians(self.margin_degrees)) ** 2 * squared
        return wide & (tile.similarity > -math.inf)


class DistanceWeightedMiner(TripletMiner):
    """One negative for each positive pair, drawn evenly over distances, Wu et al. 2017, eq. 4.

    https://arxiv.org/abs/1706.07567: random points of a sphere lie at nearly one distance; the draw weighs each
    negative with the inverse density of its distance. What is drawn depends on (seed, step, rows) alone, whatever
    the number of ranks; the step counts calls in training and is part of the state.

    Args:
        cutoff: Nearer negatives are weighed as if at this distance; very near ones are noise.
        nonzero_loss_cutoff: Negatives at this distance and beyond are not drawn.
        seed: Of the draws.

    Example:
        >>> from embedlab.losses import MarginLoss
        >>> MarginLoss(mining=DistanceWeightedMiner(nonzero_loss_cutoff=1.5))(torch.eye(4), torch.tensor([0, 0, 1, 1]))
        tensor(0.4142, grad_fn=<AddBackward0>)
    """

    step: Tensor

    def __init__(self, *, cutoff: float = 0.5, nonzero_loss_cutoff: float = 1.4, seed: int = 0) -> None:
        super().__init__()
        if not 0 < cutoff < nonzero_loss_cutoff <= 2:
            raise ValueError(
                "DistanceWeightedMiner needs 0 < cutoff < nonzero_loss_cutoff <= 2 (distances of unit vectors), got "
                f"{cutoff} and {nonzero_loss_cutoff}."
            )
        self.cutoff, self.nonzero_loss_cutoff, self.seed = cutoff, nonzero_loss_cutoff, seed
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def advance(self) -> None:
        """See the base class."""
        self.step += 1

    def keep(self, tile: Tile, column: Tensor) -> Tensor:
        """See the base class."""
        far = distance(tile.similarity)
        dim = tile.candidates.shape[1]
        at = far.clamp(self.cutoff, 2 - 1e-3)  # the density vanishes at 2
        log_weight = (2.0 - dim) * at.log() - (dim - 3) / 2 * (1 - at**2 / 4).log()
        possible = far < self.nonzero_loss_cutoff
        log_weight = log_weight.masked_fill(~possible, -math.inf)
        top = log_weight.amax(1, keepdim=True).clamp(min=torch.finfo(far.dtype).min)
        total = (log_weight - top).exp().cumsum(1)  # (r, M)
        key = tile.row * tile.candidates.shape[0] + tile.columns.gather(1, column).squeeze(1)
        drawn = keyed_uniform(key, 1, seed=self.seed, epoch=int(self.step)).to(total.dtype) * total[:, -1:]
        negative = torch.searchsorted(total, drawn, right=True).clamp(max=total.shape[1] - 1)  # first total above
        return torch.zeros_like(possible).scatter_(1, negative, True) & possible


class MultiSimilarityMiner(Miner):
    """Pairs harder than the anchor's hardest pair of the other kind, up to a tolerance, Wang et al. 2019, eq. 8, 9.

    https://arxiv.org/abs/1904.06627: negatives more alike than the least alike positive minus epsilon, and positives
    less alike than the most alike negative plus epsilon.

    Args:
        epsilon: In units of cosine.

    Example:
        >>> from embedlab.losses import MultiSimilarityLoss
        >>> MultiSimilarityLoss(mining=MultiSimilarityMiner())(torch.eye(4), torch.tensor([0, 0, 1, 1]))
        tensor(0.6566)
    """

    def __init__(self, epsilon: float = 0.1) -> None:
        super().__init__()
        self.epsilon = epsilon

    def pairs(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """See the base class."""
        hardest = tile.similarity.amax(1, keepdim=True)
        least = (
            _farthest_positive(tile).amin(1, keepdim=True) if tile.own.shape[1] else torch.full_like(hardest, math.inf)
        )
        return tile.own - self.epsilon < hardest, tile.similarity + self.epsilon > least


Mining = (
    Literal["all", "batch-hard", "semi-hard", "easy-positive", "distance-weighted", "multi-similarity", "angular"]
    | Miner
)
_NAMES: dict[str, type[Miner]] = {
    "batch-hard": BatchHardMiner,
    "semi-hard": SemiHardMiner,
    "easy-positive": EasyPositiveMiner,
    "distance-weighted": DistanceWeightedMiner,
    "multi-similarity": MultiSimilarityMiner,
    "angular": AngularMiner,
}


def find_miner(loss: str, mining: Mining) -> Miner | None:
    """The miner that a loss was given, or named; None takes all pairs."""
    if isinstance(mining, Miner):
        return mining
    if mining == "all":
        return None
    if mining not in _NAMES:
        names = ", ".join(repr(name) for name in ["all", *_NAMES])
        raise ValueError(
            f"{loss} knows mining {names} or a miner of embedlab.losses, got {mining!r}. A miner of "
            "pytorch-metric-learning works with that package's losses: give it to MetricLearning."
        )
    return _NAMES[mining]()
