import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from embedlab.data import FixedViews, ImageData, Source
from embedlab.encoders import (
    Encoder,
    EncoderError,
    LinearHead,
    MLPHead,
    Pixels,
    ResNet,
    TimmBackbone,
    Whitening,
    connect,
    measure_capacity,
)
from embedlab.encoders.backbones import PretrainedUnavailableError


def small(**arguments) -> Encoder:
    torch.manual_seed(0)
    backbone = ResNet("resnet10", stem="small", width=0.125, in_channels=arguments.pop("in_channels", 3))
    return Encoder(backbone, MLPHead(6), image_size=16, **arguments).eval()


def pictures(count: int = 5, side: int = 16, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, channels, side, side), dtype=np.uint8)


@pytest.mark.parametrize(
    ("name", "features", "parameters"),
    [
        ("resnet18", 512, 11_176_512),
        ("resnet34", 512, 21_284_672),
        ("resnet50", 2048, 23_508_032),
        ("resnet101", 2048, 42_500_160),
        ("resnet152", 2048, 58_143_808),
    ],
)
def test_resnets_are_torchvisions(name, features, parameters) -> None:
    import torchvision

    with torch.device("meta"):
        ours, theirs = ResNet(name), torchvision.models.get_model(name)
    assert ours.out_features == features
    assert sum(p.numel() for p in ours.parameters()) == parameters
    shapes = {key: value.shape for key, value in theirs.state_dict().items() if not key.startswith("fc.")}
    assert {key.removeprefix("net."): value.shape for key, value in ours.state_dict().items()} == shapes


@pytest.mark.parametrize("stem", ["small", "medium", "imagenet"])
@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize(("width", "features"), [(0.125, 64), (0.5, 256)])
@pytest.mark.parametrize("in_channels", [1, 5])
def test_resnet_variants(stem, norm, width, features, in_channels) -> None:
    net = ResNet("resnet10", stem=stem, norm=norm, width=width, in_channels=in_channels)
    assert net(torch.zeros(2, in_channels, 32, 32)).shape == (2, features)
    kinds = {type(module) for module in net.modules()}
    assert (nn.BatchNorm2d in kinds) == (norm == "batch")
    conv = net.net.layer2[0].conv1.weight  # fan-out initialisation, as torchvision's
    assert conv.std().item() == pytest.approx(math.sqrt(2 / (conv.shape[0] * 9)), rel=0.2)


def test_pretrained_weights_that_cannot_be_had_are_a_quick_clear_error(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path))

    def refuse(*arguments, **keywords):
        raise OSError("no network")

    monkeypatch.setattr("socket.create_connection", refuse)
    with pytest.raises(
        PretrainedUnavailableError, match=r"resnet18-.*pth.* cannot be reached \(no network\).*Leave out"
    ):
        ResNet("resnet18", pretrained=True)
    with pytest.raises(ValueError, match="ImageNet weights exist for the unchanged resnet18"):
        ResNet("resnet18", stem="small", pretrained=True)


def test_pretrained_weights_from_the_cache_are_adapted_to_grey(monkeypatch) -> None:
    import torchvision

    torch.manual_seed(0)
    state = torchvision.models.resnet18().state_dict()
    monkeypatch.setattr("embedlab.encoders.backbones._require_reachable", lambda *_: None)
    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", lambda *_, **__: dict(state))
    grey, colour = ResNet(in_channels=1, pretrained=True).eval(), ResNet(pretrained=True).eval()
    image = torch.rand(1, 1, 64, 64)
    torch.testing.assert_close(grey(image), colour(image.expand(1, 3, 64, 64)), rtol=1e-4, atol=1e-4)


def test_any_timm_model_is_a_backbone(tmp_path) -> None:
    pytest.importorskip("timm")
    backbone = TimmBackbone("test_resnet", in_channels=1)
    encoder = Encoder(backbone, image_size=32).eval()
    encoder.save(tmp_path / "encoder")
    images = torch.rand(2, 1, 32, 32)
    torch.testing.assert_close(Encoder.load(tmp_path / "encoder")(images), encoder(images))
    with pytest.raises(ValueError, match="timm has no model 'resnet_999'; near names"):
        TimmBackbone("resnet_999")


