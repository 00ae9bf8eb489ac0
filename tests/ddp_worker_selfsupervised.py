"""What the processes of test_selfsupervised_losses.py run; importable, because they are spawned."""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from embedlab.losses.selfsupervised import (
    BarlowTwinsLoss,
    DINOLoss,
    KoLeoLoss,
    NegativeCosineLoss,
    SwAVLoss,
    VICRegLoss,
)

VIEWS, INPUTS, OUTPUTS, QUEUE = 3, 8, 6, 5
# rows of each rank: uneven, one of them none at all
SHARDS = {"2 ranks": [5, 2], "3 ranks": [4, 1, 3], "3 ranks, one empty": [4, 0, 3]}
ALONE = "2 ranks"  # where gather=False runs as well


def queue(dtype: torch.dtype) -> list[torch.Tensor]:
    scores = torch.randn(2, QUEUE, OUTPUTS, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return list((scores * 0.3).to(dtype))


def dino_twice(loss: nn.Module, views: list[torch.Tensor]) -> torch.Tensor:
    """The second call has the centre and the temperature that the first one left."""
    teacher = [2 * view.roll(1, dims=1) + 0.5 for view in views[:2]]
    return loss(teacher, views) + loss(teacher, views)


# constructor, and the loss of the views (B, OUTPUTS)
LOSSES = {
    "BarlowTwinsLoss": (BarlowTwinsLoss, lambda loss, v: loss(v[0], v[1])),
    "VICRegLoss": (VICRegLoss, lambda loss, v: loss(v[0], v[1])),
    "NegativeCosineLoss": (NegativeCosineLoss, lambda loss, v: loss(v[0], v[1].detach()) + loss(v[1], v[2]) / 2),
    "SwAVLoss": (SwAVLoss, lambda loss, v: loss(v)),
    "SwAVLoss queue": (SwAVLoss, lambda loss, v: loss(v, queue(v[0].dtype))),
    "DINOLoss": (
        lambda gather=True: DINOLoss(
            OUTPUTS, teacher_temperature=0.5, warmup_temperature=0.2, warmup_steps=5, momentum=0.6, gather=gather
        ),
        dino_twice,
    ),
    "KoLeoLoss": (KoLeoLoss, lambda loss, v: loss(v[0])),
}


def network(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(INPUTS, 12), nn.GELU(), nn.Linear(12, OUTPUTS)).to(dtype)


def data(rows: int, dtype: torch.dtype) -> torch.Tensor:
    """Inputs (rows, VIEWS, INPUTS), the views of a row alike but not the same."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(rows, 1, INPUTS, generator=generator, dtype=torch.float64)
    return (images + 0.5 * torch.randn(rows, VIEWS, INPUTS, generator=generator, dtype=torch.float64)).to(dtype)


def gradient(net: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.double().flatten() for p in net.parameters()])


def buffers(loss: nn.Module) -> torch.Tensor:
    return torch.cat([torch.zeros(1), *(buffer.flatten().float() for buffer in loss.buffers())])


def step(name: str, net: nn.Module, images: torch.Tensor, *, gather: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Value and buffers of the loss; the gradients stay in the network."""
    make, apply = LOSSES[name]
    loss = make(gather=gather).to(images.dtype)
    value = apply(loss, list(net(images).unbind(1)))
    value.backward()
    return value.detach(), buffers(loss)


def on_one_process(name: str, images: torch.Tensor) -> tuple[float, torch.Tensor, torch.Tensor]:
    net = network(images.dtype)
    value, state = step(name, net, images)
    return value.item(), gradient(net), state


def every_rank(x: torch.Tensor) -> list[torch.Tensor]:
    parts = [torch.zeros_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return parts


def run(rank: int, world: int, store: str, results: str) -> None:
    """Every loss on this rank's share; rank 0 writes values, gradients and buffers."""
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
            images = data(sum(shards), dtype)[mine]
            for name in LOSSES:
                for gather in (True, False) if shard_name == ALONE else (True,):
                    net = DistributedDataParallel(network(dtype))
                    value, state = step(name, net, images, gather=gather)
                    values = [part.item() for part in every_rank(value)]
                    found[shard_name, name, str(dtype), gather] = (values, gradient(net.module), every_rank(state))
    if rank == 0:
        torch.save(found, results)
    dist.barrier()
    dist.destroy_process_group()
