"""The tiled engine: losses over all pairs of a batch in memory that grows with B, not with B x B.

A loss says what one tile, some anchors against all candidates, adds to its sums. The engine cuts the anchors into
tiles, lets autograd differentiate each tile by itself, multiplies the tile's gradient into the embeddings' and forgets
the tile. The gradient is thus complete when the forward pass ends: three matrix products and one exponential per pair,
where a recomputation in the backward pass would need four and two.

Rows are sorted by class first. An anchor's class is then a run of columns, so that positive pairs are looked up instead
of searched for, and what is done to all the other columns needs no mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor

from embedlab._ops import world_size

NEVER = -1e30  # the log-sum-exp of nothing; finite, so that differences of two of them are no NaN
CPU_TILE, ACCELERATOR_TILE = 2**20, 2**25  # numbers in a tile: few enough for a cache, enough to keep a GPU busy
WORTH_THREADS = 2**21  # numbers in all tiles from which threads of our own are worth starting
TOO_LARGE = 2**25  # numbers in the candidates beyond which a gradient of them per thread is too much


@dataclass
class Tile:
    """Some anchors against all candidates; anchors and candidates are sorted by class.

    Attributes:
        similarity: Cosines (r, M) to negatives; minus infinity where the candidate is not one. Differentiable.
        own: Cosines (r, w) to the candidates of the anchor's own class, w the largest of them. Differentiable.
        columns: The candidate of each of `own` (r, w); smaller classes repeat one.
        positive: Which of `own` are positive pairs (r, w): neither repeated nor the anchor itself.
        mates: Number of positives of each anchor (r,), in `similarity`'s dtype; with a miner, those that it takes.
        strangers: Number of negatives of each anchor (r,), likewise.
        anchor: Number of each anchor in the sorted batch (r,).
        row: Number of each anchor in the batch as it came, over all ranks (r,): the key of random draws.
        candidates: What the anchors are compared with (M, D).
        value: One number per anchor that the loss gave the engine (r,). Differentiable.
        pair: For losses that go by positive pairs, the column in `own` of each row's positive (r, 1).
        from_positive: Cosines (r, M) of that positive to the anchor's negatives, if asked for. Differentiable.
        absent: Which anchors have no candidate of their class (r, 1); None where all have.
        positive_weight: How often a miner takes each pair of `own` (r, w); None without a miner.
        negative_weight: The same for the negatives (r, M).
    """

    similarity: Tensor
    own: Tensor
    columns: Tensor
    positive: Tensor
    mates: Tensor
    strangers: Tensor
    anchor: Tensor
    row: Tensor
    candidates: Tensor
    value: Tensor | None = None
    pair: Tensor | None = None
    from_positive: Tensor | None = None
    absent: Tensor | None = None
    positive_weight: Tensor | None = None
    negative_weight: Tensor | None = None

    def count_positives(self, x: Tensor) -> Tensor:
        """How many terms x (r, w) of positive pairs are above zero, each as often as a miner takes it."""
        wanted = self.positive & (x > 0)
        return wanted.sum() if self.positive_weight is None else self.positive_weight[wanted].sum()

    def count_negatives(self, x: Tensor) -> Tensor:
        """How many terms x (r, M) are above zero; x is zero already for what is not a negative."""
        return torch.count_nonzero(x) if self.negative_weight is None else self.negative_weight[x > 0].sum()

    def positives(self, x: Tensor) -> Tensor:
        """Terms x (r, w) of the positive pairs, each as often as a miner takes it; zero elsewhere."""
        x = x.masked_fill(~self.positive, 0)
        return x if self.positive_weight is None else x * self.positive_weight

    def negatives(self, x: Tensor) -> Tensor:
        """Terms x (r, M) of the negative pairs, each as often as a miner takes it; x is zero elsewhere already."""
        return x if self.negative_weight is None else x * self.negative_weight

    def only_negatives(self, x: Tensor, value: float) -> Tensor:
        """Terms x (r, M) with `value` in place of what is not a negative."""
        if self.negative_weight is not None:
            return x.masked_fill(self.negative_weight == 0, value)
        filled = x.scatter(1, self.columns, value)
        return filled if self.absent is None else torch.where(self.absent, x, filled)

    def log_sum_positives(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """Log-sum-exp of scale x over each anchor's positives, x (r, w) and scale > 0: (r,)."""
        return log_sum_exp(x.masked_fill(~self.positive, -math.inf), scale)

    def log_sum_negatives(self, scale: float) -> Tensor:
        """Log-sum-exp of scale cosine over each anchor's negatives: (r,). Overwrites `similarity`."""
        return log_sum_exp(self.similarity, scale, in_place=True)

    def pair_similarity(self) -> Tensor:
        """Cosine of each row's anchor and positive (r, 1)."""
        assert self.pair is not None
        return self.own.gather(1, self.pair)


