import csv
import json
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import nn

from embedlab import metrics
from embedlab._types import Batch
from embedlab.data import ImageData, Mix, Source, Views
from embedlab.data.module import ImageBatches
from embedlab.encoders import Encoder, MLPHead, ResNet
from embedlab.losses import FocalLoss, SupConLoss, TripletLoss
from embedlab.methods import MetricLearning, NonFiniteLossError, SimCLR
from embedlab.methods.base import _warmup_cosine
from embedlab.methods.trainer import SaveEncoder
from embedlab.retrieval.monitor import Monitor
from embedlab.tasks import Classification, finetune


def source(classes: int = 6, images: int = 8, *, columns=None) -> Source:
    """Classes that differ in colour, with noise: learnable in a few steps."""
    random = np.random.default_rng(0)
    colours = random.integers(30, 226, (classes, 1, 1, 1, 3))
    pixels = (colours + random.normal(0, 20, (classes, images, 12, 12, 3))).clip(0, 255).astype(np.uint8)
    labels = [f"class {number}" for number in range(classes) for _ in range(images)]
    return Source.from_arrays(pixels.reshape(-1, 12, 12, 3), labels, columns=columns)


def data(**arguments) -> ImageData:
    settings = {"image_size": 12, "batch_size": 12, "images_per_class": 3, "fractions": (0.5, 0.25, 0.25)}
    return ImageData(arguments.pop("root", None) or source(), **{**settings, **arguments})


def net() -> ResNet:
    torch.manual_seed(0)
    return ResNet("resnet10", stem="small", width=0.125, norm="group")


def trainer(folder, **arguments) -> pl.Trainer:
    settings = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return pl.Trainer(default_root_dir=folder, use_distributed_sampler=False, **{**settings, **quiet, **arguments})


