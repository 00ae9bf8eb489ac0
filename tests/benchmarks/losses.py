"""Our losses beside their peers: time and memory of one forward and backward pass.

    pip install 'embedlab[bench]'
    python tests/benchmarks/losses.py --sizes 512 2048 8192 --out runs/benchmark-losses

Memory is measured first: each contestant has a process of its own and one pass; what it grew by is its peak minus what
the process held with inputs and loss built. A contestant that goes over a limit there is reported with a lower bound
and not timed. Then one process per row and size times the others in turn: ours, peer, ours, peer. Before that it
compares values and gradients at B = 256. MB are 2^20 bytes. Linux only: memory and load are read from /proc.

The folder gets results.json, results.md, losses.svg, losses.png and, after each row, a line in partial.jsonl, from
which --resume goes on. The exit status is 1 if a contestant failed or disagrees with ours.
"""

from __future__ import annotations

import argparse
import functools
import gc
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

CLASSES = 10_000  # of the proxy losses
LARGE = 65_536
CHECK_SIZE, CHECK_SHIFTS = 256, (0.0, 1.0)
VALUE_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-3  # relative
SETUP_SECONDS = 120  # for imports and inputs, on top of a limit
GAUGE_SECONDS = 0.5  # shortest timed part: /proc/stat counts in hundredths of a second
QUIET = 0.12  # cores; a row measured beside more than this is marked
SETTINGS = ("dim", "runs", "threads", "busy", "skip_peers", "memory_limit", "time_limit")
Result = dict[str, Any]


# --- the contestants ---


class MissingError(Exception):
    """The loss of a row is not in embedlab.losses."""


@dataclass(frozen=True)
class Contestant:
    """A loss that is ready to be called; `proxies` is (CLASSES, D), or (D, CLASSES) with `columns`."""

    call: Callable[[Tensor, Tensor], Tensor]
    proxies: nn.Parameter | None = None
    columns: bool = False

    def start_from(self, weights: Tensor) -> None:
        """Give all contestants of a row the same proxies."""
        if self.proxies is not None:
            self.proxies.data.copy_(weights.T if self.columns else weights)

    def seconds(self, embeddings: Tensor, labels: Tensor) -> float:
        """One forward and backward pass, gradients emptied before."""
        embeddings.grad = None
        if self.proxies is not None:
            self.proxies.grad = None
        start = time.perf_counter()
        loss: Any = self.call(embeddings, labels)
        loss.backward()
        return time.perf_counter() - start

    def value_and_gradients(self, embeddings: Tensor, labels: Tensor) -> tuple[float, list[Tensor]]:
        """The loss, and its gradients for embeddings and proxies (CLASSES, D)."""
        loss: Any = self.call(embeddings, labels)
        leaves = [embeddings] if self.proxies is None else [embeddings, self.proxies]
        loss.backward()
        found = [leaf.grad for leaf in leaves if leaf.grad is not None]
        for leaf in leaves:
            leaf.grad = None
        return float(loss.detach()), [*found[:1], *(grad.T if self.columns else grad for grad in found[1:])]


Build = Callable[[int], Contestant]  # from the dimension


@dataclass(frozen=True)
class Peer:
    """Somebody else's loss; `package` is what its import needs, `up_to` the largest B worth trying."""

    name: str
    build: Build
    package: str = "torch"
    up_to: int | None = None


@dataclass(frozen=True)
class Row:
    """One line of the table; `labels` is "views" (each twice), "classes" (any of CLASSES) or rows per class."""

    name: str
    title: str
    labels: str | int
    ours: Build
    peers: tuple[Peer, ...]

    def contestants(self, size: int, skip_peers: bool) -> dict[str, Build]:
        """Who takes part at this B, ours first."""
        if size >= LARGE:
            return {"ours": self.ours}
        peers = [] if skip_peers else [peer for peer in self.peers if peer.up_to is None or size <= peer.up_to]
        return {"ours": self.ours, **{peer.name: peer.build for peer in peers}}


