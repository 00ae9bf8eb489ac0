"""Backbones: images (B, C, H, W) to pooled features (B, F)."""

from __future__ import annotations

import math
import socket
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from embedlab._ops import normalize

_LAYERS: dict[str, tuple[type[BasicBlock | Bottleneck], list[int]]] = {
    "resnet8": (BasicBlock, [1, 1, 1]),
    "resnet10": (BasicBlock, [1, 1, 1, 1]),
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
    "resnet101": (Bottleneck, [3, 4, 23, 3]),
    "resnet152": (Bottleneck, [3, 8, 36, 3]),
}


_STEMS = {
    "large": (7, 4, True),
    "imagenet": (7, 2, True),
    "medium": (5, 2, False),
    "small": (3, 1, False),
}  # kernel, stride, max-pooling

_FLAT = 0.01  # added to the variance: what has less than a tenth of the usual contrast stays weak, noise among it


class PretrainedUnavailableError(RuntimeError):
    """Pretrained weights were asked for and cannot be had here."""


def _group_norm(channels: int) -> nn.GroupNorm:
    """At most 32 groups, of 8 channels or more: smaller ones are ill-conditioned on the small maps of late stages."""
    return nn.GroupNorm(math.gcd(32, max(1, channels // 8)), channels)


def _require_reachable(url: str, what: str) -> None:
    """Fail in seconds, not in a minute of a library's retries."""
    address = urlparse(url)
    try:
        socket.create_connection((address.hostname or "", address.port or 443), timeout=3).close()
    except OSError as error:
        raise PretrainedUnavailableError(
            f"{what} is not in the local cache and {address.hostname} cannot be reached ({error}). Leave out "
            "pretrained to start from random weights, or fetch the file once on a machine with internet and copy "
            "its cache folder here."
        ) from error


class ResNet(nn.Module):
    """Residual network of torchvision without its classifier, He et al. 2016 (https://arxiv.org/abs/1512.03385).

    Args:
        name: "resnet18", "resnet34", "resnet50", "resnet101" or "resnet152"; "resnet10" has one block in each of the
            four stages, "resnet8" one in each of three.
        stem: "imagenet": 7x7 stride 2 and max-pooling, for 96 px and more. "small": 3x3 stride 1 without pooling, for
            images of 32 px. "medium": 5x5 stride 2 without pooling, between the two; four times as fast as "small".
        width: Multiplies the number of channels of every stage.
        in_channels: Channels of the images; pretrained weights are adapted by averaging over colours.
        norm: "batch", or "group" (no statistics over the batch: the same on one device and on many).
        pool: Side of the grid of places whose features are kept, each a mean over its part of the picture. 1 is the
            usual mean over all; 2 to 4 also tell where something is, for aligned pictures such as faces, with pool^2
            times the features. Several are of as many last stages, [2, 1] of the last but one and the last: their
            features, those of each stage brought to unit length, stand side by side.
        standardize: Bring each image, channel by channel, to mean 0 and deviation 1 first: for pictures whose exposure
            or colour cast changes and means nothing.
        pretrained: Start from torchvision's ImageNet weights (needs stem="imagenet", norm="batch", width=1).

    Shape: images (B, in_channels, H, W), normalised, to features (B, out_features).

    Example:
        >>> ResNet("resnet10", stem="small", width=0.25, norm="group")(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 128])
    """

    def __init__(
        self,
        name: str = "resnet18",
        *,
        stem: Literal["imagenet", "medium", "small"] = "imagenet",
        width: float = 1.0,
        in_channels: int = 3,
        norm: Literal["batch", "group"] = "batch",
        pool: int | list[int] = 1,
        standardize: bool = False,
        pretrained: bool = False,
    ) -> None:
        super().__init__()
        if name not in _LAYERS:
            raise ValueError(f"ResNet knows {', '.join(_LAYERS)}; got {name!r}. For others use TimmBackbone.")
        if stem not in _STEMS or norm not in ("batch", "group"):
            raise ValueError(f"ResNet takes stem {'|'.join(_STEMS)} and norm batch|group, got {stem!r} and {norm!r}.")
        block, layers = _LAYERS[name]
        grids = [pool] if isinstance(pool, int) else list(pool)
        if width <= 0 or in_channels < 1 or not 1 <= len(grids) <= len(layers) or min(grids) < 1:
            raise ValueError(
                f"ResNet needs width > 0, in_channels >= 1 and pool >= 1, one or a list for up to {len(layers)} last "
                f"stages; got {width}, {in_channels} and {pool}."
            )
        self.config: dict[str, Any] = {
            "name": name,
            "stem": stem,
            "width": width,
            "in_channels": in_channels,
            "norm": norm,
        }
        for option, given, usual in (("pool", pool, 1), ("standardize", standardize, False)):
            if given != usual and given != [usual]:  # left out, an encoder keeps the fingerprint that it has always had
                self.config[option] = given
        self.in_channels = in_channels
        self.standardize = standardize
        self.net = _build(name, stem, width, in_channels, norm)
        self.grids = grids
        sizes = [size * block.expansion for size in _planes(width)[: len(layers)]]
        self.out_features = sum(size * grid**2 for size, grid in zip(reversed(sizes), reversed(grids), strict=False))
        self.net.avgpool = nn.AdaptiveAvgPool2d(grids[-1])
        self.net.fc = nn.Identity()
        if pretrained:
            if stem != "imagenet" or norm != "batch" or width != 1 or name in ("resnet8", "resnet10"):
                raise ValueError(
                    f"ImageNet weights exist for the unchanged resnet18 ... resnet152, not for {self.config}; use "
                    "stem='imagenet', norm='batch', width=1 or leave out pretrained."
                )
            _load_imagenet(self.net, name, in_channels)

    def forward(self, images: Tensor) -> Tensor:
        if self.standardize:
            images = _standardized(images)
        if len(self.grids) == 1:
            features: Tensor = self.net(images)
            return features
        net = self.net
        maps = [net.maxpool(net.relu(net.bn1(net.conv1(images))))]
        for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
            if not isinstance(stage, nn.Identity):
                maps.append(stage(maps[-1]))
        kept = zip(maps[-len(self.grids) :], self.grids, strict=True)
        return torch.cat([normalize(F.adaptive_avg_pool2d(map_, grid).flatten(1)) for map_, grid in kept], dim=1)


def _planes(width: float) -> list[int]:
    """Channels of the four stages of basic blocks."""
    return [max(8, round(64 * width * 2**stage / 8) * 8) for stage in range(4)]


def _standardized(images: Tensor) -> Tensor:
    variance, mean = torch.var_mean(images, dim=(2, 3), correction=0, keepdim=True)
    return (images - mean) * (variance + _FLAT).rsqrt()


def _build(name: str, stem: str, width: float, in_channels: int, norm: str) -> torchvision.models.ResNet:
    """Torchvision's class, with its own stage builder called again where width or stem differ."""
    block, layers = _LAYERS[name]
    normalization = nn.BatchNorm2d if norm == "batch" else _group_norm
    net = torchvision.models.ResNet(block, (*layers, 1)[:4], norm_layer=normalization)
    planes = _planes(width)
    kernel, stride, pools = _STEMS[stem]
    net.conv1 = nn.Conv2d(in_channels, planes[0], kernel, stride=stride, padding=kernel // 2, bias=False)
    if not pools:
        net.maxpool = nn.Identity()
    net.inplanes = planes[0]
    net.bn1 = normalization(planes[0])
    for stage in range(4):
        stage_module: nn.Module = nn.Identity()
        if stage < len(layers):
            stage_module = net._make_layer(block, planes[stage], layers[stage], stride=1 if stage == 0 else 2)
        setattr(net, f"layer{stage + 1}", stage_module)
    net.fc = nn.Linear(planes[len(layers) - 1] * block.expansion, 1)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net


def _load_imagenet(net: torchvision.models.ResNet, name: str, in_channels: int) -> None:
    weights = torchvision.models.get_model_weights(name).DEFAULT
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(weights.url).path).name
    if not cached.is_file():
        _require_reachable(weights.url, f"ImageNet weights of {name} ({cached.name})")
    state = weights.get_state_dict(progress=True, check_hash=True)
    state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    if in_channels != 3:  # the same response to a grey picture, whatever the number of channels
        state["conv1.weight"] = (
            state["conv1.weight"].mean(1, keepdim=True).repeat(1, in_channels, 1, 1) * 3 / in_channels
        )
    net.load_state_dict(state)


class TimmBackbone(nn.Module):
    """Any image model of timm as a backbone (extra `timm`).

    Args:
        name: timm's name, such as "vit_small_patch16_224"; `timm.list_models()` lists them.
        in_channels: Channels of the images.
        image_size: For models with a fixed input size, such as vision transformers; None keeps the model's own.
        pretrained: Load timm's weights.

    Shape: images (B, in_channels, H, W), normalised, to features (B, out_features).
    """

    def __init__(
        self, name: str, *, in_channels: int = 3, image_size: int | None = None, pretrained: bool = False
    ) -> None:
        super().__init__()
        try:
            import timm
        except ImportError as error:
            raise ImportError("TimmBackbone needs timm: pip install 'embedlab[timm]'") from error
        if not timm.is_model(name):
            near = timm.list_models(f"*{name.split('_')[0]}*")[:5]
            raise ValueError(f"timm has no model {name!r}; near names: {', '.join(near) or 'none'}.")
        self.config: dict[str, Any] = {"name": name, "in_channels": in_channels, "image_size": image_size}
        self.in_channels = in_channels
        options: dict[str, Any] = {"in_chans": in_channels, "num_classes": 0}
        if image_size is not None:
            options["img_size"] = image_size
        self.net = timm.create_model(name, pretrained=pretrained, **options, **_timm_cache(name, pretrained))
        self.out_features = int(self.net.num_features)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.net(images)
        return features


def _timm_cache(name: str, pretrained: bool) -> dict[str, Any]:
    """Point timm at a cached weight file, or fail quickly when there is neither file nor network."""
    if not pretrained:
        return {}
    import timm
    from huggingface_hub import try_to_load_from_cache

    source = timm.get_pretrained_cfg(name)
    if source is None:
        raise ValueError(f"timm has no pretrained weights for {name!r}; leave out pretrained.")
    for filename in ("model.safetensors", "pytorch_model.bin"):
        cached = try_to_load_from_cache(source.hf_hub_id, filename) if source.hf_hub_id else None
        if isinstance(cached, str):
            return {"pretrained_cfg_overlay": {"file": cached}}
    _require_reachable("https://huggingface.co" if source.hf_hub_id else str(source.url), f"timm weights of {name}")
    return {}


class Pixels(nn.Module):
    """The image itself as a feature vector: the baseline that every trained encoder must beat.

    Args:
        image_size: Side of the images in pixels.
        in_channels: Channels of the images.

    Shape: images (B, in_channels, image_size, image_size) to (B, in_channels * image_size ** 2).
    """

    def __init__(self, image_size: int, *, in_channels: int = 3) -> None:
        super().__init__()
        self.config: dict[str, Any] = {"image_size": image_size, "in_channels": in_channels}
        self.in_channels = in_channels
        self.out_features = in_channels * image_size**2

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)
