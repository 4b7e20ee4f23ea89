"""ftkit.sources on what people and programs put into files: broken, hostile, huge, and merely unusual."""
import gzip
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ftkit.data import FtkitError, answer_of, load_records, plain_record, to_messages, train_test_split
from ftkit.sources import load_data

GOOD = {"instruction": "2+2?", "output": "4"}
LINE = json.dumps(GOOD).encode()
BAD = b'{"instruction": "2+2?"}'
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FTKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def rejects(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- one bad record among good ones: kept with file, line, reason and text

DEEP = b'{"instruction": "a", "output": "b", "x": ' + b"[" * 3000 + b"]" * 3000 + b"}"
BAD_RECORDS = {
    "broken UTF-8": (b'{"instruction": "Z\xfcrich", "output": "x"}', "byte 0xfc in column 19 is not UTF-8"),
    "duplicate keys": (b'{"instruction": "a", "output": "b", "output": "c"}', "'output' stands there twice"),
    "duplicate keys inside": (b'{"instruction": "a", "output": "b", "x": {"k": 1, "k": 2}}', "'k' stands there twice"),
    "trailing comma inside": (b'{"instruction": "a", "output": "b",}', "not valid JSON"),
    "trailing comma behind": (LINE + b",", "not valid JSON: Extra data"),
    "NaN": (b'{"instruction": "a", "output": "b", "x": NaN}', "NaN is not JSON"),
    "Infinity": (b'{"instruction": "a", "output": "b", "x": -Infinity}', "-Infinity is not JSON"),
    "lone surrogate": (b'{"instruction": "a", "output": "\\ud83d"}', "half of a surrogate pair"),
    "lone surrogate in another field": (b'{"instruction": "a", "output": "b", "id": "\\ud83d"}', "field 'id' holds half of a surrogate pair"),
    "lone surrogate in a name": (b'{"instruction": "a", "output": "b", "\\ud83d": 1}', "half of a surrogate pair"),
    "lone surrogate in a tool": (b'{"messages": [{"role": "user", "content": "a", "name": "\\udc00"}, {"role": "assistant", "content": "b"}]}', "half of a surrogate pair"),
    "deep nesting": (DEEP, "not valid JSON|nested too deep"),
    "ten thousand brackets": (b"{" + b'"a": {' * 10_000, "not valid JSON"),
    "a number of 5000 digits": (b'{"instruction": "a", "output": "b", "n": ' + b"9" * 5000 + b"}", "not valid JSON"),
    "nested nulls": (b'{"messages": [null, {"role": null, "content": null}]}', r"'messages\[0\]' is null, not an object"),
    "a message of nulls": (b'{"messages": [{"role": "user", "content": null}]}', r"'messages\[0\].content' is missing"),
    "all null": (b'{"instruction": null, "output": null}', "its fields are none"),
    "a list": (b'["a"]', "the record is a list"),
    "a number": (b"7", "the record is a number"),
    "a NUL": (b'{"instruction": "a\x00"}', "not valid JSON: Invalid control character"),
    "binary": (bytes(range(128, 256)), "is not UTF-8"),
    "an escape sequence for a role": (b'{"messages": [{"role": "\\u001b[2J", "content": "x"}]}', "the roles are"),
    "another schema": (b'{"question": "a", "answer": "b"}', "its fields are question, answer"),
    "two formats, late": (b'{"instruction": "a", "output": "b", "messages": []}', "it may be messages or alpaca"),
    "a preference": (b'{"prompt": "a", "chosen": "b", "rejected": "c"}', "preference training"),
    "a picture": (b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "is of type 'image'; only text"),
    "half a history": (b'{"instruction": "a", "output": "b", "history": [["x"]]}', r"'history\[0\]' is no pair"),
    "tools that are none": (b'{"instruction": "a", "output": "b", "tools": "{"}', "field 'tools' is not valid JSON"),
    "null content and no tool": (b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": null}]}', r"'messages\[1\].content' is missing"),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_one_bad_record_is_kept(tmp_path, name):
    bad, reason = BAD_RECORDS[name]
    path, good = write(tmp_path, "data.jsonl", b"\n".join([LINE] * 120 + [bad, LINE])), [GOOD] * 121
    assert load_data(path, rejected=tmp_path / "deep" / "bad.jsonl", quiet=True).to_list() == good
    [kept] = rejects(tmp_path / "deep" / "bad.jsonl")
    import re
    assert kept["file"] == "data.jsonl" and kept["line"] == 121 and re.search(reason, kept["error"]) and "\n" not in kept["error"]
    assert kept["text"] == bad.decode("utf-8", "backslashreplace")
    with pytest.raises(FtkitError, match=f"data.jsonl: line 121: .*({reason})"):
        load_data(path, skip_bad=False)
    if name not in ("two formats, late", "lone surrogate in another field", "lone surrogate in a name", "lone surrogate in a tool"):   # which load_records takes: it makes no table
        with pytest.raises(FtkitError, match=f"data.jsonl: line 121: .*({reason})"):
            load_records(path)


# ---- files that are read although they are unusual

LONG = {"instruction": "a", "output": "b" * 10_000_000}
UNUSUAL = {
    "BOM and CRLF": ("x.jsonl", b"\xef\xbb\xbf" + LINE + b"\r\n\r\n  \r\n" + LINE, [GOOD] * 2),
    "a 10 MB line": ("x.jsonl", LINE + b"\n" + json.dumps(LONG).encode() + b"\n" + LINE, [GOOD, LONG, GOOD]),
    "a 10 MB line in a list": ("x.json", json.dumps([GOOD, LONG, GOOD]).encode(), [GOOD, LONG, GOOD]),
    "a list in a gzip": ("x.json.gz", gzip.compress(b"\xef\xbb\xbf" + json.dumps([GOOD] * 3, indent=2).encode()), [GOOD] * 3),
    "gzip by its bytes": ("x.jsonl", gzip.compress(LINE), [GOOD]),
    "two gzips, one behind the other": ("x.jsonl.gz", gzip.compress(LINE + b"\n") + gzip.compress(LINE), [GOOD] * 2),
    "lines in a .json": ("x.json", LINE + b"\n" + LINE, [GOOD] * 2),
    "unicode line ends are none": ("x.jsonl", json.dumps({"instruction": "a\u2028b", "output": "c\x85"}, ensure_ascii=False).encode(), [{"instruction": "a\u2028b", "output": "c\x85"}]),
    "CSV with quotes, newlines, NUL": ("x.csv", b'\xef\xbb\xbfinstruction,output\r\n"a ""b""\r\nc","d,e"\r\n\r\nf\x00,g\r\n', [{"instruction": 'a "b"\r\nc', "output": "d,e"}, {"instruction": "f\0", "output": "g"}]),
    "CSV with semicolons": ("x.csv", b"instruction;output\na;b\n", [{"instruction": "a", "output": "b"}]),
    "TSV in a gzip": ("x.tsv.gz", gzip.compress(b"instruction\toutput\na, b\tc\n"), [{"instruction": "a, b", "output": "c"}]),
    "CSV with a 10 MB cell": ("x.csv", b"instruction,output\na," + b"b" * 10_000_000 + b"\n", [LONG]),
    "CSV with a nameless column": ("x.csv", b",instruction,output\n0,a,b\n", [{"column 1": "0", "instruction": "a", "output": "b"}]),
    "an empty name": ("x.jsonl", b'{"": 1, "instruction": "a", "output": "b"}', [{"": 1, "instruction": "a", "output": "b"}]),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_files_are_read(tmp_path, name):
    file, content, records = UNUSUAL[name]
    data = load_data(write(tmp_path, file, content), skip_bad=False, quiet=True)
    assert [plain_record(row) for row in data] == records


# ---- files that are refused, in one line that names them

HALF = gzip.compress(b"\n".join(json.dumps({**GOOD, "id": os.urandom(20).hex()}).encode() for _ in range(500)))
REFUSED = {
    "an empty file": ("x.jsonl", b"", "no record in it"),
    "an empty CSV": ("x.csv", b"", "no record in it"),
    "a CSV of a header": ("x.csv", b"instruction,output\n", "no record in it"),
    "an empty gzip": ("x.jsonl.gz", gzip.compress(b""), "no record in it"),
    "a gzip of no bytes": ("x.jsonl.gz", b"", "no record in it"),
    "a gzip that breaks off": ("x.jsonl.gz", HALF[:len(HALF) // 2], "the gzip file breaks off"),
    "a list whose gzip breaks off": ("x.json.gz", gzip.compress(json.dumps([GOOD] * 9).encode())[:-9], "the gzip file breaks off|not valid JSON|cannot be read on"),
    "a gzip with a wrong byte": ("x.jsonl.gz", HALF[:200] + b"\x00\x01\x02\x03" + HALF[204:], r"the file cannot be read on|breaks off|more bad records"),
    "a gzip with junk behind it": ("x.jsonl.gz", gzip.compress(LINE) + b"junk", "cannot be read on"),
    "a gzip that is none": ("x.jsonl.gz", LINE, "the file is not gzip"),
    "a Parquet that is none": ("x.parquet", b"PAR1 no", "is not Parquet"),
    "an empty Parquet": ("x.parquet", b"", "is not Parquet"),
    "an Arrow that is none": ("x.arrow", b"ARROW1 no", "is not Arrow"),
    "an Arrow stream that is none": ("x.arrow", LINE, "is not Arrow"),
    "an empty Arrow": ("x.arrow", b"", "is not Arrow"),
    "UTF-16": ("x.jsonl", (LINE.decode() + "\n").encode("utf-16") * 3, "line 1: byte 0xff in column 1 is not UTF-8"),
    "UTF-16 CSV": ("x.csv", "instruction,output\na,b\n".encode("utf-16"), "line 1: the header is no text in UTF-8"),
    "one object over lines": ("x.json", json.dumps({"data": [GOOD]}, indent=1).encode(), "one JSON object over several lines"),
    "records under a key": ("x.json", json.dumps({"data": [GOOD]}).encode(), "its fields are data"),
    "a list with a comma at its end": ("x.json", b"[" + LINE + b",\n]", "line 2: not valid JSON: a comma before the end"),
    "a list without an end": ("x.json", b"[" + LINE, "line 1: not valid JSON: expected a comma"),
    "a list and more": ("x.json", b"[" + LINE + b"] 7", "more text after the end"),
    "a list with a wrong byte": ("x.json", b"[" + LINE + b",\n \"\xff\"]", "line 2: byte 0xff in column 3 is not UTF-8"),
    "a header twice": ("x.csv", b"output,output\na,b\n", "column 'output' stands there twice"),
    "binary CSV": ("x.csv", bytes(range(256)) * 4, "line 1: "),
    "mostly bad": ("x.jsonl", b"\n".join([LINE] + [BAD] * 3), "more bad records than good ones .3 of the first 4.*line 2: field 'output' is missing"),
    "a text file": ("x.txt", b"Once", "a file of this kind is not read; JSON"),
    "a spreadsheet": ("x.xlsx", b"PK", "a file of this kind is not read"),
    "a Parquet in a gzip": ("x.parquet.gz", gzip.compress(b"PAR1"), "a file of this kind is not read"),
    "a question and an answer": ("x.jsonl", b'{"question": "a", "answer": "b"}', r"columns=\{'question': 'prompt', 'answer': 'completion'\}"),
    "columns of languages": ("x.csv", b"en,de\nHello,Hallo\n", r"columns=\{'en': 'prompt', 'de': 'completion'\}"),
    "two formats": ("x.jsonl", b'{"instruction": "a", "output": "b", "conversations": []}', "it may be sharegpt or alpaca.*format='sharegpt'"),
    "preferences": ("x.jsonl", b'{"prompt": "a", "chosen": "b", "rejected": "c"}', "preference training"),
    "a million names": ("x.jsonl", b"\n".join(json.dumps({**GOOD, f"f{i}": i}).encode() for i in range(1100)), "more than 1000 different fields"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_files(tmp_path, name, cache):
    file, content, reason = REFUSED[name]
    path = write(tmp_path, file, content)
    with pytest.raises(FtkitError, match=f"x[.].*({reason})") as caught:
        load_data(path)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(path))
    assert not cache.exists() or not list(cache.iterdir())   # nothing half is left


def test_a_line_that_does_not_end(tmp_path, monkeypatch):
    "No line, item or cell is read beyond the limit, scaled down here."
    for module in ("ftkit.data", "ftkit.sources"):
        monkeypatch.setattr(f"{module}._LONGEST", 1000)
    huge = json.dumps({**GOOD, "output": "b" * 5000}).encode()
    path = write(tmp_path, "x.jsonl", b"\n".join([LINE, huge, LINE]))
    assert load_data(path, rejected=tmp_path / "bad.jsonl", quiet=True).to_list() == [GOOD, GOOD]
    [kept] = rejects(tmp_path / "bad.jsonl")
    assert kept["line"] == 2 and "longer than 1,000 bytes" in kept["error"] and kept["text"] == huge[:1000].decode()


def test_rows_of_csv_that_are_bad(tmp_path):
    rows = [b"instruction,output", b"a,b", b"only one", b'q"uote,x', b'"open"x,y', b"Z\xfcrich,x", b"a,b,c", b"a,", b"c,d", b"e,f", b"g,h", b"i,j", b"k,l", b"m,n"]
    data = load_data(write(tmp_path, "x.csv", b"\r\n".join(rows) + b'\r\n"never closed,\r\nx,y'), rejected=tmp_path / "bad.jsonl", quiet=True)
    assert data["instruction"][:] == ["a", 'q"uote', "c", "e", "g", "i", "k", "m"]
    kept = {row["line"]: row for row in rejects(tmp_path / "bad.jsonl")}
    assert {line: row["error"][:24] for line, row in kept.items()} == {
        3: "1 cells, where the heade", 5: "not valid CSV: ',' expec", 6: "byte 0xfc is not UTF-8; ", 7: "3 cells, where the heade", 8: "field 'output' is empty:", 15: "not valid CSV: unexpecte"}
    assert kept[15]["text"] == '"never closed,\r\nx,y'


# ---- folders and other paths

def test_folders(tmp_path):
    folder = tmp_path / "data.jsonl"   # a folder, whatever it is called
    write(folder, "a.jsonl", LINE)
    write(folder, "deeper/b.csv", b"instruction,output\na,b\nc\n")
    write(folder, "README.md", b"x")
    write(folder, ".hidden.jsonl", b"x")
    write(folder, "old.rejected.jsonl", b"x")
    data = load_data(folder, rejected=tmp_path / "bad.jsonl", quiet=True)
    assert data.to_list() == [GOOD, {"instruction": "a", "output": "b"}]
    assert rejects(tmp_path / "bad.jsonl")[0] | {"text": ""} == {"file": os.path.join("deeper", "b.csv"), "line": 3, "error": "1 cells, where the header has 2", "text": ""}
    assert "not read: README.md, old.rejected.jsonl" in data.info.description and "a folder of 1 JSON file, 1 CSV file" in data.info.description
    with pytest.raises(FtkitError, match="data.jsonl: deeper.b.csv: line 3: 1 cells"):
        load_data(folder, skip_bad=False)


@pytest.mark.parametrize("make, reason", [
    (lambda folder: (folder / "x.jsonl").mkdir(), "no file in it can be read"),
    (lambda folder: (folder / "x.jsonl").symlink_to(folder / "x.jsonl"), "neither a file nor a folder|symbolic links|No such file"),
    (lambda folder: (folder / "x.jsonl").symlink_to(folder / "gone"), "neither a file nor a folder|No such file"),
    (lambda folder: os.mkfifo(folder / "x.jsonl"), "neither a file nor a folder"),
    (lambda folder: None, "No such file"),
])
def test_paths_that_are_no_files(tmp_path, make, reason):
    make(tmp_path)
    with pytest.raises(FtkitError, match=reason):
        load_data(tmp_path / "x.jsonl")


def test_a_folder_with_loops(tmp_path):
    write(tmp_path / "set", "a.jsonl", LINE)
    (tmp_path / "set" / "loop").symlink_to(tmp_path / "set")
    assert load_data(tmp_path / "set", quiet=True).to_list() == [GOOD]
    (tmp_path / "set" / "b.jsonl").symlink_to(tmp_path / "set" / "b.jsonl")
    with pytest.raises(FtkitError, match="b.jsonl: neither a file nor a folder"):
        load_data(tmp_path / "set")


@pytest.mark.parametrize("source", ["", " ", "a\0b", "x" * 5000, 7, None, b"x.jsonl", {"a": 1}, object(), "./nowhere", "~/nowhere/x", "~nobody-here/x", "a/b/c"])
def test_things_that_are_no_source(source, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FtkitError):
        load_data(source)


def test_the_hub(monkeypatch):
    import datasets
    sets = datasets.DatasetDict(train=datasets.Dataset.from_list([GOOD]), test=datasets.Dataset.from_list([GOOD, BAD_ROW]))
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name: asked.append(name) or sets)
    with pytest.raises(FtkitError, match="some/set: it holds the sets train, test; choose one with split='train'"):
        load_data("some/set")
    assert load_data("some/set", split="test", quiet=True).to_list() == [GOOD] and asked == ["some/set"] * 2
    def fail(name): raise ConnectionError("no route\nto anywhere")
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(FtkitError, match="some/set: cannot be had from the Hub: no route; if a file was meant"):
        load_data("some/set")
    def ask(name): raise ValueError("Config name is missing.\nPlease pick one")
    monkeypatch.setattr(datasets, "load_dataset", ask)
    with pytest.raises(FtkitError, match=r"some/set: .*Config name is missing\.; load it with datasets.load_dataset"):
        load_data("some/set")


BAD_ROW = {"instruction": "x", "output": None}


def test_saved_datasets(tmp_path):
    import datasets
    sets = datasets.DatasetDict(train=datasets.Dataset.from_list([GOOD] * 3), test=datasets.Dataset.from_list([GOOD]))
    sets.save_to_disk(tmp_path / "sets")
    sets["train"].save_to_disk(tmp_path / "one")
    assert load_data(tmp_path / "one", quiet=True).to_list() == [GOOD] * 3
    assert load_data(tmp_path / "sets", split="test", quiet=True).to_list() == [GOOD]
    with pytest.raises(FtkitError, match="it holds the sets train, test"):
        load_data(tmp_path / "sets")


# ---- what comes out is what went in

CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 0.1}'}}]}
SHAPES = [
    GOOD, CHAT, {**CHAT, "system": "Be brief."}, {"prompt": "a", "completion": "b"}, {"text": "Once"},
    {"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][1:]},
    {**GOOD, "history": [["a", "b"], ["c", "d"]], "system": "Be brief."}, {**GOOD, "history": []},
    {"conversation": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "id": 2**70},
    {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 1}], "id": "x"},
    {"messages": [CHAT["messages"][0], CALL, {"role": "tool", "tool_call_id": "1", "content": "7"}, CHAT["messages"][1]], "tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": None, "b": [1, "x"]}}}]},
    {"messages": [{"role": "developer", "content": "d"}, {"role": "user", "content": [{"type": "text", "text": "a"}], "extra": {"deep": [1 / 3, None, {}]}}, {"role": "assistant", "function_call": {"name": "g", "arguments": {"a": None}}}]},
    {**GOOD, "meta": {"a": [1, {"b": None}], "c": 1e-320}, "scores": [1 / 3, 2 / 3], "n": 1.0}, {**GOOD, "meta": "text", "scores": ["x"], "n": 1},
    {**GOOD, "meta": '{"json_text": "1"}', "tags": [{"a": 1}, 7, None]}, {**GOOD, "a": True, "b": [[1], []], "c": [[["x"]]], "d": {}},
]


