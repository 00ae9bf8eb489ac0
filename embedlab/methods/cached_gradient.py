"""Batches larger than memory, with all their negatives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from embedlab._ops import world_size
from embedlab.methods.batch_norm import SyncBatchNorm


def cached_gradient(network: nn.Module, images: Tensor, chunk: int) -> Tensor:
    """Embed a batch chunk by chunk in the memory of one chunk, Gao et al. 2021, section 3 (https://arxiv.org/abs/2101.06983).

    The images are embedded without a graph, and any loss is computed on all embeddings. In the backward pass each
    chunk is embedded a second time, with a graph, which takes the embeddings' gradient to the parameters. It costs
    one more forward pass. The gradient is that of the whole batch, unless the network has batch statistics: these are
    of each chunk ("ghost batches"), as if the chunks had been embedded one by one.

    In the second pass the random numbers of the global generators (dropout) and the buffers are those of the first;
    afterwards both are as if there had been no second pass, so that running statistics are updated once per chunk.
    A network that draws from a generator of its own is not covered.

    The parameters get their gradient once, as a sum over chunks: DistributedDataParallel, gradient accumulation and
    loss scaling see nothing unusual. With `SyncBatchNorm` every rank works through equally many chunks, the last of
    which are empty on ranks with fewer images.

    Args:
        network: Images (B, ...) to embeddings (B, D).
        images: The batch; all views of it.
        chunk: Images in a chunk, >= 1.

    Returns:
        Embeddings (B, D).

    Raises:
        ValueError: No images in a chunk.

    Example:
        >>> network = nn.Linear(3, 2)
        >>> cached_gradient(network, torch.ones(8, 3), chunk=4).square().sum().backward()
        >>> network.weight.grad.shape
        torch.Size([2, 3])
    """
    if chunk < 1:
        raise ValueError(f"A chunk has at least one image, got chunk={chunk}; None embeds all images at once.")
    chunks = [images[first : first + chunk] for first in range(0, max(1, len(images)), chunk)]
    if world_size() > 1 and _synchronizes(network):  # a rank with fewer chunks would leave the others waiting
        most = torch.tensor(len(chunks), device=images.device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        chunks += [images[:0]] * (int(most) - len(chunks))
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    embeddings: Tensor = _CachedGradient.apply(network, len(chunks), *chunks, *parameters)
    return embeddings


def _synchronizes(network: nn.Module) -> bool:
    kinds = (SyncBatchNorm, nn.SyncBatchNorm)
    return any(isinstance(module, kinds) and module.training for module in network.modules())


@dataclass
class _Moment:
    """All that a forward pass depends on besides its inputs and the parameters."""

    buffers: list[Tensor]
    cpu: Tensor
    devices: list[int]
    states: list[Tensor]
    device_type: str

    @staticmethod
    def now(network: nn.Module, x: Tensor) -> _Moment:
        buffers = [buffer.clone() for buffer in network.buffers()]
        devices, states = get_device_states(x)
        return _Moment(buffers, torch.get_rng_state(), devices, states, x.device.type)

    def restore(self, network: nn.Module) -> None:
        for buffer, then in zip(network.buffers(), self.buffers, strict=True):
            buffer.data.copy_(then)  # .data: another graph may hold the buffer, and is not hurt by a passing change
        torch.set_rng_state(self.cpu)
        set_device_states(self.devices, self.states, device_type=self.device_type)


def _precision(device_type: str, enabled: bool, dtype: torch.dtype) -> torch.autocast:
    """Autocast as it was in the first pass, without its cache.

    The cache could hand weights that were cast without a graph on to a pass that needs one; PyTorch 2.15 tells them
    apart, but a gradient missing without a word is not worth the few casts saved.
    """
    return torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=False)


class _CachedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, network: nn.Module, count: int, *tensors: Tensor) -> Tensor:
        chunks, device_type = tensors[:count], tensors[0].device.type
        ctx.precision = device_type, torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
        ctx.network, ctx.count, ctx.moments = network, count, []
        parts = []
        with _precision(*ctx.precision):
            for chunk in chunks:
                ctx.moments.append(_Moment.now(network, chunk))
                parts.append(network(chunk))
        ctx.rows = [len(part) for part in parts]
        ctx.save_for_backward(*tensors)
        return torch.cat(parts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        network, count = ctx.network, ctx.count
        chunks, parameters = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        of_chunks: list[Tensor | None] = []
        total: list[Tensor | None] = [None] * len(parameters)
        afterwards = _Moment.now(network, chunks[0])
        try:
            for chunk, moment, grad in zip(chunks, ctx.moments, grads[0].split_with_sizes(ctx.rows), strict=True):
                moment.restore(network)
                found, of_chunk = _second_pass(network, chunk, parameters, grad, ctx.precision)
                of_chunks.append(of_chunk)
                for place, gradient in enumerate(found):
                    if gradient is not None:
                        before = total[place]  # not added to in place: it may be a view of what came in
                        total[place] = gradient if before is None else before + gradient
        finally:
            afterwards.restore(network)
        return None, None, *of_chunks, *total


def _second_pass(
    network: nn.Module, chunk: Tensor, parameters: Sequence[Tensor], grad: Tensor, precision: tuple[str, bool, Any]
) -> tuple[Sequence[Tensor | None], Tensor | None]:
    """Gradients of parameters and of the chunk, given that of its embeddings."""
    wants_chunk = chunk.requires_grad
    chunk = chunk.detach().requires_grad_(wants_chunk)
    with torch.enable_grad(), _precision(*precision):
        embeddings = network(chunk)
    inputs = [*parameters, chunk] if wants_chunk else parameters
    found = torch.autograd.grad(embeddings, inputs, grad, allow_unused=True)
    return found[: len(parameters)], found[-1] if wants_chunk else None
