"""The rules of this project's layout, each one a function from notebooks to a list of problems.

`python tests/layout.py` prints what breaks them; `tests/test_layout.py` holds the notebooks to them,
and holds each rule to finding a notebook made to break it. Standard library only.
"""
import ast
import io
import json
import math
import re
import statistics
import sys
import tokenize
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXPORTING = {"export", "exports", "exporti"}
NOT_RUN = {"slow", "gpu"}
MEDIAN_LINES, MOST_LINES, LONGEST = 10, 20, 30


class Cell:
    "One cell of a notebook file, with its nbdev directives read."

    def __init__(self, cell: dict):
        self.raw, self.id, self.type = cell, cell.get("id", "?"), cell["cell_type"]
        self.text = "".join(cell["source"])
        self.outputs = cell.get("outputs", [])
        head = re.match(r"(?:[ \t]*(?:#.*)?(?:\n|$))*", self.text)[0] if self.is_code else ""
        self.directives = dict(re.findall(r"^#\s*\|\s*(\w+):?[ \t]*(.*)$", head, re.M))

    @property
    def is_code(self):
        return self.type == "code"

    @property
    def is_exported(self):
        return bool(EXPORTING & self.directives.keys())

    @property
    def is_tested(self):
        return self.is_code and not NOT_RUN & self.directives.keys() and self.directives.get("eval") != "false"

    @property
    def lines(self):
        "Lines of code: blank lines and directives do not count."
        return [line for line in self.text.split("\n") if line.strip() and not re.match(r"#\s*\|", line)]

    @property
    def python(self):
        "The cell's source with IPython's magics and shell lines blanked, so that Python parses it."
        if self.text.lstrip().startswith("%%"):
            return ""
        return re.sub(r"^(\s*)[%!].*$", r"\1pass", self.text, flags=re.M)

    @property
    def tree(self):
        return ast.parse(self.python)


class Notebook:
    "A notebook file: its cells, the module it exports, its place in the list."

    def __init__(self, path: Path, root: Path):
        self.path, self.name = path, path.relative_to(root).as_posix()
        self.raw = json.loads(path.read_text(encoding="utf-8"))
        self.cells = [Cell(cell) for cell in self.raw["cells"]]

    @property
    def module(self):
        names = [cell.directives["default_exp"].strip() for cell in self.code if "default_exp" in cell.directives]
        return names[0] if names else None

    @property
    def code(self):
        return [cell for cell in self.cells if cell.is_code]

    @property
    def exported(self):
        return [cell for cell in self.cells if cell.is_exported]

    def where(self, cell: Cell):
        return f"{self.name} [{cell.id}]"


def read_notebooks(folder: Path) -> list[Notebook]:
    "All notebooks under `folder`, in the order of their names, which is the order of the list."
    paths = [path for path in folder.rglob("*.ipynb") if not any(part[0] in "._" for part in path.relative_to(folder).parts)]
    return [Notebook(path, folder) for path in sorted(paths, key=lambda path: path.relative_to(folder).as_posix())]


# ---- imports

def _imported(tree: ast.AST, package: str) -> list[str]:
    "Full names of what is imported anywhere in `tree`, inside functions too, as `package.module` or `other.module`."
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(part for part in (package if node.level else "", node.module) if part)
            found += [f"{base}.{alias.name}" for alias in node.names] if base == package else [base]
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__") and node.args:
            name = getattr(node.args[0], "value", None)
            found += [name] if isinstance(name, str) else []
    return found


def _called(node: ast.Call) -> str:
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def imports_point_upward(notebooks: list[Notebook], package: str = "ftkit") -> list[str]:
    "Exported code imports only modules whose notebook stands earlier in the list."
    position = {notebook.module: i for i, notebook in enumerate(notebooks) if notebook.module}
    problems = []
    for i, notebook in enumerate(notebooks):
        for cell in notebook.exported:
            for name in _imported(cell.tree, package):
                if name.split(".")[0] != package or name in (package, f"{package}.__version__"):
                    continue
                module = name.removeprefix(package + ".")
                if module not in position:
                    problems.append(f"{notebook.where(cell)} imports {name}, which no notebook exports")
                elif position[module] >= i:
                    problems.append(f"{notebook.where(cell)} imports {name} from {notebooks[position[module]].name}, which is not above it")
    return problems


