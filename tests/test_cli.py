"The command line, end to end on a tiny model: its exit codes, its one-line errors, and runs that are killed, interrupted and steered."
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import yaml
from click.testing import CliRunner
from ftkit.cli import main, run_report
from ftkit.control import Journal, read_journal
from layout import ROOT

STEPS = 120
TRAINING = ["--steps", str(STEPS), "--checkpoint-every", "20", "--evaluate-every", "60", "--batch-size", "4", "--lr", "1e-3"]
WORDS = "stressed drawer lager repaid warts gums parts live reward diaper straw smug decaf knits pals spoons star tips wolf deer loops mood pools stop".split()


def record(word):
    return {"instruction": "Say it backwards.", "input": word, "output": word[::-1]}


def write_lines(path, lines):
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return str(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with a model, data, and a cache of its own; commands run in it, in this process and in others alike."
    import torch
    from ftkit.models import tiny_model
    folder, before, threads = tmp_path_factory.mktemp("cli"), os.getcwd(), torch.get_num_threads()
    for kind in ("llama", "qwen"):
        for part in tiny_model(kind):
            part.save_pretrained(folder / kind)
    write_lines(folder / "words.jsonl", map(record, WORDS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # the same sums in every process
        patch.setenv("FTKIT_CACHE", str(folder / "cache"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.delenv("FTKIT_DEBUG", raising=False)
        patch.chdir(folder)
        torch.set_num_threads(1)
        yield folder
        torch.set_num_threads(threads)
    os.chdir(before)


def ftkit(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def train(data, *arguments):
    return ftkit("train", data, "--model", "llama", *arguments)


def refused(result, *contains, code=2):
    "One line on standard error, no traceback, the exit code, and no run that was begun."
    assert result.exit_code == code, result.output
    assert result.stderr.startswith("ftkit: ") and result.stderr.count("\n") == 1, result.stderr
    for text in contains:
        assert text in result.stderr
    return result


@contextmanager
def process(*arguments):
    "The command in a process of its own; ended, whatever happens."
    command = [sys.executable, "-c", "from ftkit.cli import main; main()", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        yield child
    finally:
        if child.poll() is None:
            child.kill()
        child.communicate()


def wait_for_step(child, folder, step, seconds=120):
    "Until the journal has this step; the process must not have ended before."
    end = time.monotonic() + seconds
    while not any(event["what"] == "step" and event["step"] >= step for event in read_journal(folder)):
        assert child.poll() is None, child.communicate()[0]
        assert time.monotonic() < end, "no such step in time"
        time.sleep(0.01)


def weights(folder):
    from safetensors.torch import load_file
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_same_weights(one, other):
    import torch
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- a whole run

@pytest.fixture(scope="module")
def whole(place):
    "A run that was never disturbed."
    result = train("words.jsonl", "--name", "whole", *TRAINING)
    assert result.exit_code == 0, result.output
    return place / "runs" / "whole", result


def test_train_leaves_what_it_names(whole):
    folder, result = whole
    for name in ("config.yaml", "journal.jsonl", "losses.png", "adapter/adapter_config.json", "adapter/README.md"):
        assert (folder / name).exists(), name
    for text in (f"steps          {STEPS}", "loss", "held-out loss", "tokens", "runs/whole/adapter", "runs/whole/losses.png", f"ftkit resume runs/whole --steps {2 * STEPS}"):
        assert text in result.output
    assert result.output.rstrip().endswith(run_report("runs/whole"))
    assert [event["step"] for event in read_journal(folder) if event["what"] == "step"] == list(range(1, STEPS + 1))


def test_the_adapter_is_trained_and_loads_in_plain_peft(whole, place):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place / "llama"), whole[0] / "adapter")
    assert all(value.abs().sum() > 0 for name, value in weights(whole[0]).items() if "lora_B" in name)
    losses = [event["held_out_loss"] for event in read_journal(whole[0]) if event["what"] == "evaluate"]
    assert losses[-1] < losses[0]


def test_a_second_run_of_the_same_name_leaves_the_first(whole):
    before = {path: path.stat().st_mtime_ns for path in whole[0].rglob("*")}
    assert train("words.jsonl", "--name", "whole", "--steps", 1).exit_code == 0
    assert (whole[0].parent / "whole-2" / "adapter").exists()
    assert {path: path.stat().st_mtime_ns for path in whole[0].rglob("*")} == before


def test_a_run_repeats_from_its_own_config(whole):
    result = ftkit("train", "--config", whole[0] / "config.yaml", "--name", "repeated")
    assert result.exit_code == 0, result.output
    assert_same_weights(whole[0], whole[0].parent / "repeated")


def test_a_finished_run_is_not_begun_again(whole):
    before = (whole[0] / "journal.jsonl").read_bytes()
    result = ftkit("resume", whole[0])
    assert result.exit_code == 0 and f"is finished, at step {STEPS}" in result.output
    assert (whole[0] / "journal.jsonl").read_bytes() == before
    refused(ftkit("resume", whole[0], "--steps", 3), f"has reached step {STEPS}, so --steps 3 would end it")
    assert (whole[0] / "journal.jsonl").read_bytes() == before


def test_the_config_of_a_run_holds_all_that_repeats_it(whole):
    config = yaml.safe_load((whole[0] / "config.yaml").read_text())
    block = config["command"]
    assert block["dtype"] == config["model"]["dtype"] and block["held_out"] == 0.1 and block["alpha"] == 32
    assert {"max_length": 1024, "seed": 42, "lr": 1e-3, "epochs": 1, "dropout": 0.0}.items() <= block.items()
    assert block["set"]["warmup_steps"] == 0.05


def test_nothing_held_out_and_another_format_are_repeated(place, tmp_path):
    other = "bfloat16" if yaml.safe_load((place / "runs" / "whole" / "config.yaml").read_text())["model"]["dtype"] == "float32" else "float32"
    assert train("words.jsonl", "--root", tmp_path, "--name", "a", "--steps", 1, "--held-out", 0, "--dtype", other).exit_code == 0
    assert ftkit("train", "--config", tmp_path / "a" / "config.yaml", "--name", "b").exit_code == 0
    a, b = (yaml.safe_load((tmp_path / name / "config.yaml").read_text()) for name in "ab")
    assert b["model"]["dtype"] == other and b["held_out"] is None and a["options"] == b["options"]
    assert a["command"] | {"name": "b"} == b["command"]


def test_a_config_that_train_did_not_write(place, tmp_path):
    for text in ("command: {data: words.jsonl}\nname: demo\nversions: {}\n", "name: run\nversions: {}\noptions: {}\n"):
        (tmp_path / "config.yaml").write_text(text)
        refused(train("words.jsonl", "--root", tmp_path / "runs", "--config", tmp_path / "config.yaml"), "`ftkit train` did not start")
    assert not (tmp_path / "runs").exists()


def test_further_from_an_adapter(whole):
    result = train("words.jsonl", "--adapter", whole[0] / "adapter", "--steps", 2, "--name", "further")
    assert result.exit_code == 0, result.output
    first = next(event for event in read_journal("runs/further") if event["what"] == "evaluate")
    assert first["held_out_loss"] == pytest.approx([e for e in read_journal(whole[0]) if e["what"] == "evaluate"][-1]["held_out_loss"], rel=1e-4)
    refused(train("words.jsonl", "--adapter", whole[0] / "adapter", "--rank", 4), "leave out --rank")
    refused(train("words.jsonl", "--adapter", "words.jsonl"), "holds no adapter")


def test_any_base_without_an_adapter():
    for method in ("lora", "full"):
        refused(train("words.jsonl", "--method", method, "--any-base"), "--any-base belongs to --adapter")


def test_export_of_an_adapter_that_lies_alone(whole, tmp_path):
    shutil.copytree(whole[0] / "adapter", tmp_path / "alone")
    refused(ftkit("export", tmp_path / "alone"), "give --held-out FILE")
    result = ftkit("export", tmp_path / "alone", "--form", "adapter", "--held-out", "words.jsonl")
    assert result.exit_code == 0 and (tmp_path / "alone" / "export-adapter" / "certificate.json").exists(), result.output
    refused(ftkit("export", whole[0], "--form", "adapter", "--numbers", "f16"), "leave out --numbers")
    refused(ftkit("export", whole[0], "--numbers", "q4_0"), "--numbers q4_0: for --form safetensors there are bf16")


def test_an_adapter_for_another_base(whole):
    refused(ftkit("train", "words.jsonl", "--model", "qwen", "--adapter", whole[0] / "adapter", "--name", "other"), "this adapter was trained on")
    assert not (whole[0].parent / "other").exists()


def test_an_adapter_for_another_base_of_the_same_name_and_shape(whole, tmp_path):
    from ftkit.models import tiny_model
    for part in tiny_model("llama", seed=7):
        part.save_pretrained(tmp_path / "llama")
    arguments = ("train", "words.jsonl", "--model", tmp_path / "llama", "--adapter", whole[0] / "adapter", "--root", tmp_path / "runs", "--steps", 1)
    refused(ftkit(*arguments), "this adapter was trained on", "hold other values", "--any-base")
    assert not (tmp_path / "runs").exists()
    assert ftkit(*arguments, "--any-base").exit_code == 0


# ---- bad input: one line, exit code 2, nothing left behind

@pytest.mark.parametrize("lines, contains", [
    ([], ["data.jsonl", "no record"]),
    ([record("tab"), '{"instruction": "Say'], ["data.jsonl: line 2", "not valid JSON"]),
    ([record("tab"), record("bat"), {"instruction": "Say it."}], ["data.jsonl: line 3", "'output' is missing"]),
    ([record("tab"), {"instruction": "Say it.", "output": "\x1b[31m"}, {"x\x1b[31m": 1}], ["line 3", "neither Alpaca"]),
])
def test_bad_data(place, tmp_path, lines, contains):
    result = refused(train(write_lines(tmp_path / "data.jsonl", lines), "--root", tmp_path / "runs"), *contains)
    assert "\x1b" not in result.stderr
    assert not (tmp_path / "runs").exists()


def test_no_file(place):
    refused(train("nowhere.jsonl"), "nowhere.jsonl", "No such file")


def test_skip_bad(place, tmp_path):
    data = write_lines(tmp_path / "data.jsonl", [record("tab"), '{"instruction": "Say', record("bat"), {"instruction": "Say it."}])
    result = train(data, "--root", tmp_path / "runs", "--skip-bad", "--steps", 1)
    assert result.exit_code == 0, result.output
    rejected = [json.loads(line) for line in (tmp_path / "runs" / "data" / "rejected.jsonl").read_text().splitlines()]
    assert [row["line"] for row in rejected] == [2, 4] and "'output' is missing" in rejected[1]["error"]
    assert "2 bad lines left out" in result.output


def test_a_table_whose_columns_are_named(place, tmp_path):
    "A CSV of questions and answers: refused with the options that would do, then trained on; its config repeats it."
    (tmp_path / "quiz.csv").write_text("question,answer\n" + "".join(f"{word}?,{word[::-1]}\n" for word in WORDS[:4]))
    common = (tmp_path / "quiz.csv", "--root", tmp_path / "runs", "--steps", 1)
    refused(train(*common), "quiz.csv", "--column question=prompt --column answer=completion would make it prompt and completion")
    refused(train(*common, "--column", "question"), "'question' is not of the form old=new")
    refused(train(*common, "--column", "question=prompt", "--column", "answer=completion", "--format", "alpaca"), "no field of format 'alpaca'")
    result = train(*common, "--column", "question=prompt", "--column", "answer=completion")
    assert result.exit_code == 0, result.output
    result = train(tmp_path / "quiz.csv", "--config", tmp_path / "runs" / "quiz" / "config.yaml", "--name", "again", "--root", tmp_path / "runs")
    assert result.exit_code == 0, result.output


def test_plain_text_and_a_folder(place, tmp_path):
    "Held-out text has no prompt to be asked by: the run samples nothing."
    (tmp_path / "texts").mkdir()
    write_lines(tmp_path / "texts" / "a.jsonl", [{"text": f"{word} is {word[::-1]}."} for word in WORDS[:6]])
    result = train(tmp_path / "texts", "--root", tmp_path / "runs", "--steps", 1, "--held-out", 2)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "runs" / "texts" / "data" / "prompts.jsonl").read_text() == ""


def test_skip_bad_of_nothing_but_bad_lines(place, tmp_path):
    result = train(write_lines(tmp_path / "data.jsonl", ["{", "["]), "--root", tmp_path / "runs", "--skip-bad")
    refused(result, "no record", "2 left out")


def test_skip_bad_of_a_run_that_is_refused_later(place, tmp_path):
    data = write_lines(tmp_path / "data.jsonl", [record("tab"), "{", {**record("bat"), "input": "long " * 60}, "["])
    result = train(data, "--root", tmp_path / "runs", "--skip-bad", "--max-length", 128)
    assert result.exit_code == 2 and "no token to train" in result.stderr and result.stderr.endswith("left out before, as bad lines: 2, 4\n")
    assert not (tmp_path / "runs").exists()


def test_a_record_over_the_limit_is_counted_and_cut(place, tmp_path):
    data = write_lines(tmp_path / "data.jsonl", [record("tab"), {**record("bat"), "output": "long " * 60}])
    result = train(data, "--root", tmp_path / "runs", "--steps", 1, "--max-length", 128)
    assert result.exit_code == 0 and "cut_answers" in result.output and "1 such row" in result.output


def test_no_trained_token_left(place, tmp_path):
    data = write_lines(tmp_path / "data.jsonl", [record("tab"), {**record("bat"), "input": "long " * 60}])
    common = ("--root", tmp_path / "runs", "--steps", 1, "--max-length", 128)
    refused(train(data, *common), "no token to train", "no_trained_tokens")
    assert not (tmp_path / "runs").exists()
    assert train(data, *common, "--allow", "no_trained_tokens").exit_code == 0


@pytest.mark.parametrize("arguments, contains", [
    (["--model", "nowhere/nothing"], ["nowhere/nothing"]),
    (["--model", "words.jsonl"], ["words.jsonl"]),
    (["--targets", "q_prj"], ["q_prj", "q_proj"]),
    (["--rank", "0"], ["--rank", "0"]),
    (["--method", "qlor"], ["--method", "qlora", "lora"]),
    (["--dropout", "1"], ["--dropout"]),
    (["--steps", "many"], ["--steps", "many"]),
    (["--held-out", "1.5"], ["--held-out", "neither a whole number nor a share"]),
    (["--held-out", "24"], ["held_out=24 of 24"]),
    (["--name", "../escape"], ["../escape"]),
    (["--name", "two\nlines"], ["is not a name", "by --name"]),
    (["--name", ""], ["is not a name", "by --name"]),
    (["--name", "x" * 300], ["is not a name", "by --name"]),
    (["--lr", "nan"], ["--lr", "not a finite number"]),
    (["--alpha", "inf"], ["--alpha", "not a finite number"]),
    (["--epochs", "nan"], ["--epochs", "not a finite number"]),
    (["--dtype", "float8"], ["--dtype", "bfloat16"]),
    (["--set", "learning_rate=abc"], ["learning_rate is 'abc': it must be a number"]),
    (["--set", "learning_rate=NaN"], ["learning_rate is nan: it must be a number"]),
    (["--set", "weight_decay=abc"], ["weight_decay is 'abc'"]),
    (["--set", "num_train_epochs=true"], ["num_train_epochs is True"]),
    (["--set", "per_device_train_batch_size=0"], ["per_device_train_batch_size is 0", "at least 1"]),
    (["--set", "per_device_train_batch_size=x"], ["per_device_train_batch_size is 'x'", "whole number"]),
    (["--set", "gradient_accumulation_steps=0"], ["gradient_accumulation_steps is 0", "at least 1"]),
    (["--set", "seed=-1"], ["seed is -1"]),
    (["--set", "report_to=a_tracker"], ["report_to='a_tracker' cannot be used"]),
    (["--set", "push_to_hub=true"], ["push_to_hub=True cannot be used"]),
    (["--set", "logging_strategy=no"], ["leave the journal without steps"]),
    (["--held-out", "0", "--set", "load_best_model_at_end=true"], ["these options cannot be used", "save and eval strategy"]),
    (["--set", "weight_decai=1"], ["weight_decai", "not an option"]),
    (["--set", "lr_scheduler_type=wavy"], ["wavy"]),
    (["--set", "output_dir=x"], ["output_dir"]),
    (["--set", "nothing"], ["name=value"]),
    (["--lr", "1e-4", "--set", "learning_rate=1"], ["learning_rate is given twice"]),
    (["--config", "nowhere.yaml"], ["nowhere.yaml", "No such file"]),
    (["--nonsense"], ["No such option"]),
])
def test_bad_options(place, tmp_path, arguments, contains):
    refused(train("words.jsonl", "--root", tmp_path / "runs", "--steps", 1, *arguments), *contains)
    assert not (tmp_path / "runs").exists() and not (tmp_path / "escape").exists()


def test_names_are_tried_before_a_model_is_loaded(place, tmp_path, monkeypatch):
    monkeypatch.setattr("ftkit.models.load_model", lambda *arguments, **options: pytest.fail("loaded"))
    refused(train(write_lines(tmp_path / ".hidden.jsonl", [record("tab")]), "--root", tmp_path / "runs"), "'.hidden' is not a name", "by --name")
    assert not (tmp_path / "runs").exists()


def test_the_best_model_at_the_end(place, tmp_path):
    result = train("words.jsonl", "--root", tmp_path, "--name", "best", "--steps", 4, "--set", "load_best_model_at_end=true")
    assert result.exit_code == 0, result.output
    assert yaml.safe_load((tmp_path / "best" / "config.yaml").read_text())["options"]["save_steps"] == 0.25


@pytest.mark.parametrize("text, contains", [
    ("stepps: 3\nlearning-rat: 1\n", ["unknown options stepps, learning_rat", "batch_size"]),
    ("steps: many\n", ["--steps", "many"]),
    ("steps: [1, 2]\n", ["--steps"]),
    ("steps: {a: 1}\n", ["steps must be one value"]),
    ("set: 3\n", ["set must hold"]),
    ("- steps\n", ["must hold options"]),
    ("steps: [\n", ["not valid YAML"]),
    ("rank: true\n", ["rank is true", "no switch"]),
    ("steps: yes\n", ["steps is true", "no switch"]),
    ("config: x.yaml\n", ["unknown option config"]),
])
def test_bad_yaml(place, tmp_path, text, contains):
    (tmp_path / "bad.yaml").write_text(text)
    refused(train("words.jsonl", "--root", tmp_path / "runs", "--config", tmp_path / "bad.yaml"), *contains)
    assert not (tmp_path / "runs").exists()


def test_yaml_and_what_wins_over_it(place, tmp_path):
    settings = dict(data="words.jsonl", model="llama", root=str(tmp_path / "runs"), name="yaml", steps=50, lr="1e-3", held_out=4,
                    targets=["q_proj", "v_proj"], allow="cut_answers", set=dict(weight_decay="1e-2", lr_scheduler_type="cosine"))
    (tmp_path / "good.yaml").write_text(yaml.safe_dump(settings))
    result = ftkit("train", "--config", tmp_path / "good.yaml", "--steps", 2, "--set", "weight_decay=0.5")
    assert result.exit_code == 0, result.output
    config = yaml.safe_load((tmp_path / "runs" / "yaml" / "config.yaml").read_text())
    expected = dict(max_steps=2, learning_rate=1e-3, weight_decay=0.5, lr_scheduler_type="cosine")
    assert expected.items() <= config["options"].items()
    assert config["held_out"]["rows"] == 4 and config["allow"] == ["cut_answers"]
    adapter = json.loads((tmp_path / "runs" / "yaml" / "adapter" / "adapter_config.json").read_text())
    assert set(adapter["target_modules"]) == {"q_proj", "v_proj"}


@pytest.mark.parametrize("command", [["train", "words.jsonl", "--model", "llama", "--root"], ["demo", "--out"]])
@pytest.mark.parametrize("folder", ["words.jsonl", "words.jsonl/runs", "/proc/runs", "x" * 300])
def test_output_that_cannot_be_written(place, command, folder):
    if folder.startswith("/proc") and not os.path.exists("/proc/self"):
        pytest.skip("no /proc")
    refused(ftkit(*command, folder), "cannot write", folder[:40])


# ---- errors of other kinds

def test_an_unexpected_error_is_one_line_too(place, monkeypatch):
    def broken(*arguments, **options): raise KeyError("first\nsecond")
    monkeypatch.setattr("ftkit.cli.load_data", broken)
    refused(train("words.jsonl"), "unexpected KeyError", "FTKIT_DEBUG=1", code=1)
    monkeypatch.setenv("FTKIT_DEBUG", "1")
    result = train("words.jsonl")
    assert result.exit_code == 1 and "Traceback" in result.stderr and result.stderr.splitlines()[-1].startswith("ftkit: unexpected KeyError")


def test_a_full_disk_and_an_interrupt(place, monkeypatch):
    def full(*arguments, **options): raise OSError(28, "No space left on device", "runs/x")
    monkeypatch.setattr("ftkit.cli.load_data", full)
    refused(train("words.jsonl"), "runs/x: No space left on device", code=1)
    def interrupted(*arguments, **options): raise KeyboardInterrupt
    monkeypatch.setattr("ftkit.cli.load_data", interrupted)
    result = train("words.jsonl")
    assert result.exit_code == 130 and result.stderr.split("\n")[-2:] == ["ftkit: interrupted", ""]


def test_wrong_use():
    refused(ftkit("tarin"), "tarin")
    refused(ftkit("train"), "DATA")
    assert ftkit().exit_code == 2
    assert ftkit("--version").output.startswith("ftkit ")
    codes = ftkit("--help").output
    assert all(f"  {code:>3}  " in codes for code in (0, 1, 2, 3, 4, 5, 130))


def test_what_is_no_run(place, tmp_path):
    for folder in (tmp_path, tmp_path / "nothing"):
        refused(ftkit("resume", folder), "not the folder of a run")
        refused(ftkit("steer", folder, "pause"), "no run's folder")


def test_steering_a_run_whose_process_is_gone(tmp_path):
    Journal(tmp_path).write("step", step=7)
    refused(ftkit("steer", tmp_path, "pause", "--wait", "0.1"), "no answer in 0.1 s", "sign of life was step 7", code=5)


def test_a_run_without_a_sound_checkpoint(place, tmp_path):
    assert train("words.jsonl", "--root", tmp_path, "--name", "torn", "--steps", 1).exit_code == 0
    for path in tmp_path.glob("torn/checkpoint-*/adapter_model.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    refused(ftkit("resume", tmp_path / "torn", "--steps", 2), "no sound checkpoint")


@pytest.fixture(scope="module")
def stopped(place):
    "A run that was stopped at step 4."
    from ftkit.control import send
    folder = place / "runs" / "halfway"
    with pytest.MonkeyPatch.context() as patch:
        from ftkit import train as engine
        logged = engine.Run._log_step
        def stop(run, fields):
            logged(run, fields)
            if run.step == 3: send(run.folder, "stop")
        patch.setattr(engine.Run, "_log_step", stop)
        assert train("words.jsonl", "--name", "halfway", "--steps", 40, "--checkpoint-every", 1, "--held-out", 0).exit_code == 3
    return folder, read_journal(folder)[-1]["step"]


def test_fewer_steps_than_were_made_end_no_run(stopped):
    folder, reached = stopped
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for steps in (1, reached):
        refused(ftkit("resume", folder, "--steps", steps), f"has reached step {reached}, so --steps {steps} would end it")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name, text, contains", [
    ("config.yaml", "", ["config.yaml is damaged", "no settings"]),
    ("config.yaml", "- 1\n", ["config.yaml is damaged"]),
    ("config.yaml", "name: x\nmodel: {}\n", ["config.yaml is damaged", "is missing"]),
    ("config.yaml", "a: [", ["config.yaml cannot be read"]),
    ("tokenizer", None, ["tokenizer is missing"]),
    ("tokenizer/tokenizer_config.json", "{", ["tokenizer holds no tokenizer"]),
    ("data/train.parquet", None, ["train.parquet is missing"]),
    ("data/train.parquet", "PAR1", ["train.parquet cannot be read"]),
    ("data/prompts.jsonl", "{", ["prompts.jsonl cannot be read"]),
])
def test_a_damaged_run_is_told_in_one_line(stopped, tmp_path, name, text, contains):
    folder = shutil.copytree(stopped[0], tmp_path / "run")
    if text is not None: (folder / name).write_text(text)
    elif (folder / name).is_dir(): shutil.rmtree(folder / name)
    else: (folder / name).unlink()
    refused(ftkit("resume", folder), *contains)


def test_a_line_of_the_journal_that_is_no_event(stopped, tmp_path):
    folder = shutil.copytree(stopped[0], tmp_path / "run")
    with (folder / "journal.jsonl").open("a") as file:
        file.write('{"what": "stopped"}\n{"note": "mine"}\n')
    refused(ftkit("steer", folder, "pause"), "no process trains it", code=5)
    refused(ftkit("steer", folder, "pause", "--wait", "nan"), "--wait", "not a finite number")
    assert ftkit("resume", folder, "--steps", stopped[1] + 1).exit_code == 0


# ---- demo, lab and test call what they should

@pytest.mark.parametrize("state, code", [("finished", 0), ("stopped", 3), ("interrupted", 130)])
def test_demo(place, monkeypatch, state, code):
    from types import SimpleNamespace
    calls = []
    monkeypatch.setattr("ftkit.demo.run_demo", lambda **options: calls.append(options) or dict(run=SimpleNamespace(state=state)))
    assert ftkit("demo", "--steps", "2", "--out", "runs").exit_code == code
    assert calls[0]["steps"] == 2 and str(calls[0]["out"]) == "runs"


def test_lab_and_test(place, monkeypatch):
    calls = []
    monkeypatch.setattr("ftkit.cli.subprocess.call", lambda command, **options: calls.append(command) or 7)
    assert ftkit("test", "--only", "cli").exit_code == 7
    assert calls[0][0] == sys.executable and calls[0][1].endswith("tests/run.py") and calls[0][2:] == ["--only", "cli"]
    assert ftkit("lab", "--no-browser").exit_code == 7
    assert calls[1][1:3] == ["-m", "jupyterlab"] and calls[1][3].endswith("nbs") and calls[1][4:] == ["--no-browser"]
    monkeypatch.setattr("ftkit.cli._checkout", lambda: None)
    refused(ftkit("test"), "source checkout")
    assert "current folder" in ftkit("lab").output and calls[2][3] == os.getcwd()


# ---- runs in processes of their own

def test_killed_and_resumed_is_the_same_run(whole, place):
    folder = place / "runs" / "killed"
    with process("train", "words.jsonl", "--model", "llama", "--name", "killed", *TRAINING) as child:
        wait_for_step(child, folder, 50)
        child.kill()
        assert child.wait(30) == -signal.SIGKILL
    assert not (folder / "adapter").exists()
    result = ftkit("resume", folder)
    assert result.exit_code == 0, result.output
    assert_same_weights(whole[0], folder)
    assert f"steps          {STEPS}" in result.output


def test_interrupted_and_resumed_is_the_same_run(whole, place):
    folder = place / "runs" / "interrupted"
    with process("train", "words.jsonl", "--model", "llama", "--name", "interrupted", *TRAINING) as child:
        wait_for_step(child, folder, 30)
        child.send_signal(signal.SIGINT)
        text, _ = child.communicate(timeout=60)
    assert child.returncode == 130 and "Traceback" not in text and "ftkit resume runs/interrupted" in text, text
    assert read_journal(folder)[-1]["what"] == "interrupted"
    refused(ftkit("steer", folder, "pause"), "no process trains it", code=5)
    result = ftkit("resume", folder)
    assert result.exit_code == 0, result.output
    assert_same_weights(whole[0], folder)


def test_steered_from_another_process(place):
    folder = place / "runs" / "steered"
    with process("train", "words.jsonl", "--model", "llama", "--name", "steered", "--steps", 100_000, "--checkpoint-every", 1000) as child:
        wait_for_step(child, folder, 3)
        steer = lambda action: ftkit("steer", folder, action, "--wait", "60")
        refused(ftkit("resume", folder), "is being trained by another process")
        assert steer("pause").output.startswith("pause: applied at step ")
        paused_at = max(event["step"] for event in read_journal(folder) if event["what"] == "step")
        refused(steer("pause"), "paused already", code=4)
        for action in ("sample", "evaluate", "checkpoint", "lr=1e-5"):
            assert steer(action).exit_code == 0, action
        assert (folder / f"checkpoint-{paused_at}").exists() and (folder / "samples" / f"step-{paused_at:06d}.jsonl").exists()
        time.sleep(0.3)
        assert max(event["step"] for event in read_journal(folder) if event["what"] == "step") == paused_at
        refused(steer("lr=-1"), "lr must be a number above 0")
        assert steer("resume").exit_code == 0
        wait_for_step(child, folder, paused_at + 3)
        after = [event for event in read_journal(folder) if event["what"] == "step" and event["step"] > paused_at]
        assert all(event["learning_rate"] == 1e-5 != event["scheduled_learning_rate"] for event in after)
        assert steer("lr=schedule").exit_code == 0 and steer("stop").exit_code == 0
        text, _ = child.communicate(timeout=60)
    assert child.returncode == 3 and "Traceback" not in text, text
    assert (folder / "adapter").exists() and read_journal(folder)[-1]["what"] == "stopped"
    assert "ftkit resume runs/steered  goes on" in text
