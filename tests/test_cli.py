"""The command line on real files: what a user types, what comes back, what happens when it is wrong."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import yaml
from PIL import Image

from embedlab.cli import main
from embedlab.encoders import Encoder, LinearHead, ResNet

RECIPES = Path(__file__).parents[1] / "recipes"
# a network and a run of a few steps, whatever the recipe
SMALL = [
    "--model.init_args.backbone.init_args.name=resnet10",
    "--model.init_args.backbone.init_args.stem=small",
    "--model.init_args.backbone.init_args.width=0.125",
    "--data.init_args.image_size=16",
    "--data.init_args.decode_size=16",
    "--data.init_args.batch_size=16",
    "--trainer.max_epochs=2",
    "--trainer.accelerator=cpu",
    "--trainer.log_every_n_steps=1",
    "--trainer.check_val_every_n_epoch=1",
]


def draw(root: Path) -> Path:
    """Twelve classes of eight pictures: a colour each, with noise."""
    random = np.random.default_rng(0)
    for number in range(12):
        (root / f"c{number:02d}").mkdir()
        colour = random.integers(30, 226, 3)
        for copy in range(8):
            pixels = (colour + random.normal(0, 25, (20, 20, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / f"c{number:02d}" / f"{copy}.png")
    return root


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return draw(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("encoder") / "encoder"
    Encoder(ResNet("resnet10", stem="small", width=0.125), LinearHead(16), image_size=16).eval().save(folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, pictures) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "first"
    assert (
        main(
            [
                "fit",
                "-c",
                str(RECIPES / "supcon.yaml"),
                f"--data.init_args.root={pictures}",
                "--run",
                str(folder),
                *SMALL,
            ]
        )
        == 0
    )
    return folder


def ask(capsys, *arguments: object) -> dict:
    """Run with --json; stdout must be one document."""
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def fails(capsys, *arguments: object, code: int = 1) -> str:
    """Run what must fail; returns stderr."""
    capsys.readouterr()
    try:
        found = main([*map(str, arguments)])
    except SystemExit as stopped:
        found = stopped.code
    captured = capsys.readouterr()
    assert found == code
    assert not captured.out
    assert "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_runs(recipe, pictures, tmp_path, capsys) -> None:
    header = recipe.read_text().split("\nseed_everything")[0]
    assert f"embedlab fit -c recipes/{recipe.name} --data.init_args.root FOLDER" in header
    assert "Should reach:" in header
    small = [*SMALL, "--trainer.max_epochs=1"]
    if recipe.stem in ("supcon", "triplet", "contrastive", "omniglot_oneshot"):
        small.append("--data.init_args.images_per_class=4")
    if recipe.stem == "omniglot_oneshot":
        small.append("--trainer.limit_train_batches=3")
    if recipe.stem == "cifar10_speedrun":
        small.append("--data.init_args.fractions=[0.8,0.2,0.0]")  # a fiftieth of these few images is none
    result = ask(capsys, "fit", "-c", recipe, f"--data.init_args.root={pictures}", "--run", tmp_path / "run", *small)
    assert result["steps"] > 0
    assert np.isfinite(result["metrics"]["train/loss"])
    for part in ("config.yaml", "metrics.csv", "split.csv", result["checkpoint"], "encoder/encoder.json"):
        assert (tmp_path / "run" / part).is_file(), part


@pytest.mark.parametrize("recipe", ["simclr", "dino"])
def test_an_overlay_goes_over_a_recipe(recipe, pictures, tmp_path, capsys) -> None:
    both = ["-c", RECIPES / f"{recipe}.yaml", "-c", RECIPES / "overlays" / "cifar10.yaml"]
    small = [option for option in SMALL if "image_size" not in option and "decode_size" not in option]
    run = tmp_path / "run"
    ask(capsys, "fit", *both, f"--data.init_args.root={pictures}", "--run", run, *small, "--trainer.max_steps=1")
    config = yaml.safe_load((run / "config.yaml").read_text())
    data = config["data"]["init_args"]
    assert (data["image_size"], data["views"]["blur"], data["views"]["count"]) == (32, 0.0, 2)
    assert config["model"]["class_path"].lower().endswith(recipe)


def test_a_trained_encoder_is_tuned_on_degraded_pictures(run, pictures, tmp_path, capsys) -> None:
    overlay = RECIPES / "overlays" / "degraded.yaml"
    small = [option for option in SMALL if "backbone" not in option]
    result = ask(
        capsys,
        *["fit", "-c", RECIPES / "supcon.yaml", "-c", overlay, f"--data.init_args.root={pictures}", *small],
        *[f"--model.init_args.encoder={run / 'encoder'}", "--run", tmp_path / "tuned", "--trainer.max_steps=1"],
    )
    config = yaml.safe_load((tmp_path / "tuned" / "config.yaml").read_text())
    assert config["data"]["init_args"]["degrade"]["probability"] == 0.5
    assert config["model"]["init_args"]["backbone"] is None
    before, after = Encoder.load(run / "encoder"), Encoder.load(result["encoder"])
    assert before.architecture == after.architecture
    assert before.fingerprint != after.fingerprint
    assert before.identities <= after.identities


def test_the_checkpoint_is_that_of_the_end_also_without_a_validation_there(pictures, tmp_path, capsys) -> None:
    epochs = ["--trainer.max_epochs=3", "--trainer.check_val_every_n_epoch=2"]
    result = ask(
        capsys,
        *["fit", "-c", RECIPES / "supcon.yaml", f"--data.init_args.root={pictures}", "--run", tmp_path / "run"],
        *[*SMALL, *epochs],
    )
    checkpoint = torch.load(result["checkpoint"], weights_only=True)
    assert (checkpoint["epoch"], checkpoint["global_step"]) == (3, result["steps"])


def test_fit_leaves_an_encoder_that_the_other_commands_take(run, pictures, tmp_path, capsys) -> None:
    stored = tmp_path / "stored"
    found = ask(
        capsys, "embed", run / "split.csv", "--encoder", run / "encoder", "--out", stored, "--select", "split=test"
    )
    assert found["count"] == (run / "split.csv").read_text().count(",test")
    by_files = ask(
        capsys, "evaluate", run / "split.csv", "--encoder", run / "encoder", "--select", "split=test", "--baselines"
    )
    assert set(by_files["results"]) == {"encoder", "raw pixels", "untrained"}
    by_vectors = ask(capsys, "evaluate", stored)
    for name in ("recall_at_1", "map_at_r", "r_precision"):
        assert by_vectors["results"]["vectors"][name] == pytest.approx(by_files["results"]["encoder"][name])
    assert by_files["protocol"]["select"] == {"split": ["test"]}


def test_the_configuration_is_saved_with_every_override(run) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["data"]["init_args"]["image_size"] == 16
    assert config["model"]["init_args"]["backbone"]["init_args"]["width"] == 0.125


def test_a_run_is_never_overwritten_and_can_be_resumed(run, pictures, capsys) -> None:
    again = ["fit", "-c", RECIPES / "supcon.yaml", f"--data.init_args.root={pictures}", "--run", run, *SMALL]
    message = fails(capsys, *again)
    assert f"{run} already holds a run. Go on with it by --resume, choose another folder" in message
    before = Encoder.load(run / "encoder").fingerprint
    ask(capsys, "fit", "--run", run, "--resume", "--trainer.max_epochs=3")
    assert (run / "metrics-1.csv").is_file()
    assert (run / "metrics-1.csv").is_file(), "the figures of the first part stay"
    assert Encoder.load(run / "encoder").fingerprint != before
    assert "Nothing to resume" in fails(capsys, "fit", "--run", run / "nowhere", "--resume")
    assert "needs a recipe" in fails(capsys, "fit")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--model.init_args.loss.init_args.temprature=1", "'temperature'"),
        ("--model.init_args.bakbone=x", "'backbone'"),
        ("--data.init_args.imagesize=9", "'image_size'"),
        ("--data.init_args.views.flipp=1", "'flip'"),
        ("--trainer.max_epoks=1", "'max_epochs'"),
        ("--modle.x=1", "'model'"),
    ],
)
def test_a_misspelt_key_is_refused_in_two_lines_with_the_right_one(override, message, capsys) -> None:
    told = fails(capsys, "fit", "-c", RECIPES / "supcon.yaml", override, code=2).strip().splitlines()
    assert len(told) == 2, told
    assert told[0].startswith("embedlab fit: error: ")
    assert f"Did you mean {message}?" in told[1]


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("temperature:", "temprature:"),
        ("image_size:", "image_sise:"),
        ("max_epochs:", "max_epoch_s:"),
        ("crop_scale:", "crop_skale:"),
    ],
)
def test_a_misspelt_key_in_a_recipe_is_refused_alike(wrong, right, tmp_path, capsys) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text((RECIPES / "supcon.yaml").read_text().replace(wrong, right))
    told = fails(capsys, "fit", "-c", recipe, code=2).strip().splitlines()
    assert len(told) == 2, told
    assert right.rstrip(":") in told[0]
    assert f"Did you mean '{wrong.rstrip(':')}'?" in told[1]


def test_print_config_writes_the_whole_recipe(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "-c", str(RECIPES / "supcon.yaml"), "--print_config"])
    assert stopped.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["model"]["init_args"]["loss"]["init_args"]["gather"] is True


def test_gallery_verbs_from_enrolling_to_removal(pictures, encoder, tmp_path, capsys) -> None:
    gallery, manifest = tmp_path / "gallery", tmp_path / "all.csv"
    roles = {**{f"c{n:02d}": "known" for n in range(4)}, **{f"c{n:02d}": "stranger" for n in range(4, 12)}}
    lines = [
        f"{pictures}/{name}/{copy}.png,{name},{role},{'template' if copy < 3 else 'probe'}"
        for name, role in roles.items()
        for copy in range(8)
    ]
    manifest.write_text("path,label,role,use\n" + "\n".join(lines))
    ask(capsys, "gallery", "create", gallery, "--encoder", encoder)
    enrolled = ask(capsys, "gallery", "enroll", gallery, manifest, "--select", "role=known", "use=template")
    assert (enrolled["identities"], enrolled["templates"]) == (4, 12)
    early = ask(capsys, "gallery", "identify", gallery, pictures / "c00" / "5.png")
    assert early["results"][0]["label"] is None
    assert early["results"][0]["calibrated"] is False
    found = ask(capsys, "gallery", "calibrate", gallery, manifest, "--select", "role=stranger", "--fpir", "0.4")
    assert found["bound"] <= 0.4
    answers = ask(capsys, "gallery", "identify", gallery, manifest, "--select", "use=probe")
    assert answers["report"]["enrolled"] == 4
    assert answers["report"]["strangers"] == 8
    right = [row for row in answers["results"] if row["label"] and f"/{row['label']}/" in row["probe"]]
    assert right
    probe = right[0]
    claim = ask(capsys, "gallery", "verify", gallery, probe["probe"], "--label", probe["label"])
    assert claim["results"][0]["accepted"] in (True, False)
    assert ask(capsys, "gallery", "search", gallery, probe["probe"], "-k", "2")["results"][0]["neighbours"][0]["label"]
    assert ask(capsys, "gallery", "rename", gallery, "c00", "zero")["renamed"] == 3
    assert ask(capsys, "gallery", "merge", gallery, "c01", "zero")["merged"] == 3
    assert ask(capsys, "gallery", "list", gallery)["identities"] == {"c02": 3, "c03": 3, "zero": 6}
    assert ask(capsys, "gallery", "remove", gallery, "--label", "zero", "--purge")["removed"] == 6
    assert ask(capsys, "gallery", "info", gallery)["identities"] == 2
    ask(capsys, "gallery", "backup", gallery, tmp_path / "copy")
    assert ask(capsys, "gallery", "check", tmp_path / "copy")["ok"] is True
    assert ask(capsys, "gallery", "compact", gallery)["bytes_saved"] >= 0


def test_a_gallery_of_ready_made_vectors_needs_no_encoder(tmp_path, capsys) -> None:
    vectors, labels = tmp_path / "v.npy", tmp_path / "labels.txt"
    np.save(vectors, np.eye(4, dtype=np.float32))
    labels.write_text("ann\nbob\neve\nann\n")
    ask(capsys, "gallery", "create", tmp_path / "g", "--dim", "4")
    assert ask(capsys, "gallery", "enroll", tmp_path / "g", vectors, "--labels", labels)["identities"] == 3
    assert ask(capsys, "gallery", "identify", tmp_path / "g", vectors)["results"][1]["best"] == "bob"
    np.save(vectors, np.full((1, 4), np.nan, np.float32))
    assert "NaN" in fails(capsys, "gallery", "enroll", tmp_path / "g", vectors, "--labels", labels)
    np.save(vectors, np.zeros((1, 4), np.float32))
    labels.write_text("ann\n")
    assert "zero" in fails(capsys, "gallery", "enroll", tmp_path / "g", vectors, "--labels", labels)
    assert ask(capsys, "gallery", "list", tmp_path / "g")["identities"] == {"ann": 2, "bob": 1, "eve": 1}


def ask_text(capsys, *arguments) -> str:
    assert main([*map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_a_gallery_is_configured_and_flags_that_do_nothing_are_refused(pictures, tmp_path, capsys) -> None:
    vectors, labels, others = tmp_path / "v.npy", tmp_path / "labels.txt", tmp_path / "others.npy"
    random = np.random.default_rng(0)
    np.save(vectors, np.eye(4, dtype=np.float32))
    np.save(others, random.standard_normal((20, 4)).astype(np.float32))
    labels.write_text("ann\nbob\neve\nann\n")
    gallery = tmp_path / "g"
    made = ask(capsys, "gallery", "create", gallery, "--dim", "4", "--search", "exact", "--vote-k", "3")
    assert (made["search"]["kind"], made["settings"]["vote_k"]) == ("exact", 3)
    assert "rows of a manifest" in fails(capsys, "gallery", "enroll", gallery, vectors, "--select", "split=test")
    assert "--labels belongs to files of vectors" in fails(
        capsys, "gallery", "enroll", gallery, pictures / "c00", "--labels", labels
    )
    assert "No such file or folder" in fails(capsys, "audit", vectors, tmp_path / "none.txt")
    assert "Vectors come as" in fails(capsys, "audit", pictures / "c00" / "0.png", labels)
    ask(capsys, "gallery", "enroll", gallery, vectors, "--labels", labels)
    assert "fpir lies between" in fails(capsys, "gallery", "calibrate", gallery, others, "--fpir", "2")
    assert "at the threshold" not in ask_text(capsys, "audit", vectors, labels)
    found = ask(capsys, "gallery", "search", gallery, vectors, "-k", "2", "--per", "identity")
    assert len({near["label"] for near in found["results"][0]["neighbours"]}) == 2
    assert "what to change" in fails(capsys, "gallery", "configure", gallery)
    changed = ask(capsys, "gallery", "configure", gallery, "--fusion", "mean", "--search-recall", "0.9")
    assert (changed["settings"]["fusion"], changed["search"]["recall"]) == ("mean", 0.9)
    np.save(vectors, random.standard_normal((40, 4)).astype(np.float32))
    labels.write_text("\n".join(f"stranger {number // 2}" for number in range(40)))
    promised = ["gallery", "calibrate", gallery, vectors, "--labels", labels, "--fpir", "0.5"]
    assert ask(capsys, *promised)["images"] == 40
    assert ask(capsys, *promised, "--one-probe")["images"] == 20
    ask(capsys, "gallery", "configure", gallery, "--normalisation", "as-norm", "--cohort", others, "--cohort-k", "5")
    assert "as-norm" in ask_text(capsys, "gallery", "info", gallery)
    promise = ask(capsys, *promised)
    lines = ask_text(capsys, "gallery", "info", gallery).splitlines()
    for name, shown in (("threshold", f"{promise['threshold']:.4f}"), ("bound", f"{promise['bound']:.4g}")):
        assert f"{name:22s}  {shown}" in lines
    assert ask(capsys, "gallery", "info", gallery)["calibration"]["threshold"] == promise["threshold"]


def test_open_set_trial_from_the_command_line(run, capsys) -> None:
    result = ask(
        capsys, "evaluate", run / "split.csv", "--encoder", run / "encoder", "--select", "split=test,calibrate",
        "--open-set", "--calibrate-select", "split=train", "--fpir", "0.45", "--templates", "2", "--baselines",
    )  # fmt: skip
    trial = result["results"]["encoder"]["open_set"]
    assert trial["target_fpir"] == 0.45
    assert trial["calibration_strangers"] == 7
    low, high = trial["intervals"]["detection_rate"]
    assert 0 <= low <= trial["detection_rate"] <= high <= 1
    message = fails(
        capsys,
        "evaluate",
        run / "split.csv",
        "--encoder",
        run / "encoder",
        "--open-set",
        "--calibrate-select",
        "split=test",
    )
    assert "set the threshold and are tested on it" in message


def test_finetune_from_an_encoder_and_from_scratch(pictures, encoder, tmp_path, capsys) -> None:
    arguments = ["--steps", "6", "--batch-size", "16", "--labels-per-class", "2"]
    tuned = ask(capsys, "finetune", pictures, "--encoder", encoder, "--run", tmp_path / "a", *arguments)
    assert tuned["train_images"] == 24
    assert (tmp_path / "a" / "predictions.csv").is_file()
    assert (tmp_path / "a" / "split.csv").read_text().count(",test") == tuned["test_images"]
    assert Encoder.load(tmp_path / "a" / "encoder").dim == 64
    scratch = ask(
        capsys, "finetune", pictures, "--scratch-like", encoder, "--run", tmp_path / "b", "--loss", "focal", *arguments
    )
    assert scratch["loss"] == "FocalLoss"
    assert scratch["encoder"] != tuned["encoder"]
    assert "is not empty; choose another folder" in fails(
        capsys, "finetune", pictures, "--encoder", encoder, "--run", tmp_path / "a"
    )


def test_bad_input_is_one_clear_line(pictures, encoder, tmp_path, capsys) -> None:
    broken = tmp_path / "broken" / "a"
    broken.mkdir(parents=True)
    for number in range(3):
        (broken / f"{number}.jpg").write_bytes((pictures / "c00" / "0.png").read_bytes()[: 60 if number else None])
    out = ["--encoder", encoder, "--out", tmp_path / "out"]
    assert "1.jpg" in fails(capsys, "embed", broken.parent, *out)
    assert "2 of 3 images cannot be read" in fails(capsys, "embed", broken.parent, *out, "--on-error", "skip")
    assert not (tmp_path / "out").exists()
    assert "holds no saved encoder" in fails(
        capsys, "embed", pictures, "--encoder", tmp_path, "--out", tmp_path / "out"
    )
    assert "--select takes COLUMN=VALUE, got 'split'" in fails(capsys, "embed", pictures, *out, "--select", "split")
    assert "needs --encoder FOLDER" in fails(capsys, "evaluate", pictures)
    itself = ["evaluate", pictures, "--reference", pictures, "--encoder", encoder]
    assert "96 images are queries and reference at once" in fails(capsys, *itself)
    assert "is no gallery" in fails(capsys, "gallery", "info", tmp_path / "nothing")
    ask(capsys, "gallery", "create", tmp_path / "gallery", "--encoder", encoder)
    assert "has no labels" in fails(capsys, "gallery", "enroll", tmp_path / "gallery", pictures / "c00")
    assert ask(capsys, "gallery", "enroll", tmp_path / "gallery", pictures / "c00", "--label", "red")["enrolled"] == 8
    assert "either --label or --id" in fails(capsys, "gallery", "remove", tmp_path / "gallery")
    fails(capsys, "no-such-command", code=2)


def test_two_processes_train_the_same_recipe(pictures, tmp_path) -> None:
    """The real launch: a console command that starts its second process itself."""
    command = [
        sys.executable, "-m", "embedlab", "fit", "-c", RECIPES / "supcon.yaml", "--run", tmp_path / "run", "--json",
        f"--data.init_args.root={pictures}", *SMALL, "--data.init_args.batch_size=8", "--trainer.max_epochs=1",
        "--model.init_args.backbone.init_args.norm=group", "--trainer.devices=2", "--trainer.strategy=ddp",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=240, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["steps"] > 0
    Encoder.load(tmp_path / "run" / "encoder")


def test_an_interrupted_fit_leaves_a_folder_that_resumes_or_says_so(pictures, tmp_path) -> None:
    command = [sys.executable, "-m", "embedlab", "fit", "-c", RECIPES / "supcon.yaml", "--run", tmp_path / "run"]
    settings = [f"--data.init_args.root={pictures}", *SMALL, "--trainer.max_epochs=100000"]
    with subprocess.Popen(
        list(map(str, [*command, *settings])), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as fit:
        for _ in range(600):
            if list((tmp_path / "run" / "checkpoints").glob("step-*.ckpt")):
                break
            if fit.poll() is not None:
                pytest.fail(fit.stderr.read().decode()[-2000:])
            signal.sigtimedwait([], 0.1)
        fit.kill()
    assert main(["fit", "--run", str(tmp_path / "run"), "--resume", "--trainer.max_epochs=1", "--json"]) == 0


def test_a_resume_with_other_data_or_another_network_spoils_nothing(run, pictures, tmp_path, capsys) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    kept = {name: (copy / name).read_bytes() for name in ("config.yaml", "split.csv", "metrics.csv")}
    config = ["fit", "-c", run / "config.yaml", "--run", copy, "--resume", "--trainer.max_epochs=9"]
    assert "not the images and roles of the run before" in fails(capsys, *config, "--data.init_args.seed=5")
    assert {name: (copy / name).read_bytes() for name in kept} == kept
    message = fails(capsys, *config, "--model.init_args.backbone.init_args.name=resnet18")
    assert "of another network than the one asked for. --resume without --model options goes on" in message
    assert len(message.splitlines()) < 8, "not PyTorch's list of keys"
    assert all((copy / name).read_bytes() == kept[name] for name in ("config.yaml", "split.csv"))


def test_a_run_that_ended_before_its_first_step_can_be_started_again(pictures, tmp_path, capsys, monkeypatch) -> None:
    run = tmp_path / "run"
    command = ["fit", "-c", RECIPES / "supcon.yaml", "--run", run, f"--data.init_args.root={pictures}", *SMALL]
    grey = "--data.init_args.channels=1"
    assert "The data has 1 channels, the backbone takes 3" in fails(capsys, *command, grey)
    assert (run / "split.csv").is_file()
    ask(capsys, *command, "--trainer.max_epochs=1")
    monkeypatch.setenv("LOCAL_RANK", "0")  # torchrun sets it for the first process too
    assert "already holds a run" in fails(capsys, *command)


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("--model.init_args.backbone.init_args.name=resnet11", "ResNet knows resnet8"),
        ("--data.init_args.batch_size=0", "ImageData needs batch_size >= 1, got 0"),
        ("--data.init_args.images_per_class=9", "need images_per_class from 2 .* to 8 .* got 9"),
    ],
)
def test_a_value_that_a_class_refuses_is_told_in_one_line(pictures, tmp_path, capsys, override, text) -> None:
    command = ["fit", "-c", RECIPES / "supcon.yaml", "--run", tmp_path / "run", f"--data.init_args.root={pictures}"]
    message = fails(capsys, *command, *SMALL, override)
    assert re.search(text, message)
    assert "Union" not in message
    assert "Namespace" not in message


def test_a_recipe_says_on_how_many_threads_it_trains(pictures, tmp_path, capsys, monkeypatch) -> None:
    command = ["fit", "-c", RECIPES / "supcon.yaml", "--run", tmp_path / "run", f"--data.init_args.root={pictures}"]
    before, seen = torch.get_num_threads(), []
    monkeypatch.setattr(pl.Trainer, "fit", lambda *_, **__: seen.append(torch.get_num_threads()))
    monkeypatch.setattr("embedlab.fit._report", lambda *_, **__: None)
    for threads in ("1", "null", "3"):
        assert main([*map(str, command), *SMALL, "--threads", threads]) == 0
    assert seen == [1, before, 3]
    assert torch.get_num_threads() == before
    with pytest.raises(SystemExit):
        main([*map(str, command), *SMALL, "--threads", "0"])
    assert '"threads": Not of type PositiveInt' in capsys.readouterr().err


def test_numbers_and_folders_are_checked_before_the_work(pictures, encoder, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        main(["embed", str(pictures), "--encoder", str(encoder), "--out", str(tmp_path / "e"), "--batch-size", "0"])
    assert "takes a whole number from 1 on, got '0'" in capsys.readouterr().err
    ask(capsys, "evaluate", pictures, "--encoder", encoder, "--out", tmp_path / "new" / "report.json")
    assert (tmp_path / "new" / "report.json").is_file()
    tune = ["finetune", pictures, "--encoder", encoder, "--run", tmp_path / "t", "--fractions", "0.8", "0.2", "0"]
    assert "Nothing to test on" in fails(capsys, *tune)
    assert "--fractions belongs to --split sample or group; " in fails(capsys, *tune, "--split", "column")
    assert "fpir lies between 0 and 1, got 5.0" in fails(capsys, "quickstart", "--fpir", "5", "--out", tmp_path / "q")
