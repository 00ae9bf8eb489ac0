"""Our views beside their peers: views per second on one core, SimCLR recipe.

    pip install 'embedlab[bench]' && python tests/benchmarks/views.py --out runs/benchmark-views

The recipe is lightly's SimCLRTransform with cj_strength 0.5, its own advice for small images, for everyone: random
resized crop from 20 % of the area, flip, jitter 0.4 / 0.4 / 0.4 / 0.1 in 80 %, grey in 20 %, Gaussian blur in 50 %,
ImageNet's mean and deviation. Everyone starts from decoded images in memory in the form it likes best: PIL images,
uint8 tensors, or one uint8 batch. One thread; the contestants take turns, and the figure is the median of the turns.
kornia and albumentations take part where they are installed. Not identical work: see "differs" in the table.

The folder gets results.json and results.md. Linux only: the load is read from /proc.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CASES = ((32, 32), (96, 64))  # side of the images, side of the views
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
SCALE = (0.2, 1.0)
QUIET = 0.12  # cores that other processes may take; more is marked
Draw = Callable[[], Any]


def pictures(root: Path | None, count: int, side: int) -> Tensor:
    """(count, 3, side, side) uint8, from a folder of images or smooth noise."""
    if root is not None:
        from embedlab.data import open_source

        source = open_source(root)
        rows = np.linspace(0, len(source) - 1, count).astype(int).tolist()
        images, _, _ = source.read(rows, side, channels=3, how="crop")
        return torch.from_numpy(images)
    noise = torch.rand(count, 3, side // 4, side // 4, generator=torch.Generator().manual_seed(0))
    return (F.interpolate(noise, (side, side), mode="bicubic").clamp(0, 1) * 255).byte()


# --- the contestants: each gives a function that makes two views of every image ---


def ours(images: Tensor, size: int, blur: float) -> Draw:
    from embedlab.data import ImageData, Source, Views

    views = Views(count=2, crop_scale=SCALE, saturation=0.4, blur=blur)
    labels = [str(number) for number in range(len(images))]
    data = ImageData(Source.from_arrays(images.permute(0, 2, 3, 1).numpy(), labels), image_size=size)
    index, turns = torch.arange(len(images)), iter(range(10**9))

    def draw() -> Any:
        return views(images, index, size=size, epoch=next(turns), normalize=data.normalize)

    return draw


def lightly(images: Tensor, size: int, blur: float) -> Draw:
    from lightly.transforms import SimCLRTransform
    from torchvision.transforms.v2.functional import to_pil_image

    transform = SimCLRTransform(input_size=size, cj_strength=0.5, min_scale=SCALE[0], gaussian_blur=blur)
    originals = [to_pil_image(image) for image in images]
    return lambda: _two_batches([transform(image) for image in originals])


def torchvision(images: Tensor, size: int, blur: float) -> Draw:
    from torchvision.transforms import v2

    kernel = 2 * max(1, round(size / 20)) + 1
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=SCALE),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(kernel, (0.1, 2.0))], p=blur),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    return lambda: _two_batches([(transform(image), transform(image)) for image in images])


def kornia(images: Tensor, size: int, blur: float) -> Draw:
    import kornia.augmentation as K

    kernel = 2 * max(1, round(size / 20)) + 1
    transform = K.AugmentationSequential(
        K.RandomResizedCrop((size, size), scale=SCALE),
        K.RandomHorizontalFlip(),
        K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        K.RandomGrayscale(p=0.2),
        K.RandomGaussianBlur((kernel, kernel), (0.1, 2.0), p=blur),
        K.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
    )
    return lambda: [transform(images.float() / 255) for _ in range(2)]


def albumentations(images: Tensor, size: int, blur: float) -> Draw:
    import albumentations as A

    kernel = 2 * max(1, round(size / 20)) + 1
    transform = A.Compose(
        [
            A.RandomResizedCrop((size, size), scale=SCALE),
            A.HorizontalFlip(),
            A.ColorJitter((0.6, 1.4), (0.6, 1.4), (0.6, 1.4), (-0.1, 0.1), p=0.8),
            A.ToGray(p=0.2),
            A.GaussianBlur((kernel, kernel), (0.1, 2.0), p=blur),
            A.Normalize(MEAN, STD),
        ]
    )
    arrays = [image.permute(1, 2, 0).contiguous().numpy() for image in images]

    def draw() -> Any:
        pairs = [[transform(image=array)["image"] for _ in range(2)] for array in arrays]
        return [
            torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).contiguous() for views in zip(*pairs, strict=True)
        ]

    return draw


def _two_batches(pairs: list[Any]) -> list[Tensor]:
    return [torch.stack(views) for views in zip(*pairs, strict=True)]


CONTESTANTS: dict[str, tuple[Callable[[Tensor, int, float], Draw], str, str]] = {
    "embedlab": (ours, "torch", "blur kernel a tenth of the side; parameters keyed by sample"),
    "lightly": (lightly, "lightly", "PIL, colours rounded to uint8; Pillow's box approximation of the blur"),
    "torchvision v2": (torchvision, "torchvision", "uint8 tensor, image by image"),
    "kornia": (kornia, "kornia", "float32 batch; the crop does not antialias"),
    "albumentations": (albumentations, "albumentations", "OpenCV, uint8; the crop does not antialias"),
}


def measure(images: Tensor, size: int, blur: float, turns: int) -> dict[str, Any]:
    """Views per second of everyone, in turn, and how busy other processes were meanwhile."""
    draws = {
        name: build(images, size, blur)
        for name, (build, package, _) in CONTESTANTS.items()
        if importlib.util.find_spec(package) is not None
    }
    seconds: dict[str, list[float]] = {name: [] for name in draws}
    for draw in draws.values():
        draw()
    start, busy, own = time.perf_counter(), busy_seconds(), time.process_time()
    for _ in range(turns):
        for name, draw in draws.items():
            began = time.perf_counter()
            draw()
            seconds[name].append(time.perf_counter() - began)
    elapsed, own = time.perf_counter() - start, time.process_time() - own
    rates = {name: 2 * len(images) / statistics.median(times) for name, times in seconds.items()}
    return {"rates": rates, "seconds": seconds, "other_cores": max(0.0, (busy_seconds() - busy - own) / elapsed)}


def busy_seconds() -> float:
    """Seconds that all cores together have worked since the start of the machine."""
    user, nice, system, _, _, interrupts, soft, *_ = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:])
    return (user + nice + system + interrupts + soft) / os.sysconf("SC_CLK_TCK")


def report(results: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The table in Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [f"Views per second, one thread, {about['machine']}; {versions}. `{about['command']}`", ""]
    heads = [f"{one['side']} -> {one['size']} px" for one in results]
    lines.append("| | " + " | ".join(f"{head} | ours / theirs" for head in heads) + " | differs |")
    lines.append("|" + "---|" * (2 + 2 * len(heads)))
    for name, (_, _, differs) in CONTESTANTS.items():
        if name not in results[0]["rates"]:
            continue
        cells = [f"{one['rates'][name]:,.0f} | {one['rates']['embedlab'] / one['rates'][name]:.1f}" for one in results]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {differs} |")
    loads = ", ".join(f"{one['other_cores']:.2f}{' (not quiet)' * (one['other_cores'] > QUIET)}" for one in results)
    return "\n".join([*lines, "", f"Cores that other processes took meanwhile: {loads}."])


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-views"))
    parser.add_argument("--root", type=Path, help="a folder of images; smooth noise without it")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--blur", type=float, default=0.5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for side, size in CASES:
        found = measure(pictures(args.root, args.images, side), size, args.blur, args.turns)
        results.append({"side": side, "size": size, **found})
    packages = ["torch", "torchvision", "lightly", "pillow", "kornia", "albumentations"]
    about = {
        "command": "python " + " ".join(sys.argv),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {
            name: importlib.metadata.version(name) for name in packages if importlib.util.find_spec(_module(name))
        },
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps({"about": about, "results": results}, indent=1))
    (args.out / "results.md").write_text(report(results, about) + "\n")
    print(report(results, about))


def _module(package: str) -> str:
    return {"pillow": "PIL"}.get(package, package)


if __name__ == "__main__":
    main()
