"What the tests in a browser share."
import os
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    "Where screenshots go: the folder named by FTKIT_SCREENSHOTS, or pytest's own."
    chosen = os.environ.get("FTKIT_SCREENSHOTS")
    path = Path(chosen) if chosen else tmp_path_factory.mktemp("screenshots")
    path.mkdir(parents=True, exist_ok=True)
    return path
