"""Losses over pairs and triplets of one batch, or of a batch against a reference.

All of them share a convention: embeddings (B, D) of any norm are normalised inside; labels (B,) say who belongs
together; reference (M, D) with reference_labels (M,) replaces the batch as the set to pick partners from and must be
the same on every rank. With torch.distributed initialised and `gather=True` the batch is the union over ranks: every
rank returns the same loss, and DistributedDataParallel's mean of gradients equals one process on the union, also
when ranks hold different numbers of rows. Memory grows with B + M, see `_tiles`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedlab._ops import normalize
from embedlab.losses._base import PairLoss, apply_loss, check_classes, check_positive, check_temperature, softplus
from embedlab.losses._tiles import Plan, Tile, log_sum_exp, tiled_rows
from embedlab.losses.miners import Mining, SelectingMiner, SemiHardMiner, TripletMiner, distance

Terms = Sequence[tuple[Tensor, Tensor | float]]


class SupConLoss(PairLoss):
    """Supervised contrastive loss, Khosla et al. 2020, eq. 2 (https://arxiv.org/abs/2004.11362).

    Each anchor picks its class-mates out of the batch by a softmax over cosines. With the image number as label and
    two views it is SimCLR's NT-Xent. Unlike the authors' code, the result is not rescaled by the temperature.

    Args:
        temperature: Divides the cosine before the softmax; no unit, > 0.
        mining: Which pairs to take: a miner, or its name.
        gather: Take partners from all ranks.

    Shape: embeddings (B, D) of any norm and labels (B,) to a scalar, the mean over anchors that have a class-mate.
        reference (M, D) with reference_labels (M,) replaces the batch as the set to pick from.

    Raises:
        ValueError: A setting out of range, or tensors that do not fit.

    Example:
        >>> SupConLoss()(torch.eye(4), torch.tensor([0, 0, 1, 1]))
        tensor(1.0986)
    """

    def __init__(self, temperature: float = 0.1, *, mining: Mining = "all", gather: bool = True) -> None:
        super().__init__(mining=mining, gather=gather)
        self.temperature = check_temperature(self, temperature)

    def terms(self, tile: Tile) -> Terms:
        scale = 1 / self.temperature
        log_total = torch.logaddexp(tile.log_sum_negatives(scale), tile.log_sum_positives(tile.own, scale))
        attraction = tile.positives(tile.own).sum(1) * scale / tile.mates.clamp(min=1)
        has = tile.mates > 0
        return [((log_total - attraction).masked_fill(~has, 0).sum(), has.sum())]


def _one_against_negatives(tile: Tile, scale: float) -> Terms:
    """Per positive pair the cross entropy of that positive against all negatives."""
    log_negatives = tile.log_sum_negatives(scale).unsqueeze(1)
    return [(tile.positives(softplus(log_negatives - tile.own * scale)).sum(), tile.mates.sum())]


class NTXentLoss(PairLoss):
    """Normalised temperature-scaled cross entropy, Chen et al. 2020, eq. 1 (https://arxiv.org/abs/2002.05709).

    Per positive pair: that positive against itself plus all negatives. Label = number of the image, so that the
    views of one image share it. With more than two views per image it differs from `SupConLoss`, which also holds
    the other positives in the denominator. Default and mean over positive pairs as in pytorch-metric-learning.

    Args:
        temperature: Divides the cosine before the softmax; no unit, > 0.
        mining: Which pairs to take: a miner, or its name.
        gather: Take partners from all ranks.

    Shape: as `SupConLoss`.

    Raises:
        ValueError: A setting out of range, or tensors that do not fit.

    Example:
        >>> NTXentLoss(0.5)(torch.eye(4), torch.tensor([0, 0, 1, 1]))
        tensor(1.0986)
    """

    def __init__(self, temperature: float = 0.07, *, mining: Mining = "all", gather: bool = True) -> None:
        super().__init__(mining=mining, gather=gather)
        self.temperature = check_temperature(self, temperature)

    def terms(self, tile: Tile) -> Terms:
        return _one_against_negatives(tile, 1 / self.temperature)


class InfoNCELoss(PairLoss):
    """Contrastive loss of queries against keys and a queue, van den Oord et al. 2018, eq. 4; He et al. 2020, eq. 1.

    https://arxiv.org/abs/1807.03748 and https://arxiv.org/abs/1911.05722. As `NTXentLoss`, but the partners come from
    the reference alone: the keys of this batch, then the queue, whose labels must occur nowhere else (such as -1).

    Args:
        temperature: Divides the cosine before the softmax; no unit, > 0.
        mining: Which pairs to take: a miner, or its name.
        gather: Take queries from all ranks; the reference must be the same on all.

    Shape: as `SupConLoss`; the reference is required, ValueError without.

    Raises:
        ValueError: A setting out of range, or tensors that do not fit, or no reference.

    Example:
        >>> keys, queue = torch.eye(4)[:2], torch.eye(4)[2:]
        >>> labels = torch.tensor([0, 1, -1, -1])  # of the keys, and nobody's
        >>> InfoNCELoss(1.0)(keys, labels[:2], reference=torch.cat([keys, queue]), reference_labels=labels)
        tensor(0.7437)
    """

    fits_memory = False

    def __init__(self, temperature: float = 0.07, *, mining: Mining = "all", gather: bool = True) -> None:
        super().__init__(mining=mining, gather=gather)
        self.temperature = check_temperature(self, temperature)

    def terms(self, tile: Tile) -> Terms:
        return _one_against_negatives(tile, 1 / self.temperature)

    def compare(
        self, anchors: Tensor, labels: Tensor, reference: Tensor | None, reference_labels: Tensor | None
    ) -> Tensor:
        if reference is None:
            raise ValueError(
                "InfoNCELoss compares with a reference: give reference= (keys, then queue) and reference_labels=; to "
                "compare a batch with itself use NTXentLoss."
            )
        return super().compare(anchors, labels, reference, reference_labels)


class DCLLoss(PairLoss):
    """Decoupled contrastive learning, Yeh et al. 2022, eq. 6 (https://arxiv.org/abs/2110.06848).

    NT-Xent without the positive in the denominator, so that an easy positive does not switch its negatives off;
    meant for small batches. Mean over positive pairs of anchors that have a negative.

    Args:
        temperature: Divides the cosine before the softmax; no unit, > 0.
        mining: Which pairs to take: a miner, or its name.
        gather: Take partners from all ranks.

    Shape: as `SupConLoss`; for two views the label is the number of the image.

    Raises:
        ValueError: A setting out of range, or tensors that do not fit.

    Example:
        >>> DCLLoss(0.5)(torch.eye(4), torch.tensor([0, 0, 1, 1]))
        tensor(0.6931)
    """

    def __init__(self, temperature: float = 0.1, *, mining: Mining = "all", gather: bool = True) -> None:
        super().__init__(mining=mining, gather=gather)
        self.temperature = check_temperature(self, temperature)

    def terms(self, tile: Tile) -> Terms:
        scale = 1 / self.temperature
        has = tile.strangers > 0
        log_negatives = tile.log_sum_negatives(scale).masked_fill(~has, 0).unsqueeze(1)
        pairs = (log_negatives - tile.own * scale) * has.unsqueeze(1)
        return [(tile.positives(pairs).sum(), (tile.mates * has).sum())]


class MultiSimilarityLoss(PairLoss):
    """Multi-similarity loss, Wang et al. 2019, eq. 15 (https://arxiv.org/abs/1904.06627).

    Weighs each pair by how it compares with its anchor's other pairs. The paper goes with `MultiSimilarityMiner`.
    Defaults and mean over all anchors as in pytorch-metric-learning.

    Args:
        alpha: Sharpness over positives, > 0.
        beta: Sharpness over negatives, > 0.
        base: Cosine about which pairs are weighed.
        mining: Which pairs to take: a miner, or its name.
        gather: Take partners from all ranks.

    Shape: as `SupConLoss`; the mean is over all anchors.

    Raises:
        ValueError: A setting out of range, or tensors that do not fit.

    Example:
        >>> MultiSimilarityLoss()(torch.eye(4), torch.tensor([0, 0, 1, 1]))
        tensor(0.6566)
    """

    def __init__(
        self,
        *,
        alpha: float = 2.0,
        beta: float = 50.0,
        base: float = 0.5,
        mining: Mining = "all",
        gather: bool = True,
    ) -> None:
        super().__init__(mining=mining, gather=gather)
        check_positive(self, alpha=alpha, beta=beta)
        self.alpha, self.beta, self.base = alpha, beta, base

    def terms(self, tile: Tile) -> Terms:
        pull = softplus(tile.log_sum_positives(-tile.own, self.alpha) + self.alpha * self.base) / self.alpha
        push = softplus(tile.log_sum_negatives(self.beta) - self.beta * self.base) / self.beta
        return [((pull + push).sum(), len(pull))]


class CircleLoss(PairLoss):
    """Circle loss on pairs, Sun et al. 2020, eq. 6 with eq. 5 and 8 (https://arxiv.org/abs/2002.10857).

    Every pair is pushed as hard as it is away from its optimum; that weight has no gradient, as in the authors' code.
    Defaults (the paper's for fine-grained retrieval) as in pytorch-metric-learning; the mean is over anchors that
    have a positive and a negative.

    Args:
        margin: Relaxation m; cosine, in (-1, 1).
        scale: Gamma, > 0.
        mining: Which pairs to take: a miner, or its name.
        gather: Take partners from all ranks.

    Shape: as `SupConLoss`.

    Raises:
        ValueError: A setting out of range, or tensors that do not fit.

    Example:
        >>> CircleLoss(scale=1.0)(torch.eye(4), torch.tensor([0, 0, 1, 1]))
        tensor(1.5989)
    """

    def __init__(
        self, *, margin: float = 0.4, scale: float = 80.0, mining: Mining = "all", gather: bool = True
    ) -> None:
        super().__init__(mining=mining, gather=gather)
        check_positive(self, scale=scale)
        if not -1 < margin < 1:
            raise ValueError(f"CircleLoss needs a margin in (-1, 1) (a cosine), got {margin}.")
        self.margin, self.scale = margin, scale

    def terms(self, tile: Tile) -> Terms:
        push_weight = (tile.similarity.detach() + self.margin).clamp_(min=0)
        push = push_weight * (tile.similarity.clamp(min=-2) - self.margin)  # minus infinity times 0 would be NaN
        pull = (1 + self.margin - tile.own.detach()).clamp(min=0) * (1 - self.margin - tile.own)
        both = log_sum_exp(tile.only_negatives(push, -math.inf), self.scale) + tile.log_sum_positives(pull, self.scale)
        has = (tile.mates > 0) & (tile.strangers > 0)
        return [(softplus(both.masked_fill(~has, 0)).masked_fill(~has, 0).sum(), has.sum())]


class LiftedStructureLoss(PairLoss):
    """Generalised lifted structure loss, Hermans et al. 2017, eq. 8 (https://arxiv.org/abs/1703.07737).

    A smooth batch-hard loss: all positives and all negatives of an anchor, after Oh Song et al. 2016. Distance is
    Euclidean between unit vectors; defaults as in pytorch-metric-learning's GeneralizedLiftedStructureLoss, which also
    counts anchors without a positive or without a negative, by half a hinge.

    Args:
        positive_margin: Distance taken off the positives'.
        negative_margin: Distance that negatives should reach.
        mining: Which pairs to take: a miner, or its name.
        gather: Take partners from all ranks.

    Shape: as `SupConLoss`; the mean is over anchors that have a positive and a negative.

    Raises:
        ValueError: A setting out of range, or tensors that do not fit.

    Example:
        >>> LiftedStructureLoss()(torch.eye(4), torch.tensor([0, 0, 1, 1]))
        tensor(1.6931)
    """

    def __init__(
        self,
        *,
        positive_margin: float = 0.0,
        negative_margin: float = 1.0,
        mining: Mining = "all",
        gather: bool = True,
    ) -> None:
        super().__init__(mining=mining, gather=gather)
        self.positive_margin, self.negative_margin = positive_margin, negative_margin

    def terms(self, tile: Tile) -> Terms:
        pull = tile.log_sum_positives(distance(tile.own)) - self.positive_margin
        push = log_sum_exp(-distance(tile.similarity)) + self.negative_margin
        has = (tile.mates > 0) & (tile.strangers > 0)
        return [(F.relu(pull + push).masked_fill(~has, 0).sum(), has.sum())]


class SoftNearestNeighborLoss(PairLoss):
    """Soft nearest neighbour loss, Frosst et al. 2019, eq. 1 (https://arxiv.org/abs/1902.01889).

    How surely a neighbour drawn by exp(-distance^2 / T) is a class-mate. Unlike the paper, on unit vectors.

    Args:
        temperature: Divides the squared distance; no unit, > 0.
        mining: Which pairs to take: a miner, or its name.
        gather: Take partners from all ranks.

    Shape: as `SupConLoss`.

    Raises:
        ValueError: A setting out of range, or tensors that do not fit.

    Example:
        >>> SoftNearestNeighborLoss()(torch.eye(4), torch.tensor([0, 0, 1, 1]))
        tensor(1.0986)
    """

    def __init__(self, temperature: float = 1.0, *, mining: Mining = "all", gather: bool = True) -> None:
        super().__init__(mining=mining, gather=gather)
        self.temperature = check_temperature(self, temperature)

    def terms(self, tile: Tile) -> Terms:
        scale = 2 / self.temperature  # squared distance is 2 - 2 cosine; the constant cancels
        log_mates = tile.log_sum_positives(tile.own, scale)
        has = tile.mates > 0
        # log(1 + negatives / mates)
        odds = (tile.log_sum_negatives(scale) - log_mates).masked_fill(~has, 0)
        return [(softplus(odds).masked_fill(~has, 0).sum(), has.sum())]


class ContrastiveLoss(PairLoss):
    """Contrastive loss over pairs, Hadsell et al. 2006, eq. 4 (https://doi.org/10.1109/CVPR.2006.100).

    Pulls positive pairs within a distance, pushes negative pairs beyond one. Distance is Euclidean between unit
    vectors, so it lies in [0, 2]. As in pytorch-metric-learning the hinges are not squared, and each of the two
    terms is the mean over the pairs that are not yet where they should be.

    Args:
        positive_margin: Distance up to which a positive pair costs nothing.
        negative_margin: Distance from which a negative pair costs nothing.
        mining: Which pairs to take: a miner, or its name.
        gather: Take partners from all ranks.

    Shape: as `SupConLoss`.

    Raises:
        ValueError: A setting out of range, or tensors that do not fit.

    Example:
        >>> ContrastiveLoss()(torch.eye(4), torch.tensor([0, 0, 1, 1]))
        tensor(1.4142)
    """

    def __init__(
        self,
        *,
        positive_margin: float = 0.0,
        negative_margin: float = 1.0,
        mining: Mining = "all",
        gather: bool = True,
    ) -> None:
        super().__init__(mining=mining, gather=gather)
        if not 0 <= positive_margin < negative_margin <= 2:
            raise ValueError(
                "ContrastiveLoss needs 0 <= positive_margin < negative_margin <= 2 (distances of unit vectors), got "
                f"{positive_margin} and {negative_margin}."
            )
        self.positive_margin, self.negative_margin = positive_margin, negative_margin

    def terms(self, tile: Tile) -> Terms:
        pull = F.relu(distance(tile.own) - self.positive_margin)
        push = F.relu(self.negative_margin - distance(tile.similarity))
        return [
            (tile.positives(pull).sum(), tile.count_positives(pull)),
            (tile.negatives(push).sum(), tile.count_negatives(push)),
        ]


class ThresholdConsistentMarginLoss(PairLoss):
    """Threshold-consistent margin, Zhang et al. 2024, eq. 4 (https://arxiv.org/abs/2307.04047).

    Pulls the positive pairs below one cosine and pushes the negative pairs above another until one threshold fits
    all classes: what open-set identification needs. Meant as a regulariser of another loss. Defaults and means over
    the offending pairs as in pytorch-metric-learning.

    Args:
        loss: The loss to add it to; None gives the regulariser alone.
        weight: Of the regulariser.
        positive_margin: Cosine that positive pairs should reach.
        negative_margin: Cosine that negative pairs should stay under.
        gather: Take partners from all ranks.

    Shape: as `SupConLoss`.

    Raises:
        ValueError: A setting out of range, or tensors that do not fit.

    Example:
        >>> ThresholdConsistentMarginLoss(loss=SupConLoss())(torch.eye(4), torch.tensor([0, 0, 1, 1]))
        tensor(1.9986)
    """

    def __init__(
        self,
        *,
        loss: nn.Module | None = None,
        weight: float = 1.0,
        positive_margin: float = 0.9,
        negative_margin: float = 0.5,
        gather: bool = True,
    ) -> None:
        super().__init__(gather=gather)
        if not -1 <= negative_margin <= positive_margin <= 1:
            raise ValueError(
                "ThresholdConsistentMarginLoss needs -1 <= negative_margin <= positive_margin <= 1 (cosines), got "
                f"{negative_margin} and {positive_margin}."
            )
        self.loss, self.weight = loss, weight
        self.positive_margin, self.negative_margin = positive_margin, negative_margin

    def terms(self, tile: Tile) -> Terms:
        below, above = tile.own <= self.positive_margin, tile.similarity >= self.negative_margin
        return [
            (tile.positives(F.relu(self.positive_margin - tile.own)).sum(), tile.positives(below.float()).sum()),
            (F.relu(tile.similarity - self.negative_margin).sum(), above.sum()),
        ]

    def forward(self, embeddings: Tensor, labels: Tensor, **reference: Any) -> Tensor:
        regulariser = self.weight * super().forward(embeddings, labels, **reference)
        return (
            regulariser if self.loss is None else apply_loss(self.loss, embeddings, labels, **reference) + regulariser
        )


class FocalContrastiveLoss(PairLoss):
    """Pairs as yes-or-no questions with the focal loss of Lin et al. 2017, eq. 4 (https://arxiv.org/abs/1708.02002).

    "Same class?" has probability p = sigmoid(scale (cosine - margin)); easy pairs fade out by (1 - p)^gamma, for
    negatives p^gamma, so that the few hard ones among millions count. No paper: the focal loss applied to pairs;
    the mean over positive pairs plus the mean over negative pairs.

    Args:
        gamma: Focusing strength, >= 0; 0 weighs all pairs alike, 2 is Lin et al.'s choice.
        margin: Cosine at which p is one half.
        scale: How fast p rises, > 0.
        mining: Which pairs to take: a miner, or its name.
        gather: Take partners from all ranks.

    Shape: as `SupConLoss`.

    Raises:
        ValueError: A setting out of range, or tensors that do not fit.

    Example:
        >>> FocalContrastiveLoss(gamma=0.0)(torch.eye(4), torch.tensor([0, 0, 1, 1]))
        tensor(5.0134)
    """

    def __init__(
        self,
        *,
        gamma: float = 2.0,
        margin: float = 0.5,
        scale: float = 10.0,
        mining: Mining = "all",
        gather: bool = True,
    ) -> None:
        super().__init__(mining=mining, gather=gather)
        check_positive(self, scale=scale)
        if gamma < 0:
            raise ValueError(f"FocalContrastiveLoss needs gamma >= 0 (0 is plain cross entropy), got {gamma}.")
        self.gamma, self.margin, self.scale = gamma, margin, scale

    def _focal(self, logit: Tensor) -> Tensor:
        """-(1 - p)^gamma log p with p = sigmoid(-logit)."""
        return torch.exp(-self.gamma * softplus(-logit)) * softplus(logit)

    def terms(self, tile: Tile) -> Terms:
        pull = self._focal(self.scale * (self.margin - tile.own))
        push = self._focal(self.scale * (tile.similarity.clamp(min=-2) - self.margin))
        return [
            (tile.positives(pull).sum(), tile.mates.sum()),
            (tile.negatives(tile.only_negatives(push, 0)).sum(), tile.strangers.sum()),
        ]


class NPairLoss(PairLoss):
    """Multi-class N-pair loss, Sohn 2016, eq. 7 (https://papers.nips.cc/paper/6200).

    One anchor and one positive of each class; the anchor picks its positive out of all classes' by a softmax over
    cosines. As in pytorch-metric-learning they are the first two rows of each class, unit vectors stand for the
    paper's L2 regularisation, and the mean is over classes.

    Args:
        gather: Take classes from all ranks; "first" is in rank order.

    Shape: embeddings (B, D) of any norm and labels (B,) to a scalar. A reference is refused.

    Raises:
        ValueError: A setting out of range, or tensors that do not fit, or a reference.

    Example:
        >>> NPairLoss()(torch.eye(4), torch.tensor([0, 0, 1, 1]))
        tensor(0.6931)
    """

    fits_memory = False

    def __init__(self, *, gather: bool = True) -> None:
        super().__init__(gather=gather)

    def terms(self, tile: Tile) -> Terms:
        return _one_against_negatives(tile, 1.0)

    def compare(
        self, anchors: Tensor, labels: Tensor, reference: Tensor | None, reference_labels: Tensor | None
    ) -> Tensor:
        assert reference_labels is None or reference is not None
        self.refuse(reference, "anchor and positive are the first two rows of each class of the batch")
        order = labels.argsort(stable=True)
        classes, counts = torch.unique_consecutive(labels[order], return_counts=True)
        first = (counts.cumsum(0) - counts)[counts > 1]
        pairs = classes[counts > 1]
        return super().compare(anchors[order[first]], pairs, anchors[order[first + 1]], pairs)


class _AllTriplets(torch.autograd.Function):
    """Sum over negatives n and thresholds t of max(0, t - distance to n), and how many are above zero."""

    @staticmethod
    def forward(ctx: Any, distances: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
        harder = torch.zeros_like(distances)  # (r, M): how many thresholds each negative is nearer than
        nearer = torch.zeros_like(thresholds)  # (r, k): how many negatives are nearer than each threshold
        sums = torch.zeros_like(thresholds)
        if thresholds.shape[1] <= 32:
            term = torch.empty_like(distances)
            for column in range(thresholds.shape[1]):
                torch.sub(thresholds[:, column, None], distances, out=term).relu_()
                sums[:, column] = term.sum(1)
                nearer[:, column] = term.sign_().sum(1)
                harder += term
            total = sums.sum()
        else:  # sorted, each negative looks up how many thresholds it is under
            ordered, order = thresholds.sort(dim=1)
            place = torch.searchsorted(ordered, distances, right=True)
            torch.sub(thresholds.shape[1], place, out=harder)
            here = thresholds.new_zeros(len(thresholds), thresholds.shape[1] + 1)
            here.scatter_add_(1, place, here.new_ones(()).expand_as(place))
            nearer.scatter_(1, order, here.cumsum(1)[:, :-1])
            total = (nearer * thresholds.masked_fill(nearer == 0, 0)).sum() - (
                harder * distances.masked_fill(harder == 0, 0)
            ).sum()
        ctx.save_for_backward(harder, nearer)
        count = nearer.sum(dtype=torch.float64)
        ctx.mark_non_differentiable(count)
        return total, count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        harder, nearer = ctx.saved_tensors
        return harder.mul_(-grads[0]), nearer * grads[0]  # differentiated once, so the buffer is free


class TripletLoss(PairLoss):
    """Triplet margin loss, Schroff et al. 2015, eq. 1 (https://arxiv.org/abs/1503.03832).

    Anchor to positive must be nearer than anchor to negative by a margin. Distance is Euclidean between unit vectors
    and the mean is over triplets that violate the margin, as in pytorch-metric-learning.

    Args:
        margin: In units of distance between unit vectors, [0, 2].
        mining: Which triplets to take: a miner, or its name. "all" takes every one; "batch-hard" per anchor its
            farthest positive and nearest negative (Hermans et al. 2017, eq. 5, https://arxiv.org/abs/1703.07737);
            "semi-hard" those that violate no more than this loss's margin; "easy-positive" per anchor its nearest
            positive. A miner of pairs gives all triplets of the pairs it takes.
        soft: log(1 + exp(violation)) in place of the hinge, as Hermans et al. 2017, section 2.
        gather: Take partners from all ranks.

    Shape: as `SupConLoss`. All triplets take time of order B x M x positives; a miner of triplets or `soft`, too.

    Raises:
        ValueError: A setting out of range, or tensors that do not fit.

    Example:
        >>> TripletLoss(margin=0.2)(torch.eye(4), torch.tensor([0, 0, 1, 1]))
        tensor(0.2000)
    """

    def __init__(
        self, *, margin: float = 0.05, mining: Mining = "all", soft: bool = False, gather: bool = True
    ) -> None:
        if not 0 <= margin <= 2:
            raise ValueError(f"TripletLoss needs a margin in [0, 2] (distances of unit vectors), got {margin}.")
        if mining == "semi-hard":
            mining = SemiHardMiner(margin)
        super().__init__(mining=mining, gather=gather)
        self.margin, self.soft = margin, soft
        self.by_pair = soft or self.miner is not None

    @property
    def weigh(self) -> None:
        """The miner is asked for triplets, not pairs."""
        return

    def terms(self, tile: Tile) -> Terms:
        far = distance(tile.similarity)
        if not self.by_pair:
            return [self._all(tile, far)]
        violation = self.margin + distance(tile.pair_similarity()) - far  # (r, M): a row per positive pair
        terms = softplus(violation) if self.soft else F.relu(violation)
        if self.miner is not None:
            terms = terms * self._kept(tile)
        return [(terms.sum(), torch.count_nonzero(terms))]

    def _all(self, tile: Tile, far: Tensor) -> tuple[Tensor, Tensor]:
        most = int(tile.mates.amax())
        thresholds = (self.margin + distance(tile.own)).masked_fill(~tile.positive, -math.inf)
        total, count = _AllTriplets.apply(far, thresholds.topk(most, dim=1, sorted=False).values)
        return total, count

    def _kept(self, tile: Tile) -> Tensor:
        assert self.miner is not None
        assert tile.pair is not None
        with torch.no_grad():
            if isinstance(self.miner, TripletMiner):
                return self.miner.keep(tile, tile.pair)
            positive, negative = self.miner.pairs(tile)
            return (negative > 0) & (positive.gather(1, tile.pair) > 0)

    def compare(
        self, anchors: Tensor, labels: Tensor, reference: Tensor | None, reference_labels: Tensor | None
    ) -> Tensor:
        if not isinstance(self.miner, SelectingMiner):
            return super().compare(anchors, labels, reference, reference_labels)
        candidates = anchors if reference is None else normalize(reference).to(anchors.dtype)
        chosen = self._select(self.miner, Plan(labels, reference_labels, share=self.gather), anchors, candidates)
        positive, negative, exists = chosen.unbind(1)
        if not len(candidates):
            return (anchors.sum() + candidates.sum()) * 0
        violation = self.margin + distance((anchors * candidates[positive]).sum(1))
        violation = violation - distance((anchors * candidates[negative]).sum(1))  # (B,): one triplet per anchor
        terms = (softplus(violation) if self.soft else F.relu(violation)) * exists
        return terms.sum() / (terms > 0).sum().clamp(min=1)

    def _select(self, miner: SelectingMiner, plan: Plan, anchors: Tensor, candidates: Tensor) -> Tensor:
        """Rows of each anchor's positive and negative among the candidates, and whether they exist (B, 3)."""
        if not plan.columns or not len(anchors):
            return torch.zeros(len(anchors), 3, dtype=torch.long, device=anchors.device)

        def select(tile: Tile) -> Tensor:
            positive, negative, exists = miner.select(tile)
            if tile.own.shape[1]:
                positive = tile.columns.gather(1, positive.unsqueeze(1)).squeeze(1)
            columns = torch.stack([positive, negative], dim=1)
            return torch.cat([plan.candidate_order[columns], exists.long().unsqueeze(1)], dim=1)

        return tiled_rows(select, plan, anchors, None if plan.itself else candidates)


class MarginLoss(PairLoss):
    """Margin loss with a learned boundary, Wu et al. 2017, eq. 5, 6 (https://arxiv.org/abs/1706.07567).

    Positive pairs should be nearer than beta - margin, negative pairs farther than beta + margin. The paper goes with
    `DistanceWeightedMiner`. As in pytorch-metric-learning both terms are counted once per triplet, and the mean is
    over the terms that are not zero.

    Args:
        margin: In units of distance between unit vectors.
        beta: Boundary between same and different at the start, in the same units.
        nu: Weight of beta in the loss, which keeps the boundary small; the paper's eq. 7.
        num_classes: For a beta of each class: labels are class numbers below this. None: one beta for all.
        learn_beta: Whether beta is trained.
        mining: Which triplets to take: a miner, or its name.
        gather: Take partners from all ranks.

    Shape: as `SupConLoss`.

    Raises:
        ValueError: A setting out of range, or tensors that do not fit.

    Example:
        >>> MarginLoss()(torch.eye(4), torch.tensor([0, 0, 1, 1]))
        tensor(0.4142, grad_fn=<AddBackward0>)
    """

    def __init__(
        self,
        *,
        margin: float = 0.2,
        beta: float = 1.2,
        nu: float = 0.0,
        num_classes: int | None = None,
        learn_beta: bool = True,
        mining: Mining = "all",
        gather: bool = True,
    ) -> None:
        super().__init__(mining=mining, gather=gather)
        if margin < 0 or not 0 < beta < 2:
            raise ValueError(
                f"MarginLoss needs margin >= 0 and 0 < beta < 2 (distances of unit vectors), got {margin} and {beta}."
            )
        self.margin, self.nu, self.num_classes = margin, nu, num_classes
        self.beta = nn.Parameter(torch.full((num_classes or 1,), float(beta)), requires_grad=learn_beta)

    def value(self, labels: Tensor) -> Tensor:
        if self.num_classes is None:
            return self.beta.expand(len(labels))
        check_classes(self, labels, self.num_classes)
        return self.beta[labels.long()]

    def terms(self, tile: Tile) -> Terms:
        assert tile.value is not None
        beta = tile.value.to(tile.own.dtype).unsqueeze(1)  # (r, 1)
        pull = tile.positives(F.relu(distance(tile.own) - beta + self.margin))
        push = tile.negatives(F.relu(beta - distance(tile.similarity) + self.margin))
        pulled, pushed = tile.positives((pull > 0).to(pull.dtype)), tile.negatives((push > 0).to(pull.dtype))
        if not isinstance(self.miner, TripletMiner):  # all triplets of the pairs: each pair as often as it has partners
            pull, pulled = (x * tile.strangers.unsqueeze(1) for x in (pull, pulled))
            push, pushed = (x * tile.mates.unsqueeze(1) for x in (push, pushed))
        total = pull.sum() + push.sum()
        if self.num_classes is not None and self.nu:
            triplets = tile.mates if isinstance(self.miner, TripletMiner) else tile.mates * tile.strangers
            total = total + self.nu * (beta.squeeze(1) * triplets).sum()
        return [(total, pulled.sum() + pushed.sum())]

    def compare(
        self, anchors: Tensor, labels: Tensor, reference: Tensor | None, reference_labels: Tensor | None
    ) -> Tensor:
        loss = super().compare(anchors, labels, reference, reference_labels)
        return loss + (self.nu * self.beta.sum() if self.num_classes is None else 0)


class AngularLoss(PairLoss):
    """Angular loss, Wang et al. 2017, eq. 8 (https://arxiv.org/abs/1708.01682).

    Bounds the angle under which a negative sees anchor and positive: a condition on the triangle's shape, which a
    change of scale leaves alone. Each positive pair against all negatives of its anchor.

    Args:
        margin_degrees: The paper's alpha, in (0, 90); default as in pytorch-metric-learning.
        gather: Take partners from all ranks.

    Shape: as `SupConLoss`; the mean is over positive pairs. Time of order B x M x positives.

    Raises:
        ValueError: A setting out of range, or tensors that do not fit.

    Example:
        >>> AngularLoss()(torch.eye(4), torch.tensor([0, 0, 1, 1]))
        tensor(1.0986)
    """

    by_pair = True
    from_positive = True

    def __init__(self, *, margin_degrees: float = 40.0, gather: bool = True) -> None:
        super().__init__(gather=gather)
        if not 0 < margin_degrees < 90:
            raise ValueError(f"AngularLoss needs margin_degrees in (0, 90), got {margin_degrees}; 36 to 55 are usual.")
        self.margin_degrees = margin_degrees

    def terms(self, tile: Tile) -> Terms:
        assert tile.from_positive is not None
        slope = math.tan(math.radians(self.margin_degrees)) ** 2
        log_negatives = log_sum_exp(tile.similarity + tile.from_positive, 4 * slope)
        terms = softplus(log_negatives - 2 * (1 + slope) * tile.pair_similarity().squeeze(1))
        return [(terms.sum(), len(terms))]