def no_star_imports(notebooks: list[Notebook]) -> list[str]:
    "No `from x import *`, in any cell."
    return [
        f"{notebook.where(cell)} imports * from {node.module}"
        for notebook in notebooks for cell in notebook.code for node in ast.walk(cell.tree)
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names)
    ]


def import_cells_hold_imports_only(notebooks: list[Notebook]) -> list[str]:
    """Processing the docs runs every exported cell, and every other cell that holds an import, inside a function too, however
    long it takes: so imports stand in cells of their own, and what is run beside a nested import is moved to the next cell."""
    imports, defines, problems = (ast.Import, ast.ImportFrom), (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef), []
    for notebook in notebooks:
        for cell in notebook.code:
            if cell.directives.get("eval") == "false":
                continue
            top = [node for node in cell.tree.body if isinstance(node, imports)]
            nested = not cell.is_exported and any(isinstance(node, imports) for node in ast.walk(cell.tree))
            allowed = imports if top else defines
            if (top or nested) and not all(isinstance(node, allowed) for node in cell.tree.body):
                problems.append(f"{notebook.where(cell)} mixes imports with other code")
    return problems


def undeclared_imports(package_folder: Path, declared: set[str], distribution_of: dict[str, list[str]]) -> list[str]:
    "Every package that the modules import, inside functions too, is among the declared requirements."
    problems = []
    for path in sorted(package_folder.rglob("*.py")):
        for name in _imported(ast.parse(path.read_text(encoding="utf-8")), package_folder.name):
            top = name.split(".")[0]
            if top == package_folder.name or top in sys.stdlib_module_names:
                continue
            if not {normal(name) for name in distribution_of.get(top, [top])} & declared:
                problems.append(f"{path.relative_to(package_folder.parent).as_posix()} imports {top}, which settings.ini does not declare")
    return problems


def normal(name: str) -> str:
    "A distribution's name as the index compares it, without version and extras."
    return re.sub(r"[-_.]+", "-", re.split(r"[\s<>=!~\[;]", name.strip(), maxsplit=1)[0]).lower()


def requirements(settings: Path, *keys: str) -> list[str]:
    "The requirements under these keys of settings.ini."
    parser = ConfigParser(delimiters=["="])
    parser.read(settings, encoding="utf-8")
    return [line for key in keys for line in parser["DEFAULT"][key].split()]


# ---- docments

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


def _signatures(tree: ast.AST):
    "What a caller can pass: (name, node, {parameter: line}) of the public functions, methods and dataclasses."
    for node in tree.body:
        if isinstance(node, FUNCTIONS) and not node.name.startswith("_"):
            yield node.name, node, _parameters(node)
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            if _is_dataclass(node):
                fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
                yield node.name, node, {field.target.id: field.lineno for field in fields}
            for method in node.body:
                if isinstance(method, FUNCTIONS) and (method.name in ("__init__", "__call__") or not method.name.startswith("_")):
                    yield f"{node.name}.{method.name}", method, _parameters(method)


def _parameters(node) -> dict[str, int]:
    spec = node.args
    everyone = [*spec.posonlyargs, *spec.args, spec.vararg, *spec.kwonlyargs, spec.kwarg]
    return {arg.arg: arg.lineno for arg in everyone if arg and arg.arg not in ("self", "cls")}


def _comments(source: str) -> set[int]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.start[0] for token in tokens if token.type == tokenize.COMMENT}


def undocumented_parameters(source: str) -> list[str]:
    "Public parameters for which docments finds no comment: one parameter to a line, the comment beside it or on the line above."
    comments, missing = _comments(source), []
    for name, node, line_of in _signatures(ast.parse(source)):
        returns = getattr(node, "returns", None)
        taken = [*line_of.values(), *([returns.lineno] if returns else [])]
        for parameter, line in line_of.items():
            above = node.lineno < line and line - 1 in comments and line - 1 not in taken
            if not parameter.startswith("_") and (taken.count(line) > 1 or not (line in comments or above)):
                missing.append(f"{name}({parameter})")
    return missing


