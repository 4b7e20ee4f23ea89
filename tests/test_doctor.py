"""What 00b0_doctor.ipynb cannot hold comfortably: templates of other families, missing libraries, many rows, the command."""
import json
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from tiny_tokenizers import family

from ftkit.cli import main
from ftkit.data import FtkitError, encode_data, end_of_turn_ids
from ftkit.doctor import CHECKS, Finding, Tokens, _bins, diagnose, fix, mask
from ftkit.models import tiny_tokenizer

WITHOUT = ("languages", "near_duplicates", "held_out_nearly_in_training")


def ask(*pairs): return [dict(instruction=question, input="", output=answer) for question, answer in pairs]


def chat(*contents): return dict(messages=[dict(role=("user", "assistant")[place % 2], content=text) for place, text in enumerate(contents)])


def test_every_check_says_what_it_is():
    for name, check in CHECKS.items():
        assert check.name == name and check.looks_for and check.group in ("template", "mask", "length", "content")
        assert check.reads in ("tokens", "records", "both") and check.cost >= 0
        assert not check.preflight or check.reads == "tokens"


@pytest.mark.parametrize("name", ["qwen3", "llama3", "gemma", "mistral", "phi3"])
def test_a_turn_of_the_own_template_is_unwrapped(name):
    tokenizer = family(name)
    question, other = "How far is the moon from here?", "What is a template?"
    wrapped = tokenizer.apply_chat_template([dict(role="user", content=question)], tokenize=False, add_generation_prompt=True)
    wrapped = wrapped.removeprefix(tokenizer.bos_token or "")
    data = ask((wrapped, "Far."), (other, "A form."))
    report = diagnose(data, tokenizer, without=WITHOUT)
    assert report.rows("template_applied_twice") == [0]
    mended, _ = fix(data, report, checks=["template_applied_twice"])
    assert mended[1] == data[1]
    # Llama 3 writes a system turn before it: more than one turn, so it is left to be mended by hand
    assert mended[0]["instruction"] == (wrapped if name == "llama3" else question)


def test_thinking_in_the_history_is_stripped_by_qwen3_and_kept_by_smollm2():
    thinking = "<think>\nI count.\n</think>\n\nTwo."
    data = [chat("One and one?", thinking, "And one?", "Three."), chat("One and one?", thinking)]
    assert diagnose(data, family("qwen3"), without=WITHOUT).rows("thinking_stripped") == [0]
    assert diagnose(data, tiny_tokenizer(), without=WITHOUT).rows("thinking_stripped") == []


def test_a_system_message_that_is_refused_stops():
    data = [dict(messages=[dict(role="system", content="Be brief."), *chat("a", "b")["messages"]]), chat("a", "b")]
    findings = {finding.check: finding for finding in diagnose(data, family("gemma"), without=WITHOUT).findings}
    assert findings["system_role_dropped"].rows == (0,) and findings["system_role_dropped"].stops


