"""Build the wheel twice, from two copies in two folders, and compare the bytes: what is published can be made again from its commit.

    python tests/reproducible.py                          # says whether the two are equal
    python tests/reproducible.py --out dist --tag v0.1.0  # for a release: keeps the wheel, and a source archive, if the tag is this version's

Uses the build tools that are installed, those of constraints.txt: another setuptools may write other metadata.
"""
import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = shutil.ignore_patterns(".git", "*.egg-info", "build", "dist", "_proc", "_docs", "runs", "__pycache__", ".venv", ".ipynb_checkpoints")


def epoch() -> str:
    "The time of the commit, which stands for all times in the archive; where there is no repository, one moment of 2026."
    done = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 and done.stdout.strip() else "1767225600"


def build(folder: Path, *kinds: str, seed: int = 0) -> Path:
    "The folder with what was built, from a copy of this one. An archive keeps permissions, so all have those of a usual clone."
    copy = folder / "copy"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=SKIPPED)
    for path in copy.rglob("*"):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or os.access(path, os.X_OK) and not path.suffix == ".py" else 0o644)
            path.touch()  # as a fresh clone has them
    environment = os.environ | {"SOURCE_DATE_EPOCH": epoch(), "PYTHONHASHSEED": str(seed)}
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", *kinds, "--outdir", folder / "out", copy], check=True, capture_output=True, env=environment, umask=0o022)
    return folder / "out"


def build_twice(folder: Path) -> tuple[Path, Path]:
    "Two wheels, from folders, times and orders of hashing that are not the same."
    places = folder / "one", folder / "another" / "place"
    return tuple(next(build(place, "--wheel", seed=seed).glob("*.whl")) for seed, place in enumerate(places))


def main():
    parser = argparse.ArgumentParser(description="Build the wheel twice and compare the bytes.")
    parser.add_argument("--out", type=Path, help="where to keep the wheel and a source archive")
    parser.add_argument("--tag", help="of the release, such as v0.1.0")
    options, settings = parser.parse_args(), ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    if options.tag not in (None, f"v{settings['DEFAULT']['version']}"):
        sys.exit(f"the tag {options.tag} is not that of version {settings['DEFAULT']['version']} in settings.ini")
    with tempfile.TemporaryDirectory(prefix="ftkit-build-") as folder:
        one, another = build_twice(Path(folder))
        sums = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (one, another)]
        print(one.name, *sums, sep="\n  ")
        if sums[0] != sums[1]:
            sys.exit("the two are not equal")
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            for path in (one, *build(Path(folder) / "source", "--sdist").glob("*.tar.gz")): shutil.copy(path, options.out)
    print("built twice, equal")


if __name__ == "__main__":
    main()
