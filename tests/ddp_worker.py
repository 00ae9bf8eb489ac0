"""What the processes of test_ddp.py run; importable, because they are spawned."""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from embedlab.encoders import LinearHead, ResNet
from embedlab.losses import ContrastiveLoss, NTXentLoss, SupConLoss, TripletLoss

LOSSES = {
    "SupConLoss": lambda: SupConLoss(0.1),
    "NTXentLoss": lambda: NTXentLoss(0.2),
    "ContrastiveLoss": lambda: ContrastiveLoss(),
    "TripletLoss all": lambda: TripletLoss(margin=0.3),
    "TripletLoss batch-hard": lambda: TripletLoss(margin=0.3, mining="batch-hard"),
    "TripletLoss soft": lambda: TripletLoss(margin=0.1, soft=True),
}
# rows of each rank: uneven, one of them none at all
SHARDS = {"2 ranks": [9, 5], "3 ranks": [4, 1, 9], "3 ranks, one empty": [8, 0, 6]}
CLASSES = 4


def network(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    backbone = ResNet("resnet10", stem="small", width=0.125, norm="group")
    return nn.Sequential(backbone, LinearHead(6, in_features=backbone.out_features)).to(dtype)


def data(rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(rows, 3, 16, 16, generator=generator, dtype=torch.float64).to(dtype)
    return images, torch.randint(0, CLASSES, (rows,), generator=generator)


def gradient(net: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.double().flatten() for p in net.parameters()])


def on_one_process(loss: nn.Module, rows: int, dtype: torch.dtype) -> tuple[float, torch.Tensor]:
    net, (images, labels) = network(dtype), data(rows, dtype)
    value = loss(net(images), labels)
    value.backward()
    return value.item(), gradient(net)


def run(rank: int, world: int, store: str, results: str) -> None:
    """Every loss on this rank's share; rank 0 writes values and gradients."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    found = {}
    for shard_name, shards in SHARDS.items():
        if len(shards) != world:
            continue
        mine = slice(sum(shards[:rank]), sum(shards[: rank + 1]))
        for dtype in (torch.float32, torch.float64):
            images, labels = data(sum(shards), dtype)
            for name, make in LOSSES.items():
                net = DistributedDataParallel(network(dtype))
                loss = make()(net(images[mine]), labels[mine])
                loss.backward()
                values = [torch.zeros_like(loss) for _ in range(world)]
                dist.all_gather(values, loss.detach())
                found[shard_name, name, str(dtype)] = ([value.item() for value in values], gradient(net.module))
    if rank == 0:
        torch.save(found, results)
    dist.barrier()
    dist.destroy_process_group()
