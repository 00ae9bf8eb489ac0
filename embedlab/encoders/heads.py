"""Heads: features (B, F) to embeddings (B, D)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from embedlab._ops import cosine, normalize


def feature_size(backbone: nn.Module) -> int:
    """Number of features a backbone gives: its `out_features` or `num_features`, else found by one forward pass."""
    for name in ("out_features", "num_features"):
        if isinstance(size := getattr(backbone, name, None), int):
            return size
    training = backbone.training
    with torch.no_grad():
        features = backbone.eval()(torch.zeros(1, getattr(backbone, "in_channels", 3), 64, 64))
    backbone.train(training)
    if not isinstance(features, Tensor) or features.ndim != 2:
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(
            f"A backbone must map images (B, C, H, W) to features (B, F); {type(backbone).__name__} gave {got}."
        )
    return features.shape[1]


def connect(backbone: nn.Module, head: nn.Module | None) -> int:
    """Give the head the backbone's feature size, or check the one that it has; return the size of the embedding.

    Raises:
        ValueError: A head for another number of features, or a backbone that does not give (B, F).
    """
    features = feature_size(backbone)
    if head is None:
        return features
    if isinstance(head, MLPHead | LinearHead):
        if head.in_features is None:
            head.build(features)
        elif head.in_features != features:
            raise ValueError(
                f"The head takes {head.in_features} features but {type(backbone).__name__} gives {features}; leave out "
                "in_features to take the backbone's."
            )
        return head.out_features
    training = head.training
    with torch.no_grad():
        size: int = head.eval()(torch.zeros(1, features)).shape[1]
    head.train(training)
    return size


class LinearHead(nn.Module):
    """One linear layer.

    Args:
        out_features: Size of the embedding, or number of classes.
        in_features: Size of the features; None takes the backbone's when the two are joined.

    Shape: features (B, in_features) to (B, out_features).
    """

    def __init__(self, out_features: int, *, in_features: int | None = None) -> None:
        super().__init__()
        self.out_features = out_features
        self.in_features: int | None = None
        if in_features is not None:
            self.build(in_features)

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments that make this head again."""
        return {"out_features": self.out_features, "in_features": self.in_features}

    def build(self, in_features: int) -> None:
        """Create the layer for a known feature size."""
        self.in_features = in_features
        self.net = nn.Linear(in_features, self.out_features)

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = self.net(features)
        return out


class CosineHead(nn.Module):
    """Classifier by cosine to one weight vector per class, Gidaris and Komodakis 2018 (https://arxiv.org/abs/1804.09458).

    With few labels it starts best as the class means of the features, Qi et al. 2018
    (https://arxiv.org/abs/1712.07136): `imprint`.

    Args:
        out_features: Number of classes.
        in_features: Size of the features.
        scale: Multiplies the cosine; no unit, > 0.

    Shape: features (B, in_features) to logits (B, out_features) in [-scale, scale].
    """

    def __init__(self, out_features: int, *, in_features: int, scale: float = 10.0) -> None:
        super().__init__()
        if scale <= 0:
            raise ValueError(f"CosineHead needs scale > 0, got {scale}; 10 to 30 is usual.")
        self.out_features = out_features
        self.in_features = in_features
        self.scale = scale
        self.weight = nn.Parameter(torch.randn(out_features, in_features))

    @torch.no_grad()
    def imprint(self, features: Tensor, labels: Tensor) -> None:
        """Set each class's weight to the mean of its unit features (N, in_features), labels (N,)."""
        features = normalize(features)
        for number in torch.unique(labels).tolist():
            self.weight[number] = features[labels == number].mean(dim=0)

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * cosine(features, self.weight)


class MLPHead(nn.Module):
    """Projection head: hidden layers of linear, normalisation, ReLU (in that order), then a linear layer.

    Args:
        out_features: Size of the embedding.
        in_features: Size of the features; None takes the backbone's when the two are joined.
        hidden_features: Width of the hidden layers; None takes in_features.
        hidden_layers: Number of hidden layers; SimCLR has 1.
        norm: "batch", "layer", or "none"; stands before the activation.
        dropout: Share of hidden units dropped while training.

    Shape: features (B, in_features) to (B, out_features).

    Example:
        >>> MLPHead(8, in_features=16, norm="layer")(torch.zeros(2, 16)).shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        out_features: int = 128,
        *,
        in_features: int | None = None,
        hidden_features: int | None = None,
        hidden_layers: int = 1,
        norm: Literal["batch", "layer", "none"] = "batch",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if norm not in ("batch", "layer", "none"):
            raise ValueError(f"MLPHead takes norm batch|layer|none, got {norm!r}.")
        if not 0 <= dropout < 1 or hidden_layers < 0:
            raise ValueError(
                f"MLPHead needs 0 <= dropout < 1 and hidden_layers >= 0, got {dropout} and {hidden_layers}."
            )
        self.out_features = out_features
        self.in_features: int | None = None
        self.hidden_features = hidden_features
        self.hidden_layers = hidden_layers
        self.norm = norm
        self.dropout = dropout
        if in_features is not None:
            self.build(in_features)

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments that make this head again."""
        names = ("out_features", "in_features", "hidden_features", "hidden_layers", "norm", "dropout")
        return {name: getattr(self, name) for name in names}

    def build(self, in_features: int) -> None:
        """Create the layers for a known feature size."""
        self.in_features = in_features
        layers: list[nn.Module] = []
        size = in_features
        for _ in range(self.hidden_layers):
            hidden = self.hidden_features or in_features
            layers.append(nn.Linear(size, hidden, bias=self.norm == "none"))
            if self.norm != "none":
                layers.append(nn.BatchNorm1d(hidden) if self.norm == "batch" else nn.LayerNorm(hidden))
            layers.append(nn.ReLU(inplace=True))
            if self.dropout:
                layers.append(nn.Dropout(self.dropout))
            size = hidden
        self.net = nn.Sequential(*layers, nn.Linear(size, self.out_features))

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = self.net(features)
        return out
