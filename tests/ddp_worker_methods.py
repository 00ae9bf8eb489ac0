"""Toy methods and batches of test_selfsupervised_methods.py, and what its processes run; importable, as spawned."""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from embedlab._types import Batch
from embedlab.encoders import MLPHead
from embedlab.methods import (
    BYOL,
    DINO,
    NNCLR,
    BarlowTwins,
    DINOHead,
    Method,
    MoCoV2,
    MoCoV3,
    SimCLR,
    SimSiam,
    SwAV,
    VICReg,
)


class Tiny(nn.Module):
    """8-wide network for images of any size."""

    out_features = 8

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        middle = nn.BatchNorm2d(8) if norm else nn.GroupNorm(2, 8)
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), middle, nn.GELU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 8)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net(images)


def head(size: int = 8) -> MLPHead:
    return MLPHead(size, hidden_features=16, norm="layer")


def dino_head() -> DINOHead:
    return DINOHead(12, hidden_features=16, bottleneck=6)


# a maker with small sizes; keyword arguments go on to the method
METHODS = {
    "SimCLR": lambda net, **k: SimCLR(net, head(), **k),
    "MoCoV2": lambda net, **k: MoCoV2(net, head(), **{"queue": 48, **k}),
    "MoCoV3": lambda net, **k: MoCoV3(net, head(), predictor=head(), **k),
    "BYOL": lambda net, **k: BYOL(net, head(), predictor=head(), **k),
    "SimSiam": lambda net, **k: SimSiam(net, head(), predictor=head(), **k),
    "BarlowTwins": lambda net, **k: BarlowTwins(net, head(), **k),
    "VICReg": lambda net, **k: VICReg(net, head(), **k),
    "SwAV": lambda net, **k: SwAV(net, head(), **{"prototypes": 6, "queue": 7, "queue_epoch": 0, **k}),
    "DINO": lambda net, **k: DINO(net, dino_head(), **k),
    "NNCLR": lambda net, **k: NNCLR(net, head(), predictor=head(), **{"queue": 48, **k}),
}


def make(name: str, *, seed: int = 0, **arguments) -> Method:
    torch.manual_seed(seed)
    return METHODS[name](Tiny(), **arguments)


def batch(rows: int, *, views: int = 2, small: int = 0, seed: int = 0) -> Batch:
    """Noisy versions (rows, 3, 8, 8) of the same pictures, the last `small` of them half as large."""
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randn(rows, 3, 8, 8, generator=generator)
    versions = [pictures + 0.3 * torch.randn(rows, 3, 8, 8, generator=generator) for _ in range(views)]
    full = views - small
    versions[full:] = [nn.functional.avg_pool2d(view, 2) for view in versions[full:]]
    return Batch(tuple(versions), None, torch.arange(rows) + 100 * seed)


# ---- two processes --------------------------------------------------------------------------------------------------

ROWS, SHARES = 7, [4, 3]


class Step(nn.Module):
    """DistributedDataParallel wants to be called by `forward`; Lightning does the same."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method

    def forward(self, given: Batch) -> torch.Tensor:
        return self.method.training_step(given, 0)


def share(given: Batch, rank: int | None) -> Batch:
    if rank is None:
        return given
    start = sum(SHARES[:rank])
    mine = slice(start, start + SHARES[rank])
    return Batch(tuple(view[mine] for view in given.views), None, given.index[mine])


def steps(name: str, rows: int, rank: int | None) -> dict:
    """Three SGD steps in float64; losses and the state after them."""
    method = make(name).double().train()
    method.log = lambda *arguments, **named: None
    module = Step(method)
    if rank is not None:
        module = DistributedDataParallel(module, broadcast_buffers=False)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    losses = []
    for number in range(3):
        given = batch(rows, seed=number)
        given = Batch(tuple(view.double() for view in given.views), None, given.index)
        loss = module(share(given, rank))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {"losses": torch.tensor(losses), "state": method.state_dict()}


def shuffled_keys(rank: int | None) -> torch.Tensor:
    torch.manual_seed(0)
    method = MoCoV2(Tiny(norm=True), head(), queue=8).double().eval()
    return method.keys(share(batch(ROWS), rank).views[1].double())


def computed_rows(rank: int) -> tuple[list[float], list[float]]:
    """First pixels of the images that this rank's momentum encoder sees, and of its own."""
    torch.manual_seed(0)
    method = MoCoV2(Tiny(norm=True), head(), queue=8).double().eval()
    seen = []
    method.teacher.register_forward_pre_hook(lambda module, inputs: seen.extend(inputs[0][:, 0, 0, 0].tolist()))
    own = share(batch(ROWS), rank).views[1].double()
    method.keys(own)
    return seen, own[:, 0, 0, 0].tolist()


def run(rank: int, world: int, store: str, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    found: dict = {name: steps(name, ROWS, rank) for name in METHODS}
    found["keys"] = shuffled_keys(rank)
    found["computed"], found["own"] = computed_rows(rank)
    torch.save(found, f"{results}{rank}")
    dist.barrier()
    dist.destroy_process_group()
