"""One-shot characters, leave-alphabets-out: train the recipe without some alphabets, then name characters of these.

    python tests/benchmarks/oneshot.py CHARACTERS --hold Greek Latin --seeds 1 --runs 100 --out runs/benchmark-oneshot

CHARACTERS is a folder ALPHABET/CHARACTER/NAME_DRAWER.png. Every piece is done by the ordinary commands and kept under
--out, so that what was broken off goes on; what was trained without other alphabets is refused there. Further options,
such as --trainer.max_steps 500, go to `embedlab fit`.
"""

from __future__ import annotations

import argparse
import csv
import json
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np

from embedlab.data import Source, open_source
from embedlab.encoders import Encoder
from embedlab.retrieval.oneshot import _drawings, draw_runs
from recipes import RECIPES, command, piece


def fine_error(encoder: Encoder, source: Source, *, times: int, ways: int) -> dict[str, float]:
    """Error in every alphabet over all ordered pairs of drawers, with so many draws of characters for each.

    One draws what is to be named, the other the candidates. Every drawing is embedded once, so that many more trials
    than in runs cost next to nothing; they are far from independent of each other.
    """
    found, random = {}, np.random.default_rng(0)
    for alphabet, drawers in _drawings(source).items():
        characters = sorted(set.intersection(*(set(page) for page in drawers.values())))
        files = [page[character] for page in drawers.values() for character in characters]
        vectors = encoder.embed(files, precision="bfloat16").vectors.astype(np.float64)
        vectors = vectors.reshape(len(drawers), len(characters), -1)
        wrong = []
        for one, other in permutations(range(len(drawers)), 2):
            cosines = vectors[one] @ vectors[other].T
            for _ in range(times):
                rows = random.permutation(len(characters))[:ways]
                wrong.append((cosines[np.ix_(rows, rows)].argmax(axis=1) != np.arange(len(rows))).mean())
        found[alphabet] = float(np.mean(wrong))
    return found


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("characters", type=Path)
    parser.add_argument("--hold", nargs="+", required=True, metavar="ALPHABET", help="not trained on")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--ways", type=int, default=20, help="characters of a run")
    parser.add_argument("--fine", type=int, default=0, metavar="TIMES", help="also all pairs of drawers, so many times")
    parser.add_argument("--out", type=Path, required=True)
    options, more = parser.parse_known_args(arguments)
    source = open_source(str(options.characters))
    held = np.array([label.split("/")[0] in options.hold for label in source.labels or []])
    missing = set(options.hold) - {label.split("/")[0] for label in source.labels or []}
    if missing or held.all():
        raise SystemExit(f"{options.characters}: no alphabet {sorted(missing)}, or none left to train on.")
    options.out.mkdir(parents=True, exist_ok=True)
    manifest = options.out / "train.csv"
    with manifest.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label"])
        rows = np.flatnonzero(~held).tolist()
        writer.writerows([Path(source.names[row]).resolve(), source.labels[row]] for row in rows)
    runs = options.out / f"{'-'.join(sorted(options.hold))}-{options.runs}x{options.ways}"
    if not runs.exists():
        draw_runs(source.subset(held), runs, runs=options.runs, ways=options.ways)
    recipe, found, fine = RECIPES / "omniglot_oneshot.yaml", [], []
    for seed in range(options.seeds):
        folder = options.out / f"seed{seed}"
        own = [f"--data.init_args.root={manifest}", f"--data.init_args.seed={seed}", f"--seed_everything={seed}"]
        piece(folder, "fit", "-c", recipe, *own, *more, reads=[recipe, manifest])
        found.append(command("oneshot", runs, "--encoder", folder / "encoder", "--precision", "bfloat16"))
        if options.fine:
            encoder = Encoder.load(folder / "encoder")
            fine.append(fine_error(encoder, source.subset(held), times=options.fine, ways=options.ways))
    errors = [one["error"] for one in found]
    result = {
        "hold": options.hold,
        "error": float(np.mean(errors)),
        "seeds": errors,
        "intervals": [one["interval"] for one in found],
        "trials": found[0]["trials"],
    } | ({"fine": fine} if fine else {})
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
