import json
import tracemalloc
import weakref
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.stats import kstest

from embedlab._ops import keyed_uniform
from embedlab.cli import main
from embedlab.data import DEGRADATIONS, Degrade, ImageData, Source, Views, degrade
from embedlab.data.degradations import SEVERITIES, _normal
from embedlab.encoders import Encoder, Pixels, ResNet
from embedlab.retrieval import robustness
from embedlab.retrieval.evaluation import evaluate_open_set, retrieval_figures
from embedlab.retrieval.robustness import CLEAN, embed_degraded, evaluate_robustness
from embedlab.serving.pictures import draw_robustness
from tests.naive import naive_hits, naive_matches_of_others, naive_rankings

KINDS = list(DEGRADATIONS)


def pictures(count: int = 6, channels: int = 3, height: int = 48, width: int = 48) -> torch.Tensor:
    """Smooth waves with an edge, as far from noise as photographs are."""
    down, across = torch.linspace(0, 3, height)[:, None], torch.linspace(0, 3, width)
    generator = torch.Generator().manual_seed(0)
    turn, tilt, phase = 4 * torch.rand(3, count, channels, 1, 1, generator=generator)
    waves = 0.5 + 0.3 * torch.sin(turn * down + tilt * across + phase) + 0.15 * (across > 1.3) - 0.1 * (down > 2)
    return (255 * waves.clamp(0, 1)).round().to(torch.uint8)


def psnr(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """(B,) in decibel."""
    return 10 * torch.log10(255**2 / ((images.double() - others.double()) ** 2).mean(dim=(1, 2, 3)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_severity_is_farther_from_the_original(kind, channels) -> None:
    images, index = pictures(channels=channels), torch.arange(6)
    before = images.clone()
    found = torch.stack([psnr(degrade(images, index, kind, severity), images) for severity in SEVERITIES])  # (5, B)
    assert (found[1:] < found[:-1]).all()
    assert found.isfinite().all()
    assert torch.equal(degrade(images, index, kind, 0), images)
    assert torch.equal(images, before), "the input is left alone"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 7), (3, 9, 4), (3, 33, 64), (4, 16, 16)])
