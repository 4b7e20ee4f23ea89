"""Encoded rows are kept by content and stream from their file; a stranger's template is tried under limits."""
import json
import logging
import os
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import pytest
from tiny_tokenizers import FAMILIES, TEMPLATES, family

import ftkit.data
from ftkit.data import FtkitError, cache_dir, encode, encode_data, encode_prompt, fingerprint, rows_without_trained_tokens

ROWS = [{"instruction": f"{i}+1?", "output": f"{i + 1}"} for i in range(1500)]
TAKEN = "1,500 rows taken from the cache"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    "A cache folder of its own, in which the templates of the families count as tried."
    known = cache_dir() / "templates"
    for name in FAMILIES: encode({"instruction": "a", "output": "b"}, family(name))
    monkeypatch.setenv("FTKIT_CACHE", str(tmp_path))
    if known.is_dir(): os.symlink(known, tmp_path / "templates")
    return tmp_path / "encoded"


def told(caplog):
    lines = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return lines


# ---- the cache

def test_second_time_from_the_cache(cache, caplog):
    tokenizer = family("smollm2")
    limit = len(encode_prompt(ROWS[0], tokenizer)) + 1   # longer questions leave no room for an answer
    first = encode_data(ROWS, tokenizer, max_length=limit)
    said = told(caplog)
    again = encode_data(iter(ROWS), tokenizer, max_length=limit)
    assert told(caplog) == [f"{TAKEN}: the same records were encoded with this tokenizer before", *said] and len(said) == 1
    assert first[:] == again[:] and again[1499] == encode(ROWS[1499], tokenizer, max_length=limit) and len(list(cache.iterdir())) == 1
    assert first.cache_files and again.cache_files, "rows are read from the file, not held"


@pytest.mark.parametrize("change", ["a record", "the order", "the limit", "the template", "a token", "control tokens"])
def test_any_change_is_another_name(cache, caplog, change):
    tokenizer, rows, options = family("smollm2"), list(ROWS), {}
    encode_data(rows, tokenizer)
    if change == "a record": rows[700] = rows[700] | {"output": "?"}
    if change == "the order": rows[0], rows[1] = rows[1], rows[0]
    if change == "the limit": options["max_length"] = 1023
    if change == "the template": tokenizer.chat_template += "{# #}"
    if change == "a token": tokenizer.add_tokens(["+1?"])
    if change == "control tokens": options["control_tokens"] = True
    told(caplog)
    encode_data(rows, tokenizer, **options)
    assert not any(TAKEN in line for line in told(caplog)) and len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("damage", ["cut", "flipped", "no rows", "no facts", "torn facts", "other facts"])
