"""The browser of data in JupyterLab in a real browser. The tests share one page, in order."""
import json
import os
import sys
import time
from pathlib import Path

import lab
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
from tiny_tokenizers import family  # noqa: E402

EVIL = ["<img src=x onerror='window.hacked = 1'>", "<script>window.hacked = 2</script>", "[x](javascript:window.hacked=3)",
        "$\\alpha$ and \\(\\beta\\)", "\x1b[31mred\x1b[0m", "\u202egnp.exe"]
SHOWN = ["<img src=x onerror='window.hacked = 1'>", "<script>window.hacked = 2</script>", "[x](javascript:window.hacked=3)",
         "$\\alpha$ and \\(\\beta\\)", "\\x1b[31mred\\x1b[0m", "\\u202egnp.exe"]
IMPORTS = """\
from types import SimpleNamespace
from transformers import PreTrainedTokenizerFast
from ftkit.data import encode_data, load_records, show_batch
from ftkit.rows import browse

class Finding(SimpleNamespace): pass

def fix(data, findings):
    rows = {row for finding in findings for row in finding.rows}
    changes = [SimpleNamespace(row=row, check="placeholder", action="removed", before=data[row]["output"], after="") for row in sorted(rows)]
    return data.select([row for row in range(len(data)) if row not in rows]), changes"""
START = """\
tokenizer = PreTrainedTokenizerFast.from_pretrained("tokenizer")
findings = [Finding(check="placeholder", severity="warns", rows=[77, 200, 410], message="3 answers are placeholders: <b>TODO</b>", remedy="leave them out", fix="remove"),
            Finding(check="markup", severity="note", rows=[0, 1], message="2 rows hold markup", remedy="", fix=None)]
browser = browse("chats.jsonl", tokenizer, report=SimpleNamespace(findings=findings))
browser"""
LOOK = "show_batch(encode_data(load_records('chats.jsonl')[:6], tokenizer), tokenizer, rows=6)"


def write_records(path):
    "500 records; the first are hostile, three are placeholders."
    records = [dict(instruction=f"Question {number}: what is {number} and 1?", output=str(number + 1)) for number in range(500)]
    for number, text in enumerate(EVIL):
        records[number] = dict(instruction=text, output=text)
    for number in (77, 200, 410):
        records[number]["output"] = "TODO"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    if lab.find_chromium() is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(lab.MISSING)
    folder = tmp_path_factory.mktemp("lab")
    write_records(folder / "chats.jsonl")
    family("smollm2").save_pretrained(folder / "tokenizer")  # no model: a kernel that loads no torch starts sooner
    lab.write_notebook(folder / "rows.ipynb", IMPORTS, START)
    with lab.serve(folder, environment={"OMP_WAIT_POLICY": "passive"}) as server, lab.chromium() as browser:
        page = lab.open_notebook(browser, server, "rows.ipynb")
        page.errors, page.folder = [], folder
        page.page.on("pageerror", lambda error: page.errors.append(str(error)))
        run_all(page)
        yield page


def run_all(notebook):
    notebook.run_cell(0)
    notebook.run_cell(1)
    notebook.wait_idle(120)
    part(notebook, "next").wait_for()


def part(notebook, name, inside=""):
    return notebook.page.locator(f".ftk-{name} {inside}".strip()).last


def until(notebook, condition, what, seconds=30):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"not in time: {what}\n{part(notebook, 'rows-head').inner_text()}\n{part(notebook, 'rows-notice').inner_text()}"
        notebook.page.wait_for_timeout(30)
    return found


def titles(notebook):
    "The numbers of the rows on the page."
    texts = [part(notebook, f"row-title-{place}").inner_text() for place in range(5) if part(notebook, f"row-title-{place}").is_visible()]
    return [int(text.split()[1].replace(",", "")) for text in texts if text]


def shows(notebook, rows, what):
    until(notebook, lambda: titles(notebook) == rows, f"{what}: rows {rows}, there are {titles(notebook)}")


def enter(notebook, name, text):
    part(notebook, name, "input").fill(text)
    notebook.page.keyboard.press("Enter")


def marked(notebook):
    lines = [json.loads(line) for line in (notebook.folder / "chats.jsonl.marks.jsonl").read_text().splitlines()]
    return [(line["row"], line["marked"]) for line in lines]


def test_hostile_text_is_text(notebook):
    shows(notebook, [0, 1, 2, 3, 4], "the first page")
    part(notebook, "show", "select").select_option(label="record and tokens")
    for place, text in enumerate(SHOWN[:5]):
        until(notebook, lambda: part(notebook, f"row-{place}").inner_text().count(text) == 4, f"{text!r} in two fields, in question and answer")
    notebook.run(LOOK)
    batch = notebook.page.locator(".jp-OutputArea-output .ftk-batch").last
    batch.wait_for()
    notebook.page.wait_for_timeout(500)  # a formula is set a moment later
    assert all(text in batch.inner_text() for text in SHOWN) and "\u202e" not in notebook.page.content()
    assert notebook.page.locator("mjx-container, .MathJax").count() == 0, "a formula was set"
    assert notebook.page.evaluate("window.hacked") is None
    assert notebook.page.locator(":is(.ftk-panel, .ftk-batch) :is(script, img, a)").count() == 0


