"""Supervised metric learning: any loss over embeddings and labels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from pytorch_lightning.cli import OptimizerCallable
from torch import Tensor, nn

from embedlab._ops import at_least_float32, gather
from embedlab._types import Batch
from embedlab.losses import SupConLoss
from embedlab.losses._base import apply_loss, gathers, one_type
from embedlab.losses.proxies import MarginSoftmaxLoss, ProxyLoss
from embedlab.methods.base import Method, backbone_or_encoder, decay_groups


class MetricLearning(Method):
    """Train an embedding so that images of one class lie together and classes apart.

    Args:
        backbone: Normalised images (B, C, H, W) to features (B, F); or give `encoder`.
        head: Features to what the loss compares; None trains the features themselves, or the encoder's own head.
        encoder: Folder of a saved encoder to go on from; the data's mean and std must be its own.
        keep_head: Whether the head belongs to the encoder. False throws it away after training, as Khosla et al. do:
            with few training classes the backbone's features tell unseen ones better apart.
        loss: A loss of `embedlab.losses`, or any module that takes (embeddings, labels), such as those of
            pytorch-metric-learning. Its parameters are trained too. A foreign loss is given the union of all ranks'
            batches.
        miner: A miner of pytorch-metric-learning for a loss of that package; ours take one as `mining`.
        loss_rate: Learning rate of the loss's own parameters as a multiple of the network's; ProxyAnchorLoss's paper
            takes 100.
        shard_classes: Share the loss's class proxies out among the ranks, for numbers of classes that do not fit each.
        optimizer: Parameter groups to optimizer.
        warmup: Share of all steps over which the learning rate rises.
        scale_rate: How the learning rate follows the batch size, see `Method`.
        sync_batch_norm: Normalise by the batches of all ranks together, see `Method`.
        chunk: Images that go through the network at a time, see `Method`.
    """

    def __init__(
        self,
        backbone: nn.Module | None = None,
        head: nn.Module | None = None,
        *,
        encoder: str | Path | None = None,
        keep_head: bool = True,
        loss: nn.Module | None = None,
        miner: nn.Module | None = None,
        loss_rate: float = 1.0,
        shard_classes: bool = False,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup: float = 0.1,
        scale_rate: Literal["none", "linear", "sqrt"] = "none",
        sync_batch_norm: bool = False,
        chunk: int | None = None,
    ) -> None:
        start = backbone_or_encoder("MetricLearning", backbone, encoder)
        super().__init__(
            start.backbone if start else backbone,  # type: ignore[arg-type]
            start.head if start and head is None else head,
            optimizer=optimizer,
            warmup=warmup,
            scale_rate=scale_rate,
            sync_batch_norm=sync_batch_norm,
            chunk=chunk,
        )
        if start is not None:
            self.start_from(start)
        self.keep_head = keep_head
        self.loss = SupConLoss() if loss is None else loss
        if miner is not None and gathers(self.loss):
            raise ValueError(
                f"{type(self.loss).__name__} chooses its pairs itself: give it mining=..., such as "
                "mining='batch-hard', and leave MetricLearning's miner to losses of pytorch-metric-learning."
            )
        self.miner, self.loss_rate, self.shard_classes = miner, loss_rate, shard_classes
        if shard_classes and not self.sharded():
            raise ValueError(
                f"shard_classes shares out the classes of ArcFaceLoss and its kin, but the loss is "
                f"{type(self.loss).__name__}; leave it off."
            )

    def setup(self, stage: str) -> None:
        """Compare the loss's number of classes with the data's, or tell it that number."""
        there = getattr(getattr(self.trainer, "datamodule", None), "num_targets", None)
        for part in self.loss.modules():
            if isinstance(part, ProxyLoss) and there and not part.num_classes:
                part.build(there)
            made_for = getattr(part, "num_classes", None)
            if stage == "fit" and there and made_for and made_for < there:
                raise ValueError(
                    f"{type(part).__name__} was made for {made_for} classes, the training data has {there}; set "
                    f"model.init_args.loss.init_args.num_classes to {there}, or to null, which takes the data's."
                )
        super().setup(stage)

    def sharded(self) -> dict[str, MarginSoftmaxLoss]:
        """The losses, by name, whose proxies differ between ranks."""
        if not self.shard_classes:
            return {}
        return {name: part for name, part in self.named_modules() if isinstance(part, MarginSoftmaxLoss)}

    def configure_model(self) -> None:
        """Share the classes out as soon as the ranks know each other."""
        super().configure_model()
        for part in self.sharded().values():
            part.shard()
        # read by DistributedDataParallel, which would make the shards of all ranks equal
        self._ddp_params_and_buffers_to_ignore = [f"{name}.proxies" for name in self.sharded()]

    def on_fit_start(self) -> None:
        """Refuse what would let the ranks drift apart."""
        if self.sharded() and self.trainer.gradient_clip_val:
            raise ValueError(
                "trainer.gradient_clip_val with model.shard_classes would clip by another norm on each rank; set one "
                "of them off."
            )
        if self.sharded() and str(self.trainer.precision).startswith("16"):
            raise ValueError(
                "trainer.precision 16-mixed with model.shard_classes would skip a step on the ranks whose classes "
                "overflow, and on them alone; use bf16-mixed."
            )

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The network's, and the loss's own parameters at their own learning rate."""
        learned = {id(parameter) for parameter in self.loss.parameters()}
        network = [parameter for parameter in self.parameters() if id(parameter) not in learned]
        return decay_groups(network) + decay_groups(self.loss.parameters(), rate=self.loss_rate)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The optimizer's state of all ranks' classes goes into the checkpoint, as the classes do."""
        self._convert(checkpoint, lambda part, rows: part.all_rows(rows), of_shard=True)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Of the optimizer's state take this rank's classes."""
        self._convert(checkpoint, lambda part, rows: part.own_rows(rows), of_shard=False)

    def _convert(
        self, checkpoint: dict[str, Any], change: Callable[[MarginSoftmaxLoss, Tensor], Tensor], *, of_shard: bool
    ) -> None:
        """Change, in a checkpoint, the optimizer's tensors that have a row for each proxy."""
        order = [parameter for group in self.parameter_groups() for parameter in group["params"]]
        for part in self.sharded().values():
            if not part.sharded:
                continue
            number = next(place for place, parameter in enumerate(order) if parameter is part.proxies)
            rows = len(part.proxies) if of_shard else part.num_classes * part.per_class
            for state in checkpoint.get("optimizer_states", []):
                state["state"][number] = {  # a new one: the optimizer goes on with the old
                    name: change(part, value) if isinstance(value, Tensor) and value.shape[:1] == (rows,) else value
                    for name, value in state["state"].get(number, {}).items()
                }

    @property
    def uses_labels(self) -> bool:
        """They choose the pairs."""
        return True

    @property
    def embedding_head(self) -> nn.Module | None:
        """The head, where it is kept."""
        return self.head if self.keep_head else None

    def forward(self, images: Tensor) -> Tensor:
        """What goes into the gallery, not yet of unit length: (B, D) of the head, or (B, F) of the backbone."""
        features: Tensor = self.backbone(images)
        return features if self.embedding_head is None else self.embedding_head(features)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # noqa: ARG002
        """Every view is one more image of its class."""
        if batch.labels is None:
            raise ValueError("MetricLearning needs labels; for images without labels use SimCLR.")
        embeddings = self.project(torch.cat(batch.views))  # (V B, D)
        labels = batch.labels.repeat(len(batch.views))
        loss = apply_loss(self.loss, embeddings, labels) if self.miner is None else self._mined(embeddings, labels)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(labels))
        return loss

    def _mined(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """A foreign loss on the pairs or triplets that a foreign miner chooses, the same on all ranks."""
        assert self.miner is not None
        embeddings, labels = gather(at_least_float32(embeddings)), gather(one_type(labels))
        with torch.random.fork_rng(devices=[embeddings.device] if embeddings.is_cuda else []):
            generators = torch.cuda if embeddings.is_cuda else torch.default_generator
            generators.manual_seed(self.global_step)  # each rank's own generator would choose otherwise
            chosen = self.miner(embeddings, labels)
        loss: Tensor = self.loss(embeddings, labels, chosen)
        return loss
