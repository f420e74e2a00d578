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

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_tables_and_pictures_are_those_of_the_result_files():
    command = [sys.executable, ROOT / "bench" / "update_docs.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_pictures_carry_the_results_that_they_show(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    documents = importlib.import_module("update_docs")
    for picture, (name, _) in documents.PICTURES.items():
        assert documents.shows(picture, documents.RESULTS / name)
        assert not documents.shows(picture, documents.RESULTS / "cost.json")


def test_support_table_names_tests_that_exist(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    table = importlib.import_module("support_table")
    command = ["pytest", "--collect-only", "-q", table.FAMILY_TESTS]
    collected = subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout
    assert set(table.node_ids()) <= set(collected.splitlines())
    # The original package lives in an environment of its own, where alone its tests are collected.
    source = (ROOT / table.ORIGINAL_TESTS).read_text()
    for test in table.ORIGINAL.values():
        assert test.startswith("not ") or f"def {test}(" in source, test


@pytest.mark.parametrize("link", re.findall(r"\]\((?!https?:)([^)]+)\)", README))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()


def test_options_of_the_command_line_exist():
    text = CliRunner().invoke(app, ["compare", "--help"], env={"COLUMNS": "200"}).output
    # Without the tables, whose commands are those of the result files.
    written = re.sub(r"<!-- results:.*?<!-- /results", "", README, flags=re.DOTALL)
    named = set(re.findall(r"--[a-z][a-z0-9-]+", written)) - {"--check", "--benchmark-json"}
    known = set(re.findall(r"--[a-z][a-z0-9-]+", text)) | {"--output", "--help"}
    assert named <= known, named - known


def test_option_table_gives_the_defaults():
    defaults = prumerge_fast.PruMergeConfig()
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \|", README, re.MULTILINE)
    assert [name for name, _ in rows] == list(vars(defaults))
    for name, value in rows:
        assert value.strip('"') == str(getattr(defaults, name)), name