def same(rows, records):
    for row, record in zip(rows, records, strict=True):
        assert plain_record(row) == plain_record(record) and to_messages(row) == to_messages(record)
        assert json.dumps(plain_record(row), sort_keys=True) == json.dumps(plain_record(record), sort_keys=True)   # 1 is not 1.0


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_mixed_schemas_survive(tmp_path, step, monkeypatch):
    "All shapes in one file, with the types of the table growing along the way."
    from ftkit import sources
    add = sources._Writer.add
    def often(self, *arguments):
        add(self, *arguments)
        if len(self.batch) >= step:
            self.flush()
    monkeypatch.setattr(sources._Writer, "add", often)
    path = write(tmp_path, "x.jsonl", b"\n".join(json.dumps(record).encode() for record in SHAPES))
    data = load_data(path, skip_bad=False, quiet=True)
    same(data, SHAPES)
    same(load_data(SHAPES, skip_bad=False, quiet=True), SHAPES)
    same(load_data(data, skip_bad=False, quiet=True), SHAPES)   # once more through a table
    data.to_parquet(tmp_path / "x.parquet")
    same(load_data(tmp_path / "x.parquet", skip_bad=False, quiet=True), SHAPES)
    for rows, records in zip(train_test_split(data, 4, seed=1), train_test_split(SHAPES, 4, seed=1)):
        same(rows, records)   # the same are held out, from a table as from a list


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=4), inner, max_size=3), max_leaves=8)
MESSAGES = st.lists(st.fixed_dictionaries({}, optional={"name": SCALARS, "extra": VALUES, "weight": st.sampled_from([None, 0, 1])}), min_size=1, max_size=3)
RECORDS = st.builds(lambda base, extra: {**extra, **base}, st.sampled_from([GOOD, CHAT, {"text": "Once"}]), st.dictionaries(st.sampled_from(["a", "b", "c"]), VALUES, max_size=3))
TURNS = MESSAGES.map(lambda extras: {"messages": [turn | extra for extra in extras for turn in CHAT["messages"]]})


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(RECORDS | TURNS, min_size=1, max_size=5))
def test_any_record_comes_back(records):
    same(load_data(records, skip_bad=False, quiet=True), records)


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.sampled_from(["x.jsonl", "x.json", "x.csv", "x.tsv", "x.jsonl.gz", "x.parquet", "x.arrow"]))
def test_any_damage_is_one_line(tmp_path, drawn, name):
    "Bytes overwritten, put in, cut off: data, or an FtkitError of one line. No traceback from inside a library."
    content = bytearray(WHOLE[name])
    for _ in range(drawn.draw(st.integers(0, 4))):
        at = drawn.draw(st.integers(0, len(content)))
        content[at:at + drawn.draw(st.integers(0, 9))] = drawn.draw(st.binary(max_size=9))
    path = write(tmp_path, name, bytes(content[:drawn.draw(st.integers(0, len(content)) | st.just(len(content)))]))
    for read in (load_data, load_records) if ".json" in name else (load_data,):
        try:
            for record in read(path, skip_bad=True) if read is load_records else read(path, quiet=True):
                assert answer_of(record)
        except FtkitError as error:
            assert "\n" not in str(error) and str(error).startswith(str(path))


