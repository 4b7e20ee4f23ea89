"""What strangers write, in JupyterLab in a real browser: everything that shows it, on one page, and nothing of it comes to life.

The unit tests look at the text of every page (tests/test_payloads.py); this one asks the browser what it made of it.
"""
import os
from pathlib import Path

import lab
import pytest

TESTS = Path(__file__).parent.parent
IMPORTS = """import json
from pathlib import Path
from payloads import PAYLOADS, write_run
from ftkit.curves import Curves
from ftkit.data import FtkitError, encode_data, show_batch
from ftkit.export import Certificate
from ftkit.inference import Chat, Comparison
from ftkit.live import panel
from ftkit.models import tiny_tokenizer
from ftkit.replay import Comparison as Runs
from IPython.display import HTML, display"""
SHOWN = [
    # a run whose name, settings, journal, samples and lens are payloads
    """folder = Path("runs", "<img src=x onerror=window.pwned=1>")
for text in PAYLOADS[:20]: write_run(folder, text)
lines = [json.dumps(dict(prompt=text, answer=text, at="now")) for text in PAYLOADS]
(folder / "samples" / "step-000001.jsonl").write_text("\\n".join(lines))
for step in (1, 2): (folder / f"checkpoint-{step}").mkdir()
shown = panel(folder)
shown.ask("pause", source=PAYLOADS[0])
shown._turns += [dict(role=role, content=text, at=text, id="") for text in PAYLOADS for role in ("user", "assistant")]
with shown._lock: shown._refresh_files()
shown""",
    """display(HTML(shown._picture()["text/html"]))""",
    # rows, answers, runs, a certificate
    """records = [dict(instruction=text, output=text) for text in PAYLOADS]
tokenizer = tiny_tokenizer()
show_batch(encode_data(records, tokenizer), tokenizer, rows=len(records))""",
    """Comparison(PAYLOADS, {"<b>one": PAYLOADS, "two": PAYLOADS[::-1]})""",
    """curves = Curves()
curves.take([dict(what="start", step=0, run=PAYLOADS[1]), *(dict(what="step", step=i, loss=1.0 / i) for i in range(1, 9)), dict(what="alarm", step=3, kind=PAYLOADS[0])])
Runs(PAYLOADS[:2], [curves, curves], {text: PAYLOADS[:2] for text in PAYLOADS}, {})""",
    """numbers = dict(effect=1.0, distance=1.0, drift=0.0, rounding=None, base_rounding=None, tokens=1, moved=1, kept=1.0, same_choice=1.0)
Certificate(form=PAYLOADS[0], base=PAYLOADS[1], rows_are=PAYLOADS[2], token_problems=PAYLOADS, notes=PAYLOADS, **numbers)""",
    # a conversation with a model that answers payloads, without a model
    """box = Chat(None, tokenizer, system=PAYLOADS[5])
box.turns += [dict(role=role, content=text) for text in PAYLOADS for role in ("user", "assistant")]
box._now, box._trouble = PAYLOADS[1], PAYLOADS[0]
box._refresh()
box""",
    """raise FtkitError(" ".join(PAYLOADS))""",
]
ALIVE = """() => [...document.querySelectorAll('.jp-OutputArea-output *')].flatMap(node => [
    ...(['SCRIPT', 'IFRAME', 'OBJECT', 'EMBED', 'LINK', 'BASE', 'FORM', 'MATH', 'META', 'TITLE'].includes(node.tagName.toUpperCase()) && node.namespaceURI !== 'http://www.w3.org/2000/svg' ? [node.outerHTML] : []),
    ...[...node.attributes].filter(one => one.name.startsWith('on') || /^\\s*javascript:/i.test(one.value) && one.name !== 'title').map(one => `${node.tagName} ${one.name}=${one.value}`),
    ...(node.tagName === 'IMG' && !node.src.startsWith('data:') ? [node.outerHTML] : []), ...(node.textContent.includes('@import') && node.tagName === 'STYLE' ? [node.outerHTML] : [])])"""


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    if lab.find_chromium() is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(lab.MISSING)
    folder = tmp_path_factory.mktemp("lab")
    lab.write_notebook(folder / "hostile.ipynb", IMPORTS, *SHOWN)
    environment = {"OMP_WAIT_POLICY": "passive", "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    with lab.serve(folder, environment=environment) as server, lab.chromium() as browser:
        page = lab.open_notebook(browser, server, "hostile.ipynb")
        page.asked, page.dialogs, own = [], [], server.url.split("//")[1]
        page.page.on("request", lambda request: page.asked.append(request.url) if own not in request.url and not request.url.startswith(("data:", "blob:")) else None)
        page.page.on("dialog", lambda dialog: (page.dialogs.append(dialog.message), dialog.dismiss()))
        for index in range(len(SHOWN) + 1): page.run_cell(index), page.wait_idle(120)
        yield page


def still_nothing(notebook):
    assert notebook.page.evaluate("window.pwned === undefined")
    assert notebook.page.evaluate(ALIVE) == [] and notebook.asked == [] and notebook.dialogs == []


def test_everything_is_shown(notebook):
    for index in range(1, len(SHOWN)):
        kinds = [output["output_type"] for output in notebook.outputs(index)]
        assert kinds and "error" not in kinds, notebook.text(index)
    error = notebook.outputs(len(SHOWN))[0]
    assert error["ename"] == "FtkitError" and not [c for c in error["evalue"] if not c.isprintable()]
    assert "<script>window.pwned=1</script>" in notebook.page.locator(".jp-OutputArea-output").nth(0).inner_text() + notebook.page.locator(".ftk-wide").last.inner_text()


def test_nothing_of_it_comes_to_life(notebook):
    notebook.page.locator(".ftk-panel").first.wait_for()
    still_nothing(notebook)


def test_nor_in_the_tabs_of_the_panel(notebook):
    tabs = notebook.page.locator(".ftk-panel .lm-TabBar-tab, .ftk-panel .p-TabBar-tab")
    assert tabs.count() >= 3
    for index in range(tabs.count()):
        tabs.nth(index).click()
        notebook.page.wait_for_timeout(150)
        still_nothing(notebook)


def test_nor_after_a_reload(notebook):
    notebook.save()
    notebook.load()
    notebook.page.locator(".ftk-wide").last.wait_for()
    still_nothing(notebook)


def test_the_canary_of_this_page_can_sing(notebook):
    notebook.run("from IPython.display import HTML\nHTML('<img src=x onerror=\"window.pwned=1\">')")
    notebook.page.wait_for_function("window.pwned === 1", timeout=10_000)
    assert notebook.page.evaluate(ALIVE) != []
