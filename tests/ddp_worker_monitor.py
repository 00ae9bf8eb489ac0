"""What the processes of test_monitor.py run; importable, because they are spawned."""

import os
import warnings
from datetime import timedelta

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist

from embedlab.data import ImageData, Source, Views
from embedlab.encoders import MLPHead, ResNet
from embedlab.methods import SimCLR
from embedlab.retrieval.monitor import Monitor

WORLD = 2


def source(images: int = 68, *, labels: bool = True) -> Source:
    """Five classes that differ in colour, with noise; 45 are held out, which no two ranks share evenly."""
    random = np.random.default_rng(0)
    numbers = np.arange(images) % 5
    pixels = random.integers(30, 226, (5, 1, 1, 3))[numbers] + random.normal(0, 40, (images, 8, 8, 3))
    names = [f"class {number}" for number in numbers] if labels else None
    roles = ["train" if row % 3 == 0 else "calibrate" for row in range(images)]
    return Source.from_arrays(pixels.clip(0, 255).astype(np.uint8), names, columns={"split": roles})


def data(**arguments) -> ImageData:
    views = Views(count=2, crop_scale=(0.5, 1.0))
    settings = {"image_size": 8, "batch_size": 4, "split": "column", "views": views}
    return ImageData(arguments.pop("root", None) or source(), **{**settings, **arguments})


def method(rate: float = 0.0) -> SimCLR:
    torch.manual_seed(0)
    backbone = ResNet("resnet8", stem="small", width=0.125, norm="group")
    return SimCLR(backbone, MLPHead(8, norm="layer"), optimizer=lambda groups: torch.optim.SGD(groups, lr=rate))


def fit(folder: str, monitor: Monitor, *, world: int = 1, model=None, module=None, **arguments) -> pl.Trainer:
    settings = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    trainer = pl.Trainer(
        **{
            **settings,
            "default_root_dir": folder,
            "callbacks": [monitor],
            "devices": world,
            "strategy": "auto" if world == 1 else "ddp",
            "use_distributed_sampler": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            **arguments,
        }
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model or method(), datamodule=module or data())
    return trainer


def figures(trainer: pl.Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}


def run(rank: int, store: str, results: str, images: int) -> None:
    """Watch one epoch on this rank, with all held-out images and with some of them."""
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "NODE_RANK": "0", "GROUP_RANK": "0"}
    os.environ |= {"WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD), "TORCHELASTIC_RUN_ID": "test"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # unused: the group is there already
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    found = [figures(fit(results, Monitor(images=number), world=WORLD)) for number in (4096, images)]
    torch.save(found, f"{results}-{rank}")
    dist.barrier()
    dist.destroy_process_group()
