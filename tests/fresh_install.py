"""Install the built wheel as a stranger does, into an empty environment, with the lowest or the newest dependencies that it allows; then use it.

    python tests/fresh_install.py lowest
    python tests/fresh_install.py newest --constraint "torch==2.13.0"

Needs `uv` on the PATH (`pip install uv`) and a package index; takes minutes and some gigabytes, so it is run by the scheduled workflow
and by hand, not with the other tests. What it prints last says which versions were tried. The environment is thrown away.
"""
import argparse
import email
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESOLUTION = {"lowest": "lowest-direct", "newest": "highest"}  # of what the wheel names itself; what these bring along is the newest that fits
SMOKE = '''
import importlib, importlib.metadata, pkgutil, tempfile, torch, ftkit
for module in pkgutil.iter_modules(ftkit.__path__): importlib.import_module(f"ftkit.{module.name}")
from ftkit.export import export
from ftkit.inference import load_tuned
from ftkit.lora import add_lora
from ftkit.models import generate, load_model, tiny_model
from ftkit.train import Run
with tempfile.TemporaryDirectory() as folder:
    model, tokenizer = tiny_model()
    model.save_pretrained(f"{folder}/base"), tokenizer.save_pretrained(f"{folder}/base")
    model, tokenizer = load_model(f"{folder}/base", dtype=torch.float32, device="cpu")
    records = [dict(instruction="Say it.", input=word, output=word.upper()) for word in "one two three four".split()]
    run = Run(add_lora(model, targets="all-linear"), tokenizer, records, records[:1], root=folder, quiet=True, max_steps=4, save_steps=2, learning_rate=3e-2, allow="held_out_in_training")
    run.fit(), run.save()
    Run.open(run.folder, max_steps=5, quiet=True).fit()
    tuned, tokenizer = load_tuned(run.folder, dtype=torch.float32, device="cpu")
    print("trained, resumed, loaded; answers", repr(generate(tuned, tokenizer, "Say it. one", max_new_tokens=4)))
    print(str(export(run.folder, f"{folder}/out")).splitlines()[0])
direct = [line.split(">=")[0] for line in importlib.metadata.requires("ftkit") if "extra ==" not in line]
print("versions:", ", ".join(f"{name}=={importlib.metadata.version(name)}" for name in sorted(direct)))
'''


def required(wheel: Path) -> list[str]:
    "What the wheel requires, extras aside."
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [archive.read(name).decode() for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    return [line for line in email.message_from_string(metadata).get_all("Requires-Dist") if "extra ==" not in line]


def call(*command, **options):
    print("$", *(str(part) if len(str(part)) < 200 else "…" for part in command), flush=True)
    subprocess.run([*map(str, command)], check=True, stdin=subprocess.DEVNULL, **options)


def main():
    parser = argparse.ArgumentParser(description="Install the built wheel into an empty environment and use it.")
    parser.add_argument("which", choices=RESOLUTION)
    parser.add_argument("--constraint", action="append", default=[], metavar="REQUIREMENT", help="such as torch==2.13.0, for a build without CUDA")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ftkit-fresh-") as folder:
        folder = Path(folder)
        call(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT)
        (wheel,) = folder.glob("*.whl")
        (folder / "direct.txt").write_text("\n".join(required(wheel)))  # a wheel's own requirements do not count as direct ones
        python = folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
        (folder / "constraints.txt").write_text("\n".join(options.constraint))
        call("uv", "venv", "-q", "--python", sys.executable, folder / "venv")
        call("uv", "pip", "install", "-q", "--python", python, "--resolution", RESOLUTION[options.which], "--constraint", folder / "constraints.txt", "-r", folder / "direct.txt", wheel)
        quiet = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")} | {"FTKIT_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
        call(python.with_name("ftkit"), "--help", env=quiet, stdout=subprocess.DEVNULL, cwd=folder)
        call(python, "-c", SMOKE, env=quiet, cwd=folder)
    print(f"{options.which}: installed into an empty environment, and it works")


if __name__ == "__main__":
    main()
