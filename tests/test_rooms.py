"""Which room may import which: kept as it is, and red where an import runs back up."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("importlinter")

ROOT = Path(__file__).parents[1]
PATCHING, TOWERS = "prumerge_fast/patching/forward.py", "prumerge_fast/towers/clip.py"
# A line that is added, where, and what the contract says of it.
BACK_UP = {
    "reduction is not allowed to import prumerge_fast.towers": (
        "prumerge_fast/reduction/config.py",
        "from prumerge_fast.towers import clip",
    ),
    "towers is not allowed to import prumerge_fast.families": (
        TOWERS,
        "from prumerge_fast.families import base",
    ),
    "families is not allowed to import prumerge_fast.patching": (
        "prumerge_fast/families/llava.py",
        "from prumerge_fast.patching.patch import patch",
    ),
    "patching is not allowed to import prumerge_fast.harness": (
        PATCHING,
        "def f():\n    from prumerge_fast.harness import inputs",  # as deep as it may be
    ),
    "patching is not allowed to import prumerge_fast.demo": (
        PATCHING,
        "import prumerge_fast.demo",
    ),
    "harness is not allowed to import prumerge_fast.cli": (
        "prumerge_fast/harness/models.py",
        "from prumerge_fast.cli import report",
    ),
    "prumerge_fast.evaluation is not allowed to import rich": (
        "prumerge_fast/evaluation/run.py",
        "import rich",
    ),
    "prumerge_fast.reduction is not allowed to import transformers": (
        "prumerge_fast/reduction/config.py",
        "import transformers",
    ),
    "kernels is not allowed to import prumerge_fast": (
        "kernels/merge.py",
        "from prumerge_fast import errors",
    ),
}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("prumerge_fast", "kernels"):
        shutil.copytree(
            ROOT / name,
            tmp_path / name,
            ignore=lambda _, names: {n for n in names if "." in n and not n.endswith(".py")},
        )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def check(folder: Path) -> tuple[int, str]:
    """Exit code, and what it says on lines of any width."""
    code = "from importlinter.cli import lint_imports_command as run; run(['--no-cache'])"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )
    return result.returncode, " ".join((result.stdout + result.stderr).split())


def test_as_it_is(checkout: Path) -> None:
    code, said = check(checkout)
    assert code == 0, said


@pytest.mark.parametrize("message", BACK_UP)
def test_an_import_back_up_is_red(checkout: Path, message: str) -> None:
    name, line = BACK_UP[message]
    path = checkout / name
    path.write_text(f"{path.read_text()}\n\n{line}\n")
    code, said = check(checkout)
    assert code == 1, said
    assert f"{message}" in said
