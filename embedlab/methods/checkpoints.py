"""Training that survives: checkpoints that appear whole or not at all and go on exactly, and a guard against NaN."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import random
import re
import signal
import struct
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor

from embedlab._durable import new_file
from embedlab.data.samplers import ResumableLoader
from embedlab.methods.base import NonFiniteLossError

log = logging.getLogger("embedlab")

FORMAT = 1
_ENDING = "\nembedlab checkpoint format {:04d} blake2b "
_TRAILER_BYTES = len(_ENDING.format(FORMAT)) + 65  # 64 hexadecimal digits and a line feed
_TRAILER = re.compile(rb"\nembedlab checkpoint format (\d{4}) blake2b ([0-9a-f]{64})\n")
_SHOWN = 64  # sample numbers in a message


class NonFiniteGradientError(RuntimeError):
    """The gradient became NaN or infinite; training stopped before the weights were touched."""


class Terminated(SystemExit):
    """SIGTERM came and a checkpoint was saved; the process ends with the code that a shell gives for it, 143."""


# ---- files ---------------------------------------------------------------------------------------------------------


def write_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Save what `torch.load` reads, with a digest over every byte; the file appears whole or not at all.

    A PyTorch file is a zip archive, and the digest is the archive's comment: one file and one rename, so that neither
    can be older than the other.

    Args:
        checkpoint: Tensors and plain values.
        path: Where to. The temporary file is in the same folder, so that the rename stays within one file system.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "step-00000001.ckpt"
        >>> write_checkpoint({"weight": torch.ones(2)}, path)
        >>> torch.load(path, weights_only=True)
        {'weight': tensor([1., 1.])}
        >>> damage(path) is None
        True
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as temporary:
        torch.save(checkpoint, temporary)
        with temporary.open("r+b") as file:
            file.seek(-22, os.SEEK_END)  # the archive's end record, of which the last two bytes count the comment's
            assert file.read(4) == b"PK\x05\x06"
            file.seek(-2, os.SEEK_END)
            file.write(struct.pack("<H", _TRAILER_BYTES))
            file.write(_ENDING.format(FORMAT).encode())
            size = file.tell()
            file.seek(0)
            digest = _digest(file, size)
            file.seek(size)
            file.write(f"{digest}\n".encode())


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is whole."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END) - _TRAILER_BYTES
        file.seek(max(0, size))
        trailer = _TRAILER.fullmatch(file.read())
        if trailer is None:
            return "its end is missing"
        if int(trailer[1]) != FORMAT:
            return f"its format is {int(trailer[1])}, this version of embedlab reads {FORMAT}"
        file.seek(0)
        if _digest(file, size + _TRAILER_BYTES - 65) != trailer[2].decode():
            return "its content does not fit its digest"
    return None


def newest_valid(folder: str | Path) -> Path | None:
    """The checkpoint with the most steps that is whole, or None; broken ones are passed over and named in the log."""
    for path in sorted(Path(folder).glob("step-*.ckpt"), key=steps_of, reverse=True):
        reason = damage(path)
        if reason is None:
            return path
        log.warning("Passed over %s: %s.", path, reason)
    return None


def steps_of(path: Path) -> int:
    """Optimizer steps after which a checkpoint was made, from its name."""
    digits = path.stem.removeprefix("step-")
    return int(digits) if digits.isdecimal() else -1


def _digest(file: BinaryIO, size: int) -> str:
    digest = hashlib.blake2b(digest_size=32)
    while size > 0 and (part := file.read(min(size, 2**22))):
        digest.update(part)
        size -= len(part)
    return digest.hexdigest()


# ---- random numbers, and what the machine was ----------------------------------------------------------------------


def random_state() -> dict[str, Any]:
    """The global generators of Python, NumPy and PyTorch in plain types."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 - it is other people's code that draws from it
    state: dict[str, Any] = {"python": random.getstate(), "numpy": [name, np.asarray(keys).tolist(), *rest]}
    state["torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put the global generators where they were."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def _surroundings(trainer: pl.Trainer) -> dict[str, Any]:
    """What must be the same for a resumed run to equal an unbroken one bit for bit."""
    return {
        "PyTorch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "processes": trainer.world_size,
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "device": trainer.strategy.root_device.type,
        "precision": str(trainer.precision),
    }


def _of_all_processes(state: dict[str, Any]) -> list[dict[str, Any]]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [state]
    states: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(states, state)
    return states


# ---- callbacks -----------------------------------------------------------------------------------------------------


class Checkpoints(Checkpoint):
    """Save the whole state of a run between two steps, so that a resumed run equals an unbroken one bit for bit.

    A checkpoint is taken when a step is done with all that belongs to it (validation, averages of weights, metrics) and
    the next batch is not yet asked for. It holds, besides what Lightning saves, the position in the epoch and the state
    of the global random generators of every process. The first one is taken before the first step. SIGTERM takes one
    and ends the process with code 143. With gradient accumulation it waits until the gradients are used up.

    Exact are runs on `ImageData`, whose loader can begin an epoch in its middle; with another loader a run goes on with
    the same weights and the right number of steps, but not on the same images. Averages that are logged per epoch begin
    anew.

    Args:
        folder: Where the files `step-00000123.ckpt` are; None is `checkpoints` in the trainer's default_root_dir.
        every_n_steps: Save after so many optimizer steps; None leaves it to the other two.
        every_seconds: Save when the last one is so old; None never.
        every_epoch: Save at the end of every epoch.
        keep: As many are kept, the last ones.

    Example:
        >>> Checkpoints("runs/mine/checkpoints", every_n_steps=500).every_seconds
        300.0
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        every_n_steps: int | None = None,
        every_seconds: float | None = 300.0,
        every_epoch: bool = True,
        keep: int = 2,
    ) -> None:
        least = {"keep": keep, "every_n_steps": 1 if every_n_steps is None else every_n_steps}
        for name, value in least.items():
            if value < 1:
                raise ValueError(f"Checkpoints needs {name} >= 1, got {value}.")
        self.folder = None if folder is None else Path(folder)
        self.every_n_steps = every_n_steps
        self.every_seconds = every_seconds
        self.every_epoch = every_epoch
        self.keep = keep
        self.kept: list[Path] = []
        self._saved_at = time.monotonic()
        self._saving = self._terminated = False
        self._resumed: dict[str, Any] | None = None

    @property
    def last(self) -> Path | None:
        """The newest checkpoint that this process saved or went on from."""
        return self.kept[-1] if self.kept else None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:  # noqa: ARG002
        """Find the folder."""
        self.folder = self.folder or Path(trainer.default_root_dir) / "checkpoints"

    # ---- when ----

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Go to the place in the epoch, and take SIGTERM over from Lightning, which would leave without saving."""
        self._saved_at = time.monotonic()
        self._listen(trainer)
        loader = trainer.train_dataloader
        if self._resumed is not None and isinstance(loader, ResumableLoader):
            # Lightning does it too, but not when the loader was made before, as by estimated_stepping_batches
            loader.load_state_dict({"batches": self._resumed["batches"]})
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._on_sigterm)  # the trainer puts back what was there before

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Lightning may have made a new loader."""
        self._listen(trainer)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """The place nearest to being between two steps, for loaders that are not ours."""
        if not isinstance(trainer.train_dataloader, ResumableLoader):
            self._between_steps(trainer, trainer.fit_loop.batch_idx)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Save the end of training."""
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.save(trainer)

    def _listen(self, trainer: pl.Trainer) -> None:
        loader = trainer.train_dataloader
        if isinstance(loader, ResumableLoader):
            loader.before_batch = lambda: self._between_steps(trainer, loader.position)

    def _on_sigterm(self, number: int, frame: Any) -> None:  # noqa: ARG002
        self._terminated = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one does not wait

    def _between_steps(self, trainer: pl.Trainer, batches: int) -> None:
        if self._resumed is not None:
            self._restore(trainer, self._resumed)
            self._resumed = None
            return
        accumulating = batches % trainer.accumulate_grad_batches != 0
        if accumulating or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if not self._agree(trainer, self._terminated or self._due(trainer, batches)):
            return
        self.save(trainer)
        if self._agree(trainer, self._terminated):
            if trainer.is_global_zero:
                log.warning(
                    "Terminated, and saved as %s: the same command with --resume goes on from there.", self.last
                )
            raise Terminated(128 + signal.SIGTERM)

    @staticmethod
    def _agree(trainer: pl.Trainer, decision: bool) -> bool:
        """One process's wish is all processes': clocks and signals are not the same everywhere."""
        if trainer.world_size == 1:
            return decision
        return bool(trainer.strategy.reduce_boolean_decision(decision, all=False))

    def _due(self, trainer: pl.Trainer, batches: int) -> bool:
        if batches == 0 and (trainer.current_epoch == 0 or self.every_epoch):
            return True
        if self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0:
            return True
        return self.every_seconds is not None and time.monotonic() - self._saved_at >= self.every_seconds

    # ---- what ----

    def save(self, trainer: pl.Trainer) -> None:
        """Save now; to be called on all processes, between two steps."""
        assert self.folder is not None
        for logger in trainer.loggers:
            logger.save()  # so that the figures up to this step are on disk when the run goes on from it
        path = self.folder / f"step-{trainer.global_step:08d}.ckpt"
        files, self._saving = trainer.strategy.checkpoint_io, True
        trainer.strategy.checkpoint_io = _Files()
        try:
            trainer.save_checkpoint(path, weights_only=False)
        finally:
            trainer.strategy.checkpoint_io, self._saving = files, False
        self.kept = [*(old for old in self.kept if old != path), path][-self.keep :]
        if trainer.is_global_zero:
            self._remove_others(self.folder)
        self._saved_at = time.monotonic()

    def _remove_others(self, folder: Path) -> None:
        """Older ones, broken ones that were passed over, and what a killed process left half written."""
        for path in [*folder.glob("step-*.ckpt"), *folder.glob(".step-*.ckpt.*.part")]:
            if path not in self.kept:
                path.unlink(missing_ok=True)

    def on_save_checkpoint(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,  # noqa: ARG002
        checkpoint: dict[str, Any],
    ) -> None:
        """Add the position and the random numbers."""
        if not self._saving:  # another callback's checkpoint, taken at another moment
            return
        loops = checkpoint["loops"]["fit_loop"]
        batches = _between_two_steps(loops, trainer.num_training_batches)
        checkpoint["resume"] = {
            "format": FORMAT,
            "batches": batches,
            "logged": loops["epoch_loop.state_dict"]["_batches_that_stepped"],
            "random": _of_all_processes(random_state()),
            "surroundings": _surroundings(trainer),
        }

    def on_load_checkpoint(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,  # noqa: ARG002
        checkpoint: dict[str, Any],
    ) -> None:
        """Remember where to go on, and say what is not as it was."""
        if trainer.state.fn != TrainerFn.FITTING or "resume" not in checkpoint:
            return
        self._resumed = checkpoint["resume"]
        if trainer.ckpt_path is not None:
            self.kept = [Path(trainer.ckpt_path)]
        before, now = self._resumed["surroundings"], _surroundings(trainer)
        for name in before:
            if before[name] != now[name] and trainer.is_global_zero:
                log.warning(
                    "The run goes on with %s %s and was begun with %s: it will not equal an unbroken run bit for bit.",
                    *(name, now[name], before[name]),
                )
        if before["processes"] != now["processes"]:  # a batch is now another share of the epoch
            batches = self._resumed["batches"] * before["processes"] // now["processes"]
            self._resumed = {**self._resumed, "batches": batches}
            for name in ("ready", "started", "processed", "completed"):
                checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"][name] = batches

    @staticmethod
    def _restore(trainer: pl.Trainer, resumed: dict[str, Any]) -> None:
        """As late as can be, because Lightning's own preparations draw random numbers and count a step too many."""
        set_random_state(resumed["random"][trainer.global_rank % len(resumed["random"])])
        trainer.fit_loop.epoch_loop._batches_that_stepped = resumed["logged"]


