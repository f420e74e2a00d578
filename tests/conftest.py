"""A test that stands for a cell of the table of supported models must run, not be skipped.

Processes that share the machine (`pytest -n`) share its cores.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "bench"))
import support_table


def pytest_configure(config: pytest.Config) -> None:
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    if workers > 1:
        import torch

        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


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