def whole_files():
    import io
    import pyarrow as pa
    import pyarrow.parquet
    records = [{"instruction": f"{i}+1? \"Zürich\"", "output": str(i + 1)} for i in range(12)]
    lines, table, parquet, arrow = "\n".join(map(json.dumps, records)).encode(), pa.Table.from_pylist(records), io.BytesIO(), io.BytesIO()
    cells = "instruction{0}output\n" + "".join(f'"{record["instruction"].replace(chr(34), chr(34) * 2)}"{{0}}{record["output"]}\n' for record in records)
    pyarrow.parquet.write_table(table, parquet)
    with pa.ipc.new_stream(arrow, table.schema) as stream:
        stream.write_table(table)
    return {"x.jsonl": lines, "x.json": json.dumps(records, indent=1).encode(), "x.csv": cells.format(",").encode(), "x.tsv": cells.format("\t").encode(),
            "x.jsonl.gz": gzip.compress(lines, mtime=0), "x.parquet": parquet.getvalue(), "x.arrow": arrow.getvalue()}


WHOLE = whole_files()


# ---- choosing

def test_format_and_columns(tmp_path):
    both = {"text": "Q: a A: b", "instruction": "a", "output": "b", "messages": CHAT["messages"], "id": 7}
    path = write(tmp_path, "x.jsonl", json.dumps(both).encode())
    for name, first in [("alpaca", "a"), ("messages", "Hi"), ("text", "Q: a A: b")]:
        data = load_data(path, format=name, quiet=True)
        assert to_messages(data[0])[0]["content"] == first and data[0]["id"] == 7
        assert "left aside" in data.info.description
    with pytest.raises(FtkitError, match="no field of format 'sharegpt'"):
        load_data(path, format="sharegpt")
    with pytest.raises(FtkitError, match="there is no format 'chatml'; there are messages, sharegpt, alpaca"):
        load_data(path, format="chatml")
    dolly = [{"instruction": "a", "context": "c", "response": "b"}]
    assert to_messages(load_data(dolly, columns={"context": "input", "response": "output"}, quiet=True)[0]) == to_messages({"instruction": "a", "input": "c", "output": "b"})
    chosen = [{"chosen": CHAT["messages"], "score": 1}]
    assert to_messages(load_data(chosen, columns={"chosen": "messages"}, quiet=True)[0]) == CHAT["messages"]