class _LogSumExp(torch.autograd.Function):
    """Row-wise log(sum(exp(scale x))), safe for rows of nothing but minus infinity, with one buffer for all it does."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, scale: float, in_place: bool) -> Tensor:
        if not x.shape[1]:
            ctx.save_for_backward(x, x.new_zeros(len(x), 1))
            return x.new_full((len(x),), NEVER)
        # minus infinity alone would give inf - inf
        top = x.amax(dim=1, keepdim=True).clamp_(min=torch.finfo(x.dtype).min / (4 * max(1.0, abs(scale))))
        shares = torch.add(top * -scale, x, alpha=scale, out=x if in_place else None).exp_()
        total = shares.sum(dim=1, keepdim=True)
        ctx.save_for_backward(shares, scale / total.clamp(min=0.5))  # 1 at least, unless nothing was added
        return torch.where(total == 0, NEVER, total.log() + top * scale).squeeze(1)  # NaN stays NaN

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None, None]:
        shares, rate = ctx.saved_tensors  # type: ignore[attr-defined]
        return shares.mul_(grads[0].unsqueeze(1) * rate), None, None  # differentiated once, so the buffer is free


def log_sum_exp(x: Tensor, scale: float = 1.0, *, in_place: bool = False) -> Tensor:
    """Log of the sum over each row of exp(scale x): (r, M) to (r,); `NEVER` for a row without a finite number."""
    result: Tensor = _LogSumExp.apply(x, scale, in_place)
    return result


Terms = Callable[[Tile], Sequence[tuple[Tensor, Tensor | float]]]
Weigh = Callable[[Tile], tuple[Tensor, Tensor]]
Gradients = list[Tensor | None]
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


class Plan:
    """Who is compared with whom: rows sorted by class, and how the work is cut into tiles.

    Args:
        labels: (B,) of the anchors.
        reference_labels: (M,) of the candidates, or None when the anchors are the candidates.
        by_pair: Make a row per positive pair in place of a row per anchor.
        from_positive: With by_pair: compare each positive with the candidates, too.
        share: Divide the tiles among the ranks of torch.distributed, all of which hold the same tensors.
    """

    def __init__(
        self,
        labels: Tensor,
        reference_labels: Tensor | None,
        *,
        by_pair: bool = False,
        from_positive: bool = False,
        share: bool = False,
    ) -> None:
        if labels.dtype == torch.bool:  # which cannot be searched
            labels = labels.byte()
        if reference_labels is not None:
            kind = torch.promote_types(labels.dtype, reference_labels.dtype)
            labels, reference_labels = labels.to(kind), reference_labels.to(kind)
        self.itself = reference_labels is None
        self.by_pair, self.from_positive, self.share = by_pair, from_positive, share
        self.order = labels.argsort(stable=True)  # sorted row -> row as it came
        self.candidate_order = self.order if reference_labels is None else reference_labels.argsort(stable=True)
        columns = (labels if reference_labels is None else reference_labels)[self.candidate_order]
        # proxies come in the order of their classes: a million of them need no copy
        self.in_order = reference_labels is not None and bool((reference_labels == columns).all())
        self.columns = len(columns)
        labels = labels[self.order]
        self.start = torch.searchsorted(columns, labels, out_int32=True)  # (B,): the anchor's class is these columns
        self.stop = torch.searchsorted(columns, labels, right=True, out_int32=True)
        self.mates = self.stop - self.start - int(self.itself)
        self.ends = self.mates.cumsum(0) if by_pair else self.mates  # (B,): pair numbers, where rows are pairs
        self.total = int(self.ends[-1]) if by_pair and len(labels) else len(labels)
        self.step = 1

    def cut(self, anchors: Tensor) -> range:
        """First row of each tile. They do not depend on the number of ranks, so neither does any rounding in a tile.

        A tile of D / 4 rows is a quarter of the candidates; fewer rows would be no matrix product any more.
        """
        budget = CPU_TILE if anchors.device.type == "cpu" else ACCELERATOR_TILE
        self.step = max(1, anchors.shape[1] // 4, budget // max(1, self.columns))
        return range(0, self.total, self.step)

    def rows(self, first: int, last: int) -> tuple[Tensor, Tensor | None]:
        """Anchor of each row (sorted number), and with by_pair the column of its positive."""
        rows = torch.arange(first, last, device=self.start.device)
        if not self.by_pair:
            return rows, None
        anchor = torch.searchsorted(self.ends, rows, right=True)
        column = self.start[anchor] + rows - (self.ends - self.mates)[anchor]
        return anchor, column + (column >= anchor) if self.itself else column

    def sorted_candidates(self, candidates: Tensor) -> Tensor:
        """(M, D) in the order of their classes."""
        return candidates if self.in_order else candidates.index_select(0, self.candidate_order)

    def buffer(self, anchors: Tensor) -> Tensor:
        """Room for one tile's similarities."""
        return anchors.new_empty(min(self.step, self.total), self.columns)

    def tile(self, first: int, anchors: Tensor, candidates: Tensor, out: Tensor) -> Tile:
        """Compare the tile's rows, from `first` on, with all candidates; `out` holds the similarities."""
        last = min(first + self.step, self.total)
        anchor, positive_column = self.rows(first, last)
        rows = anchors[anchor] if self.by_pair else anchors[first:last]
        similarity = torch.mm(rows, candidates.T, out=out[: len(rows)])
        start, stop = self.start[anchor, None], self.stop[anchor, None]  # (r, 1)
        width = int((stop - start).max()) if self.columns else 0
        columns = start + torch.arange(width, dtype=torch.int32, device=rows.device)  # (r, w)
        inside = columns < stop
        columns = torch.where(inside, columns, start).clamp_(max=max(0, self.columns - 1)).long()
        tile = Tile(
            similarity=similarity,
            own=similarity.gather(1, columns),
            columns=columns,
            positive=inside & (columns != anchor[:, None]) if self.itself else inside,
            mates=self.mates[anchor].to(rows.dtype),
            strangers=(self.columns - (stop - start)).squeeze(1).to(rows.dtype),
            anchor=anchor,
            row=self.order[anchor],
            candidates=candidates,
        )
        if not self.itself and width and bool((stop == start).any()):
            tile.absent = stop == start
            hidden = torch.where(tile.absent, tile.own, -math.inf)
            similarity.scatter_(1, columns, hidden)
        else:
            similarity.scatter_(1, columns, -math.inf)
        if positive_column is not None:
            tile.pair = (positive_column - start.squeeze(1)).long()[:, None]
            if self.from_positive:
                tile.from_positive = tile.only_negatives(candidates[positive_column] @ candidates.T, -math.inf)
        return tile


