"""Losses against one or several learned vectors per class, the proxies, in place of the batch's other images.

Conventions: the first two arguments are the number of classes and the embeddings' size; labels are class numbers from
0; embeddings and proxies are normalised inside; the proxies are parameters (`proxies`: (num_classes, dim), or several
rows per class) that a method trains together with the network. Embeddings with fewer columns are compared with as many
columns of the proxies (`MatryoshkaLoss`). Memory grows with B + C, see `_tiles`; with torch.distributed initialised
and `gather=True` the loss is that of the union of all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from embedlab._ops import keyed_uniform, normalize, world_size
from embedlab.losses._base import EmbeddingLoss, apply_loss, check_classes, check_positive, check_temperature, softplus
from embedlab.losses._tiles import Plan, Tile, log_sum_exp, tiled_means, tiled_rows

Terms = Sequence[tuple[Tensor, Tensor | float]]


class _SumGradients(torch.autograd.Function):
    """Identity whose gradient is added up over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # noqa: ARG004
        total = grads[0].contiguous().clone()
        torch.distributed.all_reduce(total)
        return total


def check_columns(loss: nn.Module, embeddings: Tensor, dim: int) -> None:
    """Raise when the embeddings are longer than the proxies."""
    if embeddings.shape[1] > dim:
        raise ValueError(
            f"{type(loss).__name__} was made for embeddings of {dim} numbers, got {embeddings.shape[1]}; set dim to "
            "the head's out_features."
        )


def _by_class(cosine: Tensor, per_class: int) -> Tensor:
    """(r, C K) to (r, C, K)."""
    return cosine.view(len(cosine), -1, per_class)


