"""The panel in JupyterLab in a real browser, over a real run of the demo model. The tests share one page and one run, in order."""
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import lab
import nbformat
import pytest
from nbclient import NotebookClient

from ftkit.control import read_journal

EVIL = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
IMPORTS = "from ftkit.live import panel\nfrom ftkit.lora import add_lora\nfrom ftkit.models import load_model, tiny_model\nfrom ftkit.train import Run"
WAITING = {"OMP_WAIT_POLICY": "passive"}  # browser, server and kernel share few cores: torch's threads are not to spin while they wait
START = f"""
EVIL = {EVIL!r}
colors = dict(grass="green", sky="blue", snow="white", coal="black", blood="red", lemon="yellow")
records = [dict(instruction="Name the color.", input=thing, output=color) for thing, color in colors.items()]
held_out = [dict(instruction="Name the color.", input="fire " + EVIL, output="orange")]
model, tokenizer = load_model("smollm2-135m")
run = Run(add_lora(model, rank=2), tokenizer, records, held_out, name="colors", max_steps=5000, per_device_train_batch_size=1,
          max_length=128, learning_rate=2e-4, warmup_steps=0, logging_steps=1, save_steps=8, eval_steps=1000)
run.start()
run
"""
ELSEWHERE = """
import sys, time
from transformers import TrainerCallback
from ftkit.models import tiny_model
from ftkit.train import Run

class Slowly(TrainerCallback):
    def on_step_end(self, *args, **kwargs): time.sleep(0.2)

records = [dict(instruction="Say it.", input=word, output=word) for word in "a few short words for a tiny model".split()]
Run(*tiny_model("llama"), records, None, root=sys.argv[1], name="elsewhere", callbacks=(Slowly(),), quiet=True,
    max_steps=5000, per_device_train_batch_size=1, logging_steps=1, save_steps=1000).fit()
"""
HEADLESS = """
records = [dict(instruction="Say it.", input=word, output=word) for word in "a few short words for a tiny model".split()]
run = Run(*tiny_model("llama"), records, name="small", quiet=True, max_steps=5, per_device_train_batch_size=1, logging_steps=1)
run.start()
run"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lab")


@pytest.fixture(scope="module")
def elsewhere(folder):
    "The folder of a run that another process trains."
    with open(folder / "elsewhere.log", "wb") as log:
        process = subprocess.Popen([sys.executable, "-c", ELSEWHERE, str(folder / "runs")], cwd=folder, env=os.environ | WAITING, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    yield folder / "runs" / "elsewhere"
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def notebook(folder, elsewhere):
    "A notebook in the browser, with the run started and its panel shown."
    if lab.find_chromium() is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(lab.MISSING)
    lab.write_notebook(folder / "panel.ipynb", IMPORTS, START)
    with lab.serve(folder, environment=WAITING) as server, lab.chromium() as browser:
        page = lab.open_notebook(browser, server, "panel.ipynb")
        page.errors = []
        page.page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.run_cell(0)
        page.run_cell(1)
        page.wait_idle(180)
        part(page, "plot", "svg").wait_for()
        yield page


@pytest.fixture(scope="module")
def run(folder):
    return folder / "runs" / "colors"


# ---- helpers

def part(notebook, name, inside=""):
    "A part of the panel that was shown last; the picture in its place is hidden while it lives."
    seen = ":visible" if name == "panel" else ""
    return notebook.page.locator(f".ftk-{name}{seen} {inside}".strip()).last


def until(notebook, condition, what, seconds=60):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"not in time: {what}\n{part(notebook, 'actions').inner_text()}\n{part(notebook, 'notice').inner_text()}"
        notebook.page.wait_for_timeout(50)
    return found


def events(folder, what):
    return [event for event in read_journal(folder) if event["what"] == what]


def steps(folder):
    return [event["step"] for event in events(folder, "step")]


def answered(folder, action):
    return [event for event in events(folder, "control") if event["action"] == action]


def shown_step(notebook):
    return int(re.search(r"step ([\d,]+)", part(notebook, "state").inner_text())[1].replace(",", ""))


def goes_on(notebook, folder, count=2):
    "Wait for further steps."
    done = len(steps(folder))
    until(notebook, lambda: len(steps(folder)) >= done + count, "further steps")


def label(notebook):
    return part(notebook, "pause").inner_text().strip()


def press(notebook, name, says, folder, action):
    "Press a button, wait until its request is answered and the panel says so; give the answer."
    before = len(answered(folder, action))
    part(notebook, name).click()
    until(notebook, lambda: len(answered(folder, action)) > before, f"an answer to {action}")
    until(notebook, lambda: says in part(notebook, "actions").inner_text(), f"{says!r} in the list of actions")
    return answered(folder, action)[-1]


def pause(notebook, folder):
    if label(notebook) == "Pause":
        press(notebook, "pause", "pause: applied at step", folder, "pause")
    until(notebook, lambda: label(notebook) == "Resume", "the button says Resume")


def resume(notebook, folder):
    if label(notebook) == "Resume":
        press(notebook, "pause", "resume: applied at step", folder, "resume")
    until(notebook, lambda: label(notebook) == "Pause", "the button says Pause")


# ---- the tests

def test_the_plot_moves_without_a_jump_and_other_cells_run(notebook, run):
    notebook.page.evaluate("""() => {
        const plot = [...document.querySelectorAll('.ftk-plot')].at(-1)
        window.heights = new Set([plot.offsetHeight]), window.pictures = 0
        new MutationObserver(() => { window.pictures += 1; window.heights.add(plot.offsetHeight) }).observe(plot, {childList: true, subtree: true})
    }""")
    goes_on(notebook, run, 1)
    before = part(notebook, "plot", "svg").get_attribute("aria-label")
    assert notebook.run("print(6 * 7)") == "42\n"
    until(notebook, lambda: part(notebook, "plot", "svg").get_attribute("aria-label") != before, "another picture")
    until(notebook, lambda: notebook.page.evaluate("window.pictures") >= 3, "three pictures")
    assert len(notebook.page.evaluate("[...window.heights]")) == 1
    assert re.match(r"Curves of colors, step \d+: loss [\d.]+ \([\d.]+ smoothed\), held-out loss", part(notebook, "plot", "svg").get_attribute("aria-label"))
    assert "running" in part(notebook, "state").inner_text() and shown_step(notebook) >= 1


def test_pause_holds_within_a_step_and_resume_goes_on(notebook, run):
    answer = press(notebook, "pause", "pause: applied at step", run, "pause")
    assert sum(event["time"] > answer["asked"] for event in events(run, "step")) <= 1
    until(notebook, lambda: label(notebook) == "Resume", "the button says Resume")
    held = steps(run)
    notebook.page.wait_for_timeout(1500)
    assert steps(run) == held and "paused" in part(notebook, "state").inner_text()
    resume(notebook, run)
    goes_on(notebook, run)


def test_by_keyboard_alone_and_all_controls_have_names(notebook, run):
    part(notebook, "stop").focus()
    notebook.page.keyboard.press("Shift+Tab")
    assert notebook.page.evaluate("document.activeElement.classList.contains('ftk-pause')")
    notebook.page.keyboard.press("Space")
    until(notebook, lambda: label(notebook) == "Resume", "paused by the space bar")
    unnamed = notebook.page.evaluate("""() => [...document.querySelectorAll('.ftk-panel :is(button, input, select, textarea)')].filter(
        part => !(part.textContent.trim() && part.tagName === 'BUTTON') && !part.title && !part.ariaLabel && ![...part.labels || []].some(label => label.textContent.trim())
    ).map(part => part.outerHTML)""")
    assert not unnamed
    resume(notebook, run)


def test_a_click_is_heard_while_another_cell_is_busy(notebook, run):
    notebook.add("import time; time.sleep(8)")
    notebook.run_cell(-1)
    until(notebook, lambda: "*" in notebook.prompts()[-1], "the cell runs")
    pause(notebook, run)
    assert "*" in notebook.prompts()[-1], "heard only when the cell had ended"
    resume(notebook, run)
    notebook.wait_idle()


def test_the_learning_rate(notebook, run):
    part(notebook, "lr-exact", "input").fill("3e-5")
    answer = press(notebook, "lr-set", "learning rate 3e-5: applied at step", run, "lr")
    until(notebook, lambda: events(run, "step")[-1]["step"] > answer["step"], "a step with it")
    assert {event["learning_rate"] for event in events(run, "step") if event["step"] > answer["step"]} == {3e-5}
    part(notebook, "lr", ".noUi-handle").focus()
    notebook.page.keyboard.press("ArrowRight")
    until(notebook, lambda: part(notebook, "lr-exact", "input").input_value() not in ("3e-5", ""), "the slider moves the number")
    part(notebook, "lr-exact", "input").fill("11")
    notebook.page.keyboard.press("Enter")
    until(notebook, lambda: "above 0 and below 10" in part(notebook, "actions").inner_text(), "a rate of 11 is refused")
    press(notebook, "lr-schedule", "learning rate back to the schedule: applied at step", run, "lr")
    goes_on(notebook, run, 1)
    assert events(run, "step")[-1]["learning_rate"] == events(run, "step")[-1]["scheduled_learning_rate"]


def test_checkpoint_and_evaluation_at_once(notebook, run):
    step = press(notebook, "checkpoint", "checkpoint: applied at step", run, "checkpoint")["step"]
    assert (run / f"checkpoint-{step}").is_dir()
    step = press(notebook, "evaluate", "evaluate: applied at step", run, "evaluate")["step"]
    assert step in [event["step"] for event in events(run, "evaluate")]


def test_samples_show_text_and_never_run_it(notebook, run):
    pause(notebook, run)
    step = press(notebook, "sample", "sample: applied at step", run, "sample")["step"]
    until(notebook, lambda: f"step {step}" in part(notebook, "samples").inner_text(), "the sample's column")
    assert "fire <script>window.hacked = 1</script>" in part(notebook, "samples").inner_text()
    notebook.run("answers_of, run._answers_of = run._answers_of, lambda prompts, *more: ['generated ' + EVIL] * len(prompts)")
    part(notebook, "prompts", "textarea").fill("What would you run?")
    press(notebook, "sample", "sample: applied at step", run, "sample")
    until(notebook, lambda: "generated <script>" in part(notebook, "samples").inner_text(), "the generated text")
    part(notebook, "prompts", "textarea").fill("")
    notebook.run("run._answers_of = answers_of")
    for tab, name, says in (("Loss lens", "lens", "fire <script>window.hacked"), ("Samples", "samples", "generated <script>")):
        notebook.page.locator(".ftk-panel .lm-TabBar-tab", has_text=tab).last.click()
        until(notebook, lambda: says in part(notebook, name).inner_text(), f"{tab} as text")
    assert notebook.page.evaluate("window.hacked") is None
    assert notebook.page.locator(".ftk-panel :is(script, img)").count() == 0


def test_pictures_at_two_widths_and_in_two_themes(notebook, pictures, run):
    pause(notebook, run)
    texts = set()
    for theme, name in ((lab.LIGHT, "light"), (lab.DARK, "dark")):
        notebook.theme(theme)
        texts.add(part(notebook, "plot", "svg text").evaluate("text => getComputedStyle(text).fill"))
        for width in (1280, 800):
            notebook.resize(width)
            notebook.picture(pictures / f"panel-{name}-{width}.png", ".ftk-panel:visible")
            outside = part(notebook, "panel").evaluate("""panel => [...panel.querySelectorAll('button, input, select, textarea, svg, table, .ftk-facts span')].filter(
                part => part.offsetParent !== null && part.getBoundingClientRect().right > panel.getBoundingClientRect().right).map(part => part.outerHTML.slice(0, 200))""")
            assert not outside, f"at {width} pixels these leave the panel"
    assert len(texts) == 2, "the plot's texts keep their colour when the theme changes"
    notebook.theme(lab.LIGHT)
    notebook.resize(1280)


def test_rewind(notebook, run):
    until(notebook, lambda: steps(run)[-1] > 8, "a step after the first checkpoint")
    pause(notebook, run)
    before, target = shown_step(notebook), 8
    part(notebook, "rewind").click()
    until(notebook, lambda: "choose a step first" in part(notebook, "actions").inner_text() and not events(run, "rewind"), "no step is chosen by itself")
    part(notebook, "rewind-step", "select").select_option(str(target))
    part(notebook, "rewind").click()
    back = until(notebook, lambda: events(run, "rewind"), "the rewind")[-1]
    assert (back["step"], back["back_from"]) == (target, before)
    until(notebook, lambda: f"rewind to step {target}: applied at step {before}" in part(notebook, "actions").inner_text(), "said so")
    until(notebook, lambda: shown_step(notebook) < before, "an earlier step is shown")
    until(notebook, lambda: f"step {before}" not in part(notebook, "samples").inner_text(), "samples of later steps are gone")
    until(notebook, lambda: label(notebook) == "Resume" and shown_step(notebook) == target, "still paused, at that step")
    resume(notebook, run)
    goes_on(notebook, run, 1)


def test_shown_twice_closed_and_shown_again(notebook, run):
    shown = notebook.page.locator(".ftk-panel:visible")
    notebook.run("run")
    until(notebook, lambda: shown.count() == 2, "two views")
    pause(notebook, run)
    until(notebook, lambda: {text.strip() for text in notebook.page.locator(".ftk-pause").all_inner_texts()} == {"Resume"}, "both say Resume")
    resume(notebook, run)
    notebook.run("panel(run).close()")
    until(notebook, lambda: notebook.page.locator(".ftk-pause").count() == 0, "no buttons")
    assert notebook.page.locator(".ftk-panel:visible svg").count() == 2, "pictures take their place"
    goes_on(notebook, run, 1)
    notebook.run("run")
    pause(notebook, run)
    notebook.save()
    notebook.load()
    until(notebook, lambda: notebook.page.locator(".ftk-pause").count() == 1, "the panel after the page was loaded again")
    resume(notebook, run)
    goes_on(notebook, run, 1)


def test_a_run_of_another_process(notebook, elsewhere):
    until(notebook, lambda: steps(elsewhere), "the other process trains")
    notebook.run(f"panel({str(elsewhere)!r})")
    until(notebook, lambda: shown_step(notebook) >= 1, "its steps")
    assert part(notebook, "branch").is_disabled() and "Run.open" in part(notebook, "branch").get_attribute("title")
    pause(notebook, elsewhere)
    held = steps(elsewhere)
    notebook.page.wait_for_timeout(600)
    assert steps(elsewhere) == held
    resume(notebook, elsewhere)
    press(notebook, "stop", "stop: applied at step", elsewhere, "stop")
    until(notebook, lambda: "stopped" in part(notebook, "state").inner_text(), "it has stopped")


def test_a_restarted_kernel_takes_the_run_up(notebook, run):
    notebook.restart_kernel()
    trained = steps(run)[-1]  # read when the old kernel is gone: it trains on until then
    notebook.run(IMPORTS)
    notebook.run("run = Run.open('runs/colors')\nrun", 180)
    assert label(notebook) == "Resume"
    assert re.search("interrupted|process gone", part(notebook, "state").inner_text()), "gone: a step took longer than the server waits"
    stale = notebook.page.locator(".ftk-stale").first
    until(notebook, lambda: stale.evaluate("part => getComputedStyle(part).visibility") == "visible", "the old panel says that it is stale")
    part(notebook, "pause").click()
    until(notebook, lambda: len(events(run, "resume")) == 1 and label(notebook) == "Pause", "the run goes on", 120)
    assert 0 < events(run, "resume")[-1]["step"] <= trained, "no step that was not trained"
    goes_on(notebook, run)


def test_stop_keeps_an_adapter_that_plain_peft_loads(notebook, run, pictures):
    press(notebook, "stop", "stop: applied at step", run, "stop")
    until(notebook, lambda: "stopped" in part(notebook, "state").inner_text(), "it has stopped")
    until(notebook, lambda: any("stopped" in str(output["data"].get("text/html")) for output in notebook.outputs(-1) if "data" in output), "the cell keeps the final state")
    notebook.picture(pictures / "panel-stopped.png", ".ftk-panel:visible")
    from peft import PeftModel

    from ftkit.models import load_model
    base, tokenizer = load_model("smollm2-135m")
    loaded = PeftModel.from_pretrained(base, run / "adapter")
    changed = [weight for name, weight in loaded.named_parameters() if "lora_B" in name]
    assert len(changed) > 0 and all(weight.abs().max() > 0 for weight in changed)
    assert not notebook.errors


def test_branch_goes_on_in_a_run_of_its_own_and_both_are_drawn(notebook, run, pictures):
    target, twig = 8, run.with_name("twig")
    part(notebook, "rewind-step", "select").select_option(str(target))
    part(notebook, "branch-lr", "input").fill("5e-5")
    part(notebook, "branch-name", "input").fill("twig")
    part(notebook, "branch-options", "input").fill("max_steps=4000")
    trained = steps(run)
    part(notebook, "branch").click()
    until(notebook, lambda: twig.is_dir() and steps(twig), "steps of the branch", 120)
    assert steps(twig)[0] == target + 1 and events(twig, "step")[0]["learning_rate"] == pytest.approx(5e-5, rel=0.01)
    until(notebook, lambda: f"branch into twig: applied at step {target}" in part(notebook, "actions").inner_text(), "said so")
    assert events(twig, "plan")[-1]["total"] == 4000
    until(notebook, lambda: "twig" in (part(notebook, "plot", "svg").get_attribute("aria-label") or ""), "the panel shows the branch")
    drawn = lambda: part(notebook, "plot").inner_text()
    until(notebook, lambda: "this run" in drawn() and "colors" in drawn(), "both curves with their names")
    assert events(run, "branch")[-1]["into"] == "twig" and steps(run) == trained
    notebook.picture(pictures / "panel-branch.png", ".ftk-panel:visible")
    press(notebook, "stop", "stop: applied at step", twig, "stop")
    until(notebook, lambda: (twig / "adapter" / "adapter_model.safetensors").exists(), "the branch's adapter")
    assert not notebook.errors


def test_opened_again_without_its_kernel_the_notebook_shows_the_picture(notebook, pictures):
    live = notebook.page.locator(".ftk-panel:visible").count()
    shown = lambda: [str(output["data"].get("text/html")) for output in notebook.outputs(-1) if "data" in output]
    until(notebook, lambda: any("stopped" in page and "twig" in page for page in shown()), "the cell keeps the branch's final state")
    notebook.save()
    notebook.restart_kernel()
    notebook.load()
    until(notebook, lambda: notebook.page.locator("text=model not found").count() > 0, "the widgets are gone")
    left = notebook.page.locator(".ftk-panel:visible")
    until(notebook, lambda: left.count() >= live, "pictures in their place")
    assert notebook.page.locator(".ftk-pause").count() == 0
    assert "stopped" in left.last.inner_text() and "twig" in left.last.inner_text() and left.last.locator("svg").count() == 1
    notebook.picture(pictures / "panel-saved.png", ".ftk-panel:visible")


@pytest.mark.parametrize("start, steps", [(HEADLESS, 5), (START.replace("max_steps=5000", "max_steps=3"), 3)], ids=["tiny", "the browser's own"])
def test_without_a_browser_the_notebook_holds_a_picture(tmp_path, start, steps):
    sources = [IMPORTS, start, "run.wait()\nprint(run.state)"]
    headless = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    NotebookClient(headless, timeout=300, kernel_name="python3", store_widget_state=False, resources={"metadata": {"path": str(tmp_path)}}).execute()
    held = [output["data"] for output in headless.cells[1].outputs if "<svg" in output.get("data", {}).get("text/html", "")]
    assert len(held) == 1 and "finished" in held[0]["text/html"] and f"step {steps} of {steps}" in held[0]["text/html"]
    assert re.match(rf"\w+: finished. Curves of \w+, step {steps}: loss", held[0]["text/plain"])
    assert "widgets" not in headless.metadata and "<script" not in json.dumps(headless.cells[1].outputs)
