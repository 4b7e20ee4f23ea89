"""README.md is made from nbs/index.ipynb, here, without Quarto.

    python tests/readme.py             write README.md
    python tests/readme.py --check     fail if it is not what would be written
    python tests/readme.py --command   print the test command that README.md tells its reader
"""
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INDEX, README = ROOT / "nbs" / "index.ipynb", ROOT / "README.md"
NOTE = "<!-- Made from nbs/index.ipynb by tests/readme.py: edit the notebook. -->"
FENCE = re.compile(r"(^(`{3,}|~{3,})[^\n]*\n.*?^\2[ \t]*$)", re.M | re.S)
LINK = re.compile(r"(\]\(|\b(?:src|href)=\")(?!\w+:|#|/)([^)\s\"]+)")


def readme_text(notebook: dict) -> str:
    "The README of a notebook: its text, its code, and what the code printed."
    parts = [part for cell in notebook["cells"] for part in _parts(cell)]
    title, *rest = parts
    return "\n\n".join([title, NOTE, *rest]) + "\n"


def _parts(cell: dict) -> list[str]:
    text = "".join(cell["source"]).strip()
    if cell["cell_type"] == "markdown":
        return [_title(_links(text))] if text else []
    if cell["cell_type"] != "code":
        return []
    flags = set(re.findall(r"^#\s*\|\s*(\w+(?::[ \t]*\w+)?)", text, re.M))
    if "hide" in flags:
        return []
    source = re.sub(r"^#\s*\|.*\n?", "", text, flags=re.M).strip()
    shown = [] if "output: false" in flags else [part for output in cell["outputs"] for part in _output(output)]
    return ([f"```python\n{source}\n```"] if source and "echo: false" not in flags else []) + shown


def _title(text: str) -> str:
    "The subtitle is a quotation on its own, as nbdev reads it."
    return re.sub(r"\A(# [^\n]+)\n+(> )", r"\1\n\n\2", text)


def _links(text: str) -> str:
    "Relative links of the notebook, seen from the folder above. Code is left as it is."
    pieces, end = [], 0
    for fence in FENCE.finditer(text):
        pieces += [LINK.sub(_above, text[end:fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*pieces, LINK.sub(_above, text[end:])])


def _above(link: re.Match) -> str:
    path = link[2]
    return link[1] + (path.removeprefix("../") if path.startswith("../") else f"nbs/{path.removeprefix('./')}")


def _output(output: dict) -> list[str]:
    "What was printed or shown. A picture has to be a file beside the notebook, or the README would hold it in base64."
    if output["output_type"] == "stream":
        return _fenced(output["text"]) if output["name"] == "stdout" else []
    data = output.get("data", {})
    if "text/markdown" in data:
        return [_links("".join(data["text/markdown"]).strip())]
    if any(kind.startswith("image/") for kind in data):
        raise SystemExit("index.ipynb shows a picture as an output: save it under nbs/images/ and show it from a markdown cell")
    return _fenced(data.get("text/plain", ""))


def _fenced(text) -> list[str]:
    plain = re.sub(r"\x1b\[[0-9;]*m", "", "".join(text)).strip("\n")
    return [f"```\n{plain}\n```"] if plain else []


def run_command(readme: str) -> str:
    "The one line of the README's shell blocks that runs the tests."
    blocks = re.findall(r"^```(?:sh|bash|shell|console)[ \t]*\n(.*?)^```", readme, re.M | re.S)
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.split("\n")]
    found = sorted({line for line in lines if re.search(r"(^|&&\s*)(ftkit test|nbdev_test)\b", line)})
    if len(found) != 1:
        raise SystemExit(f"README.md must hold exactly one test command in its shell blocks; found {found or 'none'}")
    return found[0]


if __name__ == "__main__":
    if "--command" in sys.argv:
        print(run_command(README.read_text(encoding="utf-8")))
        sys.exit()
    made = readme_text(json.loads(INDEX.read_text(encoding="utf-8")))
    if "--check" not in sys.argv:
        README.write_text(made, encoding="utf-8")
    elif README.read_text(encoding="utf-8") != made:
        sys.exit("README.md differs from nbs/index.ipynb: run python tests/readme.py")
