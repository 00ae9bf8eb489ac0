"""LARS, the optimizer of very large batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling, You et al. 2017, eq. 6 and algorithm 1 (https://arxiv.org/abs/1708.03888).

    Each tensor's step is a fixed share of the tensor's own norm, so that no layer runs away at the learning rates of
    large batches. As in the code of SimCLR and BYOL, only groups with weight decay are adapted: biases and
    normalisation, which `Method` keeps in a group without, are stepped by plain SGD with momentum.

    Unlike eq. 6, which adds the norms of gradient and decay, the norm is that of their sum, as in SimCLR's and BYOL's
    code. As in algorithm 1 and in SimCLR's code the learning rate is inside the momentum; BYOL and `torch.optim.SGD`
    have it outside, which differs while the rate changes.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate, >= 0. SimCLR takes 0.3, BYOL 0.2, both per 256 images of the batch (`scale_rate="linear"`).
        momentum: Share of the last step that is added to the next, in [0, 1).
        weight_decay: Multiple of the parameters added to the gradient; a group's own goes before. SimCLR has 1e-6,
            BYOL 1.5e-6.
        trust: Step of an adapted tensor as a share of its norm, at a learning rate of 1; > 0.
        nesterov: Look ahead by one step of the momentum.

    Raises:
        ValueError: A setting out of range, or no group with weight decay.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> weight.grad = torch.tensor([[0.0, 1.0]])
        >>> LARS([weight], lr=1.0, weight_decay=1e-9, trust=0.1).step()  # 0.1 of its norm, which is 5
        >>> weight.data
        tensor([[3.0000, 3.5000]])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.3,
        *,
        momentum: float = 0.9,
        weight_decay: float = 1e-6,
        trust: float = 1e-3,
        nesterov: bool = False,
    ) -> None:
        if lr < 0 or not 0 <= momentum < 1 or trust <= 0:
            raise ValueError(
                f"LARS needs lr >= 0, momentum in [0, 1) and trust > 0, got {lr}, {momentum} and {trust}; SimCLR has "
                "0.3 per 256 images, 0.9 and 0.001."
            )
        if nesterov and not momentum:
            raise ValueError("LARS with nesterov=True looks ahead along the momentum, but momentum is 0; 0.9 is usual.")
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust, "nesterov": nesterov}
        super().__init__(params, settings)
        if any(group["weight_decay"] < 0 for group in self.param_groups):
            raise ValueError(f"LARS needs weight_decay >= 0, got {[g['weight_decay'] for g in self.param_groups]}.")
        if not any(group["weight_decay"] for group in self.param_groups):
            raise ValueError(
                "LARS adapts only groups with weight decay, and there is none, so that it would be plain SGD: set "
                "weight_decay (SimCLR has 1e-6), or take torch.optim.SGD."
            )

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Change the parameters by one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._change(parameter, parameter.grad, group)
        return loss

    def _change(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        decay, momentum = group["weight_decay"], group["momentum"]
        if decay:
            gradient = gradient.add(parameter, alpha=decay)
            wanted, found = group["trust"] * parameter.norm(), gradient.norm()
            # a new tensor of zeros must be able to leave zero; torch.where, as `if` would wait for the GPU
            gradient = gradient * torch.where((wanted > 0) & (found > 0), wanted / found, 1.0)
        change = gradient * group["lr"]
        if momentum:
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            velocity = state["momentum_buffer"].mul_(momentum).add_(change)
            change = change.add(velocity, alpha=momentum) if group["nesterov"] else velocity
        parameter.sub_(change)
