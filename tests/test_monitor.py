"""The monitor: figures by hand, on any number of ranks, within its share of the time, without a trace in the run."""

import io
import json
import logging
import math
import re
from pathlib import Path

import ddp_worker_monitor as worker
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.multiprocessing
import yaml
from PIL import Image
from torch import nn

from embedlab._ops import keyed_uniform
from embedlab.cli import main
from embedlab.data import Views
from embedlab.encoders import MLPHead
from embedlab.losses import SupConLoss
from embedlab.methods import MetricLearning
from embedlab.methods import trainer as trainer_module
from embedlab.methods.trainer import StepBar
from embedlab.metrics import alignment, effective_rank, feature_std, linear_probe_accuracy, uniformity
from embedlab.retrieval import monitor as monitor_module
from embedlab.retrieval.monitor import Monitor

NAMES = {"knn", "probe", "recall@1", "feature_std", "effective_rank", "alignment", "uniformity"}


def held_out(model, module) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vectors, labels and row numbers of the calibrate role, embedded at once."""
    dataset = module.dataset("calibrate")
    batch = dataset[list(range(len(dataset)))]
    with torch.no_grad():
        vectors = model.eval()(module.plain(batch.views[0]))
    return vectors.numpy(), batch.labels.numpy(), batch.index.numpy()


@pytest.mark.parametrize("kind", ["features", "embedding"])
def test_figures_are_those_of_the_held_out_images(tmp_path, kind) -> None:
    """By hand: all held-out images at once, with loops for what has neighbours."""
    model = worker.method()
    if kind == "embedding":
        model = MetricLearning(
            model.backbone, MLPHead(6, norm="layer"), loss=SupConLoss(), optimizer=lambda g: torch.optim.SGD(g, lr=0.0)
        )
    module = worker.data()
    found = worker.figures(worker.fit(tmp_path, Monitor(k=3, temperature=0.2), model=model, module=module))
    vectors, labels, index = held_out(model, module)
    assert vectors.shape == (45, 6 if kind == "embedding" else 32), "what the encoder will give, not what the loss sees"
    unit = vectors.astype(np.float64) / np.linalg.norm(vectors, axis=1, keepdims=True)
    scores = unit @ unit.T
    hits, right = [], []
    for i in range(len(labels)):
        order = sorted((j for j in range(len(labels)) if j != i), key=lambda j: -scores[i, j])
        hits.append(labels[order[0]] == labels[i])
        votes = np.zeros(5)
        for j in order[:3]:
            votes[labels[j]] += math.exp(scores[i, j] / 0.2)
        right.append(votes.argmax() == labels[i])
    bank = keyed_uniform(torch.from_numpy(index), 2, seed=0)[:, 1].numpy() < 0.5
    views = module.views(
        torch.from_numpy(np.stack([module.source.image(row) for row in index]).transpose(0, 3, 1, 2).copy()),
        torch.from_numpy(index),
        size=8,
        seed=module.seed,
        epoch=0,
        normalize=module.normalize,
    )
    with torch.no_grad():
        first, second = (model(view) for view in views)
    wanted = {
        "recall@1": np.mean(hits),
        "knn": np.mean(right),
        "probe": linear_probe_accuracy(
            vectors[bank], labels[bank], vectors[~bank], labels[~bank], regularization=monitor_module.PENALTY
        ),
        "feature_std": feature_std(vectors),
        "effective_rank": effective_rank(vectors),
        "uniformity": uniformity(vectors),
        "alignment": alignment(first, second),
    }
    assert found.keys() == {f"val/{name}" for name in NAMES}
    for name, value in wanted.items():
        assert found[f"val/{name}"] == pytest.approx(value, rel=1e-5), name


@pytest.mark.ddp
def test_two_ranks_see_what_one_does(tmp_path) -> None:
    """45 held-out images in batches of 4, 23 on one rank and 22 on the other; and 20 of them."""
    torch.multiprocessing.spawn(
        worker.run, (str(tmp_path / "store"), str(tmp_path / "results"), 20), nprocs=worker.WORLD
    )
    both, _ = (torch.load(tmp_path / f"results-{rank}") for rank in range(worker.WORLD))
    for found, images in zip(both, (4096, 20), strict=True):
        wanted = worker.figures(worker.fit(tmp_path, Monitor(images=images)))
        assert found.keys() == wanted.keys() == {f"val/{name}" for name in NAMES}
        for name in ("knn", "probe", "recall@1"):
            assert found[f"val/{name}"] == wanted[f"val/{name}"]
        assert found == pytest.approx(wanted, rel=1e-5)


def test_repeated_images_and_ranks_without_any_do_not_count() -> None:
    """What a padded loader would hand in: images 3 and 5 twice."""
    vectors, index = torch.randn(4, 3), torch.tensor([5, 3, 9, 1])
    parts = [(vectors[:2], index[:2]), (vectors, index)]
    columns = monitor_module._everyone([(v, i, i) for v, i in parts])
    assert columns[2].tolist() == [1, 3, 5, 9]
    np.testing.assert_array_equal(columns[0], vectors[[3, 1, 0, 2]].numpy())
    assert monitor_module._everyone([]) is None


def test_a_subset_is_always_the_same_one(tmp_path) -> None:
    seen = []

    class Spy(Monitor):
        def _figures(self, vectors, labels, index, pairs):
            seen.append((index.tolist(), len(pairs[0])))
            return super()._figures(vectors, labels, index, pairs)

    worker.fit(tmp_path, Spy(images=15, share=100.0), max_epochs=3)
    assert len(seen) == 3
    assert seen[0] == seen[1] == seen[2]
    assert 5 <= len(seen[0][0]) <= 25, "about 15 of 45"


def test_without_labels_there_are_the_figures_that_need_none(tmp_path) -> None:
    module = worker.data(root=worker.source(labels=False))
    found = worker.figures(worker.fit(tmp_path, Monitor(), module=module))
    assert found.keys() == {f"val/{name}" for name in NAMES - {"knn", "probe", "recall@1"}}


@pytest.mark.parametrize("views", [Views(count=1), torch.nn.Identity()], ids=["one view", "foreign"])
def test_methods_of_one_view_have_an_alignment_too(tmp_path, views) -> None:
    model = MetricLearning(worker.method().backbone, loss=SupConLoss())
    found = worker.figures(worker.fit(tmp_path, Monitor(), model=model, module=worker.data(views=views)))
    assert (found["val/alignment"] == pytest.approx(0, abs=1e-9)) == isinstance(views, torch.nn.Identity)


# --------------------------------------------------------------------------------------------------- share of the time


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.mark.parametrize(("share", "wanted"), [(0.5, [1, 3, 5, 7, 8]), (0.1, [1, 8]), (1.0, [1, 2, 3, 4, 5, 6, 7, 8])])
def test_evaluations_keep_to_their_share(tmp_path, monkeypatch, share, wanted) -> None:
    """An epoch takes 10 s and an evaluation 10 s: at a half every second one, and the last in any case."""
    clock, seen = Clock(), []
    monkeypatch.setattr(monitor_module, "time", clock)

    class Timed(Monitor):
        def _figures(self, *arguments):
            clock.now += 10
            seen.append(trainer.current_epoch + 1)
            return super()._figures(*arguments)

    class Train(pl.Callback):
        def on_train_epoch_start(self, started, module) -> None:
            nonlocal trainer
            trainer = started
            clock.now += 10

    trainer = None
    monitor = Timed(share=share)
    worker.fit(tmp_path, monitor, callbacks=[monitor, Train()], max_epochs=8)
    assert seen == wanted
    assert monitor.evaluations == len(wanted)


def test_a_watched_run_trains_like_one_that_is_not(tmp_path) -> None:
    """Weights and all three generators, bit for bit; the network is in training mode again."""
    ends = []
    for monitor in (Monitor(share=100.0), pl.Callback()):
        pl.seed_everything(3, verbose=False)
        model = worker.method(rate=0.1)
        worker.fit(tmp_path, monitor, model=model, max_epochs=3)
        draws = (torch.rand(1).item(), np.random.rand(), __import__("random").random())  # noqa: NPY002
        ends.append((torch.cat([p.detach().flatten() for p in model.parameters()]), draws))
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


# ------------------------------------------------------------------------------------------------------------ warnings


class Collapsed(nn.Module):
    """Nearly the same features for every image."""

    out_features = 64

    def __init__(self, spread: float) -> None:
        super().__init__()
        self.linear = nn.Linear(8 * 8 * 3, 64)
        self.spread = spread

    def forward(self, images):
        return 1 + self.spread * self.linear(images.flatten(1))


def test_collapse_is_told_once_and_health_never(tmp_path, caplog) -> None:
    for spread, times in ((1e-3, 1), (1.0, 0)):
        caplog.clear()
        torch.manual_seed(0)
        model = worker.SimCLR(Collapsed(spread), MLPHead(8, norm="layer"), optimizer=lambda g: torch.optim.SGD(g, lr=0))
        with caplog.at_level(logging.WARNING, "embedlab"):
            worker.fit(tmp_path, Monitor(share=100.0), model=model, max_epochs=2)
        told = [record.getMessage() for record in caplog.records]
        assert len(told) == times, told
        assert all(re.search("representation has collapsed.*Usual causes.*learning rate", text) for text in told)


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_dead_features_are_told_and_stop_nothing(tmp_path, caplog, value) -> None:
    class Dead(Collapsed):
        def forward(self, images):
            return super().forward(images) * (1.0 if self.training else value)

    model = worker.SimCLR(Dead(1.0), MLPHead(8, norm="layer"), optimizer=lambda g: torch.optim.SGD(g, lr=0))
    with caplog.at_level(logging.WARNING, "embedlab"):
        trainer = worker.fit(tmp_path, Monitor(), model=model)
    assert "135 of 135 held-out embeddings are zero, NaN or infinite" in caplog.text
    assert worker.figures(trainer) == {}


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"share": 0}, "share > 0"), ({"images": 1}, "images >= 2"), ({"k": 0}, "k >= 1"), ({"temperature": 0}, "> 0")],
)
def test_settings_are_checked(settings, told) -> None:
    with pytest.raises(ValueError, match=told):
        Monitor(**settings)


def test_tensorboard_gets_the_figures(tmp_path) -> None:
    pytest.importorskip("tensorboard")
    from pytorch_lightning.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    worker.fit(tmp_path, Monitor(), logger=TensorBoardLogger(tmp_path, name="", version=""), log_every_n_steps=1)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert {f"val/{name}" for name in NAMES} <= set(events.Tags()["scalars"])


# ------------------------------------------------------------------------------------------------------------ the bar


def test_the_bar_spans_the_run_and_shows_what_matters(tmp_path, monkeypatch) -> None:
    stream, clock = io.StringIO(), Clock()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(trainer_module, "time", clock)
    bar = StepBar("toy")

    class Train(pl.Callback):
        def on_train_batch_start(self, *_) -> None:
            clock.now += 10

    worker.fit(
        tmp_path, Monitor(share=100.0), callbacks=[Monitor(), Train(), bar], max_epochs=3, enable_progress_bar=True
    )
    assert (bar.bar.n, bar.bar.total) == (15, 15), "three epochs of five steps: one bar"
    assert bar.rate == pytest.approx(0.4), "4 images in 10 s"
    last = stream.getvalue().rstrip("\n").split("\r")[-1]
    assert re.search(r"toy: 100%.*15/15 \[.*<.*, loss \d\.\d{3}, k-NN \d\.\d{3}, 0 images/s\]", last), last


def test_the_bar_can_be_left_out(tmp_path, capsys) -> None:
    bar = StepBar()
    bar.disable()
    worker.fit(tmp_path, Monitor(), callbacks=[bar], enable_progress_bar=True)
    assert bar.bar.disable
    bar.enable()
    assert bar.enabled
    assert "step" not in capsys.readouterr().err


@pytest.mark.parametrize("bar", [True, False])
def test_the_command_keeps_the_monitors_settings_beside_the_run(tmp_path, capfd, bar) -> None:
    for row, label in enumerate(worker.source().labels):
        (tmp_path / "images" / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(worker.source().image(row)).save(tmp_path / "images" / label / f"{row}.png")
    recipe = Path(__file__).parents[1] / "recipes" / "simclr.yaml"
    small = ["--model.init_args.backbone.init_args.width=0.125", "--data.init_args.image_size=16"]
    small += ["--data.init_args.decode_size=16", "--data.init_args.batch_size=16", "--trainer.precision=32-true"]
    given = ["--data.init_args.root", str(tmp_path / "images"), "--data.init_args.split=sample", "--monitor.k=3"]
    given += [
        "--trainer.max_epochs=1",
        "--trainer.accelerator=cpu",
        *([] if bar else ["--trainer.enable_progress_bar=false"]),
    ]
    run = tmp_path / "run"
    assert main(["fit", "-c", str(recipe), "--run", str(run), *small, *given, "--json"]) == 0
    told = capfd.readouterr()
    assert {f"val/{name}" for name in NAMES} <= json.loads(told.out)["metrics"].keys()
    kept = yaml.safe_load((run / "config.yaml").read_text())["monitor"]
    assert kept == {"share": 0.05, "images": 4096, "k": 3, "temperature": 0.1}
    assert ("fit: 100%" in told.err) == bar