class ProxyLoss(EmbeddingLoss):
    """Base of the losses with proxies.

    Args:
        num_classes: Number of training classes; None leaves it to `build`, which `MetricLearning` calls with the
            data's number before training begins.
        dim: Size of the embeddings.
        per_class: Proxies of each class.
        gather: Take images from all ranks.
    """

    fits_memory = False
    proxies: nn.Parameter

    def __init__(self, num_classes: int | None, dim: int, *, per_class: int = 1, gather: bool = True) -> None:
        super().__init__(gather=gather)
        check_positive(self, dim=dim, proxies_per_class=per_class)
        self.num_classes, self.dim, self.per_class = 0, dim, per_class
        self.register_parameter("proxies", None)
        if num_classes is not None:
            self.build(num_classes)

    def build(self, num_classes: int) -> None:
        """Create the proxies for a known number of classes."""
        check_positive(self, num_classes=num_classes)
        self.num_classes = num_classes
        self.proxies = nn.Parameter(torch.randn(num_classes * self.per_class, self.dim) * self.dim**-0.5)  # length 1

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        *,
        reference: Tensor | None = None,
        reference_labels: Tensor | None = None,
    ) -> Tensor:
        self.refuse(reference, "its proxies are what embeddings are compared with")
        embeddings, labels = self.union(embeddings, labels, reference, reference_labels)
        if not self.num_classes:
            raise ValueError(
                f"{type(self).__name__} was made without num_classes: call its build(num_classes) first, or train it "
                "by MetricLearning on an ImageData, which tells it the number."
            )
        check_columns(self, embeddings, self.dim)
        check_classes(self, labels, self.num_classes)
        return self.compare(embeddings, labels)

    def compare(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of embeddings (B, d) of any norm, of all ranks."""
        raise NotImplementedError


class MarginSoftmaxLoss(ProxyLoss):
    """Base of the losses that are a softmax cross entropy over classes, with a change to the right class's cosine.

    Args:
        num_classes: Number of training classes; None takes the data's, see `ProxyLoss`.
        dim: Size of the embeddings.
        scale: Multiplies the cosine before the softmax, > 0.
        gamma: Focal weighting, Lin et al. 2017, eq. 4: each image's loss times (1 - p)^gamma, p the probability of the
            right class; 0 is none.
        per_class: Proxies of each class.
        sample: Share of the classes that a training step compares with, besides the batch's own: the Partial-FC idea,
            An et al. 2022 (https://arxiv.org/abs/2203.15565), for a million classes. Which, depends on (step, class).
        gather: Take images from all ranks.
    """

    step: Tensor

    def __init__(
        self,
        num_classes: int | None,
        dim: int,
        *,
        scale: float,
        gamma: float = 0.0,
        per_class: int = 1,
        sample: float = 1.0,
        gather: bool = True,
    ) -> None:
        super().__init__(num_classes, dim, per_class=per_class, gather=gather)
        check_positive(self, scale=scale)
        if gamma < 0:
            raise ValueError(f"{type(self).__name__} needs gamma >= 0 (0 is plain cross entropy), got {gamma}.")
        if not 0 < sample <= 1:
            raise ValueError(f"{type(self).__name__} needs a sample in (0, 1] (a share of the classes), got {sample}.")
        self.scale, self.gamma, self.sample = scale, gamma, sample
        self.sharded, self.first_class = False, 0  # see `shard`
        self.register_buffer("step", torch.zeros((), dtype=torch.long))  # of training calls; keys the samples

    def target(self, cosine: Tensor, row: Tensor) -> Tensor:  # noqa: ARG002
        """What stands for the cosine (r,) of the images with numbers `row` to their class in the softmax."""
        return cosine

    def keep(self, cosine: Tensor) -> Tensor | None:  # noqa: ARG002
        """Which images (r,) count, by their cosine to their class; None for all."""
        return None

    def prepare(self, embeddings: Tensor) -> None:
        """Look at the embeddings (B, d) of all ranks before they are normalised."""

    def cosines(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """Cosine to the right class (r,), and to the others (r, C), minus infinity for the right one."""
        if self.per_class == 1:
            return tile.own.masked_fill(~tile.positive, 0).sum(1), tile.similarity
        own = tile.own.masked_fill(~tile.positive, -2).amax(1) if tile.own.shape[1] else tile.own.sum(1)
        return own, _by_class(tile.similarity, self.per_class).amax(2)

    def parts(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """Cosine to the right class and log-sum-exp of the other logits, each (r,)."""
        own, others = self.cosines(tile)
        return own, log_sum_exp(others, self.scale, in_place=others is tile.similarity)

    def entropies(self, own: Tensor, log_others: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """Focal cross entropy of each image (r,), and which of them count, 0 or 1."""
        entropy = softplus(log_others - self.scale * self.target(own, row))
        if self.gamma:
            miss = (-torch.expm1(-entropy)).clamp(min=torch.finfo(entropy.dtype).tiny)  # 1 - p
            entropy = entropy * miss**self.gamma
        kept = self.keep(own.detach())
        return entropy, torch.ones_like(entropy) if kept is None else kept.to(entropy.dtype)

    def terms(self, tile: Tile) -> Terms:
        """What a tile adds to sum and count."""
        entropy, kept = self.entropies(*self.parts(tile), tile.row)
        return [((entropy * kept).sum(), kept.sum())]

    def classes(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The proxies to compare with (P, dim), normalised later, and the class of each (P,)."""
        here = len(self.proxies) // self.per_class
        numbers = torch.arange(self.first_class, self.first_class + here, device=labels.device)
        if self.sample == 1.0 or not self.training:
            return self.proxies, numbers.repeat_interleave(self.per_class)
        drawn = keyed_uniform(numbers, 1, seed=0, epoch=int(self.step), stream=1).squeeze(1) < self.sample
        mine = labels[(labels >= self.first_class) & (labels < self.first_class + here)] - self.first_class
        drawn[mine] = True
        chosen = numbers[drawn]
        several = torch.arange(self.per_class, device=labels.device)
        rows = (chosen - self.first_class)[:, None] * self.per_class + several
        return self.proxies.index_select(0, rows.flatten()), chosen.repeat_interleave(self.per_class)

    def shard(self) -> None:
        """Keep this rank's share of the classes alone; from here on the proxies differ between ranks.

        Call it on every rank, after torch.distributed is initialised and before the optimizer is made (`Method` does).
        A wrapper such as DistributedDataParallel must leave `proxies` alone. state_dict holds all classes again, so
        that a checkpoint fits any number of ranks; it is a collective call.
        """
        world = world_size()
        if self.sharded or world == 1:
            return
        if not self.gather:
            raise ValueError(f"{type(self).__name__} needs gather=True to share its classes out among ranks.")
        rank = torch.distributed.get_rank()
        first, last = (self.num_classes * number // world for number in (rank, rank + 1))
        self.first_class, self.sharded = first, True
        self.proxies = nn.Parameter(self.proxies.detach()[first * self.per_class : last * self.per_class].clone())

    def own_rows(self, full: Tensor) -> Tensor:
        """This rank's rows of a tensor over all classes."""
        first = self.first_class * self.per_class
        return full[first : first + len(self.proxies)]

    def all_rows(self, shard: Tensor) -> Tensor:
        """A tensor over all classes from every rank's rows; a collective call."""
        world = world_size()
        bounds = [self.num_classes * number // world * self.per_class for number in range(world + 1)]
        lengths = [last - first for first, last in pairwise(bounds)]
        padded = shard.new_zeros(max(lengths), *shard.shape[1:])
        padded[: len(shard)] = shard.detach()
        parts = [torch.empty_like(padded) for _ in range(world)]
        torch.distributed.all_gather(parts, padded)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.sharded:
            destination[prefix + "proxies"] = self.all_rows(self.proxies)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        full = state_dict.get(prefix + "proxies")
        if self.sharded and full is not None and len(full) == self.num_classes * self.per_class:
            state_dict = {**state_dict, prefix + "proxies": self.own_rows(full)}
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def compare(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        self.prepare(embeddings)
        anchors = normalize(embeddings)
        proxies, numbers = self.classes(labels)
        proxies = normalize(proxies[:, : anchors.shape[1]]).to(anchors.dtype)
        plan = Plan(labels, numbers, share=self.gather and not self.sharded)
        if self.sharded:
            loss = self._compare_shards(plan, anchors, proxies)
        else:
            loss = tiled_means(self.terms, plan, anchors, proxies).sum()
        if self.training:
            self.step += 1
        return loss

    def _compare_shards(self, plan: Plan, anchors: Tensor, proxies: Tensor) -> Tensor:
        """Each rank compares all images with its own classes.

        What the softmax needs of the others' are two numbers an image, which a first pass finds. With them the
        derivative of the loss by each image's cosine and log-sum-exp is known, and a second pass carries it on to the
        vectors.
        """

        def numbers(tile: Tile) -> Tensor:
            return torch.stack([*self.parts(tile), (tile.mates > 0).to(anchors.dtype)], dim=1)

        if not len(anchors):
            return (anchors.sum() + proxies.sum()) * 0
        own, log_here, here = tiled_rows(numbers, plan, anchors, proxies).unbind(1)
        own = own * here
        torch.distributed.all_reduce(own)
        top = log_here.clone()
        torch.distributed.all_reduce(top, op=torch.distributed.ReduceOp.MAX)
        total = (log_here - top).exp()
        torch.distributed.all_reduce(total)
        with torch.enable_grad():
            leaves = own.requires_grad_(), (top + total.log()).requires_grad_()
            entropy, kept = self.entropies(*leaves, torch.arange(len(own), device=own.device))
            value = (entropy * kept).sum() / kept.sum().clamp(min=1)
            by_own, by_log = torch.autograd.grad(value, leaves)
        log_total = leaves[1].detach()

        def carry(tile: Tile) -> Terms:
            cosine, log_part = self.parts(tile)
            share = (log_part.detach() - log_total[tile.row]).exp()
            pull = cosine * by_own[tile.row] * (tile.mates > 0)
            return [((pull + log_part * share * by_log[tile.row]).sum(), 0)]  # a sum: the mean is in the factors

        carried = tiled_means(carry, plan, _SumGradients.apply(anchors), proxies).sum()
        return value.detach() + carried - carried.detach()


class NormSoftmaxLoss(MarginSoftmaxLoss):
    """Normalised softmax, Zhai & Wu 2019, eq. 3 (https://arxiv.org/abs/1811.12649).

    Cross entropy over cosines to class proxies. Default as in pytorch-metric-learning.

    Args:
        num_classes: Number of training classes; None takes the data's, see `ProxyLoss`.
        dim: Size of the embeddings.
        temperature: Divides the cosine before the softmax; no unit, > 0.
        gamma: Focal weighting, Lin et al. 2017, eq. 4; 0 is none.
        sample: Share of the classes that a training step compares with, see `MarginSoftmaxLoss`.
        gather: Take images from all ranks.

    Shape: embeddings (B, dim) of any norm and class numbers (B,) to a scalar, the mean over images. A reference is
        refused.

    Raises:
        ValueError: A setting out of range, or tensors that do not fit, or a reference.

    Example:
        >>> loss = NormSoftmaxLoss(4, 4, temperature=1.0)
        >>> _ = loss.load_state_dict({"proxies": torch.eye(4), "step": torch.tensor(0)})
        >>> loss(torch.eye(4), torch.arange(4)).detach()
        tensor(0.7437)
    """

    def __init__(
        self,
        num_classes: int | None,
        dim: int,
        *,
        temperature: float = 0.05,
        gamma: float = 0.0,
        sample: float = 1.0,
        gather: bool = True,
    ) -> None:
        scale = 1 / check_temperature(self, temperature)
        super().__init__(num_classes, dim, scale=scale, gamma=gamma, sample=sample, gather=gather)


class ProxyNCALoss(MarginSoftmaxLoss):
    """ProxyNCA++, Teh et al. 2020, eq. 5, 6 (https://arxiv.org/abs/2004.01113).

    Cross entropy over squared Euclidean distances to class proxies; unlike in ProxyNCA the right class stands in the
    denominator. On unit vectors it is `NormSoftmaxLoss` with half the temperature.

    Args:
        num_classes: Number of training classes; None takes the data's, see `ProxyLoss`.
        dim: Size of the embeddings.
        temperature: Divides the squared distance; > 0. The paper's 1/9.
        gamma: Focal weighting, Lin et al. 2017, eq. 4; 0 is none.
        sample: Share of the classes that a training step compares with, see `MarginSoftmaxLoss`.
        gather: Take images from all ranks.

    Shape: as `NormSoftmaxLoss`.

    Raises:
        ValueError: A setting out of range, or tensors that do not fit, or a reference.

    Example:
        >>> loss = ProxyNCALoss(4, 4, temperature=2.0)
        >>> _ = loss.load_state_dict({"proxies": torch.eye(4), "step": torch.tensor(0)})
        >>> loss(torch.eye(4), torch.arange(4)).detach()
        tensor(0.7437)
    """

    def __init__(
        self,
        num_classes: int | None,
        dim: int,
        *,
        temperature: float = 1 / 9,
        gamma: float = 0.0,
        sample: float = 1.0,
        gather: bool = True,
    ) -> None:
        scale = 2 / check_temperature(self, temperature)  # -d^2 = 2 cosine - 2
        super().__init__(num_classes, dim, scale=scale, gamma=gamma, sample=sample, gather=gather)


class CosFaceLoss(MarginSoftmaxLoss):
    """Large margin cosine loss, Wang et al. 2018, eq. 4 (https://arxiv.org/abs/1801.09414).

    The right class's cosine is lowered by a margin. Defaults as in pytorch-metric-learning.

    Args:
        num_classes: Number of training classes; None takes the data's, see `ProxyLoss`.
        dim: Size of the embeddings.
        margin: In units of cosine, >= 0.
        scale: Multiplies the cosine before the softmax, > 0.
        gamma: Focal weighting, Lin et al. 2017, eq. 4; 0 is none.
        sample: Share of the classes that a training step compares with, see `MarginSoftmaxLoss`.
        gather: Take images from all ranks.

    Shape: as `NormSoftmaxLoss`.

    Raises:
        ValueError: A setting out of range, or tensors that do not fit, or a reference.

    Example:
        >>> loss = CosFaceLoss(4, 4, margin=1.0, scale=1.0)
        >>> _ = loss.load_state_dict({"proxies": torch.eye(4), "step": torch.tensor(0)})
        >>> loss(torch.eye(4), torch.arange(4)).detach()
        tensor(1.3863)
    """

    def __init__(
        self,
        num_classes: int | None,
        dim: int,
        *,
        margin: float = 0.35,
        scale: float = 64.0,
        gamma: float = 0.0,
        sample: float = 1.0,
        gather: bool = True,
    ) -> None:
        super().__init__(num_classes, dim, scale=scale, gamma=gamma, sample=sample, gather=gather)
        if not 0 <= margin < 2:
            raise ValueError(f"CosFaceLoss needs a margin in [0, 2) (a difference of cosines), got {margin}.")
        self.margin = margin

    def target(self, cosine: Tensor, row: Tensor) -> Tensor:  # noqa: ARG002
        return cosine - self.margin


def _sine(cosine: Tensor) -> Tensor:
    """Of an angle in [0, pi]; its slope at 0 and pi is cut off, where it would be infinite."""
    return (1 - cosine**2).clamp(min=1e-8).sqrt()


class ArcFaceLoss(MarginSoftmaxLoss):
    """Additive angular margin, Deng et al. 2019, eq. 3 (https://arxiv.org/abs/1801.07698), with sub-centres.

    The angle to the right class is widened by a margin; beyond 180 degrees less the margin the logit goes on falling
    as in pytorch-metric-learning, whose defaults these are. Sub-centres and the dropping of noisy labels: Deng et al.
    2020, eq. 3 and section 3.3 (https://doi.org/10.1007/978-3-030-58621-8_43).

    Args:
        num_classes: Number of training classes; None takes the data's, see `ProxyLoss`.
        dim: Size of the embeddings.
        margin_degrees: In [0, 90).
        scale: Multiplies the cosine before the softmax, > 0.
        sub_centers: Proxies of each class; an image is compared with the nearest, so that wrongly labelled images
            gather at a minor one.
        noise_degrees: Images farther than this from the nearest proxy of their class are left out as wrongly labelled;
            None keeps all. The paper has 75 to the class's dominant sub-centre, once after training: here images that
            a minor sub-centre has gathered stay in, and do their harm there.
        noise_after: Training steps before images are left out; at the start all are far from everything.
        gamma: Focal weighting, Lin et al. 2017, eq. 4; 0 is none.
        sample: Share of the classes that a training step compares with, see `MarginSoftmaxLoss`.
        gather: Take images from all ranks.

    Shape: as `NormSoftmaxLoss`; the proxies of class c are rows c * sub_centers and on. The mean is over images that
        are not left out.

    Raises:
        ValueError: A setting out of range, or tensors that do not fit, or a reference.

    Example:
        >>> loss = ArcFaceLoss(4, 4, margin_degrees=60, scale=1.0)
        >>> _ = loss.load_state_dict({"proxies": torch.eye(4), "step": torch.tensor(0)})
        >>> loss(torch.eye(4), torch.arange(4)).detach()
        tensor(1.0366)
    """

    def __init__(
        self,
        num_classes: int | None,
        dim: int,
        *,
        margin_degrees: float = 28.6,
        scale: float = 64.0,
        sub_centers: int = 1,
        noise_degrees: float | None = None,
        noise_after: int = 0,
        gamma: float = 0.0,
        sample: float = 1.0,
        gather: bool = True,
    ) -> None:
        super().__init__(
            num_classes, dim, scale=scale, gamma=gamma, per_class=sub_centers, sample=sample, gather=gather
        )
        if not 0 <= margin_degrees < 90:
            raise ValueError(
                f"ArcFaceLoss needs margin_degrees in [0, 90), got {margin_degrees}; 28.6 degrees are 0.5 radians."
            )
        if noise_degrees is not None and not 0 < noise_degrees <= 180:
            raise ValueError(f"ArcFaceLoss needs noise_degrees in (0, 180] or None, got {noise_degrees}.")
        self.margin = math.radians(margin_degrees)
        self.noise_degrees, self.noise_after = noise_degrees, noise_after

    def target(self, cosine: Tensor, row: Tensor) -> Tensor:  # noqa: ARG002
        widened = cosine * math.cos(self.margin) - _sine(cosine) * math.sin(self.margin)
        falling = cosine - self.margin * math.sin(self.margin)
        return torch.where(cosine >= math.cos(math.pi - self.margin), widened, falling)

    def keep(self, cosine: Tensor) -> Tensor | None:
        if self.noise_degrees is None or not self.training or int(self.step) < self.noise_after:
            return None
        return ~(cosine < math.cos(math.radians(self.noise_degrees)))  # so that NaN is kept, and seen


class AdaFaceLoss(MarginSoftmaxLoss):
    """Quality adaptive margin, Kim et al. 2022, eq. 5 to 8 (https://arxiv.org/abs/2204.00964).

    The length of an embedding stands for the image's quality: short ones get an angular margin that forgives hard
    images, long ones an additive margin that insists on them. Defaults of the paper; lengths are clamped to
    [0.001, 100] as in the authors' code, their mean and deviation are running averages over training steps.

    Args:
        num_classes: Number of training classes; None takes the data's, see `ProxyLoss`.
        dim: Size of the embeddings.
        margin: The paper's m.
        concentration: The paper's h.
        scale: Multiplies the cosine before the softmax, > 0.
        momentum: Of the running averages, in [0, 1).
        gamma: Focal weighting, Lin et al. 2017, eq. 4; 0 is none.
        sample: Share of the classes that a training step compares with, see `MarginSoftmaxLoss`.
        gather: Take images from all ranks.

    Shape: as `NormSoftmaxLoss`; here the embeddings' norm matters.

    Raises:
        ValueError: A setting out of range, or tensors that do not fit, or a reference.

    Example:
        >>> loss = AdaFaceLoss(4, 4, margin=0.0, scale=1.0)
        >>> _ = loss.load_state_dict({"proxies": torch.eye(4)}, strict=False)
        >>> loss(torch.eye(4), torch.arange(4)).detach()
        tensor(0.7437)
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        num_classes: int | None,
        dim: int,
        *,
        margin: float = 0.4,
        concentration: float = 0.333,
        scale: float = 64.0,
        momentum: float = 0.99,
        gamma: float = 0.0,
        sample: float = 1.0,
        gather: bool = True,
    ) -> None:
        super().__init__(num_classes, dim, scale=scale, gamma=gamma, sample=sample, gather=gather)
        if not 0 <= momentum < 1:
            raise ValueError(f"AdaFaceLoss needs momentum in [0, 1), got {momentum}.")
        self.margin, self.concentration, self.momentum = margin, concentration, momentum
        self.register_buffer("mean", torch.tensor(20.0))
        self.register_buffer("std", torch.tensor(100.0))
        self.quality = torch.zeros(0)  # of each image of the present batch, in [-1, 1]

    @torch.no_grad()
    def prepare(self, embeddings: Tensor) -> None:
        norms = torch.linalg.vector_norm(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)), dim=1)
        # a prefix (MatryoshkaLoss) is shorter than the whole; both have one running mean
        norms = (norms * math.sqrt(self.dim / embeddings.shape[1])).clamp(1e-3, 100)
        if self.training and len(norms) > 1:
            self.mean.lerp_(norms.mean().to(self.mean.dtype), 1 - self.momentum)
            self.std.lerp_(norms.std().to(self.std.dtype), 1 - self.momentum)
        self.quality = (self.concentration * (norms - self.mean) / (self.std + 1e-3)).clamp(-1, 1)

    def target(self, cosine: Tensor, row: Tensor) -> Tensor:
        shift = self.margin * self.quality[row].to(cosine.dtype)
        angle = torch.acos(cosine.detach().clamp(-1, 1)) - shift
        turned = cosine * shift.cos() + _sine(cosine) * shift.sin()  # cosine of the angle less the shift
        low, high = 1e-3, math.pi - 1e-3
        turned = torch.where(angle < low, math.cos(low), torch.where(angle > high, math.cos(high), turned))
        return turned - (self.margin + shift)


class SoftTripleLoss(MarginSoftmaxLoss):
    """SoftTriple, Qian et al. 2019, eq. 8, 9 (https://arxiv.org/abs/1909.05235).

    Several centres per class; the cosine to a class is their softmax-weighted mean. Defaults as in
    pytorch-metric-learning, which leaves out the paper's regulariser; the paper uses 0.2 for it.

    Args:
        num_classes: Number of training classes; None takes the data's, see `ProxyLoss`.
        dim: Size of the embeddings.
        centers: Proxies of each class.
        margin: Taken off the right class's cosine.
        scale: The paper's lambda, > 0.
        gamma: Temperature of the softmax over a class's centres (the paper's gamma; not the focal one), > 0.
        regularization: Weight that draws a class's centres together, the paper's tau.
        gather: Take images from all ranks.

    Shape: as `NormSoftmaxLoss`; the proxies of class c are rows c * centers and on.

    Raises:
        ValueError: A setting out of range, or tensors that do not fit, or a reference.

    Example:
        >>> loss = SoftTripleLoss(4, 4, centers=1, margin=0.0, scale=1.0)
        >>> _ = loss.load_state_dict({"proxies": torch.eye(4), "step": torch.tensor(0)})
        >>> loss(torch.eye(4), torch.arange(4)).detach()
        tensor(0.7437)
    """

    def __init__(
        self,
        num_classes: int | None,
        dim: int,
        *,
        centers: int = 10,
        margin: float = 0.01,
        scale: float = 20.0,
        gamma: float = 0.1,
        regularization: float = 0.0,
        gather: bool = True,
    ) -> None:
        super().__init__(num_classes, dim, scale=scale, per_class=centers, gather=gather)
        if gamma <= 0:
            raise ValueError(f"SoftTripleLoss needs gamma > 0 (a temperature), got {gamma}; 0.1 is usual.")
        self.margin, self.temperature, self.regularization = margin, gamma, regularization

    def shard(self) -> None:
        """See the base class."""
        if self.regularization:
            raise ValueError(
                "SoftTripleLoss cannot share its centres out among ranks with a regularization; set it to 0."
            )
        super().shard()

    def _mix(self, cosine: Tensor) -> Tensor:
        """Softmax-weighted mean over the centres (..., K)."""
        return (F.softmax(cosine / self.temperature, dim=-1) * cosine).sum(-1)

    def cosines(self, tile: Tile) -> tuple[Tensor, Tensor]:
        right = tile.own.masked_fill(~tile.positive, -1e4)  # no part in the softmax
        own = self._mix(right) if tile.own.shape[1] else tile.own.sum(1)
        others = self._mix(_by_class(tile.similarity.clamp(min=-2), self.per_class))
        number = tile.columns[:, :1] // self.per_class  # of the right class, (r, 1)
        hidden = others.scatter(1, number, -math.inf)
        return own, hidden if tile.absent is None else torch.where(tile.absent, others, hidden)

    def target(self, cosine: Tensor, row: Tensor) -> Tensor:  # noqa: ARG002
        return cosine - self.margin

    def compare(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        loss = super().compare(embeddings, labels)
        if not self.regularization or self.per_class == 1:
            return loss
        with torch.autocast(embeddings.device.type, enabled=False):
            centers = normalize(self.proxies[:, : embeddings.shape[1]]).view(self.num_classes, self.per_class, -1)
            first, second = torch.triu_indices(self.per_class, self.per_class, 1, device=centers.device)
            apart = (2 - 2 * (centers @ centers.mT)[:, first, second]).clamp(min=1e-8).sqrt()
        return loss + self.regularization * apart.sum() / (self.num_classes * self.per_class * (self.per_class - 1))


class ProxyAnchorLoss(ProxyLoss):
    """Proxy anchor loss, Kim et al. 2020, eq. 4 (https://arxiv.org/abs/2003.13911).

    The proxies are the anchors: each pulls and pushes the whole batch at once, hardest images most. Defaults as in
    pytorch-metric-learning and the paper, which trains the proxies at 100 times the network's learning rate.

    Args:
        num_classes: Number of training classes; None takes the data's, see `ProxyLoss`.
        dim: Size of the embeddings.
        margin: The paper's delta; cosine.
        scale: The paper's alpha, > 0.
        gather: Take images from all ranks.

    Shape: as `NormSoftmaxLoss`; pulls are a mean over the classes in the batch, pushes over all classes.

    Raises:
        ValueError: A setting out of range, or tensors that do not fit, or a reference.

    Example:
        >>> loss = ProxyAnchorLoss(4, 4, margin=0.0, scale=1.0)
        >>> _ = loss.load_state_dict({"proxies": torch.eye(4)})
        >>> loss(torch.eye(4), torch.arange(4)).detach()
        tensor(1.6996)
    """

    def __init__(
        self, num_classes: int | None, dim: int, *, margin: float = 0.1, scale: float = 32.0, gather: bool = True
    ) -> None:
        super().__init__(num_classes, dim, gather=gather)
        check_positive(self, scale=scale)
        self.margin, self.scale = margin, scale

    def terms(self, tile: Tile) -> Terms:
        """What a tile, some proxies against the batch, adds to the sums and counts of pulls and pushes."""
        pull = softplus(tile.log_sum_positives(-tile.own, self.scale) + self.scale * self.margin)
        push = softplus(tile.log_sum_negatives(self.scale) + self.scale * self.margin)
        return [(pull.sum(), (tile.mates > 0).sum()), (push.sum(), len(push))]

    def compare(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        images = normalize(embeddings)
        proxies = normalize(self.proxies[:, : images.shape[1]]).to(images.dtype)
        plan = Plan(torch.arange(self.num_classes, device=labels.device), labels, share=self.gather)
        return tiled_means(self.terms, plan, proxies, images).sum()


class CenterLoss(EmbeddingLoss):
    """Centre loss, Wen et al. 2016, eq. 2 and 5 (https://doi.org/10.1007/978-3-319-46478-7_31).

    Half the squared distance of each embedding to its class's centre. It pulls only, so it goes beside another loss.
    Unlike the paper the embeddings are unit vectors, the mean over images is taken, and the centres are parameters.

    Args:
        num_classes: Number of training classes.
        dim: Size of the embeddings.
        loss: The loss to add it to; None gives the centre loss alone.
        weight: Of the centre loss, the paper's lambda; its 0.003 is for embeddings of any length.
        gather: Take images from all ranks.

    Shape: embeddings (B, dim) of any norm and class numbers (B,) to a scalar. `centers` (num_classes, dim) start at 0.

    Raises:
        ValueError: A setting out of range, or tensors that do not fit, or a reference.

    Example:
        >>> CenterLoss(4, 4)(torch.eye(4), torch.arange(4)).detach()
        tensor(0.5000)
    """

    fits_memory = False

    def __init__(
        self, num_classes: int, dim: int, *, loss: nn.Module | None = None, weight: float = 1.0, gather: bool = True
    ) -> None:
        super().__init__(gather=gather)
        check_positive(self, num_classes=num_classes, dim=dim)
        self.num_classes, self.dim = num_classes, dim
        self.loss, self.weight = loss, weight
        self.centers = nn.Parameter(torch.zeros(num_classes, dim))

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        *,
        reference: Tensor | None = None,
        reference_labels: Tensor | None = None,
    ) -> Tensor:
        self.refuse(reference, "its centres are what embeddings are compared with")
        every, every_label = self.union(embeddings, labels, reference, reference_labels)
        check_columns(self, every, self.dim)
        check_classes(self, every_label, self.num_classes)
        vectors = normalize(every)
        centers = self.centers[every_label.long(), : vectors.shape[1]].to(vectors.dtype)
        pull = self.weight * ((vectors - centers) ** 2).sum() / (2 * max(1, len(vectors)))
        return pull if self.loss is None else apply_loss(self.loss, embeddings, labels) + pull
