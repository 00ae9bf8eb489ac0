"""Losses without labels: two aligned views, several crops, or one batch.

All of them share a convention: with torch.distributed initialised and `gather=True` the batch is the union over
ranks. Every rank returns the same loss, and DistributedDataParallel's mean of gradients equals one process on the
union, also when ranks hold different numbers of rows or none at all; every rank has to call the loss. Half precision
is lifted to float32, also under autocast.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from embedlab._ops import at_least_float32, gather, normalize, sum_over_ranks, world_size
from embedlab.losses._base import check_positive, mean_over_ranks

_SEARCH_ELEMENTS = 2**22  # 16 MiB of float32 cosines at a time


def _without_autocast(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)


def _check_weight(name: str, setting: str, value: float) -> None:
    if not value >= 0:
        raise ValueError(f"{name} needs {setting} >= 0 (0 switches the term off), got {value}.")


def _check_views(name: str, first: Tensor, second: Tensor) -> None:
    if first.ndim != 2 or first.shape != second.shape:
        raise ValueError(
            f"{name} takes two aligned batches (B, D), got {tuple(first.shape)} and {tuple(second.shape)}; row i of "
            "both must be the same image, so drop no rows between the views and flatten what the head puts out."
        )


def _check_crops(name: str, what: str, crops: Sequence[Tensor] | Tensor, least: int) -> None:
    if isinstance(crops, Tensor):
        raise ValueError(
            f"{name} takes {what} as a list with one (B, K) tensor per crop, got one tensor {tuple(crops.shape)}; "
            "split a concatenated batch with scores.chunk(number of crops)."
        )
    shapes = [tuple(crop.shape) for crop in crops]
    if len(shapes) < least:
        raise ValueError(f"{name} needs {what} of at least {least} crop(s), got {len(shapes)}; see `Shape` of {name}.")
    if len(shapes[0]) != 2 or len(set(shapes)) != 1:
        raise ValueError(
            f"{name} takes {what} (B, K) of one shape for all crops, got {shapes}; every crop holds the same images "
            "in the same order."
        )


def _centred(x: Tensor) -> Tensor:
    """(B, D) minus the mean of every column; also for no rows at all."""
    return x - x.sum(dim=0) / max(len(x), 1)


def _off_diagonal(square: Tensor) -> Tensor:
    """The D * (D - 1) elements off the diagonal of (D, D), as a view: a masked copy would double the memory."""
    size = len(square)
    return square.flatten()[:-1].view(size - 1, size + 1)[:, 1:]


class BarlowTwinsLoss(nn.Module):
    """Barlow Twins, Zbontar et al. 2021, eq. 1 and 2 (https://arxiv.org/abs/2103.03230).

    The cross-correlation of the features of two views becomes the identity matrix: a feature agrees between the views
    and differs from all others. Features are standardised over the batch as by batch norm without affine parameters
    (biased variance + 1e-5), as in the authors' code; over several ranks with the statistics of the union.

    Args:
        off_diagonal: Weight of the terms off the diagonal, >= 0; the paper's lambda and its value.
        gather: Standardise and correlate over the rows of all ranks.

    Shape: first (B, D) and second (B, D), row i of both the same image, to a scalar. With a single row there is no
        variance and the loss is D.

    Raises:
        ValueError: The batches are not (B, D) of one shape.

    Example:
        >>> first = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
        >>> BarlowTwinsLoss()(first, -first).round(decimals=3)
        tensor(8.)
    """

    def __init__(self, *, off_diagonal: float = 5e-3, gather: bool = True) -> None:
        super().__init__()
        _check_weight("BarlowTwinsLoss", "off_diagonal", off_diagonal)
        self.off_diagonal = off_diagonal
        self.gather = gather

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        _check_views("BarlowTwinsLoss", first, second)
        if self.gather:
            first, second = gather(first), gather(second)
        with _without_autocast(first):
            correlation = self._standardise(first).T @ self._standardise(second) / max(len(first), 1)  # (D, D)
            on_diagonal = (1 - correlation.diagonal()).square().sum()
            return on_diagonal + self.off_diagonal * _off_diagonal(correlation).square().sum()

    @staticmethod
    def _standardise(x: Tensor) -> Tensor:
        centred = _centred(at_least_float32(x))
        variance = centred.square().sum(dim=0) / max(len(x), 1)
        return centred * torch.rsqrt(variance + 1e-5)


class VICRegLoss(nn.Module):
    """Variance, invariance, covariance; Bardes et al. 2022, eq. 1 to 6 (https://arxiv.org/abs/2105.04906).

    Two views of an image agree (invariance), every feature keeps a standard deviation of at least 1 (variance) and
    features are uncorrelated (covariance). As in the authors' code, and unlike eq. 5 and 6, the invariance term is
    divided by D as well and the variance term is the mean of the two views. Features are not normalised.

    Args:
        invariance: Weight of the squared distance between the views, >= 0; the paper's lambda and its value.
        variance: Weight of the hinge on the standard deviation, >= 0; the paper's mu and its value.
        covariance: Weight of the covariances off the diagonal, >= 0; the paper's nu and its value.
        gather: Take variances and covariances over the rows of all ranks.

    Shape: first (B, D) and second (B, D), row i of both the same image, to a scalar. A single row counts as variance
        and covariance 0.

    Raises:
        ValueError: The batches are not (B, D) of one shape.

    Example:
        >>> first = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
        >>> VICRegLoss()(first, -first).round(decimals=3)
        tensor(54.5860)
    """

    def __init__(
        self, *, invariance: float = 25.0, variance: float = 25.0, covariance: float = 1.0, gather: bool = True
    ) -> None:
        super().__init__()
        _check_weight("VICRegLoss", "invariance", invariance)
        _check_weight("VICRegLoss", "variance", variance)
        _check_weight("VICRegLoss", "covariance", covariance)
        self.invariance = invariance
        self.variance = variance
        self.covariance = covariance
        self.gather = gather

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        _check_views("VICRegLoss", first, second)
        if self.gather:
            first, second = gather(first), gather(second)
        with _without_autocast(first):
            first, second = at_least_float32(first), at_least_float32(second)
            invariance = (first - second).square().sum() / max(first.numel(), 1)
            variance_first, covariance_first = self._statistics(first)
            variance_second, covariance_second = self._statistics(second)
            total: Tensor = (
                self.invariance * invariance
                + self.variance * (variance_first + variance_second) / 2
                + self.covariance * (covariance_first + covariance_second)
            )
            return total

    @staticmethod
    def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
        """Variance term, eq. 1 and 2, and covariance term, eq. 3 and 4, of one view (B, D)."""
        centred = _centred(x)
        covariance = centred.T @ centred / max(len(x) - 1, 1)  # (D, D)
        # 1e-4 is the authors' epsilon: the root has a finite slope when a feature is constant
        deviation = (covariance.diagonal() + 1e-4).sqrt()  # (D,)
        return F.relu(1 - deviation).mean(), _off_diagonal(covariance).square().sum() / x.shape[1]


class NegativeCosineLoss(nn.Module):
    """Negative cosine, Chen and He 2021, eq. 1 (https://arxiv.org/abs/2011.10566); SimSiam, and BYOL's eq. 2 / 2 - 1.

    The prediction made from one view turns towards the embedding of the other. Nothing is detached inside: pass
    `target.detach()`, without which both methods collapse, and average over the two directions yourself.

    Args:
        gather: Take the mean over the rows of all ranks.

    Shape: prediction (B, D) and target (B, D) of any norm, row i of both the same image, to a scalar in [-1, 1]. A
        zero row has cosine 0.

    Raises:
        ValueError: The batches are not (B, D) of one shape.

    Example:
        >>> NegativeCosineLoss()(torch.tensor([[2.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor(-0.5000)
    """

    def __init__(self, *, gather: bool = True) -> None:
        super().__init__()
        self.gather = gather

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        _check_views("NegativeCosineLoss", prediction, target)
        with _without_autocast(prediction):
            return -mean_over_ranks((normalize(prediction) * normalize(target)).sum(dim=1), self.gather)


class SwAVLoss(nn.Module):
    """Swapped assignments between views, Caron et al. 2020, eq. 1 to 6 (https://arxiv.org/abs/2006.09882).

    The scores of an image against K prototypes in one crop predict its code from another crop. Codes come from the two
    full crops by Sinkhorn's algorithm, which spreads a batch evenly over the prototypes, and carry no gradient. It
    works in the log domain, so that no epsilon underflows. As in the authors' code the loss is the mean over the two
    codes, the other crops and the rows.

    Args:
        temperature: Divides the scores before the softmax, > 0; the paper's value.
        epsilon: Divides the scores before Sinkhorn's algorithm, > 0; smaller is harder. The authors' value.
        iterations: Rounds of Sinkhorn's algorithm, >= 1; the paper's value.
        gather: Spread the rows of all ranks together, and take the mean over them.

    Shape: scores, a list of (B, K), one per crop and at least two, the two full crops first; row i of every crop the
        same image. Scores are cosines of embeddings and prototypes. queue_scores, None or a list of two (Q, K), one per
        full crop: earlier embeddings against the current prototypes. They take part in Sinkhorn's algorithm only,
        must be the same on every rank and count once. To a scalar.

    Raises:
        ValueError: Fewer than two crops, crops of different shapes, or a queue that does not fit them.

    Example:
        >>> scores = torch.eye(2)
        >>> SwAVLoss()([scores, scores]).round(decimals=6), SwAVLoss()([scores, -scores]).round(decimals=3)
        (tensor(4.5000e-05), tensor(10.))
    """

    def __init__(
        self, *, temperature: float = 0.1, epsilon: float = 0.05, iterations: int = 3, gather: bool = True
    ) -> None:
        super().__init__()
        check_positive(self, temperature=temperature, epsilon=epsilon)
        if iterations < 1:
            raise ValueError(f"SwAVLoss needs iterations >= 1, or codes are no distributions, got {iterations}.")
        self.temperature = temperature
        self.epsilon = epsilon
        self.iterations = iterations
        self.gather = gather

    def forward(self, scores: Sequence[Tensor], queue_scores: Sequence[Tensor] | None = None) -> Tensor:
        _check_crops("SwAVLoss", "scores", scores, least=2)
        if queue_scores is not None:
            self._check_queue(scores[0], queue_scores)
        with _without_autocast(scores[0]):
            codes = self._codes(scores[:2], queue_scores)  # (2, B, K)
            log_p = [F.log_softmax(at_least_float32(crop) / self.temperature, dim=1) for crop in scores]
            per_row = torch.stack(
                [
                    -(codes[i] * log_p[v]).sum(dim=1)  # cross entropy, eq. 2
                    for i in range(2)
                    for v in range(len(scores))
                    if v != i
                ]
            ).mean(dim=0)  # (B,)
            return mean_over_ranks(per_row, self.gather)

    @staticmethod
    def _check_queue(scores: Tensor, queue_scores: Sequence[Tensor]) -> None:
        _check_crops("SwAVLoss", "queue_scores", queue_scores, least=2)
        if len(queue_scores) != 2 or queue_scores[0].shape[1] != scores.shape[1]:
            raise ValueError(
                f"SwAVLoss takes queue_scores (Q, K) for the two full crops, got {len(queue_scores)} of shape "
                f"{tuple(queue_scores[0].shape)} beside scores {tuple(scores.shape)}; score both queues with the "
                "current prototypes."
            )

    @torch.no_grad()
    def _codes(self, full: Sequence[Tensor], queue_scores: Sequence[Tensor] | None) -> Tensor:
        """Codes (2, B, K) of the full crops, every row a distribution over the prototypes, eq. 3 to 5."""
        ranks = world_size() if self.gather else 1
        log_q = at_least_float32(torch.stack(list(full)))  # (2, B, K)
        if queue_scores is not None:
            # every rank works on its share of the queue, which all ranks hold
            share = torch.stack(list(queue_scores))[:, torch.distributed.get_rank() if ranks > 1 else 0 :: ranks]
            log_q = torch.cat([log_q, share.to(log_q.dtype)], dim=1)
        log_q = log_q / self.epsilon
        for _ in range(self.iterations):
            per_prototype = log_q.logsumexp(dim=1)[None]  # (1, 2, K); -inf on a rank without rows
            if ranks > 1:
                per_prototype = gather(per_prototype)  # (ranks, 2, K)
            log_q = log_q - per_prototype.logsumexp(dim=0)[:, None]
            log_q = log_q.log_softmax(dim=2)
        return log_q[:, : len(full[0])].exp()


class DINOLoss(nn.Module):
    """Self-distillation, Caron et al. 2021, eq. 1 to 4 (https://arxiv.org/abs/2104.14294).

    The student's distribution over K outputs in one crop predicts the teacher's in another. The teacher's scores are
    centred and sharpened, which together prevent collapse; they are detached inside. The centre is a moving mean of
    the teacher's scores: a call uses the centre of the calls before it and then, in training mode only, moves it once
    by the mean over crops and rows, each row counted once over uneven ranks.

    As in the authors' code the teacher's temperature may warm up linearly, here per call instead of per epoch: the
    training calls 0 to warmup_steps - 1 go in even steps from warmup_temperature to teacher_temperature, both
    included. `center` (1, K) and `steps`, the number of training calls, are buffers: a resumed run goes on with them.

    Args:
        dim: Number K of outputs.
        student_temperature: Divides the student's scores, > 0; the authors' value.
        teacher_temperature: Divides the centred teacher's scores, > 0; the authors' value, 0.07 for long runs.
        warmup_temperature: The teacher's temperature in the first training call, > 0; the authors' value.
        warmup_steps: Training calls of the warm-up; 0 uses teacher_temperature at once.
        momentum: Share of the old centre in the new one, [0, 1]; the authors' value.
        gather: Take the mean and the centre over the rows of all ranks.

    Shape: teacher, a list of (B, K), one per full crop, and student, a list of (B, K), one per crop, the same full
        crops first; row i of every crop the same image. Pairs of the same crop are left out. To a scalar, the mean over
        pairs of crops and rows.

    Raises:
        ValueError: No pair of different crops, crops of different shapes, or other than dim outputs.

    Example:
        >>> loss = DINOLoss(2, momentum=0.5)
        >>> scores = torch.tensor([[0.0, 0.1]])
        >>> loss([scores, scores], [scores, scores]).round(decimals=4)
        tensor(0.3891)
        >>> loss.center
        tensor([[0.0000, 0.0500]])
    """

    center: Tensor
    steps: Tensor

    def __init__(
        self,
        dim: int,
        *,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        warmup_temperature: float = 0.04,
        warmup_steps: int = 0,
        momentum: float = 0.9,
        gather: bool = True,
    ) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"DINOLoss needs dim >= 1, the number of outputs of the head, got {dim}.")
        check_positive(
            self,
            student_temperature=student_temperature,
            teacher_temperature=teacher_temperature,
            warmup_temperature=warmup_temperature,
        )
        if warmup_steps < 0:
            raise ValueError(f"DINOLoss needs warmup_steps >= 0 (0 is no warm-up), got {warmup_steps}.")
        if not 0 <= momentum <= 1:
            raise ValueError(f"DINOLoss needs a momentum in [0, 1] (1 keeps the centre), got {momentum}.")
        self.dim = dim
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        self.warmup_temperature = warmup_temperature
        self.warmup_steps = warmup_steps
        self.momentum = momentum
        self.gather = gather
        self.register_buffer("center", torch.zeros(1, dim))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, teacher: Sequence[Tensor], student: Sequence[Tensor]) -> Tensor:
        self._check(teacher, student)
        with _without_autocast(student[0]):
            scores = at_least_float32(torch.stack([crop.detach() for crop in teacher]))  # (T, B, K)
            targets = ((scores - self.center) / self._temperature(scores.dtype)).softmax(dim=2)  # eq. 1
            log_p = [F.log_softmax(at_least_float32(crop) / self.student_temperature, dim=1) for crop in student]
            per_row = torch.stack(
                [
                    -(targets[t] * log_p[s]).sum(dim=1)  # cross entropy, eq. 2
                    for t in range(len(teacher))
                    for s in range(len(student))
                    if s != t
                ]
            ).mean(dim=0)  # (B,)
            loss = mean_over_ranks(per_row, self.gather)
            if self.training:
                self._move_center(scores)
                self.steps += 1
            return loss

    def _check(self, teacher: Sequence[Tensor], student: Sequence[Tensor]) -> None:
        _check_crops("DINOLoss", "teacher scores", teacher, least=1)
        _check_crops("DINOLoss", "student scores", student, least=1)
        if len(teacher) == len(student) == 1:
            raise ValueError(
                "DINOLoss got one teacher crop and one student crop, which count as the same crop and make no pair; "
                "give the student at least two crops, the teacher's first."
            )
        if teacher[0].shape != student[0].shape or student[0].shape[1] != self.dim:
            raise ValueError(
                f"DINOLoss({self.dim}) takes scores (B, {self.dim}), got {tuple(teacher[0].shape)} from the teacher "
                f"and {tuple(student[0].shape)} from the student; dim is the number of outputs of both heads."
            )

    def _temperature(self, dtype: torch.dtype) -> Tensor | float:
        if self.warmup_steps == 0:
            return self.teacher_temperature
        # stays on the device: reading the counter would wait for the GPU in every step
        done = (self.steps.to(dtype) / max(self.warmup_steps - 1, 1)).clamp(max=1)
        return self.warmup_temperature + (self.teacher_temperature - self.warmup_temperature) * done

    @torch.no_grad()
    def _move_center(self, scores: Tensor) -> None:
        """Eq. 4 with scores (T, B, K), over the rows of all ranks; no rows leave the centre where it is."""
        views, rows, _ = scores.shape
        sums = torch.cat([scores.sum(dim=(0, 1)), scores.new_full((1,), views * rows)])  # (K + 1,): one message
        if self.gather:
            sums = sum_over_ranks(sums)
        total, count = sums[:-1], sums[-1]
        center = at_least_float32(self.center)
        moved = center * self.momentum + total / count.clamp(min=1) * (1 - self.momentum)
        self.center.copy_(torch.where(count > 0, moved, center))


class KoLeoLoss(nn.Module):
    """Kozachenko-Leonenko spreading, Sablayrolles et al. 2019, eq. 2 (https://arxiv.org/abs/1806.03198).

    Spreads embeddings over the sphere: minus the mean logarithm of each row's distance to its nearest neighbour. As in
    DINOv2, 1e-8 is added to every coordinate of the difference and to the distance, so that rows that coincide cost
    much but have a finite gradient (up to 1e8 / B for unit rows, which float16 cannot hold). Unlike there, neighbours
    come from all ranks. They are searched in blocks of rows: memory is linear in B.

    Args:
        gather: Look for neighbours among the rows of all ranks.

    Shape: embeddings (B, D) of any norm to a scalar, the mean over rows; 0 for fewer than two rows.

    Raises:
        ValueError: The embeddings are not (B, D).

    Example:
        >>> KoLeoLoss()(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))  # as far apart as can be: -log 2
        tensor(-0.6931)
    """

    def __init__(self, *, gather: bool = True) -> None:
        super().__init__()
        self.gather = gather

    def forward(self, embeddings: Tensor) -> Tensor:
        if embeddings.ndim != 2:
            raise ValueError(
                f"KoLeoLoss takes embeddings (B, D), got {tuple(embeddings.shape)}; flatten them, and call the loss "
                "once per crop, or crops of one image push each other away."
            )
        with _without_autocast(embeddings):
            x = normalize(gather(embeddings) if self.gather else embeddings)
            if len(x) < 2:
                return x.sum() * 0
            distance = F.pairwise_distance(x, x[_nearest(x)], eps=1e-8)  # (B,)
            return -(distance + 1e-8).log().mean()


@torch.no_grad()
def _nearest(x: Tensor) -> Tensor:
    """For each of B >= 2 unit rows the number of the other row with the largest cosine: (B,) int64."""
    rows = max(_SEARCH_ELEMENTS // len(x), 1)
    found = []
    for start in range(0, len(x), rows):
        similarity = x[start : start + rows] @ x.T  # (rows, B)
        similarity.diagonal(offset=start).fill_(-2)  # nothing is its own neighbour
        found.append(similarity.argmax(dim=1))
    return torch.cat(found)
