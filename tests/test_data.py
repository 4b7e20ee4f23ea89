"""ftkit.data on the chat templates of all families, on files as people have them, and on random conversations."""
import json
import logging
import random
import re

import pytest
from tiny_tokenizers import FAMILIES, TEMPLATES, byte_level, family
from transformers import PreTrainedTokenizerFast

from ftkit.data import (
    FtkitError, answer_of, collate, encode, encode_data, encode_prompt, end_of_turn_ids, fingerprint, load_records,
    one_answer_per_record, rows_without_trained_tokens, show_batch, to_messages, train_test_split,
)


def turn(role, content, **other):
    return {"role": role, "content": content, **other}


SINGLE = {"messages": [turn("user", "What is the capital of France?"), turn("assistant", "Paris.")]}
MULTI = {"messages": [*SINGLE["messages"], turn("user", "And of Italy?"), turn("assistant", '{"city": "Rome"}')]}
SYSTEM = {"messages": [turn("system", "Be brief."), *MULTI["messages"]]}
CASES = {"single": SINGLE, "multi": MULTI, "system": SYSTEM}

# the text before the first answer and what is trained, for each family: written out by hand, as its public format has it
THINK = "<think>\n\n</think>\n\n"
SMOL_SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
LLAMA_SYSTEM = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n{}<|eot_id|>"
LLAMA_ASKED = "<|start_header_id|>user<|end_header_id|>\n\nWhat is the capital of France?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
CHATML_ASKED = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
EXPECTED = {
    ("smollm2", "single"): (SMOL_SYSTEM + CHATML_ASKED, ["Paris.<|im_end|>"]),
    ("smollm2", "multi"): (SMOL_SYSTEM + CHATML_ASKED, ["Paris.<|im_end|>", '{"city": "Rome"}<|im_end|>']),
    ("smollm2", "system"): ("<|im_start|>system\nBe brief.<|im_end|>\n" + CHATML_ASKED, ["Paris.<|im_end|>", '{"city": "Rome"}<|im_end|>']),
    ("llama3", "single"): (LLAMA_SYSTEM.format("") + LLAMA_ASKED, ["Paris.<|eot_id|>"]),
    ("llama3", "multi"): (LLAMA_SYSTEM.format("") + LLAMA_ASKED, ["Paris.<|eot_id|>", '{"city": "Rome"}<|eot_id|>']),
    ("llama3", "system"): (LLAMA_SYSTEM.format("Be brief.") + LLAMA_ASKED, ["Paris.<|eot_id|>", '{"city": "Rome"}<|eot_id|>']),
    ("qwen3", "single"): (CHATML_ASKED, [THINK + "Paris.<|im_end|>"]),
    ("qwen3", "multi"): (CHATML_ASKED + "Paris.<|im_end|>\n<|im_start|>user\nAnd of Italy?<|im_end|>\n<|im_start|>assistant\n", [THINK + '{"city": "Rome"}<|im_end|>']),
    ("qwen3", "system"): ("<|im_start|>system\nBe brief.<|im_end|>\n" + CHATML_ASKED + "Paris.<|im_end|>\n<|im_start|>user\nAnd of Italy?<|im_end|>\n<|im_start|>assistant\n", [THINK + '{"city": "Rome"}<|im_end|>']),
    ("mistral", "single"): ("<s>[INST] What is the capital of France? [/INST]", [" Paris.</s>"]),
    ("mistral", "multi"): ("<s>[INST] What is the capital of France? [/INST]", [" Paris.</s>", ' {"city": "Rome"}</s>']),
    ("mistral_v3", "single"): ("<s>[INST]What is the capital of France?[/INST]", ["Paris.</s>"]),
    ("mistral_v3", "multi"): ("<s>[INST]What is the capital of France?[/INST]", ["Paris.</s>", '{"city": "Rome"}</s>']),
    ("mistral_v3", "system"): ("<s>[INST]What is the capital of France?[/INST]Paris.</s>[INST]Be brief.\n\nAnd of Italy?[/INST]", ['{"city": "Rome"}</s>']),
    ("gemma", "single"): ("<bos><start_of_turn>user\nWhat is the capital of France?<end_of_turn>\n<start_of_turn>model\n", ["Paris.<end_of_turn>"]),
    ("gemma", "multi"): ("<bos><start_of_turn>user\nWhat is the capital of France?<end_of_turn>\n<start_of_turn>model\n", ["Paris.<end_of_turn>", '{"city": "Rome"}<end_of_turn>']),
    # Phi-3's marks swallow the white space behind them, so its newlines are in the text and not among the tokens
    ("phi3", "single"): ("<|user|>What is the capital of France?<|end|><|assistant|>", ["Paris.<|end|>"]),
    ("phi3", "multi"): ("<|user|>What is the capital of France?<|end|><|assistant|>", ["Paris.<|end|>", '{"city": "Rome"}<|end|>']),
    ("phi3", "system"): ("<|system|>Be brief.<|end|><|user|>What is the capital of France?<|end|><|assistant|>", ["Paris.<|end|>", '{"city": "Rome"}<|end|>']),
}


