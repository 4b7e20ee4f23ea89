"What a run goes on from, and what it refuses: damaged and strange checkpoints, links, changed surroundings, other writers."
import json
import os
import pickletools
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import peft
import pytest
import torch
import yaml
from stopping import At, stop

from ftkit.checkpoint import checkpoints, verify_folder, write_folder
from ftkit.data import FtkitError
from ftkit.lock import OWNER, this_process
from ftkit.models import tiny_model
from ftkit.train import CHANGES, Run, weights_hash

WORDS = "stressed drawer lager repaid warts gums decal diaper".split()
RECORDS = [dict(instruction="Say it backwards.", input=word, output=word[::-1]) for word in WORDS]
OPTIONS = dict(max_steps=6, per_device_train_batch_size=2, learning_rate=3e-3, save_steps=1, eval_strategy="no", save_total_limit=2, seed=3, quiet=True, name="words", prompts=[])


def new_run(root, method="lora", **more):
    model, tokenizer = tiny_model("qwen")
    torch.manual_seed(5)
    if method == "lora":
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    else:
        model.requires_grad_(True)
    return Run(model, tokenizer, RECORDS, more.pop("held_out", None), root=root, **{**OPTIONS, **more})


def opened(folder, **more):
    return Run.open(folder, *tiny_model("qwen"), **{"quiet": True, **more})


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    "A run at step 4, with checkpoints 0, 3 and 4."
    return new_run(tmp_path_factory.mktemp("stopped"), callbacks=(At(4, stop),)).fit().folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return weights_hash(new_run(tmp_path_factory.mktemp("whole")).fit().model)


@pytest.fixture
def folder(stopped, tmp_path):
    return Path(shutil.copytree(stopped, tmp_path / "words"))


def names(folder):
    return [path.name for path in checkpoints(folder)]


def test_a_damaged_checkpoint_is_set_aside_and_told_of_in_one_line(folder, whole, capsys):
    (folder / "checkpoint-4" / "rng.json").write_text("{}")
    run = opened(folder, quiet=False).fit()
    said = [line for line in "".join(capsys.readouterr()).splitlines() if "checkpoint-4" in line]
    told = [e for e in run.history if e["what"] == "set_aside"]
    assert weights_hash(run.model) == whole
    assert [(e["folder"], e["into"]) for e in told] == [("checkpoint-4", "set-aside/checkpoint-4-1")] and "rng.json" in told[0]["reason"]
    assert (folder / "set-aside" / "checkpoint-4-1" / "rng.json").read_text() == "{}"
    assert [line for line in said if "rng.json" in line and "going on from checkpoint-3" in line]


def test_a_strange_checkpoint_is_neither_used_nor_deleted(folder, whole, tmp_path):
    other = new_run(tmp_path / "other", learning_rate=1e-3).fit().folder
    shutil.copytree(other / "checkpoint-6", folder / "checkpoint-9")  # sound, of another run
    (folder / "checkpoint-1").mkdir()  # of a tool that knows no manifest
    (folder / "checkpoint-1" / "weights.bin").write_bytes(b"mine")
    write_folder(folder / "checkpoint-5", lambda place: (place / "notes.txt").write_text("mine"))  # sound, and in the way
    run = opened(folder).fit()
    assert weights_hash(run.model) == whole and [e["step"] for e in run.history if e["what"] == "resume"] == [4]
    assert (folder / "checkpoint-1" / "weights.bin").read_bytes() == b"mine" and verify_folder(folder / "checkpoint-9") == []
    assert [path.read_text() for path in (folder / "set-aside").rglob("notes.txt")] == ["mine"]
    assert verify_folder(folder / "checkpoint-5") == [] and not (folder / "checkpoint-5" / "notes.txt").exists()