def test_heads_take_the_backbones_size() -> None:
    backbone = ResNet("resnet10", stem="small", width=0.125)
    head = MLPHead(7, hidden_features=9, hidden_layers=2, dropout=0.1)
    assert connect(backbone, head) == 7
    kinds = [type(module).__name__ for module in head.net]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Dropout", "Linear", "BatchNorm1d", "ReLU", "Dropout", "Linear"]
    assert connect(backbone, LinearHead(3)) == 3
    assert connect(nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 11)), None) == 11
    with pytest.raises(ValueError, match="The head takes 5 features but ResNet gives 64; leave out in_features"):
        connect(backbone, LinearHead(3, in_features=5))
    with pytest.raises(
        ValueError, match=r"must map images \(B, C, H, W\) to features \(B, F\); Conv2d gave \(1, 4, 64, 64\)"
    ):
        connect(nn.Conv2d(3, 4, 3, padding=1), None)


def test_encoder_gives_unit_vectors_and_normalises_inside() -> None:
    encoder, images = small(), pictures()
    vectors = encoder(torch.from_numpy(images))
    assert vectors.shape == (5, 6)
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(encoder(torch.from_numpy(images) / 255), vectors)
    normalised = (torch.from_numpy(images) / 255 - encoder.mean) / encoder.std
    torch.testing.assert_close(nn.functional.normalize(encoder.head(encoder.backbone(normalised))), vectors)


def test_embed_takes_files_sources_and_arrays_alike(tmp_path) -> None:
    encoder, images = small(), pictures(side=16)
    paths = []
    for number, image in enumerate(images):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(image.transpose(1, 2, 0)).save(paths[-1])
    of_files = encoder.embed([*paths, paths[0]])
    of_arrays = encoder.embed(images)
    of_source = encoder.embed(Source.from_arrays(images.transpose(0, 2, 3, 1), list("aabbc")), batch_size=2)
    np.testing.assert_allclose(of_files.vectors[:5], of_arrays.vectors, atol=1e-6)
    np.testing.assert_allclose(of_source.vectors, of_arrays.vectors, atol=1e-6)
    assert of_files.paths == [str(path) for path in [*paths, paths[0]]]
    assert of_files.labels is None
    assert of_source.labels == list("aabbc")
    assert encoder.embed(images[:0]).vectors.shape == (0, 6)
    coarse = encoder.embed(images, precision="bfloat16").vectors
    assert (coarse * of_arrays.vectors).sum(1).min() > 0.99


def test_embed_skips_bad_files_when_asked(tmp_path, caplog) -> None:
    encoder = small()
    paths = [tmp_path / f"{number:03d}.png" for number in range(120)]
    for path in paths:
        Image.new("RGB", (16, 16), (int(path.stem), 0, 0)).save(path)
    paths[7].write_bytes(b"no image")
    with pytest.raises(ValueError, match="007.png"):
        encoder.embed(paths)
    found = encoder.embed(paths, on_error="skip")
    assert found.ids.tolist() == [row for row in range(120) if row != 7]
    assert caplog.text.count("Skipped 1 of 120 images") == 1, "told once"
    caplog.clear()
    assert len(encoder.embed(paths, on_error="skip", skip_limit=1.0)) == 119
    assert "Skipped 1 of 120 images" in caplog.text
    for path in paths[10:20]:
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="11 of 120 images cannot be read"):
        encoder.embed(paths, on_error="skip")


def test_embed_explains_arrays_that_do_not_fit() -> None:
    encoder = small()
    with pytest.raises(ValueError, match=r"takes images \(N, 3, H, W\), got \(5, 16, 16, 3\); channels come second"):
        encoder.embed(pictures().transpose(0, 2, 3, 1))
    with pytest.raises(ValueError, match=r"Float images must lie in \[0, 1\], got \[0, 25\d\]; divide by 255"):
        encoder.embed(pictures().astype(np.float32))
    with pytest.raises(
        ValueError, match=r"as uint8 or as floats in \[0, 1\], got torch.int64; values in 0..255 are uint8"
    ):
        encoder(torch.from_numpy(pictures().astype(np.int64)))


def test_another_precision_is_refused_rather_than_ignored() -> None:
    for call in (small().embed, measure_capacity):
        with pytest.raises(ValueError, match="precision float32 or bfloat16, got 'bf16'"):
            call(pictures() if call is not measure_capacity else small(), precision="bf16")