def test_pages_jumps_and_the_keyboard(notebook):
    part(notebook, "show", "select").select_option(label="tokens")
    part(notebook, "next").focus()
    notebook.page.keyboard.press("Space")
    shows(notebook, [5, 6, 7, 8, 9], "the next page by the space bar")
    enter(notebook, "jump", "410")
    shows(notebook, [410, 411, 412, 413, 414], "a jump")
    enter(notebook, "jump", "999")
    until(notebook, lambda: "the rows are 0 to 499" in part(notebook, "rows-notice").inner_text(), "no such row")
    unnamed = notebook.page.evaluate("""() => [...document.querySelectorAll('.ftk-panel :is(button, input, select, textarea)')].filter(
        part => !(part.textContent.trim() && part.tagName === 'BUTTON') && !part.title && !part.ariaLabel && ![...part.labels || []].some(label => label.textContent.trim())
    ).map(part => part.outerHTML)""")
    assert not unnamed


def test_filters_and_their_errors(notebook):
    enter(notebook, "find", "what is 33")
    shows(notebook, [33, 330, 331, 332, 333], "a text")
    part(notebook, "regex", "input").check()
    enter(notebook, "find", r"is 4[0-9] and|todo")
    shows(notebook, [40, 41, 42, 43, 44], "a pattern")
    until(notebook, lambda: "13 of 500 rows" in part(notebook, "rows-head").inner_text(), "how many")
    enter(notebook, "find", "[a")
    until(notebook, lambda: "missing ]" in part(notebook, "rows-notice").inner_text(), "what is wrong with the pattern")
    shows(notebook, [40, 41, 42, 43, 44], "nothing changes")
    part(notebook, "clear").click()
    shows(notebook, [0, 1, 2, 3, 4], "all")
    enter(notebook, "longest", "10")
    until(notebook, lambda: "0 of 500 rows" in part(notebook, "rows-head").inner_text(), "none is so short")
    part(notebook, "clear").click()
    until(notebook, lambda: titles(notebook), "all")


def test_a_finding_leads_to_its_rows(notebook):
    part(notebook, "show-0").click()
    shows(notebook, [77, 200, 410], "the finding's rows")
    until(notebook, lambda: "placeholder" in part(notebook, "row-title-0").inner_text(), "whose finding it is")
    assert "<b>TODO</b>" in part(notebook, "words-0").inner_text()


def test_a_fix_is_made_in_a_copy_and_taken_back(notebook):
    assert notebook.page.locator(".ftk-fix-0").count() == 1 and notebook.page.locator(".ftk-fix-1").count() == 0
    part(notebook, "fix-0").click()
    until(notebook, lambda: "0 rows changed, 3 removed" in part(notebook, "fixes-done").inner_text() and "row 410 removed" in part(notebook, "fixes-done").inner_text(), "what was done")
    assert notebook.run("print(len(browser.data), len(browser.rows), len(load_records('chats.jsonl')))") == "497 500 500\n"
    shows(notebook, [77, 200, 410], "the rows stay where they are")
    until(notebook, lambda: part(notebook, "fix-0").inner_text().strip() == "Undo", "it can be taken back")
    part(notebook, "fix-0").click()
    until(notebook, lambda: part(notebook, "fixes-done").inner_text().strip() == "", "taken back")
    assert notebook.run("print(len(browser.data))") == "500\n"


def test_a_mark_is_kept_beside_the_data_and_a_click_is_heard_while_a_cell_is_busy(notebook):
    notebook.add("import time; time.sleep(4)")
    notebook.run_cell(-1)
    until(notebook, lambda: "*" in notebook.prompts()[-1], "the cell runs")
    part(notebook, "row-mark-1").click()
    until(notebook, lambda: "marked for removal" in part(notebook, "row-title-1").inner_text(), "it says so")
    assert "*" in notebook.prompts()[-1], "heard only when the cell had ended"
    notebook.wait_idle()
    part(notebook, "row-mark-0").click()
    until(notebook, lambda: "2 marked" in part(notebook, "rows-head").inner_text(), "two")
    part(notebook, "row-mark-0").click()
    until(notebook, lambda: "1 marked" in part(notebook, "rows-head").inner_text(), "one again")
    assert marked(notebook) == [(200, True), (77, True), (77, False)]
    assert notebook.run("print(len(browser.data), len(load_records('chats.jsonl')))") == "499 500\n"


def test_pictures_at_two_widths_and_in_two_themes(notebook, pictures):
    for theme, name in ((lab.LIGHT, "light"), (lab.DARK, "dark")):
        notebook.theme(theme)
        for width in (1280, 800):
            notebook.resize(width)
            notebook.picture(pictures / f"rows-{name}-{width}.png", ".ftk-panel")
            outside = part(notebook, "panel").evaluate("""panel => [...panel.querySelectorAll('button, input, select, table, pre')].filter(
                part => part.offsetParent !== null && part.getBoundingClientRect().right > panel.getBoundingClientRect().right).map(part => part.outerHTML.slice(0, 200))""")
            assert not outside, f"at {width} pixels these leave the panel"
    notebook.theme(lab.LIGHT)
    notebook.resize(1280)


def test_a_restarted_kernel_has_the_marks(notebook):
    notebook.restart_kernel()
    notebook.page.evaluate(f"() => {lab.CURRENT}.content.widgets[1].model.outputs.clear()")
    run_all(notebook)
    until(notebook, lambda: "1 marked" in part(notebook, "rows-head").inner_text(), "the mark")
    part(notebook, "only-marked", "input").check()
    shows(notebook, [200], "the marked row")


def test_closed_it_leaves_its_page(notebook):
    notebook.run("browser.close()")
    until(notebook, lambda: notebook.page.locator(".ftk-next").count() == 0, "no buttons")
    left = [output["data"] for output in notebook.outputs(1) if "data" in output][-1]
    assert "row 200" in str(left["text/html"]) and "1 of 500 rows, 1 marked" in str(left["text/plain"]) and "widget-view" not in json.dumps(left)
    assert not notebook.errors
