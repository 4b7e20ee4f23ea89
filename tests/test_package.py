"What is installed: light to import, complete in its archives."
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from layout import ROOT, requirements

HEAVY = ["torch", "transformers", "datasets", "trl", "peft", "numpy", "matplotlib", "IPython", "pandas", "huggingface_hub"]
REPORT = f"import sys; print('loaded:', *sorted(set({HEAVY}) & set(sys.modules)))"


def loaded(code: str) -> str:
    "The heavy modules that a fresh Python holds after this code."
    done = subprocess.run([sys.executable, "-c", f"{code}\n{REPORT}"], capture_output=True, text=True, timeout=120, cwd=ROOT, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().split("\n")[-1].removeprefix("loaded:").strip()


def test_loaded_sees_what_is_heavy():
    assert loaded("import numpy") == "numpy"


@pytest.mark.parametrize("module", ["ftkit", "ftkit.data", "ftkit.control", "ftkit.cli"])
def test_import_is_light(module):
    assert loaded(f"import {module}") == ""


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]])
def test_help_is_light(arguments):
    assert loaded(f"import sys; sys.argv = ['ftkit', *{arguments}]\nfrom ftkit.cli import main\ntry: main()\nexcept SystemExit as end: assert not end.code") == ""


def test_console_script_answers():
    script = shutil.which("ftkit", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    assert script, "ftkit is not installed: pip install -c constraints.txt -e '.[dev]'"
    done = subprocess.run([script, "--help"], capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
    assert done.returncode == 0 and "Usage" in done.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    "A source archive built from a copy of this folder, and a wheel built from what is in that archive. Nothing is fetched."
    folder = tmp_path_factory.mktemp("build")
    skipped = shutil.ignore_patterns(".git", "*.egg-info", "build", "dist", "_proc", "_docs", "runs", "__pycache__", ".venv")
    shutil.copytree(ROOT, folder / "copy", symlinks=True, ignore=skipped)
    quiet = {"check": True, "capture_output": True, "text": True, "stdin": subprocess.DEVNULL, "timeout": 300}
    subprocess.run([sys.executable, "setup.py", "-q", "sdist", "-d", folder], cwd=folder / "copy", **quiet)
    (source,) = folder.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    options = ["--no-build-isolation", "--no-deps", "--no-index", "-q", "-w", folder]
    subprocess.run([sys.executable, "-m", "pip", "wheel", unpacked, *options], cwd=folder, **quiet)
    (wheel,) = folder.glob("*.whl")
    return source, wheel


def package_files():
    skipped = {"__pycache__", ".ipynb_checkpoints"}
    files = [path for path in (ROOT / "ftkit").rglob("*") if path.is_file() and not skipped & set(path.parts)]
    return {path.relative_to(ROOT).as_posix() for path in files if path.suffix == ".py" or "assets" in path.parts}


def test_there_are_assets():
    assert any(name.startswith("ftkit/assets/") for name in package_files())


def test_source_archive_holds_everything(archives):
    with tarfile.open(archives[0]) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    wanted = {"settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "constraints.txt"}
    assert (package_files() | wanted) - names == set()


def test_wheel_holds_the_package(archives):
    with zipfile.ZipFile(archives[1]) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = [archive.read(name).decode() for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        scripts = "".join(archive.read(name).decode() for name in archive.namelist() if name.endswith("entry_points.txt"))
        licences = [name for name in archive.namelist() if name.endswith("LICENSE")]
    assert names == package_files()
    assert "ftkit = ftkit.cli:main" in scripts and licences
    for extra in ("dev", "qlora", "doctor", "export", "scale"):
        assert f"Provides-Extra: {extra}\n" in metadata
    lines = {line.replace(" ", "").replace("<2,>=", ">=") for line in metadata.split("\n") if line.startswith("Requires-Dist") and "extra" not in line}
    assert lines == {f"Requires-Dist:{line}" for line in requirements(ROOT / "settings.ini", "requirements")}