def trained_runs(row, tokenizer):
    "Texts of the stretches of trained tokens of a row."
    runs, open_run = [], False
    for label in row["labels"]:
        if label != -100:
            if not open_run:
                runs.append([])
            runs[-1].append(label)
        open_run = label != -100
    return [tokenizer.decode(run) for run in runs]


def check_row(record, tokenizer):
    "What holds for each row of each template, whatever is in it."
    row, prompt = encode(record, tokenizer, max_length=None), encode_prompt(record, tokenizer)
    ids, labels = row["input_ids"], row["labels"]
    assert row["length"] == len(ids) == len(labels) and row["cut"] == 0
    assert ids[:len(prompt)] == prompt, "generation starts from the head of the row"
    assert labels[len(prompt)] != -100 and (labels[len(prompt) - 1] == -100 or len(prompt) == 0), "the answer begins right behind the prompt"
    assert all(label in (-100, token) for label, token in zip(labels, ids))
    trained = [i for i, label in enumerate(labels) if label != -100]
    assert ids[trained[-1]] == end_of_turn_ids(tokenizer)[0], "the end-of-turn token is trained, and nothing behind it"
    if tokenizer.bos_token_id is not None and tokenizer.bos_token not in ("<|im_start|>",):
        assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id, "one begin token"
    return row


# ---- templates

@pytest.mark.parametrize("name, case", EXPECTED)
@pytest.mark.parametrize("pad_is_end", [True, False])
def test_mask(name, case, pad_is_end):
    tokenizer = family(name, pad_is_end)
    row = check_row(CASES[case], tokenizer)
    before, trained = EXPECTED[name, case]
    first = next(i for i, label in enumerate(row["labels"]) if label != -100)
    assert tokenizer.decode(row["input_ids"][:first]) == before
    assert trained_runs(row, tokenizer) == trained


@pytest.mark.parametrize("name, case", EXPECTED)
def test_row_is_the_text_of_the_template(name, case):
    "Nothing is added to or taken from what the tokenizer's own chat template gives."
    tokenizer = family(name)
    text = tokenizer.apply_chat_template(CASES[case]["messages"], tokenize=False, date_string="26 Jul 2024")
    decoded = tokenizer.decode(encode(CASES[case], tokenizer)["input_ids"])
    assert decoded == (re.sub(r"(<\|(?:user|assistant|system|end)\|>)\s+", r"\1", text) if name == "phi3" else text)


@pytest.mark.parametrize("name", [name for name, (*_, system) in FAMILIES.items() if not system])
def test_refused_system_turn_names_the_row(name):
    with pytest.raises(FtkitError, match="^row 1: the chat template refuses.*put the system text into the first user message$"):
        encode_data([SINGLE, SYSTEM], family(name))


@pytest.mark.parametrize("name", FAMILIES)
def test_end_of_turn(name):
    tokenizer, (_, _, end_of_text, end_of_turn, _) = family(name), FAMILIES[name]
    assert tokenizer.convert_ids_to_tokens(end_of_turn_ids(tokenizer)) == list(dict.fromkeys([end_of_turn, end_of_text]))


