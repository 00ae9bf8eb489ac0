"""Several cores at once: NumPy and torch leave the interpreter to others while they compute."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """What `work` makes of each item, in order, on as many threads as BLAS would use; BLAS and torch get one in each.

    A product, and all that follows on its result, on one core each is faster than the product alone on all of them.
    """
    cores = _cores() if len(items) > 1 else 1
    if cores == 1:
        yield from map(work, items)
        return
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else 0
    pool = ThreadPoolExecutor(min(cores, len(items)), initializer=_one_thread)
    try:
        with threadpool_limits(1, "blas"):
            yield from pool.map(work, items)
    finally:
        pool.shutdown(cancel_futures=True)  # after an interrupt nobody waits for the rest
        if torch:
            torch.set_num_threads(threads)  # the last thread that sets it decides for threads to come


def _cores() -> int:
    from threadpoolctl import threadpool_info

    found = [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]
    return max(found, default=os.cpu_count() or 1)


def _one_thread() -> None:
    torch = sys.modules.get("torch")
    if torch:
        torch.set_num_threads(1)
