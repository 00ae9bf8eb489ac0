"""Losses over pairs and triplets of one batch, or of a batch against a reference.

All of them share a convention: embeddings (B, D) of any norm are normalised inside; labels (B,) say who belongs
together; reference (M, D) with reference_labels (M,) replaces the batch as the set to pick partners from and must be
the same on every rank. With torch.distributed initialised and `gather=True` the batch is the union over ranks: every
rank returns the same loss, and DistributedDataParallel's mean of gradients equals one process on the union, also
when ranks hold different numbers of rows.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedlab._ops import cosine, gather, pair_masks


def _union(
    name: str,
    embeddings: Tensor,
    labels: Tensor,
    reference: Tensor | None,
    reference_labels: Tensor | None,
    across_ranks: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Check the arguments and give (cosine (B, M), positive (B, M), negative (B, M)) over the union of ranks."""
    if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1]:
        raise ValueError(
            f"{name} takes embeddings (B, D) and labels (B,), got {tuple(embeddings.shape)} and {tuple(labels.shape)}; "
            "flatten views into the batch and repeat the labels."
        )
    if (reference is None) != (reference_labels is None):
        raise ValueError(f"{name} takes reference and reference_labels together, got only one of them.")
    if reference is not None and reference_labels is not None:
        _check_reference(name, embeddings, reference, reference_labels)
    if across_ranks:
        embeddings, labels = gather(embeddings), gather(labels)
    return cosine(embeddings, reference), *pair_masks(labels, reference_labels)


def _check_reference(name: str, embeddings: Tensor, reference: Tensor, reference_labels: Tensor) -> None:
    if reference.ndim != 2 or reference.shape[1] != embeddings.shape[1] or len(reference_labels) != len(reference):
        raise ValueError(
            f"{name}: reference {tuple(reference.shape)} with {len(reference_labels)} labels does not fit "
            f"embeddings {tuple(embeddings.shape)}; it must be (M, D) with M labels."
        )


def _check_temperature(name: str, temperature: float) -> None:
    if temperature <= 0:
        raise ValueError(f"{name} needs temperature > 0, got {temperature}; usual values are 0.05 to 0.5.")


def _distance(similarity: Tensor) -> Tensor:
    """Euclidean distance of unit vectors from their cosine; its slope at 0 is cut off, where it would be infinite."""
    return (2 - 2 * similarity).clamp(min=1e-8).sqrt()


def _mean_of_nonzero(terms: Tensor, chosen: Tensor) -> Tensor:
    """Mean of the chosen terms that are above zero; 0 with a graph when there is none."""
    active = chosen & (terms > 0)
    return terms.masked_fill(~active, 0).sum() / active.sum().clamp(min=1)


class SupConLoss(nn.Module):
    """Supervised contrastive loss, Khosla et al. 2020, eq. 2 (https://arxiv.org/abs/2004.11362).

    Each anchor picks its class-mates out of the batch by a softmax over cosines. With the image number as label and
    two views it is SimCLR's NT-Xent. Unlike the authors' code, the result is not rescaled by the temperature.

    Args:
        temperature: Divides the cosine before the softmax; no unit, > 0.
        gather: Take partners from all ranks.

    Shape: embeddings (B, D) of any norm and labels (B,) to a scalar, the mean over anchors that have a class-mate.
        reference (M, D) with reference_labels (M,) replaces the batch as the set to pick from.

    Example:
        >>> SupConLoss()(torch.eye(4), torch.tensor([0, 0, 1, 1]))
        tensor(1.0986)
    """

    def __init__(self, temperature: float = 0.1, *, gather: bool = True) -> None:
        super().__init__()
        _check_temperature("SupConLoss", temperature)
        self.temperature = temperature
        self.gather = gather

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        *,
        reference: Tensor | None = None,
        reference_labels: Tensor | None = None,
    ) -> Tensor:
        similarity, positive, negative = _union(
            "SupConLoss", embeddings, labels, reference, reference_labels, self.gather
        )
        logits = similarity / self.temperature  # (B, M)
        lowest = torch.finfo(logits.dtype).min  # not -inf: a row without pairs would give inf - inf in backward
        log_total = logits.masked_fill(~(positive | negative), lowest).logsumexp(dim=1, keepdim=True)
        mates = positive.sum(dim=1)  # (B,)
        per_anchor = (log_total - logits).masked_fill(~positive, 0).sum(dim=1) / mates.clamp(min=1)
        return per_anchor.sum() / (mates > 0).sum().clamp(min=1)  # fixed shapes: no wait for the GPU


