"What keeps the package, its workflows and its releases in order: rules that a program can check."
import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from layout import ROOT, requirements

sys.path.insert(0, str(Path(__file__).parent))
import reproducible  # noqa: E402

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
SOURCES = [path for name in ("ftkit", "tests", "bench") for path in sorted((ROOT / name).rglob("*.py"))] + [ROOT / "setup.py"]


def run(*command, **options):
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300, **options)


# --- code


def test_the_security_rules_of_ruff_are_kept():
    done = run(sys.executable, "-m", "ruff", "check", "--no-cache", "ftkit", "tests", "bench", "setup.py", cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_security_rules_are_on(tmp_path):
    (tmp_path / "bad.py").write_text("import pickle, subprocess, yaml\npickle.loads(b'')\nsubprocess.run('ls', shell=True)\nyaml.load('a')\neval('1')\n")
    done = run(sys.executable, "-m", "ruff", "check", "--no-cache", "--config", ROOT / "pyproject.toml", "--output-format", "concise", tmp_path / "bad.py")
    assert {rule for rule in re.findall(r"S\d{3}", done.stdout)} >= {"S301", "S602", "S506", "S307"}


def shells(source: str) -> list[str]:
    "Calls in a module that would go through a shell, or run text as code."
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call): continue
        name = ast.unparse(node.func)
        found += [f"{name}(shell=...)" for keyword in node.keywords if keyword.arg == "shell" and getattr(keyword.value, "value", True)]
        found += [name] if name in ("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "eval", "exec", "pickle.load", "pickle.loads", "torch.load", "yaml.load", "yaml.unsafe_load", "np.load", "numpy.load") else []
        if name.startswith("subprocess.") and name.split(".")[1] in ("run", "call", "check_call", "check_output", "Popen") and node.args and isinstance(node.args[0], (ast.JoinedStr, ast.Constant)): found.append(f"{name}(text)")
    return found


def test_the_search_finds_shells():
    bad = "os.system('a')\nsubprocess.run(f'ls {x}', shell=True)\nsubprocess.Popen('ls')\ntorch.load(p)\nsubprocess.run([a], shell=False)"
    assert shells(bad) == ["os.system", "subprocess.run(shell=...)", "subprocess.run(text)", "subprocess.Popen(text)", "torch.load"]


ALLOWED = {"tests/test_hostile.py": {"pickle.loads"}}  # the canary that must sing


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_shell_no_pickle_no_text_run_as_code(path):
    assert set(shells(path.read_text(encoding="utf-8"))) - ALLOWED.get(path.relative_to(ROOT).as_posix(), set()) == set()


# --- workflows


def jobs_of(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].items()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_have_the_least_permissions_and_pinned_actions(path):
    text, workflow = path.read_text(encoding="utf-8"), yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {} and "pull_request_target" not in text and "workflow_run" not in text and "secrets." not in text
    for used in re.findall(r"uses:\s*(.+)", text): assert re.fullmatch(r"[\w.-]+(/[\w.-]+)+@[0-9a-f]{40}  # v[\d.]+", used), used
    assert text.count("uses: actions/checkout@") == text.count("persist-credentials: false")
    for name, job in jobs_of(path):
        assert job.get("timeout-minutes"), name
        writes = {scope for scope, right in job.get("permissions", {}).items() if right == "write"}
        assert writes <= {("docs.yml", "deploy"): {"pages", "id-token"}, ("release.yml", "publish"): {"id-token"}, ("release.yml", "announce"): {"contents"}}.get((path.name, name), set())
        for step in job["steps"]: assert not re.search(r"\$\{\{", step.get("run", "")), "text of others becomes a command: pass it by env"


def test_what_can_write_builds_nothing():
    "A job that may publish runs nothing of the repository and installs nothing."
    for path in WORKFLOWS:
        for name, job in jobs_of(path):
            if "write" in job.get("permissions", {}).values():
                assert not any("checkout" in step.get("uses", "") or "pip" in step.get("run", "") for step in job["steps"]), (path.name, name)


def test_bounds_are_where_security_says():
    bounds = dict(line.split(">=") for line in requirements(ROOT / "settings.ini", "requirements") if ">=" in line)
    table = re.findall(r"^\| ([\w-]+)(?: \(to build\))? \| ([\d.]+) \|", (ROOT / "SECURITY.md").read_text(encoding="utf-8"), re.M)
    assert len(table) >= 6
    for name, version in table: assert bounds.get(name, version) == version, name
    assert {"torch", "transformers", "datasets", "jinja2", "filelock"} <= {name for name, _ in table} & set(bounds)
    assert f"setuptools>={dict(table)['setuptools']}" in (ROOT / "pyproject.toml").read_text()


# --- the wheel


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    return reproducible.build_twice(tmp_path_factory.mktemp("wheels"))


def test_the_wheel_is_built_twice_equal(wheels):
    one, another = (path.read_bytes() for path in wheels)
    assert len(one) > 100_000 and one == another


def test_the_wheel_works_where_its_dependencies_are(wheels, tmp_path):
    "Installed as it is built, into an environment that sees the packages of this one. With none of them: tests/fresh_install.py."
    import venv
    alone = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    (place,) = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", env=alone).stdout.split()
    done = run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheels[0], env=alone)
    assert done.returncode == 0, done.stderr
    ours = [path for path in sys.path if path.endswith("site-packages")]
    Path(place, "ours.pth").write_text("\n".join(ours))
    script = shutil.which("ftkit", path=str(python.parent))
    assert script and "Usage" in run(script, "--help", env=alone, cwd=tmp_path).stdout
    code = "import ftkit, ftkit.cli, ftkit.untrusted, importlib.resources as r; print(ftkit.__file__); assert (r.files('ftkit') / 'assets' / 'tickets.jsonl').is_file()"
    assert str(tmp_path) in run(python, "-c", code, env=alone, cwd=tmp_path).stdout
