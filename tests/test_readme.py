"README.md is what nbs/index.ipynb makes."
import json

import pytest
import readme
from readme import ROOT, readme_text, run_command
from test_layout import code, markdown, shown


def made(*cells):
    return readme_text({"cells": [markdown("# Name\n> What it is"), *cells]})


def test_readme_is_made_from_the_index():
    index = json.loads(readme.INDEX.read_text(encoding="utf-8"))
    assert readme.README.read_text(encoding="utf-8") == readme_text(index), "run python tests/readme.py"


def test_links_of_the_readme_lead_somewhere():
    text = readme.FENCE.sub("", readme.README.read_text(encoding="utf-8"))
    missing = [link[2] for link in readme.LINK.finditer(text) if not (ROOT / link[2].split("#")[0]).exists()]
    assert missing == []


def test_readme_has_both_commands():
    text = readme.README.read_text(encoding="utf-8")
    assert run_command(text) == "pip install -c constraints.txt -e '.[dev]' && ftkit test"
    assert "pip install -c constraints.txt -e '.[dev]' && ftkit demo" in text


def test_title_and_subtitle():
    assert made().split("\n")[:3] == ["# Name", "", "> What it is"]


def test_code_and_output():
    text = made(code("#| echo: true\nprint(1)", [shown("\x1b[1m1\x1b[0m\n")]))
    assert text.endswith("```python\nprint(1)\n```\n\n```\n1\n```\n")


def test_flags_of_cells():
    assert "secret" not in made(code("#| hide\nsecret = 1", [shown("secret")]))
    assert "secret" not in made(code("#| echo: false\nsecret = 1"))
    assert "secret" not in made(code("#| output: false\nf()", [shown("secret")]))


def test_relative_links_point_into_nbs():
    text = made(markdown(
        '![loss](images/loss.svg) [core](00a_core.ipynb#x) [log](../CHANGELOG.md) [out](https://a.org/b) [here](#top)\n'
        '<img src="images/a.png">\n```sh\n[kept](as/is)\n```'))
    assert "![loss](nbs/images/loss.svg) [core](nbs/00a_core.ipynb#x) [log](CHANGELOG.md) [out](https://a.org/b) [here](#top)" in text
    assert '<img src="nbs/images/a.png">' in text and "[kept](as/is)" in text


def test_picture_in_an_output_is_refused():
    picture = {"output_type": "display_data", "data": {"image/png": "x"}, "metadata": {}}
    with pytest.raises(SystemExit, match="nbs/images"):
        made(code("plot()", [picture]))


def test_markdown_output_is_kept():
    table = {"output_type": "display_data", "data": {"text/markdown": ["| a |"], "text/plain": ["x"]}, "metadata": {}}
    assert made(code("table", [table])).endswith("```\n\n| a |\n")


def test_command_is_taken_from_shell_blocks():
    assert run_command("```sh\npip install x && ftkit demo\n```\n```bash\n$ pip install x && ftkit test\n```") == "pip install x && ftkit test"


@pytest.mark.parametrize("text", ["", "ftkit test", "```python\nftkit test\n```", "```sh\nftkit test\n```\n```sh\na && ftkit test\n```"])
def test_no_or_two_commands_are_refused(text):
    with pytest.raises(SystemExit, match="exactly one test command"):
        run_command(text)
