"""Lightning's `predict` shares the parts of an extraction among devices and nodes. Imported on demand."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytorch_lightning as pl
from torch import nn
from torch.utils.data import DataLoader

from embedlab.retrieval.embedders import Embedder
from embedlab.retrieval.extraction import Extraction, run_parts


def predict(
    work: Extraction,
    embedder: Embedder,
    options: dict[str, Any],
    devices: int,
    nodes: int,
    *,
    resume: bool,
    overwrite: bool,
    progress: bool,
) -> bool:
    """Do the missing parts in several processes; returns whether this is the first of them.

    Args:
        work: As constructed; the first process begins it here.
        embedder: An encoder goes onto each process's device, anything else runs on the processor.
        options: Of `embed`.
        devices: Processes per node.
        nodes: Nodes.
        resume: As in `Extraction.begin`.
        overwrite: As in `Extraction.begin`.
        progress: Show a bar in the first process.
    """
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (".*does not have many workers.*", ".*isinstance.treespec, LeafSpec.*"):
        warnings.filterwarnings("ignore", message=message)
    trainer = pl.Trainer(
        accelerator="auto" if isinstance(embedder, nn.Module) else "cpu",
        devices=devices,
        num_nodes=nodes,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
    )
    if trainer.is_global_zero:
        work.begin(resume=resume, overwrite=overwrite)
    try:
        trainer.predict(Share(work, embedder, options, progress=progress), return_predictions=False)
    except RuntimeError as error:
        if not any(name in str(error).lower() for name in ("gloo", "nccl")):
            raise
        raise RuntimeError("Another process of this run has broken off; what it says itself tells why.") from error
    return bool(trainer.is_global_zero)


class Share(pl.LightningModule):
    """One process's parts. One step does them all: they are shared out before, and no process waits for another."""

    def __init__(self, work: Extraction, embedder: Any, options: dict[str, Any], *, progress: bool) -> None:
        super().__init__()
        self.work = work
        self.embedder = embedder
        self.options = options
        self.progress = progress

    def predict_dataloader(self) -> DataLoader[Any]:
        """The parts of this process, as one list; the first process says which are missing, so that all lists fit."""
        strategy = self.trainer.strategy
        missing = strategy.broadcast(self.work.missing() if self.trainer.is_global_zero else [])
        return DataLoader([missing[self.global_rank :: self.trainer.world_size]], batch_size=None, collate_fn=list)  # type: ignore[arg-type]

    def predict_step(self, parts: list[int]) -> int:
        """Embed and store them; returns how many, as Lightning wants something."""
        name = f"embed, process 1 of {self.trainer.world_size}"
        shown = self.progress and self.trainer.is_global_zero
        run_parts(self.work, self.embedder, self.options, parts, progress=shown, name=name)
        return len(parts)

    def on_predict_end(self) -> None:
        """Wait until everything is stored."""
        self.trainer.strategy.barrier()
