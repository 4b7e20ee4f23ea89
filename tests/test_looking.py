"""Marks that two processes make at once, the real batch of a run, and data that no page could hold."""
import json
import subprocess
import sys

import pytest
from datasets import Dataset

from ftkit.data import FtkitError, encode, encode_data, show_batch
from ftkit.doctor import diagnose
from ftkit.lens import show_losses
from ftkit.models import tiny_model
from ftkit.rows import browse, find_rows, read_marks, row_key, without_marked
from ftkit.sources import load_data
from ftkit.train import Run

MARKER = """
import sys
from pathlib import Path
from types import SimpleNamespace
from ftkit.rows import RowBrowser
rows = [dict(input_ids=[number], labels=[number]) for number in range(400)]
browser = RowBrowser(rows, SimpleNamespace(decode=lambda ids, **options: "x"), path=Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for number in range(int(sys.argv[2]), 400, 2): browser._mark([number], True)
for number in range(int(sys.argv[2]), 400, 4): browser._mark([number], False)
"""


def test_two_processes_mark_at_once_and_no_mark_is_lost(tmp_path):
    path = tmp_path / "marks.jsonl"
    both = [subprocess.Popen([sys.executable, "-c", MARKER, path, str(first)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for first in (0, 1)]
    assert [process.stdout.readline() for process in both] == ["ready\n"] * 2
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in both:
        process.communicate(timeout=120)
        assert process.returncode == 0
    rows = [dict(input_ids=[number], labels=[number]) for number in range(400)]
    assert sorted(mark["row"] for mark in read_marks(path)) == [number for number in range(400) if number % 4 > 1]
    assert [row["input_ids"][0] % 4 for row in without_marked(rows, path)] == [0, 1] * 100


def test_two_browsers_of_one_kernel_see_each_other(tmp_path):
    records = [dict(instruction=str(number), output="x") for number in range(9)]
    tokenizer = tiny_model()[1]
    one, other = (browse(form, tokenizer, marks=tmp_path / "marks.jsonl") for form in (records, Dataset.from_list(records)))
    one.row_mark_0.click(), other.row_mark_1.click(), one.row_mark_2.click()
    other.next.click()
    assert sorted(one._marked) == sorted(other._marked) == [0, 1, 2]
    other.previous.click(), other.row_mark_0.click(), one.next.click()
    assert sorted(one._marked) == [1, 2] and len(one.data) == len(other.data) == 7
    one.close(), other.close()


@pytest.mark.parametrize("change", [lambda rows: rows[::-1], lambda rows: rows[1:], lambda rows: [dict(instruction="new", output="y"), *rows], lambda rows: [{**row, "extra": None} for row in rows]])
def test_marks_find_their_rows_again(change):
    records = [dict(instruction=str(number), output="x") for number in range(20)]
    marks = [dict(row=number, hash=row_key(records[number])) for number in (3, 7)]
    for form in (list, Dataset.from_list):
        left = without_marked(form(change(records)), marks)
        assert len(left) == len(change(records)) - 2 and not {"3", "7"} & {row["instruction"] for row in left}


def test_of_two_equal_rows_one_is_marked():
    twins = [dict(instruction="a", output="b")] * 3
    assert len(without_marked(twins, [dict(row=1, hash=row_key(twins[0]))])) == 2


def test_the_real_batch_of_a_run_is_shown_with_its_seams(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, tokenizer = tiny_model()
    records = [dict(instruction=f"Say {number}.", output=f"<{number}>" * (1 + number % 7)) for number in range(16)]
    run = Run(model, tokenizer, records, packing=True, max_length=160, max_steps=1).fit()
    batch = next(iter(run.trainer.get_train_dataloader()))
    shown = show_losses(model, tokenizer, batch)
    rows = [encode(record, tokenizer) for record in records]
    pieces = [row.ids[start:end] for row in shown.rows for start, end in zip(row.starts, [*row.starts[1:], len(row.ids)])]
    assert max(len(row.starts) for row in shown.rows) > 1 and all(list(piece) in [row["input_ids"] for row in rows] for piece in pieces)
    assert sum(row.padding for row in shown.rows) == (batch["attention_mask"] == 0).sum()
    assert "sample 2 of" in shown._repr_html_() and "<1>" not in shown._repr_html_()
    alone = {tuple(row["input_ids"]): show_losses(model, tokenizer, [row]).rows[0].trained_losses() for row in rows}
    assert shown.rows[0].trained_losses() == pytest.approx([loss for piece in pieces[:len(shown.rows[0].starts)] for loss in alone[tuple(piece)]], rel=1e-4)


def test_a_pattern_cannot_hang_and_a_row_of_many_tokens_is_no_page_of_many():
    tokenizer = tiny_model()[1]
    long = [dict(instruction="a" * 30_000 + "!", output="b")]
    assert find_rows(long, r"^(a|aa)+$", regex=True) == [] and find_rows(long, r"(a*)*!", regex=True) == [0]
    page = show_batch(encode_data(long, tokenizer, max_length=None), tokenizer)._repr_html_()
    assert "tokens not shown" in page and page.count("<span") < 4100 and "<u>b</u>" in page


def test_the_findings_of_the_doctor_lead_to_rows_and_are_fixed_in_a_copy():
    tokenizer = tiny_model()[1]
    records = [dict(instruction=f"What is {number} and 1?", output=f"It is {number + 1}.") for number in range(30)]
    records[4]["output"], records[9], records[17]["output"] = "TODO", dict(records[8]), "It is \x07 18."
    browser = browse(records, tokenizer, diagnose(records, tokenizer))
    placed = {finding.check: place for place, finding in enumerate(browser.findings)}
    wanted = {"placeholder_answers": [4], "exact_duplicates": [9], "control_characters": [17]}
    for check, rows in wanted.items():
        getattr(browser, f"show_{placed[check]}").click()
        assert browser.found.tolist() == rows and check in browser.row_title_0.value
        getattr(browser, f"fix_{placed[check]}").click()
    assert not browser.rows_notice.value and len(browser.data) == 28 and {change.row for change in browser.changes} == {4, 9, 17}
    assert "1 rows changed, 2 removed" in browser.fixes_done.value and browser.data[15]["output"] == "It is  18." and records[4]["output"] == "TODO"
    browser.close()


def test_no_file_but_the_marks_is_written(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(dict(instruction=str(number), output="x")) + "\n" for number in range(8)))
    before = file.read_bytes()
    browser = browse(file, tiny_model()[1])
    browser.find.value = "3"
    browser.mark_all.click()
    assert file.read_bytes() == before and [path.name for path in tmp_path.iterdir() if path != file] == ["data.jsonl.marks.jsonl"]
    assert len(browser.data) == 7 and len(without_marked(load_data(file, quiet=True), tmp_path / "data.jsonl.marks.jsonl")) == 7
    browser.close()


def test_the_marks_beside_a_file_are_no_data(tmp_path):
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(dict(instruction=str(number), output="x")) + "\n" for number in range(6)))
    model, tokenizer = tiny_model()
    browse(file, tokenizer).mark_all.click()
    assert (tmp_path / "chats.jsonl.marks.jsonl").exists()
    assert len(load_data(tmp_path, quiet=True)) == 6 and len(load_data(tmp_path, quiet=True, skip_bad=False)) == 6


