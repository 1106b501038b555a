"""The diffs of docs/extending.md apply to the tree as it is, and what they add keeps its laws."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RECIPES = 4


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree with all diffs of the page applied, one after the other."""
    tree = tmp_path_factory.mktemp("extended")
    for folder in ("f2llm_ray", "tests"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tree)
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    diffs = re.findall(r"^```diff\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(diffs) == RECIPES
    git = shutil.which("git")
    assert git is not None
    for diff in diffs:
        subprocess.run([git, "apply", "-"], cwd=tree, input=diff.encode(), check=True)
    return tree


@pytest.mark.parametrize(
    ("of", "selected"),
    [
        ("loss, source and task", ["tests/extended.py"]),
        (
            "family",
            ["tests/model/test_prune.py", "tests/engine/test_families.py", "-k", "mistral or refused_by_name"],
        ),
        ("settings", ["tests/base/test_section.py", "tests/train/test_terms.py", "-k", "section or every_term"]),
    ],
)
def test_what_the_page_adds_keeps_its_laws(extended: Path, of: str, selected: list[str]) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *selected],
        cwd=extended,
        env=os.environ | {"PYTHONPATH": str(extended)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, f"{of}: {ran.stdout}"


def test_what_the_page_adds_is_well_formed(extended: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "f2llm_ray"],
        cwd=extended,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout
