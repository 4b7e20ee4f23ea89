"""The chat box in JupyterLab in a real browser, with the demo model. The tests share one page, in order."""
import os
import time

import lab
import pytest

EVIL = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
IMPORTS = "import time\nimport ftkit.inference\nfrom ftkit.inference import chat\nfrom ftkit.models import load_model"
START = f"EVIL = {EVIL!r}\nmodel, tokenizer = load_model('smollm2-135m')\nbox = chat(model, tokenizer)\nbox"


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    if lab.find_chromium() is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(lab.MISSING)
    folder = tmp_path_factory.mktemp("lab")
    lab.write_notebook(folder / "chat.ipynb", IMPORTS, START)
    with lab.serve(folder, environment={"OMP_WAIT_POLICY": "passive"}) as server, lab.chromium() as browser:
        page = lab.open_notebook(browser, server, "chat.ipynb")
        page.errors = []
        page.page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.run_cell(0)
        page.run_cell(1)
        page.wait_idle(180)
        part(page, "chat-input", "input").wait_for()
        yield page


def part(notebook, name, inside=""):
    return notebook.page.locator(f".ftk-{name} {inside}".strip()).last


def until(notebook, condition, what, seconds=60):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"not in time: {what}\n{part(notebook, 'talk').inner_text()}\n{part(notebook, 'chat-notice').inner_text()}"
        notebook.page.wait_for_timeout(50)
    return found


def past(notebook):
    return part(notebook, "chat-past").inner_text()


def now(notebook):
    return part(notebook, "chat-now").inner_text()


def ask(notebook, text):
    part(notebook, "chat-input", "input").fill(text)
    notebook.page.keyboard.press("Enter")


def answered(notebook):
    until(notebook, lambda: not now(notebook) and part(notebook, "chat-stop").is_disabled(), "the answer is done")


def test_what_is_asked_is_answered_while_the_cell_is_done(notebook):
    assert "*" not in notebook.prompts()[1]
    ask(notebook, "What is the capital of France?")
    until(notebook, lambda: "capital of France is Paris" in past(notebook), "the answer")
    assert part(notebook, "chat-input", "input").input_value() == ""
    assert notebook.page.evaluate("document.activeElement.closest('.ftk-chat-input') !== null"), "the next message can be typed at once"


def test_it_streams_and_stops_and_other_cells_run(notebook):
    ask(notebook, "Tell me a very long story about the sea.")
    seen = set()
    until(notebook, lambda: seen.add(now(notebook)) or len({text for text in seen if len(text) > 20}) >= 4, "four states of one answer")
    assert notebook.run("print(6 * 7)") == "42\n"
    assert now(notebook), "still being written"
    part(notebook, "chat-stop").click()
    answered(notebook)
    assert "the model · stopped" in past(notebook)


def test_a_click_is_heard_while_a_cell_is_busy(notebook):
    ask(notebook, "Tell me another very long story.")
    until(notebook, lambda: len(now(notebook)) > 20, "it has begun")
    notebook.add("time.sleep(6)")
    notebook.run_cell(-1)
    until(notebook, lambda: "*" in notebook.prompts()[-1], "the cell runs")
    part(notebook, "chat-stop").click()
    answered(notebook)
    assert "*" in notebook.prompts()[-1], "heard only when the cell had ended"
    notebook.wait_idle()


def test_text_is_text(notebook):
    notebook.run("real = ftkit.inference.stream\ndef spoken(*args, **more):\n    yield EVIL[:12]\n    yield EVIL[12:]\nftkit.inference.stream = spoken")
    ask(notebook, EVIL)
    until(notebook, lambda: past(notebook).count("<script>window.hacked = 1</script>") == 2, "both as text")
    notebook.run("ftkit.inference.stream = real")
    assert notebook.page.evaluate("window.hacked") is None
    assert notebook.page.locator(".ftk-panel :is(script, img)").count() == 0


def test_settings_by_keyboard_and_all_controls_have_names(notebook):
    part(notebook, "chat-input", "input").focus()
    for _ in range(4):  # send, (stop is disabled,) new conversation, settings
        notebook.page.keyboard.press("Tab")
        if notebook.page.evaluate("document.activeElement.classList.contains('ftk-chat-more')"):
            break
    notebook.page.keyboard.press("Space")
    until(notebook, lambda: part(notebook, "chat-system", "textarea").is_visible(), "the settings")
    unnamed = notebook.page.evaluate("""() => [...document.querySelectorAll('.ftk-panel :is(button, input, select, textarea)')].filter(
        part => !(part.textContent.trim() && part.tagName === 'BUTTON') && !part.title && !part.ariaLabel && ![...part.labels || []].some(label => label.textContent.trim())
    ).map(part => part.outerHTML)""")
    assert not unnamed
    part(notebook, "chat-system", "textarea").fill("You answer with one word.")
    part(notebook, "chat-temperature", "input").fill("0.7")
    notebook.page.keyboard.press("Tab")
    until(notebook, lambda: notebook.run("print(box.chat_temperature.value, box.chat_system.value)") == "0.7 You answer with one word.\n", "the kernel knows")


def test_a_new_conversation_and_the_end_in_sight(notebook):
    part(notebook, "chat-clear").click()
    until(notebook, lambda: "Nothing was said yet" in past(notebook), "forgotten")
    part(notebook, "chat-temperature", "input").fill("0")
    notebook.page.keyboard.press("Tab")
    for number in range(4):
        ask(notebook, f"Name {number + 3} animals, one a line.")
        until(notebook, lambda: past(notebook).count("the model") == number + 1, "an answer", 120)
    talk = part(notebook, "talk")
    assert talk.evaluate("talk => talk.scrollHeight > talk.clientHeight && Math.abs(talk.scrollTop) < 2"), "its end is shown"


def test_pictures_at_two_widths_and_in_two_themes(notebook, pictures):
    for theme, name in ((lab.LIGHT, "light"), (lab.DARK, "dark")):
        notebook.theme(theme)
        for width in (1280, 800):
            notebook.resize(width)
            notebook.picture(pictures / f"chat-{name}-{width}.png", ".ftk-panel")
            outside = part(notebook, "panel").evaluate("""panel => [...panel.querySelectorAll('button, input, textarea, .ftk-turn')].filter(
                part => part.offsetParent !== null && part.getBoundingClientRect().right > panel.getBoundingClientRect().right).map(part => part.outerHTML.slice(0, 200))""")
            assert not outside, f"at {width} pixels these leave the box"
    notebook.theme(lab.LIGHT)
    notebook.resize(1280)


def test_closed_it_leaves_the_conversation(notebook):
    notebook.run("box.close()")
    until(notebook, lambda: notebook.page.locator(".ftk-chat-send").count() == 0, "no buttons")
    assert any("Name 3 animals" in str(output["data"].get("text/html")) for output in notebook.outputs(1) if "data" in output)
    assert not notebook.errors
