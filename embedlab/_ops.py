"""Tensor functions that two rooms or more need."""

from __future__ import annotations

import torch
import torch.distributed
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Lift half precision to float32; leave float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def normalize(x: Tensor) -> Tensor:
    """(B, D) of any norm to unit rows, in at least float32; a zero row stays zero, its gradient finite."""
    x = at_least_float32(x)
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x / torch.where(norm > 1e-12, norm, 1.0)


def cosine(embeddings: Tensor, reference: Tensor | None = None) -> Tensor:
    """Cosine of every row of (B, D) with every row of reference (M, D), or with one another: (B, M)."""
    with torch.autocast(
        embeddings.device.type, enabled=False
    ):  # a bf16 product has 3 digits, a temperature of 0.05 needs 5
        embeddings = normalize(embeddings)
        return embeddings @ (embeddings if reference is None else normalize(reference)).T


def pair_masks(labels: Tensor, reference_labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Positive and negative pairs as (B, M) bool masks; without a reference a row and itself are in neither."""
    same = labels[:, None] == (labels if reference_labels is None else reference_labels)[None, :]
    if reference_labels is not None:
        return same, ~same
    return same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device), ~same


def world_size() -> int:
    """Number of ranks, 1 when torch.distributed is not in use."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return 1


class _Gather(torch.autograd.Function):
    """All ranks' rows in rank order; ranks may hold different numbers of rows, also none.

    Every rank computes the same loss on the union, so its own slice of the gradient is complete. It is multiplied by
    the number of ranks because DistributedDataParallel then takes the mean over ranks.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        world = world_size()
        rows = x.new_zeros(world, dtype=torch.long)
        rows[torch.distributed.get_rank()] = len(x)
        torch.distributed.all_reduce(rows)
        counts: list[int] = rows.tolist()
        padded = x.new_zeros(max(counts), *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in range(world)]
        torch.distributed.all_gather(parts, padded)
        ctx.start = sum(counts[: torch.distributed.get_rank()])  # type: ignore[attr-defined]
        ctx.rows = len(x)  # type: ignore[attr-defined]
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> Tensor:
        (grad,) = grads
        start: int = ctx.start  # type: ignore[attr-defined]
        rows: int = ctx.rows  # type: ignore[attr-defined]
        return grad[start : start + rows] * world_size()


def gather(x: Tensor) -> Tensor:
    """Concatenate (B_r, ...) of all ranks r to (sum B_r, ...), the same on every rank, with gradient.

    Without torch.distributed this is the identity. The gradient is scaled so that the mean over ranks of the
    parameters' gradients equals one process on the union.
    """
    if world_size() == 1:
        return x
    gathered: Tensor = _Gather.apply(x.contiguous())
    return gathered


class _SumOverRanks(torch.autograd.Function):
    """All ranks' tensors added up; every rank's graph reaches only its own summand.

    The gradient is multiplied by the number of ranks because DistributedDataParallel then takes the mean over ranks.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:  # noqa: ARG004
        total = x.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> Tensor:  # noqa: ARG004
        (grad,) = grads
        return grad * world_size()


def sum_over_ranks(x: Tensor) -> Tensor:
    """Add up tensors of one shape over all ranks, the same on every rank, with gradient.

    Without torch.distributed this is the identity. The gradient is scaled so that the mean over ranks of the
    parameters' gradients equals one process that adds up everything. It needs no rows of other ranks, so it is the
    cheap choice where a loss is a plain sum over rows; where rows meet rows of other ranks, use `gather`.
    """
    if world_size() == 1:
        return x
    total: Tensor = _SumOverRanks.apply(x)
    return total


def ring_places(seen: Tensor, rows: int, size: int) -> tuple[Tensor, Tensor]:
    """Where new rows go in a ring that overwrites its oldest; of more rows than fit, the last stay.

    Args:
        seen: Rows ever written, () int64.
        rows: Number of new rows.
        size: Of the ring.

    Returns:
        Which of the new rows to write (N,), and their places in the ring (N,).
    """
    newest = torch.arange(max(0, rows - size), rows, device=seen.device)
    return newest, (seen + newest) % size


# splitmix64, Steele et al. 2014; int64 products wrap around, which is what the hash wants
_GAMMA, _MIX_1, _MIX_2 = -7046029254386353131, -4658895280553007687, -7723592293110705685


def _mix(x: Tensor) -> Tensor:
    """One splitmix64 finalizer on int64; `>>` is arithmetic, so the sign bits are masked away."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MIX_1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MIX_2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def keyed_uniform(index: Tensor, columns: int, *, seed: int, epoch: int = 0, stream: int = 0) -> Tensor:
    """Uniform numbers in [0, 1) that depend on nothing but their key.

    Row i is a function of (seed, epoch, stream, index[i]): the same on any rank, worker, device and batch.

    Args:
        index: (B,) int64 sample numbers.
        columns: Numbers wanted per sample.
        seed: The run's seed.
        epoch: Changes the numbers from epoch to epoch.
        stream: Separates uses, such as the number of the view.

    Returns:
        (B, columns) float32.
    """
    key = torch.zeros((), dtype=torch.long, device=index.device)
    for part in (seed, epoch, stream):
        key = _mix(key + part + _GAMMA)
    rows = _mix(index[:, None] * _GAMMA + key)
    bits = _mix(rows + torch.arange(1, columns + 1, device=index.device) * _GAMMA)
    return ((bits >> 40) & 0xFFFFFF).float() / 2**24