def ours(name: str, *, proxies: bool = False, **settings: float | str) -> Build:
    """A class of embedlab.losses."""

    def build(dim: int) -> Contestant:
        kind = getattr(importlib.import_module("embedlab.losses"), name, None)
        if kind is None:
            raise MissingError(f"embedlab.losses has no {name}")
        loss = kind(CLASSES, dim, **settings) if proxies else kind(**settings)
        return Contestant(loss, loss.proxies if proxies else None)

    return build


def pml(name: str, *, miner: str = "", proxies: str = "", up_to: int | None = None, **settings: float) -> Peer:
    """A loss of pytorch-metric-learning; `proxies` is what it calls them, W for those that are columns."""

    def build(dim: int) -> Contestant:
        kind = getattr(importlib.import_module("pytorch_metric_learning.losses"), name)
        loss = kind(CLASSES, dim, **settings) if proxies else kind(**settings)
        if proxies:
            return Contestant(loss, getattr(loss, proxies), columns=proxies == "W")
        mine = getattr(importlib.import_module("pytorch_metric_learning.miners"), miner)() if miner else None
        return Contestant(lambda x, y: loss(x, y, mine(x, y)) if mine else loss(x, y))

    return Peer("pytorch-metric-learning", build, "pytorch_metric_learning", up_to)


def lightly(name: str, **settings: float) -> Peer:
    """A loss of lightly that takes the two views of a batch one beside the other."""

    def build(_dim: int) -> Contestant:
        loss = getattr(importlib.import_module("lightly.loss"), name)(**settings)
        return Contestant(lambda x, _labels: loss(*x.chunk(2)))

    return Peer("lightly", build, "lightly")


