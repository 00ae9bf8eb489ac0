"""What several self-supervised methods share: views told apart, crops of several sizes, a queue, heads."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from embedlab._ops import normalize, ring_places
from embedlab._types import Batch
from embedlab.encoders import LinearHead, MLPHead
from embedlab.encoders.heads import feature_size

_NUMBERS = {1: "one"}


def two_views(method: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The two views of a method that takes no more; ValueError for any other number."""
    views = at_least_two_views(method, batch)
    if len(views) > 2:
        raise ValueError(
            f"{type(method).__name__} takes two views per image, got {len(views)}; set data.init_args.views.count to "
            "2, or choose SwAV, DINO, BYOL or MoCoV3, which take further crops."
        )
    return views[0], views[1]


def at_least_two_views(method: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
    """All views of a batch, the two full ones first; ValueError when there are fewer, or the two differ in size."""
    views, name = batch.views, type(method).__name__
    if len(views) < 2:
        raise ValueError(
            f"{name} needs two views per image, got {_NUMBERS.get(len(views))}; set data.init_args.views.count to 2."
        )
    if views[0].shape != views[1].shape:
        raise ValueError(
            f"{name} needs two full views of one size first, got {tuple(views[0].shape)} and {tuple(views[1].shape)}; "
            "small crops come after them."
        )
    return views


def by_size(backbone: Callable[[Tensor], Tensor], views: tuple[Tensor, ...]) -> Tensor:
    """Features of V views, one forward pass per image size: (V B, F), view after view in the order given."""
    sizes = [view.shape[2:] for view in views]
    features: dict[int, Tensor] = {}
    for size in dict.fromkeys(sizes):
        same = [number for number, other in enumerate(sizes) if other == size]
        together = backbone(torch.cat([views[number] for number in same]))  # (views of this size x B, F)
        features |= dict(zip(same, together.chunk(len(same)), strict=True))
    return torch.cat([features[number] for number in range(len(views))])


def joined(backbone: nn.Module, head: nn.Module | None) -> nn.Sequential:
    """Backbone and head as one thing to call, to copy or to average."""
    parts = {"backbone": backbone} if head is None else {"backbone": backbone, "head": head}
    return nn.Sequential(OrderedDict(parts))


def normalized_output(
    backbone: nn.Module, out_features: int, *, hidden_features: int, hidden_layers: int = 1, affine: bool = False
) -> nn.Sequential:
    """An `MLPHead` with batch norm on its output too."""
    head = MLPHead(
        out_features,
        in_features=feature_size(backbone),
        hidden_features=hidden_features,
        hidden_layers=hidden_layers,
    )
    head.net[-1].bias.requires_grad_(False)  # batch norm takes it away again; SimSiam's authors do the same
    return nn.Sequential(head, nn.BatchNorm1d(out_features, affine=affine))


def fit_predictor(predictor: nn.Module | None, dim: int, *, hidden_features: int) -> nn.Module:
    """A predictor from projections (B, dim) to (B, dim): the one given, or by default with one hidden layer."""
    if predictor is None:
        predictor = MLPHead(dim, hidden_features=hidden_features)
    if isinstance(predictor, MLPHead | LinearHead):
        if predictor.in_features is None:
            predictor.build(dim)
        if (predictor.in_features, predictor.out_features) != (dim, dim):
            raise ValueError(
                f"The predictor maps {predictor.in_features} to {predictor.out_features} numbers, the head puts out "
                f"{dim}; a prediction is compared with a projection, so set predictor's out_features to {dim} and "
                "leave out its in_features."
            )
    return predictor


class Queue(nn.Module):
    """The newest rows of all ranks, the oldest overwritten.

    Every rank appends the same rows, those of all ranks in rank order, so that the queue is the same on every rank and
    equals that of one process on the union. It is part of the state: a resumed run goes on with it.

    Args:
        size: Rows to keep.
        dim: Numbers per row.

    Shape: `rows` (size, dim) unit vectors, random at the start; `pointer` () int64, how many rows were ever appended,
        so that the next goes to pointer % size.

    Example:
        >>> queue = Queue(3, 2)
        >>> queue.append(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> queue.append(torch.tensor([[5.0, 6.0], [7.0, 8.0]]))
        >>> queue.rows.tolist(), queue.pointer.item()
        ([[7.0, 8.0], [3.0, 4.0], [5.0, 6.0]], 4)
    """

    rows: Tensor
    pointer: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"A queue needs at least one row, got {size}; 2,048 to 65,536 are usual.")
        self.register_buffer("rows", normalize(torch.randn(size, dim)))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def append(self, rows: Tensor) -> None:
        """Write rows (N, dim) of all ranks over the oldest; of more than fit, the last stay."""
        newest, places = ring_places(self.pointer, len(rows), len(self.rows))
        self.rows[places] = rows[newest].to(self.rows.dtype)
        self.pointer += len(rows)

    @property
    def full(self) -> bool:
        """Whether nothing of the random start is left."""
        return int(self.pointer) >= len(self.rows)