class _Files(TorchCheckpointIO):
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:  # noqa: ARG002
        write_checkpoint(checkpoint, Path(path))


def _between_two_steps(loops: dict[str, Any], batches_per_epoch: float) -> int:
    """Bring the progress of Lightning's loops to the one form in which it goes on with the next batch; the position.

    Its counters are of four kinds (ready, started, processed, completed), and from their differences it concludes what
    to repeat. Equal ones mean that nothing is: all batches so far are done, and so are the epochs before this one.
    """
    batch, epoch = loops["epoch_loop.batch_progress"], loops["epoch_progress"]
    for progress in (batch["total"], batch["current"]):
        progress["ready"] = progress["started"] = progress["processed"] = progress["completed"]
    done = int(batch["current"]["completed"])
    if done >= batches_per_epoch:
        batch["current"] = dict.fromkeys(batch["current"], 0)
        batch["is_last_batch"] = False
        return 0
    if done and epoch["current"]["processed"] == epoch["current"]["ready"]:
        for progress in epoch["total"], epoch["current"]:  # stopped in its middle, by max_steps: it is not done yet
            progress["processed"] = progress["completed"] = progress["ready"] - 1
    return done


class Guard(pl.Callback):
    """Stop on a loss or gradient that is NaN or infinite, before the optimizer's step, and name the images.

    Costs one norm over all gradients per step, 2 ms for the 11 million parameters of a ResNet-18 on one core, and on a
    GPU one wait for it.
    """

    def __init__(self) -> None:
        self.index: list[Tensor] = []

    def on_train_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,  # noqa: ARG002
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Remember which images the gradient will be of."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.index = []
        if (index := getattr(batch, "index", None)) is not None:
            self.index.append(index)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Before a broken loss becomes a broken gradient."""
        if not torch.isfinite(loss).all():
            raise NonFiniteLossError(f"The loss is {loss.item()} {self._where(trainer, pl_module)}")

    def on_before_optimizer_step(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Before a broken gradient becomes broken weights."""
        if trainer.precision == "16-mixed":  # its scaler leaves such steps out by itself, and lowers the scale
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not gradients or math.isfinite(torch.nn.utils.get_total_norm(gradients).item()):
            return
        broken = [
            name
            for name, parameter in pl_module.named_parameters()
            if parameter.grad is not None and not torch.isfinite(parameter.grad).all()
        ]
        if broken:  # else the sum of finite squares overflowed
            more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
            raise NonFiniteGradientError(
                f"The gradient of {', '.join(broken[:3])}{more} is NaN or infinite {self._where(trainer, pl_module)}"
            )

    def _where(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> str:
        numbers = torch.cat(self.index).tolist() if self.index else []
        more = f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else ""
        samples = f", samples {', '.join(map(str, numbers[:_SHOWN]))}{more}" if numbers else ""
        return (
            f"at step {trainer.global_step} (epoch {pl_module.current_epoch}){samples}; the weights are those of the "
            "step before. Usual causes: a learning rate too high, a temperature too low, or broken images. Lower the "
            "learning rate; a run of 'embedlab fit' goes on from its last checkpoint by --resume."
        )