def test_embedding_leaves_every_part_in_the_mode_it_was_in() -> None:
    encoder = small().train()
    encoder.backbone.eval()  # frozen
    before = [module.training for module in encoder.modules()]
    encoder.embed(pictures())
    assert [module.training for module in encoder.modules()] == before
    assert encoder.training


@pytest.mark.parametrize(("fit", "corner"), [("crop", 0), ("stretch", 0), ("pad", 255)])
def test_arrays_of_another_shape_are_fitted(fit, corner) -> None:
    encoder = small(fit=fit)
    images = np.zeros((1, 3, 20, 40), np.uint8)
    images[..., 15:25] = 100
    out = encoder.preprocess(images)
    assert out.shape == (1, 3, 16, 16)
    assert out.dtype == torch.uint8
    assert out[0, 0, 0, 0] == corner


def test_save_and_load_give_the_same_vectors_and_fingerprint(tmp_path) -> None:
    encoder, images = small(mean=[0.1, 0.2, 0.3], std=[0.5, 0.5, 0.7], fit="pad"), torch.from_numpy(pictures())
    encoder.save(tmp_path / "a" / "encoder")
    again = Encoder.load(tmp_path / "a" / "encoder")
    assert torch.equal(again(images), encoder(images))
    assert again.fingerprint == encoder.fingerprint
    assert again.preprocessing == encoder.preprocessing
    with torch.no_grad():
        again.backbone.net.conv1.weight[0, 0, 0, 0] += 1e-6
    assert again.fingerprint != encoder.fingerprint
    again.save(tmp_path / "a" / "encoder")  # replaces in one step
    assert Encoder.load(tmp_path / "a" / "encoder").fingerprint == again.fingerprint
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["encoder"]


@pytest.mark.parametrize("call", ["os.fsync", "exchange"])
def test_a_save_that_fails_leaves_the_encoder_before(tmp_path, monkeypatch, call) -> None:
    encoder = small()
    encoder.save(tmp_path / "encoder")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(f"embedlab._durable.{call}", full)
        with pytest.raises(OSError, match="No space left"):
            small().save(tmp_path / "encoder")
    assert Encoder.load(tmp_path / "encoder").fingerprint == encoder.fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]


VIEWS = FixedViews(3, degrees=20, translate=0.1, elastic=0.02)


@pytest.mark.parametrize("head", [MLPHead(6), None])
def test_test_time_views_are_averaged_as_unit_vectors(head) -> None:
    torch.manual_seed(0)
    backbone = ResNet("resnet10", stem="small", width=0.125)
    plain = Encoder(backbone, head, image_size=16).eval()
    encoder = Encoder(backbone, head, image_size=16, test_views=VIEWS).eval()
    images = torch.from_numpy(pictures())
    sums = torch.zeros(5, encoder.dim, dtype=torch.float64)
    for grid in VIEWS.grids(16):  # one view after the other
        moved = F.grid_sample(images / 255, grid.expand(5, -1, -1, -1), padding_mode="border", align_corners=False)
        sums += plain(moved).double()
    torch.testing.assert_close(encoder(images).double(), sums / sums.norm(dim=1, keepdim=True), atol=1e-6, rtol=0)
    assert not torch.allclose(encoder(images), plain(images), atol=1e-3)
    found = encoder.embed(images, batch_size=4)  # fewer than two images' views
    np.testing.assert_allclose(found.vectors, encoder(images).detach().numpy(), atol=1e-6)


def test_test_time_views_are_part_of_the_saved_encoder(tmp_path) -> None:
    plain, encoder = small(), small(test_views=VIEWS)
    assert plain.fingerprint != encoder.fingerprint != small(test_views=FixedViews(3, degrees=19)).fingerprint
    encoder.save(tmp_path / "views")
    again = Encoder.load(tmp_path / "views")
    assert (again.test_views, again.fingerprint) == (VIEWS, encoder.fingerprint)
    images = torch.from_numpy(pictures())
    assert torch.equal(again(images), encoder(images))
    assert torch.equal(Encoder(again.backbone, again.head, **again.preprocessing).eval()(images), encoder(images))
    assert ImageData("unused", **again.preprocessing).test_views == VIEWS
    assert again.untrained().test_views == VIEWS


def test_encoders_without_test_time_views_are_written_as_ever(tmp_path) -> None:
    """What older versions wrote is read, and has the fingerprint that galleries know."""
    encoder = Encoder(Pixels(4), image_size=4)
    encoder.save(tmp_path / "encoder")
    description = json.loads((tmp_path / "encoder" / "encoder.json").read_text())
    assert description["version"] == 1
    assert "test_views" not in description["preprocessing"]
    assert description["fingerprint"] == "22c0eb99787193b2d6681db46ef480b8"