@pytest.mark.parametrize("name", FAMILIES)
def test_random_conversations(name):
    "Answers that begin or end with spaces, newlines, brackets, emoji or the marks of other families change nothing of what must hold."
    tokenizer, draw = family(name), random.Random(name)
    pieces = ["{", "]", " ", "\n", "\n\n", "a", "The", "é", "🎉", "日本", "<think>", "</think>", "[INST]", "[/INST]", "\t", ".", "assistant", "\u200d", "0"]
    pieces = [piece for piece in pieces if name != "mistral_v3" or "INST" not in piece]

    def text():
        return "".join(draw.choices(pieces, k=draw.randint(0, 6))) + "x" + "".join(draw.choices(pieces, k=draw.randint(0, 6)))

    for _ in range(40):
        messages = [turn("system", text())] if FAMILIES[name][4] and draw.random() < 0.5 else []
        for _ in range(draw.randint(1, 3)):
            messages += [turn("user", text()), turn("assistant", text())]
        row = check_row({"messages": messages}, tokenizer)
        runs = trained_runs(row, tokenizer)
        if name not in ("qwen3", "mistral_v3"):
            trims = name in ("llama3", "gemma")
            answers = [message["content"].strip() if trims else message["content"] for message in messages if message["role"] == "assistant"]
            end = FAMILIES[name][3]
            assert runs == [(" " if name == "mistral" else "") + answer + end for answer in answers]


def test_border_is_never_inside_a_token():
    "`]{` is one token of the tiny vocabulary; the prompt of the first Mistral template ends with `]` and this answer begins with `{`."
    template = (TEMPLATES / "mistral.jinja").read_text().replace("' ' + message.content", "message.content")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(["<s>", "</s>"]), bos_token="<s>", eos_token="</s>", chat_template=template)
    assert "]{" in tokenizer.tokenize("[/INST]{")
    record = {"messages": [turn("user", "List it."), turn("assistant", "{}"), turn("user", "More."), turn("assistant", "{1}")]}
    assert trained_runs(check_row(record, tokenizer), tokenizer) == ["{}</s>", "{1}</s>"]


def test_generation_marks_give_the_same_mask():
    "Where a template has {% generation %} marks, they and the spans agree."
    template = (TEMPLATES / "smollm2.jinja").read_text().replace(
        "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}",
        "{{- '<|im_start|>' + message.role + '\\n' -}}{%- if message.role == 'assistant' -%}{%- generation -%}{{- message.content + '<|im_end|>' -}}"
        "{%- endgeneration -%}{%- else -%}{{- message.content + '<|im_end|>' -}}{%- endif -%}{{- '\\n' -}}")
    tokenizer = family("smollm2")
    plain = encode(SYSTEM, tokenizer)
    tokenizer.chat_template = template
    marked = tokenizer.apply_chat_template(SYSTEM["messages"], return_dict=True, return_assistant_tokens_mask=True)
    assert encode(SYSTEM, tokenizer) == plain
    assert marked["input_ids"] == plain["input_ids"]
    assert marked["assistant_masks"] == [int(label != -100) for label in plain["labels"]]


def test_qwen3_thoughts():
    "A think block is trained in the last answer; an earlier one is history, which the template rewrites, and gets its own record for training."
    tokenizer, thought = family("qwen3"), "<think>\nWell.\n</think>\n\n"
    record = {"messages": [turn("user", "a"), turn("assistant", thought + "1"), turn("user", "b"), turn("assistant", "2", reasoning_content="Hm.")]}
    assert trained_runs(check_row(record, tokenizer), tokenizer) == ["<think>\nHm.\n</think>\n\n2<|im_end|>"]
    assert "Well" not in tokenizer.decode(encode(record, tokenizer)["input_ids"])
    first, second = one_answer_per_record([record])
    assert trained_runs(check_row(first, tokenizer), tokenizer) == [thought + "1<|im_end|>"]
    assert encode(second, tokenizer) == encode(record, tokenizer)