def test_what_is_said(tmp_path, caplog):
    path = write(tmp_path, "x.jsonl", b'{"instruction": "<b>\\u001b[2J", "output": "b"}\n' + BAD)
    with caplog.at_level("WARNING", logger="ftkit"):
        load_data(path)
    said = caplog.records[-1].getMessage()
    assert "1 record from a JSON file" in said and "taken for alpaca" in said and "user: <b>?[2J" in said and "\x1b" not in said
    assert "1 left out, the first is line 2: field 'output' is missing; all are kept in " in said
    kept = said.split("kept in ")[1].split("\n")[0]
    assert rejects(Path(kept))[0]["line"] == 2


def test_runs_take_what_load_data_takes(tmp_path):
    "A table in a gzip to train on, a dataset held out: its records are the prompts, without the nulls of the table."
    from datasets import Dataset
    from ftkit.lora import add_lora
    from ftkit.models import tiny_model
    from ftkit.train import Run
    path = write(tmp_path, "x.tsv.gz", gzip.compress(b"instruction\toutput\n" + b"a\tb\n" * 5))
    model, tokenizer = tiny_model("llama")
    run = Run(add_lora(model), tokenizer, path, Dataset.from_list([{**GOOD, "id": 1}, GOOD]), root=tmp_path / "runs", quiet=True, max_steps=1)
    assert len(run.data) == 5 and len(run.held_out) == 2 and run.prompts == [{**GOOD, "id": 1}, GOOD]
    with pytest.raises(FtkitError, match="x.jsonl: line 2: field 'output' is missing"):
        Run(model, tokenizer, write(tmp_path, "x.jsonl", LINE + b"\n" + BAD), root=tmp_path / "runs", quiet=True)


