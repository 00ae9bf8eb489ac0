"""docs/losses.md: its Python runs, its recipes are accepted, and its tables name every loss and miner."""

import inspect
import re
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from embedlab import losses
from embedlab.cli import main
from embedlab.losses import miners

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", PAGE, re.S)
YAML = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_on_the_page_runs(code, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(code, "docs/losses.md", "exec"), {"__name__": "page"})


def test_memory_holds_what_the_page_says(capsys) -> None:
    (code,) = (code for code in PYTHON if "CrossBatchMemory" in code)
    exec(compile(code, "docs/losses.md", "exec"), {})
    assert capsys.readouterr().out.split() == re.search(r"print\(.*# ([\d ]+)", code)[1].split()


@pytest.mark.parametrize("block", YAML, ids=range(len(YAML)))
def test_recipes_on_the_page_are_accepted(block, tmp_path, capsys) -> None:
    if "pytorch_metric_learning" in block:
        pytest.importorskip("pytorch_metric_learning")
    piece = yaml.safe_load(block)
    recipe = tmp_path / "piece.yaml"
    recipe.write_text(yaml.safe_dump({"model": piece if "class_path" in piece else {"init_args": piece}}))
    with pytest.raises(SystemExit) as done:
        main(["fit", "-c", str(ROOT / "recipes" / "supcon.yaml"), "-c", str(recipe), "--print_config"])
    assert done.value.code == 0
    assert holds(yaml.safe_load(capsys.readouterr().out)["model"]["init_args"], piece.get("init_args", piece))


def holds(accepted: object, piece: object) -> bool:
    """Whether all keys and values of a piece, at any depth, are those of what was accepted."""
    if isinstance(piece, dict):
        return isinstance(accepted, dict) and all(holds(accepted.get(key), value) for key, value in piece.items())
    return accepted == piece


def exported() -> list[str]:
    found = vars(losses).items()
    return [name for name, kind in found if inspect.isclass(kind) and issubclass(kind, nn.Module)]


@pytest.mark.parametrize("name", exported())
def test_every_loss_and_miner_stands_on_the_page(name) -> None:
    assert f"`{name}`" in PAGE


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(\w+Loss|\w+Miner)\b", PAGE))))
def test_every_name_on_the_page_exists(name) -> None:
    assert hasattr(losses, name) or name in ("ExponentialLoss", "PairLoss")


def test_every_name_of_a_miner_stands_on_the_page() -> None:
    for name, kind in miners._NAMES.items():
        assert f'| `"{name}"` | `{kind.__name__}` |' in PAGE
