"""Killed at any step, a run goes on as if nothing had been: bit for bit, from the newest checkpoint that is whole."""

import contextlib
import csv
import io
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import nn

from embedlab.cli import main
from embedlab.data import ImageData, Source, Views
from embedlab.data.module import ImageBatches
from embedlab.data.samplers import BalancedBatches, ResumableLoader, ShuffledBatches
from embedlab.encoders import MLPHead, ResNet
from embedlab.losses import SupConLoss
from embedlab.methods import MetricLearning, NonFiniteLossError
from embedlab.methods import checkpoints as module
from embedlab.methods.checkpoints import (
    Checkpoints,
    Guard,
    NonFiniteGradientError,
    Terminated,
    damage,
    newest_valid,
    steps_of,
    write_checkpoint,
)
from embedlab.retrieval.monitor import Monitor

RECIPE = Path(__file__).parents[1] / "recipes" / "supcon.yaml"
STEPS = 25


class Learner(MetricLearning):
    """State of every kind that methods have: draws from the three global generators, buffers changed at two hooks."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        backbone = ResNet("resnet10", stem="small", width=0.125)
        super().__init__(
            backbone,
            MLPHead(8),
            loss=SupConLoss(),
            optimizer=lambda groups: torch.optim.AdamW(groups, lr=3e-3),
        )
        self.register_buffer("average", torch.zeros(8))
        self.register_buffer("queue", torch.zeros(4, 2))
        self.losses: dict[int, float] = {}

    def training_step(self, batch, batch_idx):
        embeddings = nn.functional.dropout(self(batch.views[0]), 0.2)
        loss = self.loss(embeddings, batch.labels) * (1 + 0.1 * np.random.rand() + 0.1 * random.random())  # noqa: NPY002
        self.average.lerp_(embeddings.detach().float().mean(dim=0), 0.1)
        self.log("train/loss", loss, batch_size=len(batch))
        self.losses[self.global_step] = loss.item()
        return loss

    def on_train_batch_end(self, *_) -> None:  # after all callbacks of the same name
        self.queue[self.global_step % 4] = torch.rand(2)


def source() -> Source:
    generator = np.random.default_rng(0)
    pixels = (generator.integers(30, 226, (6, 1, 1, 1, 3)) + generator.normal(0, 20, (6, 9, 8, 8, 3))).clip(0, 255)
    return Source.from_arrays(
        pixels.astype(np.uint8).reshape(-1, 8, 8, 3), [f"class {n}" for n in range(6) for _ in range(9)]
    )


def data(*, balanced: bool, workers: int) -> ImageData:
    arguments = {"images_per_class": 2, "batches_per_epoch": 5} if balanced else {}
    return ImageData(
        source(),
        image_size=8,
        batch_size=6,
        split="sample",
        views=Views(crop_scale=(0.5, 1.0)),
        workers=workers,
        cache_gib=0.0 if workers else 1.0,
        **arguments,
    )


class Dies(Exception):
    pass


class DieAfter(pl.Callback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_start(self, trainer, *_) -> None:
        if trainer.global_step == self.steps:
            raise Dies


def train(
    folder, checkpoint=None, *, die=None, keep=99, every=1, balanced=True, workers=0, precision="32-true", **settings
):
    """One life of a run, as in a new process: other numbers in the generators, new objects."""
    pl.seed_everything(hash(str(checkpoint)) % 1000, verbose=False)
    model = Learner()
    callbacks = [Checkpoints(folder, every_n_steps=every, every_epoch=False, keep=keep), Guard(), Monitor()]
    trainer = pl.Trainer(
        **{
            "default_root_dir": folder,
            "callbacks": [*callbacks, *([DieAfter(die)] if die is not None else [])],
            "max_epochs": 5,
            "accelerator": "cpu",
            "precision": precision,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "use_distributed_sampler": False,
            **settings,
        }
    )
    if checkpoint is None:
        pl.seed_everything(1, verbose=False)
    images = data(balanced=balanced, workers=workers)
    with contextlib.suppress(Dies):
        trainer.fit(model, datamodule=images, ckpt_path=checkpoint, weights_only=True)
    return model, trainer


def flat(value, name="") -> dict[str, object]:
    """Nested containers as one dictionary."""
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, list | tuple):
        parts = enumerate(value)
    else:
        return {name: value}
    return {key: entry for part, inside in parts for key, entry in flat(inside, f"{name}/{part}").items()}


def differences(first: Path, second: Path) -> list[str]:
    """What is not the same bit for bit in two checkpoints: weights, optimizer, schedule, progress, generators."""
    one, two = (flat(torch.load(path, weights_only=True)) for path in (first, second))
    assert one.keys() == two.keys()
    return [
        name
        for name in one
        if not (torch.equal(one[name], two[name]) if isinstance(one[name], torch.Tensor) else one[name] == two[name])
    ]


VARIANTS = [
    (True, 0, "32-true"),
    (False, 0, "32-true"),
    (True, 0, "bf16-mixed"),
    (False, 0, "bf16-mixed"),
    (True, 2, "32-true"),
    (False, 2, "bf16-mixed"),
]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The folder, losses and steps of an uninterrupted run with a checkpoint at every step; made once per variant."""
    made = {}

    def find(balanced, workers, precision):
        if (key := (balanced, workers, precision)) not in made:
            folder = tmp_path_factory.mktemp("unbroken")
            model, trainer = train(folder, balanced=balanced, workers=workers, precision=precision)
            made[key] = folder, model.losses, trainer.global_step
        return made[key]

    return find


