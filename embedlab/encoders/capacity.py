"""What an encoder costs: parameters, multiply-adds, latency, throughput and memory on the device at hand."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from embedlab._machine import processor_name
from embedlab.data.images import available_cores
from embedlab.encoders.encoder import Encoder, autocast


class ExportedFile(Protocol):
    """An encoder in a file that another library runs, such as `embedlab.retrieval.OnnxEmbedder`."""

    path: Path
    image_size: int
    channels: int
    dim: int | None

    def __call__(self, images: Any) -> Any:
        """Images (B, C, image_size, image_size) of uint8 to vectors (B, D)."""
        ...


@dataclass(frozen=True)
class Speed:
    """One batch size on one device.

    Args:
        batch: Images per call.
        milliseconds: Median time of a call.
        images_per_second: Batch over that time.
        peak_mebibytes: Memory that a call takes beside weights and input at its peak; None where the system does not
            tell (neither a GPU nor Linux).
    """

    batch: int
    milliseconds: float
    images_per_second: float
    peak_mebibytes: float | None


@dataclass(frozen=True)
class Layer:
    """One module of the network.

    Args:
        name: Its path in the encoder.
        kind: Its class.
        parameters: Weights of its own and of all inside.
        multiply_adds: Of one image, its own and all inside.
    """

    name: str
    kind: str
    parameters: int
    multiply_adds: int


@dataclass(frozen=True)
class Capacity:
    """What an encoder costs.

    Args:
        parameters: Weights, those of batch normalisation included; its running statistics are not. None for an exported
            file, which does not tell what has been folded into what.
        megabytes: Size of the weights and running statistics in memory, or of the exported file; 10^6 bytes.
        multiply_adds: Of one image with all its test-time views: convolutions, linear layers and matrix products, also
            those of attention; recurrent layers are not counted. None for an exported file.
        dim: Numbers per embedding.
        image_size: Side of the input in pixels.
        device: What it was measured on.
        threads: Of the processor.
        precision: "float32" or "bfloat16".
        speeds: One per batch size.
        layers: Every module, in the order of the network; empty unless asked for.
    """

    parameters: int | None
    megabytes: float
    multiply_adds: int | None
    dim: int
    image_size: int
    device: str
    threads: int
    precision: str
    speeds: tuple[Speed, ...]
    layers: tuple[Layer, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON knows it."""
        return asdict(self)

    def to_text(self) -> str:
        """A table for people."""
        if self.parameters is None or self.multiply_adds is None:
            size = f"a file of {self.megabytes:.1f} MB, images of {self.image_size} px"
        else:
            size = (
                f"{self.parameters:,} parameters ({self.megabytes:.1f} MB), {self.multiply_adds / 1e6:,.1f} million "
                f"multiply-adds per image of {self.image_size} px"
            )
        lines = [
            f"{size}, {self.dim} numbers per embedding",
            f"{self.device}, {self.threads} thread{'' if self.threads == 1 else 's'}, {self.precision}",
            "",
            f"{'batch':>6}{'latency':>14}{'throughput':>18}{'peak memory':>16}",
        ]
        for speed in self.speeds:
            peak = "unknown" if speed.peak_mebibytes is None else f"{speed.peak_mebibytes:,.1f} MiB"
            rate = f"{speed.images_per_second:,.0f} images/s"
            lines.append(f"{speed.batch:>6}{f'{speed.milliseconds:,.2f} ms':>14}{rate:>18}{peak:>16}")
        if self.layers:
            wide = max(len(layer.name) for layer in self.layers)
            lines += ["", f"{'layer':<{wide}}  {'kind':<22}{'parameters':>14}{'multiply-adds':>16}"]
            lines += [
                f"{layer.name:<{wide}}  {layer.kind:<22}{layer.parameters:>14,}{layer.multiply_adds:>16,}"
                for layer in self.layers
            ]
        return "\n".join(lines)


def measure_capacity(
    encoder: Encoder | ExportedFile,
    *,
    batches: Sequence[int] = (1, 64),
    seconds: float = 1.0,
    precision: Literal["float32", "bfloat16"] = "float32",
    device: str | torch.device | None = None,
    layers: bool = False,
) -> Capacity:
    """Count and measure an encoder, from uint8 images to embeddings; decoding files is not part of it.

    Args:
        encoder: Is put into evaluation mode and on the device; or an exported file, which runs on the processor in
            float32.
        batches: Images per call, each at least 1.
        seconds: Time to spend on each of them, after a warm-up; three calls at least.
        precision: "bfloat16" computes under autocast.
        device: None takes a GPU where there is one.
        layers: Also list every module.

    Raises:
        ValueError: No batch, a device that is not there, or what cannot be asked of an exported file.

    Example:
        >>> from embedlab.encoders import ResNet
        >>> found = measure_capacity(Encoder(ResNet("resnet10", stem="small", width=0.125), image_size=8), seconds=0)
        >>> found.parameters, found.multiply_adds
        (77352, 259584)
    """
    if not batches or min(batches) < 1:
        raise ValueError(f"measure_capacity needs batches of at least one image, got {list(batches)}.")
    if not isinstance(encoder, Encoder):
        if layers or precision != "float32" or device not in (None, "cpu"):
            raise ValueError(
                f"{encoder.path} is an exported file: one piece that runs on the processor in float32. For layers, "
                "bfloat16 or another device name the folder of the encoder that was exported."
            )
        return _measure_file(encoder, batches, seconds)
    place = _place(device)
    encoder = encoder.to(place).eval()
    counted = _multiply_adds(encoder, place)
    state = encoder.state_dict().values()
    return Capacity(
        parameters=sum(parameter.numel() for parameter in encoder.parameters()),
        megabytes=sum(tensor.numel() * tensor.element_size() for tensor in state) / 1e6,
        multiply_adds=counted[""],
        dim=encoder.dim,
        image_size=encoder.image_size,
        device=_device_name(place),
        threads=torch.get_num_threads(),
        precision=precision,
        speeds=tuple(_network_speed(encoder, batch, seconds, precision, place) for batch in batches),
        layers=_layers(encoder, counted) if layers else (),
    )


