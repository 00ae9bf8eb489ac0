"""Batch normalisation over the union of all ranks' batches, on CPUs too."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from embedlab._ops import at_least_float32, world_size

Network = TypeVar("Network", bound=nn.Module)


def _per_channel(x: Tensor, values: Tensor) -> Tensor:
    """(C,) in the shape that goes with x (B, C, ...)."""
    return values.view(1, -1, *[1] * (x.ndim - 2))


class _Normalize(torch.autograd.Function):
    """Normalise by mean and variance of all ranks' rows, and differentiate through both."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        high = at_least_float32(x)
        channels = [0, *range(2, x.ndim)]
        rows = x.numel() // x.shape[1]
        # centred sums of each rank, then Chan et al. 1979: a sum of squares would lose the digits of a large mean
        mean = high.mean(channels) if rows else high.new_zeros(x.shape[1])
        squares = (high - _per_channel(x, mean)).square().sum(channels)
        mine = torch.cat([mean, squares, mean.new_tensor([rows])])  # (2C + 1,)
        parts = [torch.empty_like(mine) for _ in range(world_size())]
        torch.distributed.all_gather(parts, mine)
        everyone = torch.stack(parts)  # (W, 2C + 1)
        means, counts = everyone[:, : len(mean)], everyone[:, -1:]
        count = counts.sum().clamp(min=1)
        mean = (means * counts).sum(0) / count
        squares = everyone[:, len(mean) : -1].sum(0) + (counts * (means - mean).square()).sum(0)
        scale = (squares / count + eps).rsqrt()
        y = (high - _per_channel(x, mean)) * _per_channel(x, scale)
        if weight is not None:
            y = y * _per_channel(x, weight)
        if bias is not None:
            y = y + _per_channel(x, bias)
        ctx.save_for_backward(x, weight, mean, scale, count)
        ctx.has_bias = bias is not None
        unbiased = squares / (count - 1).clamp(min=1)
        ctx.mark_non_differentiable(mean, unbiased)
        return y.to(x.dtype), mean, unbiased

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale, count = ctx.saved_tensors
        grad = at_least_float32(grads[0])
        channels = [0, *range(2, x.ndim)]
        unit = (at_least_float32(x) - _per_channel(x, mean)) * _per_channel(x, scale)
        for_bias, for_weight = grad.sum(channels), (grad * unit).sum(channels)
        sums = torch.stack([for_bias, for_weight])  # (2, C)
        torch.distributed.all_reduce(sums)  # the statistics depend on the rows of all ranks
        sums = sums / count
        slope = scale if weight is None else scale * weight
        inward = (grad - _per_channel(x, sums[0]) - unit * _per_channel(x, sums[1])) * _per_channel(x, slope)
        # own rows only: DistributedDataParallel takes the mean over ranks
        return inward.to(x.dtype), for_weight if weight is not None else None, for_bias if ctx.has_bias else None, None


class SyncBatchNorm(_BatchNorm):
    """Batch normalisation over the rows of all ranks, Ioffe and Szegedy 2015, alg. 1 (https://arxiv.org/abs/1502.03167).

    The result, its gradient and the running statistics are those of `torch.nn.BatchNorm1d` or `2d` on the union of
    all ranks' batches, which may be of different sizes, also empty; all ranks must take part in the backward pass.
    Unlike `torch.nn.SyncBatchNorm` it works on CPUs. In one process, and in eval mode, it *is* PyTorch's. Parameters,
    buffers and state dict are the same too. Half precision is summed in float32.

    Args: as `torch.nn.BatchNorm2d`.

    Shape: (B, C) or (B, C, ...) to the same.

    Example:
        >>> SyncBatchNorm(3)(torch.zeros(2, 3, 4, 4)).shape
        torch.Size([2, 3, 4, 4])
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"SyncBatchNorm takes (B, C) or (B, C, ...), got {tuple(input.shape)}; add a batch axis.")

    def forward(self, input: Tensor) -> Tensor:  # noqa: D102 - PyTorch's name
        if not self.training or world_size() == 1:
            return super().forward(input)
        self._check_input_dim(input)
        normalized: Tensor
        normalized, mean, variance = _Normalize.apply(input, self.weight, self.bias, self.eps)
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            rate = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), rate)
                self.running_var.lerp_(variance.to(self.running_var.dtype), rate)
        return normalized


def synchronize_batch_norm(network: Network) -> Network:
    """Make every `nn.BatchNorm1d`, `2d` and `3d` of a network a `SyncBatchNorm`, in place.

    The modules stay the same objects, with their parameters, buffers, hooks and modes; only what they do in training
    changes. Twice is as good as once.

    Returns:
        The network itself.

    Raises:
        ValueError: A batch normalisation of another kind, whose own behaviour would be lost.

    Example:
        >>> synchronize_batch_norm(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))[1]
        SyncBatchNorm(4, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
    """
    found = {name: module for name, module in network.named_modules() if isinstance(module, _BatchNorm)}
    plain = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    for name, module in found.items():
        if type(module) not in (*plain, SyncBatchNorm, nn.SyncBatchNorm):
            raise ValueError(
                f"Cannot synchronise {name or 'the network'}: {type(module).__name__} is a batch normalisation of its "
                "own kind. Make a network with torch.nn.BatchNorm1d or 2d, or with GroupNorm, which needs no "
                "synchronisation (ResNet: norm: group)."
            )
    for module in found.values():
        if type(module) in plain:
            module.__class__ = SyncBatchNorm  # same attributes; a new module would lose hooks, and places it is shared
    return network
