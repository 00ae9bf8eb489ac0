"""What the processes of test_ddp_training.py run; importable, because they are spawned."""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import nn

from embedlab import methods
from embedlab._types import Batch
from embedlab.encoders import MLPHead, ResNet
from embedlab.methods.batch_norm import SyncBatchNorm, synchronize_batch_norm
from embedlab.methods.cached_gradient import cached_gradient
from embedlab.methods.dino import DINOHead

WORLD = 2

# ------------------------------------------------------------------------------------------------ batch normalisation

SHARDS = {"even": (4, 4), "uneven": (5, 3), "one row each": (1, 1), "one rank empty": (8, 0), "first empty": (0, 3)}
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.BatchNorm1d(3), ()),
    "1d of sequences": (lambda: nn.BatchNorm1d(3), (5,)),
    "2d": (lambda: nn.BatchNorm2d(3), (4, 5)),
    "2d, cumulative": (lambda: nn.BatchNorm2d(3, momentum=None), (4, 5)),
    "2d, without weights": (lambda: nn.BatchNorm2d(3, affine=False), (4, 5)),
    "2d, without statistics": (lambda: nn.BatchNorm2d(3, track_running_stats=False), (4, 5)),
}


def layer(name: str, dtype: torch.dtype) -> nn.Module:
    made = LAYERS[name][0]()
    for number, parameter in enumerate(made.parameters()):
        parameter.data += torch.linspace(-0.5, 0.5 + number, 3)
    return made.to(dtype)