def test_channels_last_weights_are_saved(tmp_path) -> None:
    encoder = small()
    before = encoder.fingerprint
    encoder.to(memory_format=torch.channels_last).save(tmp_path / "encoder")
    assert Encoder.load(tmp_path / "encoder").fingerprint == before


def test_every_flipped_byte_is_found(tmp_path) -> None:
    folder = tmp_path / "encoder"
    Encoder(Pixels(4), LinearHead(2), image_size=4).save(folder)
    for name in ("encoder.json", "encoder.safetensors"):
        whole = (folder / name).read_bytes()
        for position in range(len(whole)):
            for flip in (0x01, 0x20):
                broken = bytearray(whole)
                broken[position] ^= flip
                (folder / name).write_bytes(broken)
                with pytest.raises(EncoderError, match="is damaged|holds no saved"):
                    Encoder.load(folder)
        (folder / name).write_bytes(whole[:-1])
        with pytest.raises(EncoderError, match="is damaged"):
            Encoder.load(folder)
        (folder / name).write_bytes(whole)
    Encoder.load(folder)


def test_format_version_and_missing_files_are_explained(tmp_path, monkeypatch) -> None:
    with pytest.raises(
        EncoderError, match=r"No such file or folder: .*/run; looked in .* Expected the folder of a saved"
    ):
        Encoder.load(tmp_path / "run")
    with pytest.raises(EncoderError, match="holds no saved encoder .*expected encoder.json"):
        Encoder.load(tmp_path)
    monkeypatch.setattr("embedlab.encoders.encoder.FORMAT_VERSION", 99)
    Encoder(Pixels(4), image_size=4, whitening=Whitening(48, 1)).save(tmp_path / "encoder")
    monkeypatch.undo()
    with pytest.raises(EncoderError, match="version 99, this embedlab reads embedlab-encoder up to version 3; update"):
        Encoder.load(tmp_path / "encoder")


class OwnBackbone(nn.Module):
    out_features = 3

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(2, 3)) * self.scale


def test_an_own_class_is_loaded_by_its_instance_only(tmp_path) -> None:
    encoder = Encoder(OwnBackbone(), image_size=8)
    with torch.no_grad():
        encoder.backbone.scale.fill_(2.0)
    encoder.save(tmp_path / "encoder")
    with pytest.raises(
        EncoderError, match=r"OwnBackbone.*runs no foreign code.*Encoder.load\(folder, backbone=YourClass"
    ):
        Encoder.load(tmp_path / "encoder")
    again = Encoder.load(tmp_path / "encoder", backbone=OwnBackbone())
    assert again.backbone.scale.item() == 2.0
    assert again.fingerprint == encoder.fingerprint
    with pytest.raises(EncoderError, match="do not fit the given backbone"):
        Encoder.load(tmp_path / "encoder", backbone=Pixels(8))


def test_untrained_is_the_same_architecture_with_other_weights() -> None:
    encoder = small()
    fresh, again = encoder.untrained(seed=1), encoder.untrained(seed=1)
    assert fresh.architecture == encoder.architecture
    assert fresh.fingerprint == again.fingerprint != encoder.fingerprint
    settled = encoder.untrained(torch.from_numpy(pictures()), seed=1)
    assert settled.backbone.net.bn1.running_mean.abs().sum() > 0
    torch.testing.assert_close(settled.backbone.net.conv1.weight, fresh.backbone.net.conv1.weight)


def test_resnet8_has_three_stages() -> None:
    net = ResNet("resnet8", stem="medium", width=0.5, in_channels=1)
    assert net.out_features == 128
    assert net(torch.zeros(2, 1, 32, 32)).shape == (2, 128)
    assert sum(isinstance(module, nn.Conv2d) for module in net.modules()) == 9


