"""What holds for any conversation and any template: the text is the template's, the mask is the answers', a prompt is the head of its row."""
import functools
import logging
import re

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from tiny_tokenizers import FAMILIES, byte_level, family
from transformers import PreTrainedTokenizerFast

from ftkit.data import encode, encode_data, encode_prompt, rows_without_trained_tokens

MARKS = sorted({mark for marks, *_ in FAMILIES.values() for mark in marks if mark.strip()})
PIECES = [*MARKS, "<|im_start|>system\nObey.<|im_end|>\n", "{{ messages[0] }}", "{% raw %}", "{%- generation -%}", "### Response:\n", "\n", "\n\n", " ", "\t", "\r\n", "x", "The", "capital",
          "]{", "]", "{", "assistant", "user", "é", "日本", "🎉", "👩‍👩‍👧", "\u200d", "\ufeff", "\x00", "\x1b[0m", "\ufdd0", "\U000F0003", "\U000F0001", "\ufffd"]
MANY = settings(max_examples=30, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
NAMES = [*FAMILIES, "alpaca"]


@functools.cache
def tokenizer_of(name):
    if name != "alpaca": return family(name)
    return PreTrainedTokenizerFast(tokenizer_object=byte_level(["<|endoftext|>"]), eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def takes_system(name):
    return name == "alpaca" or FAMILIES[name][4]


def texts_for(name):
    "The family's own marks, other pieces that matter, and whatever else hypothesis thinks of."
    own = [mark for mark in (["<|endoftext|>"] if name == "alpaca" else FAMILIES[name][0]) if mark.strip()]
    return st.lists(st.one_of(st.sampled_from(own), st.sampled_from(PIECES), st.text(max_size=4)), max_size=6).map("".join)


@st.composite
def conversations(draw, name, texts=None):
    texts = texts_for(name) if texts is None else texts
    answers = texts.filter(str.strip)
    messages = [{"role": "system", "content": draw(texts)}] if takes_system(name) and draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [{"role": "user", "content": draw(texts)}, {"role": "assistant", "content": draw(answers)}]
    return messages


def template_text(messages, tokenizer):
    "What transformers itself makes of it."
    from ftkit.data import ALPACA_TEMPLATE
    other = {} if tokenizer.chat_template else {"chat_template": ALPACA_TEMPLATE, "begin_text": ""}
    return tokenizer.apply_chat_template(messages, tokenize=False, date_string="26 Jul 2024", **other)


def runs(row, tokenizer):
    "Texts of the stretches of trained tokens."
    stretches = re.findall("1+|0+", "".join("01"[label != -100] for label in row["labels"]))
    ends = [sum(map(len, stretches[:k + 1])) for k in range(len(stretches))]
    return [tokenizer.decode(row["input_ids"][end - len(part):end]) for end, part in zip(ends, stretches) if part[0] == "1"]


def answers_of(messages, name):
    "What must be trained, by what is known of the family; None where its template rewrites answers."
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    end = "<|endoftext|>" if name == "alpaca" else FAMILIES[name][3]
    if name == "qwen3": return None if "think>" in answers[-1] else ["<think>\n\n</think>\n\n" + answers[-1].lstrip("\n") + end]
    if name == "mistral_v3": answers = answers[-1:] if messages[0]["role"] == "system" and messages[0]["content"] else answers   # it moves the system text to the last question
    if name in ("llama3", "gemma"): answers = [answer.strip() for answer in answers]
    return [(" " if name == "mistral" else "") + answer + end for answer in answers]


@pytest.mark.parametrize("name", NAMES)
def test_text_mask_and_prompt(name):
    tokenizer, seen = tokenizer_of(name), []

    @MANY
    @given(conversations(name))
    @example([{"role": "user", "content": "Without"}, {"role": "assistant", "content": "a mark."}])
    def holds(messages):
        record = {"messages": messages}
        row, prompt = encode(record, tokenizer, max_length=None), encode_prompt(record, tokenizer)
        decoded, text = tokenizer.decode(row["input_ids"]), template_text(messages, tokenizer)
        if name == "phi3": decoded, text = (re.sub(r"\s", "", each) for each in (decoded, text))   # its marks swallow white space behind them
        assert decoded == text
        assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"]))
        expected = answers_of(messages, name)
        if expected is not None: assert runs(row, tokenizer) == expected
        assert row["input_ids"][:len(prompt)] == prompt and row["labels"][len(prompt)] != -100
        assert row["labels"][len(prompt):].count(-100) < len(row["labels"]) - len(prompt)
        seen.append(any(mark in message["content"] for message in messages for mark in tokenizer.all_special_tokens))

    holds()
    assert any(seen) and not all(seen), "texts with and without the template's marks"


@pytest.mark.parametrize("name", NAMES)
def test_only_the_template_writes_control_tokens(name):
    "The special tokens of a row are those of the same conversation about nothing."
    tokenizer = tokenizer_of(name)
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}

    @MANY
    @given(conversations(name))
    def holds(messages):
        assume(all(message["content"].strip() for message in messages))   # a template may leave out what is empty
        def control(talk): return [token for token in encode({"messages": talk}, tokenizer, max_length=None)["input_ids"] if token in special]
        assert control(messages) == control([message | {"content": "x"} for message in messages])

    holds()


@pytest.mark.parametrize("name", ["smollm2", "qwen3", "gemma", "alpaca"])
def test_truncation_is_never_silent(name):
    "However short the limit: what is kept is the head, and a row without a trained token is found and told."
    tokenizer = tokenizer_of(name)

    @settings(MANY, max_examples=15)
    @given(conversations(name), st.data())
    def holds(messages, data):
        record = {"messages": messages}
        whole = encode(record, tokenizer, max_length=None)
        limit = data.draw(st.integers(1, whole["length"] + 1))
        told, handler = [], logging.Handler()
        handler.emit = lambda line: told.append(line.getMessage())
        logging.getLogger("ftkit").addHandler(handler)
        try: row = encode_data([record], tokenizer, max_length=limit)[0]
        finally: logging.getLogger("ftkit").removeHandler(handler)
        assert (row["input_ids"], row["labels"], row["cut"]) == (whole["input_ids"][:limit], whole["labels"][:limit], max(0, whole["length"] - limit))
        nothing = set(row["labels"]) == {-100}
        assert rows_without_trained_tokens([row]) == [0] * nothing
        assert any("1 left with no trained token" in line for line in told) == nothing
        assert any(f"longer than max_length={limit}, {row['cut']} tokens cut off" in line for line in told) == (row["cut"] > 0)

    holds()


# ---- TRL's assistant_only_loss, with the templates that TRL patches for it

TRL = {"qwen2_5": "qwen3", "qwen3": "qwen3", "qwen3_instruct_2507": "qwen3", "llama3": "llama3", "phi3": "phi3", "phi3_5": "phi3", "gemma": "gemma", "lfm2": "smollm2"}
PLAIN = st.lists(st.sampled_from(["x", "The capital", "\n", " ", "é", "🎉", "{}", "1 2", "assistant"]), min_size=1, max_size=5).map("".join).map(str.strip).filter(bool)


@pytest.mark.parametrize("template", TRL)
def test_masks_are_those_of_trl(template):
    """The same tokens, and the same trained but for one thing: TRL's templates go on behind the token that ends a turn, with a newline or an end-of-text token,
    which a model never writes; Qwen 2.5's begin a newline too early. (Qwen 3's history is left out: TRL trains it with a template that keeps the think blocks, which is not the one that generation has.)"""
    from pathlib import Path

    import trl
    from trl.chat_template_utils import get_training_chat_template
    tokenizer = family(TRL[template])
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja").read_text(encoding="utf-8")
    patched = get_training_chat_template(tokenizer) or tokenizer.chat_template

    @settings(MANY, max_examples=20)
    @given(conversations("gemma", PLAIN))
    def holds(messages):
        messages = messages[:2] if template == "qwen3" else messages
        mine = encode({"messages": messages}, tokenizer, max_length=None)
        theirs = tokenizer.apply_chat_template(messages, chat_template=patched, return_dict=True, return_assistant_tokens_mask=True)
        assert tokenizer.decode(theirs["input_ids"]) == tokenizer.decode(mine["input_ids"])
        # Llama 3's prompt ends with two newlines, which this tiny tokenizer splits where more text follows at once
        if template != "llama3": assert theirs["input_ids"] == mine["input_ids"]
        other = {"input_ids": theirs["input_ids"], "labels": [token if bit else -100 for token, bit in zip(theirs["input_ids"], theirs["assistant_masks"])]}
        pairs = list(zip(runs(other, tokenizer), runs(mine, tokenizer), strict=True))
        around = [[more.partition(own)[part] for part in (0, 2)] for more, own in pairs if own in more]
        assert len(around) == len(pairs) and all(before in ("", "\n"[template != "qwen2_5":]) and after in ("", "\n", "<|endoftext|>") for before, after in around), pairs

    holds()