def _mine(tile: Tile, weigh: Weigh) -> None:
    """Leave of a tile what a miner takes: other pairs are pairs no longer."""
    positive, negative = weigh(tile)
    tile.positive_weight = positive.to(tile.own.dtype).masked_fill(~tile.positive, 0)
    tile.negative_weight = negative.to(tile.own.dtype).masked_fill(tile.similarity == -math.inf, 0)
    tile.positive = tile.positive_weight > 0
    tile.similarity.masked_fill_(tile.negative_weight == 0, -math.inf)
    tile.mates, tile.strangers = tile.positive_weight.sum(1), tile.negative_weight.sum(1)


class _Worker:
    """Adds up tiles one after the other, always in the same order, so that the same input gives the same bits."""

    def __init__(
        self,
        terms: Terms,
        plan: Plan,
        weigh: Weigh | None,
        tensors: tuple[Tensor, Tensor, Tensor | None],
        wanted: Sequence[bool],
    ) -> None:
        self.terms, self.plan, self.weigh = terms, plan, weigh
        self.anchors, self.candidates, self.value = tensors
        self.wanted = wanted  # gradient of anchors, candidates, value
        self.sums: list[Tensor] = []  # for each of the loss's terms (2,) float64: sum and count
        self.gradients: list[Gradients] = []  # for each of them: of anchors, candidates, value

    @torch.no_grad()  # a new thread starts with gradients on
    def run(self, starts: range) -> _Worker:
        """Add up the tiles that begin at these rows."""
        buffer = self.plan.buffer(self.anchors)
        for first in starts:
            tile = self.plan.tile(first, self.anchors, self.candidates, buffer)
            if self.weigh is not None:
                _mine(tile, self.weigh)
            if self.value is not None:
                tile.value = self.value[tile.anchor]
            self._add(tile)
        return self

    def _add(self, tile: Tile) -> None:
        wanted = any(self.wanted)
        leaves = [leaf for leaf in (tile.similarity, tile.own, tile.from_positive, tile.value) if leaf is not None]
        for leaf in leaves:
            leaf.requires_grad_(wanted)
        with torch.set_grad_enabled(wanted):
            terms = self.terms(tile)
        for number, (total, count) in enumerate(terms):
            if number == len(self.sums):
                self.sums.append(torch.zeros(2, dtype=torch.float64, device=total.device))
                self.gradients.append([None, None, None])
            self.sums[number][0] += total.detach()
            self.sums[number][1] += count
            if total.requires_grad:
                found = torch.autograd.grad(total, leaves, allow_unused=True, retain_graph=number + 1 < len(terms))
                self._multiply(self.gradients[number], tile, dict(zip(map(id, leaves), found, strict=True)))

    def _multiply(self, into: Gradients, tile: Tile, found: dict[int, Tensor | None]) -> None:
        """A tile's gradient times the vectors that it compares."""
        wide, own, first, last = found[id(tile.similarity)], found[id(tile.own)], 0, len(self.candidates)
        if wide is not None:
            wide = wide.contiguous()
        elif own is not None and own.numel():  # the columns of these classes are enough
            first, last = int(tile.columns.min()), int(tile.columns.max()) + 1
            wide = own.new_zeros(len(own), last - first)
        if wide is not None:
            if own is not None:
                wide.scatter_add_(1, tile.columns - first, own.masked_fill(~tile.positive, 0))
            if self.wanted[0]:
                self._buffer(into, 0).index_add_(0, tile.anchor, wide @ self.candidates[first:last])
            if self.wanted[1]:
                self._buffer(into, 1)[first:last].addmm_(wide.T, self.anchors[tile.anchor])
        if tile.from_positive is not None and tile.pair is not None and self.wanted[1]:
            wide = found[id(tile.from_positive)]
            positive = tile.columns.gather(1, tile.pair).squeeze(1)
            if wide is not None:
                self._buffer(into, 1).index_add_(0, positive, wide @ self.candidates)
                self._buffer(into, 1).addmm_(wide.T, self.candidates[positive])
        value = found.get(id(tile.value))
        if value is not None and self.wanted[2]:
            self._buffer(into, 2).index_add_(0, tile.anchor, value)

    def _buffer(self, into: Gradients, which: int) -> Tensor:
        """Where a gradient is added up; anchors that are the candidates have one for both."""
        which = 0 if which == 1 and self.plan.itself else which
        buffer = into[which]
        if buffer is None:
            like = (self.anchors, self.candidates, self.value)[which]
            assert like is not None
            buffer = into[which] = torch.zeros_like(like)
        return buffer

    def merge(self, other: _Worker) -> None:
        """Take over what another worker has added up."""
        for sums, theirs in zip(self.sums, other.sums, strict=True):
            sums += theirs
        for mine, gradients in zip(self.gradients, other.gradients, strict=True):
            for which, gradient in enumerate(gradients):
                if gradient is not None:
                    self._buffer(mine, which).add_(gradient)

    def reduce(self) -> None:
        """Add up over the ranks, which have done different tiles; every rank holds every gradient then."""
        for sums, gradients in zip(self.sums, self.gradients, strict=True):
            torch.distributed.all_reduce(sums)
            for which in range(3):
                if self.wanted[which] and not (which == 1 and self.plan.itself):
                    torch.distributed.all_reduce(self._buffer(gradients, which))


