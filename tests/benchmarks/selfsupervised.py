"""SimCLR beside lightly's: time of a training step, and accuracy against time on a tenth of CIFAR-10.

    pip install 'embedlab[bench]'
    python tests/benchmarks/selfsupervised.py step --out runs/benchmark-step
    python tests/benchmarks/selfsupervised.py curve --data CIFAR10_FOLDER --out runs/benchmark-curve

CIFAR10_FOLDER holds train/CLASS/*.jpg and test/CLASS/*.jpg. Both sides get the same network with the same initial
weights, batch size, optimizer (SGD, 0.06 per 128 images, momentum 0.9, decay 5e-4, cosine), temperature 0.5, head and
view settings: those of lightly's own CIFAR-10 benchmark. Ours is a `SimCLR` with `ImageData` under Lightning's Trainer;
lightly's is the module of its documentation (two passes, one per view) with its SimCLRTransform on PIL images in worker
processes, also under the Trainer. Its default is float32; every variant comes in both precisions.

`step` takes turns between the variants, each turn some steps after a warm-up, data pipeline included, on random images;
the figure is the median over all measured steps. `curve` trains both on 500 images per class and evaluates at some
epochs, the clock standing still meanwhile: weighted k-NN (k 200, temperature 0.1; and k 20) on backbone features of the
plain image, the 5,000 training images as bank, all 10,000 test images as queries; the figure is the last epoch's.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from embedlab.data import ImageData, Source, Views, open_source
from embedlab.encoders import MLPHead, ResNet
from embedlab.methods import SimCLR
from embedlab.methods.trainer import quiet
from embedlab.metrics import knn_accuracy

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
CROP, TEMPERATURE = (0.08, 1.0), 0.5
Images = np.ndarray[Any, np.dtype[np.uint8]]


class ViewClock(pl.Callback):
    """Seconds that our views take, of all training steps together."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        make = trainer.datamodule.on_after_batch_transfer

        def timed(batch: Any, dataloader_idx: int) -> Any:
            begun = time.perf_counter()
            made = make(batch, dataloader_idx)
            self.seconds += time.perf_counter() - begun
            return made

        trainer.datamodule.on_after_batch_transfer = timed


class Clock(pl.Callback):
    """Seconds of every training step from the end of the one before, and hooks at chosen epochs with the clock off."""

    def __init__(self, at: dict[int, Callable[[nn.Module, float], None]] | None = None) -> None:
        self.steps: list[float] = []
        self.total = 0.0
        self.at = at or {}

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.last = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        now = time.perf_counter()
        self.steps.append(now - self.last)
        self.total += now - self.last
        self.last = now

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if hook := self.at.get(trainer.current_epoch + 1):
            hook(pl_module, self.total)


def ours(backbone: nn.Module, images: Images, batch: int) -> tuple[pl.LightningModule, Any]:
    """Our method and data module."""
    views = Views(count=2, crop_scale=CROP, saturation=0.4, blur=0.0)
    source = Source.from_arrays(images, [str(number) for number in range(len(images))])
    data = ImageData(source, image_size=32, split="none", batch_size=batch, views=views)

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.06 * batch / 128, momentum=0.9, weight_decay=5e-4)

    return SimCLR(backbone, MLPHead(128), temperature=TEMPERATURE, optimizer=optimizer, warmup=0.0), data


