"""What is installed: one top-level package, with the kernels and the demo weights inside."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import prumerge_fast

ROOT = Path(__file__).parents[1]
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "kernels", "prumerge_fast")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy: building leaves files beside the sources
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            source.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*command, "--wheel-dir", folder, source], check=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_only_one_top_level_package(wheel):
    (top_level,) = [name for name in wheel.namelist() if name.endswith("top_level.txt")]
    assert wheel.read(top_level).decode().split() == ["prumerge_fast"]
    roots = {name.split("/")[0] for name in wheel.namelist()}
    assert {root for root in roots if not root.endswith(".dist-info")} == {"prumerge_fast"}


@pytest.mark.parametrize(
    "name",
    [
        *("kernels/__init__.py", "py.typed", "cli/page.html.jinja", "cli/page.css"),
        *("demo/tiny-llava/config.json", "demo/tiny-llava/README.md"),
    ],
)
def test_wheel_holds(wheel, name):
    assert f"prumerge_fast/{name}" in wheel.namelist()


def test_demo_weights_are_whole_and_small(wheel):
    inside = [
        i for i in wheel.infolist() if i.filename.startswith("prumerge_fast/demo/tiny-llava/")
    ]
    (weights,) = [i for i in inside if i.filename.endswith(".safetensors")]
    on_disk = ROOT / "prumerge_fast" / "demo" / "tiny-llava" / "model.safetensors"
    assert weights.file_size == on_disk.stat().st_size
    assert sum(i.file_size for i in inside) <= 10 * 2**20


@pytest.mark.parametrize("heavy", ["torch", "transformers", "triton", "prumerge_fast.demo"])
def test_import_is_light(heavy):
    code = f"import sys, prumerge_fast; sys.exit({heavy!r} in sys.modules)"
    # Not from the checkout, whose `kernels` folder would pass for the Hugging Face package.
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent).returncode == 0


def test_every_export_can_be_imported():
    assert sorted(prumerge_fast._MODULES) == prumerge_fast.__all__
    for name in prumerge_fast.__all__:
        assert getattr(prumerge_fast, name).__name__ == name
    assert set(prumerge_fast.__all__) <= set(dir(prumerge_fast))
    with pytest.raises(AttributeError, match="no attribute 'pacth'"):
        prumerge_fast.pacth  # noqa: B018
