"""The documents say what was measured, and name only what exists."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import prumerge_fast
from prumerge_fast.cli import app
from prumerge_fast.errors import InputError

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_tables_and_pictures_are_those_of_the_result_files():
    command = [sys.executable, ROOT / "bench" / "update_docs.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def documents(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    return importlib.import_module("update_docs")


BLOCK = "<!-- results:{0} -->\nfigures\n<!-- /results:{0} -->\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("<!-- results:curve -->\n99.9 %", "a.md: expected <!-- /results:curve -->, got none"),
        ("99.9 %\n<!-- /results:curve -->", "NAME one of .*, got <!-- /results:curve -->"),
        ("99.9 %", "documents: expected <!-- results:curve --> in one of them, got none"),
        (BLOCK.format("curves"), "NAME one of comparison, .*, got <!-- results:curves -->"),
        ("<!--results:curve -->\n<!-- /results:curve -->", "got <!--results:curve -->"),
        (
            "<!-- results:curve -->\n" + BLOCK.format("kinds"),
            "expected <!-- /results:curve -->, got <!-- results:kinds -->",
        ),
    ],
)
def test_no_table_escapes_for_want_of_a_marker(documents, text, says):
    others = "".join(BLOCK.format(name) for name in documents.TABLES if name != "curve")
    documents.check_markers({"a.md": others, "b.md": BLOCK.format("curve"), "c.md": others})
    with pytest.raises(InputError, match=says):
        documents.check_markers({"b.md": others, "a.md": text})


def test_markers_of_the_documents_are_checked(documents, monkeypatch, tmp_path):
    curve = next(path for path in documents.DOCUMENTS if "results:curve -->" in path.read_text())
    cut = tmp_path / curve.name
    cut.write_text(curve.read_text().replace("<!-- /results:curve -->", ""))
    others = [path for path in documents.DOCUMENTS if path != curve]
    monkeypatch.setattr(documents, "ROOT", Path("/"))
    monkeypatch.setattr(documents, "DOCUMENTS", (*others, cut))
    with pytest.raises(InputError, match=f"{curve.name}: expected <!-- /results:curve -->"):
        documents.main(["--check"])


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"results": 3}', None])
def test_result_files_that_are_broken_or_missing(documents, monkeypatch, tmp_path, content):
    if content is not None:
        for path in documents.RESULTS.glob("*.json"):
            (tmp_path / path.name).write_text(content)
    monkeypatch.setattr(documents, "RESULTS", tmp_path)
    with pytest.raises(InputError, match="expected a result file"):
        documents.main(["--check"])


def test_picture_without_what_draws_it(documents, monkeypatch):
    def draw(_):
        import no_such_module  # noqa: F401

    picture = ROOT / "docs" / "accuracy.png"
    monkeypatch.setattr(documents, "updated", lambda text: text)  # writes no document
    monkeypatch.setattr(documents, "PICTURES", {picture: ("cost.json", draw)})
    with pytest.raises(InputError, match=r"accuracy\.png: expected no_such_module to be installed"):
        documents.main([])


def test_commands_outside_the_tables_leave_committed_results_alone():
    text = (ROOT / "docs" / "end-to-end.md").read_text()
    written = re.sub(r"<!-- results:.*?<!-- /results", "", text, flags=re.DOTALL)
    assert "python bench/end_to_end.py --output runs/" in written
    assert "--output bench/results" not in written


def test_pictures_carry_the_results_that_they_show(documents):
    for picture, (name, _) in documents.PICTURES.items():
        assert documents.shows(picture, documents.RESULTS / name)
        assert not documents.shows(picture, documents.RESULTS / "cost.json")


def test_support_table_names_tests_that_exist(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    table = importlib.import_module("support_table")
    command = ["pytest", "--collect-only", "-q", "-m", "slow or not slow", table.FAMILY_TESTS]
    collected = subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout
    assert set(table.node_ids()) <= set(collected.splitlines())
    # The original package lives in an environment of its own, where alone its tests are collected.
    source = (ROOT / table.ORIGINAL_TESTS).read_text()
    for test in table.ORIGINAL.values():
        assert test.startswith("not ") or f"def {test}(" in source, test


@pytest.mark.parametrize("link", re.findall(r"\]\((?!https?:)([^)]+)\)", README))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()


def test_contributing_names_files_and_tests_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"`((?:prumerge_fast|kernels|tests|docs|bench|\.ci)/[\w./]+)`", text))
    named |= {path.partition("::")[0] for path in re.findall(r"tests/[\w/]+\.py", text)}
    assert named
    assert {path for path in named if not (ROOT / path).exists()} == set()
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    tests = set(re.findall(r"`(test_\w+)`", text))
    assert tests
    assert {test for test in tests if f"def {test}(" not in sources} == set()
    rooms = re.findall(r"^\| `(\w+)/` \|", text, re.MULTILINE)
    folders = {path.parent.name for path in (ROOT / "prumerge_fast").glob("*/__init__.py")}
    assert set(rooms) == folders | {"kernels"}


def test_options_of_the_command_line_exist():
    text = "".join(
        CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
        for command in ("compare", "batch")
    )
    # Without the tables, whose commands are those of the result files.
    written = re.sub(r"<!-- results:.*?<!-- /results", "", README, flags=re.DOTALL)
    named = set(re.findall(r"--[a-z][a-z0-9-]+", written)) - {
        *("--check", "--benchmark-json"),
        "--hf-overrides",  # of vLLM
    }
    known = set(re.findall(r"--[a-z][a-z0-9-]+", text)) | {"--output", "--help"}
    assert named <= known, named - known


def test_option_table_gives_the_defaults():
    defaults = prumerge_fast.PruMergeConfig()
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \|", README, re.MULTILINE)
    assert [name for name, _ in rows] == list(vars(defaults))
    for name, value in rows:
        assert value.strip('"') == str(getattr(defaults, name)), name
