"Tokens and keys in the environment, in options and in what fails: a run's whole life, and then every byte that it has written or shown is searched for them."
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import TrainerCallback

import ftkit.train as train
from ftkit.cli import explain, main
from ftkit.data import FtkitError
from ftkit.export import _check_secrets, _without_token, export
from ftkit.live import panel
from ftkit.lora import add_lora
from ftkit.models import load_model, tiny_model
from ftkit.report import write_model_card
from ftkit.train import Run

SECRETS = dict(HF_TOKEN="hf_" + "Ab1" * 11, HUGGING_FACE_HUB_TOKEN="hf_" + "Cd2" * 11, WANDB_API_KEY="9f8e7d6c5b4a39281706f5e4d3c2b1a098765432", AWS_ACCESS_KEY_ID="AKIA" + "Q7Z" * 5 + "X", AWS_SECRET_ACCESS_KEY="wJalrXUtnFEMI/K7MDENG/bPxRfiCYCANARYKEY",
               OPENAI_API_KEY="sk-proj-" + "Ef3" * 9, DATABASE_PASSWORD="correct-horse-battery-9")
UNNAMED = ["hf_" + "Gh4" * 11, "sk-" + "Ij5" * 11, "ghp_" + "Kl6" * 12, "secret-in-url-7"]  # known by their form alone
TROUBLE = f"401 from https://me:{UNNAMED[3]}@hub.example/?token={SECRETS['HF_TOKEN']} with {' '.join([*SECRETS.values(), *UNNAMED[:3]])}"
RECORDS = [dict(instruction="Say it.", input=word, output=word.upper()) for word in "one two three four five six".split()]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name, value in SECRETS.items(): monkeypatch.setenv(name, value)


def told(text) -> list[str]:
    "The secrets in a text or in bytes."
    data = text if isinstance(text, bytes) else str(text).encode()
    return [secret for secret in [*SECRETS.values(), *UNNAMED] if secret.encode() in data]


class Tracker(TrainerCallback):
    "Keeps what a tracker of experiments would be given, and fails at the fourth step as a client of one may."

    def __init__(self): self.given, self.fails = [], False
    def on_train_begin(self, args, state, control, model=None, **kwargs): self.given += [args.to_json_string(), model.config.to_json_string()]
    def on_log(self, args, state, control, logs=None, **kwargs): self.given.append(str(logs))

    def on_step_end(self, args, state, control, **kwargs):
        if self.fails and state.global_step == 4: raise RuntimeError(TROUBLE)


def test_the_search_finds_what_is_there():
    assert told(f"x{SECRETS['HF_TOKEN']}y") == [SECRETS["HF_TOKEN"]] and not told("nothing")


def test_a_whole_life(tmp_path, capfd, caplog):
    caplog.set_level(logging.DEBUG, "ftkit")
    model, tokenizer = tiny_model()
    model.save_pretrained(tmp_path / "base"), tokenizer.save_pretrained(tmp_path / "base")
    model, tokenizer = load_model(tmp_path / "base", dtype=torch.float32, device="cpu")
    tracker, shown = Tracker(), []
    facts = dict(command=dict(data=f"/data/{UNNAMED[0]}/rows.jsonl"), note=TROUBLE)
    options = dict(max_steps=6, per_device_train_batch_size=3, learning_rate=3e-2, save_steps=2, allow="held_out_in_training", callbacks=(tracker,))
    run = Run(add_lora(model, targets="all-linear"), tokenizer, RECORDS, RECORDS[:2], name="life", root=tmp_path / "runs", facts=facts, **options)
    tracker.fails = True
    with pytest.raises(RuntimeError): run.fit()
    run.say(TROUBLE)
    run.journal.write("note", step=4, text=TROUBLE, deep={"key": [TROUBLE]})
    board = panel(run)
    shown += [*board._picture().values(), board.notice.value, board.notes.value]
    board._tell("branch", RuntimeError(TROUBLE))
    shown += [board.actions.value, str(run.history)]
    board.close()
    tracker.fails = False
    run.fit(), run.save(note=TROUBLE, title=TROUBLE)
    shown += [str(export(run, tmp_path / "out", note=TROUBLE)), repr(run)]
    done = CliRunner().invoke(main, ["resume", str(run.folder)], standalone_mode=False)
    shown += [done.output, explain(RuntimeError(TROUBLE))[1], explain(FtkitError(TROUBLE))[1], _without_token(TROUBLE), *tracker.given, caplog.text, *capfd.readouterr()]
    assert [told(text) for text in shown if told(text)] == []
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 30 and {path: told(path.read_bytes()) for path in written if told(path.read_bytes())} == {}
    assert "[secret]" in (run.folder / "journal.jsonl").read_text() and "[secret]" in (run.folder / "config.yaml").read_text()


@pytest.mark.parametrize("option", [dict(run_name=UNNAMED[0]), dict(run_name=SECRETS["WANDB_API_KEY"]), dict(hub_token="anything"), dict(hub_model_id=UNNAMED[2]), dict(lr_scheduler_kwargs={"a": UNNAMED[1]})], ids=str)
def test_an_option_that_is_a_secret_is_refused(option, tmp_path):
    model, tokenizer = tiny_model()
    with pytest.raises(FtkitError) as error: Run(add_lora(model), tokenizer, RECORDS, root=tmp_path / "runs", quiet=True, **option)
    assert not told(error.value) and "hub_token" in str(error.value) or "holds what is or looks like a token" in str(error.value)
    assert not list(tmp_path.rglob("*"))


def test_a_detached_process_tells_its_log_nothing(tmp_path):
    done = subprocess.run([sys.executable, "-c", train._DETACHED, str(tmp_path / SECRETS["HF_TOKEN"]), "{}", "False"], capture_output=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 1 and b"[secret] is not the folder of a run" in done.stderr and not told(done.stderr + done.stdout)


def test_the_traceback_of_the_command_line(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("FTKIT_DEBUG", "1")
    monkeypatch.setattr("ftkit.cli.read_journal", lambda folder: (_ for _ in ()).throw(RuntimeError(TROUBLE)))
    with pytest.raises(SystemExit): main(["resume", str(tmp_path)])
    said = "".join(capfd.readouterr())
    assert "Traceback" in said and not told(said)


def test_cards_and_uploads(tmp_path):
    card = write_model_card(tmp_path, dict(base_model=TROUBLE, note=TROUBLE, settings={TROUBLE: TROUBLE}, scores={"a": {"b": TROUBLE}}, license=TROUBLE)).read_text()
    assert not told(card.replace("\\", ""))
    for secret in [*SECRETS.values(), *UNNAMED[:3]]:
        (tmp_path / "notes.md").write_text(f"by hand: {secret}")
        with pytest.raises(FtkitError, match="seems to hold an access token") as error: _check_secrets(tmp_path, ["notes.md"])
        assert not told(error.value)


def test_the_environment_stays_as_it_is():
    assert all(os.environ[name] == value for name, value in SECRETS.items()) and Path.cwd().exists()
