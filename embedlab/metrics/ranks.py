"""Embeddings from several processes: every sample once."""

from typing import Any

import numpy as np

from embedlab.metrics._arrays import Array, as_array


def each_sample_once(index: Any, *arrays: Any) -> tuple[Array, ...]:
    """Collect the rows of all ranks and put every sample in once, in the order of the data set.

    A distributed sampler repeats samples so that all ranks have equally many; counted twice they would find themselves.
    All ranks must call this, and all get the same; without torch.distributed it only drops repetitions.

    Args:
        index: (n,) number of each sample of this rank in the data set.
        arrays: Rows of this rank, (n, ...) numbers each: vectors, labels. Ranks may hold different numbers of rows.

    Returns:
        The index and the arrays of the union, NumPy.

    Raises:
        ValueError: An array whose length is not that of index.

    Example:
        >>> index, labels = each_sample_once([4, 2, 4], [7, 8, 7])
        >>> index.tolist(), labels.tolist()
        ([2, 4], [8, 7])
    """
    import torch

    from embedlab._ops import gather

    parts = [as_array(part) for part in (index, *arrays)]
    for part in parts[1:]:
        if len(part) != len(parts[0]):
            raise ValueError(f"index has {len(parts[0])} entries for {len(part)} rows; they must be row by row.")
    device = "cpu"
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    with torch.no_grad():
        union = [gather(torch.from_numpy(part).to(device)).cpu().numpy() for part in parts]
    _, first = np.unique(union[0], return_index=True)
    return tuple(part[first] for part in union)