def _in_threads(run: Callable[[range], T], plan: Plan, starts: range, anchors: Tensor) -> list[T]:
    """What `run` gives for all tiles, or on a CPU for each thread's share of them.

    Each thread's operations run on that thread alone. Letting all threads into each operation is as fast on a quiet
    machine, but they wait for the slowest after each one: with one core busy elsewhere that is several times slower.
    """
    threads = torch.get_num_threads()
    small = len(starts) < 2 or plan.columns * plan.step * len(starts) < WORTH_THREADS
    large = plan.columns * anchors.shape[1] > TOO_LARGE
    if anchors.device.type != "cpu" or threads == 1 or small or large:
        return [run(starts)]
    workers = min(threads, len(starts), 8)  # each has a gradient of its own
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,)) as pool:
            return list(pool.map(run, [starts[number::workers] for number in range(workers)]))
    finally:
        torch.set_num_threads(threads)  # the pool's setting is also the default of threads to come


def _my_share(plan: Plan, anchors: Tensor) -> tuple[range, bool]:
    """The tiles that this rank does, and whether others do others."""
    starts = plan.cut(anchors)
    world = world_size() if plan.share else 1
    if not 1 < world <= len(starts):  # fewer tiles than ranks: every rank does them all and nothing is sent
        return starts, False
    return starts[torch.distributed.get_rank() :: world], True