def parameters_have_docments(notebooks: list[Notebook]) -> list[str]:
    "Every parameter of an exported public function or method is explained by the comment on its own line."
    return [
        f"{notebook.where(cell)} {name} has no docment"
        for notebook in notebooks for cell in notebook.exported for name in undocumented_parameters(cell.python)
    ]


# ---- size, tests

def cells_are_small(notebooks: list[Notebook]) -> list[str]:
    "Exported cells of a notebook: median at most 10 lines, nine of ten at most 20, none over 30."
    problems = []
    for notebook in notebooks:
        sizes = {cell.id: len(cell.lines) for cell in notebook.exported}
        if not sizes:
            continue
        over = [f"{name} {size}" for name, size in sizes.items() if size > MOST_LINES]
        if statistics.median(sizes.values()) > MEDIAN_LINES:
            problems.append(f"{notebook.name}: the median of its exported cells is {statistics.median(sizes.values())} lines, over {MEDIAN_LINES}")
        if len(over) > math.floor(len(sizes) / 10):
            problems.append(f"{notebook.name}: {len(over)} of {len(sizes)} exported cells have over {MOST_LINES} lines: {', '.join(over)}")
        problems += [f"{notebook.name} [{name}] has {size} lines, over {LONGEST}" for name, size in sizes.items() if size > LONGEST]
    return problems


def _asserts(tree: ast.AST) -> bool:
    return any(
        isinstance(node, ast.Assert)
        or isinstance(node, ast.Call) and re.match(r"(test|assert)_|test$|raises$|ExceptionExpected$", _called(node))
        for node in ast.walk(tree)
    )


def exporting_notebooks_assert(notebooks: list[Notebook]) -> list[str]:
    "A notebook that exports code tests it, in cells that every test run executes."
    return [
        f"{notebook.name} exports {notebook.module} and asserts nothing"
        for notebook in notebooks
        if notebook.exported and not any(_asserts(cell.tree) for cell in notebook.code if cell.is_tested and not cell.is_exported)
    ]


# ---- what is committed

def _shows_something(tree: ast.Module) -> bool:
    "Whether running this cell must leave an output: it prints, or it ends in a value that is no call (a call may give None)."
    prints = any(
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and _called(node.value) in ("print", "display") for node in tree.body
    )
    last = tree.body[-1] if tree.body else None
    quiet = (ast.Call, ast.Await, ast.Yield)
    return prints or isinstance(last, ast.Expr) and not isinstance(last.value, quiet) and getattr(last.value, "value", "") is not None


def notebooks_are_executed(notebooks: list[Notebook]) -> list[str]:
    "What a cell shows is committed with it (nbdev_clean drops execution counts, so outputs are the evidence), and no error is."
    problems = []
    for notebook in notebooks:
        for cell in notebook.code:
            if any(output["output_type"] == "error" for output in cell.outputs):
                problems.append(f"{notebook.where(cell)} is committed with an error")
            silent = cell.directives.get("eval") == "false" or cell.text.rstrip().endswith(";")
            if not (cell.outputs or silent) and _shows_something(cell.tree):
                problems.append(f"{notebook.where(cell)} shows something when run, but is committed without output")
    return problems


def no_widget_state(notebooks: list[Notebook]) -> list[str]:
    "No saved widgets and no state of them: pages that hold them fetch scripts from elsewhere, and the static fallback is not shown."
    problems = [f"{notebook.name} holds widget state" for notebook in notebooks if "widgets" in notebook.raw.get("metadata", {})]
    return problems + [
        f"{notebook.where(cell)} output holds a widget"
        for notebook in notebooks for cell in notebook.code
        if any(kind.startswith("application/vnd.jupyter.widget") for output in cell.outputs for kind in output.get("data", {}))
    ]


