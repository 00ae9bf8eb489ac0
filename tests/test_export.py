"""Exported files: the encoder's vectors, nothing of this machine, no torch to serve them."""

import contextlib
import copy
import json
import re
import shutil
import subprocess
import sys
import textwrap
import time
from urllib.request import Request, urlopen

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from harness_serving import free_port
from PIL import Image
from torch import nn

from embedlab import Gallery
from embedlab.cli import main
from embedlab.data import FixedViews, Source
from embedlab.data.embedding import identity_hash
from embedlab.encoders import Encoder, LinearHead, MLPHead, Pixels, ResNet, TimmBackbone, Whitening
from embedlab.serving import export
from embedlab.serving.export import ExportError, export_encoder

WHY = "ONNX ABSENT: nothing of the export was tested; pip install 'embedlab[onnx]'"
onnx = pytest.importorskip("onnx", reason=WHY)
onnxruntime = pytest.importorskip("onnxruntime", reason=WHY)
pytest.importorskip("onnxscript", reason=WHY)

from embedlab.retrieval import OnnxEmbedder, read_embeddings, read_protocol  # noqa: E402 - after the skip
from embedlab.retrieval.robustness import embed_degraded  # noqa: E402

SUFFIX = {"onnx": ".onnx", "torch-export": ".pt2"}


def small(**arguments) -> Encoder:
    torch.manual_seed(0)
    backbone = ResNet("resnet8", stem="small", width=0.125)
    return Encoder(backbone, LinearHead(6), image_size=16, identities=[identity_hash("Ada")], **arguments).eval()


def settled(encoder: Encoder) -> Encoder:
    """Batch statistics and affine parameters as after training: none of them 0 or 1."""
    torch.manual_seed(1)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return encoder.eval()


def pictures(count: int, encoder: Encoder, seed: int = 0) -> np.ndarray:
    side = encoder.image_size
    return np.random.default_rng(seed).integers(0, 256, (count, encoder.channels, side, side), dtype=np.uint8)


@torch.no_grad()
def float64_vectors(encoder: Encoder, images: np.ndarray) -> np.ndarray:
    """What an encoder means, written out in float64."""
    encoder = copy.deepcopy(encoder).double()
    mean, std = (torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1) for values in encoder.statistics)
    shown = [torch.from_numpy(images).double() / 255]
    if encoder.test_views is not None:
        grids = encoder.test_views.grids(encoder.image_size).double()
        shown = [
            F.grid_sample(shown[0], grid.expand(len(images), -1, -1, -1), padding_mode="border", align_corners=False)
            for grid in grids
        ]
    total = 0
    for view in shown:
        features = encoder.backbone((view - mean) / std)
        vectors = features if encoder.head is None else encoder.head(features)
        total = total + vectors / vectors.norm(dim=1, keepdim=True)
    total = total / total.norm(dim=1, keepdim=True)
    if encoder.whitening is not None:
        gain = torch.diag(1 + encoder.whitening.gain)
        basis = encoder.whitening.basis
        rest = torch.eye(encoder.dim).double() - basis.T @ basis
        total = (total - encoder.whitening.mean) @ (basis.T @ gain @ basis + rest)
    return (total / total.norm(dim=1, keepdim=True)).numpy()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "small.onnx"
    encoder = settled(small(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6], fit="pad"))
    return encoder, path, export_encoder(encoder, path)


