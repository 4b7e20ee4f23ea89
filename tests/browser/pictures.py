"""Take the pictures of the panel and of the data browser that the docs show.

    python tests/browser/pictures.py              # into nbs/images; some ten minutes on two cores
    python tests/browser/pictures.py --only rows  # those of the data browser alone: a minute
    python tests/browser/pictures.py --out FOLDER

The demo's model is really trained, in JupyterLab in the system's Chromium, with the demo's own settings; all that the
pictures show was pressed and typed there. Needs Chromium and Playwright, see lab.py.
"""
import argparse
import tempfile
from pathlib import Path

import lab
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent.parent
WIDTH, SCALE = 1120, 1.3  # of the window in CSS pixels, and of the pictures to these; the panel has about 930 of them
PREPARE = """\
from ftkit.demo import DEMO, tickets
from ftkit.live import panel
from ftkit.lora import add_lora
from ftkit.models import load_model
from ftkit.train import Run

def as_chat(record):
    parts = dict(system=record["instruction"], user=record["input"], assistant=record["output"])
    return {"messages": [dict(role=role, content=text) for role, text in parts.items()]}

model, tokenizer = load_model("smollm2-135m")
train, held_out = ([as_chat(record) for record in records] for records in tickets())
short = sorted(held_out, key=lambda record: len(record["messages"][1]["content"]))
model = add_lora(model, rank=16, targets="all-linear")
run = Run(model, tokenizer, train, short[10:20], name="tickets", prompts=short[10:12], **{**DEMO, "eval_steps": 0.2, "save_steps": 0.2})"""
TABS = ".ftk-panel > .widget-tab"
SHOW = "run.start()\nrun"
BROWSE = """\
from ftkit.data import train_test_split
from ftkit.demo import tickets
from ftkit.models import load_model
from ftkit.rows import browse

model, tokenizer = load_model("smollm2-135m")
records = tickets()[0][:60]
records[7]["output"], records[21]["output"], records[33]["output"] = "TODO", "As an AI, I cannot do that.", "TODO"  # mistakes, put in for the picture"""
SHOW_ROWS = "browser = browse(records, tokenizer, model=model, marks='tickets.marks.jsonl')\nbrowser"
QUESTION = "My vacuum VC-20-1187 has stopped charging since the update. I am furious. What now?"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "nbs" / "images", metavar="FOLDER", help="where the pictures go")
    parser.add_argument("--only", choices=["panel", "rows"], help="only these pictures")
    given = parser.parse_args()
    for name, prepare, show, pictures in (("panel", PREPARE, SHOW, take_pictures), ("rows", BROWSE, SHOW_ROWS, take_rows)):
        if given.only in (None, name):
            in_lab(prepare, show, pictures, given.out)


def in_lab(prepare: str, show: str, pictures, out: Path):
    "A notebook of two cells in JupyterLab, the first of them run."
    with tempfile.TemporaryDirectory(prefix="ftkit-pictures-", ignore_cleanup_errors=True) as folder:
        lab.write_notebook(Path(folder) / "pictures.ipynb", prepare, show)
        with lab.serve(Path(folder)) as server, lab.chromium() as browser:
            notebook = lab.open_notebook(browser, server, "pictures.ipynb", width=WIDTH, height=1000, scale=SCALE)
            notebook.run_cell(0)
            notebook.wait_idle(300)
            pictures(notebook, out)
            notebook.close()


