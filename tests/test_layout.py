"The notebooks keep the layout's rules, and each rule finds a notebook made to break it."
import inspect
import json
import os
import re
import subprocess
import sys
from importlib.metadata import packages_distributions

import layout
import pytest
import yaml
from fastcore.docments import docments
from layout import ROOT, read_notebooks

NEEDED_BY_OTHERS = {
    "accelerate": "the Trainer of transformers",
    "gguf": "transformers, to read the demo model",
    "jinja2": "chat templates",
    "ipywidgets": "tqdm's bar in a notebook",
}


def code(source, outputs=(), name="cell"):
    return {"cell_type": "code", "id": name, "source": source, "outputs": list(outputs), "execution_count": None, "metadata": {}}


def markdown(source, name="text"):
    return {"cell_type": "markdown", "id": name, "source": source, "metadata": {}}


def shown(text):
    return {"output_type": "stream", "name": "stdout", "text": [text]}


TITLE = markdown("# Title\n> What it is for", "title")
GOOD = [
    TITLE,
    code("#| default_exp one", name="default"),
    code("#| export\nimport json", name="imports"),
    code("#| export\ndef double(\n    x: int,  # a number\n) -> int:  # twice that\n    return 2 * x", name="double"),
    code("assert double(2) == 4\nprint(double(3))", [shown("6\n")], "check"),
]


@pytest.fixture
def notebooks(tmp_path):
    "A function that writes notebooks from lists of cells, and reads them as the rules get them."
    def write(metadata=None, **cells_of):
        for name, cells in cells_of.items():
            content = {"cells": cells, "metadata": metadata or {}, "nbformat": 4, "nbformat_minor": 5}
            path = tmp_path / f"{name}.ipynb"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(content))
        return read_notebooks(tmp_path)
    return write


# ---- the notebooks of this repository

@pytest.mark.parametrize("rule", layout.RULES, ids=lambda rule: rule.__name__)
def test_notebooks_keep(rule):
    problems = rule(read_notebooks(ROOT / "nbs"))
    assert not problems, "\n" + "\n".join(problems)


def test_notebooks_are_there():
    assert [notebook for notebook in read_notebooks(ROOT / "nbs") if notebook.exported]


@pytest.mark.parametrize("rule", layout.RULES, ids=lambda rule: rule.__name__)
def test_a_good_notebook_passes(rule, notebooks):
    assert rule(notebooks(n00=GOOD)) == []


# ---- each rule finds what breaks it

@pytest.mark.parametrize("line", [
    "from ftkit.two import f", "import ftkit.two", "from ftkit import two", "from .two import f",
    "def g():\n    from ftkit.two import f", "def g():\n    return import_module('ftkit.two')", "from ftkit.one import f",
])
def test_downward_import_is_found(line, notebooks):
    one = [TITLE, code("#| default_exp one"), code(f"#| export\n{line}")]
    two = [TITLE, code("#| default_exp two"), code("#| export\nf = 1")]
    assert "which is not above it" in layout.imports_point_upward(notebooks(a=one, b=two))[0]


def test_upward_import_is_allowed(notebooks):
    one = [TITLE, code("#| default_exp one"), code("#| export\nf = 1")]
    two = [TITLE, code("#| default_exp two"), code("#| export\nfrom ftkit.one import f")]
    assert layout.imports_point_upward(notebooks(a=one, b=two)) == []


def test_import_of_a_module_without_notebook_is_found(notebooks):
    one = [TITLE, code("#| default_exp one"), code("#| export\nfrom ftkit.nowhere import f")]
    assert "no notebook exports" in layout.imports_point_upward(notebooks(a=one))[0]


def test_list_order_is_the_order_of_names(notebooks):
    order = ["00_data", "00a_core", "00b_models", "00c1_loss", "00c_train", "01_lora", "90_demo", "index"]
    assert [notebook.path.stem for notebook in notebooks(**{name: GOOD for name in reversed(order)})] == order


@pytest.mark.parametrize("source", ["from json import *", "#| export\nfrom json import *", "def f():\n    pass\nfrom ftkit.core import *"])
def test_star_import_is_found(source, notebooks):
    assert layout.no_star_imports(notebooks(a=[TITLE, code(source)]))


@pytest.mark.parametrize("source", [
    "import json\nx = 1", "#| export\nimport json\nx = 1", "def f():\n    import json\nf()", "#| slow\nwith a:\n    import json\n    b()",
])
def test_mixed_import_cell_is_found(source, notebooks):
    assert layout.import_cells_hold_imports_only(notebooks(a=[TITLE, code(source)]))