ENCODERS = {
    "imagenet stem, MLP": lambda: Encoder(ResNet("resnet18", width=0.25), MLPHead(8), image_size=40),
    "medium stem, group norm, grey, standardised": lambda: Encoder(
        ResNet("resnet10", stem="medium", width=0.25, norm="group", in_channels=1, standardize=True), image_size=32
    ),
    "small stem, layer norm, dropout": lambda: Encoder(
        ResNet("resnet8", stem="small", width=0.125), MLPHead(8, norm="layer", dropout=0.5), image_size=16
    ),
    "pixels": lambda: Encoder(Pixels(4), image_size=4),
    "test-time views": lambda: small(test_views=FixedViews(3, degrees=20, elastic=0.03)),
    "two stages, whitened": lambda: Encoder(
        ResNet("resnet8", stem="small", width=0.125, pool=[2, 1]),
        image_size=16,
        whitening=Whitening.fit(np.random.default_rng(0).normal(size=(40, 96)) + 1, [0, 1] * 20),
    ),
    "timm": lambda: Encoder(TimmBackbone("test_vit", image_size=32), image_size=32),
}


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("format", ["onnx", "torch-export"])
def test_vectors_are_the_encoders(name, format, tmp_path) -> None:
    if name == "timm":
        pytest.importorskip("timm")
    torch.manual_seed(0)
    encoder = settled(ENCODERS[name]())
    path = tmp_path / f"e{SUFFIX[format]}"
    report = export_encoder(encoder, path, format=format)
    assert report.max_difference < 1e-5
    assert (report.dim, report.fingerprint, report.bytes) == (encoder.dim, encoder.fingerprint, path.stat().st_size)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    run = OnnxEmbedder(path) if format == "onnx" else torch.export.load(path).module()
    for count in (1, 2, 5):  # any batch
        images = pictures(count, encoder, seed=count)
        with torch.no_grad():
            got = np.asarray(run(images if format == "onnx" else torch.from_numpy(images)))
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, float64_vectors(encoder, images), atol=1e-5)


def test_an_onnx_file_brings_all_that_it_needs(exported) -> None:
    encoder, path, _ = exported
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    (given,) = model.graph.input
    shape = given.type.tensor_type.shape.dim
    assert given.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [dim.dim_value for dim in shape[1:]] == [3, 16, 16]
    assert shape[0].dim_param == "batch"
    assert all(tensor.data_location == onnx.TensorProto.DEFAULT for tensor in model.graph.initializer)
    embedder = OnnxEmbedder(path)
    assert embedder.fingerprint == encoder.fingerprint
    assert (embedder.dim, embedder.channels, embedder.image_size, embedder.fit) == (6, 3, 16, "pad")
    assert embedder.identities == encoder.identities
    assert embedder.trained_on("Ada")
    assert not embedder.trained_on("Grace")


@pytest.mark.parametrize("format", ["onnx", "torch-export"])
def test_nothing_of_the_machine_is_in_the_file(format, tmp_path) -> None:
    path = tmp_path / f"e{SUFFIX[format]}"
    export_encoder(Encoder(Pixels(4), LinearHead(2), image_size=4).eval(), path, format=format)
    content = path.read_bytes()
    for private in (b"site-packages", b".py", str(tmp_path).encode()):
        assert private not in content


def test_files_arrays_and_sources_get_the_encoders_vectors(exported, tmp_path) -> None:
    encoder, path, _ = exported
    embedder, random = OnnxEmbedder(path), np.random.default_rng(0)
    paths = []
    for number, (height, width) in enumerate([(16, 16), (40, 23), (9, 31)]):
        paths.append(tmp_path / f"{number}.{'jpg' if number else 'png'}")
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(paths[-1])
    wide = random.integers(0, 256, (3, 3, 20, 50), dtype=np.uint8)
    for images in (paths, [str(paths[1])], paths[2], Source([str(one) for one in paths], list("aab")), wide, wide[:0]):
        want, got = encoder.embed(images), embedder.embed(images, batch_size=2)
        np.testing.assert_allclose(got.vectors, want.vectors, atol=2e-6)
        assert (got.labels, got.paths, got.ids.tolist()) == (want.labels, want.paths, want.ids.tolist())
    np.testing.assert_array_equal(embedder.preprocess(wide), encoder.preprocess(wide).numpy())
    paths[1].write_bytes(b"")
    with pytest.raises(ValueError, match="1.jpg"):
        embedder.embed(paths)
    with pytest.raises(ValueError, match=r"takes uint8 images, got float32; .* \(255 \* images\)"):
        embedder.embed(wide / np.float32(255))


