import json
import time
from dataclasses import replace

import pytest
import torch
import torchvision
from torch import nn

from embedlab.cli import main
from embedlab.encoders import Encoder, LinearHead, MLPHead, ResNet, TimmBackbone, measure_capacity
from embedlab.encoders.capacity import _multiply_adds


def hand_counted(encoder: Encoder) -> int:
    """Multiply-adds of one image, from the shapes that pass each convolution and linear layer."""
    total = []

    def convolution(layer: nn.Conv2d, given, out) -> None:
        total.append(out[0].numel() * layer.in_channels // layer.groups * layer.kernel_size[0] * layer.kernel_size[1])

    def linear(layer: nn.Linear, given, out) -> None:
        total.append(out[0].numel() * layer.in_features)

    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(convolution)
        elif isinstance(module, nn.Linear):
            module.register_forward_hook(linear)
    encoder.eval()(torch.zeros(1, encoder.channels, encoder.image_size, encoder.image_size))
    return sum(total)


@pytest.mark.parametrize("head", [None, LinearHead(16), MLPHead(8)], ids=["no head", "linear", "mlp"])
def test_multiply_adds_are_those_counted_by_hand(head) -> None:
    encoder = Encoder(ResNet("resnet10", stem="medium", width=0.25), head, image_size=24)
    found = measure_capacity(encoder, batches=(1,), seconds=0)
    assert found.multiply_adds == hand_counted(encoder)
    assert found.parameters == sum(parameter.numel() for parameter in encoder.parameters())


def test_resnet18_is_as_large_as_published() -> None:
    """He et al. 2016, table 1: 1.8 x 10^9 multiply-adds; torchvision: 11,689,512 parameters with its 1000 classes."""
    found = measure_capacity(Encoder(ResNet("resnet18"), LinearHead(1000), image_size=224), batches=(1,), seconds=0)
    assert found.multiply_adds == pytest.approx(1.814e9, rel=1e-3)
    assert found.parameters == 11_689_512


class Whole(nn.Module):
    """A network of torchvision with its 1000 classes as features."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.net = torchvision.models.get_model(name)
        self.out_features = 1000

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net(images)


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet50", "mobilenet_v3_small", "efficientnet_b0", "convnext_tiny", "swin_t", "vit_b_16"]
)
def test_multiply_adds_are_those_that_torchvision_publishes(name) -> None:
    """Its models come with their parameters and 10^9 multiply-adds; on the meta device nothing is computed."""
    published = torchvision.models.get_model_weights(name).DEFAULT.meta
    place = torch.device("meta")
    with place:
        encoder = Encoder(Whole(name), image_size=224).eval()
    fused = torch.backends.mha.get_fastpath_enabled()
    assert _multiply_adds(encoder, place)[""] / 1e9 == pytest.approx(published["_ops"], abs=6e-4)
    assert torch.backends.mha.get_fastpath_enabled() == fused
    assert sum(parameter.numel() for parameter in encoder.parameters()) == published["num_params"]


def test_attention_counts_on_the_processor_too() -> None:
    """DeiT-Ti, Touvron et al. 2021, table 5: 5 million parameters; their 1.3 x 10^9 multiply-adds by hand."""
    pytest.importorskip("timm")
    encoder = Encoder(TimmBackbone("vit_tiny_patch16_224"), image_size=224)
    tokens, width = 14 * 14 + 1, 192
    block = tokens * width * (3 * width + width + 2 * 4 * width) + 2 * tokens**2 * width
    found = measure_capacity(encoder, batches=(1,), seconds=0, layers=True)
    assert found.multiply_adds == 14 * 14 * 16 * 16 * 3 * width + 12 * block
    parts = {layer.name: layer for layer in found.layers}
    assert parts["backbone.net.blocks.0"].multiply_adds == block
    assert parts["backbone.net.blocks.0.attn"].multiply_adds == tokens * width * 4 * width + 2 * tokens**2 * width
    assert found.parameters == pytest.approx(5.5e6, rel=0.01)


def test_all_test_time_views_count() -> None:
    plain, several = (
        Encoder(ResNet("resnet10", stem="small", width=0.125), image_size=16, test_views=views)
        for views in (None, {"count": 5})
    )
    one, many = (measure_capacity(encoder, batches=(1,), seconds=0) for encoder in (plain, several))
    assert many.multiply_adds == 5 * one.multiply_adds


def test_layers_add_up_and_speeds_are_measured() -> None:
    encoder = Encoder(ResNet("resnet10", stem="small", width=0.25), MLPHead(8), image_size=16)
    found = measure_capacity(encoder, batches=(1, 32), seconds=0.05, precision="bfloat16", layers=True)
    parts = {layer.name: layer for layer in found.layers}
    assert parts["backbone"].multiply_adds + parts["head"].multiply_adds == found.multiply_adds
    assert parts["backbone"].parameters + parts["head"].parameters == found.parameters
    leaves = [name for name, module in encoder.named_modules() if name and not list(module.children())]
    assert sum(parts[name].multiply_adds for name in leaves) == found.multiply_adds
    one, many = found.speeds
    assert (one.batch, many.batch) == (1, 32)
    assert many.images_per_second == pytest.approx(32_000 / many.milliseconds)
    assert many.peak_mebibytes is None or many.peak_mebibytes > 0.25, "32 x 16 channels x 16 x 16 in two bytes"


class Hungry(nn.Module):
    """Takes 8 MiB and 10 ms per image."""

    out_features = 4

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        time.sleep(0.01 * len(images))
        return torch.ones(len(images), 4, 2**19).sum(dim=2)


def test_memory_and_time_are_those_that_a_call_takes() -> None:
    one, four = measure_capacity(Encoder(Hungry(), image_size=8), batches=(1, 4), seconds=0).speeds
    for speed in (one, four):
        assert 10 * speed.batch <= speed.milliseconds < 400
        if speed.peak_mebibytes is not None:
            assert 7.5 * speed.batch < speed.peak_mebibytes < 8 * speed.batch + 8


def test_the_command_shows_a_table_or_json(tmp_path, capsys) -> None:
    encoder = Encoder(ResNet("resnet10", stem="small", width=0.125), image_size=8)
    encoder.save(tmp_path / "encoder")
    assert main(["info", str(tmp_path / "encoder"), "--batches", "2", "--layers"]) == 0
    text = capsys.readouterr().out
    assert "77,352 parameters (0.3 MB), 0.3 million multiply-adds per image of 8 px, 64 numbers per embedding" in text
    assert "backbone.net.layer1.0.conv1" in text
    assert main(["info", str(tmp_path / "encoder"), "--batches", "2", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["multiply_adds"] == 259_584
    assert document["speeds"][0]["batch"] == 2
    assert document["layers"] == []


def test_no_batch_is_an_error() -> None:
    encoder = Encoder(ResNet("resnet10", stem="small", width=0.125), image_size=8)
    with pytest.raises(ValueError, match=r"needs batches of at least one image, got \[0\]"):
        measure_capacity(encoder, batches=[0])


@pytest.mark.parametrize("device", ["potato", "cuda:63"])
def test_a_device_that_is_not_there_is_an_error(device) -> None:
    encoder = Encoder(ResNet("resnet10", stem="small", width=0.125), image_size=8)
    there = r": torch \d.* sees cpu( and cuda:0)?.* Name one of these, or leave it out\."
    with pytest.raises(ValueError, match=f"There is no device '{device}' here{there}") as told:
        measure_capacity(encoder, device=device)
    assert told.value.__cause__ is None, "our words, not PyTorch's"


@pytest.mark.parametrize(("threads", "text"), [(1, ", 1 thread, float32"), (2, ", 2 threads, float32")])
def test_threads_are_counted_in_words(threads, text) -> None:
    encoder = Encoder(ResNet("resnet10", stem="small", width=0.125), image_size=8)
    found = measure_capacity(encoder, batches=[1], seconds=0)
    assert text in replace(found, threads=threads).to_text()