@pytest.mark.parametrize("source", [
    "import json\nfrom os import path", "#| export\ndef f():\n    import json\nx = 1", "def f():\n    import json", "#| eval: false\nimport json\nx = 1",
])
def test_import_cells_of_their_own_pass(source, notebooks):
    assert layout.import_cells_hold_imports_only(notebooks(a=[TITLE, code(source)])) == []


@pytest.mark.parametrize("source, missing", [
    ("def f(x: int): return x", "f(x)"),
    ("def f(x: int) -> int:  # what it gives\n    return x", "f(x)"),
    ("def f(x: int, y: int):  # both\n    return x", "f(x)"),
    ("def f(\n    x,  # known\n    *,\n    y=1,\n): return x", "f(y)"),
    ("def f(\n    *args,\n    **options,  # passed on\n): pass", "f(args)"),
    ("def f(\n    **options,\n): pass", "f(options)"),
    ("async def f(\n    x,\n): pass", "f(x)"),
    ("class A:\n    def __init__(\n        self,\n        x,\n    ): pass", "A.__init__(x)"),
    ("class A:\n    def go(self, x): pass", "A.go(x)"),
    ("@patch\ndef go(self: A, x: int): pass", "go(x)"),
    ("@dataclass\nclass A:\n    x: int\n    y: int  # known", "A(x)"),
])
def test_missing_docment_is_found(source, missing, notebooks):
    found = layout.parameters_have_docments(notebooks(a=[TITLE, code(f"#| export\n{source}")]))
    assert any(f" {missing} has no docment" in problem for problem in found)


@pytest.mark.parametrize("source", [
    "def f(\n    x: int,  # a number\n    y=1,  # another\n) -> int:  # their sum\n    return x + y",
    "def _f(x): return x", "class _A:\n    def go(self, x): pass", "class A:\n    def _go(self, x): pass\n    def go(self): pass",
    "def f(\n    # a number\n    x,\n): pass", "def f(x):  # a number\n    return x", "@dataclass\nclass A:\n    x: int  # a number",
])
def test_docment_is_seen(source, notebooks):
    assert layout.parameters_have_docments(notebooks(a=[TITLE, code(f"#| export\n{source}")])) == []


def partly_documented(
    # a number
    first,
    second,  # another
    third,
    *, fourth, fifth,  # two on a line
) -> int:  # their sum
    return first + second


def test_rule_agrees_with_docments():
    "What the rule finds missing is what nbdev's docs leave empty; two on a line it never takes."
    documented = docments(partly_documented)
    assert {name: bool(documented[name]) for name in ("first", "second", "third")} == {"first": True, "second": True, "third": False}
    missing = layout.undocumented_parameters("#| export\n" + inspect.getsource(partly_documented))
    assert missing == [f"partly_documented({name})" for name in ("third", "fourth", "fifth")]


def sized(*sizes):
    cells = [code("#| export\n" + "\n\n".join(f"x = {n}" for n in range(size)), name=f"c{i}") for i, size in enumerate(sizes)]
    return [TITLE, code("#| default_exp one"), *cells]


@pytest.mark.parametrize("sizes, problem", [
    ([11, 11, 3], "median"), ([5] * 9 + [21, 21], "of 11 exported cells"), ([5] * 8 + [21], "of 9 exported cells"), ([5] * 30 + [31], "over 30"),
])
def test_large_cells_are_found(sizes, problem, notebooks):
    assert problem in " ".join(layout.cells_are_small(notebooks(a=sized(*sizes))))


def test_small_cells_pass(notebooks):
    assert layout.cells_are_small(notebooks(a=sized(*[10] * 9, 30))) == []


@pytest.mark.parametrize("cells", [
    [], [code("#| slow\nassert True")], [code("#| eval: false\nassert True")], [code("#| export\nassert True")], [code("test = 1\nprint(test)")],
])
def test_missing_assertion_is_found(cells, notebooks):
    assert layout.exporting_notebooks_assert(notebooks(a=[TITLE, code("#| default_exp one"), code("#| export\nx = 1"), *cells]))


@pytest.mark.parametrize("source", ["assert x", "test_eq(x, 1)", "torch.testing.assert_close(x, x)", "with ExceptionExpected(): 1/0"])
def test_assertion_is_seen(source, notebooks):
    assert layout.exporting_notebooks_assert(notebooks(a=[TITLE, code("#| default_exp one"), code("#| export\nx = 1"), code(source)])) == []