def test_rewritten_answers_are_counted(caplog):
    with caplog.at_level(logging.WARNING, logger="ftkit"):
        encode_data([MULTI, SINGLE], family("qwen3"))
    assert [record.getMessage() for record in caplog.records] == [
        "2 rows: 1 earlier answers are context only, since the chat template rewrites them (one_answer_per_record trains them)"]


def test_llama3_date_does_not_move():
    "The same data is the same data tomorrow."
    tokenizer = family("llama3")
    assert "Today Date: 26 Jul 2024" in tokenizer.decode(encode_prompt(SINGLE, tokenizer))


@pytest.mark.parametrize("change, message", [
    (lambda t: t.replace("'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\n<think>\\n'"), "generation prompt ends with '<think>"),
    (lambda t: t.replace("<|im_end|>", ""), "no special token of this tokenizer"),
    (lambda t: t.replace("message.content +", ""), "leaves out the answer"),
    (lambda t: t.replace("+ '<|im_end|>\\n'", "+ ('<|im_end|>\\n' if message.content | length > 3 else '<|endoftext|>')"), "row 1.*does not end this answer with"),
    (lambda t: "{{ messages[5].content.x }}" + t, "row 0: the chat template refuses"),
])
def test_templates_that_cannot_be_right_are_refused(change, message):
    tokenizer = family("smollm2")
    tokenizer.chat_template = change(tokenizer.chat_template)
    with pytest.raises(FtkitError, match=message) as caught:
        encode_data([SINGLE, {"instruction": "1+1?", "output": "2"}], tokenizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FAMILIES)
def test_marks_in_a_text_are_text(name, caplog):
    "A user who writes the template's marks writes text; the template's own marks are as many as without."
    tokenizer = family(name)
    mark, plain = FAMILIES[name][3], {"instruction": "What does it do?", "output": "It ends a turn."}
    record = {"instruction": f"What does {mark} do?", "output": f"It{mark} ends a turn."}
    with caplog.at_level(logging.WARNING, logger="ftkit"):
        row = encode_data([plain, record], tokenizer)[1]
    assert [line.getMessage() for line in caplog.records] == [
        "2 rows: 1 with special tokens in the text of a message, which are encoded as text (control_tokens=True makes them control tokens)"]
    end = tokenizer.convert_tokens_to_ids(mark)
    assert row["input_ids"].count(end) == encode(plain, tokenizer)["input_ids"].count(end)
    assert check_row(record, tokenizer) == row == encode(record, tokenizer)
    assert encode(record, tokenizer, control_tokens=True)["input_ids"].count(end) == row["input_ids"].count(end) + 2
    assert trained_runs(row, tokenizer) == [trained_runs(encode(plain, tokenizer), tokenizer)[0].replace("It", "It" + mark)]
    prompt = encode_prompt(record, tokenizer)
    assert tokenizer.decode(prompt).count(mark) == tokenizer.decode(encode_prompt(plain, tokenizer)).count(mark) + 1
    assert encode_prompt(record, tokenizer, control_tokens=True).count(end) == prompt.count(end) + 1


def test_end_token_is_trained_where_it_pads():
    tokenizer = family("smollm2")
    assert tokenizer.pad_token_id == end_of_turn_ids(tokenizer)[0]
    rows = [encode(SINGLE, tokenizer), encode(MULTI, tokenizer)]
    batch = collate(rows, tokenizer.pad_token_id)
    for row, labels, mask in zip(rows, batch["labels"].tolist(), batch["attention_mask"].tolist()):
        assert labels == row["labels"] + [-100] * (len(labels) - row["length"])
        assert mask == [1] * row["length"] + [0] * (len(labels) - row["length"])


# ---- a base model, without template

ALPACA = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n### Instruction:\n{}\n\n{}### Response:\n{}<|endoftext|>"