MACHINE_PATH = re.compile(r"(?:(?<![\w/.+~-])|(?<=file://))/(?:root|home|work|tmp|private|Users|var/folders)(?![\w.-])|\b[A-Z]:\\+Users\b")


def _texts(value):
    "All text in an output; pictures are left out."
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from () if key.startswith("image/") and key != "image/svg+xml" else _texts(inner)
    elif isinstance(value, list):
        if all(isinstance(item, str) for item in value):
            yield "".join(value)
        else:
            for item in value:
                yield from _texts(item)
    elif isinstance(value, str):
        yield value


def no_machine_paths(notebooks: list[Notebook]) -> list[str]:
    "No committed output names a folder of the machine that it was made on."
    problems = []
    for notebook in notebooks:
        for cell in notebook.code:
            for text in _texts(cell.outputs):
                plain = re.sub(r"\x1b\[[0-9;]*m|base64,[A-Za-z0-9+/=]+", "", text)
                problems += [f"{notebook.where(cell)} output holds {plain[m.start():m.start() + 40]!r}" for m in MACHINE_PATH.finditer(plain)][:1]
    return problems


def title_cells_hold_the_title_only(notebooks: list[Notebook]) -> list[str]:
    "Each notebook opens with `# Title` and `> subtitle` in a cell of their own: the docs keep these two and drop the rest of the cell."
    problems = []
    for notebook in notebooks:
        first = next((cell for cell in notebook.cells if cell.type == "markdown"), None)
        if not (first and re.fullmatch(r"# \S[^\n]*\n+> \S[^\n]*\s*", first.text)):
            problems.append(f"{notebook.name} does not open with a cell of exactly a title and a one-line subtitle")
    return problems


def tutorials_export_nothing(notebooks: list[Notebook]) -> list[str]:
    "A notebook in tutorials/ is for reading and running: the package takes nothing from it."
    return [
        f"{notebook.name} is a tutorial and exports something"
        for notebook in notebooks if notebook.name.startswith("tutorials/") and (notebook.module or notebook.exported)
    ]


PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)[^)]*\)")


def pictures_are_there(notebooks: list[Notebook]) -> list[str]:
    "Every picture of a text is a file beside the notebooks, and says in words what it shows."
    problems = []
    for notebook in notebooks:
        for cell in notebook.cells:
            for words, path in PICTURE.findall(cell.text) if cell.type == "markdown" else ():
                if not words.strip():
                    problems.append(f"{notebook.where(cell)} shows {path} without a text for those who do not see it")
                if not re.match(r"\w+:", path) and not (notebook.path.parent / path).is_file():
                    problems.append(f"{notebook.where(cell)} shows {path}, which is missing")
    return problems


# ---- the docs

def sidebar_lists_every_notebook(notebooks: list[Notebook], sidebar: list[str]) -> list[str]:
    "The sidebar of the docs names every notebook once, and none that is missing."
    names = [name for name in sidebar if name.endswith(".ipynb")]
    have = {notebook.name for notebook in notebooks}
    return (
        [f"_quarto.yml does not list {name}" for name in sorted(have - set(names))]
        + [f"_quarto.yml lists {name}, which is missing" for name in sorted(set(names) - have)]
        + [f"_quarto.yml lists {name} twice" for name in sorted({name for name in names if names.count(name) > 1})]
    )


def sidebar_entries(contents: list) -> list[str]:
    "The files that a Quarto sidebar lists, in order."
    return [name for entry in contents for name in ([entry] if isinstance(entry, str) else sidebar_entries(entry["contents"]))]


RULES = [
    imports_point_upward, no_star_imports, import_cells_hold_imports_only, parameters_have_docments, cells_are_small,
    exporting_notebooks_assert, notebooks_are_executed, no_widget_state, no_machine_paths, title_cells_hold_the_title_only,
    tutorials_export_nothing, pictures_are_there,
]

if __name__ == "__main__":
    found = [problem for rule in RULES for problem in rule(read_notebooks(ROOT / "nbs"))]
    print("\n".join(found) or "The notebooks keep the rules.")
    sys.exit(bool(found))
