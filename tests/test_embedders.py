"""Embedders that are not ours: ONNX files from elsewhere, arrays of any size, and who an encoder was trained on."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from embedlab import Gallery
from embedlab.data import ImageData, Source
from embedlab.data.embedding import identity_hash
from embedlab.data.images import fit_batch, fit_image
from embedlab.encoders import Encoder, MLPHead, Pixels, ResNet
from embedlab.methods import MetricLearning, SimCLR
from embedlab.methods.trainer import trained_encoder
from embedlab.retrieval.embedders import as_embedder
from embedlab.tasks import Classification

WHY = "ONNX ABSENT: no ONNX file was tested; pip install 'embedlab[onnx]'"


def network(path, *, shape=("batch", 3, 4, 4), type="FLOAT", weights=None, flat=True, inputs=1):
    """A foreign file: images of `shape` to the mean over rows and columns times (3, 5) weights."""
    onnx = pytest.importorskip("onnx", reason=WHY)
    pytest.importorskip("onnxruntime", reason=WHY)
    given = [
        onnx.helper.make_tensor_value_info(f"x{number}", getattr(onnx.TensorProto, type), list(shape))
        for number in range(inputs)
    ]
    kind = onnx.TensorProto.FLOAT if type == "UINT8" else getattr(onnx.TensorProto, type)
    axes = onnx.helper.make_tensor("axes", onnx.TensorProto.INT64, [2], [2, 3])
    values = np.arange(15.0).reshape(3, 5) if weights is None else weights
    matrix = onnx.helper.make_tensor("w", kind, [3, 5], values.ravel().tolist())
    nodes = [
        onnx.helper.make_node("Cast", ["x0"], ["f"], to=kind),
        onnx.helper.make_node("ReduceMean", ["f", "axes"], ["m"], keepdims=0 if flat else 1),
        onnx.helper.make_node("MatMul", ["m", "w"], ["y"]) if flat else onnx.helper.make_node("Relu", ["m"], ["y"]),
    ]
    wanted = onnx.helper.make_tensor_value_info("y", kind, None)
    graph = onnx.helper.make_graph(nodes, "g", given, [wanted], [axes, matrix] if flat else [axes])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


def pictures(count, side=4, other=None):
    return np.random.default_rng(0).integers(0, 256, (count, 3, side, other or side), dtype=np.uint8)


def open_onnx(path, **arguments):
    from embedlab.retrieval import OnnxEmbedder

    return OnnxEmbedder(path, **arguments)


# ---- ONNX files from elsewhere -------------------------------------------------------------------------------------


@pytest.mark.parametrize("type", ["UINT8", "FLOAT", "FLOAT16"])
@pytest.mark.parametrize("batch", ["batch", None, 1, 2])
def test_a_foreign_network_is_an_embedder(type, batch, tmp_path) -> None:
    embedder = open_onnx(network(tmp_path / "m.onnx", shape=(batch, 3, 4, 4), type=type))
    images = pictures(5)
    scale = 1 if type == "UINT8" else 255
    want = (images.astype(np.float64) / scale).mean(axis=(2, 3)) @ np.arange(15.0).reshape(3, 5)
    for batch_size in (1, 3, 64):
        found = embedder.embed(images, batch_size=batch_size)
        np.testing.assert_allclose(found.vectors, want, rtol=2e-3 if type == "FLOAT16" else 1e-5)
    assert (embedder.dim, found.ids.tolist(), found.labels) == (5, [0, 1, 2, 3, 4], None)
    assert embedder(images[:0]).shape == (0, 5)
    assert embedder.identities == frozenset()
    assert not embedder.trained_on("Ada")
    if type != "UINT8":
        np.testing.assert_allclose(embedder(images / 255), embedder(images), rtol=1e-5)


def test_mean_and_deviation_are_applied_where_the_network_does_not(tmp_path) -> None:
    path = network(tmp_path / "m.onnx", weights=np.eye(3, 5))
    mean, std = [0.5, 0.4, 0.3], [0.5, 0.25, 1.0]
    images = pictures(2)
    want = ((images.astype(np.float64) / 255).mean(axis=(2, 3)) - mean) / std
    np.testing.assert_allclose(open_onnx(path, mean=mean, std=std)(images)[:, :3], want, atol=1e-6)


def test_the_fingerprint_is_that_of_file_and_arguments(tmp_path) -> None:
    first, second = tmp_path / "a.onnx", tmp_path / "b.onnx"
    network(first), second.write_bytes(first.read_bytes())
    print_of = open_onnx(first).fingerprint
    assert open_onnx(second).fingerprint == print_of
    assert open_onnx(first, fit="crop", mean=[0, 0, 0], std=[1, 1, 1], image_size=4).fingerprint == print_of
    others = [
        open_onnx(first, fit="pad"),
        open_onnx(first, mean=[0.5] * 3),
        open_onnx(first, std=[0.5] * 3),
        open_onnx(network(tmp_path / "c.onnx", weights=np.ones((3, 5)))),
        open_onnx(network(tmp_path / "d.onnx", shape=("n", 3, "h", "w")), image_size=4),
        open_onnx(tmp_path / "d.onnx", image_size=5),
    ]
    assert len({print_of, *(one.fingerprint for one in others)}) == 7


def test_a_foreign_network_travels_with_its_gallery(tmp_path) -> None:
    images = pictures(4, 6, 9)
    embedder = open_onnx(network(tmp_path / "m.onnx", shape=("n", 3, "h", "w")), image_size=4, fit="pad", std=[0.5] * 3)
    paths = []
    for number, image in enumerate(images):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(image.transpose(1, 2, 0)).save(paths[-1])
    with Gallery.create(tmp_path / "g", embedder) as gallery:
        gallery.enroll(paths, labels=list("abcd"))
        want = gallery.search(images, k=4).scores
    (tmp_path / "m.onnx").unlink()
    with Gallery.open(tmp_path / "g") as gallery:
        np.testing.assert_allclose(gallery.search(paths, k=4).scores, want, atol=1e-6)
    notes = tmp_path / "g" / "encoder" / "model.json"
    notes.write_text(json.dumps({**json.loads(notes.read_text()), "fit": "stretch"}))
    with Gallery.open(tmp_path / "g") as gallery, pytest.raises(ValueError, match="was made with the embedder"):
        gallery.search(images)
    notes.write_text("{")
    with Gallery.open(tmp_path / "g") as gallery, pytest.raises(ValueError, match=r"model\.json is damaged"):
        gallery.search(images)


@pytest.mark.parametrize(
    ("made", "arguments", "text"),
    [
        ({"inputs": 2}, {}, r"must take one batch of images .* it takes x0 tensor\(float\) .*, x1 tensor"),
        ({"type": "INT64"}, {}, r"uint8 or float; it takes x0 tensor\(int64\)"),
        ({"shape": ("n", 3, 4, 4, 4), "flat": False}, {}, r"one batch of images \(B, C, H, W\)"),
        (
            {"shape": ("n", 4, 4, 3), "flat": False},
            {},
            r"takes images .* one side of a square in pixels, channels",
        ),
        ({"shape": ("n", 3, 4, 5)}, {}, "name one side of a square"),
        ({"shape": ("n", 3, "h", "w")}, {}, "Pass image_size= where the file leaves it open"),
        ({}, {"image_size": 8}, "image_size is 8: together they must name one side"),
        ({}, {"mean": [0.5]}, r"mean needs 3 finite numbers, std above 0; got \[0.5\]"),
        ({}, {"std": [1, 0, 1]}, "std needs 3 finite numbers"),
        ({"type": "UINT8"}, {"std": [1, 1, 1]}, "takes uint8 images, which it normalises itself; leave out std"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_networks_that_do_not_fit_are_explained(made, arguments, text, tmp_path) -> None:
    path = network(tmp_path / "m.onnx", **made)
    with pytest.raises(ValueError, match=text):
        open_onnx(path, **arguments)


def test_files_that_are_no_network_are_explained(tmp_path) -> None:
    path = network(tmp_path / "m.onnx", flat=False)
    with pytest.raises(ValueError, match=r"must return \(2, D\) numbers .* got \(2, 3, 1, 1\) .* needs pooling"):
        open_onnx(path)(pictures(2))
    with pytest.raises(ValueError, match=r"takes images \(N, 3, H, W\), got \(2, 4, 4, 3\); channels come second"):
        open_onnx(path)(pictures(2).transpose(0, 2, 3, 1))
    with pytest.raises(ValueError, match=r"Float images must lie in \[0, 1\]"):
        open_onnx(path)(pictures(2).astype(np.float32))
    path.write_bytes(b"no network")
    with pytest.raises(ValueError, match=r"is no ONNX file that onnxruntime .* can run: .* Is it whole"):
        open_onnx(path)
    with pytest.raises(ValueError, match=r"absent\.onnx cannot be read \(No such file"):
        open_onnx(tmp_path / "absent.onnx")
    with pytest.raises(ValueError, match=r"folder: .*mn\.onnx; did you mean .*/m\.onnx\? .* or an ONNX file"):
        as_embedder(tmp_path / "mn.onnx")
    with pytest.raises(ValueError, match=r"no encoder\.json and no model\.onnx, and is no \.onnx file"):
        as_embedder(tmp_path)


# ---- arrays --------------------------------------------------------------------------------------------------------


def naive_resize(image: np.ndarray, size: int) -> np.ndarray:
    """Triangle filter, widened for reduction, in float64 loops: (H, W) to (size, size)."""

    def weights(length: int) -> np.ndarray:
        scale = length / size
        support = max(scale, 1.0)
        table = np.zeros((size, length))
        for target in range(size):
            centre = (target + 0.5) * scale
            for source in range(length):
                table[target, source] = max(0.0, 1 - abs(source + 0.5 - centre) / support)
        return table / table.sum(axis=1, keepdims=True)

    return weights(image.shape[0]) @ image.astype(np.float64) @ weights(image.shape[1]).T


@pytest.mark.parametrize("shape", [(9, 9), (7, 5), (3, 4)])
def test_float_images_are_resized_as_by_hand(shape) -> None:
    images = np.random.default_rng(0).random((2, 3, *shape)).astype(np.float32)
    got = fit_batch(images, 4, channels=3, how="stretch")
    assert got.dtype == np.float32
    for image, fitted in zip(images, got, strict=True):
        for channel in range(3):
            np.testing.assert_allclose(fitted[channel], naive_resize(image[channel], 4), atol=1e-6)


@pytest.mark.parametrize("how", ["crop", "stretch", "pad"])
def test_float_images_are_fitted_as_uint8_ones_and_as_files(how, tmp_path) -> None:
    images = pictures(3, 20, 33)
    coarse = fit_batch(images, 8, channels=3, how=how)
    fine = fit_batch(images / np.float32(255), 8, channels=3, how=how)
    assert np.abs(coarse / 255 - fine).max() <= 1.01 / 255  # rounding, once per direction
    np.testing.assert_array_equal(coarse[1], fit_image(images[1].transpose(1, 2, 0), 8, how).transpose(2, 0, 1))
    encoder = Encoder(Pixels(8), image_size=8, fit=how).eval()
    Image.fromarray(images[1].transpose(1, 2, 0)).save(tmp_path / "1.png")
    np.testing.assert_array_equal(encoder.embed(images[1:2]).vectors, encoder.embed([tmp_path / "1.png"]).vectors)
    same = np.zeros((2, 3, 8, 8), np.float64)
    assert fit_batch(same, 8, channels=3).dtype == np.float32
    with pytest.raises(ValueError, match="must be uint8, or floats in .* got int64"):
        fit_batch(images.astype(np.int64), 8, channels=3)


# ---- trained identities --------------------------------------------------------------------------------------------


def data() -> ImageData:
    images = np.zeros((12, 8, 8, 3), np.uint8)
    made = ImageData(Source.from_arrays(images, list("aabbccddeeff")), image_size=8, split="class", batch_size=4)
    made.setup()
    return made


def backbone() -> ResNet:
    return ResNet("resnet8", stem="small", width=0.125)


def test_an_encoder_remembers_whom_labels_taught_it(tmp_path) -> None:
    source = data()
    seen, unseen = source.class_names[: source.num_classes], source.class_names[source.num_classes :]
    assert seen
    assert unseen
    encoder = trained_encoder(MetricLearning(backbone(), MLPHead(4)), source)
    encoder.save(tmp_path / "encoder")
    for one in (encoder, Encoder.load(tmp_path / "encoder")):
        assert [one.trained_on(label) for label in (*seen, *unseen)] == [True] * len(seen) + [False] * len(unseen)
    text = (tmp_path / "encoder" / "encoder.json").read_text()
    assert json.loads(text)["identities"] == sorted(identity_hash(label) for label in seen)
    assert encoder.untrained().identities == frozenset()
    without = Encoder(encoder.backbone, encoder.head, **encoder.preprocessing)
    assert without.fingerprint == encoder.fingerprint
    assert without.identities == frozenset()
    assert trained_encoder(SimCLR(backbone(), MLPHead(4)), source).identities == frozenset()


@pytest.mark.parametrize("freeze", [False, True])
def test_fine_tuning_adds_to_whom_the_encoder_knew(freeze, tmp_path) -> None:
    start = Encoder(backbone(), image_size=8, identities=[identity_hash("before")])
    start.save(tmp_path / "encoder")
    source = data()
    method = Classification(encoder=tmp_path / "encoder", freeze=freeze)
    encoder = trained_encoder(method, source)
    assert encoder.trained_on("before")
    assert encoder.trained_on(source.class_names[0]) == (not freeze)


def test_fit_leaves_the_identities_behind(tmp_path) -> None:
    import pytorch_lightning as pl

    from embedlab.methods.trainer import SaveEncoder, quiet

    quiet()
    torch.manual_seed(0)
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    source = ImageData(
        Source.from_arrays(images, list("aabbccddeeff")), image_size=8, split="class", batch_size=4, images_per_class=2
    )
    trainer = pl.Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[SaveEncoder(tmp_path / "encoder")],
        use_distributed_sampler=False,
    )
    trainer.fit(MetricLearning(backbone(), MLPHead(4)), datamodule=source)
    encoder = Encoder.load(tmp_path / "encoder")
    assert encoder.identities == {identity_hash(label) for label in source.class_names[: source.num_classes]}
    assert len(encoder.identities) == source.num_classes > 0


def test_a_gallery_takes_a_list_of_tensors_of_any_type(tmp_path) -> None:
    rows = torch.eye(4)
    with Gallery.create(tmp_path / "g", dim=4) as gallery:
        for name, made in (("half", rows.bfloat16()), ("learnt", rows.clone().requires_grad_())):
            gallery.enroll(embeddings=list(made), labels=[f"{name} {number}" for number in range(4)])
        np.testing.assert_array_equal(gallery.embeddings().vectors, np.tile(np.eye(4), (2, 1)))
