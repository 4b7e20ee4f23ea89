"Whatever comes from data, a model, a file's name or a setting is shown as text: on pages, in terminals, in Markdown and in pictures."
import io
import logging
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from payloads import HTML, MATHTEXT, NAMES, PAYLOADS, TERMINAL, active, unprintable, write_run

from ftkit.cli import explain, run_report
from ftkit.curves import Curves, describe, draw, draw_png
from ftkit.data import BatchRow, BatchView, FtkitError, load_records, printable
from ftkit.doctor import diagnose
from ftkit.export import Certificate, Upload, modelfile
from ftkit.inference import Comparison, _turn_html, show
from ftkit.live import RunView, actions_html, chat_html, head_html, lens_html, notes_html, notice_html, progress_html, samples_html, stale_html, status_html
from ftkit.models import tiny_tokenizer
from ftkit.replay import Comparison as Runs
from ftkit.replay import timeline
from ftkit.report import write_model_card
from ftkit.train import _Bar
from ftkit.widgets import _says

each = pytest.mark.parametrize("text", PAYLOADS, ids=range(len(PAYLOADS)))


@pytest.mark.parametrize("page", HTML)
def test_the_check_sees_what_is_not_escaped(page):
    assert active(f"<p>{page}</p>") or "&" in page or page.startswith("]]>") or page.startswith('" on')


def test_the_check_sees_attributes_and_escapes():
    assert active('<p title="" onmouseover="x">') and active("<p>\x1b[31m</p>") and not active("<p title='javascript:x'>fine\u00a0</p>")
    assert unprintable("\x1b[31m\u202e") == ["'\\x1b'", "'\\u202e'"]


def view_of(folder: Path, text: str) -> RunView:
    write_run(folder, text)
    view = RunView(folder)
    view.poll()
    return view


@each
def test_panel(text, tmp_path):
    view = view_of(tmp_path / "run", text)
    turns = [dict(role="user", content=text, at=text), dict(role="assistant", content=text, at=text), dict(role="assistant", content="", at=text, refused=text)]
    pages = [head_html(view), progress_html(view), status_html(view), actions_html(view, [("1", text, text), ("2", "lr", text)]), notice_html(view, True), notes_html(view), stale_html(view, 1), samples_html(view),
             samples_html(view, whole=True), lens_html(view), lens_html(view, 0, "change", 1), lens_html(view, 0, "trained"), chat_html(turns, False), draw(view.curves), draw(view.curves, static=True, overlay=[view.curves], labels=[text, text])]
    view.silent = dict(error=text, traceback=text, advice=text)
    for page in [*pages, notice_html(view, False)]: assert not active(page), page[:400]
    assert printable(text)[:20] in printable(samples_html(view)) or _says(text)[:20] in samples_html(view)  # it is shown, as text
    if text in MATHTEXT + TERMINAL: draw_png(view.curves, overlay=[view.curves], labels=[text, text])
    assert not unprintable(describe(view.curves)) and not unprintable(run_report(tmp_path / "run")) and not unprintable(repr(timeline([])))


@pytest.mark.parametrize("name", NAMES)
def test_names_of_runs(name, tmp_path):
    view = view_of(tmp_path / name, name)
    for page in (head_html(view), notice_html(view), stale_html(view, 1), draw(view.curves)): assert not active(page)
    assert not unprintable(run_report(tmp_path / name))


@each
def test_rows(text):
    shown = BatchView([BatchRow(0, [(text, True), (text[:5], False), ("\n", True)], 3)])
    assert not active(shown._repr_html_()) and not unprintable(shown.terminal(False).replace("\t", "")) and text.isprintable() == (text in shown.terminal(False))


@each
def test_answers(text):
    shown = Comparison([text, "plain"], {text: [text, "a b"], "base": ["x " + text, "a c"], "\n" + text: [text, ""]})
    assert not active(shown._repr_html_()) and not unprintable(repr(shown))
    assert not active(shown.to_html(text), allowed=("<meta>",)) and not active(_turn_html(dict(role="user", content=text)))
    with redirect_stdout(io.StringIO()) as out: show([text])
    assert not unprintable(out.getvalue().replace("\t", ""))