@pytest.mark.parametrize("record, text", [
    ({"instruction": "Add.", "output": "2"}, ALPACA.format("", "Add.", "", "2")),
    ({"instruction": "Add.", "input": "", "output": "2"}, ALPACA.format("", "Add.", "", "2")),
    ({"instruction": "Add.", "input": "1 1", "output": "2"}, ALPACA.format(", paired with an input that provides further context", "Add.", "### Input:\n1 1\n\n", "2")),
    ({"messages": [turn("system", "Sys."), turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d")]},
     "Sys.\n\n### Instruction:\na\n\n### Response:\nb<|endoftext|>\n\n### Instruction:\nc\n\n### Response:\nd<|endoftext|>"),
])
def test_alpaca_layout(record, text):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(["<|endoftext|>"]), eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    row = check_row(record, tokenizer)
    assert tokenizer.decode(row["input_ids"]) == text
    answers = [m["content"] for m in to_messages(record) if m["role"] == "assistant"]
    assert trained_runs(row, tokenizer) == [answer + "<|endoftext|>" for answer in answers]


@pytest.mark.parametrize("adds", [True, False])
def test_alpaca_layout_begins_as_the_tokenizer_does(adds):
    from tokenizers.processors import TemplateProcessing
    backend = byte_level(["<s>", "</s>"])
    if adds:
        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    assert encode({"instruction": "a", "output": "b"}, tokenizer)["input_ids"].count(tokenizer.bos_token_id) == int(adds)


def test_no_template_and_no_end_token():
    with pytest.raises(FtkitError, match="neither a chat template nor an end-of-text token"):
        encode(SINGLE, PreTrainedTokenizerFast(tokenizer_object=byte_level([])))


# ---- length, batches, fingerprint

def test_cut_at_the_end(caplog):
    tokenizer = family("smollm2")
    whole, prompt = encode(SINGLE, tokenizer, max_length=None), encode_prompt(SINGLE, tokenizer)
    for limit in (1, len(prompt), len(prompt) + 1, whole["length"] - 1, whole["length"], 5000):
        row = encode(SINGLE, tokenizer, max_length=limit)
        assert row["input_ids"] == whole["input_ids"][:limit] and row["labels"] == whole["labels"][:limit]
        assert (row["length"], row["cut"]) == (min(limit, whole["length"]), max(0, whole["length"] - limit))
        assert rows_without_trained_tokens([row]) == ([0] if limit <= len(prompt) else [])
    with caplog.at_level(logging.WARNING, logger="ftkit"):
        data = encode_data([SINGLE, {"instruction": "a", "output": "b"}, MULTI], tokenizer, max_length=len(prompt))
    assert rows_without_trained_tokens(data) == [0, 2]
    assert len(caplog.records) == 1 and re.fullmatch(rf"3 rows: [23] longer than max_length={len(prompt)}, \d+ tokens cut off their ends; 2 left with no trained token", caplog.records[0].getMessage())
    with pytest.raises(FtkitError, match="max_length=0"):
        encode(SINGLE, tokenizer, max_length=0)


def test_chunks_do_not_show():
    "Rows are encoded five hundred at a time; each is what it is alone, and errors count from the first row."
    tokenizer = family("smollm2")
    records = [{"instruction": f"{i}+1?", "output": str(i + 1)} for i in range(1003)]
    data = encode_data(records, tokenizer)
    assert len(data) == 1003 and all(data[i] == encode(records[i], tokenizer) for i in (0, 999, 1000, 1002))
    assert fingerprint(data) == fingerprint(encode_data(iter(records), tokenizer)) == fingerprint([encode(record, tokenizer) for record in records])
    with pytest.raises(FtkitError, match="^row 1001: field 'output' is empty"):
        encode_data([*records[:1001], {"instruction": "x", "output": "\n"}], tokenizer)


# ---- reading

GOOD = {"instruction": "2+2?", "output": "4"}
LINE = json.dumps(GOOD)
BAD_LINES = [
    ('{"instruction": "a"}', "field 'output' is missing"),
    ('{"instruction": "a", "output": null}', "field 'output' is missing"),
    ('{"instruction": "a", "output": ""}', "field 'output' is empty"),
    ('{"instruction": 1, "output": "b"}', "field 'instruction' is a number, not text"),
    ('{"instruction": "a", "input": ["x"], "output": "b"}', "field 'input' is a list, not text"),
    ('{"instruction": "", "input": " ", "output": "b"}', "fields 'instruction' and 'input' are both empty"),
    ('{"output": "b"}', "field 'instruction' is missing"),
    ('{"question": "a", "answer": "b"}', "its fields are question, answer"),
    ("{}", "its fields are none"),
    ("7", "the record is a number, not an object"),
    ('{"instruction": "a", "output": "b", "output": "c"}', "field 'output' stands there twice"),
    ('{"instruction": "a", "output": "b", "score": NaN}', "NaN is not JSON"),
    ('{"instruction": "a", "output": "\\ud800"}', "half of a surrogate pair"),
    ('{"instruction": "a" "output": "b"}', "not valid JSON"),
    ("[" * 100_000, "not valid JSON"),
    ('{"n": ' + "9" * 5000 + "}", "not valid JSON"),
    ('{"messages": []}', "must begin with a user message"),
    ('{"messages": {}}', "field 'messages' is an object, not a list"),
    ('{"messages": ["a"]}', r"field 'messages\[0\]' is text, not an object"),
    ('{"messages": [{"role": "user", "content": "a"}]}', r"field 'messages\[0\].role' is 'user'; the last message must be an assistant's"),
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}', r"field 'messages\[1\].content' is empty"),
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}]}', r"field 'messages\[1\].role' is 'bot'; the roles are system, user, assistant"),
    ('{"messages": [{"role": "user", "content": [{"text": "a"}]}]}', r"field 'messages\[0\].content' is a list, not text"),
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}', r"'messages\[1\].role' is 'system', which is for the first message only"),
    ('{"messages": [{"role": "assistant", "content": "a"}]}', "must begin with a user message"),
    ('{"messages": [{"content": "a"}]}', r"field 'messages\[0\].role' is missing"),
]


