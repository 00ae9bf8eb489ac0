"""What the processes of test_ddp.py run; importable, because they are spawned."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from embedlab.losses import (
    AdaFaceLoss,
    AngularLoss,
    ArcFaceLoss,
    BinaryFocalLoss,
    CenterLoss,
    CircleLoss,
    ContrastiveLoss,
    CosFaceLoss,
    CrossBatchMemory,
    DCLLoss,
    DistanceWeightedMiner,
    FastAPLoss,
    FocalContrastiveLoss,
    FocalLoss,
    InfoNCELoss,
    LiftedStructureLoss,
    MarginLoss,
    MatryoshkaLoss,
    MultiSimilarityLoss,
    NormSoftmaxLoss,
    NPairLoss,
    NTXentLoss,
    ProxyAnchorLoss,
    ProxyNCALoss,
    SmoothAPLoss,
    SoftNearestNeighborLoss,
    SoftTripleLoss,
    SumLoss,
    SupConLoss,
    ThresholdConsistentMarginLoss,
    TripletLoss,
    _tiles,
)

CLASSES, INPUTS, OUTPUTS = 4, 8, 6
# rows of each rank: uneven, one of them none at all
SHARDS = {"2 ranks": [9, 5], "3 ranks": [4, 1, 9], "3 ranks, one empty": [8, 0, 6]}
ROWS = 14
# numbers in a tile: every rank does the only one, or there is one for each row and the ranks divide them
TILES = {"one tile": 2**20, "divided": 1}


def plainly(loss: nn.Module, z: Tensor, labels: Tensor) -> Tensor:
    return loss(z, labels)


def with_reference(loss: nn.Module, z: Tensor, labels: Tensor) -> Tensor:
    """The reference, the same on all ranks, learns nothing."""
    reference = torch.randn(9, OUTPUTS, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(z)
    return loss(z, labels, reference=reference, reference_labels=torch.arange(9) % (CLASSES + 1))


def with_targets_per_output(loss: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    return loss(logits, nn.functional.one_hot(labels, OUTPUTS))


@dataclass(frozen=True)
class Row:
    """A loss, how it is called, and for how many steps; gradients add up over the steps."""

    make: Callable[..., nn.Module]
    call: Callable[[nn.Module, Tensor, Tensor], Tensor] = plainly
    steps: int = 1


def row(kind: Callable[..., nn.Module], *rest, **settings) -> Row:
    return Row(functools.partial(kind, **settings), *rest)


proxies = functools.partial(functools.partial, num_classes=CLASSES, dim=OUTPUTS)
# a new loss is one row; it is made with gather=False, too
LOSSES = {
    "SupConLoss": row(SupConLoss, temperature=0.1),
    "SupConLoss reference": row(SupConLoss, with_reference),
    "NTXentLoss": row(NTXentLoss, temperature=0.2),
    "InfoNCELoss": row(InfoNCELoss, with_reference, temperature=0.2),
    "DCLLoss": row(DCLLoss, temperature=0.2),
    "MultiSimilarityLoss": row(MultiSimilarityLoss, beta=20.0),
    "CircleLoss": row(CircleLoss, scale=8.0),
    "NPairLoss": row(NPairLoss),
    "LiftedStructureLoss": row(LiftedStructureLoss),
    "MarginLoss": row(MarginLoss, margin=0.4, nu=0.1),
    "MarginLoss per class": row(MarginLoss, margin=0.4, nu=0.1, num_classes=CLASSES),
    "AngularLoss": row(AngularLoss),
    "FastAPLoss": row(FastAPLoss),
    "SmoothAPLoss": row(SmoothAPLoss, temperature=0.1),
    "SmoothAPLoss reference": row(SmoothAPLoss, with_reference, temperature=0.1),
    "SoftNearestNeighborLoss": row(SoftNearestNeighborLoss),
    "FocalContrastiveLoss": row(FocalContrastiveLoss),
    "ThresholdConsistentMarginLoss": row(
        lambda gather=True: ThresholdConsistentMarginLoss(loss=SupConLoss(gather=gather), gather=gather)
    ),
    "ContrastiveLoss": row(ContrastiveLoss),
    "TripletLoss": row(TripletLoss, margin=0.3),
    "TripletLoss soft": row(TripletLoss, margin=0.1, soft=True),
    "TripletLoss batch-hard": row(TripletLoss, margin=0.3, mining="batch-hard"),
    "TripletLoss easy-positive": row(TripletLoss, margin=0.3, mining="easy-positive"),
    "TripletLoss semi-hard": row(TripletLoss, margin=0.3, mining="semi-hard"),
    "TripletLoss angular": row(TripletLoss, margin=0.3, mining="angular"),
    "TripletLoss multi-similarity": row(TripletLoss, margin=0.3, mining="multi-similarity"),
    "TripletLoss distance-weighted": row(
        lambda gather=True: TripletLoss(
            margin=0.3, mining=DistanceWeightedMiner(nonzero_loss_cutoff=1.9), gather=gather
        ),
        plainly,
        3,
    ),
    "MarginLoss distance-weighted": row(
        lambda gather=True: MarginLoss(
            mining=DistanceWeightedMiner(nonzero_loss_cutoff=1.9), num_classes=CLASSES, gather=gather
        ),
        plainly,
        2,
    ),
    "ContrastiveLoss batch-hard": row(ContrastiveLoss, mining="batch-hard"),
    "SupConLoss semi-hard": row(SupConLoss, mining="semi-hard"),
    "MultiSimilarityLoss multi-similarity": row(MultiSimilarityLoss, beta=20.0, mining="multi-similarity"),
    "NormSoftmaxLoss": row(proxies(NormSoftmaxLoss), temperature=0.2),
    "NormSoftmaxLoss focal": row(proxies(NormSoftmaxLoss), temperature=0.2, gamma=2.0),
    "NormSoftmaxLoss sample": row(proxies(NormSoftmaxLoss), plainly, 3, temperature=0.2, sample=0.3),
    "ArcFaceLoss": row(proxies(ArcFaceLoss), scale=8.0),
    "ArcFaceLoss sub-centers": row(
        proxies(ArcFaceLoss), plainly, 3, scale=8.0, sub_centers=2, noise_degrees=80.0, noise_after=1
    ),
    "CosFaceLoss": row(proxies(CosFaceLoss), scale=8.0, gamma=1.0),
    "AdaFaceLoss": row(proxies(AdaFaceLoss), plainly, 3, scale=8.0, momentum=0.5),
    "ProxyNCALoss": row(proxies(ProxyNCALoss), temperature=0.5),
    "ProxyAnchorLoss": row(proxies(ProxyAnchorLoss), scale=8.0),
    "SoftTripleLoss": row(proxies(SoftTripleLoss), centers=3, scale=8.0, regularization=0.2),
    "CenterLoss": row(proxies(CenterLoss)),
    "CrossBatchMemory": row(
        lambda gather=True: CrossBatchMemory(SupConLoss(gather=gather), OUTPUTS, capacity=20), plainly, 3
    ),
    "CrossBatchMemory batch-hard": row(
        lambda gather=True: CrossBatchMemory(
            TripletLoss(margin=0.3, mining="batch-hard", gather=gather), OUTPUTS, capacity=10, weight=0.5
        ),
        plainly,
        3,
    ),
    "CrossBatchMemory MarginLoss": row(
        lambda gather=True: CrossBatchMemory(MarginLoss(num_classes=CLASSES, gather=gather), OUTPUTS, capacity=50),
        plainly,
        3,
    ),
    "MatryoshkaLoss CosFaceLoss": row(
        lambda gather=True: MatryoshkaLoss(CosFaceLoss(CLASSES, OUTPUTS, scale=8.0, gather=gather), [2, 6])
    ),
    "MatryoshkaLoss SupConLoss": row(lambda gather=True: MatryoshkaLoss(SupConLoss(gather=gather), [3, 6])),
    "SumLoss": row(
        lambda gather=True: SumLoss(
            [SupConLoss(gather=gather), NormSoftmaxLoss(CLASSES, OUTPUTS, temperature=0.2, gather=gather)], [0.5, 2.0]
        )
    ),
    "FocalLoss": row(FocalLoss, gamma=2.0, class_weights=[0.2, 1.0, 3.0, 1.0, 1.0, 1.0]),
    "BinaryFocalLoss": row(BinaryFocalLoss, with_targets_per_output),
}


class Trained(nn.Module):
    """A network and its loss as one module, so that what the loss has learned is compared as well."""

    def __init__(self, name: str, dtype: torch.dtype, *, gather: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(INPUTS, 12), nn.GELU(), nn.Linear(12, OUTPUTS))
        self.loss = LOSSES[name].make(gather=gather)
        self.call = LOSSES[name].call
        with torch.no_grad():  # MarginLoss starts all classes at one number, CenterLoss at 0
            for parameter in self.loss.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        self.to(dtype)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.call(self.loss, self.network(images), labels)


@dataclass
class Found:
    """What a run leaves: values of each step, gradients and buffers at the end, tiles that were computed."""

    values: list[float]
    gradients: dict[str, Tensor]  # of the network, of the loss
    buffers: dict[str, Tensor]
    tiles: int


def data(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step + 1)
    images = torch.randn(ROWS, INPUTS, generator=generator, dtype=torch.float64).to(dtype)
    return images, torch.randint(0, CLASSES, (ROWS,), generator=generator)


def train(name: str, dtype: torch.dtype, tile: int, rows: slice, *, gather: bool = True) -> Found:
    """The loss on these rows; on several ranks as part of DistributedDataParallel."""
    trained = Trained(name, dtype, gather=gather)
    # ranks do not copy rank 0's buffers: they must stay alike by themselves
    module = DistributedDataParallel(trained, broadcast_buffers=False) if dist.is_initialized() else trained
    numbers, values, original, whole = [], [], _tiles.Plan.tile, _tiles.CPU_TILE

    def counted(*arguments):
        numbers.append(arguments)
        return original(*arguments)

    _tiles.Plan.tile, _tiles.CPU_TILE = counted, tile
    try:
        for step in range(LOSSES[name].steps):
            images, labels = data(step, dtype)
            value = module(images[rows], labels[rows])
            value.backward()
            values.append(value.item())
    finally:
        _tiles.Plan.tile, _tiles.CPU_TILE = original, whole
    parts = {"network": trained.network, "loss": trained.loss}
    found = {part: [p.grad.double().flatten() for p in module.parameters()] for part, module in parts.items()}
    gradients = {part: torch.cat(grads) for part, grads in found.items() if grads}
    return Found(values, gradients, dict(trained.loss.named_buffers()), len(numbers))


def run(rank: int, world: int, store: str, results: str) -> None:
    """Every loss on this rank's share."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    found = {}
    for shards_name, shards in SHARDS.items():
        if len(shards) != world:
            continue
        mine = slice(sum(shards[:rank]), sum(shards[: rank + 1]))
        for name in LOSSES:
            for dtype in (torch.float32, torch.float64):
                for tile_name, tile in TILES.items():
                    found[shards_name, name, str(dtype), tile_name] = train(name, dtype, tile, mine)
            if world == 2:
                found[name, "alone"] = train(name, torch.float64, TILES["divided"], mine, gather=False)
    torch.save(found, f"{results}-{rank}")
    dist.barrier()
    dist.destroy_process_group()