@pytest.mark.parametrize("source", ["print(1)", "x = 1\nx", "x = 1\nx + 1", "#| slow\nprint(1)", "for _ in ():\n    pass\ndisplay(1)"])
def test_missing_output_is_found(source, notebooks):
    assert "without output" in layout.notebooks_are_executed(notebooks(a=[TITLE, code(source)]))[0]
    assert layout.notebooks_are_executed(notebooks(a=[TITLE, code(source, [shown("1")])])) == []


@pytest.mark.parametrize("source", ["x = 1", "f()", "x;", "None", "#| eval: false\nprint(1)", "import json"])
def test_cells_without_output_pass(source, notebooks):
    assert layout.notebooks_are_executed(notebooks(a=[TITLE, code(source)])) == []


def test_committed_error_is_found(notebooks):
    error = {"output_type": "error", "ename": "E", "evalue": "", "traceback": []}
    assert layout.notebooks_are_executed(notebooks(a=[TITLE, code("1/0", [error])]))


def test_widget_state_is_found(notebooks):
    assert layout.no_widget_state(notebooks(metadata={"widgets": {}}, a=GOOD))
    widget = {"output_type": "display_data", "data": {"application/vnd.jupyter.widget-view+json": {}, "text/html": "x"}, "metadata": {}}
    assert "holds a widget" in layout.no_widget_state(notebooks(a=[TITLE, code("run", [widget])]))[0]


@pytest.mark.parametrize("text", [
    "/root/x", "saved to /home/someone/run", "'/tmp/abc'", "file:///work/x", "at /work.", "\x1b[32m/tmp/x\x1b[0m", r"C:\Users\me", "(/tmp)",
])
def test_machine_path_is_found(text, notebooks):
    text = text.replace("/work.", "/work: ")
    html = {"output_type": "display_data", "data": {"text/html": ["<p>", text]}, "metadata": {}}
    for output in (shown(text), html):
        assert layout.no_machine_paths(notebooks(a=[TITLE, code("f()", [output])]))


@pytest.mark.parametrize("text", ["runs/home/x", "https://x.org/home/a", "~/work/x", "a/tmp/b", "/homework", "data:image/png;base64,+/tmp/abc="])
def test_other_paths_pass(text, notebooks):
    picture = {"output_type": "display_data", "data": {"image/png": "+/tmp/"}, "metadata": {}}
    assert layout.no_machine_paths(notebooks(a=[TITLE, code("f()", [shown(text), picture])])) == []


@pytest.mark.parametrize("text", ["# Title", "Text", "# Title\n> Sub\n\nIn this notebook you learn", "# Title\n\ntext"])
def test_title_cell_with_more_is_found(text, notebooks):
    assert layout.title_cells_hold_the_title_only(notebooks(a=[markdown(text)]))


@pytest.mark.parametrize("source", ["#| default_exp one", "#| export\nx = 1"])
def test_exporting_tutorial_is_found(source, notebooks):
    found = layout.tutorials_export_nothing(notebooks(**{"tutorials/a": [TITLE, code(source)], "b": GOOD}))
    assert found == ["tutorials/a.ipynb is a tutorial and exports something"]


@pytest.mark.parametrize("text, problem", [
    ("![a curve](images/none.png)", "is missing"), ("![](https://a.org/b.png)", "without a text"), ("x ![ ](a.png)", "without a text"),
    ("![a curve](a.png)", "is missing"),
])
def test_missing_picture_is_found(text, problem, notebooks):
    assert problem in " ".join(layout.pictures_are_there(notebooks(a=[TITLE, markdown(text)])))


def test_picture_is_seen(tmp_path, notebooks):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").touch()
    found = notebooks(**{"a": [TITLE, markdown("![a](images/a.png)")], "tutorials/b": [TITLE, markdown('![a](../images/a.png "a")')]})
    assert layout.pictures_are_there(found) == []


# ---- requirements

def test_every_import_is_declared():
    declared = {layout.normal(line) for line in layout.requirements(ROOT / "settings.ini", *REQUIREMENT_KEYS)}
    problems = layout.undeclared_imports(ROOT / "ftkit", declared, packages_distributions())
    assert not problems, "\n" + "\n".join(problems)


def test_undeclared_import_is_found(tmp_path):
    package = tmp_path / "ftkit"
    package.mkdir()
    (package / "a.py").write_text("import json, yaml\nfrom .b import c\ndef f():\n    from numpy.linalg import norm\n    import PIL")
    found = layout.undeclared_imports(package, {"numpy", "pyyaml"}, {"yaml": ["PyYAML"], "PIL": ["pillow"]})
    assert found == ["ftkit/a.py imports PIL, which settings.ini does not declare"]


