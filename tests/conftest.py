"""A test that stands for a cell of the table of supported models must run, not be skipped."""

from __future__ import annotations

import sys
from collections.abc import Generator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "bench"))
import support_table


def is_cell(node_id: str) -> bool:
    """Whether the table names this test, with these parameters or with any."""
    function = node_id.partition("[")[0]
    return node_id in support_table.node_ids() or function in support_table.original_node_ids()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and is_cell(item.nodeid):
        report.outcome = "failed"
        report.longrepr = f"skipped, but docs/models.md says that it ran: {report.longrepr}"
    return report
