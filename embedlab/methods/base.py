"""What every method shares: backbone and head, optimizer and schedule, the guard against a broken loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.cli import OptimizerCallable
from torch import Tensor, nn

from embedlab._types import Batch
from embedlab.data import ImageData
from embedlab.encoders import Encoder, connect
from embedlab.methods.batch_norm import synchronize_batch_norm
from embedlab.methods.cached_gradient import cached_gradient


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; training stopped before the weights were touched."""


class Method(pl.LightningModule):
    """Base of all methods; a method adds its loss and `training_step`.

    With `--trainer.precision bf16-mixed` the network also runs in channels-last layout; the two together make up the
    speed on recent processors and on GPUs alike.

    Args:
        backbone: Normalised images (B, C, H, W) to features (B, F).
        head: Features to what the loss sees (B, D); built for the backbone's feature size.
        optimizer: Parameter groups to optimizer; a recipe chooses class and values. Biases and normalisation are in a
            group without weight decay.
        warmup: Share of all steps over which the learning rate rises linearly; a cosine to zero follows.
        scale_rate: How the optimizer's learning rate, given for 256 images, follows the number of images per step (of
            all ranks and accumulated batches): "linear" times images / 256, Goyal et al. 2017, section 2.1
            (https://arxiv.org/abs/1706.02677); "sqrt" times its root, Krizhevsky 2014, section 5
            (https://arxiv.org/abs/1404.5997); "none" takes it as it is.
        sync_batch_norm: Normalise by the batches of all ranks together, see `SyncBatchNorm`; on CPUs too, unlike
            `--trainer.sync_batchnorm`, which has faster kernels on GPUs.
        chunk: Images that go through the network at a time; the batch with all its negatives can then be larger than
            memory, see `cached_gradient`. None embeds the batch at once.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module | None = None,
        *,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup: float = 0.1,
        scale_rate: Literal["none", "linear", "sqrt"] = "none",
        sync_batch_norm: bool = False,
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= warmup <= 1:
            raise ValueError(f"warmup is a share of all steps in [0, 1], got {warmup}.")
        if scale_rate not in ("none", "linear", "sqrt"):
            raise ValueError(f"scale_rate is none, linear or sqrt, got {scale_rate!r}.")
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk is a number of images >= 1, got {chunk}; null embeds the whole batch at once.")
        self.backbone = backbone
        self.head = head
        self.dim = connect(backbone, head)
        self.identities: frozenset[str] = frozenset()  # hashes of those that the weights were trained on before
        self.started_from: dict[str, Any] | None = None  # preprocessing of the saved encoder that the weights are of
        self.optimizer = optimizer
        self.warmup = warmup
        self.scale_rate = scale_rate
        self.sync_batch_norm = sync_batch_norm
        self.chunk = chunk

    def start_from(self, encoder: Encoder) -> None:
        """Remember where the weights come from: whom they know, and how their images were normalised."""
        self.identities = encoder.identities
        self.started_from = encoder.preprocessing

    @property
    def uses_labels(self) -> bool:
        """Whether labels shape what `fit` leaves behind; the encoder then remembers them, see `Encoder.trained_on`."""
        return False

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, C, H, W) to embeddings (B, D), not yet of unit length."""
        features: Tensor = self.backbone(images)
        return features if self.head is None else self.head(features)

    def project(self, images: Tensor) -> Tensor:
        """Normalised images (B, C, H, W), all views of a batch, to what the loss sees (B, D); in chunks if asked to."""
        network = self.backbone if self.head is None else nn.Sequential(self.backbone, self.head)
        projections: Tensor = network(images) if self.chunk is None else cached_gradient(network, images, self.chunk)
        return projections

    @property
    def embedding_head(self) -> nn.Module | None:
        """The head that belongs to the encoder which `fit` leaves behind; None where it is thrown away."""
        return self.head

    def configure_model(self) -> None:
        """Synchronise batch normalisation before the ranks' networks are joined."""
        if self.sync_batch_norm:
            synchronize_batch_norm(self)

    def setup(self, stage: str) -> None:
        """Training mode, which Lightning leaves to us, and channels-last, which convolutions are fastest in."""
        data = getattr(self.trainer, "datamodule", None)
        expected = getattr(self.backbone, "in_channels", None)
        if isinstance(data, ImageData) and expected not in (None, data.channels):
            raise ValueError(
                f"The data has {data.channels} channels, the backbone takes {expected}; set "
                "data.init_args.channels or model.init_args.backbone.init_args.in_channels to the other's value."
            )
        if isinstance(data, ImageData) and self.started_from is not None:
            ours, theirs = (
                {name: list(found[name]) for name in ("mean", "std")}  # type: ignore[arg-type]
                for found in (data.preprocessing, self.started_from)
            )
            if ours != theirs:
                raise ValueError(
                    f"The encoder was trained with {theirs}, the data are normalised with {ours}; set "
                    "data.init_args.mean and std to the encoder's, or its features will be off."
                )
        if stage == "fit":
            self.train()
        self.to(memory_format=torch.channels_last)

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor | None]:  # noqa: ARG002
        """The plain images; `Monitor` embeds as many of them as its share of the time allows."""
        return {"images": batch.views[0], "labels": batch.labels, "index": batch.index}

    def on_before_backward(self, loss: Tensor) -> None:
        """Stop on NaN or infinity before it reaches the weights."""
        if not torch.isfinite(loss):
            raise NonFiniteLossError(
                f"The loss is {loss.item()} at step {self.global_step} (epoch {self.current_epoch}); the weights are "
                "those of the step before. Usual causes: a learning rate too high, a temperature too low, or broken "
                "images. Lower the learning rate; a run of 'embedlab fit' goes on from its last checkpoint by --resume."
            )

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimizer gets: one group with weight decay and one, of biases and normalisation, without."""
        return decay_groups(self.parameters())

    def configure_optimizers(self) -> Any:
        """One optimizer over all parameters, linear warm-up and cosine decay per step."""
        groups = self.parameter_groups()
        optimizer = self.optimizer(groups)
        steps = max(1, int(self.trainer.estimated_stepping_batches))
        rise, scale = self.warmup * steps, self._rate_scale()
        rates: list[Callable[[int], float]] = [
            partial(_warmup_cosine, rise=rise, steps=steps, rate=scale * group.get("rate", 1.0)) for group in groups
        ]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rates)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _rate_scale(self) -> float:
        """What the number of images per optimizer step makes of the learning rate."""
        if self.scale_rate == "none":
            return 1.0
        per_rank = getattr(getattr(self.trainer, "datamodule", None), "batch_size", None)
        per_rank = per_rank or getattr(self.trainer.train_dataloader, "batch_size", None)
        if not isinstance(per_rank, int):
            raise ValueError(
                f"scale_rate={self.scale_rate} needs to know the batch size, but neither the data module nor its "
                "loader has a batch_size; add one, or set scale_rate to none and give the learning rate itself."
            )
        images = per_rank * self.trainer.world_size * self.trainer.accumulate_grad_batches
        return images / 256 if self.scale_rate == "linear" else math.sqrt(images / 256)


def backbone_or_encoder(name: str, backbone: nn.Module | None, encoder: str | Path | None) -> Encoder | None:
    """The saved encoder to start from, or None where a backbone is given; exactly one of them must be."""
    if (backbone is None) == (encoder is None):
        raise ValueError(f"{name} takes either a backbone or a saved encoder to start from.")
    return None if encoder is None else Encoder.load(encoder)


def decay_groups(parameters: Iterable[nn.Parameter], rate: float = 1.0) -> list[dict[str, Any]]:
    """Parameter groups with and without weight decay; `rate` is their share of the learning rate."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    decayed = {"params": [parameter for parameter in trained if parameter.ndim > 1], "rate": rate}
    plain = {"params": [parameter for parameter in trained if parameter.ndim <= 1], "rate": rate, "weight_decay": 0.0}
    return [group for group in (decayed, plain) if group["params"]]


def _warmup_cosine(step: int, rise: float, steps: int, rate: float = 1.0) -> float:
    if step < rise:
        return rate * (step + 1) / (rise + 1)
    return rate * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rise) / max(1.0, steps - rise))))