def take_rows(notebook, out: Path):
    "Find, mark, and look at the losses."
    page = notebook.page
    notebook.run_cell(1)
    page.locator(".ftk-next").last.wait_for(timeout=120_000)
    page.locator(".ftk-regex input").check()
    page.locator(".ftk-find input").fill("TODO|As an AI")
    page.keyboard.press("Enter")
    page.locator(".ftk-row-title-2", has_text="row 33").wait_for()
    press(page, "row-mark-0")
    page.locator(".ftk-row-title-0", has_text="marked for removal").wait_for()
    page.mouse.move(0, 0)
    take(notebook, out / "rows-found.png", ".ftk-panel:visible")
    press(page, "clear")
    page.locator(".ftk-row-title-0", has_text="row 0").wait_for()
    page.locator(".ftk-order select").select_option(label="highest loss first")
    page.wait_for_function("document.querySelector('.ftk-row-title-0').textContent.match(/^row (7|21|33) /)", timeout=300_000)
    page.locator(".ftk-show select").select_option(label="tokens by loss")
    for place in range(5):
        page.locator(f".ftk-row-title-{place}", has_text="nats each").wait_for(timeout=120_000)
    page.wait_for_timeout(1000)
    page.mouse.move(0, 0)
    take(notebook, out / "rows-loss.png", ".ftk-panel:visible", above=".ftk-slot:nth-child(4)")


def take_pictures(notebook, out: Path):
    "Train, and do what the tutorial tells."
    page = notebook.page
    notebook.run_cell(1)
    wait_for_step(page, 8)
    set_rate(page, "1.2e-3")
    wait_for_step(page, 20)
    page.mouse.move(0, 0)
    take(notebook, out / "panel-running.png", ".jp-CodeCell", above=TABS)
    press(page, "pause")
    page.locator(".ftk-state", has_text="paused").wait_for(timeout=120_000)
    take(notebook, out / "panel-samples.png", TABS)
    open_tab(page, "Chat")
    chat(page, "the base")
    chat(page, "the model now")
    take(notebook, out / "panel-paused.png", ".ftk-panel:visible")
    open_tab(page, "Loss lens")
    page.locator(".ftk-lens-mode select").select_option(label="change since step")
    page.locator(".ftk-lens-since select").select_option(label="0")
    page.locator(".ftk-tokens").last.evaluate("tokens => { tokens.scrollTop = tokens.scrollHeight }")
    take(notebook, out / "panel-lens.png", TABS)
    open_tab(page, "Samples")
    branch(page, "6", "4e-4", "tickets-gentle")
    page.locator(".ftk-state", has_text="tickets-gentle").wait_for(timeout=300_000)
    wait_for_step(page, 26)
    take(notebook, out / "panel-branch.png", ".ftk-panel:visible", above=TABS)


def wait_for_step(page, step: int):
    page.wait_for_function("step => Number((document.querySelector('.ftk-state')?.textContent.match(/step (\\d+)/) ?? [])[1]) >= step", arg=step, timeout=900_000)


def press(page, name: str): page.locator(f".ftk-{name}").last.click()


def set_rate(page, rate: str):
    page.locator(".ftk-lr-exact input").fill(rate)
    press(page, "lr-set")


def open_tab(page, title: str):
    page.get_by_role("tab", name=title).last.click()
    page.wait_for_timeout(500)


def chat(page, at: str):
    "Say the question to one of the models, and wait for its answer."
    turns = page.locator(".ftk-turn").count()
    page.locator(".ftk-chat-at select").select_option(label=at)
    page.locator(".ftk-chat-input input").fill(QUESTION)
    press(page, "chat-send")
    page.wait_for_function("count => { const turns = [...document.querySelectorAll('.ftk-turn')]; return turns.length === count && turns.every(turn => !turn.textContent.endsWith('…')) }",
                           arg=turns + 2, timeout=120_000)


def branch(page, step: str, rate: str, name: str):
    page.locator(".ftk-rewind-step select").select_option(label=step)
    page.locator(".ftk-branch-lr input").fill(rate)
    page.locator(".ftk-branch-name input").fill(name)
    press(page, "branch")


def take(notebook, path: Path, selector: str, above: str | None = None):
    "A picture of an element, or of what of it is above another; in 256 colours, which halves the file and shows in nothing."
    lower = notebook.page.locator(above).last.bounding_box()["y"] - notebook.page.locator(selector).last.bounding_box()["y"] if above else None
    notebook.picture(path, selector)
    picture = Image.open(path).convert("RGB")
    if above:
        picture = picture.crop((0, 0, picture.width, int(lower * SCALE)))
    picture.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB", flush=True)


if __name__ == "__main__":
    main()
