"""Losses that approximate average precision, the figure that retrieval is judged by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from embedlab._ops import normalize
from embedlab.losses._base import PairLoss, check_temperature
from embedlab.losses._tiles import Tile, tiled_means

Terms = Sequence[tuple[Tensor, Tensor | float]]


class FastAPLoss(PairLoss):
    """Average precision by histograms of distances, Cakir et al. 2019, eq. 7, 8 (https://doi.org/10.1109/CVPR.2019.00196).

    Squared distances between unit vectors, [0, 4], fall softly into the two nearest of bins + 1 evenly spaced points.
    Default and mean over anchors that have a class-mate as in pytorch-metric-learning.

    Args:
        bins: Intervals of the histogram, >= 1.
        gather: Take partners from all ranks.

    Shape: embeddings (B, D) of any norm and labels (B,) to a scalar in [0, 1].
        reference (M, D) with reference_labels (M,) replaces the batch as the set to rank.

    Raises:
        ValueError: A setting out of range, or tensors that do not fit.

    Example:
        >>> FastAPLoss()(torch.eye(4), torch.tensor([0, 0, 1, 1]))
        tensor(0.6667)
    """

    def __init__(self, *, bins: int = 10, gather: bool = True) -> None:
        super().__init__(gather=gather)
        if bins < 1:
            raise ValueError(f"FastAPLoss needs bins >= 1, got {bins}.")
        self.bins = bins

    def _histogram(self, cosine: Tensor, wanted: Tensor | None, tile: Tile) -> Tensor:
        """How much of each row's wanted entries falls on each point (r, bins + 1); None wants the negatives."""
        place = ((2 - 2 * cosine) * (self.bins / 4)).clamp(min=0, max=self.bins)
        lower = place.detach().floor().clamp(max=self.bins - 1)
        upper_share = place - lower
        shares = [1 - upper_share, upper_share]
        shares = [tile.only_negatives(x, 0) if wanted is None else x.masked_fill(~wanted, 0) for x in shares]
        histogram = cosine.new_zeros(len(cosine), self.bins + 1)
        for step, share in enumerate(shares):
            histogram = histogram.scatter_add(1, lower.nan_to_num(0).long() + step, share)  # NaN stays in share
        return histogram

    def terms(self, tile: Tile) -> Terms:
        positives = self._histogram(tile.own, tile.positive, tile)
        up_to_here = positives.cumsum(1)
        all_up_to_here = (positives + self._histogram(tile.similarity, None, tile)).cumsum(1)
        precision = up_to_here / all_up_to_here.clamp(min=torch.finfo(positives.dtype).tiny)
        average = (positives * precision).sum(1) / tile.mates.clamp(min=1)
        has = tile.mates > 0
        return [((1 - average).masked_fill(~has, 0).sum(), has.sum())]


class SmoothAPLoss(PairLoss):
    """Average precision with sigmoids for steps, Brown et al. 2020, eq. 6, 7 (https://arxiv.org/abs/2007.12163).

    As in the authors' code an anchor counts as the first of its own positives; unlike there, classes may differ in
    size. (pytorch-metric-learning 2.9 agrees where a batch has as many classes as each has images.) With a reference
    nothing is the anchor itself.

    Args:
        temperature: Width of the sigmoids in units of cosine, > 0.
        gather: Take partners from all ranks.

    Shape: embeddings (B, D) of any norm and labels (B,) to a scalar in [0, 1), the mean over anchors.
        reference (M, D) with reference_labels (M,) replaces the batch as the set to rank; the mean is then over
        anchors with a positive. Time of order B x M x positives.

    Raises:
        ValueError: A setting out of range, or tensors that do not fit.

    Example:
        >>> SmoothAPLoss()(torch.eye(4), torch.tensor([0, 0, 1, 1]))
        tensor(0.1667)
    """

    by_pair = True

    def __init__(self, temperature: float = 0.01, *, gather: bool = True) -> None:
        super().__init__(gather=gather)
        self.temperature = check_temperature(self, temperature)

    def terms(self, tile: Tile) -> Terms:
        assert tile.pair is not None
        here = tile.pair_similarity()  # (r, 1): of the anchor and the positive whose rank is asked
        others = tile.positive.scatter(1, tile.pair, False)
        ahead = torch.sigmoid((tile.own - here) / self.temperature).masked_fill(~others, 0).sum(1)
        wrong = torch.sigmoid((tile.similarity - here) / self.temperature).sum(1)
        weight = 1 / tile.mates
        return [((weight * wrong / (1 + ahead + wrong)).sum(), weight.sum(dtype=torch.float64))]

    def compare(
        self, anchors: Tensor, labels: Tensor, reference: Tensor | None, reference_labels: Tensor | None
    ) -> Tensor:
        candidates = anchors if reference is None else normalize(reference).to(anchors.dtype)
        plan = self.plan(labels, labels if reference is None else reference_labels)
        return tiled_means(self.terms, plan, anchors, candidates).sum()