def test_every_flipped_byte_is_found(tmp_path) -> None:
    path = tmp_path / "e.onnx"
    encoder = Encoder(Pixels(4), LinearHead(2), image_size=4, fit="pad").eval()
    export_encoder(encoder, path)
    whole = path.read_bytes()
    silent = []
    for place in range(len(whole)):
        broken = bytearray(whole)
        broken[place] ^= (0x01, 0x20)[place % 2]
        path.write_bytes(broken)
        try:
            OnnxEmbedder(path)
            silent.append(place)
        except ValueError as error:
            assert "is damaged or was edited" in str(error)  # noqa: PT017
    assert silent == []
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="is damaged or was edited"):
        OnnxEmbedder(path)
    path.write_bytes(whole)
    OnnxEmbedder(path)


def test_another_version_is_explained(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("embedlab.retrieval.embedders.ONNX_VERSION", 99)
    encoder = Encoder(Pixels(4), image_size=4).eval()
    export_encoder(encoder, tmp_path / "e.onnx")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="was exported in version 99, this embedlab reads 1; update embedlab"):
        OnnxEmbedder(tmp_path / "e.onnx")


# ---- parity --------------------------------------------------------------------------------------------------------


class OtherWhenExported(nn.Module):
    """Mean row of an image; exported, its mean column."""

    in_channels, out_features = 1, 4

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=3 if torch.compiler.is_exporting() else 2).flatten(1)


@pytest.mark.parametrize("format", ["onnx", "torch-export"])
def test_a_network_that_changes_when_exported_is_refused(format, tmp_path) -> None:
    encoder = Encoder(OtherWhenExported(), image_size=4).eval()
    path = tmp_path / f"e{SUFFIX[format]}"
    with pytest.raises(ExportError, match=r"other vectors than the encoder: .* 0.0001 is allowed. Nothing was written"):
        export_encoder(encoder, path, format=format)
    assert list(tmp_path.iterdir()) == []
    images = np.zeros((4, 4, 4), np.uint8)
    images[:2, :, 0], images[2:, :, 3] = 255, 255  # by columns two classes
    images[0, 0], images[2, 0], images[1, 2], images[3, 2] = 90, 90, 90, 90  # by rows the other pairs
    with pytest.raises(ExportError, match=r"recall@1 on the given images is 0.0 by the exported .* 1.0 by the encoder"):
        export_encoder(encoder, path, format=format, images=Source.from_arrays(images, list("aabb")), tolerance=2)
    assert list(tmp_path.iterdir()) == []


def test_given_images_are_compared_too(tmp_path) -> None:
    encoder = settled(small())
    images = pictures(6, encoder).transpose(0, 2, 3, 1)
    report = export_encoder(encoder, tmp_path / "e.onnx", images=Source.from_arrays(images, list("aabbcc")))
    assert report.images == 7 + 6
    assert report.recall_at_1 == report.encoder_recall_at_1
    vectors = float64_vectors(encoder, images.transpose(0, 3, 1, 2))
    scores = vectors @ vectors.T - 9 * np.eye(6)
    assert report.recall_at_1 == pytest.approx(np.mean(scores.argmax(axis=1) // 2 == np.arange(6) // 2))
    singles = Source.from_arrays(images, list("abcdef"))
    assert export_encoder(encoder, tmp_path / "f.onnx", images=singles).recall_at_1 is None


def test_what_cannot_be_exported_says_why(exported, tmp_path, monkeypatch) -> None:
    encoder, path, _ = exported
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"small.onnx exists; choose another name or pass overwrite=True"):
        export_encoder(encoder, path)
    with pytest.raises(ValueError, match=r"of format onnx is told by its suffix: name it .*e\.onnx"):
        export_encoder(encoder, tmp_path / "e.bin")
    with pytest.raises(ValueError, match="format is onnx or torch-export, got 'tflite'"):
        export_encoder(encoder, tmp_path / "e.onnx", format="tflite")
    monkeypatch.setattr(export, "_ONNX_LIMIT", 1000)
    with pytest.raises(ValueError, match="one ONNX file holds 2; export it as torch-export"):
        export_encoder(encoder, path, overwrite=True)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"needs onnxscript: pip install 'embedlab\[onnx\]'"):
        export_encoder(encoder, path, overwrite=True)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"needs onnxruntime: pip install 'embedlab\[onnx\]'"):
        OnnxEmbedder(path)
    assert path.read_bytes() == before


