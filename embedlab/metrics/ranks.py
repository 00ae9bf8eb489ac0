"""Embeddings from several processes: every sample once."""

from typing import Any

import numpy as np

from embedlab.metrics._arrays import Array, as_array
from embedlab.metrics._share import Share


def each_sample_once(index: Any, *arrays: Any) -> tuple[Array, ...]:
    """Collect the rows of all ranks and put every sample in once, in the order of the data set.

    A distributed sampler repeats samples so that all ranks have equally many; counted twice they would find themselves.
    All ranks must call this, and all get the same; without torch.distributed it only drops repetitions.

    Args:
        index: (n,) number of each sample of this rank in the data set.
        arrays: Rows of this rank, (n, ...) numbers or strings each: vectors, labels. Ranks may hold different numbers
            of rows; of a rank without any, the shapes and types do not matter.

    Returns:
        The index and the arrays of the union, NumPy.

    Raises:
        ValueError: On all ranks: an array whose length is not that of index, or rows of two widths.

    Example:
        >>> index, labels = each_sample_once([4, 2, 4], [7, 8, 7])
        >>> index.tolist(), labels.tolist()
        ([2, 4], [8, 7])
    """
    share = Share(over_ranks=True)
    with share.together():
        everyone = share.collect([as_array(part) for part in (index, *arrays)])
    for rank, parts in enumerate(everyone):
        for part in parts[1:]:
            if len(part) != len(parts[0]):
                raise ValueError(
                    f"index has {len(parts[0])} entries for {len(part)} rows on rank {rank}; they must be row by row."
                )
    columns = list(zip(*([parts for parts in everyone if len(parts[0])] or everyone[:1]), strict=True))
    for column in columns:
        shapes = {(part.shape[1:], part.dtype.kind == "U") for part in column}
        if len(shapes) > 1:
            raise ValueError(
                "Ranks hold rows that do not go together: "
                + ", ".join(sorted({f"{part.dtype} {part.shape[1:]}" for part in column}))
                + ". Embedded by different encoders?"
            )
    union = [np.concatenate(column) for column in columns]
    _, first = np.unique(union[0], return_index=True)
    return tuple(part[first] for part in union)
