"""The README's two commands and its Python run as they stand; docs name only files and commands that exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from embedlab.cli import _parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def block(marker: str) -> list[str]:
    found = re.search(rf"<!-- {marker} -->\n```\n(.*?)\n```", README, re.S)
    assert found, f"README has no block after <!-- {marker} -->"
    return found[1].splitlines()


@pytest.mark.parametrize(
    ("marker", "steps"),
    [
        ("run", ["python3 -m venv .venv", ".venv/bin/pip install .", ".venv/bin/embedlab quickstart"]),
        ("tests", ["python3 -m venv .venv", ".venv/bin/pip install -e '.[dev]'", ".venv/bin/python -m pytest"]),
    ],
)
def test_the_two_commands_are_one_line_each_and_parse(marker, steps) -> None:
    lines = block(marker)
    assert len(lines) == 1
    assert lines[0].split(" && ") == steps
    subprocess.run(["bash", "-n", "-c", lines[0]], check=True)


def test_ci_runs_the_second_command_verbatim() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    line = next(line for line in script.splitlines() if line.startswith("command="))
    found = subprocess.run(
        ["bash", "-c", f'{line}; echo "$command"'], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.splitlines() == block("tests")


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.S))
def test_python_in_the_readme_runs(code, tmp_path) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == re.search(r"# (None False Ada)", code)[1].split()


@pytest.mark.parametrize(
    "path", [path for path in DOCS if path.name not in ("CHANGELOG.md",)], ids=lambda path: path.name
)
def test_commands_in_the_docs_parse(path) -> None:
    for fence in re.findall(r"```(?:bash|sh|console)?\n(.*?)```", path.read_text(encoding="utf-8"), re.S):
        for line in fence.replace("\\\n", " ").splitlines():
            command = re.sub(r"\s+#.*", "", line.strip().removeprefix("$ "))
            words = shlex.split(command) if command.startswith("embedlab ") else []
            if not words or words[1] == "fit":
                recipes = re.findall(r"recipes/[\w-]+\.yaml", command)
                assert all((ROOT / recipe).is_file() for recipe in recipes), command
                continue
            if "VERB" not in words:
                _parser().parse_args(words[1:])


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_links_in_the_docs_lead_somewhere(path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name} links to {target}"