class Losses(pl.Callback):
    """The loss of every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer, method, outputs, *_) -> None:
        self.seen.append(outputs["loss"].item())


@pytest.mark.parametrize("loss", [SupConLoss(), TripletLoss(mining="batch-hard", margin=0.3)])
def test_metric_learning_learns_and_leaves_an_encoder(tmp_path, loss) -> None:
    method = MetricLearning(
        net(), MLPHead(8, norm="layer"), loss=loss, optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3)
    )
    losses = Losses()
    run = trainer(tmp_path, max_epochs=6, callbacks=[SaveEncoder(), Monitor(), losses])
    module = data(views=Views(crop_scale=(0.8, 1.0), jitter=0.0, grayscale=0.0))
    run.fit(method, datamodule=module)
    part = len(losses.seen) // 3
    assert np.mean(losses.seen[-part:]) < 0.9 * np.mean(losses.seen[:part])
    assert 0 <= run.callback_metrics["val/recall@1"] <= 1
    encoder = Encoder.load(tmp_path / "encoder")
    assert encoder.dim == 8
    assert encoder.preprocessing == json.loads(json.dumps(module.preprocessing | {"mean": list(module.mean)}))
    images = torch.from_numpy(source().pixels[:3].transpose(0, 3, 1, 2).copy())
    expected = nn.functional.normalize(method.eval()(module.normalize(images / 255)))
    torch.testing.assert_close(encoder(images), expected, rtol=1e-4, atol=1e-5)


def test_metric_learning_can_throw_its_head_away(tmp_path) -> None:
    method = MetricLearning(net(), MLPHead(8, norm="layer"), keep_head=False)
    before = method.head.net[0].weight.clone()
    trainer(tmp_path, callbacks=[SaveEncoder()]).fit(method, datamodule=data())
    encoder = Encoder.load(tmp_path / "encoder")
    assert (encoder.head, encoder.dim) == (None, net().out_features)
    assert not torch.equal(method.head.net[0].weight, before), "the loss still goes through it"
    method.eval()
    assert torch.equal(method(torch.zeros(1, 3, 8, 8)), method.backbone(torch.zeros(1, 3, 8, 8)))


def test_simclr_uses_two_views_and_no_labels(tmp_path) -> None:
    unlabelled = Source.from_arrays(source().pixels)
    module = data(root=unlabelled, split="none", images_per_class=None, views=Views(count=2))
    method = SimCLR(net(), MLPHead(8, norm="layer"))
    run = trainer(tmp_path, callbacks=[SaveEncoder()])
    run.fit(method, datamodule=module)
    assert Encoder.load(tmp_path / "encoder").dim == net().out_features, "the projection head is thrown away"
    with pytest.raises(ValueError, match="SimCLR needs two views per image, got one; set data.init_args.views.count"):
        trainer(tmp_path).fit(SimCLR(net()), datamodule=data(root=unlabelled, split="none", images_per_class=None))


def test_a_foreign_loss_works(tmp_path) -> None:
    class Foreign(nn.Module):
        def forward(self, embeddings, labels):
            return (embeddings.norm(dim=1) - labels).square().mean()

    method = MetricLearning(net(), loss=Foreign())
    before = [p.clone() for p in method.parameters()]
    trainer(tmp_path, max_epochs=1).fit(method, datamodule=data())
    assert any(not torch.equal(a, b) for a, b in zip(before, method.parameters(), strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_loss_stops_before_the_weights_change(tmp_path, bad) -> None:
    class Breaks(nn.Module):
        gather, calls = True, 0

        def forward(self, embeddings, labels):
            self.calls += 1
            return embeddings.square().sum() * (bad if self.calls == 3 else 1.0)

    weights = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, *arguments):
            weights[:] = [p.detach().clone() for p in arguments[1].parameters()]

    method = MetricLearning(net(), loss=Breaks())
    with pytest.raises(
        NonFiniteLossError,
        match=rf"The loss is {bad} at step 2 \(epoch \d\); .* goes on from its last checkpoint by --resume",
    ):
        trainer(tmp_path, max_epochs=9, callbacks=[Watch()]).fit(method, datamodule=data())
    assert all(torch.equal(a, b) for a, b in zip(weights, method.parameters(), strict=True))


def test_bf16_also_means_channels_last(tmp_path) -> None:
    method = MetricLearning(net(), MLPHead(8, norm="layer"))
    trainer(tmp_path, max_epochs=1, precision="bf16-mixed").fit(method, datamodule=data())
    assert method.backbone.net.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_biases_have_no_weight_decay_and_the_rate_warms_up() -> None:
    method = MetricLearning(net(), MLPHead(8))
    decayed, plain = method.parameter_groups()
    assert all(p.ndim > 1 for p in decayed["params"])
    assert plain["weight_decay"] == 0
    assert len(decayed["params"]) + len(plain["params"]) == len(list(method.parameters()))
    rates = [_warmup_cosine(step, 10, 100) for step in range(101)]
    assert rates[0] == pytest.approx(1 / 11)
    assert max(rates) == rates[10] == 1
    assert rates[100] == pytest.approx(0)


def test_two_equal_runs_are_equal(tmp_path) -> None:
    found = []
    for _ in range(2):
        method = MetricLearning(net(), MLPHead(8, norm="layer", hidden_layers=0))
        trainer(tmp_path).fit(method, datamodule=data())
        found.append(torch.cat([p.detach().flatten() for p in method.backbone.parameters()]))
    assert torch.equal(*found)


def test_data_roles_numbers_and_split_file(tmp_path) -> None:
    from pytorch_lightning.loggers import CSVLogger

    module = data(seed=3)
    trainer(tmp_path, max_epochs=1, logger=CSVLogger(tmp_path, "", "")).fit(MetricLearning(net()), datamodule=module)
    labels = np.array(module.source.labels)
    sets = [set(labels[module.roles == role]) for role in ("train", "calibrate", "test")]
    assert not sets[0] & sets[1] | sets[0] & sets[2] | sets[1] & sets[2]
    assert module.num_classes == len(sets[0])
    assert set(module.numbers[module.roles == "train"]) == set(range(module.num_classes))
    written = (tmp_path / "split.csv").read_text().splitlines()
    assert written[0] == "path,label,split"
    assert len(written) == 1 + len(labels)


@pytest.mark.parametrize("cache", [4.0, 0.0], ids=["cached", "decoded each time"])
def test_batches_are_the_same_with_and_without_the_cache(cache) -> None:
    module = data(cache_gib=cache)
    module.setup()
    batch = next(iter(module.train_dataloader()))
    assert isinstance(batch, Batch)
    assert batch.views[0].dtype == torch.uint8
    pixels = module.source.pixels[batch.index.numpy()].transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(batch.views[0].numpy(), pixels)
    assert [module.class_names[n] for n in batch.labels] == [module.source.labels[row] for row in batch.index]


def test_a_class_with_one_image_is_named_where_positives_are_needed() -> None:
    few = source().subset([row for row in range(48) if row < 41])  # "class 5" keeps one image
    module = data(root=few, split="none")
    module.setup()
    with pytest.raises(ValueError, match="1 of 6 training classes have one image only .* pair: class 5. Add images"):
        module.train_dataloader()
    unlabelled = data(root=Source.from_arrays(source().pixels), split="none")
    unlabelled.setup()
    with pytest.raises(ValueError, match="has no labels, but balanced batches or a supervised loss need them"):
        unlabelled.train_dataloader()


def test_few_labels_per_class_are_the_same_for_a_seed() -> None:
    chosen = []
    for seed in (0, 0, 1):
        module = data(split="sample", labels_per_class=2, images_per_class=None, seed=seed, fractions=(0.8, 0.0, 0.2))
        module.setup()
        dataset = module.dataset("train")
        assert np.bincount(dataset.labels).tolist() == [2] * 6
        chosen.append(dataset.rows.tolist())
    assert chosen[0] == chosen[1] != chosen[2]


def test_more_labels_per_class_than_there_are_is_said(caplog) -> None:
    roles = ["train" if number % 8 < (5 if number < 8 else 2) else "test" for number in range(48)]
    parts = source(columns={"split": roles})
    for asked in (2, 4):
        module = data(root=parts, split="column", labels_per_class=asked, images_per_class=None)
        module.setup()
        assert len(module.dataset("train")) == 10 + asked
        told = "labels_per_class 4: 5 of 6 training classes have fewer images (the smallest 2), and all of theirs are"
        assert (told in caplog.text) == (asked == 4)


def test_roles_from_a_column() -> None:
    roles = np.array(["train", "val", "test"])[np.arange(48) % 3].tolist()
    module = data(root=source(columns={"split": roles}), split="column")
    module.setup()
    assert module.roles.tolist() == [{"val": "calibrate"}.get(role, role) for role in roles]
    wrong = data(root=source(columns={"split": ["training"] * 48}), split="column")
    with pytest.raises(ValueError, match="must hold train, calibrate .or val. and test; got \\['training'\\]"):
        wrong.setup()
    with pytest.raises(ValueError, match="split=group needs a column 'group'"):
        data(split="group").setup()
    with pytest.raises(ValueError, match="split=class needs labels"):
        data(root=Source.from_arrays(source().pixels)).setup()


def test_classification_fine_tunes_and_reports(tmp_path) -> None:
    module = data(
        split="sample", images_per_class=None, fractions=(0.5, 0.25, 0.25), views=Views(jitter=0, grayscale=0)
    )
    encoder = Encoder(net(), image_size=12)
    before = encoder.fingerprint
    report = finetune(module, encoder, steps=60, rate=1e-2, backbone_rate=0.3, run=tmp_path / "run", progress=False)
    assert report["accuracy"] > 0.5
    assert report["auc"] > 0.8
    made = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (made["path"], made["split"], made["fractions"]) == (None, "sample", [0.5, 0.25, 0.25])
    assert (made["labels_per_class"], made["batch_size"], made["weight_decay"]) == (None, 12, 0.05)
    assert (made["views"]["flip"], made["views"]["jitter"], made["skipped_images"]) == (0.5, 0, [])
    assert {"embedlab", "python", "torch"} <= made["versions"].keys()
    assert all(made["hardware"][name] for name in ("processor", "cores", "device"))
    assert 0 < report["precision"] <= 1
    assert encoder.fingerprint == before, "the encoder that was given stays as it is"
    assert json.loads((tmp_path / "run" / "report.json").read_text())["accuracy"] == report["accuracy"]
    lines = (tmp_path / "run" / "predictions.csv").read_text().splitlines()
    right = [line.split(",")[1] == line.split(",")[2] for line in lines[1:]]
    assert sum(right) / len(right) == pytest.approx(report["accuracy"])
    assert Encoder.load(tmp_path / "run" / "encoder").fingerprint != before


def test_two_classes_by_group_report_the_positive_one() -> None:
    labels = ["bad" if number % 3 == 0 else "good" for number in range(48)]
    groups = [f"part {number // 4}" for number in range(48)]
    parts = Source.from_arrays(source().pixels, labels, columns={"group": groups})
    module = data(root=parts, split="group", images_per_class=None, fractions=(0.5, 0.0, 0.5))
    encoder = Encoder(net(), image_size=12)
    report = finetune(module, encoder, steps=2, positive="bad", progress=False)
    for name in ("accuracy", "auc", "average_precision", "f_beta", "mcc"):
        low, high = report["intervals"][name]
        assert low <= report[name] <= high
    assert report["threshold"] == 0.5
    assert report["threshold_from"] == "half"
    with pytest.raises(ValueError, match="positive names one of two classes; the data has .* got 'broken'"):
        finetune(data(root=parts, split="group", images_per_class=None), encoder, positive="broken", progress=False)
    with pytest.raises(ValueError, match="positive is for data of two classes; this has 6, such as .*Leave it out"):
        finetune(data(split="sample", images_per_class=None), encoder, positive="class 0", progress=False)


def test_images_without_a_group_are_named_before_the_training() -> None:
    roles, encoder = ["train", "test"] * 24, Encoder(net(), image_size=12)
    for gap in (6, 7):
        groups = ["" if row == gap else f"part {row // 4}" for row in range(48)]
        parts = source(columns={"group": groups, "split": roles})
        message = rf"array\[{gap}\] has no value in the column 'group': images without one would be of one group"
        with pytest.raises(ValueError, match=message):
            data(root=parts, split="group").setup()
    with pytest.raises(ValueError, match=message):  # that one is tested, and groups are resampled
        finetune(data(root=parts, split="column", images_per_class=None), encoder, steps=1, progress=False)


def test_a_test_without_a_mistake_is_no_certainty() -> None:
    """Twelve groups, three of them red: some draws have none of these, and an MCC of 0 is none of theirs."""
    pixels = np.full((48, 12, 12, 3), (20, 20, 200), np.uint8)
    bad = np.arange(48) % 16 < 4
    pixels[bad] = (200, 20, 20)
    labels = np.where(bad, "bad", "good").tolist()
    roles = ["train"] * 12 + ["test"] * 36
    parts = Source.from_arrays(pixels, labels, columns={"group": [f"part {n // 4}" for n in range(48)], "split": roles})
    views = Views(jitter=0, grayscale=0)
    module = data(root=parts, split="column", images_per_class=None, views=views)
    report = finetune(module, Encoder(net(), image_size=12), steps=20, positive="bad", progress=False)
    assert (report["accuracy"], report["mcc"], report["auc"]) == (1, pytest.approx(1), 1)
    none = dict.fromkeys(("auc", "average_precision", "f_beta", "mcc"))
    assert report["intervals"] == {"accuracy": metrics.wilson_interval(9, 9), **none}


def test_the_calibrate_role_sets_the_threshold_of_the_positive_class(tmp_path) -> None:
    labels = ["bad" if number % 3 == 0 else "good" for number in range(48)]
    parts = Source.from_arrays(source().pixels, labels)
    module = data(root=parts, split="sample", images_per_class=None, fractions=(0.4, 0.3, 0.3))
    encoder = Encoder(net(), image_size=12)
    report = finetune(module, encoder, steps=2, positive="bad", beta=2, run=tmp_path / "run", progress=False)
    assert report["threshold_from"] == "calibrate"
    with (tmp_path / "run" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "label", "predicted", "probability_of_bad"]
    for row in rows:
        bad = float(row["probability_of_bad"])
        assert (bad >= report["threshold"] - 1e-6) == (row["predicted"] == "bad")
    scores, truth = [float(row["probability_of_bad"]) for row in rows], [row["label"] == "bad" for row in rows]
    assert report["auc"] == pytest.approx(metrics.roc_auc(scores, truth))
    hits, missed, alarms = (
        sum((row["label"], row["predicted"]) == pair for row in rows)
        for pair in (("bad", "bad"), ("bad", "good"), ("good", "bad"))
    )
    assert report["f_beta"] == pytest.approx(5 * hits / (5 * hits + 4 * missed + alarms))


@pytest.mark.parametrize("role", ["calibrate", "test"])
@pytest.mark.parametrize("cached", [True, False])
def test_images_that_cannot_be_read_are_left_out_and_named(tmp_path, role, cached) -> None:
    for number in range(48):
        place = tmp_path / "images" / ("bad" if number % 3 == 0 else "good")
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 12), (5 * number, 0, 255 - 5 * number)).save(place / f"{number}.png")
    options = {"root": tmp_path / "images", "split": "sample", "images_per_class": None, "fractions": (0.4, 0.3, 0.3)}
    options |= {"on_error": "skip", "cache_gib": 4.0 if cached else 0.0}
    first = data(**options)
    first.setup()
    broken = first.source.names[np.flatnonzero(first.roles == role)[0]]
    Path(broken).write_bytes(b"")
    report = finetune(data(**options), Encoder(net(), image_size=12), steps=1, positive="bad", progress=False)
    assert report["skipped_images"] == [broken]
    assert report["test_images"] == (first.roles == "test").sum() - (role == "test")


def test_a_linear_probe_leaves_the_backbone_alone(tmp_path) -> None:
    backbone = ResNet("resnet10", stem="small", width=0.125)  # with batch statistics, which must not move either
    state = {name: value.clone() for name, value in backbone.state_dict().items()}
    task = Classification(backbone, freeze=True)
    trainer(tmp_path).fit(task, datamodule=data(split="sample", images_per_class=None))
    assert all(torch.equal(value, state[name]) for name, value in backbone.state_dict().items())
    assert {group["rate"] for group in task.parameter_groups()} == {1.0}


def test_a_classifier_explains_what_it_cannot_do(tmp_path) -> None:
    with pytest.raises(ValueError, match="2 classes have no training image, first .*: a classifier can only name"):
        trainer(tmp_path).fit(Classification(net()), datamodule=data(fractions=(0.67, 0.17, 0.16)))
    with pytest.raises(ValueError, match="either a backbone or a saved encoder"):
        Classification()
    Encoder(net(), image_size=12, mean=[0.1, 0.1, 0.1]).save(tmp_path / "encoder")
    task = Classification(encoder=tmp_path / "encoder")
    with pytest.raises(ValueError, match="set data.init_args.mean and std to the encoder's"):
        trainer(tmp_path).fit(task, datamodule=data(split="sample", images_per_class=None))


@pytest.mark.parametrize("kind", ["mixup", "cutmix", "mosaic"])
def test_a_classifier_learns_from_mixtures_and_their_shares(tmp_path, kind) -> None:
    task, seen = Classification(net(), mix=Mix(kind)), []
    task.loss.register_forward_pre_hook(lambda _, given: seen.append(given[1].detach().clone()))
    trainer(tmp_path, max_epochs=1).fit(task, datamodule=data(split="sample", images_per_class=None))
    targets = torch.cat(seen)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(len(targets)))
    assert targets.shape[1] == 6
    assert ((targets > 0).sum(dim=1) > 1).any()
    with pytest.raises(ValueError, match="mix gives every image shares of several classes, which FocalLoss does not"):
        Classification(net(), loss=FocalLoss(), mix=Mix(kind))


def test_the_backbone_learns_at_its_own_rate() -> None:
    task = Classification(net(), backbone_rate=0.1)
    rates = {id(p): group["rate"] for group in task.parameter_groups() for p in group["params"]}
    assert {rates[id(p)] for p in task.backbone.parameters()} == {0.1}


def test_the_limit_of_skipped_images_holds_for_the_role_not_for_a_batch(tmp_path) -> None:
    paths = []
    for number in range(120):
        paths.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(np.full((8, 8, 3), number, dtype=np.uint8)).save(paths[-1])
    (tmp_path / "3.png").write_bytes(b"broken")
    settings = {"numbers": None, "image_size": 8, "on_error": "skip", "cache_gib": 0.0}
    dataset = ImageBatches(Source(paths), np.arange(120), **settings)
    for _ in range(3):
        assert len(dataset[[2, 3, 4]]) == 2, "1 of 3 here, but 1 of 120 in all"
    (tmp_path / "4.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match="2 of 120 images cannot be read"):
        dataset[[2, 3, 4]]


def test_the_monitor_is_silent_where_no_image_has_a_mate(tmp_path) -> None:
    roles = ["train", "train", "calibrate", "train", "train", "test"] * 8
    lonely = [f"{number // 6}" if role == "train" else f"alone {number}" for number, role in enumerate(roles)]
    pixels = Source.from_arrays(source().pixels, lonely, columns={"split": roles})
    run = trainer(tmp_path, max_epochs=1, callbacks=[Monitor()])
    run.fit(MetricLearning(net()), datamodule=data(root=pixels, split="column"))
    assert "val/recall@1" not in run.callback_metrics


def test_metric_learning_goes_on_from_a_saved_encoder(tmp_path) -> None:
    """Weights, whom they know, and the head where none is given."""
    torch.manual_seed(1)
    saved = Encoder(net(), MLPHead(8, norm="layer"), image_size=12, identities=["0123456789abcdef"]).eval()
    saved.save(tmp_path / "encoder")
    own, fresh = MLPHead(4, norm="layer"), torch.rand(3, 3, 12, 12)
    again = MetricLearning(encoder=tmp_path / "encoder")
    torch.testing.assert_close(again.eval()(fresh), saved.head(saved.backbone(fresh)))
    assert MetricLearning(None, own, encoder=tmp_path / "encoder").head is own
    slow = MetricLearning(encoder=tmp_path / "encoder", optimizer=lambda p: torch.optim.SGD(p, lr=1e-5))
    run = trainer(tmp_path, max_epochs=1, callbacks=[SaveEncoder(tmp_path / "next")])
    run.fit(slow, datamodule=data())
    after = Encoder.load(tmp_path / "next")
    torch.testing.assert_close(after.backbone(fresh), saved.backbone(fresh), rtol=0, atol=1e-2)
    assert after.fingerprint != saved.fingerprint
    assert saved.identities < after.identities, "those of before, and those of the data"


def test_a_start_is_a_backbone_or_an_encoder_of_the_same_normalisation(tmp_path) -> None:
    Encoder(net(), image_size=12, mean=[0.5] * 3, std=[0.5] * 3).save(tmp_path / "encoder")
    for kind in (MetricLearning, Classification):
        for arguments in ({}, {"backbone": net(), "encoder": tmp_path / "encoder"}):
            with pytest.raises(ValueError, match=f"{kind.__name__} takes either a backbone or a saved encoder"):
                kind(**arguments)
        start, split = kind(encoder=tmp_path / "encoder"), data(split="sample", images_per_class=None)
        with pytest.raises(ValueError, match=r"was trained with \{'mean': \[0.5, 0.5, 0.5\].*set data.init_args.mean"):
            trainer(tmp_path, max_epochs=1).fit(start, datamodule=split)