def test_another_runs_checkpoint_under_an_own_name_is_not_used(folder, whole, tmp_path):
    other = new_run(tmp_path / "other", learning_rate=1e-3).fit().folder
    shutil.rmtree(folder / "checkpoint-4")
    shutil.copytree(other / "checkpoint-6", folder / "checkpoint-4")
    run = opened(folder).fit()
    assert weights_hash(run.model) == whole and [e["step"] for e in run.history if e["what"] == "resume"] == [3]


def test_a_link_is_no_checkpoint(folder, whole, tmp_path):
    shutil.move(folder / "checkpoint-4", tmp_path / "elsewhere")
    (folder / "checkpoint-4").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FtkitError, match="checkpoint-4 is a link that leads out of its folder"):
        opened(folder)
    assert verify_folder(tmp_path / "elsewhere") == []  # what it led to was not touched
    (folder / "checkpoint-4").unlink()
    (folder / "checkpoint-4").symlink_to("checkpoint-3")
    run = opened(folder).fit()
    assert weights_hash(run.model) == whole and [e["step"] for e in run.history if e["what"] == "resume"] == [3]


def test_only_what_the_journal_names_is_deleted_and_never_the_best(tmp_path):
    rise = lambda run: setattr(run.trainer, "_held_out_loss", lambda data, losses=iter([5.0, 3.0, 1.0, 4.0, 2.0, 6.0, 7.0]): next(losses))
    run = new_run(tmp_path, held_out=RECORDS[:2], eval_strategy="steps", eval_steps=1, callbacks=(At(1, lambda control: rise(run)),))
    (run.folder / "checkpoint-2").mkdir()
    run.fit()
    assert names(run.folder) == ["checkpoint-0", "checkpoint-3", "checkpoint-5", "checkpoint-6"]  # begun with, best, the newest two
    assert run.trainer._best_checkpoint() == "checkpoint-3" and (run.folder / "set-aside" / "checkpoint-2-1").is_dir()


def test_nothing_is_deleted_for_a_checkpoint_that_is_not_whole(tmp_path, monkeypatch, capsys):
    from ftkit import train
    real = train.write_folder

    def torn(path, write):
        real(path, write)
        if path.name == "checkpoint-3":
            os.truncate(path / "rng.json", 5)

    monkeypatch.setattr(train, "write_folder", torn)
    run = new_run(tmp_path, quiet=False, callbacks=(At(3, stop),)).fit()
    assert names(run.folder) == ["checkpoint-0", "checkpoint-1", "checkpoint-2", "checkpoint-3"]
    text = "".join(capsys.readouterr())
    assert "no older checkpoint is deleted" in text


# ---- what has changed since

def change(folder, kind):
    config = yaml.safe_load((folder / "config.yaml").read_text())
    if kind == "versions":
        config["versions"]["torch"] = "1.0.0"
    elif kind == "settings":
        config["options"]["learning_rate"] = 1.0
    elif kind in ("tokenizer", "template"):
        config["tokenizer"]["sha256" if kind == "tokenizer" else "template_sha256"] = "0" * 64
    elif kind == "data":
        config["data"]["sha256"] = "0" * 64
    elif kind == "base":
        config["model"]["base_sha256"] = "0" * 64
    if kind != "settings":
        from ftkit.train import _seal
        return _seal(folder, config)
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_stops_the_resume_until_it_is_allowed(folder, kind):
    change(folder, kind)
    with pytest.raises(FtkitError, match=f"allow=\\('{kind}',\\)") as caught:
        opened(folder).fit()
    listed = [line for line in str(caught.value).splitlines() if line.startswith("- ")]
    assert listed and (kind != "settings" or "- option learning_rate: 0.003 then, 1.0 now" in listed)
    if kind == "settings":
        return
    run = opened(folder, allow=kind, max_steps=5).fit()
    (event,) = [e for e in run.history if e["what"] == "allowed"]
    assert event["kinds"] == [kind] and [f"- {line}" for line in event["changes"]] == listed
    assert opened(folder, max_steps=6).fit().state == "finished"  # asked for once


