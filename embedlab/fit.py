"""`embedlab fit`: a recipe drives Lightning through its own command line (typed, with --print_config)."""

from __future__ import annotations

import argparse
import contextlib
import csv
import difflib
import importlib
import inspect
import io
import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import pytorch_lightning as pl
import torch
import yaml
from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]
from jsonargparse.typing import PositiveInt
from pytorch_lightning.callbacks import ProgressBar
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from torch import nn

from embedlab._durable import write_file
from embedlab._json import plain
from embedlab.data import ImageData, Views
from embedlab.data.splits import read_split
from embedlab.methods import Method
from embedlab.methods.checkpoints import Checkpoints, Guard, newest_valid, steps_of
from embedlab.methods.trainer import SaveEncoder, StepBar, quiet
from embedlab.retrieval.monitor import Monitor

log = logging.getLogger("embedlab")

_WRONG_KEY = re.compile(
    r"[Oo]ption '([\w.]+)' is not accepted|does not accept option '([\w.]+)'|[Uu]nrecognized arguments: -*([\w.]+)"
)


_Part = TypeVar("_Part", Checkpoints, SaveEncoder)

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
    causes = [line for line in lines if not (line.startswith("Parser key") and line.endswith(":"))]
    inner = (told or causes or lines or [message])[0]
    place = next((line.removesuffix(":") for line in lines if line.startswith("Parser key")), "")
    return inner if not place or place in inner else f"{place}: {inner}"


class _FitCLI(LightningCLI):
    """Method and data by class path; the run folder is fixed by the caller."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = _Parser(**kwargs)
        parser.add_argument("-c", "--config", action=ActionConfigFile, help="A recipe; several merge left to right.")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(Checkpoints, "checkpoints", skip={"folder"})
        parser.add_class_arguments(Monitor, "monitor")
        parser.add_class_arguments(SaveEncoder, "encoder", skip={"folder"})
        parser.callback_keys += ["checkpoints", "monitor", "encoder"]
        parser.add_argument(
            "--threads",
            type=PositiveInt | None,
            default=None,
            help="Cores that torch computes on; null leaves it all of them. A small network gains little by a second "
            "one, and loses much where other processes use it, too: threads wait for each other in every layer.",
        )

    def before_instantiate_classes(self) -> None:
        """The number of threads is that of everything that follows."""
        if self.config.threads is not None:
            torch.set_num_threads(self.config.threads)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Our bar, unless the recipe brings another or wants none."""
        asked = self.config_init["trainer"]
        foreign = any(isinstance(callback, ProgressBar) for callback in asked["callbacks"] or [])
        if asked["enable_progress_bar"] is not False and not foreign:
            self.trainer_defaults["callbacks"].append(StepBar())
        return super().instantiate_trainer(**kwargs)


class _SaveConfig(SaveConfigCallback):
    """Writes config.yaml whole or not at all: a resumed run depends on it."""

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:  # noqa: ARG002
        path = Path(self.config_filename)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, self.parser.dump(self.config, skip_none=False).encode())


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
    if options.resume:
        options.config, rest = _own_config(options.config, run, rest)
    started, threads = time.perf_counter(), torch.get_num_threads()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))  # bars and logs; stdout is for the result
        stack.callback(torch.set_num_threads, threads)
        cli = _build([*_config_arguments(options.config), *rest], run)
        _callback(cli, Checkpoints).folder = run / "checkpoints"
        _callback(cli, SaveEncoder).folder = run / "encoder"
        if checkpoint is not None:
            _require_same_roles(cli.datamodule, run / "split.csv")
            if cli.trainer.is_global_zero:
                _keep_metrics(run, steps_of(checkpoint))
        with _explained(run):
            cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint, weights_only=True)
    if cli.trainer.is_global_zero:
        _report(cli, run, time.perf_counter() - started, as_json=options.json)
    return 0


def _own_config(configs: list[str], run: Path, rest: list[str]) -> tuple[list[str], list[str]]:
    """A resumed run is what it was, whatever has become of its recipe; a moved run folder stays within itself."""
    own = run / "config.yaml"
    if not own.is_file():
        return configs, rest
    if configs:
        log.info("%s goes on by its own %s and the options given now; -c is not read again.", run, own)
    trainer = (yaml.safe_load(own.read_text(encoding="utf-8")) or {}).get("trainer", {})
    place, logger = trainer.get("default_root_dir"), trainer.get("logger")
    moved = []
    if place is not None and place != str(run):
        moved.append(f"--trainer.default_root_dir={run}")
        if isinstance(logger, dict) and logger.get("init_args", {}).get("save_dir") == place:
            moved.append(f"--trainer.logger.init_args.save_dir={run}")
    return [str(own)], [*moved, *rest]


def _callback(cli: _FitCLI, kind: type[_Part]) -> _Part:
    return next(found for found in cli.trainer.callbacks if isinstance(found, kind))  # type: ignore[attr-defined]


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
            f"The checkpoint in {run} is of another network than the one asked for. --resume without --model options "
            f"goes on with the run's own {run}/config.yaml; for another network choose another folder by --run."
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
        return newest_valid(run / "checkpoints") if resume else None
    names = {path.name for path in run.iterdir()} if run.is_dir() else set()
    if resume:
        checkpoint = newest_valid(run / "checkpoints")
        if checkpoint is None:
            broken = "" if not list(run.glob("checkpoints/*.ckpt")) else " that is whole; delete the folder and"
            raise RunFolderError(
                f"Nothing to resume: {run}/checkpoints holds no checkpoint{broken or '.'} "
                f"{'start' if broken else 'Start'} it without --resume."
            )
        return checkpoint
    if not names <= _FALSE_START:
        raise RunFolderError(
            f"{run} already holds a run. Go on with it by --resume, choose another folder by --run, or delete it."
        )
    return None


def _keep_metrics(run: Path, steps: int) -> None:
    """The logger begins a new metrics.csv; the parts before stay as metrics-1.csv, metrics-2.csv, ...

    What was logged after the checkpoint's last step is taken out of them: it comes again.
    """
    parts = sorted(run.glob("metrics-*.csv"))
    for path in [*parts, *run.glob("metrics.csv")]:
        text = path.read_text(encoding="utf-8")
        text = text[: text.rfind("\n") + 1]  # a killed process may have left half a line
        rows = csv.DictReader(io.StringIO(text))
        kept = io.StringIO()
        writer = csv.DictWriter(kept, rows.fieldnames or [])
        writer.writeheader()
        writer.writerows(row for row in rows if int(row["step"]) < steps)
        write_file(path, kept.getvalue().encode())
    if (run / "metrics.csv").exists():
        (run / "metrics.csv").rename(run / f"metrics-{1 + len(parts)}.csv")


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
        save_config_callback=_SaveConfig,
        save_config_kwargs={"config_filename": f"{run_folder}/config.yaml", "save_to_log_dir": False},
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
            "callbacks": [Guard()],
        },
        args=arguments,
        run=False,
    )


def _report(cli: _FitCLI, run: Path, seconds: float, *, as_json: bool) -> None:
    checkpoint = _callback(cli, Checkpoints).last
    figures = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
    result = {
        "run": str(run),
        "encoder": str(run / "encoder"),
        "config": str(run / "config.yaml"),
        "checkpoint": None if checkpoint is None else str(checkpoint),
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
