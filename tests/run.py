"""Run every notebook and every test: what `ftkit test` calls.

    python tests/run.py [--only NAME] [--no-pytest]

Each notebook runs in a process of its own, without a kernel, in a copy of nbs/ in a temporary folder,
so what it writes beside itself is gone afterwards. Cells marked `#| slow` are left out; those marked
`#| gpu` run where there is an NVIDIA GPU. The last line is `N passed, M failed`; what was skipped is counted in the line before it.
"""
import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from layout import ROOT, read_notebooks, requirements  # noqa: E402

HOURS = 60 * 60
NOTEBOOK_LIMIT, PYTEST_LIMIT = HOURS, 2 * HOURS


def main(arguments=None) -> int:
    options = parse(arguments)
    folder = Path(options.root).resolve()
    if options.child:
        return run_cells(Path(options.child), folder)
    notebooks = [notebook for notebook in read_notebooks(folder / "nbs") if options.only in notebook.name]
    tests = [] if options.no_pytest else find_tests(folder / "tests", options.only)
    if not notebooks and not tests:
        print(f"No notebook and no test has {options.only!r} in its name.", file=sys.stderr)
        return 2
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for notebook in notebooks:
        counts["passed" if run_notebook(notebook, folder) else "failed"] += 1
    if tests:
        for outcome, number in run_pytest(tests, folder).items():
            counts[outcome] += number
    print(summary(**counts), flush=True)
    return 1 if counts["failed"] else 0


def parse(arguments):
    parser = argparse.ArgumentParser(description="Run every notebook and every test.")
    parser.add_argument("--only", metavar="NAME", default="", help="only notebooks and test files with NAME in their name")
    parser.add_argument("--no-pytest", action="store_true", help="only the notebooks")
    parser.add_argument("--root", default=ROOT, help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def find_tests(folder: Path, name: str) -> list[Path]:
    "The test files, those that drive a browser last."
    found = [path for pattern in ("test_*.py", "faults/test_*.py", "browser/test_*.py") for path in sorted(folder.glob(pattern))]
    return [path for path in found if name in path.relative_to(folder).as_posix()]


def summary(passed: int, failed: int, skipped: int) -> str:
    return (f"{skipped} skipped\n" if skipped else "") + f"{passed} passed, {failed} failed"


def run_notebook(notebook, folder: Path) -> bool:
    "Run one notebook in a process of its own; one line, and its traceback if it failed."
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ftkit-test-", ignore_cleanup_errors=True) as temporary:
        copy = copy_tree(folder, Path(temporary) / "tree") / "nbs" / notebook.name
        (Path(temporary) / "tmp").mkdir()
        environment = os.environ | {"TMPDIR": str(Path(temporary) / "tmp"), "MPLBACKEND": "agg"}
        command = [sys.executable, __file__, "--root", str(folder), "--child", str(copy)]
        code, text = run_process(command, folder, environment, NOTEBOOK_LIMIT)
    if code:
        print(text.rstrip().replace(str(copy), f"nbs/{notebook.name}"))
    print(f"{'FAILED' if code else 'passed'} nbs/{notebook.name} in {time.monotonic() - start:.0f} s", flush=True)
    return code == 0


def copy_tree(folder: Path, target: Path) -> Path:
    "nbs/ copied, everything beside it linked: relative paths lead where they lead in the repository."
    target.mkdir()
    for path in folder.iterdir():
        if path.name != "nbs":
            (target / path.name).symlink_to(path)
    shutil.copytree(folder / "nbs", target / "nbs", symlinks=True, ignore=shutil.ignore_patterns("runs", "_*", ".*"))
    return target


def run_process(command: list, folder: Path, environment: dict, limit: float) -> tuple[int, str]:
    "Exit code and text of a process without input; one that hangs is ended and failed."
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, timeout=limit,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace",
        )
    except subprocess.TimeoutExpired as late:
        return 1, f"{late.stdout or ''}\nended after {limit:.0f} s"
    return done.returncode, done.stdout + (f"\nended by signal {-done.returncode}" if done.returncode < 0 else "")


def run_cells(path: Path, folder: Path) -> int:
    "Run the cells of a notebook in this process."
    from nbdev.test import test_nb
    skip = requirements(folder / "settings.ini", "tst_flags")
    passed, _ = test_nb(path, skip_flags=skip, force_flags=["gpu"] if wants_gpu(path) else [], basepath=folder)
    return 0 if passed else 1


def wants_gpu(path: Path) -> bool:
    "Whether the notebook has cells for a GPU and this machine has one."
    if not re.search(r'"#\s*\|\s*gpu\b', path.read_text(encoding="utf-8")):
        return False
    import torch
    return torch.cuda.is_available()


def run_pytest(tests: list[Path], folder: Path) -> dict[str, int]:
    "Run the tests in a process, its text shown as it comes; count what it reports."
    with tempfile.TemporaryDirectory(prefix="ftkit-test-", ignore_cleanup_errors=True) as temporary:
        report = Path(temporary) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "--durations=5", f"--junitxml={report}", f"--basetemp={temporary}/tmp", *tests]
        try:
            code = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, timeout=PYTEST_LIMIT).returncode
        except subprocess.TimeoutExpired:
            code = 1
        counts, reported = count_report(report), report.exists()
    if not counts["failed"] and (code or not reported):
        print(f"pytest ended with code {code}" + ("" if reported else " and reported nothing"))
        counts["failed"] = 1
    return counts


def count_report(report: Path) -> dict[str, int]:
    "Tests passed, failed and skipped, of pytest's report; none if it wrote no report."
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
        kinds = {child.tag for child in case}
        counts["failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"] += 1
    return counts


if __name__ == "__main__":
    sys.exit(main())