@pytest.mark.parametrize(("balanced", "workers", "precision"), VARIANTS)
def test_from_every_step_a_run_goes_on_bit_for_bit(unbroken, tmp_path, balanced, workers, precision) -> None:
    folder, losses, steps = unbroken(balanced, workers, precision)
    assert steps == STEPS
    for step in range(steps) if not workers else (0, 3, 5, 13, 24):
        again = tmp_path / str(step)
        model, trainer = train(
            again, folder / f"step-{step:08d}.ckpt", balanced=balanced, workers=workers, precision=precision, every=None
        )
        assert trainer.global_step == steps
        assert model.losses == {at: loss for at, loss in losses.items() if at >= step}, f"from step {step}"
        assert differences(folder / f"step-{steps:08d}.ckpt", trainer.checkpoint_callback.last) == [], f"from {step}"


def test_workers_change_nothing(unbroken) -> None:
    assert unbroken(True, 0, "32-true")[1] == unbroken(True, 2, "32-true")[1]


@pytest.mark.parametrize("balanced", [True, False])
def test_a_run_that_dies_after_every_step_is_an_unbroken_one(unbroken, tmp_path, balanced) -> None:
    folder, losses, steps = unbroken(balanced, 0, "32-true")
    found = {}
    for step in range(1, steps + 1):
        newest = newest_valid(tmp_path)
        assert steps_of(newest) == step - 1 if newest else step == 1
        model, _ = train(tmp_path, newest, die=step, keep=2, balanced=balanced)
        found |= model.losses
        assert len(list(tmp_path.iterdir())) <= 2
    assert found == losses
    assert differences(folder / f"step-{steps:08d}.ckpt", newest_valid(tmp_path)) == []


CONTROLS = ["position", "generators", "average"]


@pytest.mark.parametrize("forgotten", CONTROLS)
def test_the_comparison_sees_what_is_forgotten(unbroken, tmp_path, monkeypatch, forgotten) -> None:
    """Controls: a resume that leaves out one thing must not pass for exact."""
    folder, losses, steps = unbroken(True, 0, "32-true")
    checkpoint = torch.load(folder / "step-00000008.ckpt", weights_only=True)
    if forgotten == "position":
        checkpoint["resume"]["batches"] = 0
    elif forgotten == "generators":
        monkeypatch.setattr(module, "set_random_state", lambda state: None)
    else:
        checkpoint["state_dict"]["average"] += 1e-7
    path = tmp_path / "step-00000008.ckpt"
    write_checkpoint(checkpoint, path)
    model, trainer = train(tmp_path, path)
    assert differences(folder / f"step-{steps:08d}.ckpt", trainer.checkpoint_callback.last) != []
    if forgotten != "average":
        assert model.losses != {at: loss for at, loss in losses.items() if at >= 8}


def test_a_longer_run_goes_on_in_the_epoch_where_max_steps_stopped_it(unbroken, tmp_path) -> None:
    settings = {"max_epochs": -1, "max_steps": 8, "check_val_every_n_epoch": 1}
    _, short = train(tmp_path, **settings)
    _, long = train(tmp_path, short.checkpoint_callback.last, **{**settings, "max_steps": 18})
    loaded = torch.load(long.checkpoint_callback.last, weights_only=True)
    progress = loaded["loops"]["fit_loop"]["epoch_progress"]["current"]
    assert (progress["ready"], progress["completed"], loaded["resume"]["batches"]) == (4, 3, 3), "18 = 3 x 5 + 3"
    _, done = train(tmp_path / "again", tmp_path / "step-00000016.ckpt", **{**settings, "max_steps": 18})
    assert differences(long.checkpoint_callback.last, done.checkpoint_callback.last) == []


