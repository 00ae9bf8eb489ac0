"""Draws docs/images/evaluation-*.png: the report of a small encoder on printed characters, as a browser shows it.

    python docs/figures/evaluation.py WORK

Characters of the DejaVu fonts are drawn into WORK, half of them train an encoder for 300 steps, and the other half are
evaluated with `--report`. The pictures are taken by `tests/test_evaluation.py`, which needs playwright and chromium.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

from embedlab.data import render_glyphs

ROOT = Path(__file__).parents[2]


def draw(work: Path) -> Path:
    """Images and a manifest: label is the character, coarse its script; every second character is for training."""
    glyphs = render_glyphs(limit=160)
    names = list(dict.fromkeys(glyphs.labels))
    (work / "images").mkdir(parents=True, exist_ok=True)
    with (work / "characters.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "label", "coarse", "split"])
        for row, (label, script) in enumerate(zip(glyphs.labels, glyphs.scripts, strict=True)):
            Image.fromarray(glyphs.images[row]).save(work / "images" / f"{row}.png")
            split = ("train", "test")[names.index(label) % 2]
            table.writerow([f"images/{row}.png", chr(int(label.split()[0][2:], 16)), script, split])
    return work / "characters.csv"


def main() -> None:
    """Draw, train, evaluate, take pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    work = parser.parse_args().work
    manifest = draw(work)
    embedlab = [sys.executable, "-m", "embedlab"]
    network = "--model.init_args.backbone.init_args"
    data = "--data.init_args"
    fit = [
        *[*embedlab, "fit", "-c", ROOT / "recipes" / "supcon.yaml", "--run", work / "run"],
        *[f"{network}.stem=small", f"{network}.width=0.25", f"{data}.root={manifest}", f"{data}.split=column"],
        *[f"{data}.image_size=32", f"{data}.decode_size=32", f"{data}.batch_size=64", f"{data}.views.flip=0"],
        *["--trainer.max_steps=300", "--trainer.max_epochs=-1", "--trainer.precision=32"],
    ]
    report = work / "report.html"
    evaluate = [
        *[*embedlab, "evaluate", manifest, "--encoder", work / "run" / "encoder", "--select", "split=test"],
        *["--coarse", "coarse", "--baselines", "--report", report],
    ]
    for command in (fit, evaluate):
        subprocess.run([str(part) for part in command], check=True)
    pictures = {"EMBEDLAB_SCREENSHOTS": str(ROOT / "docs" / "images"), "EMBEDLAB_REPORT": str(report)}
    subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "-q", "tests/test_evaluation.py", "-k", "pictures_of_the_docs"],
        cwd=ROOT,
        env=os.environ | pictures,
        check=True,
    )


if __name__ == "__main__":
    main()