@pytest.mark.parametrize("line, message", BAD_LINES, ids=[message for _, message in BAD_LINES])
def test_bad_line(tmp_path, line, message):
    "File, line and reason, in one line; with skip_bad it is left out and kept."
    path = tmp_path / "data.jsonl"
    path.write_text(f"{LINE}\n\n{line}\n{LINE}\n")
    with pytest.raises(FtkitError, match=message) as caught:
        load_records(path)
    assert str(caught.value).startswith(f"{path}: line 3: ") and "\n" not in str(caught.value)
    assert load_records(path, skip_bad=True, rejected=tmp_path / "deep" / "rejected.jsonl") == [GOOD, GOOD]
    [kept] = map(json.loads, (tmp_path / "deep" / "rejected.jsonl").read_text().splitlines())
    assert kept["line"] == 3 and re.search(message, kept["error"]) and kept["text"] == line


@pytest.mark.parametrize("content, records", [
    (b"\xef\xbb\xbf" + LINE.encode() + b"\r\n\r\n  \r\n" + LINE.encode(), [GOOD, GOOD]),
    (LINE.encode() + b"\n", [GOOD]),
    (b"\xef\xbb\xbf" + json.dumps([GOOD, GOOD], indent=2).encode(), [GOOD, GOOD]),
    (json.dumps({"instruction": "a\u2028b", "output": "c\x85"}, ensure_ascii=False).encode(), [{"instruction": "a\u2028b", "output": "c\x85"}]),
    (json.dumps({**GOOD, "input": None, "id": 7, "tags": [1]}).encode(), [{**GOOD, "input": None, "id": 7, "tags": [1]}]),
])
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_good_files(tmp_path, content, records, suffix):
    path = tmp_path / f"data.{suffix}"
    path.write_bytes(content)
    assert load_records(path) == load_records(str(path)) == records