def test_any_size_and_number_of_channels(kind, shape) -> None:
    images = torch.randint(0, 256, (2, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    found = [degrade(images, torch.arange(2), kind, severity) for severity in SEVERITIES]
    assert all(one.shape == images.shape and one.dtype == torch.uint8 for one in found)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_degraded_alike_in_any_batch(kind) -> None:
    """Also where the batch is larger than a chunk, and where its severities are mixed."""
    count = 80
    images, index = pictures(count, height=40, width=40), torch.arange(100, 100 + count)
    levels = torch.arange(count) % 6
    mixed = degrade(images, index, kind, levels, seed=3)
    for row in (0, 1, 17, 23, 79):
        alone = degrade(images[row : row + 1], index[row : row + 1], kind, int(levels[row]), seed=3)
        assert torch.equal(alone[0], mixed[row])
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    assert torch.equal(degrade(images[order], index[order], kind, levels[order], seed=3), mixed[order])


@pytest.mark.parametrize("kind", ["noise", "low_light", "haze", "rain", "occlusion"])
def test_random_numbers_hang_on_seed_epoch_view_and_image(kind) -> None:
    images = pictures(1).expand(3, -1, -1, -1).contiguous()
    index = torch.arange(3)
    one = degrade(images, index, kind, 4)
    assert not torch.equal(one[0], one[1])
    for other in ({"seed": 1}, {"epoch": 1}, {"view": 1}):
        assert not torch.equal(degrade(images, index, kind, 4, **other), one)
    assert torch.equal(degrade(images, index, kind, 4), one)


def test_blur_is_that_of_scipy() -> None:
    images = pictures(2, height=50, width=70)
    for severity in SEVERITIES:
        sigma = 50 * DEGRADATIONS["blur"].strengths[severity - 1]
        wanted = gaussian_filter(
            images.numpy().astype(np.float64), (0, 0, sigma, sigma), mode="nearest", radius=int(np.ceil(3 * sigma))
        )
        found = degrade(images, torch.arange(2), "blur", severity).numpy()
        assert np.abs(found - wanted).max() <= 0.501


def test_noise_is_gaussian_of_its_deviation() -> None:
    grey = torch.full((4, 1, 64, 64), 128, dtype=torch.uint8)
    found = degrade(grey, torch.arange(4), "noise", 1).double().flatten()
    assert found.mean() == pytest.approx(128, abs=0.5)
    assert found.std() == pytest.approx(255 * 0.08, rel=0.02)
    uniform = keyed_uniform(torch.arange(4000), 1, seed=5)[:, 0]
    assert kstest(_normal(uniform).numpy(), "norm").pvalue > 0.01
    assert torch.isfinite(_normal(torch.tensor([0.0, 1 - 2**-24]))).all()


def test_low_light_has_the_photons_of_its_stops() -> None:
    """Mean and variance of the linear signal, in electrons, are exposure x 1000 and that plus 2 squared."""
    white = torch.full((8, 1, 64, 64), 255, dtype=torch.uint8)
    for stops in (1, 3, 5):
        found = degrade(white, torch.arange(8), "low_light", stops).double() / 255
        electrons = 1000 * found**2.2
        assert electrons.mean() == pytest.approx(1000 / 2**stops, rel=0.02)
        assert electrons.var() == pytest.approx(1000 / 2**stops + 4, rel=0.1)


def test_haze_is_the_scattering_model_with_depth_from_below_to_above() -> None:
    pair = torch.stack([torch.full((1, 40, 40), value, dtype=torch.uint8) for value in (0, 200)])
    dark, light = degrade(pair, torch.tensor([7, 7]), "haze", 4).double() / 255  # the same relief
    clear = (light - dark) / (200 / 255)  # t
    torch.testing.assert_close(dark, 0.9 * (1 - clear), rtol=0, atol=0.01)
    assert clear.mean() == pytest.approx(0.3, abs=0.06)
    assert clear[0, :10].mean() < clear[0, 10:30].mean() < clear[0, 30:].mean()


def test_jpeg_is_pillow_s() -> None:
    from io import BytesIO

    images = pictures(1)
    file = BytesIO()
    Image.fromarray(images[0].permute(1, 2, 0).numpy()).save(file, "JPEG", quality=10, subsampling=2)
    wanted = np.asarray(Image.open(file))
    assert np.array_equal(degrade(images, torch.arange(1), "jpeg", 4)[0].permute(1, 2, 0).numpy(), wanted)


def test_downscaling_keeps_as_many_pixels_as_it_says() -> None:
    stripes = torch.zeros(1, 1, 48, 48, dtype=torch.uint8)
    stripes[..., ::2] = 255
    for severity in SEVERITIES:
        inner = degrade(stripes, torch.arange(1), "downscale", severity)[..., 12:-12]
        assert (inner.int() - 128).abs().max() <= (70 if severity == 1 else 50), "finer than what is left: grey"
    blocks = torch.zeros(1, 1, 48, 48, dtype=torch.uint8)
    blocks[..., 24:] = 255
    for severity, share in zip(SEVERITIES, DEGRADATIONS["downscale"].strengths, strict=True):
        row = degrade(blocks, torch.arange(1), "downscale", severity)[0, 0, 24].int()
        ramp = int(((row > 12) & (row < 243)).sum())
        assert 0.6 / share <= ramp <= 3 / share, "an edge is one or two of the large pixels wide"


def test_rain_only_brightens_what_is_darker_than_it_and_more_drops_hide_more() -> None:
    black = torch.zeros(3, 1, 96, 96, dtype=torch.uint8)
    levels = [degrade(black, torch.arange(3), "rain", severity).int() for severity in SEVERITIES]
    for weak, strong in pairwise(levels):
        assert (strong >= weak).all(), "the same streaks and more"
        assert (strong > weak).any()
    share = (levels[-1] > 20).float().mean()
    assert 0.2 < share < 0.8
    tall = levels[0][0, 0] > 20  # streaks stand rather than lie
    rows, columns = tall.any(dim=1).float().mean(), tall.any(dim=0).float().mean()
    assert rows > columns


def test_occlusion_covers_its_share_with_one_colour_and_grows() -> None:
    images = torch.full((20, 3, 100, 100), 255, dtype=torch.uint8)
    images[:, 0] = 7  # a colour that is hardly drawn
    before = torch.zeros(20, 100, 100, dtype=torch.bool)
    for severity, area in zip(SEVERITIES, DEGRADATIONS["occlusion"].strengths, strict=True):
        found = degrade(images, torch.arange(20), "occlusion", severity)
        covered = (found != images).any(dim=1)
        assert covered.float().mean() == pytest.approx(area, rel=0.06)
        assert (covered | ~before).all(), "what was hidden stays hidden"
        assert all(
            len(torch.unique(image[:, hidden], dim=1).T) == 1 for image, hidden in zip(found, covered, strict=True)
        )
        before = covered


def test_wrong_calls_say_what_there_is() -> None:
    images, index = pictures(2), torch.arange(2)
    with pytest.raises(ValueError, match=r"no degradation 'fog'; there are blur, noise, low_light"):
        degrade(images, index, "fog", 1)
    with pytest.raises(ValueError, match=r"images \(B, C, H, W\) of uint8, got \(2, 3, 48, 48\) torch.float32"):
        degrade(images / 255, index, "blur", 1)
    with pytest.raises(ValueError, match=r"severity from 0 to 5 and one number per image; got \[6\]"):
        degrade(images, index, "blur", 6)
    with pytest.raises(ValueError, match=r"index of shape \(1,\) for 2 images"):
        degrade(images, index[:1], "blur", 1)
    with pytest.raises(ValueError, match=r"no degradation 'fog'; there are .*, or all"):
        Degrade(names=("blur", "fog"))
    with pytest.raises(ValueError, match=r"Severities go from 1 to 5, got \[0, 1\]; 0 is the image unchanged"):
        Degrade(severities=(0, 1))
    with pytest.raises(ValueError, match=r"Degrade.probability is in \[0, 1\], got 2"):
        Degrade(probability=2)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_degrades_alike(kind) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    images, index = pictures(), torch.arange(6)
    found = degrade(images.cuda(), index.cuda(), kind, index.cuda() % 6).cpu()
    assert (found.int() - degrade(images, index, kind, index % 6).int()).abs().max() <= 1


# ---- training


def test_views_are_degraded_as_often_and_as_differently_as_asked() -> None:
    images = pictures(1, height=16, width=16).expand(600, -1, -1, -1) / 255
    index = torch.arange(600)
    found = Degrade(names=("noise", "occlusion"), severities=(3, 5), probability=0.5)(images, index, seed=2)
    changed = (found != images).flatten(1).any(dim=1)
    assert changed.float().mean() == pytest.approx(0.5, abs=0.07)
    degraded = {(name, level): degrade((255 * images).round().byte(), index, name, level, seed=2) / 255
                for name in ("noise", "occlusion") for level in (3, 5)}  # fmt: skip
    counts = {key: int((changed & (found == one).flatten(1).all(dim=1)).sum()) for key, one in degraded.items()}
    assert sum(counts.values()) == changed.sum(), "each is one of the four"
    assert min(counts.values()) > 45
    part = Degrade(names=("noise", "occlusion"), severities=(3, 5))(images[7:9], index[7:9], seed=2)
    assert torch.equal(part, found[7:9])


def test_the_data_module_degrades_training_views_after_all_else_and_before_normalising() -> None:
    source = Source.from_arrays(pictures(8, height=20, width=20).permute(0, 2, 3, 1).numpy(), ["a", "b"] * 4)
    degradation = Degrade(probability=1.0, severities=(4,))
    options = {
        "image_size": 16,
        "decode_size": 20,
        "split": "none",
        "batch_size": 8,
        "seed": 5,
        "views": Views(count=2),
    }
    batches = []
    for data in (ImageData(source, **options), ImageData(source, degrade=degradation, **options)):
        data.trainer = SimpleNamespace(training=True, current_epoch=3, is_global_zero=False, logger=None)
        data.setup()
        (batch,) = list(data.train_dataloader())
        batches.append(data.on_after_batch_transfer(batch, 0))
        data.trainer.training = False
        (plain,) = data.on_after_batch_transfer(batch, 0).views
        torch.testing.assert_close(plain, data.plain(batch.views[0]))
    clean, degraded = batches
    shape = (1, 3, 1, 1)
    mean, std = torch.tensor(data.mean).view(shape), torch.tensor(data.std).view(shape)
    for number, (view, other) in enumerate(zip(clean.views, degraded.views, strict=True)):
        wanted = degradation((view * std + mean).clamp(0, 1), clean.index, seed=5, epoch=3, view=number)
        torch.testing.assert_close(other * std + mean, wanted, rtol=0, atol=1.01 / 255)
        assert not torch.equal(view, other)


# ---- evaluation


def embeddings(count: int = 40, noise: float = 0.6, seed: int = 0):
    from embedlab._types import Embeddings

    generator = np.random.default_rng(seed)
    labels = [f"p{number % 10}" for number in range(count)]
    centres = np.random.default_rng(9).normal(size=(10, 8))
    vectors = centres[np.arange(count) % 10] + noise * generator.normal(size=(count, 8))
    return Embeddings(vectors.astype(np.float32), labels, np.arange(count))


def strangers():
    from embedlab._types import Embeddings

    vectors = np.random.default_rng(3).normal(size=(120, 8)).astype(np.float32)
    return Embeddings(vectors, [f"s{number // 2}" for number in range(120)], np.arange(120))


def test_without_degradation_the_figures_are_those_of_the_plain_evaluation() -> None:
    """Leave-one-out in its two forms, with a reference, and the open-set trial."""
    clean, searched = embeddings(), embeddings(60, seed=1)
    for reference in (None, searched):
        report, per_query = evaluate_robustness(clean, [(("blur", 1), clean)], reference, strangers(), fpir=0.06)
        assert per_query["all"]["recall_at_1"].mean() == pytest.approx(report["rows"][0]["recall_at_1"])
        first, second = report["rows"]
        plain, _ = retrieval_figures(clean, reference)
        trial, _ = evaluate_open_set(clean, strangers(), reference, fpir=0.06)
        for row in (first, second):
            assert {name: row[name] for name in plain} == plain
            assert row["open_set"] == trial
        for name in ("recall_at_1", "map_at_r"):
            assert report["means"]["blur"][name] == pytest.approx(plain[name])
            assert report["means"]["all"]["intervals"][name] == pytest.approx(plain["intervals"][name])
        for name in ("detection_rate", "observed_fpir"):
            assert report["means"]["all"]["open_set"][name] == pytest.approx(trial[name])
            assert report["means"]["all"]["open_set"]["intervals"][name] == pytest.approx(trial["intervals"][name])


def test_leave_one_out_searches_the_clean_others() -> None:
    clean, worse = embeddings(), embeddings(noise=1.5, seed=2)
    row = evaluate_robustness(clean, [(("blur", 2), worse)])[0]["rows"][1]
    recall, votes = naive_matches_of_others(worse.vectors, clean.vectors, clean.labels, knn_k=20)
    assert row["recall_at_1"] == pytest.approx(recall)
    assert row["knn_accuracy"] == pytest.approx(votes)
    assert (row["degradation"], row["severity"], row["strength"]) == ("blur", 2, 0.015)


def test_leave_one_out_of_degraded_queries_leaves_out_the_own_group() -> None:
    clean, worse = embeddings(), embeddings(noise=1.5, seed=2)
    groups = [f"camera {row % 3}" for row in range(len(clean))]
    row = evaluate_robustness(clean, [(("blur", 2), worse)], groups=groups)[0]["rows"][1]
    hits = naive_hits(naive_rankings(worse.vectors, clean.vectors, groups, groups), clean.labels, clean.labels)
    assert row["recall_at_1"] == pytest.approx(np.mean([hit[0] for hit in hits if any(hit)]))
    assert row["without_match"] == sum(not any(hit) for hit in hits)


def test_means_are_over_severities_and_kinds() -> None:
    clean = embeddings()
    degraded = {(kind, level): embeddings(noise=level, seed=level) for kind in ("blur", "rain") for level in (1, 2)}
    report, _ = evaluate_robustness(clean, degraded.items(), None, strangers(), fpir=0.06)
    rows = {(row["degradation"], row["severity"]): row for row in report["rows"]}
    assert list(rows) == [CLEAN, *degraded]
    for name, members in {"blur": [("blur", 1), ("blur", 2)], "all": list(degraded)}.items():
        mean = report["means"][name]
        assert mean["recall_at_1"] == pytest.approx(np.mean([rows[member]["recall_at_1"] for member in members]))
        found = np.mean([rows[member]["open_set"]["detection_rate"] for member in members])
        assert mean["open_set"]["detection_rate"] == pytest.approx(found)
    thresholds = {row["open_set"]["threshold"] for row in report["rows"]}
    assert len(thresholds) == 1, "set once, in good conditions"


def test_conditions_are_let_go_of_one_by_one() -> None:
    seen, alive = [], []

    def conditions():
        for severity in SEVERITIES:
            worse = embeddings(noise=severity, seed=severity)
            seen.append(weakref.ref(worse.vectors))
            yield ("blur", severity), worse
            del worse
            alive.append(sum(one() is not None for one in seen))

    evaluate_robustness(embeddings(), conditions(), None, strangers(), fpir=0.06)
    assert len(alive) == len(SEVERITIES)
    assert max(alive) <= 1


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Six people of six pictures, and an encoder."""
    root = tmp_path_factory.mktemp("degraded")
    waves = pictures(6, height=24, width=24).permute(0, 2, 3, 1).numpy()
    random = np.random.default_rng(0)
    for person in range(6):
        (root / f"p{person}").mkdir()
        for copy in range(6):
            pixels = (waves[person] + random.normal(0, 20, waves[person].shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / f"p{person}" / f"{copy}.png")
    encoder = Encoder(ResNet("resnet10", stem="small", width=0.125), image_size=16).eval()
    encoder.save(root.parent / "encoder")
    return root, root.parent / "encoder"


def test_vectors_are_those_of_degraded_images_at_the_encoder_s_size(made) -> None:
    from embedlab.data import open_source

    root, folder = made
    encoder, source = Encoder.load(folder), open_source(root)
    clean = encoder.embed(source)
    found = dict(embed_degraded(encoder, source, clean, names=["noise", "rain"], severities=[2, 5], seed=4))
    assert list(found) == [("noise", 2), ("noise", 5), ("rain", 2), ("rain", 5)]
    pixels, rows, _ = source.read(None, 16)
    for (name, severity), one in found.items():
        wanted = encoder.embed(degrade(torch.from_numpy(pixels), torch.from_numpy(rows), name, severity, seed=4))
        np.testing.assert_allclose(one.vectors, wanted.vectors, atol=1e-6)
        assert (one.labels, one.paths) == (clean.labels, clean.paths)


def test_vectors_of_few_conditions_are_held_and_images_decoded_once_for_each_few(monkeypatch) -> None:
    images = np.ascontiguousarray(pictures(96, height=32, width=32).permute(0, 2, 3, 1).numpy())
    encoder, source = Encoder(Pixels(32), image_size=32).eval(), Source.from_arrays(images)
    clean = encoder.embed(source)
    asked = {"names": ["noise", "rain"], "severities": [1, 2, 3, 4, 5], "seed": 4}
    whole = {condition: one.vectors for condition, one in embed_degraded(encoder, source, clean, **asked)}
    reads: list[int] = []
    read = Source.read
    monkeypatch.setattr(Source, "read", lambda *given, **named: reads.append(len(given[1])) or read(*given, **named))
    monkeypatch.setattr(robustness, "_CHUNK", 48)
    list(embed_degraded(encoder, source, clean, **asked))
    assert reads == [48, 48], "what fits is decoded once for all"
    reads.clear()
    monkeypatch.setattr(robustness, "_HELD", 2 * clean.vectors.nbytes)
    tracemalloc.start()
    for condition, one in embed_degraded(encoder, source, clean, **asked):
        np.testing.assert_array_equal(one.vectors, whole.pop(condition))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert not whole
    assert reads == 5 * [48, 48]
    assert peak < 6 * clean.vectors.nbytes  # of ten conditions


def test_the_command_measures_tells_and_draws(made, tmp_path, capsys) -> None:
    root, folder = made
    arguments = ["evaluate", str(root), "--encoder", str(folder), "--degradations", "noise", "occlusion"]
    assert main([*arguments, "--severities", "1", "5", "--baselines", "--pictures", str(tmp_path / "pictures")]) == 0
    told = capsys.readouterr().out
    assert "--- raw pixels, degraded queries ---\nrecall@1, clean " in told
    assert "robustness.png, degradations.png" in told
    for name in ("robustness.png", "degradations.png"):
        assert np.asarray(Image.open(tmp_path / "pictures" / name).convert("L")).std() > 5
    assert main([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    rows = document["results"]["encoder"]["degraded"]["rows"]
    assert [(row["degradation"], row["severity"]) for row in rows][:3] == [("clean", 0), ("noise", 1), ("noise", 2)]
    assert len(rows) == 11
    assert rows[0]["recall_at_1"] == document["results"]["encoder"]["recall_at_1"]
    assert set(document["results"]["encoder"]["degraded"]["means"]) == {"noise", "occlusion", "all"}
    assert document["protocol"]["degradations"] == ["noise", "occlusion"]


def test_two_encoders_are_compared_under_bad_conditions_and_the_report_shows_them(made, tmp_path, capsys) -> None:
    root, folder = made
    torch.manual_seed(5)
    other = tmp_path / "other"
    Encoder(ResNet("resnet8", stem="small", width=0.125), image_size=16).eval().save(other)
    command = ["evaluate", str(root), "--compare", str(folder), str(other), "--degradations", "noise", "occlusion"]
    report = tmp_path / "report.html"
    assert main([*command, "--severities", "2", "5", "--report", str(report), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    first, second = (document["results"][document["comparison"][side]]["degraded"] for side in ("first", "second"))
    for kind in ("noise", "occlusion", "all"):
        told = document["comparison"]["figures"][f"recall_at_1 degraded, {kind}"]
        assert told["first"] == pytest.approx(first["means"][kind]["recall_at_1"])
        assert told["second"] == pytest.approx(second["means"][kind]["recall_at_1"])
        low, high = told["interval"]
        assert low <= told["difference"] <= high
    text = report.read_text()
    for name, one in zip(("first", "second"), (first, second), strict=True):
        name = document["comparison"][name]
        assert f"recall@1 of {name}" in text
        assert f'<td data-value="noise">noise</td><td data-value="{name}">{name}</td>' in text
        assert f'{one["means"]["noise"]["recall_at_1"]:.1%}<div class="range">' in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--degradations", "fog"], "There is no degradation 'fog'; there are blur, noise"),
        (["--degradations", "all", "--severities", "7"], "Severities go from 1 to 5, got [7]"),
        (
            ["--severities", "3", "--pictures", "here"],
            "--severities, --pictures belong to --degradations, which was not given; add it, or leave out --severities",
        ),
        (["--fpir", "0.1"], "--fpir belongs to --open-set, which was not given; add it, or leave out --fpir."),
        (["--calibrate-select", "a=b"], "--calibrate-select belongs to --open-set, which was not given"),
        (["--seeds", "2", "--flip", "0"], "--seeds, --flip belong to --protocol, which was not given"),
        (
            ["--protocol", "knn", "--reference", "here", "--degradations", "blur"],
            "--protocol measures one backbone; run --degradations without it.",
        ),
        (["--report", "."], ". is a folder; --report takes the file to write"),
    ],
)
def test_a_wrong_call_is_refused(made, arguments, message, capsys) -> None:
    root, folder = made
    assert main(["evaluate", str(root), "--encoder", str(folder), *arguments]) == 1
    assert message in capsys.readouterr().err


def test_vectors_cannot_be_degraded(tmp_path, capsys) -> None:
    np.save(tmp_path / "v.npy", embeddings().vectors)
    (tmp_path / "labels.txt").write_text("\n".join(embeddings().labels))
    call = ["evaluate", str(tmp_path / "v.npy"), "--labels", str(tmp_path / "labels.txt"), "--degradations", "all"]
    assert main(call) == 1
    assert "holds vectors; --degradations needs images to degrade" in capsys.readouterr().err


def test_the_picture_shows_every_figure(tmp_path) -> None:
    degraded = {("blur", 1): embeddings(noise=1.0), ("haze", 1): embeddings(noise=1.4)}
    report, _ = evaluate_robustness(embeddings(), degraded.items(), None, strangers(), fpir=0.06)
    draw_robustness(tmp_path / "all.svg", {"ours": report, "theirs": report})
    text = (tmp_path / "all.svg").read_text()
    for shown in ("ours", "theirs", "blur", "haze", "recall@1", "detection", "observed FPIR"):
        assert f"<!-- {shown} -->" in text