def test_all_changes_are_listed_at_once(folder):
    for kind in ("versions", "template", "data"):
        change(folder, kind)
    with pytest.raises(FtkitError) as caught:
        opened(folder, allow="template")
    text = str(caught.value)
    assert "torch: 1.0.0 then" in text and "train.parquet" in text and "template" not in text and "--allow data --allow versions" in text
    with pytest.raises(FtkitError, match="nothing that can be allowed"):
        opened(folder, allow="everything")


def test_a_run_with_another_version_can_be_looked_at(folder):
    change(folder, "versions")
    run = opened(folder)
    assert run.step == 4 and len(run.sample([dict(instruction="Say it backwards.", input="live")], max_new_tokens=2)) == 1


# ---- no pickle

def is_pickle(path) -> bool:
    "Whether a file begins as a pickle, or is an archive that holds one."
    content = path.read_bytes()
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith((".pkl", "/version", "/byteorder")) for name in archive.namelist())
    try:
        return bool(content) and content[:1] in b"\x80(]}cC" and next(pickletools.genops(content), None) is not None and b"." in [op[0].code.encode() for op in pickletools.genops(content)]
    except Exception:
        return content[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "sgd", "adafactor", "rmsprop", "adagrad", "adamw_8bit", "paged_adamw_32bit", "lion_32bit", "ademamix")


@pytest.mark.parametrize("method, optim", [*(("lora", optim) for optim in OPTIMIZERS), ("full", "adamw_torch_fused"), ("full", "adafactor")])
def test_nothing_in_a_runs_folder_is_a_pickle(tmp_path, method, optim):
    run = new_run(tmp_path, method, optim=optim, max_steps=2, held_out=RECORDS[:2], eval_strategy="steps", eval_steps=1, save_steps=1).fit()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert run.state == "finished" and len(files) > 20 and not [path for path in files if is_pickle(path)]
    assert not {path.suffix for path in files} & {".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt"}


@pytest.mark.parametrize("new", [True, False])
def test_the_scan_knows_a_pickle(tmp_path, new):
    import pickle
    torch.save({"a": torch.ones(2)}, tmp_path / "a", _use_new_zipfile_serialization=new)
    (tmp_path / "b").write_bytes(pickle.dumps({"a": [1]}, protocol=0 if new else 4))
    assert is_pickle(tmp_path / "a") and is_pickle(tmp_path / "b")


# ---- one writer

def test_a_run_that_a_dead_process_left_is_taken_over(folder, whole, table_row):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    left = {**this_process(), "process": gone.pid}
    gone.wait()
    (folder / OWNER).write_text(json.dumps(left))
    run = opened(folder).fit()
    (event,) = [e for e in run.history if e["what"] == "taken_over"]
    assert f"process {gone.pid} on" in event["text"] and "is gone" in event["text"] and weights_hash(run.model) == whole
    assert not (folder / OWNER).exists()
    table_row("writers", "the process that held the run is gone", "the next one takes it over and says from whom")


def test_a_run_that_lives_elsewhere_is_refused_and_one_that_is_taken_over_stops(folder, table_row):
    (folder / OWNER).write_text(json.dumps({**this_process(), "host": "elsewhere", "process": 7}))
    with pytest.raises(FtkitError, match="another process already .process 7 on elsewhere"):
        opened(folder).fit()
    (folder / OWNER).unlink()

    def usurp(control):
        (folder / OWNER).write_text(json.dumps({**this_process(), "host": "elsewhere", "process": 8}))
        run._lock.look()

    run = opened(folder, callbacks=(At(5, usurp),))
    before = names(folder)
    with pytest.raises(FtkitError, match="taken over by process 8 on elsewhere"):
        run.fit()
    assert set(names(folder)) - set(before) <= {"checkpoint-5"} and json.loads((folder / OWNER).read_text())["process"] == 8
    table_row("writers", "another machine trains the run in the same network folder", "refused, with who it is; one that was taken for dead ends without saving")