class _Tiled(torch.autograd.Function):
    """Mean of each term over all tiles; the gradient is made on the way and kept."""

    @staticmethod
    def forward(
        ctx: Any,
        terms: Terms,
        plan: Plan,
        weigh: Weigh | None,
        anchors: Tensor,
        candidates: Tensor | None,
        value: Tensor | None,
        needs_gradient: bool,
    ) -> Tensor:
        starts, shared = _my_share(plan, anchors)
        wanted = [needs_gradient and asked for asked in ctx.needs_input_grad[3:6]]
        if candidates is None:
            wanted[1] = wanted[0]
        tensors = (anchors, anchors if candidates is None else candidates, value)
        done, *others = _in_threads(
            lambda mine: _Worker(terms, plan, weigh, tensors, wanted).run(mine), plan, starts, anchors
        )
        for other in others:
            done.merge(other)
        if shared:
            done.reduce()
        sums = torch.stack(done.sums)  # (K, 2)
        counts = sums[:, 1].clamp(min=1)
        for gradients, count in zip(done.gradients, counts.to(anchors.dtype), strict=True):
            for gradient in gradients:
                if gradient is not None:
                    gradient /= count
        ctx.gradients = done.gradients
        return (sums[:, 0] / counts).to(anchors.dtype)

    @staticmethod
    def backward(ctx: Any, grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "The losses of embedlab can be differentiated once: the gradient is ready when the forward pass ends. "
                "Leave out create_graph=True; for a gradient penalty write the loss out on a full matrix."
            )
        found: Gradients = [None, None, None]
        for rate, gradients in zip(grads, ctx.gradients, strict=True):
            for which, gradient in enumerate(gradients):
                if gradient is not None:
                    total = found[which]
                    found[which] = gradient * rate if total is None else torch.addcmul(total, gradient, rate)
        return None, None, None, *found, None


def _eager(function: F) -> F:
    """Keep torch.compile out: it could not follow the engine's own autograd."""
    eager: F = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return eager


@_eager
def tiled_means(
    terms: Terms,
    plan: Plan,
    anchors: Tensor,
    candidates: Tensor | None = None,
    value: Tensor | None = None,
    weigh: Weigh | None = None,
) -> Tensor:
    """Means over all pairs of what `terms` adds up tile by tile.

    Args:
        terms: A tile to K (sum, count) pairs; the mean of a term is its sum over all tiles over its count, 0 / 0 = 0.
        plan: Which rows belong together.
        anchors: (B, D) of unit length, in the order they came.
        candidates: (M, D) of unit length; None when the plan has no reference.
        value: One number per anchor (B,) for the tiles.
        weigh: A miner: a tile to the weights of its positive (r, w) and negative pairs (r, M).

    Returns:
        (K,), with gradients to anchors, candidates and value. Differentiable once.
    """
    rows = anchors.index_select(0, plan.order)
    columns = None if candidates is None else plan.sorted_candidates(candidates)
    numbers = None if value is None else value.index_select(0, plan.order)
    if not plan.columns or not plan.total:  # nothing to compare: 0, with a graph
        return torch.cat([x.flatten() * 0 for x in (anchors, candidates, value) if x is not None]).sum(0, keepdim=True)
    with torch.autocast(anchors.device.type, enabled=False):
        found: Tensor = _Tiled.apply(terms, plan, weigh, rows, columns, numbers, torch.is_grad_enabled())
    return found


@_eager
@torch.no_grad()
def tiled_rows(function: Callable[[Tile], Tensor], plan: Plan, anchors: Tensor, candidates: Tensor | None) -> Tensor:
    """What `function` gives for the anchors of each tile (r, c), put together to (B, c) in the order they came.

    For choices and sums per anchor that need no gradient; arguments as `tiled_means`.
    """
    anchors = anchors[plan.order]
    candidates = anchors if candidates is None else plan.sorted_candidates(candidates)
    starts, shared = _my_share(plan, anchors)

    @torch.no_grad()  # a new thread starts with gradients on
    def run(starts: range) -> list[tuple[Tensor, Tensor]]:
        buffer = plan.buffer(anchors)
        tiles = (plan.tile(first, anchors, candidates, buffer) for first in starts)
        return [(tile.row, function(tile)) for tile in tiles]

    done = [part for parts in _in_threads(run, plan, starts, anchors) for part in parts]
    found = torch.cat([values for _, values in done])
    result = found.new_zeros(len(anchors), found.shape[1])
    result[torch.cat([rows for rows, _ in done])] = found
    if shared:
        torch.distributed.all_reduce(result)
    return result
