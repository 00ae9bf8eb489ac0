"""A served gallery beside its bare model: time to the first answer, latency, requests per second.

    python tests/benchmarks/serving.py [--size 128] [--clients 1 8 32] [--seconds 5]

An untrained network (time does not depend on weights) is exported to ONNX and makes a gallery of 1,000 templates. The
same JPEG is then identified in a loop by the bare model (decode, resize, forward, one image at a time, in this
process) and over HTTP by 1, 8 and 32 clients, in turn. Linux only: what the server has loaded is read from /proc.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def make(folder: Path, size: int) -> bytes:
    """A gallery in `folder`/door, and a JPEG to ask about."""
    from embedlab import Gallery
    from embedlab.encoders import Encoder, ResNet
    from embedlab.serving.export import export_encoder

    encoder = Encoder(ResNet("resnet10", width=0.25), image_size=size).untrained()  # (B, 3, S, S) to (B, 128)
    export_encoder(encoder, folder / "model.onnx")
    random = np.random.default_rng(0)
    with Gallery.create(folder / "door", folder / "model.onnx") as gallery:
        labels = [f"person {row % 200}" for row in range(1000)]
        gallery.enroll(embeddings=random.standard_normal((1000, 128)), labels=labels)
        gallery.calibrate(embeddings=random.standard_normal((400, 128)), fpir=0.05)
    file = BytesIO()
    Image.fromarray(random.integers(0, 256, (480, 640, 3), dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()


def bare(folder: Path, content: bytes, seconds: float) -> list[float]:
    """Seconds per image without a server."""
    from embedlab.data.images import image_pixels
    from embedlab.retrieval.embedders import OnnxEmbedder

    embedder, taken = OnnxEmbedder(folder / "model.onnx"), []
    end = time.perf_counter() + seconds
    while (begun := time.perf_counter()) < end:
        embedder(image_pixels(Image.open(BytesIO(content))).transpose(2, 0, 1)[None])
        taken.append(time.perf_counter() - begun)
    return taken


def identify(connection: http.client.HTTPConnection, content: bytes) -> int:
    """Status of one request."""
    connection.request("POST", "/api/identify", content, {"Content-Type": "image/jpeg"})
    answer = connection.getresponse()
    answer.read()
    return answer.status


def start(folder: Path, content: bytes) -> tuple[subprocess.Popen[bytes], int, float, list[str]]:
    """The server, its port, seconds to the first identification, and heavy libraries that it loaded."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begun = time.perf_counter()
    command = [sys.executable, "-m", "embedlab", "serve", str(folder / "door"), "--port", str(port)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while True:
        try:
            identify(http.client.HTTPConnection("127.0.0.1", port, timeout=60), content)
            break
        except OSError:
            if process.poll() is not None:
                raise RuntimeError(f"The server ended with {process.returncode}.") from None
            time.sleep(0.01)
    first = time.perf_counter() - begun
    maps = Path(f"/proc/{process.pid}/maps").read_text()
    return process, port, first, [name for name in ("libtorch", "libfaiss", "onnxruntime") if name in maps]


def served(port: int, content: bytes, clients: int, seconds: float) -> tuple[list[float], int]:
    """Seconds per answer over all clients, and refusals."""
    taken: list[float] = []
    refused = [0]

    def client() -> None:
        connection, end = http.client.HTTPConnection("127.0.0.1", port, timeout=60), time.perf_counter() + seconds
        while (begun := time.perf_counter()) < end:
            if identify(connection, content) == 200:
                taken.append(time.perf_counter() - begun)
            else:
                refused[0] += 1
                connection.close()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return taken, refused[0]


def row(name: str, taken: list[float], seconds: float, refused: int = 0) -> dict[str, Any]:
    """Figures of one run."""
    middle, late = np.quantile(taken, [0.5, 0.99]) * 1e3
    return {
        "run": name,
        "per_second": round(len(taken) / seconds, 1),
        "median_ms": round(float(middle), 2),
        "p99_ms": round(float(late), 2),
        "refused": refused,
    }


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=128, help="side of the network's input in pixels")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=5, help="of each run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        content = make(folder, options.size)
        rows = [row("bare model", bare(folder, content, options.seconds), options.seconds)]
        process, port, first, loaded = start(folder, content)
        try:
            for clients in options.clients:
                taken, refused = served(port, content, clients, options.seconds)
                rows.append(row(f"{clients} clients", taken, options.seconds, refused))
        finally:
            process.terminate()
            process.wait()
        rows.append(row("bare model again", bare(folder, content, options.seconds), options.seconds))
    print(
        json.dumps(
            {"cores": os.cpu_count(), "first_answer_s": round(first, 2), "loaded": loaded, "runs": rows}, indent=1
        )
    )


if __name__ == "__main__":
    main()
