"""What the losses over embeddings and labels share: arguments checked, ranks gathered, tiles summed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from embedlab._ops import at_least_float32, gather, normalize, sum_over_ranks, world_size
from embedlab.losses._tiles import Plan, Tile, Weigh, tiled_means
from embedlab.losses.miners import Mining, find_miner


class EmbeddingLoss(nn.Module):
    """Base of all losses that take (embeddings, labels).

    Args:
        gather: Work on the union of all ranks' rows.
    """

    fits_memory = True  # takes a reference, and can do without

    def __init__(self, *, gather: bool = True) -> None:
        super().__init__()
        self.gather = gather

    def union(
        self, embeddings: Any, labels: Any, reference: Tensor | None, reference_labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Check all arguments; embeddings (B, D) and labels (B,) of all ranks in rank order."""
        name = type(self).__name__
        if not isinstance(embeddings, Tensor) or not isinstance(labels, Tensor):
            raise ValueError(
                f"{name} takes tensors, embeddings (B, D) and labels (B,), got {type(embeddings).__name__} and "
                f"{type(labels).__name__}; make class numbers a tensor by torch.tensor(labels)."
            )
        if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1]:
            raise ValueError(
                f"{name} takes embeddings (B, D) and labels (B,), got {tuple(embeddings.shape)} and "
                f"{tuple(labels.shape)}; flatten views into the batch and repeat the labels."
            )
        if (reference is None) != (reference_labels is None):
            raise ValueError(f"{name} takes reference and reference_labels together, got only one of them.")
        if reference is not None and reference_labels is not None:
            wrong = reference.ndim != 2 or reference.shape[1] != embeddings.shape[1]
            if wrong or reference_labels.shape != reference.shape[:1]:
                raise ValueError(
                    f"{name}: reference {tuple(reference.shape)} with {len(reference_labels)} labels does not fit "
                    f"embeddings {tuple(embeddings.shape)}; it must be (M, D) with M labels."
                )
        labels = one_type(labels)
        if not self.gather:
            return embeddings, labels
        if world_size() > 1 and torch.is_grad_enabled() and not embeddings.requires_grad:
            embeddings = embeddings.detach().requires_grad_()  # all ranks must enter the gradient's collectives
        return gather(embeddings), gather(labels)

    def refuse(self, reference: Tensor | None, why: str) -> None:
        """Raise when there is a reference."""
        if reference is not None:
            raise ValueError(f"{type(self).__name__} cannot use a reference: {why}.")


class PairLoss(EmbeddingLoss):
    """Base of the losses that compare each anchor with all candidates; such a loss adds `terms`.

    Args:
        mining: Which pairs to take: a miner, or its name.
        gather: Take partners from all ranks.
    """

    by_pair = False  # a row of a tile is an anchor, or an anchor with one of its positives
    from_positive = False

    def __init__(self, *, mining: Mining = "all", gather: bool = True) -> None:
        super().__init__(gather=gather)
        self.miner = find_miner(type(self).__name__, mining)

    def terms(self, tile: Tile) -> Sequence[tuple[Tensor, Tensor | float]]:
        """What a tile adds to the (sum, count) of each of the loss's means."""
        raise NotImplementedError

    def value(self, labels: Tensor) -> Tensor | None:  # noqa: ARG002
        """One number per anchor (B,) that the terms need, or None."""
        return None

    @property
    def weigh(self) -> Weigh | None:
        """What the engine asks for the pairs of a tile."""
        return None if self.miner is None else self.miner.pairs

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        *,
        reference: Tensor | None = None,
        reference_labels: Tensor | None = None,
    ) -> Tensor:
        embeddings, labels = self.union(embeddings, labels, reference, reference_labels)
        loss = self.compare(normalize(embeddings), labels, reference, reference_labels)
        if self.training and self.miner is not None:
            self.miner.advance()
        return loss

    def compare(
        self, anchors: Tensor, labels: Tensor, reference: Tensor | None, reference_labels: Tensor | None
    ) -> Tensor:
        """The loss of unit vectors (B, D) of all ranks."""
        candidates = None if reference is None else normalize(reference).to(anchors.dtype)
        plan = self.plan(labels, reference_labels)
        loss = tiled_means(self.terms, plan, anchors, candidates, self.value(labels), self.weigh).sum()
        # a miner compares, and NaN is neither above nor below: it would drop broken embeddings in silence
        return loss if self.miner is None else loss + anchors.detach().sum() * 0

    def plan(self, labels: Tensor, reference_labels: Tensor | None) -> Plan:
        """How the engine goes about it."""
        return Plan(labels, reference_labels, by_pair=self.by_pair, from_positive=self.from_positive, share=self.gather)


def one_type(labels: Tensor) -> Tensor:
    """Integers as int64, so that all ranks send alike, also one that has no rows and torch.tensor([]) for labels."""
    return labels if labels.is_floating_point() and len(labels) else labels.long()


def gathers(loss: nn.Module) -> bool:
    """Whether a loss sees to the rows of other ranks by itself: ours do, and say so by an attribute."""
    return any(isinstance(getattr(part, "gather", None), bool) for part in loss.modules())


def apply_loss(
    loss: nn.Module,
    embeddings: Tensor,
    labels: Tensor,
    *,
    reference: Tensor | None = None,
    reference_labels: Tensor | None = None,
) -> Tensor:
    """A loss of ours, or one of pytorch-metric-learning's kind on the union of all ranks."""
    if gathers(loss):
        names = ("reference", "reference_labels")
    else:
        names = ("ref_emb", "ref_labels")
        embeddings, labels = gather(at_least_float32(embeddings)), gather(one_type(labels))
    named = {} if reference is None else dict(zip(names, (reference, reference_labels), strict=True))
    found: Tensor = loss(embeddings, labels, **named)
    return found


def check_temperature(loss: nn.Module, temperature: float) -> float:
    """The temperature, if it is one."""
    if temperature <= 0:
        name = type(loss).__name__
        raise ValueError(f"{name} needs temperature > 0, got {temperature}; usual values are 0.05 to 0.5.")
    return temperature


def check_positive(loss: nn.Module, **values: float) -> None:
    """Raise unless all are above zero."""
    for name, value in values.items():
        if value <= 0:
            raise ValueError(f"{type(loss).__name__} needs {name} > 0, got {value}.")


def check_classes(loss: nn.Module, labels: Tensor, num_classes: int) -> None:
    """Raise unless the labels are class numbers."""
    if labels.is_floating_point():
        raise ValueError(
            f"{type(loss).__name__} takes class numbers as labels, got {labels.dtype}; convert by .long()."
        )
    if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < num_classes):
        raise ValueError(
            f"{type(loss).__name__} was made for the classes 0 to {num_classes - 1}, got labels from "
            f"{int(labels.min())} to {int(labels.max())}; number the training classes from 0, or raise num_classes."
        )


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)); unlike torch's, exact for x above 20."""
    return torch.logaddexp(x, x.new_zeros(()))


def mean_over_ranks(terms: Tensor, across_ranks: bool) -> Tensor:
    """Mean of (B,) over the rows of all ranks; 0 with a graph when there are none."""
    parts = torch.stack([terms.sum(), terms.new_full((), len(terms))])
    total, rows = sum_over_ranks(parts) if across_ranks else parts
    mean: Tensor = total / rows.clamp(min=1)
    return mean