class NTXentLoss(nn.Module):
    """Normalised temperature-scaled cross entropy, Chen et al. 2020, eq. 1 (https://arxiv.org/abs/2002.05709).

    Per positive pair: that positive against itself plus all negatives. Label = number of the image, so that the
    views of one image share it. With more than two views per image it differs from `SupConLoss`, which also holds
    the other positives in the denominator. The mean is over positive pairs, as in pytorch-metric-learning.

    Args:
        temperature: Divides the cosine before the softmax; no unit, > 0.
        gather: Take partners from all ranks.

    Shape: as `SupConLoss`.

    Example:
        >>> NTXentLoss(0.5)(torch.eye(4), torch.tensor([0, 0, 1, 1]))
        tensor(1.0986)
    """

    def __init__(self, temperature: float = 0.1, *, gather: bool = True) -> None:
        super().__init__()
        _check_temperature("NTXentLoss", temperature)
        self.temperature = temperature
        self.gather = gather

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        *,
        reference: Tensor | None = None,
        reference_labels: Tensor | None = None,
    ) -> Tensor:
        similarity, positive, negative = _union(
            "NTXentLoss", embeddings, labels, reference, reference_labels, self.gather
        )
        logits = similarity / self.temperature  # (B, M)
        lowest = torch.finfo(logits.dtype).min
        log_negatives = logits.masked_fill(~negative, lowest).logsumexp(dim=1, keepdim=True)
        per_pair = torch.logaddexp(logits, log_negatives) - logits  # (B, M): -log of the positive's share
        return per_pair.masked_fill(~positive, 0).sum() / positive.sum().clamp(min=1)


class ContrastiveLoss(nn.Module):
    """Contrastive loss over pairs, Hadsell et al. 2006, eq. 4 (https://doi.org/10.1109/CVPR.2006.100).

    Pulls positive pairs within a distance, pushes negative pairs beyond one. Distance is Euclidean between unit
    vectors, so it lies in [0, 2]. As in pytorch-metric-learning the hinges are not squared, and each of the two
    terms is the mean over the pairs that are not yet where they should be.

    Args:
        positive_margin: Distance up to which a positive pair costs nothing.
        negative_margin: Distance from which a negative pair costs nothing.
        gather: Take partners from all ranks.

    Shape: as `SupConLoss`.

    Example:
        >>> ContrastiveLoss()(torch.eye(4), torch.tensor([0, 0, 1, 1]))
        tensor(1.4142)
    """

    def __init__(self, *, positive_margin: float = 0.0, negative_margin: float = 1.0, gather: bool = True) -> None:
        super().__init__()
        if not 0 <= positive_margin < negative_margin <= 2:
            raise ValueError(
                "ContrastiveLoss needs 0 <= positive_margin < negative_margin <= 2 (distances of unit vectors), got "
                f"{positive_margin} and {negative_margin}."
            )
        self.positive_margin = positive_margin
        self.negative_margin = negative_margin
        self.gather = gather

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        *,
        reference: Tensor | None = None,
        reference_labels: Tensor | None = None,
    ) -> Tensor:
        similarity, positive, negative = _union(
            "ContrastiveLoss", embeddings, labels, reference, reference_labels, self.gather
        )
        distance = _distance(similarity)  # (B, M)
        pull = _mean_of_nonzero(distance - self.positive_margin, positive)
        push = _mean_of_nonzero(self.negative_margin - distance, negative)
        return pull + push


class TripletLoss(nn.Module):
    """Triplet margin loss, Schroff et al. 2015, eq. 1 (https://arxiv.org/abs/1503.03832).

    Anchor to positive must be nearer than anchor to negative by a margin. Distance is Euclidean between unit vectors
    and the mean is over triplets that violate the margin, as in pytorch-metric-learning.

    Args:
        margin: In units of distance between unit vectors, [0, 2].
        mining: "all": every triplet of the batch. "batch-hard": per anchor its farthest positive and nearest negative,
            Hermans et al. 2017, eq. 5 (https://arxiv.org/abs/1703.07737).
        soft: log(1 + exp(violation)) in place of the hinge, as Hermans et al. 2017, section 2.
        gather: Take partners from all ranks.

    Shape: as `SupConLoss`.

    Example:
        >>> TripletLoss(margin=0.2)(torch.eye(4), torch.tensor([0, 0, 1, 1]))
        tensor(0.2000)
    """

    def __init__(
        self,
        *,
        margin: float = 0.05,
        mining: Literal["all", "batch-hard"] = "all",
        soft: bool = False,
        gather: bool = True,
    ) -> None:
        super().__init__()
        if not 0 <= margin <= 2:
            raise ValueError(f"TripletLoss needs a margin in [0, 2] (distances of unit vectors), got {margin}.")
        if mining not in ("all", "batch-hard"):
            raise ValueError(f"TripletLoss knows mining 'all' and 'batch-hard', got {mining!r}.")
        self.margin = margin
        self.mining = mining
        self.soft = soft
        self.gather = gather

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        *,
        reference: Tensor | None = None,
        reference_labels: Tensor | None = None,
    ) -> Tensor:
        similarity, positive, negative = _union(
            "TripletLoss", embeddings, labels, reference, reference_labels, self.gather
        )
        distance = _distance(similarity)  # (B, M)
        if self.mining == "batch-hard":
            farthest = distance.masked_fill(~positive, -1).amax(dim=1)  # (B,)
            nearest = distance.masked_fill(~negative, 3).amin(dim=1)  # (B,)
            violation = self.margin + farthest - nearest
            exists = positive.any(dim=1) & negative.any(dim=1)
        else:
            anchor, mate = positive.nonzero(as_tuple=True)  # (P,): one row per positive pair
            violation = self.margin + distance[anchor, mate][:, None] - distance[anchor]  # (P, M)
            exists = negative[anchor]
        return _mean_of_nonzero(F.softplus(violation) if self.soft else violation, exists)
