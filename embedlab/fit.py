"""`embedlab fit`: a recipe drives Lightning through its own command line (typed, with --print_config)."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import inspect
import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytorch_lightning as pl
from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from torch import nn

from embedlab._json import plain
from embedlab.data import ImageData, Views
from embedlab.data.splits import read_split
from embedlab.methods import Method
from embedlab.methods.trainer import SaveEncoder, quiet
from embedlab.retrieval.monitor import Monitor

log = logging.getLogger("embedlab")

_WRONG_KEY = re.compile(
    r"[Oo]ption '([\w.]+)' is not accepted|does not accept option '([\w.]+)'|[Uu]nrecognized arguments: -*([\w.]+)"
)


_FALSE_START = {"config.yaml", "split.csv"}  # all that a run leaves which ended before its first step


class RunFolderError(ValueError):
    """The run folder holds another run, or none where one should be resumed."""


class _Parser(LightningArgumentParser):
    """Errors in two lines: what is wrong, and the nearest right key."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # noqa: ARG002
        sys.stderr.write(f"embedlab fit: error: {_innermost(message)}\n{self._way_out(message)}\n")
        raise SystemExit(2)

    def _way_out(self, message: str) -> str:
        match = _WRONG_KEY.search(message)
        if match:
            wrong = next(group for group in match.groups() if group)
            near = difflib.get_close_matches(wrong.split(".")[-1], self._known_names(message), n=1, cutoff=0.6)
            near = near or difflib.get_close_matches(wrong.split(".")[0], self._known_names(message), n=1)
            if near:
                return f"Did you mean '{near[0]}'? --print_config shows every key with its value."
        return "--print_config shows every key with its value; 'embedlab fit --help' lists the options."

    def _known_names(self, message: str) -> list[str]:
        """Words of all options, and the constructor arguments of our classes and of those in the message."""
        names = {word for action in self._actions for word in action.dest.split(".")}
        for kind in [*_our_classes(), *_named_classes(message)]:
            names |= set(inspect.signature(kind.__init__).parameters)  # type: ignore[misc]
        names |= {"trainer", "model", "data"} | set(inspect.signature(pl.Trainer.__init__).parameters)
        return sorted(names - {"self", "help", "args", "kwargs"})


def _our_classes() -> list[type]:
    rooms = [vars(importlib.import_module(f"embedlab.{room}")) for room in ("encoders", "losses", "methods", "tasks")]
    found = [member for room in rooms for member in room.values() if inspect.isclass(member)]
    return [ImageData, Views, *(kind for kind in found if issubclass(kind, nn.Module))]


def _named_classes(message: str) -> list[type]:
    found = []
    for path in re.findall(r"class_path '([\w.]+)'", message):
        module, _, name = path.rpartition(".")
        with contextlib.suppress(ImportError, AttributeError, ValueError):
            found.append(getattr(importlib.import_module(module), name))
    return found


def _innermost(message: str) -> str:
    """Jsonargparse nests causes and repeats the whole configuration; keep the line that says what to change."""
    lines = [line.strip(" -") for line in message.splitlines()]
    lines = [
        line
        for line in lines
        if line
        and not line.startswith(
            ("Given value", "Subtypes", "Errors", "Does not validate", "Expected a <class 'NoneType'")
        )
    ]
    told = [line for line in lines if _WRONG_KEY.search(line) or "Expected a" in line]
    inner = (told or lines or [message])[0]
    place = next((line.removesuffix(":") for line in lines if line.startswith("Parser key")), "")
    return inner if not place or place in inner else f"{place}: {inner}"