# ---- in a gallery --------------------------------------------------------------------------------------------------


def test_a_gallery_of_the_encoder_is_served_by_its_export_and_back(exported, tmp_path) -> None:
    encoder, path, _ = exported
    images = pictures(6, encoder)
    with Gallery.create(tmp_path / "g", encoder) as gallery:
        gallery.enroll(images, labels=list("aabbcc"))
        want = gallery.search(images, k=6)
    with Gallery.open(tmp_path / "g", path) as gallery:
        got = gallery.search(images, k=6)
        np.testing.assert_array_equal(got.ids, want.ids)
        np.testing.assert_allclose(got.scores, want.scores, atol=1e-5)
        gallery.enroll(images[:1], labels="d")
    with Gallery.create(tmp_path / "h", path) as gallery:
        gallery.enroll(images, labels=list("aabbcc"))
    with Gallery.open(tmp_path / "h", encoder) as gallery:
        np.testing.assert_array_equal(gallery.search(images, k=6).ids, want.ids)
        assert gallery.check().problems == ()
        (tmp_path / "h" / "encoder" / "model.onnx").unlink()
        assert gallery.check().problems == ("the folder encoder is missing, so that images cannot be embedded",)
    other = tmp_path / "other.onnx"
    torch.manual_seed(7)
    export_encoder(Encoder(ResNet("resnet8", stem="small", width=0.125), image_size=16).eval(), other)
    with pytest.raises(ValueError, match="was made with the embedder .* other weights or preprocessing"):
        Gallery.open(tmp_path / "g", other)


