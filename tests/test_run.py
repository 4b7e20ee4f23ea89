"The test runner counts right, isolates notebooks, and its exit code tells the outcome; refresh keeps what it does not run."
import json
import subprocess
import sys

import nbformat
import pytest
import refresh
from layout import ROOT
from test_layout import TITLE, code, shown

KERNEL = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}


def write_notebook(path, *cells):
    numbered = [{**cell, "id": f"c{i}"} for i, cell in enumerate(cells)]
    path.write_text(json.dumps({"cells": numbered, "metadata": KERNEL, "nbformat": 4, "nbformat_minor": 5}))


@pytest.fixture
def project(tmp_path):
    "A small project of the same shape, with one notebook and one test that pass."
    (tmp_path / "settings.ini").write_text((ROOT / "settings.ini").read_text())
    for folder in ("nbs", "tests"):
        (tmp_path / folder).mkdir()
    write_notebook(tmp_path / "nbs" / "00_good.ipynb", TITLE, code("import os"), code("assert os.path.basename(os.getcwd()) == 'nbs'"))
    (tmp_path / "tests" / "test_good.py").write_text("def test_one(): pass\ndef test_two(): pass\n")
    return tmp_path


def run(project, *options):
    command = [sys.executable, str(ROOT / "tests" / "run.py"), "--root", str(project), *options]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, cwd=project)
    return done.returncode, done.stdout, done.stdout.rstrip().split("\n")[-1]


def test_all_pass(project):
    code_, text, last = run(project)
    assert (code_, last) == (0, "3 passed, 0 failed"), text
    assert "passed nbs/00_good.ipynb in " in text


def test_failures_are_counted_and_shown(project):
    write_notebook(project / "nbs" / "01_bad.ipynb", TITLE, code("x = 1"), code("raise KeyError('shown in the traceback')"))
    (project / "tests" / "test_bad.py").write_text(
        "import pytest\ndef test_bad(): assert 0\ndef test_skipped(): pytest.skip()\n@pytest.fixture\ndef broken(): 1/0\ndef test_error(broken): pass\n")
    code_, text, last = run(project)
    assert (code_, last) == (1, "3 passed, 3 failed"), text
    assert text.rstrip().split("\n")[-2] == "1 skipped"
    assert "shown in the traceback" in text and "FAILED nbs/01_bad.ipynb in " in text


@pytest.mark.parametrize("source", ["import os\nos._exit(3)", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"])
def test_a_notebook_that_ends_its_process_fails(project, source):
    write_notebook(project / "nbs" / "01_dead.ipynb", TITLE, code(source))
    assert run(project, "--no-pytest")[::2] == (1, "1 passed, 1 failed")


def test_a_test_file_that_cannot_be_read_fails(project):
    (project / "tests" / "test_bad.py").write_text("import nothing_like_this")
    code_, _, last = run(project)
    assert code_ == 1 and last == "1 passed, 1 failed"


def test_pytest_that_dies_fails(project):
    (project / "tests" / "test_bad.py").write_text("import os\ndef test_dead(): os._exit(0)")
    code_, _, last = run(project, "--only", "test_bad")
    assert code_ == 1 and last == "0 passed, 1 failed"


def test_marked_cells_are_left_out(project):
    marked = [code(f"#| {mark}\nraise SystemError") for mark in ("slow", "eval: false")]
    write_notebook(project / "nbs" / "01_slow.ipynb", TITLE, *marked)
    assert run(project, "--no-pytest")[::2] == (0, "2 passed, 0 failed")


def test_gpu_cells_run_where_there_is_a_gpu(project):
    import torch
    write_notebook(project / "nbs" / "01_gpu.ipynb", TITLE, code("#| gpu\nraise SystemError"))
    assert run(project, "--only", "01_gpu")[0] == int(torch.cuda.is_available())


def test_only(project):
    write_notebook(project / "nbs" / "01_bad.ipynb", TITLE, code("1/0"))
    assert run(project, "--only", "00_good")[::2] == (0, "1 passed, 0 failed")
    assert run(project, "--only", "test_good")[::2] == (0, "2 passed, 0 failed")
    assert run(project, "--only", "nothing")[0] == 2


def test_browser_tests_run_too(project):
    (project / "tests" / "browser").mkdir()
    (project / "tests" / "browser" / "page.py").write_text("NAME = 'a page'\n")
    (project / "tests" / "browser" / "test_page.py").write_text("import page\ndef test_page(): assert page.NAME == 'a page'\n")
    assert run(project)[::2] == (0, "4 passed, 0 failed")
    assert run(project, "--only", "browser")[::2] == (0, "1 passed, 0 failed")
    assert run(project, "--only", "test_page")[::2] == (0, "1 passed, 0 failed")


def test_notebooks_leave_nothing(project):
    sources = ["from pathlib import Path\nimport tempfile", "Path('runs').mkdir()\nPath('x').write_text('')",
               "Path(tempfile.gettempdir(), 'x').write_text('')", "assert Path('../settings.ini').exists()"]
    write_notebook(project / "nbs" / "01_writes.ipynb", TITLE, *map(code, sources))
    before = sorted(project.rglob("*"))
    assert run(project, "--no-pytest")[0] == 0
    assert sorted(project.rglob("*")) == before


# ---- refresh

def test_refresh_keeps_marked_outputs_and_stores_no_widgets(project):
    path = project / "nbs" / "01_shows.ipynb"
    widget = "import ipywidgets\nfrom IPython.display import display"
    write_notebook(path, TITLE, code(widget), code("display(ipywidgets.IntSlider())"), code("#| slow\nprint('new')", [shown("kept\n")]),
                   code("print('a')\nprint('b', flush=True)\nprint('c')", [shown("old\n")]))
    refresh.refresh(path)
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert [cell.outputs[0].text for cell in notebook.cells[-2:]] == ["kept\n", "a\nb\nc\n"]
    assert "widgets" not in notebook.metadata and notebook.cells[-1].execution_count is None
    assert notebook.cells[2].outputs == []
    assert sorted(item.name for item in path.parent.iterdir()) == ["00_good.ipynb", "01_shows.ipynb"]
    refresh.refresh(path, slow=True)
    assert nbformat.read(path, as_version=4).cells[-2].outputs[0].text == "new\n"


def test_refresh_that_fails_leaves_the_notebook(project):
    path = project / "nbs" / "01_bad.ipynb"
    write_notebook(path, TITLE, code("print('new')", [shown("old\n")]), code("1/0"))
    before = path.read_bytes()
    with pytest.raises(refresh.CellExecutionError):
        refresh.refresh(path)
    assert path.read_bytes() == before