# ---- the cache

def test_the_cache_is_by_content(tmp_path, cache):
    path = write(tmp_path, "x.jsonl", LINE)
    first = load_data(path, quiet=True)
    assert load_data(path, quiet=True).cache_files == first.cache_files and len(list(cache.iterdir())) == 1
    stamp = os.stat(path)
    write(tmp_path, "x.jsonl", LINE.replace(b"4", b"5"))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))   # the same size and time
    assert load_data(path, quiet=True)[0]["output"] == "5"
    assert load_data(path, format="alpaca", quiet=True)[0]["output"] == "5" and len(list(cache.iterdir())) == 3
    for damaged in cache.iterdir():
        (damaged / "report.json").unlink()
    assert load_data(path, quiet=True)[0]["output"] == "5"


def test_strictness_does_not_depend_on_the_cache(tmp_path):
    path = write(tmp_path, "x.jsonl", LINE + b"\n" + BAD)
    for _ in range(2):
        assert len(load_data(path, rejected=tmp_path / "bad.jsonl", quiet=True)) == 1 and len(rejects(tmp_path / "bad.jsonl")) == 1
        (tmp_path / "bad.jsonl").unlink()
        with pytest.raises(FtkitError, match="x.jsonl: line 2: field 'output' is missing"):
            load_data(path, skip_bad=False)