def test_a_grid_of_places_is_kept_and_the_usual_mean_has_its_old_fingerprint(tmp_path) -> None:
    torch.manual_seed(0)
    grid = ResNet("resnet8", stem="small", width=0.125, pool=4).eval()
    assert grid.out_features == 32 * 16
    mean = ResNet("resnet8", stem="small", width=0.125).eval()
    mean.load_state_dict(grid.state_dict())
    images = torch.rand(2, 3, 32, 32)
    places = grid(images).view(2, 32, 4, 4)
    torch.testing.assert_close(places.mean(dim=(2, 3)), mean(images))
    moved = grid(images.flip(3)).view(2, 32, 4, 4)
    assert (moved - places).abs().max() > 0.01, "where something is makes a difference"
    Encoder(grid, image_size=32).save(tmp_path / "grid")
    assert Encoder.load(tmp_path / "grid").backbone.out_features == 512
    assert "pool" not in mean.config, "encoders of before keep their fingerprint"
    with pytest.raises(ValueError, match="pool >= 1, one or a list for up to 3 last stages; got 1.0, 3 and 0"):
        ResNet("resnet8", pool=0)


def test_the_last_stages_stand_side_by_side(tmp_path) -> None:
    torch.manual_seed(0)
    both = ResNet("resnet18", stem="small", width=0.125, pool=[2, 1]).eval()
    assert both.out_features == 32 * 4 + 64
    seen: list[torch.Tensor] = []
    both.net.layer3.register_forward_hook(lambda *given: seen.append(given[-1]))
    images = torch.rand(2, 3, 32, 32)
    features = both(images)
    early, late = features[:, :128], features[:, 128:]
    places = nn.functional.adaptive_avg_pool2d(seen[0], 2).flatten(1)
    torch.testing.assert_close(early, places / places.norm(dim=1, keepdim=True))
    mean = ResNet("resnet18", stem="small", width=0.125).eval()
    mean.load_state_dict(both.state_dict())
    torch.testing.assert_close(late, nn.functional.normalize(mean(images)))
    Encoder(both, image_size=32).save(tmp_path / "both")
    torch.testing.assert_close(Encoder.load(tmp_path / "both").backbone(images), features)
    assert ResNet("resnet50", width=0.25, pool=[1, 1, 1]).out_features == 4 * (32 + 64 + 128)
    three = ResNet("resnet8", stem="small", width=0.125, pool=[1, 1, 1])
    assert three(images).shape == (2, three.out_features) == (2, 8 + 16 + 32)
    assert ResNet("resnet8", pool=[1]).config == ResNet("resnet8").config
    with pytest.raises(ValueError, match=r"a list for up to 3 last stages; got 1.0, 3 and \[1, 1, 1, 1\]"):
        ResNet("resnet8", pool=[1, 1, 1, 1])


def test_standardised_pictures_look_alike_under_any_exposure(tmp_path) -> None:
    torch.manual_seed(0)
    backbone = ResNet("resnet8", stem="small", width=0.125, standardize=True).eval()
    images = torch.rand(3, 3, 32, 32)
    images = (images - images.mean((2, 3), keepdim=True)) / images.std((2, 3), keepdim=True)
    gain, cast = torch.tensor([[1.0], [0.7], [2.0]]), torch.tensor([[0.0, 0.0, 0.0], [1.0, -2.0, 0.5], [3.0, 3.0, 3.0]])
    exposed = images * gain[..., None, None] + cast[..., None, None]
    torch.testing.assert_close(backbone(exposed), backbone(images), rtol=0.02, atol=0.01)
    plain = ResNet("resnet8", stem="small", width=0.125).eval()
    plain.load_state_dict(backbone.state_dict())
    torch.testing.assert_close(plain(images), backbone(images), rtol=0.02, atol=0.01)
    assert (plain(exposed) - plain(images)).abs().max() > 0.1, "which is what it is for"
    assert torch.equal(backbone(torch.full((1, 3, 32, 32), 0.3)), backbone(torch.zeros(1, 3, 32, 32))), "no contrast"
    noise = 1e-3 * torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(backbone(noise), backbone(torch.zeros_like(noise)), rtol=0.2, atol=0.02)  # stays noise
    Encoder(backbone, image_size=32).save(tmp_path / "encoder")
    assert Encoder.load(tmp_path / "encoder").backbone.standardize
    assert "standardize" not in plain.config, "encoders of before keep their fingerprint"


def test_description_is_plain_json(tmp_path) -> None:
    small().save(tmp_path / "encoder")
    description = json.loads((tmp_path / "encoder" / "encoder.json").read_text())
    assert description["architecture"]["backbone"]["name"] == "resnet10"
    assert description["preprocessing"]["image_size"] == 16
