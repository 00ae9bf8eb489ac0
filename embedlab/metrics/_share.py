"""One evaluation on several processes: every query on one of them, the answer on all."""

import sys
from collections.abc import Callable
from typing import Any

from embedlab.metrics._arrays import Array


class Share:
    """This rank's part of some work: every so many-th item. All of it without torch.distributed.

    Args:
        over_ranks: False does all the work on this rank, as if there were no others.
    """

    def __init__(self, *, over_ranks: bool) -> None:
        self.rank, self.ranks = 0, 1
        torch = sys.modules.get("torch") if over_ranks else None  # where nobody has loaded it there are no ranks
        if torch and torch.distributed.is_available() and torch.distributed.is_initialized():
            self.rank, self.ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.mine = slice(self.rank, None, self.ranks)

    def collect(self, value: Any) -> list[Any]:
        """What all ranks pass, by rank."""
        if self.ranks == 1:
            return [value]
        import torch

        values: list[Any] = [None] * self.ranks
        torch.distributed.all_gather_object(values, value)
        return values

    def add(self, values: Array) -> Array:
        """Sum over ranks of arrays of one shape; exact where only one rank has a number that is not zero."""
        if self.ranks == 1:
            return values
        import torch

        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        total = torch.from_numpy(values).to(device)
        torch.distributed.all_reduce(total)
        summed: Array = total.cpu().numpy()
        return summed

    def refuse_different(self, digest: Callable[[], str]) -> None:
        """Raise on all ranks unless the digests are all the same."""
        if self.ranks > 1 and len(set(self.collect(digest()))) > 1:
            raise ValueError(
                "over_ranks=True needs the same vectors, labels, groups and settings on every rank, and they differ: "
                "own rows of each rank? Collect them first by each_sample_once."
            )
