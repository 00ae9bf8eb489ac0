"""One evaluation on several processes: every query on one of them, the answer on all."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from embedlab.metrics._arrays import Array

Given = ParamSpec("Given")
Found = TypeVar("Found")


class RefusedByAll(ValueError):
    """Raised on all ranks at once, so that none waits for another."""


@dataclass(frozen=True)
class _Failure:
    """What a rank passes instead of a value."""

    text: str


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
        """What all ranks pass, by rank; raises on all of them where one has failed `together`."""
        if self.ranks == 1:
            return [value]
        import torch

        values: list[Any] = [None] * self.ranks
        torch.distributed.all_gather_object(values, value)
        failed = [f"rank {rank}: {found.text}" for rank, found in enumerate(values) if isinstance(found, _Failure)]
        if 0 < len(failed) < self.ranks:  # where all have failed, each raises its own
            raise RefusedByAll(f"Not all of {self.ranks} ranks can go on, so that none does; {'; '.join(failed)}")
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raise on all ranks what is raised on one: it takes part once more, in whatever the others collect next."""
        try:
            yield
        except RefusedByAll:
            raise
        except Exception as error:
            self.collect(_Failure(str(error) if isinstance(error, ValueError) else repr(error)))
            raise
        self.collect(None)

    def add(self, values: Array) -> Array:
        """Sum over ranks of arrays of one shape; exact where only one rank has a number that is not zero."""
        if self.ranks == 1:
            return values
        import torch

        self.collect(None)  # a rank that has failed cannot add
        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        total = torch.from_numpy(values).to(device)
        torch.distributed.all_reduce(total)
        summed: Array = total.cpu().numpy()
        return summed

    def refuse_different(self, digest: Callable[[], str]) -> None:
        """Raise on all ranks unless the digests are all the same."""
        if self.ranks > 1 and len(set(self.collect(digest()))) > 1:
            raise RefusedByAll(
                "over_ranks=True needs the same vectors, labels, groups and settings on every rank, and they differ: "
                "own rows of each rank? Collect them first by each_sample_once."
            )


def together(metric: Callable[Given, Found]) -> Callable[Given, Found]:
    """Make a function with `over_ranks` raise on all ranks what it raises on one."""

    @wraps(metric)
    def everywhere(*args: Given.args, **kwargs: Given.kwargs) -> Found:
        with Share(over_ranks=bool(kwargs.get("over_ranks"))).together():
            return metric(*args, **kwargs)

    return everywhere
