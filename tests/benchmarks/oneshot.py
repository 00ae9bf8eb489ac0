"""One-shot characters, leave-alphabets-out: train the recipe without some alphabets, then name characters of these.

    python tests/benchmarks/oneshot.py CHARACTERS --hold Greek Latin --seeds 1 --runs 100 --out runs/benchmark-oneshot

CHARACTERS is a folder ALPHABET/CHARACTER/NAME_DRAWER.png. Every piece is done by the ordinary commands and kept under
--out, so that what was broken off goes on. Further options, such as --trainer.max_steps 500, go to `embedlab fit`.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from embedlab.cli import main as embedlab
from embedlab.data import open_source
from embedlab.retrieval.oneshot import draw_runs

RECIPE = Path(__file__).parents[2] / "recipes" / "omniglot_oneshot.yaml"


def command(*arguments: Any) -> dict[str, Any]:
    """What a command of ours prints as JSON."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = embedlab([*map(str, arguments), "--json"])
    if code:
        raise SystemExit(code)
    answer: dict[str, Any] = json.loads(out.getvalue())
    return answer


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("characters", type=Path)
    parser.add_argument("--hold", nargs="+", required=True, metavar="ALPHABET", help="not trained on")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--out", type=Path, required=True)
    options, more = parser.parse_known_args(arguments)
    source = open_source(str(options.characters))
    held = np.array([label.split("/")[0] in options.hold for label in source.labels or []])
    missing = set(options.hold) - {label.split("/")[0] for label in source.labels or []}
    if missing or held.all():
        raise SystemExit(f"{options.characters}: no alphabet {sorted(missing)}, or none left to train on.")
    options.out.mkdir(parents=True, exist_ok=True)
    manifest, runs = options.out / "train.csv", options.out / "runs"
    with manifest.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label"])
        rows = np.flatnonzero(~held).tolist()
        writer.writerows([Path(source.names[row]).resolve(), source.labels[row]] for row in rows)
    if not runs.exists():
        draw_runs(source.subset(held), runs, runs=options.runs)
    found = []
    for seed in range(options.seeds):
        folder = options.out / f"seed{seed}"
        if not (folder / "encoder").exists():
            root = ["--data.init_args.root", manifest, "--data.init_args.seed", seed, "--seed_everything", seed]
            begun = any(folder.glob("checkpoints/*.ckpt"))
            command("fit", "--run", folder, *(["--resume"] if begun else ["-c", RECIPE, *root, *more]))
        found.append(command("oneshot", runs, "--encoder", folder / "encoder", "--precision", "bfloat16"))
    errors = [one["error"] for one in found]
    result = {
        "hold": options.hold,
        "error": float(np.mean(errors)),
        "seeds": errors,
        "intervals": [one["interval"] for one in found],
        "trials": found[0]["trials"],
    }
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
