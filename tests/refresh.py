"""Run notebooks in place and keep their new outputs.

    python tests/refresh.py            every notebook, in order
    python tests/refresh.py core lora  those with one of these in their name
    python tests/refresh.py --slow     cells marked `#| slow` or `#| gpu` too

Without --slow, cells with these marks are not run and keep the outputs that they have. Widgets are not
stored, nor their state: what they show without a kernel is. A notebook whose run fails is left as it was.
"""
import argparse
import os
import subprocess
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

sys.path.insert(0, str(Path(__file__).parent))
from layout import NOT_RUN, ROOT, Cell, read_notebooks  # noqa: E402


def is_run(cell: dict, slow: bool) -> bool:
    "Whether a refresh runs this cell."
    read = Cell(cell)
    marked = bool(NOT_RUN & read.directives.keys())
    return read.is_code and read.directives.get("eval") != "false" and (slow or not marked)


def refresh(path: Path, slow: bool = False):
    "Run one notebook, write it with its new outputs, clean it."
    notebook = nbformat.read(path, as_version=4)
    run = nbformat.v4.new_notebook(metadata=notebook.metadata, cells=[cell for cell in notebook.cells if is_run(cell, slow)])
    folder = {"metadata": {"path": str(path.parent)}}
    NotebookClient(run, timeout=None, kernel_name="python3", store_widget_state=False, resources=folder).execute()
    for cell in run.cells:
        cell.outputs = joined(without_widgets(cell.outputs))
    notebook.metadata.pop("widgets", None)
    temporary = path.with_name(f".{path.name}.new")
    nbformat.write(notebook, temporary)
    os.replace(temporary, path)
    subprocess.run([sys.executable, "-c", CLEAN, str(path)], check=True, cwd=path.parent)


CLEAN = "import sys; from nbdev.clean import nbdev_clean; nbdev_clean.__wrapped__(fname=sys.argv[1])"


WIDGET = "application/vnd.jupyter.widget-view+json"


def without_widgets(outputs: list) -> list:
    "A widget lives as long as its kernel: a page beside it is kept, a widget that has none (a progress bar, say) is not."
    kept = [output for output in outputs if WIDGET not in output.get("data", {}) or "text/html" in output.data]
    for output in kept:
        output.get("data", {}).pop(WIDGET, None)
    return kept


def joined(outputs: list) -> list:
    "Neighbouring pieces of one stream as one output: how they were cut is chance, and would show as a change."
    kept = []
    for output in outputs:
        before = kept[-1] if kept else None
        if before and output.output_type == before.output_type == "stream" and output.name == before.name:
            before.text += output.text
        else:
            kept.append(output)
    return kept


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description="Run notebooks in place and keep their new outputs.")
    parser.add_argument("names", nargs="*", help="only notebooks with one of these in their name")
    parser.add_argument("--slow", action="store_true", help="run the cells marked slow or gpu too")
    options = parser.parse_args(arguments)
    chosen = [notebook for notebook in read_notebooks(ROOT / "nbs") if not options.names or any(name in notebook.name for name in options.names)]
    failed = 0
    for notebook in chosen:
        try:
            refresh(notebook.path, options.slow)
            print(f"refreshed nbs/{notebook.name}", flush=True)
        except CellExecutionError as error:
            failed += 1
            print(f"{error}\nfailed, left as it was: nbs/{notebook.name}", flush=True)
    return 1 if failed or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
