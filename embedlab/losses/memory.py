"""Cross-batch memory: recent embeddings as further partners of the present batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from embedlab._ops import ring_places
from embedlab.losses._base import EmbeddingLoss, apply_loss, check_positive


class CrossBatchMemory(EmbeddingLoss):
    """Cross-batch memory around any pair loss, Wang et al. 2020, algorithm 1 (https://arxiv.org/abs/1912.06798).

    Networks drift slowly, so that embeddings of past batches still serve: loss(batch) + weight * loss(batch against
    the memory). Then the embeddings of all ranks are appended in rank order, the oldest overwritten; the memory never
    holds the present batch, and is the same on every rank and part of the state, so that a resumed run goes on with it.

    Args:
        loss: A loss of this package that takes a reference, or one of pytorch-metric-learning.
        dim: Size of the embeddings.
        capacity: Embeddings to keep.
        weight: Of the loss against the memory.
        start: Training steps before the memory is used (it is filled from the first on): the paper waits 1,000 until
            the drift is slow.

    Shape: embeddings (B, dim) of any norm and labels (B,) to a scalar. A reference is refused.

    Raises:
        ValueError: A setting out of range, or tensors that do not fit, or a reference.

    Example:
        >>> from embedlab.losses import SupConLoss
        >>> loss = CrossBatchMemory(SupConLoss(), 4, capacity=8)
        >>> [loss(torch.eye(4), torch.tensor([0, 0, 1, 1])) for _ in range(2)]
        [tensor(1.0986), tensor(6.0987)]
    """

    fits_memory = False
    bank: Tensor
    bank_labels: Tensor
    seen: Tensor
    step: Tensor

    def __init__(self, loss: nn.Module, dim: int, *, capacity: int, weight: float = 1.0, start: int = 0) -> None:
        gather = getattr(loss, "gather", None)
        super().__init__(gather=True if gather is None else gather)
        check_positive(self, dim=dim, capacity=capacity, weight=weight)
        unfit = [part for part in loss.modules() if not getattr(part, "fits_memory", True)]
        if unfit:
            raise ValueError(
                f"CrossBatchMemory cannot go around {type(unfit[0]).__name__}, which does not compare a batch with "
                "itself and with a reference in turn. Take a loss of pairs, such as SupConLoss or ContrastiveLoss."
            )
        self.loss, self.weight, self.start = loss, weight, start
        self.register_buffer("bank", torch.zeros(capacity, dim))
        self.register_buffer("bank_labels", torch.zeros(capacity, dtype=torch.long))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))  # embeddings ever appended
        self.register_buffer("step", torch.zeros((), dtype=torch.long))  # training calls

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        *,
        reference: Tensor | None = None,
        reference_labels: Tensor | None = None,
    ) -> Tensor:
        self.refuse(reference, "its memory is one")
        every, every_label = self.union(embeddings, labels, reference, reference_labels)
        if embeddings.shape[1] != self.bank.shape[1]:
            raise ValueError(
                f"CrossBatchMemory was made for embeddings of {self.bank.shape[1]} numbers, got {embeddings.shape[1]}; "
                "set dim to the head's out_features."
            )
        loss = apply_loss(self.loss, embeddings, labels)
        filled = min(int(self.seen), len(self.bank))
        if filled and int(self.step) >= self.start:
            memory = {"reference": self.bank[:filled], "reference_labels": self.bank_labels[:filled]}
            loss = loss + self.weight * apply_loss(self.loss, embeddings, labels, **memory)
        if self.training:
            self._append(every.detach(), every_label)
            self.step += 1
        return loss

    def _append(self, embeddings: Tensor, labels: Tensor) -> None:
        """Write over the oldest rows; of more rows than fit, the last stay."""
        newest, places = ring_places(self.seen, len(embeddings), len(self.bank))
        # out of place: the loss of this step may still hold the old bank for its gradient
        self.bank = self.bank.index_copy(0, places, embeddings[newest].to(self.bank.dtype))
        self.bank_labels = self.bank_labels.index_copy(0, places, labels[newest].to(self.bank_labels.dtype))
        self.seen += len(embeddings)
