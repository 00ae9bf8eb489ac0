"""Matryoshka representation learning: embeddings whose first numbers are embeddings already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from embedlab.losses.memory import CrossBatchMemory


class MatryoshkaLoss(nn.Module):
    """Any loss on several prefixes of the embedding, Kusupati et al. 2022, eq. 1 (https://arxiv.org/abs/2205.13147).

    A gallery can then keep the first 32 of 128 numbers and lose little. Losses with proxies compare a prefix with the
    same prefix of the proxies (the paper's MRL-E). The mean over prefixes, each with the paper's weight of 1.

    Args:
        loss: A loss over embeddings: of pairs, proxies, or two views.
        dims: Lengths of the prefixes.

    What a loss counts or averages in training (ArcFaceLoss's steps, AdaFaceLoss's norms) goes on once per prefix;
    AdaFaceLoss takes a prefix's norm times sqrt(dim / length), so that one average fits all.

    Shape: as the loss; every (B, D) argument is cut to its first columns, lists of scores are refused.

    Raises:
        ValueError: A setting out of range, or tensors that do not fit.

    Example:
        >>> from embedlab.losses import SupConLoss
        >>> MatryoshkaLoss(SupConLoss(), [2, 4])(torch.eye(4), torch.tensor([0, 0, 1, 1]))
        tensor(1.0986)
    """

    def __init__(self, loss: nn.Module, dims: Sequence[int]) -> None:
        super().__init__()
        if not dims or min(dims) < 1 or len(set(dims)) < len(dims):
            raise ValueError(f"MatryoshkaLoss needs different prefix lengths >= 1, got {list(dims)}.")
        if any(isinstance(part, CrossBatchMemory) for part in loss.modules()):
            raise ValueError(
                "MatryoshkaLoss cannot cut what a CrossBatchMemory has stored; put the memory outside: "
                "CrossBatchMemory(MatryoshkaLoss(loss, dims), dim, ...)."
            )
        self.loss = loss
        self.dims = list(dims)

    @property
    def gather(self) -> bool | None:
        """Whether the loss works on the union of ranks; None for a foreign one, which has to be given the union."""
        found: bool | None = getattr(self.loss, "gather", None)
        return found

    def forward(self, *vectors: Tensor, **named: Any) -> Tensor:
        first = vectors[0] if vectors else None
        width = first.shape[-1] if isinstance(first, Tensor) else 0
        if max(self.dims) > width:
            shape = tuple(first.shape) if isinstance(first, Tensor) else f"{type(first).__name__} by position"
            raise ValueError(
                f"MatryoshkaLoss takes tensors (B, D) with D >= {max(self.dims)}, the longest prefix, got {shape}."
            )

        def cut(x: Any, dim: int) -> Any:
            return x[:, :dim] if isinstance(x, Tensor) and x.ndim == 2 else x

        losses = [
            self.loss(*(cut(x, dim) for x in vectors), **{name: cut(x, dim) for name, x in named.items()})
            for dim in self.dims
        ]
        return torch.stack(losses).mean()