@each
def test_compared_runs(text):
    curves = Curves()
    curves.take([dict(what="start", step=0, run=text), dict(what="step", step=1, loss=1.0)])
    shown = Runs([text, "b"], [curves, curves], {text: [text, 1]}, {"option": [text, None]})
    assert not active(shown._repr_html_()) and not unprintable(repr(shown))
    if text in MATHTEXT + TERMINAL: shown.figure.savefig(io.BytesIO(), format="png")


@each
def test_certificates_and_uploads(text):
    numbers = dict(effect=1.0, distance=1.0, drift=0.0, rounding=None, base_rounding=None, tokens=1, moved=1, kept=1.0, same_choice=1.0)
    shown = Certificate(form=text, base=text, rows_are=text, token_problems=[text], notes=[text], arithmetic=text, **numbers)
    assert not active(shown._repr_html_()) and not unprintable(repr(shown)) and not unprintable(repr(Upload("a/b", {text: 1})))


@each
def test_progress_and_messages(text, tmp_path, caplog):
    bar = object.__new__(_Bar)
    bar.name, bar.total = text, 3
    page = bar._page(1, text)
    assert not active(page["text/html"]) and not unprintable(page["text/plain"])
    assert not unprintable(str(FtkitError(text))) and not unprintable(explain(FtkitError(text))[1]) and not unprintable(explain(RuntimeError(text))[1])
    with caplog.at_level(logging.WARNING), pytest.raises(FtkitError) as error: load_records([{text: text}])
    assert not unprintable(str(error.value)) and not unprintable(caplog.text.rstrip("\n"))


@each
def test_the_doctors_report(text):
    report = diagnose([dict(instruction=text, output=text)] * 2, tiny_tokenizer(), max_length=4)
    assert report.findings and not any(unprintable(str(finding)) for finding in report.findings)
    assert not any(map(unprintable, repr(report).split("\n"))) and not active(report._repr_html_(), ("svg",))


MARKDOWN = MarkdownIt("commonmark", {"html": True}).enable("table")
INERT = {"<br>", "<b>", "</b>"}


def does_something(text: str) -> list[str]:
    "Links, pictures and HTML of a Markdown text, as a reader renders it."
    found = []
    for token in MARKDOWN.parse(text):
        for inner in [token, *(token.children or ())]:
            if inner.type in ("link_open", "image", "html_block", "html_inline") and inner.content not in INERT: found.append(f"{inner.type} {inner.attrs} {inner.content}")
    return found


def test_the_check_of_markdown_sees_what_does_something():
    assert len(does_something("[go](http://x) ![y](z) <i>b</i>")) == 4 and not does_something("a <b>c</b><br> \\[x\\](y)")


@each
def test_markdown(text, tmp_path):
    shown = Comparison([text], {text: [text], "base": ["x " + text]})
    assert not does_something(shown.to_markdown())
    facts = dict(base_model=text, method=text, license=text, license_name=text, license_link=text, title=text, data=text, note=text, picture=text, file=text, trained={text: text}, settings={text: text}, scores={text: {text: text}}, certificate={text: text})
    for form in ("adapter", "safetensors", "gguf"):
        card = write_model_card(tmp_path, {**facts, "form": form}).read_text(encoding="utf-8")
        head, body = card.removeprefix("---\n").split("\n---\n", 1)
        assert not does_something(body), body
        assert not unprintable(card) and "license: evil" not in head.split("\n") and body.count("```") == 2


def test_a_modelfile_holds_no_line_of_a_template():
    "What stands behind a licence or a template cannot become an instruction of its own."
    text, _ = modelfile(tiny_tokenizer(), "a.gguf", 100, license='x"""\nADAPTER /etc/passwd\n')
    assert "ADAPTER" not in text and [line.split()[0] for line in text.split("\n") if line and line.split()[0].isupper()][0] == "FROM"
