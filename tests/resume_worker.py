"""Kill a process while it saves, many times: python resume_worker.py FOLDER KILLS. It forks: imports cost once."""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from embedlab.methods.checkpoints import damage, newest_valid, steps_of, write_checkpoint


def save_for_ever(folder: Path, begin: int, acknowledged: int) -> None:
    """The child: a checkpoint after another; it says each step that is safe."""
    step = begin
    while True:
        step += 1
        path = folder / f"step-{step:08d}.ckpt"
        write_checkpoint({"step": step, "weights": torch.full((200_000,), float(step))}, path)
        os.write(acknowledged, step.to_bytes(8, "little"))
        for old in folder.glob("step-*.ckpt"):
            if steps_of(old) < step - 1:
                old.unlink(missing_ok=True)


def main(folder: Path, kills: int) -> None:
    draw = random.Random(0)
    torch.set_num_threads(1)
    safe, while_saving = 0, 0
    for _ in range(kills):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            save_for_ever(folder, safe, writer)
        os.close(writer)
        safe = int.from_bytes(os.read(reader, 8), "little")  # the child is at work
        time.sleep(draw.random() * 0.03)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while said := os.read(reader, 8):
            safe = int.from_bytes(said, "little")
        os.close(reader)
        left = list(folder.glob(".step-*.part"))
        while_saving += bool(left)
        for path in left:
            path.unlink()
        assert all(damage(path) is None for path in folder.glob("step-*.ckpt")), "a name stands for a whole file"
        newest = newest_valid(folder)
        assert newest is not None
        found = torch.load(newest, weights_only=True)
        assert steps_of(newest) == found["step"] >= safe, "what was saved is lost"
        assert (found["weights"] == found["step"]).all()
        safe = steps_of(newest)
    print(json.dumps({"kills": kills, "while saving": while_saving}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