REQUIREMENT_KEYS = ["requirements", "qlora_requirements", "doctor_requirements", "export_requirements", "scale_requirements"]


def test_every_requirement_is_used():
    "No base requirement is there for nothing."
    used = {name.split(".")[0] for path in (ROOT / "ftkit").rglob("*.py") for name in layout._imported(layout.ast.parse(path.read_text()), "ftkit")}
    names = {layout.normal(name) for top in used for name in packages_distributions().get(top, [top])}
    declared = {layout.normal(line) for line in layout.requirements(ROOT / "settings.ini", "requirements")}
    assert declared - names - NEEDED_BY_OTHERS.keys() == set()


def test_requirements_have_lower_bounds_and_only_dev_has_caps():
    for line in layout.requirements(ROOT / "settings.ini", *REQUIREMENT_KEYS):
        assert re.fullmatch(r"[\w-]+>=[\d.]+", line), line


def test_constraints_pin_what_is_required():
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    pins = {layout.normal(name): version for name, version in pins.items()}
    for line in layout.requirements(ROOT / "settings.ini", *REQUIREMENT_KEYS, "dev_requirements"):
        assert layout.normal(line) in pins, f"constraints.txt does not pin {line}"
    assert not [name for name in pins if re.match(r"nvidia|cuda|triton", name)]


# ---- the docs

def quarto():
    return yaml.safe_load((ROOT / "_quarto.yml").read_text())


def test_sidebar_lists_every_notebook():
    entries = layout.sidebar_entries(quarto()["website"]["sidebar"]["contents"])
    problems = layout.sidebar_lists_every_notebook(read_notebooks(ROOT / "nbs"), entries)
    assert not problems, "\n" + "\n".join(problems)
    assert not [name for name in entries if not (ROOT / "nbs" / name).exists()]


def test_sidebar_topics():
    topics = [entry["section"] for entry in quarto()["website"]["sidebar"]["contents"]]
    assert topics == ["Start", "Workflow", "Under the hood", "Tutorials", "Contribute"]


def test_contributing_lists_the_notebooks_in_order():
    listed = re.findall(r"^\| `([^`]+\.ipynb)` \|", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
    assert listed == [notebook.name for notebook in read_notebooks(ROOT / "nbs")]


def test_wrong_sidebar_is_found(notebooks):
    found = layout.sidebar_lists_every_notebook(notebooks(a=GOOD, b=GOOD), ["b.ipynb", "b.ipynb", "c.ipynb", "contributing.md"])
    assert found == ["_quarto.yml does not list a.ipynb", "_quarto.yml lists c.ipynb, which is missing", "_quarto.yml lists b.ipynb twice"]


PROCESS = """
from nbdev.config import get_config
from nbdev.quarto import nbdev_sidebar, refresh_quarto_yml
from nbdev.serve import proc_nbs
if __name__ == "__main__":
    refresh_quarto_yml()
    nbdev_sidebar.__wrapped__(path=get_config().nbs_path)
    print(proc_nbs(n_workers=0, force=True))
"""


def test_nbdev_uses_the_top_level_quarto_yml(tmp_path):
    "nbdev's own processing, all of nbdev_docs but the calls of Quarto, on one small notebook."
    assert os.readlink(ROOT / "nbs" / "_quarto.yml") == "../_quarto.yml"
    (tmp_path / "nbs").mkdir()
    for name in ("settings.ini", "_quarto.yml", "CONTRIBUTING.md", "CHANGELOG.md"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    for link in [path for path in (ROOT / "nbs").iterdir() if path.is_symlink()]:
        (tmp_path / "nbs" / link.name).symlink_to(os.readlink(link))
    content = {"cells": [TITLE], "metadata": {"kernelspec": {"name": "python3", "language": "python"}}, "nbformat": 4, "nbformat_minor": 5}
    (tmp_path / "nbs" / "index.ipynb").write_text(json.dumps(content))
    (tmp_path / "process.py").write_text(PROCESS)
    subprocess.run([sys.executable, "process.py"], cwd=tmp_path, check=True, stdin=subprocess.DEVNULL, timeout=300)
    proc = tmp_path / "_proc"
    assert (proc / "_quarto.yml").read_text() == (ROOT / "_quarto.yml").read_text()
    assert (tmp_path / "nbs" / "_quarto.yml").is_symlink()
    assert yaml.safe_load((proc / "nbdev.yml").read_text())["project"]["output-dir"] == "_docs"
    assert not (proc / "sidebar.yml").exists()
    for name in ("index.ipynb", "contributing.md", "changelog.md"):
        assert (proc / name).is_file()
