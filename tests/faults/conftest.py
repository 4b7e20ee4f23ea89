"Where the tests of faults state the rows of the table."
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))  # what the tests of the folder above share

import table  # noqa: E402


@pytest.hookimpl(tryfirst=True, hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    if outcome.get_result().when == "call":
        item.has_passed = outcome.get_result().passed


@pytest.fixture
def table_row(request):
    """State a row: `table_row(group, fault, here, plain, points)`, see `table.Row`. `here` and `plain` are made from what the
    test saw. The row counts only if the test passes, and is written only with FTKIT_FAULT_TABLE=1."""
    rows = []

    def state(group: str, fault: str, here: str, plain: str | None = None, points: int = 1):
        rows.append(table.Row(group, fault, here, plain, points, request.node.nodeid.split("tests/")[-1]))

    yield state
    if rows and getattr(request.node, "has_passed", False) and table.is_wanted():
        table.merge(rows)
