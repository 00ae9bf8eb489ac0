"""What the processes of test_shards.py run; importable, because they are spawned."""

import os
import pathlib
from datetime import timedelta

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from embedlab._types import Batch
from embedlab.losses import (
    AdaFaceLoss,
    ArcFaceLoss,
    CrossBatchMemory,
    MatryoshkaLoss,
    NormSoftmaxLoss,
    SoftTripleLoss,
    SupConLoss,
    _tiles,
)
from embedlab.losses._base import apply_loss
from embedlab.methods import MetricLearning

CLASSES, DIM = 7, 4
LOSSES = {
    "NormSoftmaxLoss": lambda: NormSoftmaxLoss(CLASSES, DIM, temperature=0.2),
    "NormSoftmaxLoss sampled": lambda: NormSoftmaxLoss(CLASSES, DIM, temperature=0.2, sample=0.4),
    "ArcFaceLoss": lambda: ArcFaceLoss(CLASSES, DIM, sub_centers=2, scale=8.0, noise_degrees=100.0, gamma=1.0),
    "AdaFaceLoss": lambda: AdaFaceLoss(CLASSES, DIM, scale=8.0),
    "SoftTripleLoss": lambda: SoftTripleLoss(CLASSES, DIM, centers=3),
}
SHARDS = {1: [11], 2: [8, 3], 3: [6, 0, 5]}  # rows of each rank


def make(name: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return nn.Linear(5, DIM).double(), LOSSES[name]().double()


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(11, 5, generator=generator, dtype=torch.double), torch.randint(
        0, CLASSES, (11,), generator=generator
    )


def run(rank: int, world: int, store: str, results: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    found = {}
    images, labels = data()
    first = sum(SHARDS[world][:rank])
    mine = slice(first, first + SHARDS[world][rank])
    for name in LOSSES:
        network, loss = make(name)
        loss.shard()
        wrapped = DistributedDataParallel(network) if world > 1 else network  # must outlive the backward pass
        value = loss(wrapped(images[mine]), labels[mine])
        value.backward()
        rows = loss.all_rows(loss.proxies.grad) if world > 1 else loss.proxies.grad
        found[name] = {
            "value": value.item(),
            "network": torch.cat([p.grad.flatten() for p in network.parameters()]),
            "proxies": rows,
            "held": len(loss.proxies),
            "state": loss.state_dict(),
        }
    found["edges"] = edges(rank, world)
    if rank == 0:
        torch.save(found, results)
    dist.barrier()
    dist.destroy_process_group()
    if world == 2:
        fit(folder, rank)


class Foreign(nn.Module):
    """A loss of somebody else's, which knows nothing of ranks."""

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return SupConLoss(0.1, gather=False)(embeddings, labels) if len(embeddings) else embeddings.sum()


class Plain(nn.Module):
    """The same, hidden from the question who gathers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = [Foreign()]

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.inner[0](embeddings, labels)


def edges(rank: int, world: int) -> dict:
    """A rank that passes no rows and no graph; wrappers around a foreign loss."""
    images, labels = data()
    embeddings = images[:, :DIM].clone().requires_grad_() if rank == 0 else torch.zeros(0, DIM, dtype=torch.double)
    labels = labels if rank == 0 else torch.tensor([])
    gradients = []
    usual, _tiles.CPU_TILE = _tiles.CPU_TILE, 20
    for name in ("SupConLoss", "ArcFaceLoss"):
        loss = SupConLoss(0.1) if name == "SupConLoss" else make(name)[1]
        if name == "ArcFaceLoss":
            loss.shard()
        value = loss(embeddings, labels)
        value.backward()
        gradients.append(embeddings.grad / world if rank == 0 else None)
        embeddings.grad = None
    _tiles.CPU_TILE = usual
    wrapped = apply_loss(MatryoshkaLoss(Plain(), [2, 4]), embeddings, labels)
    memory = CrossBatchMemory(MatryoshkaLoss(Plain(), [2, 4]), DIM, capacity=32).double()
    memory(embeddings, labels)
    both = torch.stack([wrapped.detach(), memory.seen.double()])
    first = both.clone()
    dist.broadcast(first, 0)
    assert torch.equal(first, both), "ranks differ"
    return {"gradients": gradients, "wrapped": wrapped.item(), "seen": int(memory.seen)}


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, number: int) -> int:
        return number


def collate(numbers: list[int]) -> Batch:
    images, labels = data()
    index = torch.tensor(numbers)
    return Batch((images[index].float(),), labels[index], index)


def method() -> MetricLearning:
    torch.manual_seed(0)
    backbone = nn.Linear(5, DIM)
    backbone.out_features = DIM
    loss = NormSoftmaxLoss(CLASSES, DIM, temperature=0.2)
    return MetricLearning(
        backbone, loss=loss, shard_classes=True, optimizer=lambda groups: torch.optim.Adam(groups, lr=0.1)
    )


class SaveFirstEpoch(pl.Callback):
    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


def fit(folder: str, rank: int | None = None, *, resume: str | None = None) -> MetricLearning:
    """Two epochs of two steps with four images in all, on two processes or on one."""
    if rank is not None:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": (pathlib.Path(folder) / "port").read_text()}
        os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "NODE_RANK": "0", "GROUP_RANK": "0"}
        os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "test"}
    mine = range(8) if rank is None else range(rank, 8, 2)
    loader = torch.utils.data.DataLoader(Rows(), batch_size=4 if rank is None else 2, sampler=mine, collate_fn=collate)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1 if rank is None else 2,
        strategy="auto" if rank is None else "ddp",
        max_epochs=2,
        default_root_dir=folder,
        logger=False,
        use_distributed_sampler=False,
        callbacks=[SaveFirstEpoch(f"{folder}/{'two' if rank is not None else 'one'}.ckpt")],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = method()
    trainer.fit(model, loader, ckpt_path=resume)
    return model