def test_two_at_once(tmp_path, cache):
    path = write(tmp_path, "x.jsonl", b"\n".join(json.dumps({**GOOD, "id": i}).encode() for i in range(3000)))
    found, threads = [], [threading.Thread(target=lambda: found.append(load_data(path, quiet=True).to_list())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(rows == found[0] for rows in found) and len(found[0]) == 3000 and len(list(cache.iterdir())) == 1


def test_what_a_killed_process_left_goes(tmp_path, cache):
    for name, age in (("old", 2 * 86400), ("new", 60)):
        write(cache, f".new-{name}/part-0.arrow", b"x")
        os.utime(cache / f".new-{name}", (time.time() - age,) * 2)
    load_data(write(tmp_path, "x.jsonl", LINE), quiet=True)
    assert not (cache / ".new-old").exists() and (cache / ".new-new").exists()


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    write(tmp_path, "file", b"")
    monkeypatch.setenv("FTKIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(FtkitError, match="set FTKIT_CACHE"):
        load_data([GOOD])


# ---- memory

PEAK = """
import resource, sys
from ftkit.sources import load_data
load_data([{"text": "x"}], quiet=True)   # what the libraries take
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = len(load_data(sys.argv[1], quiet=True))
print(rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_memory_is_flat(tmp_path, kind):
    "A file four times as large takes hardly more memory; 5 GB took what these take."
    record, peaks = json.dumps({"instruction": "x" * 2000, "input": "", "output": "y" * 28_000}), []
    join, around = ("\n", ("", "")) if kind == "jsonl" else (",", ("[", "]"))
    for count in (2000, 8000):   # 60 and 240 MB
        path = tmp_path / f"x.{kind}"
        with open(path, "w") as file:
            file.write(around[0] + record)
            for _ in range(count - 1):
                file.write(join + record)
            file.write(around[1])
        result = subprocess.run([sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, check=True)
        rows, peak = map(int, result.stdout.split())
        assert rows == count
        peaks.append(peak / 1024)
    assert peaks[1] - peaks[0] < 60 and peaks[1] < 160, peaks   # of 180 MiB more