def rows(name: str, count: int, mean: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs, and the gradient of the outputs, float64."""
    random = torch.Generator().manual_seed(0)
    shape = (count, 3, *LAYERS[name][1])
    return tuple(torch.randn(shape, generator=random, dtype=torch.float64) + add for add in (mean, 0.1))  # type: ignore


def normalize(module: nn.Module, x: torch.Tensor, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Two steps on the same rows."""
    for _ in range(2):
        module.zero_grad()
        x = x.detach().requires_grad_()
        y = module(x)
        (y * weight).sum().backward()
    assert x.grad is not None
    found = {"output": y.detach(), "input": x.grad}
    found |= {f"gradient of {name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
    return found | {name: buffer.clone() for name, buffer in module.named_buffers()}


# --------------------------------------------------------------------------------------------------- cached gradients

CHUNKED_ROWS, CHUNK = (5, 2), 2  # three chunks on one rank, one on the other


def chunked_network() -> nn.Module:
    torch.manual_seed(0)
    convolution = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(convolution, nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).double()


def chunked_images() -> torch.Tensor:
    return torch.randn(sum(CHUNKED_ROWS), 3, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def flat(network: nn.Module) -> dict[str, torch.Tensor]:
    gradient = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
    return {"gradient": gradient, "buffers": torch.cat([b.double().flatten() for b in network.buffers()])}


# ----------------------------------------------------------------------------------------------------------- training

STEPS, IMAGES = 3, 8
ALONE = "SimCLR, each rank's own statistics"


@dataclass
class Row:
    """A method of `embedlab.methods`, its arguments besides backbone and optimizer, and how it normalises."""

    name: str
    arguments: Callable[[], dict[str, object]] = lambda: {"head": MLPHead(8)}
    sync_batch_norm: bool = True
    norm: Literal["batch", "group"] = "batch"


def with_predictor() -> dict[str, object]:
    return {"head": MLPHead(8), "predictor": MLPHead(8, hidden_features=8)}


def in_chunks() -> dict[str, object]:
    return {"head": MLPHead(8, norm="layer"), "chunk": 3}


METHODS = {
    "SimCLR": Row("SimCLR"),
    "MetricLearning": Row("MetricLearning"),
    "MoCoV2": Row("MoCoV2", lambda: {"head": MLPHead(8), "queue": 12, "momentum": 0.9}),
    "SwAV": Row(
        "SwAV", lambda: {"head": MLPHead(8), "prototypes": 6, "frozen_epochs": 0, "queue": 8, "queue_epoch": 0}
    ),
    "BYOL": Row("BYOL", lambda: {"head": MLPHead(8), "predictor": MLPHead(8, hidden_features=8), "momentum": 0.9}),
    "MoCoV3": Row("MoCoV3", lambda: with_predictor() | {"momentum": 0.9}),
    "SimSiam": Row("SimSiam", with_predictor),
    "BarlowTwins": Row("BarlowTwins"),
    "VICReg": Row("VICReg"),
    "DINO": Row("DINO", lambda: {"head": DINOHead(12, hidden_features=8, bottleneck=6), "frozen_epochs": 0}),
    "NNCLR": Row("NNCLR", lambda: with_predictor() | {"queue": 12}),
    "MetricLearning in chunks": Row("MetricLearning", in_chunks, norm="group"),
    "SimCLR in chunks": Row("SimCLR", in_chunks, norm="group"),
    ALONE: Row("SimCLR", sync_batch_norm=False),
}


def method(row: str) -> pl.LightningModule | None:
    """The method of a row, or None where embedlab.methods has none of that name."""
    made_of = METHODS[row]
    kind = getattr(methods, made_of.name, None)
    if kind is None:
        return None
    torch.manual_seed(0)
    backbone = ResNet("resnet8", stem="small", width=0.125, norm=made_of.norm)
    made = kind(
        backbone,
        warmup=0.0,
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
        sync_batch_norm=made_of.sync_batch_norm,
        **made_of.arguments(),
    )
    return made.double()


def batches(mine: slice) -> list[Batch]:
    """A rank's part of every global batch."""
    random = torch.Generator().manual_seed(3)
    made = []
    for number in range(STEPS):
        views = tuple(torch.randn(IMAGES, 3, 8, 8, generator=random, dtype=torch.float64) for _ in range(2))
        index = torch.arange(IMAGES) + number * IMAGES
        made.append(Batch(tuple(view[mine] for view in views), (index % 3)[mine], index[mine]))
    return made


def train(row: str, folder: str, rank: int | None = None) -> dict[str, torch.Tensor] | None:
    """Three steps of SGD; the state that a checkpoint would hold."""
    made = method(row)
    if made is None:
        return None
    part = IMAGES // WORLD
    mine = slice(None) if rank is None else slice(rank * part, (rank + 1) * part)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1 if rank is None else WORLD,
        strategy="auto" if rank is None else "ddp",
        max_epochs=1,
        default_root_dir=folder,
        logger=False,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's, of a run without validation and workers
        trainer.fit(made, torch.utils.data.DataLoader(batches(mine), batch_size=None))  # type: ignore[arg-type]
    assert trainer.global_step == STEPS
    return {name: value.clone() for name, value in made.state_dict().items()}


def run(rank: int, store: str, results: str) -> None:
    """All comparisons on this rank; each rank writes what it has found."""
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "NODE_RANK": "0", "GROUP_RANK": "0"}
    os.environ |= {"WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD), "TORCHELASTIC_RUN_ID": "test"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # unused: the group is there already
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    found: dict[object, object] = {}
    for shard_name, shards in SHARDS.items():
        mine = slice(sum(shards[:rank]), sum(shards[: rank + 1]))
        for name in LAYERS:
            x, weight = rows(name, sum(shards))
            found[shard_name, name] = normalize(synchronize_batch_norm(layer(name, x.dtype)), x[mine], weight[mine])
    x, weight = rows("2d", 8, mean=1e4)
    found["far from zero"] = normalize(
        synchronize_batch_norm(layer("2d", torch.float32)), x[4 * rank :][:4].float(), weight[4 * rank :][:4].float()
    )
    x, weight = (part[4 * rank :][:4].bfloat16() for part in rows("2d", 8))
    x = x.contiguous(memory_format=torch.channels_last)
    found["bfloat16"] = normalize(synchronize_batch_norm(layer("2d", torch.float32)), x, weight)

    network = synchronize_batch_norm(chunked_network())
    start = sum(CHUNKED_ROWS[:rank])
    cached_gradient(network, chunked_images()[start : start + CHUNKED_ROWS[rank]], CHUNK).square().sum().backward()
    found["chunks"] = flat(network)
    assert any(isinstance(module, SyncBatchNorm) for module in network.modules())
    for row in METHODS:
        found["method", row] = train(row, results, rank)
    torch.save(found, f"{results}-{rank}")
    dist.barrier()
    dist.destroy_process_group()
