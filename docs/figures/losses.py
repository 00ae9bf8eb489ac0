"""Draws docs/images/losses.png: how hard each loss turns one image, by its cosine to the anchor.

    python docs/figures/losses.py

Every curve is autograd through the library's own loss. One pair moves from cosine -0.99 to 0.99 and all others stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call

from embedlab import losses

MATES = (0.62, 0.48, 0.74)  # an anchor's cosines to its class-mates, half way through a training
STRANGERS = 124  # 31 other classes of 4 images; cosines 0.1 +- 0.2
PULL, PUSH = "#0072B2", "#D55E00"  # Okabe and Ito's blue and vermilion: apart for all kinds of colour vision
Scene = Callable[[nn.Module, Tensor], Tensor]


def standing_cosines() -> Tensor:
    """Cosines of an anchor to its mates, then to its strangers: (127,)."""
    share = (torch.arange(STRANGERS, dtype=torch.float64) + 0.5) / STRANGERS
    strangers = 0.1 + 0.2 * math.sqrt(2) * torch.erfinv(2 * share - 1)  # a normal distribution, evenly drawn
    return torch.cat([torch.tensor(MATES, dtype=torch.float64), strangers])


def around(cosine: Tensor) -> tuple[Tensor, Tensor]:
    """An anchor (1, D) and unit vectors (N, D) at these cosines to it, each leaning out in a direction of its own."""
    count = len(cosine)
    axes = torch.eye(count + 1, dtype=cosine.dtype)
    return axes[:1], cosine[:, None] * axes[:1] + (1 - cosine**2).sqrt()[:, None] * axes[1:]


def labels() -> Tensor:
    return torch.cat([torch.zeros(len(MATES)), torch.ones(STRANGERS)]).long()


def anchor_and_images(loss: nn.Module, cosine: Tensor) -> Tensor:
    anchor, images = around(cosine)
    value: Tensor = loss(anchor, torch.tensor([0]), reference=images, reference_labels=labels())
    return value


def image_and_proxies(loss: nn.Module, cosine: Tensor) -> Tensor:
    """The anchor is an image; its class's proxy moves, or another's."""
    image, proxies = around(cosine)
    value: Tensor = functional_call(loss, {"proxies": proxies}, (image, torch.tensor([0])))
    return value


def proxy_and_images(loss: nn.Module, cosine: Tensor) -> Tensor:
    """The anchor is the proxy of class 0; an image of this class moves, or another."""
    proxy, images = around(cosine)
    nowhere = torch.zeros_like(proxy)  # the other class's proxy: its terms do not depend on the cosines
    return functional_call(loss, {"proxies": torch.cat([proxy, nowhere])}, (images, labels()))


def turning(loss: nn.Module, scene: Scene, moved: int, cosine: float, standing: Tensor) -> float:
    """Length of the gradient at the moved unit vector; positive where a step down the gradient raises its cosine."""
    cosines = standing.clone()
    cosines[moved] = cosine
    cosines.requires_grad_()
    (slope,) = torch.autograd.grad(scene(loss.double(), cosines), cosines)
    return -slope[moved].item() * math.sqrt(1 - cosine**2)


def panels() -> list[tuple[str, str, nn.Module, Scene, Tensor]]:
    """Family, title, loss, scene and the cosines that stand still."""
    images = standing_cosines()
    proxies = torch.cat([images[:1], images[len(MATES) :]])  # one proxy of the own class, 124 of others
    classes, dim = len(proxies), len(proxies) + 1
    pairs = [
        ("softmax over pairs", "SupCon", losses.SupConLoss()),
        ("softmax over pairs", "NT-Xent", losses.NTXentLoss()),
        ("hinge", "Contrastive", losses.ContrastiveLoss()),
        ("hinge", "Triplet, margin 0.2", losses.TripletLoss(margin=0.2)),
        ("smooth pair weights", "Multi-Similarity", losses.MultiSimilarityLoss()),
        ("smooth pair weights", "Circle", losses.CircleLoss()),
        ("focal", "Focal contrastive, gamma 0", losses.FocalContrastiveLoss(gamma=0)),
        ("focal", "Focal contrastive, gamma 2", losses.FocalContrastiveLoss(gamma=2)),
        ("ranking", "Smooth-AP", losses.SmoothAPLoss()),
        ("ranking", "FastAP", losses.FastAPLoss()),
    ]
    return [
        *((family, title, loss, anchor_and_images, images) for family, title, loss in pairs),
        ("proxies", "ArcFace", losses.ArcFaceLoss(classes, dim), image_and_proxies, proxies),
        ("proxies", "Proxy-Anchor", losses.ProxyAnchorLoss(2, len(images) + 1), proxy_and_images, images),
    ]


def draw(axes: Axes, title: str, loss: nn.Module, scene: Scene, standing: Tensor) -> None:
    place = torch.linspace(-0.99, 0.99, 199, dtype=torch.float64).tolist()
    pull = [turning(loss, scene, 0, x, standing) for x in place]
    push = [-turning(loss, scene, len(standing) - STRANGERS // 2, x, standing) for x in place]
    for curve, colour, style in ((pull, PULL, "-"), (push, PUSH, (0, (3, 1)))):
        largest = max(map(abs, curve))
        axes.plot(place, [x / largest for x in curve], color=colour, linewidth=2, linestyle=style)
    axes.set_title(title, fontsize=9, pad=4)
    axes.set(xlim=(-1, 1), ylim=(-0.62, 1.08), xticks=[-1, -0.5, 0, 0.5, 1], yticks=[-0.5, 0, 0.5, 1])
    axes.set_xticklabels(["-1", "", "0", "", "1"])
    axes.set_yticklabels(["", "0", "", "1"])
    axes.tick_params(labelsize=8.5, length=2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.axhline(0, color="#555555", linewidth=0.8, zorder=1)


def main() -> None:
    figure, grid = plt.subplots(3, 4, figsize=(8, 6.6), sharex=True, sharey=True)
    figure.subplots_adjust(left=0.075, right=0.985, top=0.9, bottom=0.085, hspace=0.5, wspace=0.12)
    for number, (axes, (family, *panel)) in enumerate(zip(grid.flat, panels(), strict=True)):
        draw(axes, *panel)
        if number % 2 == 0:
            axes.annotate(family, (0, 1.21), xycoords="axes fraction", fontsize=10, weight="bold")
    first = grid[0, 0]
    first.text(-0.9, 0.28, "pull on\na positive", color=PULL, fontsize=8.5, va="center")
    first.text(-0.9, -0.3, "push on\na negative", color=PUSH, fontsize=8.5, va="center")
    figure.supxlabel("cosine of the pair that moves", fontsize=10)
    figure.supylabel("how hard it is turned; each curve's largest is 1", fontsize=10)
    drawn = BytesIO()
    figure.savefig(drawn, dpi=160)
    target = Path(__file__).parents[1] / "images" / "losses.png"
    Image.open(drawn).convert("RGB").quantize(64).save(target, optimize=True)  # lines need no more colours


if __name__ == "__main__":
    main()
