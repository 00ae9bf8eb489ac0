"""A million classes: time and memory of training steps of ArcFace with sampled class proxies.

    python tests/benchmarks/classes.py [--classes 1000000] [--batch 256] [--dim 128] [--steps 3]

Each share of the classes runs in a process of its own: loss, SGD with momentum, some steps. Memory is the process's
peak less what it held after torch was imported, so that proxies, their gradient and momentum are in it. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

SHARES = (1.0, 0.1)


def held(name: str) -> float:
    """A line of /proc/self/status in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def child(classes: int, batch: int, dim: int, steps: int, share: float) -> dict[str, float]:
    import torch

    from embedlab.losses import ArcFaceLoss

    before = held("VmRSS")
    torch.manual_seed(0)
    loss = ArcFaceLoss(classes, dim, sample=share)
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1, momentum=0.9)
    seconds = []
    for _ in range(steps):
        embeddings, labels = torch.randn(batch, dim, requires_grad=True), torch.randint(0, classes, (batch,))
        start = time.perf_counter()
        optimizer.zero_grad()
        value = loss(embeddings, labels)
        value.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    return {
        "share": share,
        "loss": value.item(),
        "seconds": sorted(seconds)[steps // 2],
        "proxies_mb": loss.proxies.numel() * 4 / 2**20,
        "peak_mb": held("VmHWM") - before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"classes": 1_000_000, "batch": 256, "dim": 128, "steps": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--share", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.share is not None:
        print(json.dumps(child(args.classes, args.batch, args.dim, args.steps, args.share)))
        return
    print("| share of classes per step | s per step | peak MB | of that proxies MB |\n|---|---|---|---|")
    for share in SHARES:
        found = json.loads(subprocess.check_output([sys.executable, *sys.argv, f"--share={share}"]))
        print(
            f"| {share:g} | {found['seconds']:.2f} | {found['peak_mb']:.0f} | {found['proxies_mb']:.0f} |", flush=True
        )


if __name__ == "__main__":
    main()
