"""One-shot trials: which of a few pictures, one per class, shows the same as this one? Lake et al. 2015.

The published form of the Omniglot challenge (https://doi.org/10.1126/science.aab3050) is read and written: a folder of
runs, each with one training image per class and some test images of the same classes by another hand.
"""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from embedlab._durable import new_folder
from embedlab.data import Source, open_source
from embedlab.data.images import IMAGE_SUFFIXES, ImageError
from embedlab.metrics import bootstrap_interval, wilson_interval
from embedlab.retrieval.embedders import Embedder

logger = logging.getLogger("embedlab")

_LABELS = "class_labels.txt"
_FORM = "RUN/test/ITEM.png RUN/training/CLASS.png"
_EQUAL = 1e-6  # cosines that differ by less count as one
_DRAWER = re.compile(r".*_(\w+)$")


class RunsError(ValueError):
    """A folder of one-shot runs, or of characters to draw them from, is not what it should be."""


@dataclass(frozen=True)
class OneShotRun:
    """The trials of one run.

    Args:
        name: The run's folder.
        training: C images, one of each class, as paths relative to the folder of all runs.
        test: T images, alike.
        truth: T row numbers of `training`: what each test image shows.
    """

    name: str
    training: list[str]
    test: list[str]
    truth: list[int]


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_runs(folder: str | Path) -> list[OneShotRun]:
    """Read all runs in the published form.

    A run is a subfolder with `class_labels.txt`, each line of which names a test image and the training image of its
    class, `run01/test/item01.png run01/training/class05.png`, relative to `folder`. All images in the run's `training/`
    are candidates in each of its trials, whether or not a line asks for them.

    Args:
        folder: Holds the runs.

    Raises:
        RunsError: No runs, a missing file, a line of another form or with a path that leads elsewhere, a test image
            that comes twice, fewer than two candidates.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RunsError(f"{folder} is no folder; expected one that holds run01, run02, ..., each with {_LABELS}.")
    inside = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    runs = [entry for entry in inside if (entry / _LABELS).is_file()]
    broken = [entry for entry in inside if entry not in runs and re.fullmatch(r"run\d+", entry.name)]
    if broken:
        raise RunsError(f"{broken[0]} has no {_LABELS}: copied in part? Every run needs one, with lines {_FORM}.")
    if not runs:
        raise RunsError(f"{folder} holds no runs, which are subfolders with {_LABELS}.{_elsewhere(folder, inside)}")
    return [_read_run(folder, entry.name) for entry in runs]


def _elsewhere(folder: Path, inside: Sequence[Path]) -> str:
    """Where the runs are instead, if they are near."""
    if (folder / _LABELS).is_file():
        return f" It is a run itself: give the folder above it, {folder.resolve().parent}."
    deeper = [entry for entry in inside if any(entry.glob(f"*/{_LABELS}"))]
    return f" Is it {deeper[0]}?" if deeper else ""


def _read_run(folder: Path, name: str) -> OneShotRun:
    place = folder / name / _LABELS
    try:
        lines = place.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RunsError(f"{place} cannot be read as text ({error}); expected lines {_FORM}.") from error
    training = _images(folder, name, "training")
    if len(training) < 2:
        raise RunsError(
            f"{folder / name / 'training'} holds {len(training)} images; a trial chooses between at least 2, one of "
            "each class."
        )
    row = {path: number for number, path in enumerate(training)}
    there = set(_images(folder, name, "test"))
    answers: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        item, shown = _parse_line(f"{place}, line {number}", name, line)
        if item in answers:
            raise RunsError(f"{place}, line {number}: {item} comes a second time; a test image is one trial.")
        for path, known in ((item, there), (shown, row)):
            if path not in known:
                raise RunsError(f"{place}, line {number}: there is no image {folder / path}. Was the run copied whole?")
        answers[item] = row[shown]
    if not answers:
        raise RunsError(f"{place} names no test image; expected lines {_FORM}.")
    if unnamed := sorted(there - answers.keys()):
        logger.warning(
            "%s names %d of the %d images in test/, not %s: those that it names are the trials. Was it copied whole?",
            place,
            len(answers),
            len(there),
            unnamed[0],
        )
    return OneShotRun(name, training, list(answers), list(answers.values()))


def _images(folder: Path, run: str, role: str) -> list[str]:
    """Images in a role of a run, as class_labels.txt writes them."""
    place = folder / run / role
    if not place.is_dir():
        raise RunsError(f"{folder / run} has no folder {role}/; a run has training/, test/ and {_LABELS}.")
    names = sorted(file.name for file in place.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    return [f"{run}/{role}/{name}" for name in names if not name.startswith(".")]


def _parse_line(where: str, run: str, line: str) -> tuple[str, str]:
    fields = line.split()
    if len(fields) != 2:
        raise RunsError(f"{where}: expected two paths, {_FORM}, got {len(fields)}: {line.strip()[:100]!r}.")
    for field, role in zip(fields, ("test", "training"), strict=True):
        parts = PurePosixPath(field).parts
        if "\\" in field:
            raise RunsError(f"{where}: {field!r} has a backslash; folders are parted by /, as in {_FORM}.")
        if field.startswith("/") or ".." in parts or ":" in parts[0]:
            raise RunsError(f"{where}: {field!r} leads out of the runs; paths are relative to the folder of all runs.")
        if len(parts) != 3 or parts[:2] != (run, role):
            raise RunsError(f"{where}: expected {run}/{role}/NAME.png, got {field!r}; a line is {_FORM}.")
    return str(PurePosixPath(fields[0])), str(PurePosixPath(fields[1]))


# ---- measuring -------------------------------------------------------------------------------------------------------


def evaluate_runs(
    embedder: Embedder, folder: str | Path, runs: Sequence[OneShotRun] | None = None, **options: Any
) -> dict[str, Any]:
    """Answer every trial by the candidate with the highest cosine, and count the errors.

    A trial is decided by its own image and the candidates of its run alone. Candidates whose cosines are less than 1e-6
    from the highest are equal to it, and count in the order of their names: so much an embedding in float32 depends on
    what else is in its batch.

    Args:
        embedder: An `Encoder`, or an exported one; it brings its test-time views along.
        folder: Holds the runs.
        runs: Those to measure; None reads all in the folder.
        options: Of `embedder.embed`, such as batch_size; no image may be skipped.

    Returns:
        `error`, the mean over runs, with its 95 % `interval`: runs resampled; where all runs have one error, such as
        none, Wilson's over trials. `runs`: for each its name, error, trials, ways (candidates) and mistakes.

    Raises:
        RunsError: See `read_runs`.
        ImageError: An image that cannot be read.
        ValueError: An embedding that is not finite.
    """
    started = time.perf_counter()
    found = read_runs(folder) if runs is None else list(runs)
    files = [path for run in found for path in (*run.training, *run.test)]
    try:
        vectors = embedder.embed([str(Path(folder) / path) for path in files], **options).vectors
    except ImageError as error:
        text = f"Cannot read image {error.path}: {error.reason}. Replace it: a run is whole or no run."
        raise ImageError(text, path=error.path, reason=error.reason) from error
    if len(vectors) != len(files):
        raise RunsError(f"{len(files)} images gave {len(vectors)} vectors: a run is whole or no run; on_error=stop.")
    if (broken := np.flatnonzero(~np.isfinite(vectors).all(axis=1))).size:
        raise ValueError(
            f"The embedding of {files[broken[0]]} and of {len(broken) - 1} further images is not finite; has the "
            "encoder's training diverged?"
        )
    vectors = vectors.astype(np.float64)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    rows, start = [], 0
    for run in found:
        middle = start + len(run.training)
        end = middle + len(run.test)
        rows.append(_score_run(run, vectors[start:middle], vectors[middle:end]))
        start = end
    errors = [row["error"] for row in rows]
    wrong, trials = sum(len(row["mistakes"]) for row in rows), sum(row["trials"] for row in rows)
    alike = len(set(errors)) == 1
    return {
        "error": float(np.mean(errors)),
        "interval": wilson_interval(wrong, trials) if alike else bootstrap_interval(errors, range(len(errors))),
        "interval_over": "trials" if alike else "runs",
        "trials": trials,
        "runs": rows,
        "encoder": embedder.fingerprint,
        "seconds": round(time.perf_counter() - started, 2),
    }


def _score_run(run: OneShotRun, training: np.ndarray, test: np.ndarray) -> dict[str, Any]:
    cosines = test @ training.T
    answers = (cosines > cosines.max(axis=1, keepdims=True) - _EQUAL).argmax(axis=1).tolist()
    mistakes = [
        {"test": item, "answer": run.training[answer], "truth": run.training[truth]}
        for item, answer, truth in zip(run.test, answers, run.truth, strict=True)
        if answer != truth
    ]
    return {
        "run": run.name,
        "error": len(mistakes) / len(run.test),
        "trials": len(run.test),
        "ways": len(run.training),
        "mistakes": mistakes,
    }


# ---- drawing one's own -----------------------------------------------------------------------------------------------


def draw_runs(
    source: str | Path | Source, out: str | Path, *, runs: int = 20, ways: int = 20, seed: int = 0
) -> list[str]:
    """Draw runs within alphabets from a folder ALPHABET/CHARACTER/NAME_DRAWER.png and write them in the published form.

    Each run takes `ways` characters of one alphabet, one drawer's drawings of them to train and another's to test.
    Alphabets take turns, in an order drawn with the seed; characters and drawers are drawn anew for each run.

    Args:
        source: Folder that holds the alphabets, or a `Source` with labels such as "Greek/character01". What stands
            after the last "_" of a file's name tells who drew it.
        out: A new folder; it appears whole or not at all.
        runs: How many.
        ways: Characters per run.
        seed: Of all choices.

    Returns:
        The alphabet of each run.

    Raises:
        RunsError: `out` exists, or no alphabet has `ways` characters that two drawers have drawn.
    """
    if runs < 1 or ways < 2:
        raise RunsError(f"draw_runs needs runs >= 1 and ways >= 2, got {runs} and {ways}.")
    out = Path(out)
    if out.exists():
        raise RunsError(f"{out} exists; choose a new folder for the runs, or leave out --draw to use what is there.")
    drawings = _drawings(source)
    alphabets = {name: pages for name, pages in drawings.items() if _pairs(pages, ways)}
    if not alphabets:
        where = "The source" if isinstance(source, Source) else source
        raise RunsError(
            f"{where} has no alphabet with {ways} characters drawn by the same two hands; expected files "
            "ALPHABET/CHARACTER/NAME_DRAWER.png, such as Greek/character01/0394_07.png. Fewer --ways?"
        )
    if small := sorted(drawings.keys() - alphabets.keys()):
        logger.warning(
            "Left out for want of %d characters by the same two hands: %s. Fewer ways would take them in.",
            ways,
            ", ".join(small[:5]) + (f" and {len(small) - 5} more" if len(small) > 5 else ""),
        )
    generator = np.random.default_rng(seed)
    order = generator.permutation(sorted(alphabets)).tolist()
    drawn = [order[number % len(order)] for number in range(runs)]
    out.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(out) as building:
        for number, alphabet in enumerate(drawn, 1):
            _write_run(building, f"run{number:02d}", alphabets[alphabet], ways, generator)
    return drawn


def _drawings(source: str | Path | Source) -> dict[str, dict[str, dict[str, str]]]:
    """Alphabet to drawer to character to file."""
    found: dict[str, dict[str, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    files = source if isinstance(source, Source) else open_source(str(source))
    for path, label in zip(files.names, files.labels or [], strict=False):
        alphabet, _, character = label.rpartition("/")
        drawer = _DRAWER.match(Path(path).stem)
        if alphabet and drawer:
            found[alphabet][drawer[1]][character] = path
    return found


def _pairs(drawers: dict[str, dict[str, str]], ways: int) -> list[tuple[str, str]]:
    """Ordered pairs of drawers who have drawn enough of the same characters."""
    names = sorted(drawers)
    return [(a, b) for a in names for b in names if a != b and len(drawers[a].keys() & drawers[b].keys()) >= ways]


def _write_run(
    folder: Path, name: str, drawers: dict[str, dict[str, str]], ways: int, generator: np.random.Generator
) -> None:
    pairs = _pairs(drawers, ways)
    one, other = pairs[int(generator.integers(len(pairs)))]
    shared = sorted(drawers[one].keys() & drawers[other].keys())
    characters = [shared[number] for number in generator.permutation(len(shared))[:ways]]
    lines = []
    for role in ("training", "test"):
        (folder / name / role).mkdir(parents=True)
    for item, place in enumerate(generator.permutation(ways).tolist(), 1):
        character = characters[place]
        training, test = Path(drawers[one][character]), Path(drawers[other][character])
        shown = f"{name}/training/class{place + 1:02d}{training.suffix.lower()}"
        asked = f"{name}/test/item{item:02d}{test.suffix.lower()}"
        shutil.copyfile(training, folder / shown)
        shutil.copyfile(test, folder / asked)
        lines.append(f"{asked} {shown}\n")
    (folder / name / _LABELS).write_text("".join(lines), encoding="utf-8")