def test_generation_prompt_that_training_lacks():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("'<|im_start|>assistant\\n'", "'<|im_start|>model\\n'") if "'<|im_start|>assistant\\n'" in tokenizer.chat_template else (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>model\n{% endif %}")
    report = diagnose(ask(("a", "b")), tokenizer, without=WITHOUT)
    assert "generation_prompt_differs" in {finding.check for finding in report.findings}
    assert report.rows("not_encodable") == [0]
    assert "generation_prompt_differs" not in {finding.check for finding in diagnose(ask(("a", "b")), tiny_tokenizer(), without=WITHOUT).findings}


def test_pad_that_is_the_end_and_masked():
    tokenizer = family("smollm2", pad_is_end=True)
    row = encode_data(ask(("a", "b c")), tokenizer)[0]
    end = end_of_turn_ids(tokenizer)[0]
    masked = {**row, "labels": [-100 if token == end else label for token, label in zip(row["input_ids"], row["labels"])]}
    report = diagnose([masked, row], tokenizer)
    assert report.rows("pad_masked_as_end") == [0] and report.rows("end_of_turn_not_trained") == [0]
    assert diagnose([masked, row], family("smollm2", pad_is_end=False)).rows("pad_masked_as_end") == []


def test_begin_token_twice():
    tokenizer = family("llama3")
    row = encode_data(ask(("a", "b")), tokenizer)[0]
    twice = {**row, "input_ids": [tokenizer.bos_token_id, *row["input_ids"]], "labels": [-100, *row["labels"]]}
    assert diagnose([row, twice], tokenizer).rows("doubled_begin_token") == [1]


@pytest.mark.parametrize("module, check", [("datasketch", "near_duplicates"), ("py3langid", "languages"), ("ftfy", "mojibake")])
def test_a_missing_library_is_named_with_its_extra(monkeypatch, module, check):
    monkeypatch.setitem(sys.modules, module, None)
    report = diagnose(ask(("Tell me a long story about a dog that lives in a small house", "There was once a dog")), tiny_tokenizer())
    assert "ftkit[doctor]" in report.not_run[check] and check not in {finding.check for finding in report.findings}


def test_what_is_given_is_not_changed_and_every_change_is_told():
    data = ask(("q1", "cafÃ©"), ("q2", "same"), ("q2", "same"), ("q3", ""), ("q4", "bell\x07"), ("q5", "held out"))
    before = json.dumps(data)
    report = diagnose(data, tiny_tokenizer(), held_out=data[5:])
    mended, changes = fix(data, report)
    assert json.dumps(data) == before
    assert [record["output"] for record in mended] == ["café", "same", "bell"]
    assert sorted((change.row, change.check, change.action) for change in changes) == [
        (0, "mojibake", "edited"), (2, "exact_duplicates", "removed"), (3, "empty_answers", "removed"), (4, "control_characters", "edited"), (5, "held_out_in_training", "removed")]
    only, _ = fix(data, [next(f for f in report.findings if f.check == "empty_answers")])
    assert len(only) == 5
    with pytest.raises(FtkitError, match="diagnose it again"): fix(data[:2], report)


def test_a_dataset_stays_one():
    from datasets import Dataset
    data = Dataset.from_list(ask(("q", "a"), ("q", "a")))
    mended, changes = fix(data, diagnose(data, tiny_tokenizer()))
    assert isinstance(mended, Dataset) and mended.features == data.features and len(mended) == len(changes) == 1


@pytest.mark.parametrize("secret", ["AKIA" + "Z7QX" * 4, "ghp_" + "a1B2" * 9, "hf_" + "aBcD" * 8, "sk-" + "a8Bq" * 8, "password: tr0ub4dor&3xyz", "Api_Key=9f8e7d6c5b4a",
                                    "-----BEGIN RSA PRIVATE KEY-----\n" + "MIIabc123" * 200, "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmN"])
def test_secrets_are_shown_nowhere(secret):
    data = ask((f"q {secret}", f"<b>{secret}</b>"), (f"q {secret}", f"<b>{secret}</b>"))
    report = diagnose(data, tiny_tokenizer(), max_length=8192)
    assert report.rows("secrets") == [0, 1]
    mended, changes = fix(data, report, checks=["secrets", "exact_duplicates"])
    body = secret[12:28]
    for shown in (repr(report), report._repr_html_(), repr(report.findings), repr(changes), changes._repr_html_()): assert body not in shown
    assert len(mended) == 1 and body not in json.dumps(mended)


@pytest.mark.parametrize("text", ["sk-learn is a library that everybody knows", "the key is missing", "task-specific-configuration-of-models", "2026-11-26 12:30:45", "0.123456789012", "user@host", "10.0.0.254"])
def test_what_is_no_secret_is_left_alone(text): assert mask(text) == text


@pytest.mark.parametrize("answer", ["TODO", "N/A", "[insert description here]", "...", "<your answer here>"])
def test_a_placeholder_is_no_answer(answer):
    rows = [{"instruction": "What is it?", "output": answer}, {"instruction": "And this?", "output": "A stone, not applicable to glass."}]
    [finding] = [f for f in diagnose(rows, family("smollm2")).findings if f.check == "placeholder_answers"]
    assert finding.rows == (0,)


def test_an_override_of_the_writing_direction_is_removed():
    rows = [{"instruction": "Say it.", "output": "access \u202elevel\u200d"}]   # a joiner is part of some scripts
    mended, changes = fix(rows, diagnose(rows, family("smollm2")))
    assert (mended[0]["output"], len(changes)) == ("access level\u200d", 1)


def test_short_chinese_is_told_from_english():
    rows = [{"instruction": "用中文介绍一下长城，它有多长？", "output": "长城全长超过两万公里，是古代的防御工程。"}] * 3
    assert any(f.message.startswith("languages: zh 100") for f in diagnose(rows, family("smollm2")).findings)


def test_markup_is_shown_as_text():
    data = ask(("<script>alert(1)</script>", "x"), ("<script>alert(1)</script>", "x"))
    shown = diagnose(data, tiny_tokenizer())._repr_html_()
    assert "<script>" not in shown and "&lt;script&gt;" in shown


def test_bins_are_counted_like_a_plain_best_fit():
    def plain(lengths, size):
        rooms = []
        for length in sorted(lengths, reverse=True):
            fits = [room for room in rooms if room >= length]
            if fits: rooms.remove(min(fits))
            rooms.append((min(fits) if fits else size) - length)
        return len(rooms)
    generator = np.random.default_rng(0)
    for _ in range(20):
        lengths = generator.integers(1, 60, 80)
        assert _bins(lengths, 64) == plain(lengths.tolist(), 64)


def test_a_time_limit_is_kept_and_said():
    report = diagnose(ask(("a", "b")) * 3, tiny_tokenizer(), seconds=0)
    assert set(report.not_run) == set(CHECKS) and "seconds" in report.not_run["near_duplicates"]


def test_the_command(tmp_path, monkeypatch):
    import ftkit.cli
    monkeypatch.setattr(ftkit.cli, "_tokenizer", lambda model: tiny_tokenizer())
    path, out = tmp_path / "data.jsonl", tmp_path / "out.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in ask(("q1", "a"), ("q1", "a"), ("q2", ""))))
    done = CliRunner().invoke(main, ["diagnose", str(path), "--fix", str(out)])
    assert done.exit_code == 1 and "exact_duplicates" in done.output and "1 of 3 rows" in done.output
    assert [json.loads(line) for line in out.read_text().splitlines()] == ask(("q1", "a"))
    assert CliRunner().invoke(main, ["diagnose", str(out)]).exit_code == 0