def lightlys(backbone: nn.Module, images: Images, batch: int, epochs: int) -> tuple[pl.LightningModule, Any]:
    """The module of lightly's documentation, the settings of its CIFAR-10 benchmark."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.transforms import SimCLRTransform
    from PIL import Image

    transform = SimCLRTransform(input_size=32, cj_strength=0.5, min_scale=CROP[0], gaussian_blur=0.0)
    originals = [Image.fromarray(image) for image in images]

    class Pictures(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return len(originals)

        def __getitem__(self, row: int) -> list[Tensor]:
            return transform(originals[row])

    class Theirs(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = backbone
            features = backbone.out_features
            self.projection_head = SimCLRProjectionHead(features, features, 128)
            self.criterion = NTXentLoss(TEMPERATURE)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            first, second = (self.projection_head(self.backbone(view).flatten(start_dim=1)) for view in batch)
            loss: Tensor = self.criterion(first, second)
            self.log("train/loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            sgd = torch.optim.SGD(self.parameters(), lr=0.06 * batch / 128, momentum=0.9, weight_decay=5e-4)
            return [sgd], [torch.optim.lr_scheduler.CosineAnnealingLR(sgd, epochs)]

    workers = os.cpu_count() or 1
    loader = torch.utils.data.DataLoader(
        Pictures(), batch_size=batch, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=True
    )
    return Theirs(), loader


def train(
    side: str,
    network: nn.Module,
    images: Images,
    options: argparse.Namespace,
    precision: str,
    clock: Clock,
    epochs: int,
    *more: pl.Callback,
) -> pl.LightningModule:
    """Train a copy of the network and return the module."""
    pl.seed_everything(options.seed, verbose=False)
    backbone = copy.deepcopy(network)
    if side == "ours":
        module, data = ours(backbone, images, options.batch)
    else:
        module, data = lightlys(backbone, images, options.batch, epochs)
    trainer = pl.Trainer(
        max_epochs=epochs,
        precision=precision,
        accelerator="cpu",
        callbacks=[clock, *more],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, data) if side == "ours" else trainer.fit(module, train_dataloaders=data)
    return module


def network(options: argparse.Namespace) -> ResNet:
    """The backbone that every variant starts from."""
    torch.manual_seed(options.seed)
    return ResNet(options.backbone, stem="small", width=options.width)


def step(options: argparse.Namespace) -> dict[str, Any]:
    """Median time of a training step for both sides in both precisions, in turns."""
    images = np.random.default_rng(0).integers(0, 256, (options.batch * options.steps, 32, 32, 3), dtype=np.uint8)
    variants = [(side, precision) for precision in ("32-true", "bf16-mixed") for side in ("ours", "lightly")]
    seconds: dict[tuple[str, str], list[float]] = {variant: [] for variant in variants}
    shares: list[float] = []
    for turn in range(options.turns):
        for variant in variants:
            clock, views = Clock(), ViewClock()
            own = [views] if variant[0] == "ours" else []
            train(variant[0], network(options), images, options, variant[1], clock, 1, *own)
            if variant == ("ours", "bf16-mixed"):
                shares.append(views.seconds / clock.total)
            seconds[variant] += clock.steps[options.warm :]
            print(turn, variant, [round(value, 2) for value in clock.steps], flush=True)
    rows = [
        {
            "side": side,
            "precision": precision,
            "images_per_second": options.batch / statistics.median(taken),
            "seconds_per_step": statistics.median(taken),
            "steps": len(taken),
        }
        for (side, precision), taken in seconds.items()
    ]
    speed = {(row["side"], row["precision"]): row["images_per_second"] for row in rows}
    return {
        "rows": rows,
        "default_against_default": speed["ours", "bf16-mixed"] / speed["lightly", "32-true"],
        "float32_against_float32": speed["ours", "32-true"] / speed["lightly", "32-true"],
        "bf16_against_bf16": speed["ours", "bf16-mixed"] / speed["lightly", "bf16-mixed"],
        "share_of_our_bf16_step_spent_on_views": statistics.median(shares),
    }


def features(backbone: nn.Module, images: Images) -> np.ndarray[Any, Any]:
    """(N, F) in float32, batch norm in its evaluation mode, which is put back afterwards."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    before = backbone.training
    backbone.eval()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        parts = [
            backbone((torch.from_numpy(images[start : start + 500]).permute(0, 3, 1, 2) / 255 - mean) / std).float()
            for start in range(0, len(images), 500)
        ]
    backbone.train(before)
    return torch.cat(parts).numpy()