def test_accumulated_gradients_are_never_cut(tmp_path) -> None:
    _, trainer = train(tmp_path / "one", accumulate_grad_batches=4)
    _, second = train(tmp_path / "two", tmp_path / "one" / "step-00000003.ckpt", accumulate_grad_batches=4)
    assert trainer.global_step == second.global_step == 10, "two steps in an epoch of five batches"
    assert differences(trainer.checkpoint_callback.last, second.checkpoint_callback.last) == []


def test_validation_within_an_epoch_is_not_repeated(tmp_path) -> None:
    settings = {"val_check_interval": 2}
    _, first = train(tmp_path / "one", **settings)
    for step in (2, 5, 7, 8):
        _, second = train(tmp_path / str(step), tmp_path / "one" / f"step-{step:08d}.ckpt", **settings)
        assert differences(first.checkpoint_callback.last, second.checkpoint_callback.last) == []


def test_nothing_before_the_position_is_decoded(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(ImageBatches, "__getitem__", lambda self, rows: asked.append(rows))
    for balanced in (True, False):
        images = data(balanced=balanced, workers=0)
        images.setup()
        loader = images.train_dataloader()
        assert isinstance(loader, ResumableLoader)
        asked.clear()
        list(loader)
        whole = asked.copy()
        asked.clear()
        loader.load_state_dict({"batches": 2})
        list(loader)
        assert asked == whole[2:]
        assert len(loader) == len(whole)
        asked.clear()
        list(loader)
        assert asked == whole, "the next epoch is whole"


@pytest.mark.parametrize("sampler", [ShuffledBatches(20, 4), BalancedBatches([0, 1, 2] * 8, 2, images_per_class=2)])
def test_a_loader_leaves_the_global_generator_alone(sampler) -> None:
    before = torch.get_rng_state()
    assert len(list(ResumableLoader(torch.arange(24), sampler))) == len(sampler)
    assert torch.equal(torch.get_rng_state(), before)


# ---- files ---------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_anywhere_is_noticed_and_the_older_one_taken(tmp_path, caplog) -> None:
    content = {"weights": torch.arange(2000.0), "epoch": 3, "random": module.random_state()["python"]}
    write_checkpoint(content, tmp_path / "step-00000001.ckpt")
    path = tmp_path / "step-00000002.ckpt"
    write_checkpoint(content, path)
    whole = path.read_bytes()
    assert newest_valid(tmp_path) == path
    places = {*range(64), *range(len(whole) - 400, len(whole)), *range(64, len(whole) - 400, len(whole) // 100)}
    for place in sorted(places):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        assert damage(path) is not None, place
    for length in [0, 1, 100, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with caplog.at_level(logging.WARNING, "embedlab"):
            caplog.clear()
            assert newest_valid(tmp_path) == tmp_path / "step-00000001.ckpt"
        assert f"Passed over {path}: its end is missing." in caplog.text
    path.write_bytes(whole + b"x")
    assert damage(path) == "its end is missing"
    path.write_bytes(whole.replace(b"format 0001", b"format 0002"))
    assert damage(path) == "its format is 2, this version of embedlab reads 1"
    path.write_bytes(whole)
    assert damage(path) is None


def test_broken_checkpoints_go_when_the_run_goes_on(unbroken, tmp_path) -> None:
    folder, _, _ = unbroken(True, 0, "32-true")
    for step in (4, 5, 6):
        shutil.copy(folder / f"step-{step:08d}.ckpt", tmp_path)
    (tmp_path / "step-00000006.ckpt").write_bytes(b"torn")
    (tmp_path / ".step-00000007.ckpt.1.part").write_bytes(b"half")
    train(tmp_path, newest_valid(tmp_path), die=7, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000006.ckpt", "step-00000007.ckpt"]
    assert damage(tmp_path / "step-00000006.ckpt") is None


def kills_while_saving(folder: Path, kills: int) -> None:
    elsewhere = next((place for place in ("/dev/shm", "/tmp") if Path(place).is_dir()), None)
    worker = Path(__file__).parent / "resume_worker.py"
    done = subprocess.run(
        [sys.executable, worker, folder, str(kills)],
        env={**os.environ, "TMPDIR": elsewhere, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60 + 2 * kills,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    assert told["kills"] == kills
    assert told["while saving"] >= kills // 4, f"too few fell into a save to mean anything: {told}"


def test_killed_while_saving_20_times(tmp_path) -> None:
    kills_while_saving(tmp_path, 20)


@pytest.mark.full
def test_killed_while_saving_200_times(tmp_path) -> None:
    kills_while_saving(tmp_path, 200)


# ---- the command line ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> list[str]:
    """`embedlab fit` on 60 pictures, 60 steps; without --run."""
    root = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for number in range(6):
        (root / f"c{number}").mkdir()
        for copy in range(10):
            pixels = generator.integers(0, 256, (8, 8, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / f"c{number}" / f"{copy}.png")
    return [
        *(
            "fit",
            "-c",
            str(RECIPE),
            f"--data.init_args.root={root}",
            "--model.init_args.backbone.init_args.width=0.125",
        ),
        *("--model.init_args.backbone.init_args.name=resnet10", "--model.init_args.backbone.init_args.stem=small"),
        *("--data.init_args.image_size=8", "--data.init_args.decode_size=8", "--data.init_args.batch_size=8"),
        *("--data.init_args.images_per_class=4", "--data.init_args.batches_per_epoch=10", "--trainer.max_epochs=6"),
        *("--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1", "--checkpoints.every_n_steps=1"),
        "--checkpoints.every_epoch=false",
    ]


def start(command: list[str], run: Path, *more: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "embedlab", *command, "--run", str(run), *more],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment,
    )


def wait_for_step(process: subprocess.Popen, run: Path, step: int) -> None:
    for _ in range(12000):
        found = [steps_of(path) for path in (run / "checkpoints").glob("step-*.ckpt")]
        if max(found, default=-1) >= step:
            return
        if process.poll() is not None:
            pytest.fail(process.stderr.read().decode()[-3000:])
        time.sleep(0.01)
    pytest.fail("no checkpoint came")


def logged(run: Path) -> dict[int, str]:
    """Step to loss over all parts of the metrics; each step once."""
    losses: dict[int, str] = {}
    for part in [*sorted(run.glob("metrics-*.csv"), key=lambda path: int(path.stem[8:])), run / "metrics.csv"]:
        for row in csv.DictReader(io.StringIO(part.read_text())):
            if row.get("train/loss"):
                assert int(row["step"]) not in losses
                losses[int(row["step"])] = row["train/loss"]
    return losses


def real_kills(command: list[str], tmp_path: Path, kills: int) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main([*command, "--run", str(whole)]) == 0
    draw = random.Random(kills)
    for kill in range(kills):
        with start(command, broken, *(["--resume"] if kill else [])) as process:
            began = steps_of(newest_valid(broken / "checkpoints")) if kill else 0
            wait_for_step(process, broken, min(55, began + draw.randrange(1, 1 + max(2, 100 // kills))))
            time.sleep(draw.random() / 20)
            process.kill()
    with start(command, broken, "--resume") as process:
        assert process.wait(240) == 0, process.stderr.read().decode()[-3000:]
    last = [newest_valid(run / "checkpoints") for run in (whole, broken)]
    assert [steps_of(path) for path in last] == [60, 60]
    assert differences(*last) == []
    assert logged(whole) == logged(broken)
    assert sorted(logged(whole)) == list(range(60)), "every step once"


def test_killed_5_times_for_real(command, tmp_path) -> None:
    real_kills(command, tmp_path, 5)


@pytest.mark.full
def test_killed_50_times_for_real(command, tmp_path) -> None:
    real_kills(command, tmp_path, 50)


def test_sigterm_saves_and_says_how_to_go_on(command, tmp_path) -> None:
    run = tmp_path / "run"
    settings = ["--trainer.max_epochs=100000", "--checkpoints.every_n_steps=1000000"]
    with start([*command, *settings], run) as process:
        wait_for_step(process, run, 0)
        time.sleep(0.5)
        process.terminate()
        told = process.stderr.read().decode()
        assert process.wait(60) == 143
    newest = newest_valid(run / "checkpoints")
    assert steps_of(newest) > 0
    assert f"Terminated, and saved as {newest}: the same command with --resume goes on from there." in told
    epochs = -(-steps_of(newest) // 10)
    assert main(["fit", "--run", str(run), "--resume", f"--trainer.max_epochs={epochs + 1}"]) == 0
    assert steps_of(newest_valid(run / "checkpoints")) == 10 * (epochs + 1)
    assert sorted(logged(run)) == list(range(10 * (epochs + 1)))


def test_a_resumed_run_keeps_its_own_configuration(command, tmp_path, capsys, caplog) -> None:
    run = tmp_path / "run"
    short = [*command, "--trainer.max_epochs=1", "--run", str(run)]
    assert main(short) == 0
    moved = tmp_path / "moved"
    run.rename(moved)
    capsys.readouterr()
    with caplog.at_level(logging.INFO, "embedlab"):
        again = ["fit", "-c", str(RECIPE), "--run", str(moved), "--resume", "--trainer.max_epochs=2", "--json"]
        assert main(again) == 0
    assert "-c is not read again" in caplog.text
    result = json.loads(capsys.readouterr().out)
    assert result["steps"] == 20, "batches of the first command, not of the recipe"
    assert result["checkpoint"] == str(moved / "checkpoints" / "step-00000020.ckpt")
    assert not run.exists(), "nothing is written to where the folder was"
    for path in (moved / "checkpoints").glob("*.ckpt"):
        path.write_bytes(b"torn")
    assert main(["fit", "--run", str(moved), "--resume"]) == 1
    assert (
        "holds no checkpoint that is whole; delete the folder and start it without --resume" in capsys.readouterr().err
    )


# ---- warnings and guards -------------------------------------------------------------------------------------------


def test_other_threads_and_processes_are_warned_about(unbroken, tmp_path, caplog) -> None:
    folder, _, _ = unbroken(True, 0, "32-true")
    checkpoint = torch.load(folder / "step-00000007.ckpt", weights_only=True)
    checkpoint["resume"]["surroundings"] |= {"threads": 77, "PyTorch": "1.0", "processes": 2}
    write_checkpoint(checkpoint, tmp_path / "step-00000007.ckpt")
    with caplog.at_level(logging.WARNING, "embedlab"):
        train(tmp_path, tmp_path / "step-00000007.ckpt", die=8)
    assert re.search(r"goes on with threads \d+ and was begun with 77: it will not equal", caplog.text)
    assert f"goes on with PyTorch {torch.__version__} and was begun with 1.0" in caplog.text
    assert "goes on with processes 1 and was begun with 2" in caplog.text
    assert newest_valid(tmp_path).name == "step-00000008.ckpt"


def broken_method(where: str) -> MetricLearning:
    class Breaks(nn.Module):
        gather, calls = True, 0

        def forward(self, embeddings, labels):
            self.calls += 1
            if where == "gradient":  # 0 * infinite derivative of the root at 0
                return (embeddings * (0.0 if self.calls == 3 else 1.0)).square().sum().sqrt()
            return embeddings.sum() * (float("nan") if self.calls == 3 else 1.0)

    torch.manual_seed(0)
    return MetricLearning(ResNet("resnet10", stem="small", width=0.125), MLPHead(8), loss=Breaks())


@pytest.mark.parametrize(("where", "kind"), [("loss", NonFiniteLossError), ("gradient", NonFiniteGradientError)])
def test_nan_stops_before_the_step_and_names_step_and_samples(tmp_path, where, kind) -> None:
    weights, samples = [], []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            weights[:] = [p.detach().clone() for p in pl_module.parameters()]
            samples[:] = batch.index.tolist()

    method = broken_method(where)
    trainer = pl.Trainer(
        default_root_dir=tmp_path,
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[Guard(), Watch()],
    )
    with pytest.raises(kind) as told:
        trainer.fit(method, datamodule=data(balanced=True, workers=0))
    assert f"at step 2 (epoch 0), samples {', '.join(map(str, samples))}; the weights are those" in str(told.value)
    assert where in str(told.value)
    assert all(torch.equal(a, b) for a, b in zip(weights, method.parameters(), strict=True))


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="Checkpoints needs keep >= 1, got 0"):
        Checkpoints(keep=0)
    with pytest.raises(ValueError, match="Checkpoints needs every_n_steps >= 1, got 0"):
        Checkpoints(every_n_steps=0)
    assert Terminated(128 + signal.SIGTERM).code == 143