def test_a_gallery_served_by_an_export_loads_no_torch(exported, tmp_path) -> None:
    encoder, path, _ = exported
    model = tmp_path / "model.onnx"
    model.write_bytes(path.read_bytes())
    for number, image in enumerate(pictures(4, encoder)):
        folder = tmp_path / "people" / f"p{number // 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).resize((30, 20)).save(folder / f"{number}.jpg")
    code = f"""
        import os, sys
        from pathlib import Path
        from embedlab import Gallery
        from embedlab.cli import main
        root = Path({str(tmp_path)!r})
        photos = sorted(root.glob("people/*/*.jpg"))
        with Gallery.create(root / "g", root / "model.onnx") as gallery:
            gallery.enroll(photos, labels=["p0", "p0", "p1", "p1"])
        os.remove(root / "model.onnx")  # the gallery has its own copy
        with Gallery.open(root / "g") as gallery:
            answers = gallery.identify(photos)
            assert [answer.best for answer in answers] == ["p0", "p0", "p1", "p1"], answers
            assert [answer.score > 0.9999 for answer in answers] == [True] * 4, answers
            gallery.backup(root / "copy")
        assert main(["gallery", "enroll", str(root / "copy"), str(root / "people")]) == 0
        assert main(["gallery", "identify", str(root / "copy"), str(photos[0])]) == 0
        heavy = {{name.split(".")[0] for name in sys.modules}} & {{
            "torch", "torchvision", "pytorch_lightning", "lightning", "onnx", "onnxscript", "timm", "matplotlib"
        }}
        print(sorted(heavy))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]", done.stdout


def test_an_export_into_a_gallery_of_the_encoder_frees_it_from_torch(tmp_path) -> None:
    encoder = settled(small())
    images = pictures(4, encoder)
    np.save(tmp_path / "images.npy", images)
    with Gallery.create(tmp_path / "g", encoder) as gallery:
        gallery.enroll(images, labels=list("abcd"))
    inside = tmp_path / "g" / "encoder"
    assert main(["export", str(inside), "--out", str(inside / "model.onnx")]) == 0
    code = f"""
        import sys
        import numpy as np
        from embedlab import Gallery
        with Gallery.open({str(tmp_path / "g")!r}) as gallery:
            assert gallery.check().ok
            print(*(answer.best for answer in gallery.identify(np.load({str(tmp_path / "images.npy")!r}))))
            gallery.backup({str(tmp_path / "copy")!r})
        with Gallery.open({str(tmp_path / "copy")!r}) as gallery:
            print(type(gallery.embedder).__name__, "torch" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["a b c d", "OnnxEmbedder False"], done.stderr


def test_a_damaged_copy_in_the_gallery_is_refused(exported, tmp_path) -> None:
    encoder, path, _ = exported
    with Gallery.create(tmp_path / "g", path) as gallery:
        gallery.enroll(pictures(1, encoder), labels="a")
    copied = tmp_path / "g" / "encoder" / "model.onnx"
    content = bytearray(copied.read_bytes())
    content[len(content) // 2] ^= 4
    copied.write_bytes(content)
    with Gallery.open(tmp_path / "g") as gallery, pytest.raises(ValueError, match="is damaged or was edited"):
        gallery.search(pictures(1, encoder))
    embedder = OnnxEmbedder(path)
    changed = tmp_path / "changed.onnx"
    changed.write_bytes(path.read_bytes())
    embedder = OnnxEmbedder(changed)
    changed.write_bytes(content)
    with pytest.raises(ValueError, match="has changed since it was opened"):
        embedder.save(tmp_path / "copy")


# ---- the command ---------------------------------------------------------------------------------------------------


def test_the_command_exports_and_a_gallery_is_made_of_it(tmp_path, capsys) -> None:
    encoder = settled(small())
    encoder.save(tmp_path / "encoder")
    for number, image in enumerate(pictures(6, encoder)):
        folder = tmp_path / "people" / f"p{number // 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{number}.png")
    command = ["export", str(tmp_path / "encoder"), "--out", str(tmp_path / "e.onnx")]
    assert main([*command, "--images", str(tmp_path / "people")]) == 0
    text = capsys.readouterr().out
    assert "6 numbers per image\nlike the encoder on 13 images: vectors differ by " in text
    assert "with both" in text
    assert main(command) == 1
    assert "exists; choose another name" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--json"]) == 0
    assert f'"fingerprint": "{encoder.fingerprint}"' in capsys.readouterr().out
    assert main(["gallery", "create", str(tmp_path / "g"), "--encoder", str(tmp_path / "e.onnx")]) == 0
    assert main(["gallery", "enroll", str(tmp_path / "g"), str(tmp_path / "people")]) == 0
    assert "enrolled 6 templates; " in capsys.readouterr().out


def test_embed_and_evaluate_run_an_exported_file_like_its_encoder_and_without_torch(exported, tmp_path) -> None:
    encoder, path, _ = exported
    encoder.save(tmp_path / "encoder")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "model.onnx").write_bytes(path.read_bytes())
    for number, image in enumerate(pictures(12, encoder)):
        folder = tmp_path / "people" / f"p{number // 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).resize((30, 20)).save(folder / f"{number}.png")
    run = """
        import json, sys
        from embedlab.cli import main
        encoder, out = sys.argv[1:]
        assert main(["embed", "people", "--encoder", encoder, "--out", out + "/vectors", "--json"]) == 0
        assert main(["evaluate", "people", "--encoder", encoder, "--out", out + "/report.json"]) == 0
        print("torch" in sys.modules)
    """
    found = {}
    for name, given in [("encoder", "encoder"), ("file", str(path)), ("folder", "folder")]:
        command = [sys.executable, "-c", textwrap.dedent(run), given, name + "-out"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == str(name == "encoder")
        report = json.loads((tmp_path / f"{name}-out" / "report.json").read_text())
        found[name] = (
            read_embeddings(tmp_path / f"{name}-out" / "vectors"),
            read_protocol(tmp_path / f"{name}-out" / "vectors"),
            next(iter(report["results"].values())),
        )
    want, protocol, figures = found["encoder"]
    for name in ("file", "folder"):
        got, its_protocol, its_figures = found[name]
        np.testing.assert_allclose(got.vectors, want.vectors, atol=1e-5)
        assert (got.labels, got.paths) == (want.labels, want.paths)
        for key in ("encoder", "preprocessing", "precision"):
            assert its_protocol[key] == protocol[key]
        assert its_figures["recall_at_1"] == figures["recall_at_1"]


def test_an_exported_file_minds_degradations_as_its_encoder_does(exported) -> None:
    encoder, path, _ = exported
    images = pictures(4, encoder).transpose(0, 2, 3, 1)
    source = Source.from_arrays(np.ascontiguousarray(images), ["a", "a", "b", "b"])
    both = []
    for embedder in (encoder, OnnxEmbedder(path)):
        ((_, one),) = embed_degraded(embedder, source, embedder.embed(source), names=["haze"], severities=[3])
        both.append(one.vectors)
    np.testing.assert_allclose(*both, atol=1e-5)


def test_info_tells_size_and_speed_of_an_exported_file(exported, tmp_path, capsys) -> None:
    encoder, path, _ = exported
    for place in ("encoder", "exported"):
        if place == "encoder":
            encoder.save(tmp_path / place)
        (tmp_path / place).mkdir(exist_ok=True)
        (tmp_path / place / "model.onnx").write_bytes(path.read_bytes())
    for given in (path, tmp_path / "exported"):
        assert main(["info", str(given), "--batches", "1", "3", "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert document["megabytes"] == pytest.approx(path.stat().st_size / 1e6)
        want = (encoder.dim, encoder.image_size, None, None)
        assert tuple(document[name] for name in ("dim", "image_size", "parameters", "multiply_adds")) == want
        assert [speed["batch"] for speed in document["speeds"]] == [1, 3]
        assert all(speed["images_per_second"] > 0 for speed in document["speeds"])
    assert main(["info", str(path), "--batches", "2"]) == 0
    shown = f" MB, images of {encoder.image_size} px, {encoder.dim} numbers per embedding\n"
    assert shown in capsys.readouterr().out
    assert main(["info", str(tmp_path / "encoder"), "--batches", "1"]) == 0
    assert "parameters" in capsys.readouterr().out, "the encoder rather than the export beside it"
    for wrong in (["--layers"], ["--precision", "bfloat16"], ["--device", "cuda"]):
        assert main(["info", str(path), *wrong]) == 1
        assert "one piece that runs on the processor in float32. For layers" in capsys.readouterr().err


def test_what_an_exported_file_cannot_do_says_so(exported, tmp_path, capsys) -> None:
    encoder, path, _ = exported
    Image.fromarray(pictures(1, encoder)[0].transpose(1, 2, 0)).save(tmp_path / "a.png")
    for command, text in [
        (["embed", "--out", str(tmp_path / "v"), "--precision", "bfloat16"], "runs in float32 only, got precision 'bf"),
        (["evaluate", "--baselines"], "--baselines needs the network itself with new weights, which .* does not desc"),
        (["evaluate", "--protocol", "knn", "--reference", "x"], "this command takes the folder of the saved encoder"),
    ]:
        assert main([command[0], str(tmp_path / "a.png"), "--encoder", str(path), *command[1:]]) == 1
        assert re.search(text, capsys.readouterr().err)


def test_the_preprocessing_of_an_exported_file_is_the_encoders(exported) -> None:
    encoder, path, _ = exported
    assert OnnxEmbedder(path).preprocessing == encoder.preprocessing


def test_a_gallery_is_exported_as_one_folder_that_is_served_elsewhere_without_torch(tmp_path, capsys) -> None:
    encoder = settled(small())
    encoder.save(tmp_path / "encoder")
    images = pictures(70, encoder)
    for number, image in enumerate(images):
        folder = tmp_path / ("people" if number < 6 else "strangers") / f"p{number // 2 if number < 6 else number}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{number}.png")
    door, people, bundle = str(tmp_path / "door"), str(tmp_path / "people"), str(tmp_path / "bundle")
    for command in (
        ["create", door, "--encoder", str(tmp_path / "encoder"), "--thumbnails"],
        ["enroll", door, people],
        ["calibrate", door, str(tmp_path / "strangers"), "--fpir", "0.05"],
    ):
        assert main(["gallery", *command]) == 0
    capsys.readouterr()
    assert main(["export", door, "--out", bundle, "--images", people]) == 0
    text = capsys.readouterr().out
    assert re.search(
        r"like the encoder on 13 images: vectors differ by \d\.\de-\d\d at most, recall@1 is .* with both", text
    )
    with Gallery.open(door, read_only=True) as gallery:
        threshold = gallery.calibration.threshold
        meant = gallery.identify([tmp_path / "people" / "p1" / "3.png"])[0]
    shutil.move(bundle, tmp_path / "elsewhere")
    shutil.rmtree(door)
    shutil.rmtree(tmp_path / "encoder")
    code = """
        import sys
        sys.modules["torch"] = sys.modules["pytorch_lightning"] = None  # whoever imports them gets an ImportError
        from embedlab.cli import main
        sys.exit(main(["serve", sys.argv[1], "--port", sys.argv[2]]))
    """
    port = str(free_port())
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "elsewhere"), port],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        url, photo = f"http://127.0.0.1:{port}/api", (tmp_path / "people" / "p1" / "3.png").read_bytes()
        answer = None
        for _ in range(600):
            assert process.poll() is None, process.stderr.read()
            with contextlib.suppress(OSError):
                answer = json.load(urlopen(Request(f"{url}/identify", data=photo, method="POST"), timeout=30))
                break
            time.sleep(0.1)
        assert answer["label"] == meant.label
        assert answer["score"] == pytest.approx(meant.score, abs=6e-4)
        assert answer["neighbours"][0]["thumbnail"]
        about = json.load(urlopen(f"{url}/gallery", timeout=30))
        assert (about["identities"], about["threshold"]) == (3, round(threshold, 3))
        assert {one["label"] for one in json.load(urlopen(f"{url}/identities", timeout=30))["identities"]} == {
            "p0",
            "p1",
            "p2",
        }
    finally:
        process.terminate()
        process.communicate(timeout=60)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "people", "strangers"]


def test_a_gallery_that_cannot_be_exported_says_why(exported, tmp_path, capsys) -> None:
    encoder, path, _ = exported
    for name, embedder in (("onnx", path), ("encoder", encoder)):
        with Gallery.create(tmp_path / name, embedder) as gallery:
            gallery.enroll(pictures(1, encoder), labels="a")
    for gallery, out, text in [
        ("onnx", ["new"], "is such a bundle already: copy it by 'gallery backup'"),
        ("encoder", ["onnx"], "onnx is already a gallery; choose a new folder"),
        ("encoder", ["new", "--format", "torch-export"], "exported as ONNX into a new folder; leave out --format"),
    ]:
        assert main(["export", str(tmp_path / gallery), "--out", str(tmp_path / out[0]), *out[1:]]) == 1
        assert text in " ".join(capsys.readouterr().err.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder", "onnx"]