def test_damaged_cache_is_encoded_anew(cache, caplog, damage):
    tokenizer = family("smollm2")
    whole = fingerprint(encode_data(ROWS, tokenizer))
    [place] = cache.iterdir()
    rows, facts = place / "rows.arrow", place / "facts.json"
    raw = rows.read_bytes()
    if damage == "cut": rows.write_bytes(raw[:len(raw) // 2])
    if damage == "flipped": rows.write_bytes(raw[:5000] + bytes([raw[5000] ^ 1]) + raw[5001:])
    if damage == "no rows": rows.unlink()
    if damage == "no facts": facts.unlink()
    if damage == "torn facts": facts.write_text(facts.read_text()[:20])
    if damage == "other facts": facts.write_text("[1]")
    told(caplog)
    assert fingerprint(encode_data(ROWS, tokenizer)) == whole
    assert told(caplog) == ["the cached rows are damaged and are encoded anew"]
    encode_data(ROWS, tokenizer)
    assert TAKEN in told(caplog)[0]


def test_a_bad_row_leaves_nothing(cache):
    with pytest.raises(FtkitError, match="^row 1400: field 'output' is empty"):
        encode_data([*ROWS[:1400], {"instruction": "x", "output": " "}], family("smollm2"))
    assert list(cache.iterdir()) == []


def test_without_a_cache_folder(cache, monkeypatch, tmp_path):
    whole = fingerprint(encode_data(ROWS, family("smollm2")))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FTKIT_CACHE", str(tmp_path / "file" / "below"))
    data = encode_data(ROWS, family("smollm2"))
    assert fingerprint(data) == whole and not data.cache_files


ENCODE = """
import json, sys
sys.path[:0] = json.loads(sys.argv[1])
from tiny_tokenizers import family
from ftkit.data import encode_data, fingerprint
sys.stdin.readline()
print(fingerprint(encode_data([{"instruction": f"{i}+1?", "output": f"{i + 1}"} for i in range(1500)], family("smollm2"))))
"""


def test_two_processes_at_once(cache):
    start = [sys.executable, "-c", ENCODE, json.dumps([str(Path(__file__).parent), str(Path(ftkit.data.__file__).parents[1])])]
    both = [subprocess.Popen(start, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both: process.stdin.write("go\n"), process.stdin.flush()
    results = [process.communicate(timeout=120)[0].strip() for process in both]
    assert results == [fingerprint(encode_data(ROWS, family("smollm2")))] * 2
    assert [place.name[0] != "." for place in cache.iterdir()] == [True], "one set of rows, and nothing half written"


# ---- memory and arrays

def test_memory_stays_flat(cache):
    "Four times the rows, the same memory: what Python and numpy hold at most while a data set streams through."
    from datasets import Dataset
    tokenizer, most = family("smollm2"), []
    for count in (2000, 8000):
        rows = Dataset.from_dict({"instruction": [f"{i}+1?" for i in range(count)], "output": [f"{i + 1}" for i in range(count)]})
        rows.select(range(5)).to_list()
        tracemalloc.start()
        encode_data(rows, tokenizer)
        most.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert most[1] < 1.6 * most[0], most


def test_datasets_and_lists_are_the_same(cache):
    from datasets import Dataset
    tokenizer = family("smollm2")
    records = Dataset.from_list(ROWS)
    assert fingerprint(encode_data(records, tokenizer)) == fingerprint(encode_data(ROWS, tokenizer)) == fingerprint(encode_data(iter(ROWS), tokenizer))
    limit = len(encode_prompt(ROWS[0], tokenizer)) + 1
    data = encode_data(records, tokenizer, max_length=limit)
    alone = [encode(record, tokenizer, max_length=limit) for record in ROWS]
    assert rows_without_trained_tokens(data) == rows_without_trained_tokens(alone) != []
    assert fingerprint(data) == fingerprint(alone) and fingerprint(data.select([3, 1, 2])) == fingerprint([alone[3], alone[1], alone[2]])


# ---- templates of strangers

@pytest.mark.parametrize("template, reason", [
    ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "does not end within 3 seconds"),
    ("{% set big = 'x' * 10**11 %}{{ messages[0].content }}", "more than 4 GiB"),
    ("{% if messages | length > 3 %}{% for i in range(9999) %}{{ 'x' * 1000 }}{% endfor %}{% endif %}", "more than a million characters"),
    ("{{ 9 ** (9 ** (9 ** 9)) }}", "does not end within 3 seconds"),
])
def test_hostile_templates_are_refused(cache, template, reason):
    "Within seconds, by name, on a thread as well as on the main one."
    tokenizer, caught = family("smollm2"), []
    tokenizer.chat_template = template

    def ask():
        try: encode_prompt({"instruction": "Hi"}, tokenizer)
        except FtkitError as error: caught.append(str(error))

    (worker := threading.Thread(target=ask)).start(), worker.join()
    [message] = caught
    assert reason in message and template[:20] in message and "\n" not in message


def test_templates_of_the_families_pass_and_are_tried_once(cache, monkeypatch):
    (cache.parent / "templates").unlink(missing_ok=True)
    ftkit.data._try_template.cache_clear()
    calls, run = [], subprocess.run
    monkeypatch.setattr(ftkit.data.subprocess, "run", lambda *args, **options: calls.append(1) or run(*args, **options))
    for name in ("qwen3", "gemma"): encode_prompt({"instruction": "Hi"}, family(name)), encode_prompt({"instruction": "Ho"}, family(name))
    assert len(calls) == 2 and len(list((cache.parent / "templates").iterdir())) == 2
    ftkit.data._try_template.cache_clear()   # as another process
    for name in ("qwen3", "gemma"): encode_prompt({"instruction": "Hi"}, family(name))
    assert len(calls) == 2