def test_a_report_of_other_data_is_refused(tmp_path):
    records = [dict(instruction=str(number), output="x" * (number != 2)) for number in range(9)]
    file = tmp_path / "odd.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    tokenizer = tiny_model()[1]
    with pytest.raises(FtkitError, match="the report is of 9 rows, and odd.jsonl has 8"):
        browse(file, tokenizer, diagnose(records, tokenizer))


@pytest.mark.parametrize("data", [[dict(text="x")], Dataset.from_list([dict(text="x")]), "rows.jsonl", [1, 2]])
def test_records_are_no_batch(data):
    with pytest.raises(FtkitError, match="no encoded rows"):
        show_batch(data, tiny_model()[1])


@pytest.mark.parametrize("number", ["3", 2.5, None, 99])
def test_a_row_that_is_not_there(number):
    _, tokenizer = tiny_model()
    with pytest.raises(FtkitError, match="is not there; the data has 1 rows"):
        show_batch([encode(dict(instruction="a", output="b"), tokenizer)], tokenizer, rows=[number])


def test_a_template_that_asks_the_clock_gets_the_fixed_date():
    _, tokenizer = tiny_model()
    tokenizer.chat_template = "{{ strftime_now(\"%d %B %Y\") }}" + tokenizer.chat_template
    row = encode(dict(instruction="a", output="b"), tokenizer)
    assert tokenizer.decode(row["input_ids"]).startswith("26 July 2024")


def test_marks_that_fit_no_row_are_counted(tmp_path):
    records = [dict(instruction=str(number), output="x") for number in range(9)]
    tokenizer = tiny_model()[1]
    browse(records, tokenizer, marks=tmp_path / "marks.jsonl").mark_all.click()
    assert "3 marks fit no row" in browse(records[:6], tokenizer, marks=tmp_path / "marks.jsonl")._head()