def _measure_file(file: ExportedFile, batches: Sequence[int], seconds: float) -> Capacity:
    speeds = []
    for batch in batches:
        images = _images(file, batch, torch.device("cpu")).numpy()
        speeds.append(_speed(lambda images=images: file(images), batch, seconds, torch.device("cpu")))  # type: ignore[misc]
    assert file.dim is not None, "known since the first call"
    return Capacity(
        parameters=None,
        megabytes=file.path.stat().st_size / 1e6,
        multiply_adds=None,
        dim=file.dim,
        image_size=file.image_size,
        device=processor_name(),
        threads=available_cores(),
        precision="float32",
        speeds=tuple(speeds),
    )


def _place(device: str | torch.device | None) -> torch.device:
    """A device that is there; None is a GPU where there is one."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = torch.accelerator.current_accelerator()
    there = ["cpu", *(f"{kind}:{number}" for number in range(torch.accelerator.device_count()))]
    if str(device) not in {*there, *(name.partition(":")[0] for name in there)}:
        raise ValueError(
            f"There is no device {str(device)!r} here: torch {torch.__version__} sees {' and '.join(there)}. Name one "
            "of these, or leave it out."
        )
    return torch.device(device)


def _images(encoder: Encoder | ExportedFile, batch: int, place: torch.device) -> Tensor:
    shape = (batch, encoder.channels, encoder.image_size, encoder.image_size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(place)


def _multiply_adds(encoder: Encoder, place: torch.device) -> dict[str, int]:
    """Of one image, by module path; "" is the whole."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), _plain_attention(), counter:
        encoder(_images(encoder, 1, place))
    root = type(encoder).__name__
    counts = {name: sum(parts.values()) // 2 for name, parts in counter.get_flop_counts().items()}
    found = {name.removeprefix(f"{root}."): count for name, count in counts.items() if name.startswith(f"{root}.")}
    return found | {"": counter.get_total_flops() // 2}


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention as matrix products, which the counter knows; of the fused kernels it knows only those of GPUs."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _layers(encoder: Encoder, counted: dict[str, int]) -> tuple[Layer, ...]:
    return tuple(
        Layer(name, type(module).__name__, sum(p.numel() for p in module.parameters()), counted.get(name, 0))
        for name, module in encoder.named_modules()
        if name
    )


@torch.inference_mode()
def _network_speed(encoder: Encoder, batch: int, seconds: float, precision: str, place: torch.device) -> Speed:
    images = _images(encoder, batch, place)

    def call() -> None:
        with autocast(place.type, precision):
            encoder(images)
        if place.type != "cpu":
            torch.accelerator.synchronize(place)

    return _speed(call, batch, seconds, place)


def _speed(run: Callable[[], object], batch: int, seconds: float, place: torch.device) -> Speed:
    def call() -> float:
        begun = time.perf_counter()
        run()
        return time.perf_counter() - begun

    call()
    before = _memory(place, start=True)
    taken = [call()]
    after = _memory(place, start=False)
    while len(taken) < 3 or sum(taken) < seconds:
        taken.append(call())
    median = statistics.median(taken)
    peak = None if before is None or after is None else max(0.0, (after - before) / 2**20)
    return Speed(batch, 1000 * median, batch / median, peak)


def _memory(place: torch.device, *, start: bool) -> int | None:
    """Bytes in use now (start), or the most since then."""
    if place.type == "cuda":
        if start:
            torch.cuda.reset_peak_memory_stats(place)
            return int(torch.cuda.memory_allocated(place))
        return int(torch.cuda.max_memory_allocated(place))
    try:
        if start:
            ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator keeps would hide what a call takes
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark begins anew
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except (OSError, AttributeError):  # not Linux, or another C library
        return None
    wanted = "VmRSS:" if start else "VmHWM:"
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(wanted)), None)


def _device_name(place: torch.device) -> str:
    if place.type == "cuda":
        return torch.cuda.get_device_name(place)
    return processor_name()