class _FitCLI(LightningCLI):
    """Method and data by class path; the run folder is fixed by the caller."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = _Parser(**kwargs)
        parser.add_argument("-c", "--config", action=ActionConfigFile, help="A recipe; several merge left to right.")
        return parser


def main(arguments: list[str]) -> int:
    """Run `embedlab fit` with its arguments; returns the exit code."""
    quiet()
    front = argparse.ArgumentParser(prog="embedlab fit", add_help=False, allow_abbrev=False)
    front.add_argument("--run", type=Path)
    front.add_argument("--resume", action="store_true")
    front.add_argument("--json", action="store_true")
    front.add_argument("-c", "--config", action="append", default=[])
    options, rest = front.parse_known_args(arguments)
    if any(flag in rest for flag in ("--print_config", "--help", "-h")) or any(
        argument.startswith("--print_config=") for argument in rest
    ):
        _build([*_config_arguments(options.config), *rest], Path("runs/unused"))
        return 0
    run = options.run or _default_run(options.config)
    checkpoint = _prepare(run, resume=options.resume)
    if options.resume and not options.config:
        options.config = [str(run / "config.yaml")]
    started = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):  # bars and logs; stdout is for the result
        cli = _build([*_config_arguments(options.config), *rest], run)
        if checkpoint is not None:
            _require_same_roles(cli.datamodule, run / "split.csv")
            if cli.trainer.is_global_zero:
                _keep_metrics(run)
        with _explained(run):
            cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint)
    if cli.trainer.is_global_zero:
        _report(cli, run, time.perf_counter() - started, as_json=options.json)
    return 0


def _require_same_roles(data: pl.LightningDataModule, split: Path) -> None:
    """A resumed run must not train on images that it has held out before."""
    if not isinstance(data, ImageData) or not split.is_file():
        return
    data.setup()
    assert data.source is not None
    try:
        same = bool((read_split(split, data.source) == data.roles).all())
    except ValueError:  # images that the run has not seen
        same = False
    if not same:
        raise RunFolderError(
            f"These are not the images and roles of the run before, which are in {split}: other data, seed or "
            "fractions? --resume without -c goes on as before; for anything else choose another folder by --run."
        )


@contextlib.contextmanager
def _explained(run: Path) -> Iterator[None]:
    """PyTorch lists every key of a checkpoint that does not fit; say instead what that means, and spoil nothing."""
    config = run / "config.yaml"
    saved = config.read_bytes() if config.is_file() else b""
    try:
        yield
    except RuntimeError as error:
        if "loading state_dict" not in str(error):
            raise
        config.write_bytes(saved)
        raise RunFolderError(
            f"The checkpoint in {run} is of another network than the recipe's. --resume without -c goes on with the "
            f"run's own {run}/config.yaml; for another recipe choose another folder by --run."
        ) from error


def _config_arguments(configs: list[str]) -> list[str]:
    return [argument for config in configs for argument in ("--config", config)]


def _default_run(configs: list[str]) -> Path:
    if not configs:
        raise RunFolderError("embedlab fit needs a recipe: -c recipes/NAME.yaml (or --run FOLDER --resume to go on).")
    return Path("runs") / Path(configs[-1]).stem


def _prepare(run: Path, *, resume: bool) -> Path | None:
    """Refuse to overwrite a run; find the checkpoint to resume from."""
    if int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) > 0:  # a further process of the same run
        return _newest_checkpoint(run) if resume else None
    names = {path.name for path in run.iterdir()} if run.is_dir() else set()
    if resume:
        checkpoint = _newest_checkpoint(run)
        if checkpoint is None:
            raise RunFolderError(
                f"Nothing to resume: {run}/checkpoints holds no checkpoint. Start it without --resume."
            )
        return checkpoint
    if not names <= _FALSE_START:
        raise RunFolderError(
            f"{run} already holds a run. Go on with it by --resume, choose another folder by --run, or delete it."
        )
    return None


def _keep_metrics(run: Path) -> None:
    """The logger begins a new metrics.csv; the part before a resume stays as metrics-1.csv, metrics-2.csv, ..."""
    if (run / "metrics.csv").exists():
        number = 1 + len(list(run.glob("metrics-*.csv")))
        (run / "metrics.csv").rename(run / f"metrics-{number}.csv")


def _newest_checkpoint(run: Path) -> Path | None:
    checkpoints = sorted((run / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    return checkpoints[-1] if checkpoints else None


def _build(arguments: list[str], run: Path) -> _FitCLI:
    try:
        return _command_line(arguments, run)
    except ValueError as error:  # of a constructor; jsonargparse wraps it into all that it tried
        if "Union subtypes" not in str(error):
            raise
        raise ValueError(_innermost(str(error))) from error


def _command_line(arguments: list[str], run: Path) -> _FitCLI:
    run_folder = str(run)
    return _FitCLI(
        Method,
        pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_callback=SaveConfigCallback,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={
            "default_root_dir": run_folder,
            "use_distributed_sampler": False,  # our samplers share the data among ranks themselves
            "logger": {
                "class_path": "pytorch_lightning.loggers.CSVLogger",
                "init_args": {"save_dir": run_folder, "name": "", "version": ""},
            },
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 10,
            "enable_model_summary": False,
            "callbacks": [
                ModelCheckpoint(
                    f"{run_folder}/checkpoints",
                    filename="last",
                    enable_version_counter=False,
                    save_on_train_epoch_end=True,  # else only after a validation, which the last epoch need not have
                ),
                SaveEncoder(f"{run_folder}/encoder"),
                Monitor(),
            ],
        },
        args=arguments,
        run=False,
    )


def _report(cli: _FitCLI, run: Path, seconds: float, *, as_json: bool) -> None:
    figures = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
    result = {
        "run": str(run),
        "encoder": str(run / "encoder"),
        "config": str(run / "config.yaml"),
        "checkpoint": str(run / "checkpoints" / "last.ckpt"),
        "steps": cli.trainer.global_step,
        "seconds": round(seconds, 1),
        "metrics": figures,
    }
    if as_json:
        print(json.dumps(plain(result)))
        return
    shown = "  ".join(f"{name} {value:.4f}" for name, value in sorted(figures.items()))
    print(f"{cli.trainer.global_step} steps in {seconds:.0f} s  {shown}")
    print(f"encoder     {result['encoder']}\ncheckpoint  {result['checkpoint']}\nconfig      {result['config']}")