@pytest.mark.parametrize("content, message", [
    (b"", "no record in it"),
    (b"\n \n", "no record in it"),
    (b"[]", "no record in it"),
    (b"\xef\xbb\xbf", "no record in it"),
    (LINE.encode() + b'\n{"instruction": "Z\xfcrich", "output": "x"}', "line 2: byte 0xfc in column 19 is not UTF-8"),
    (b'[{"instruction": "a",\n "output": "\xfc"}]', "line 2: byte 0xfc in column 13 is not UTF-8"),
    (LINE.encode("utf-16"), "line 1: byte 0xff in column 1 is not UTF-8"),
    (b'[{"instruction": "a", "output": "b"},\n {"instruction": "c", "output": 4}\n]', "line 2: field 'output' is a number"),
    (b'[{"instruction": "a", "output": "b"},\n {"instruction": "c"', "line 2: not valid JSON"),
    (b'[{"instruction": "a", "output": "b"}] []', "line 1: not valid JSON: more text after the end of the list"),
    (json.dumps({"data": [GOOD]}, indent=1).encode(), "the file is one JSON object over several lines"),
    (json.dumps({"data": [GOOD]}).encode(), "line 1: .*its fields are data"),
])
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(FtkitError, match=f"^{re.escape(str(path))}: {message}"):
        load_records(path)


def test_paths_that_cannot_be_read(tmp_path):
    for path, message in [(tmp_path / "none.jsonl", "No such file"), (tmp_path, "directory")]:
        with pytest.raises(FtkitError, match=f"{re.escape(str(path))}: .*{message}"):
            load_records(path)


def test_nothing_left_is_an_error_and_the_rejected_are_kept(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"instruction": "\xff"}\n{"output": 1}\n')
    with pytest.raises(FtkitError, match="no record in it; 2 left out, the first is line 1: byte 0xff"):
        load_records(path, skip_bad=True, rejected=tmp_path / "rejected.jsonl")
    kept = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert [row["line"] for row in kept] == [1, 2] and kept[0]["text"] == '{"instruction": "\\xff"}'


def test_lists_and_datasets():
    from datasets import Dataset, DatasetDict
    records = [GOOD, {**GOOD, "output": "five"}]
    assert load_records(records) == load_records(Dataset.from_list(records)) == records
    chats = Dataset.from_list([SINGLE, SYSTEM])
    assert [answer_of(record) for record in load_records(chats)] == ["Paris.", '{"city": "Rome"}']
    with pytest.raises(FtkitError, match="^dataset: row 1: field 'output' is empty"):
        load_records(Dataset.from_list([GOOD, {**GOOD, "output": ""}]))
    with pytest.raises(FtkitError, match="keys train; give one of its parts"):
        load_records(DatasetDict(train=chats))


# ---- holding back, showing

@pytest.mark.parametrize("held_out", [0, 1, 13, 0.1, 0.5, 0.99])
def test_split_is_by_content(held_out):
    records = [{"instruction": f"{i % 90}", "output": "x"} for i in range(100)]   # some twice
    train, held = train_test_split(records, held_out, seed=3)
    wanted = held_out if isinstance(held_out, int) else round(100 * held_out)
    assert wanted - 1 <= len(held) <= wanted and len(train) + len(held) == 100
    assert not [record for record in held if record in train]
    mixed = random.Random(0).sample(records, 100)
    key = lambda record: record["instruction"]
    assert sorted(train_test_split(mixed, held_out, seed=3)[1], key=key) == sorted(held, key=key)


@pytest.mark.parametrize("held_out", [-1, 10, 1.0, 1.5, -0.1, float("nan")])
def test_split_refuses(held_out):
    with pytest.raises(FtkitError, match="held_out="):
        train_test_split([{"instruction": str(i), "output": "x"} for i in range(10)], held_out)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_shown_is_what_is_trained(name):
    "The underlined text of the page, put together, is the text of the labels."
    import html
    tokenizer = family(name)
    record = {"messages": [turn("user", "<b>Is 1 < 2 & 3?\x1b[31m"), turn("assistant", "<i>🎉 yes</i>\n")]}
    data = encode_data([record], tokenizer)
    page = show_batch(data, tokenizer)._repr_html_()
    shown = html.unescape("".join(re.findall(r"<u>(.*?)</u>", page.split("</style>")[1].split("<pre")[1], re.S))).replace("↵\n", "\n")
    assert shown == tokenizer.decode([label for label in data[0]["labels"] if label != -100])
    assert "<i>" not in page and "\x1b" not in page
    assert "«" in repr(show_batch(data, tokenizer)) and "\x1b[31m" not in show_batch(data, tokenizer).terminal(colour=True)