def full_matrix(temperature: float) -> Peer:
    """NT-Xent as one writes it by hand: the B x B matrix and autograd."""

    def call(embeddings: Tensor, _labels: Tensor) -> Tensor:
        import torch
        import torch.nn.functional as F

        z = F.normalize(embeddings, dim=1)
        logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)  # (B, B)
        return F.cross_entropy(logits, torch.arange(len(z)).roll(len(z) // 2))

    return Peer("full matrix", lambda _dim: Contestant(call))


# Every setting is written out: the figures stay comparable when somebody changes a default.
ROWS = (
    Row(
        "nt-xent",
        "NT-Xent, two views",
        "views",
        ours("NTXentLoss", temperature=0.1),
        (lightly("NTXentLoss", temperature=0.1), full_matrix(0.1), pml("NTXentLoss", temperature=0.1, up_to=512)),
    ),
    Row("supcon", "SupCon, 4 per class", 4, ours("SupConLoss", temperature=0.1), (pml("SupConLoss", temperature=0.1),)),
    Row(
        "triplet-batch-hard",
        "Triplet, batch-hard, 4 per class",
        4,
        ours("TripletLoss", margin=0.05, mining="batch-hard"),
        (pml("TripletMarginLoss", margin=0.05, miner="BatchHardMiner"),),
    ),
    Row(
        "triplet-all-4",
        "Triplet, all, 4 per class",
        4,
        ours("TripletLoss", margin=0.05, mining="all"),
        (pml("TripletMarginLoss", margin=0.05),),
    ),
    Row(
        "triplet-all-32",
        "Triplet, all, 32 per class",
        32,
        ours("TripletLoss", margin=0.05, mining="all"),
        (pml("TripletMarginLoss", margin=0.05, up_to=2048),),
    ),
    Row(
        "multi-similarity",
        "Multi-Similarity, 4 per class",
        4,
        ours("MultiSimilarityLoss", alpha=2, beta=50, base=0.5),
        (pml("MultiSimilarityLoss", alpha=2, beta=50, base=0.5),),
    ),
    Row(
        "circle",
        "Circle, 4 per class",
        4,
        ours("CircleLoss", margin=0.4, scale=80),
        (pml("CircleLoss", m=0.4, gamma=80),),
    ),
    Row(
        "contrastive",
        "Contrastive, 4 per class",
        4,
        ours("ContrastiveLoss", positive_margin=0, negative_margin=1),
        (pml("ContrastiveLoss", pos_margin=0, neg_margin=1),),
    ),
    Row("dcl", "DCL, two views", "views", ours("DCLLoss", temperature=0.1), (lightly("DCLLoss", temperature=0.1),)),
    Row(
        "arcface",
        "ArcFace, 10k classes",
        "classes",
        ours("ArcFaceLoss", proxies=True, margin_degrees=28.6, scale=64),
        (pml("ArcFaceLoss", proxies="W", margin=28.6, scale=64),),
    ),
    Row(
        "proxy-anchor",
        "Proxy-Anchor, 10k classes",
        "classes",
        ours("ProxyAnchorLoss", proxies=True, margin=0.1, scale=32),
        (pml("ProxyAnchorLoss", proxies="proxies", margin=0.1, alpha=32),),
    ),
)
BY_NAME = {row.name: row for row in ROWS}


# --- what a child process measures ---


def inputs(row: Row, size: int, dim: int, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """Embeddings (B, D) and labels (B,); `shift` moves all embeddings to one side, which makes negatives similar."""
    import torch

    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(size, dim, generator=generator)
    embeddings += shift * torch.randn(dim, generator=generator)
    if row.labels == "views":
        labels = torch.arange(size // 2).repeat(2)
    elif row.labels == "classes":
        labels = torch.randint(CLASSES, (size,), generator=generator)
    else:  # in no order: a loss that sorts by class gets no present
        labels = (torch.arange(size) // int(row.labels))[torch.randperm(size, generator=generator)]
    return embeddings.requires_grad_(), labels


def ready(build: Build, dim: int) -> Contestant:
    """A contestant with the proxies that all of its row have."""
    import torch

    contestant = build(dim)
    contestant.start_from(torch.randn(CLASSES, dim, generator=torch.Generator().manual_seed(1)))
    return contestant


def memory(name: str) -> float:
    """A memory figure of this process in MB, such as VmRSS or VmHWM, its highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def measure_memory(job: Result) -> Result:
    """Growth of one contestant over one pass."""
    import torch

    row = BY_NAME[job["row"]]
    embeddings, labels = inputs(row, job["size"], job["dim"])
    contestant = ready(row.contestants(job["size"], False)[job["contestant"]], job["dim"])
    square = torch.ones(512, 512, requires_grad=True)
    torch.autograd.grad((square @ square).sum(), square)  # starts the threads of both passes
    del square
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # from here VmHWM counts anew
    before = memory("VmRSS")
    print(json.dumps({"before": before}), flush=True)
    seconds = contestant.seconds(embeddings, labels)
    return {"growth": memory("VmHWM") - before, "seconds": [seconds]}


def busy_seconds() -> float:
    """Core-seconds that all processes, the kernel and the host's other guests have used since the machine started."""
    user, nice, system, _idle, _waiting, irq, softirq, stolen = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + stolen) / os.sysconf("SC_CLK_TCK")


@contextmanager
def busy_core() -> Iterator[None]:
    """Another process that takes one core; it ends by itself if this one is killed."""
    code = "import os, sys\nwhile os.getppid() == int(sys.argv[1]):\n    for _ in range(10**6): pass"
    process = subprocess.Popen([sys.executable, "-S", "-c", code, str(os.getpid())])
    try:
        time.sleep(0.5)
        yield
    finally:
        process.kill()
        process.wait()


def agreement(row: Row, builds: dict[str, Build], dim: int) -> dict[str, dict[str, float]]:
    """Relative differences of each peer from ours at B = CHECK_SIZE, the worst of two batches."""
    contestants = {name: ready(build, dim) for name, build in builds.items()}
    gaps: dict[str, dict[str, list[float]]] = {
        name: {"value": [], "gradient": []} for name in contestants if name != "ours"
    }
    for shift in CHECK_SHIFTS:
        found = {
            name: contestant.value_and_gradients(*inputs(row, CHECK_SIZE, dim, shift))
            for name, contestant in contestants.items()
        }
        value, gradients = found["ours"]
        for name, gap in gaps.items():
            their_value, their_gradients = found[name]
            gap["value"].append(abs(value - their_value) / max(abs(their_value), 1e-12))
            gap["gradient"] += [
                float((mine - theirs).norm() / theirs.norm().clamp(min=1e-12))
                for mine, theirs in zip(gradients, their_gradients, strict=True)
            ]
    return {name: {what: worst(numbers) for what, numbers in gap.items()} for name, gap in gaps.items()}


def worst(numbers: Sequence[float]) -> float:
    """The largest; what is no number is larger than any."""
    return max(numbers, key=lambda number: math.inf if math.isnan(number) else number)


def measure_time(job: Result) -> Result:
    """Passes of all contestants in turn, and how busy other processes were meanwhile."""
    import torch

    row, dim = BY_NAME[job["row"]], job["dim"]
    every = row.contestants(job["size"], job["skip_peers"])
    differences = agreement(row, every, dim)
    contestants = {name: ready(every[name], dim) for name in job["contestants"]}
    embeddings, labels = inputs(row, job["size"], dim)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    with busy_core() if job["busy"] else nullcontext():
        for contestant in contestants.values():
            contestant.seconds(embeddings, labels)
        start, busy, own = time.perf_counter(), busy_seconds(), time.process_time()
        while len(seconds["ours"]) < job["runs"] or time.perf_counter() - start < GAUGE_SECONDS:
            for name, contestant in contestants.items():
                gc.collect()
                seconds[name].append(contestant.seconds(embeddings, labels))
        own = time.process_time() - own
        other = (busy_seconds() - busy - own) / (time.perf_counter() - start)
    return {
        "differences": differences,
        "seconds": seconds,
        "other_cores": max(0.0, other),
        "torch_threads": torch.get_num_threads(),
    }


def child(job: Result) -> Result:
    """What the process that was started for this job prints."""
    import torch

    if job["threads"]:
        torch.set_num_threads(job["threads"])
    try:
        return measure_memory(job) if job["kind"] == "memory" else measure_time(job)
    except MissingError as error:
        return {"status": "missing", "detail": str(error)}


# --- starting and watching children ---


def resident(process: int) -> float:
    """MB of memory that a process holds; 0 when it has just ended."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def watch(process: subprocess.Popen[bytes], stdout: IO[bytes], job: Result, limit: float) -> Result:
    """Wait for a child; kill it over a limit and give what it needed until then, or {} when it ended by itself."""
    interval = 0.02 if job["kind"] == "memory" else 0.2  # a child that is timed is left in peace
    start, peak = time.perf_counter(), 0.0
    began = False
    while True:
        try:
            process.wait(interval)
            return {}
        except subprocess.TimeoutExpired:
            peak = max(peak, resident(process.pid))
        if not began and os.fstat(stdout.fileno()).st_size:
            began, start = True, time.perf_counter()
        elapsed = time.perf_counter() - start
        heavy = peak > job["memory_limit"] * 1024
        if heavy or elapsed > (limit if began else limit + SETUP_SECONDS):
            process.kill()
            return {"status": "memory" if heavy else "time", "peak": peak, "seconds": [elapsed]}


def run_child(job: Result, limit: float) -> Result:
    """Run this file for one job and give what it found, as a result with a status."""
    environment = dict(os.environ)
    if job["threads"]:
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(job["threads"]))
    command = [sys.executable, __file__, "--child", json.dumps(job)]
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=environment)
        try:
            stopped = watch(process, stdout, job, limit)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
        stdout.seek(0)
        stderr.seek(0)
        lines = [line for line in stdout.read().decode().splitlines() if line.startswith("{")]
        complaint = stderr.read().decode(errors="replace").strip().splitlines()
    if stopped:
        before = json.loads(lines[0])["before"] if lines else stopped["peak"]
        return {**stopped, "growth": stopped["peak"] - before}
    if process.returncode or not lines:
        reason = complaint[-1] if complaint else "no message"
        return {"status": "error", "detail": f"exit status {process.returncode}: {reason}"}
    return {"status": "ok", **json.loads(lines[-1])}


def measure(row: Row, size: int, settings: Result, step: Callable[[str], None]) -> Result:
    """Memory of every contestant of a row at one B, then time of those that stayed within the limits."""
    job = {**settings, "row": row.name, "size": size}
    found: dict[str, Result] = {}
    result: Result = {"row": row.name, "size": size, "settings": settings, "contestants": found}
    for name in row.contestants(size, settings["skip_peers"]):
        step(name)
        found[name] = run_child({**job, "kind": "memory", "contestant": name}, settings["time_limit"])
        if found["ours"]["status"] in ("missing", "error"):
            return result
    able = [name for name, one in found.items() if one["status"] == "ok"]
    if size >= LARGE or not able:
        return result
    step("time")
    limit = settings["time_limit"] * (len(able) * (settings["runs"] + 1) + 1)
    timed = run_child({**job, "kind": "time", "contestants": able}, limit)
    result["timing"] = {key: timed.get(key) for key in ("status", "detail", "other_cores", "torch_threads")}
    if timed["status"] != "ok":
        return result
    for name in able:
        seconds = timed["seconds"][name]
        found[name] |= {"seconds": seconds, "min": min(seconds), "max": max(seconds)}
    for name, difference in timed["differences"].items():
        found[name] |= {"value_difference": difference["value"], "gradient_difference": difference["gradient"]}
    return result


# --- what is made of the results ---


def disagrees(one: Result) -> bool:
    """Whether a peer's value or gradient is not ours; also when one of them is no number."""
    value, gradient = one.get("value_difference", 0.0), one.get("gradient_difference", 0.0)
    return not (value <= VALUE_TOLERANCE and gradient <= GRADIENT_TOLERANCE)


def figure(number: float) -> str:
    """Three digits, never an exponent."""
    return f"{number:.0f}" if number >= 100 else f"{number:.1f}" if number >= 10 else f"{number:.2f}"


def milliseconds(one: Result) -> float:
    """Median time of a pass."""
    seconds: list[float] = one["seconds"]
    return statistics.median(seconds) * 1000


def cell(one: Result) -> str:
    """Time and memory: lower bounds as >, a single pass as '."""
    if one["status"] in ("missing", "error"):
        return str(one["status"])
    over = ">" if one["status"] in ("time", "memory") else ""
    single = "'" if len(one["seconds"]) == 1 and not over else ""
    return f"{over}{figure(milliseconds(one))}{single} ms / {over}{figure(one['growth'])} MB"


def ratio(ours: float, theirs: float, mine: Result, peer: Result) -> str:
    """How many times what we need the peer needs; nothing where ours is itself a lower bound."""
    if mine["status"] != "ok" or peer["status"] not in ("ok", "time", "memory") or ours <= 0:
        return ""
    if peer["status"] == "ok":
        return figure(theirs / ours) + "x"
    return f">{figure(theirs / ours)}x" if theirs > ours else ""  # "more than half of ours" says nothing


def comment(result: Result, peer: Result) -> str:
    """What a reader must know about a line."""
    timing = result.get("timing") or {}
    mine = result["contestants"]["ours"]
    notes = [one["detail"] for one in (mine, peer, timing) if one.get("detail")]
    notes += [
        f"{who} stopped at its {one['status']} limit"
        for who, one in (("ours", mine), ("peer", peer))
        if one.get("status") in ("time", "memory")
    ]
    if timing.get("status") in ("time", "memory"):
        notes.append(f"timing stopped at its {timing['status']} limit")
    if disagrees(peer):
        notes.append("DISAGREES")
    return "; ".join(notes)


def table_rows(results: Sequence[Result]) -> Iterator[tuple[list[str], bool]]:
    """Cells of each line of the table, and whether the line is red."""
    for result in results:
        mine = result["contestants"]["ours"]
        timing = result.get("timing") or {}
        other = timing.get("other_cores")
        noisy = other is not None and other - result["settings"]["busy"] > QUIET
        load = "" if other is None else f"{other:.2f}" + "~" * noisy
        head = [BY_NAME[result["row"]].title, str(result["size"]), cell(mine)]
        peers = {name: one for name, one in result["contestants"].items() if name != "ours"}
        for name, peer in (peers or {"": {"status": ""}}).items():
            known = "seconds" in peer and "seconds" in mine
            speed = ratio(milliseconds(mine), milliseconds(peer), mine, peer) if known else ""
            space = ratio(mine["growth"], peer["growth"], mine, peer) if known else ""
            gaps = [peer[key] for key in ("value_difference", "gradient_difference") if key in peer]
            red = disagrees(peer) or any(one.get("status") == "error" for one in (mine, peer, timing))
            theirs = cell(peer) if peer["status"] else ""
            difference = " / ".join(f"{gap:.0e}" for gap in gaps)
            yield [*head, name, theirs, speed, space, difference, load, comment(result, peer)], red


HEADER = ["loss", "B", "ours", "peer", "peer's", "speed", "memory", "difference", "other", "note"]


def table(results: Sequence[Result], *, colour: bool = False) -> str:
    """A Markdown table in aligned columns."""
    lines = list(table_rows(results))
    widths = [max(len(cells[column]) for cells in [HEADER, *(line for line, _ in lines)]) for column in range(10)]

    def text(cells: Sequence[str]) -> str:
        return "| " + " | ".join(one.ljust(width) for one, width in zip(cells, widths, strict=True)) + " |"

    body = [f"\033[31m{text(line)}\033[0m" if red and colour else text(line) for line, red in lines]
    return "\n".join([text(HEADER), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *body])


def environment() -> Result:
    """Versions, processor and the command line: what a figure must stand beside."""
    versions = {"embedlab": importlib.import_module("embedlab").__version__}
    for package in ("torch", "pytorch-metric-learning", "lightly"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "absent"
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "versions": versions,
        "python": platform.python_version(),
        "processor": models[0].split(":", 1)[1].strip() if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
    }


def report(results: Sequence[Result], about: Result) -> str:
    """The Markdown page: command, surroundings, table and how to read it."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    timings = [one.get("timing") or {} for one in results]
    threads = sorted({timing["torch_threads"] for timing in timings if timing.get("torch_threads")})
    settings = results[-1]["settings"]
    beside = ", one core kept busy by another process" if settings["busy"] else ""
    return f"""# Losses beside their peers

```
{about["command"]}
```

{about["date"]}; {about["processor"]}, {about["cores"]} cores, threads of torch {threads or "unknown"}; {versions}.
Forward and backward, D = {settings["dim"]}, float32; median of {settings["runs"]} or more passes in turn{beside}.

{table(results)}

MB: 2^20 bytes by which the process grew at its peak, inputs and loss not counted. `>`: stopped at a limit, so a lower
bound. `'`: a single pass. *speed*, *memory*: the peer's figure over ours. *difference*: of value and gradient at
B = {CHECK_SIZE}, relative. *other*: cores that other processes used meanwhile, `~` where that is more than {QUIET}.
"""


COLOURS = {"ours": "#0b3d91", "lightly": "#d95f02", "pytorch-metric-learning": "#1b9e77", "full matrix": "#7f7f7f"}


def plot(results: Sequence[Result], folder: Path) -> None:
    """Time above memory over B for each loss that was measured."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "embedlab"
    results = [result for result in results if any("seconds" in one for one in result["contestants"].values())]
    names = [row.name for row in ROWS if any(result["row"] == row.name for result in results)]
    if not names:
        return
    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    page: Any = Figure(figsize=(3.4 * columns, 3.9 * lines + 0.5), layout="constrained")
    panels = page.subfigures(lines, columns, squeeze=False).ravel()
    handles: dict[str, Any] = {}
    for panel, name in zip(panels, names, strict=False):
        panel.suptitle(BY_NAME[name].title, fontsize=10)
        axes = panel.subplots(2, 1, sharex=True)
        handles |= draw(axes, [result for result in results if result["row"] == name])
    page.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, frameon=False)
    page.savefig(folder / "losses.svg", metadata={"Date": None})
    page.savefig(folder / "losses.png", dpi=120)


def draw(axes: Any, results: Sequence[Result]) -> dict[str, Any]:
    """Lines of one loss into its two panels; gives the legend's handles."""
    handles: dict[str, Any] = {}
    sizes = sorted({result["size"] for result in results})
    for axis, unit in zip(axes, ("ms", "MB"), strict=True):
        heights: list[float] = []
        for who, colour in COLOURS.items():
            found = [(one["size"], one["contestants"].get(who, {})) for one in results]
            measured = [(size, one) for size, one in found if "seconds" in one]
            if not measured:
                continue
            x = [size for size, _ in measured]
            y = [max(milliseconds(one) if unit == "ms" else one["growth"], 0.01) for _, one in measured]
            stopped = [number for number, (_, one) in enumerate(measured) if one["status"] != "ok"]
            (handles[who],) = axis.plot(x, y, "o-", color=colour, markersize=4, linewidth=2 if who == "ours" else 1.3)
            if stopped:
                shape = {"marker": "^", "linestyle": "", "markersize": 9, "markerfacecolor": "white", "color": colour}
                axis.plot([x[number] for number in stopped], [y[number] for number in stopped], **shape)
                (handles["stopped, needs more"],) = axis.plot([], [], **shape | {"color": "black"})
            heights += y
        lowest, highest = math.floor(math.log10(min(heights))), math.ceil(math.log10(max(heights)))
        axis.set(xscale="log", yscale="log", ylabel=unit, ylim=(10**lowest, 10 ** max(highest, lowest + 1)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(which="major", alpha=0.3)
        axis.set_xticks(sizes, labels=[str(size) for size in sizes], fontsize=8)
        axis.minorticks_off()
    axes[1].set_xlabel("B")
    return handles


# --- the command ---


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 2048, 8192], help="B, even, at least 64")
    parser.add_argument(
        "--losses", nargs="+", choices=BY_NAME, default=list(BY_NAME), metavar="NAME", help=", ".join(BY_NAME)
    )
    parser.add_argument("--runs", type=int, default=5, help="timed passes of each contestant, more if they are short")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--threads", type=int, help="of torch; as torch likes where not given")
    parser.add_argument("--busy", action="store_true", help="another process takes one core during the timed part")
    parser.add_argument("--large", action="store_true", help=f"also NT-Xent at B = {LARGE}, ours only, one pass")
    parser.add_argument("--skip-peers", action="store_true", help="ours only")
    parser.add_argument("--memory-limit", type=float, default=14, help="GiB a process may hold")
    parser.add_argument("--time-limit", type=float, default=120, help="seconds one pass may take")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-losses"))
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if any(size < 64 or size % 2 or size >= LARGE for size in args.sizes):
        parser.error(f"--sizes takes even numbers from 64 to below {LARGE} (that one is --large), got {args.sizes}")
    if args.runs < 1:
        parser.error(f"--runs takes at least 1, got {args.runs}")
    if args.large and "nt-xent" not in args.losses:
        parser.error("--large is a size of nt-xent, which --losses leaves out")
    return args


def check_peers(names: Sequence[str]) -> None:
    """Stop before the first measurement if a peer is not installed."""
    wanted = {peer.package for name in names for peer in BY_NAME[name].peers}
    absent = sorted(package for package in wanted if importlib.util.find_spec(package) is None)
    if absent:
        raise SystemExit(
            f"The benchmark compares with {' and '.join(absent)}, not installed here: pip install 'embedlab[bench]'. "
            "--skip-peers measures ours alone."
        )


def fingerprint() -> str:
    """Digest of our losses, so that no table holds figures of two versions of them."""
    package = Path(next(iter(importlib.import_module("embedlab").__path__)))
    digest = hashlib.blake2b(digest_size=8)
    for path in (package / "_ops.py", *sorted((package / "losses").glob("*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def earlier(partial: Path, settings: Result, resume: bool) -> list[Result]:
    """Results that an interrupted run left, without those that failed."""
    if not partial.exists():
        return []
    if not resume:
        raise SystemExit(f"{partial.parent} holds a run: go on with it by --resume, or give another folder by --out.")
    results = []
    for line in partial.read_text().splitlines():
        try:
            results.append(json.loads(line))
        except json.JSONDecodeError:  # cut off by the interruption
            continue
    for result in results:
        if result["settings"] != settings:
            changed = [key for key in settings if result["settings"].get(key) != settings[key]]
            raise SystemExit(
                f"{partial} was measured with other settings ({', '.join(changed)}; code: embedlab.losses itself); "
                "give those, or another --out."
            )
    results = [one for one in results if not failed(one) and one["contestants"]["ours"]["status"] != "missing"]
    whole = partial.with_suffix(".tmp")
    whole.write_text("".join(json.dumps(one) + "\n" for one in results))
    whole.replace(partial)
    return results


def failed(result: Result) -> bool:
    """Whether a contestant or the timing came to grief, or a peer disagrees."""
    contestants = result["contestants"].values()
    broken = any(one.get("status") == "error" for one in (*contestants, result.get("timing") or {}))
    return broken or any(disagrees(one) for one in contestants)


def show_step(bar: Any, title: str, step: str) -> None:
    """Say on the progress bar what is being measured."""
    bar.set_description(f"{title} {step}")


def measure_all(args: argparse.Namespace, settings: Result, results: list[Result]) -> None:
    """Measure what is not in `results` yet and append it there and to the file."""
    from tqdm import tqdm

    jobs = [(BY_NAME[name], size) for name in BY_NAME if name in args.losses for size in sorted(set(args.sizes))]
    if args.large:
        jobs.append((BY_NAME["nt-xent"], LARGE))
    done = {(result["row"], result["size"]) for result in results}
    jobs = [(row, size) for row, size in jobs if (row.name, size) not in done]
    with tqdm(total=len(jobs), unit="row", file=sys.stderr) as bar, (args.out / "partial.jsonl").open("a") as partial:
        for row, size in jobs:
            show = functools.partial(show_step, bar, f"{row.name} {size}")
            results.append(measure(row, size, settings, show))
            partial.write(json.dumps(results[-1]) + "\n")
            partial.flush()
            bar.update()


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the four files, print the table."""
    args = arguments(argv)
    if args.child:
        print(json.dumps(child(args.child)))
        return 0
    if not args.skip_peers:
        check_peers(args.losses)
    settings = {name: getattr(args, name) for name in SETTINGS} | {"code": fingerprint()}
    results = earlier(args.out / "partial.jsonl", settings, args.resume)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        measure_all(args, settings, results)
    except KeyboardInterrupt:
        print(f"\nInterrupted; the same command with --resume goes on ({args.out}).", file=sys.stderr)
        return 130
    order = list(BY_NAME)
    results.sort(key=lambda result: (order.index(result["row"]), result["size"]))
    about = environment()
    (args.out / "results.json").write_text(json.dumps({**about, "results": results}, indent=1) + "\n")
    (args.out / "results.md").write_text(report(results, about))
    plot(results, args.out)
    print(table(results, colour=sys.stdout.isatty()))
    return int(any(failed(result) for result in results))


if __name__ == "__main__":
    sys.exit(main())