def tenth(folder: Path, seed: int, held_out: bool) -> tuple[Images, Any, Images, Any]:
    """500 images per class to train on; the test images, or 500 others per class to tune on."""

    def read(source: Source, rows: Any) -> tuple[Images, Any]:
        images, kept, _ = source.read(rows, 32, channels=3, how="crop")
        return np.ascontiguousarray(images.transpose(0, 2, 3, 1)), np.asarray(source.labels)[kept]

    source = open_source(folder / "train")
    labels, random = np.asarray(source.labels), np.random.default_rng(seed)
    drawn = [random.permutation(np.flatnonzero(labels == name)) for name in np.unique(labels)]
    train_rows = np.sort(np.concatenate([rows[:500] for rows in drawn]))
    if held_out:
        other = read(source, np.sort(np.concatenate([rows[500:1000] for rows in drawn])))
    else:
        test = open_source(folder / "test")
        other = read(test, np.arange(len(test)))
    return *read(source, train_rows), *other


def curve(options: argparse.Namespace) -> dict[str, Any]:
    """k-NN accuracy against seconds of training."""
    images, labels, queries, truth = tenth(options.data, options.seed, options.held_out)
    start = network(options)
    rows: list[dict[str, Any]] = []
    last = {}
    for side, precision in (("lightly", "32-true"), ("ours", "bf16-mixed")):
        if side not in options.sides:
            continue

        def measure(module: Any, seconds: float, side: str = side, precision: str = precision) -> None:
            bank, probes = features(module.backbone, images), features(module.backbone, queries)
            row = {"side": side, "precision": precision, "seconds": round(seconds, 1)}
            for k in (200, 20):
                row[f"knn_{k}"] = knn_accuracy(bank, labels, probes, truth, k=k, temperature=0.1)
            rows.append(row)
            print(json.dumps(row), flush=True)

        every = max(1, options.epochs // options.points)
        clock = Clock(dict.fromkeys(range(every, options.epochs + 1, every), measure))
        module = Shell(copy.deepcopy(start))
        measure(module, 0.0)
        train(side, start, images, options, precision, clock, options.epochs)
        last[side] = rows[-1]
    return {"rows": rows, "last": last, "images_per_side": len(images) * options.epochs}


class Shell(nn.Module):
    """Something with a backbone."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Accuracy over minutes, one line per side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for side, color in (("ours", "#0969da"), ("lightly", "#bf8700")):
        points = [row for row in rows if row["side"] == side]
        if points:
            axes.plot(
                [row["seconds"] / 60 for row in points],
                [row["knn_200"] for row in points],
                "o-",
                color=color,
                label=f"{'embedlab' if side == 'ours' else side} ({points[0]['precision']})",
            )
    axes.set(xlabel="minutes of training", ylabel="weighted k-NN accuracy (k = 200)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run one of the two and write its folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["step", "curve"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="folder with train/ and test/ (curve)")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=256, help="image pairs per step")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--points", type=int, default=8, help="evaluations along the curve")
    parser.add_argument("--steps", type=int, default=5, help="steps per turn")
    parser.add_argument("--warm", type=int, default=2, help="first steps of a turn that do not count")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out", action="store_true", help="5,000 other training images in place of the test ones")
    parser.add_argument("--sides", nargs="+", choices=["ours", "lightly"], default=["ours", "lightly"])
    options = parser.parse_args()
    quiet()
    options.out.mkdir(parents=True, exist_ok=True)
    result = {"step": step, "curve": curve}[options.what](options)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.processor()}
    (options.out / f"{options.what}.json").write_text(json.dumps(result | {"settings": settings} | machine, indent=1))
    if options.what == "curve":
        draw(options.out / "curve.png", result["rows"])
    print(json.dumps({key: value for key, value in result.items() if key != "rows"}, indent=1))


if __name__ == "__main__":
    main()
