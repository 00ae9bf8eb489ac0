"""Focal losses: cross entropy that spends its gradient on what is not yet learned."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedlab._ops import at_least_float32
from embedlab.losses._base import mean_over_ranks


def _check_gamma(name: str, gamma: float) -> None:
    if gamma < 0:
        raise ValueError(f"{name} needs gamma >= 0 (0 is plain cross entropy), got {gamma}.")


class FocalLoss(nn.Module):
    """Softmax focal loss, Lin et al. 2017, eq. 4 and 5 with a softmax (https://arxiv.org/abs/1708.02002).

    Multiplies the cross entropy of each sample by (1 - p)^gamma, p the probability of the right class: rare and hard
    samples dominate, easy ones fade out.

    Args:
        gamma: Focusing strength, >= 0; 0 is cross entropy, 2 the paper's choice.
        class_weights: One weight per class (the paper's alpha), or None for 1.
        gather: Take the mean over the targets of all ranks; every rank has to call the loss.

    Shape: logits (B, C, ...) and int64 targets (B, ...) to a scalar, the plain mean over all targets (weights do not
        change the divisor).

    Raises:
        ValueError: A setting out of range, or tensors that do not fit.

    Example:
        >>> FocalLoss(gamma=2.0)(torch.zeros(1, 2), torch.tensor([0]))
        tensor(0.1733)
    """

    class_weights: Tensor | None

    def __init__(
        self, gamma: float = 2.0, *, class_weights: Sequence[float] | None = None, gather: bool = True
    ) -> None:
        super().__init__()
        _check_gamma("FocalLoss", gamma)
        self.gamma, self.gather = gamma, gather
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        if logits.ndim < 2 or targets.shape != (logits.shape[0], *logits.shape[2:]):
            raise ValueError(
                f"FocalLoss takes logits (B, C, ...) and targets (B, ...), got {tuple(logits.shape)} and "
                f"{tuple(targets.shape)}; for one logit per target use BinaryFocalLoss."
            )
        log_p = F.log_softmax(at_least_float32(logits), dim=1).gather(1, targets.unsqueeze(1)).squeeze(1)  # (B, ...)
        # -expm1(log p) = 1 - p without cancellation for p near 1
        terms = -((-torch.expm1(log_p)).clamp(min=torch.finfo(log_p.dtype).tiny) ** self.gamma) * log_p
        if self.class_weights is not None:
            terms = terms * self.class_weights.to(terms.dtype)[targets]
        return mean_over_ranks(terms.flatten(), self.gather)


class BinaryFocalLoss(nn.Module):
    """Sigmoid focal loss, Lin et al. 2017, eq. 5 (https://arxiv.org/abs/1708.02002).

    Args:
        gamma: Focusing strength, >= 0; 0 is binary cross entropy.
        alpha: Weight of the positive class in [0, 1], 1 - alpha that of the negative; None weighs both 1.
        gather: Take the mean over the targets of all ranks; every rank has to call the loss.

    Shape: logits (...) and targets (...) in [0, 1], any shape, to a scalar, the mean over all elements.

    Raises:
        ValueError: A setting out of range, or tensors that do not fit.

    Example:
        >>> BinaryFocalLoss(gamma=2.0, alpha=None)(torch.zeros(1), torch.ones(1))
        tensor(0.1733)
    """

    def __init__(self, gamma: float = 2.0, *, alpha: float | None = 0.25, gather: bool = True) -> None:
        super().__init__()
        _check_gamma("BinaryFocalLoss", gamma)
        if alpha is not None and not 0 <= alpha <= 1:
            raise ValueError(f"BinaryFocalLoss needs alpha in [0, 1] or None, got {alpha}.")
        self.gamma, self.alpha, self.gather = gamma, alpha, gather

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        if logits.shape != targets.shape:
            raise ValueError(
                f"BinaryFocalLoss takes logits and targets of one shape, got {tuple(logits.shape)} and "
                f"{tuple(targets.shape)}; for class numbers use FocalLoss."
            )
        logits = at_least_float32(logits)
        targets = targets.to(logits.dtype)
        cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        # 1 - p_t as a sigmoid, so that it keeps its digits when p_t is near 1
        miss = targets * torch.sigmoid(-logits) + (1 - targets) * torch.sigmoid(logits)
        # not 0: below gamma 1 the power's slope is infinite there
        terms = miss.clamp(min=torch.finfo(miss.dtype).tiny) ** self.gamma * cross_entropy
        if self.alpha is not None:
            terms = terms * (self.alpha * targets + (1 - self.alpha) * (1 - targets))
        return mean_over_ranks(terms.flatten(), self.gather)
