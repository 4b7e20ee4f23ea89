"""What ends runs elsewhere, done to real ones: kills, signals, full and vanished folders, odd journals, clocks, dead workers, memory, NaN, hangs."""
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace

import nursery
import psutil
import pytest
import torch
from nursery import At, new_run, opened, plain
from shim import Shim

from ftkit import control as controlling
from ftkit import train as training
from ftkit import trouble
from ftkit.checkpoint import checkpoints, verify_folder
from ftkit.control import read_journal, send
from ftkit.data import FtkitError
from ftkit.live import RunView
from ftkit.models import tiny_model
from ftkit.replay import replay
from ftkit.train import weights_hash

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs signals and processes of POSIX")


class Nursery:
    "Children that train; see nursery.py."

    def __init__(self):
        self.process = subprocess.Popen([sys.executable, nursery.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, task) -> int:
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, folder, **task) -> int:
        return self.ask(dict(folder=str(folder), **task))

    def wait(self, number) -> int:
        return self.ask(dict(wait=number))


@pytest.fixture(scope="module")
def children():
    made = Nursery()
    yield made
    for process in psutil.Process(made.process.pid).children(recursive=True):
        process.kill()
    made.process.stdin.close()
    made.process.wait(60)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, one_thread):
    "The run that nothing happened to."
    run = new_run(tmp_path_factory.mktemp("whole")).fit()
    return SimpleNamespace(hash=weights_hash(run.model), folder=run.folder)


def until(what, seconds=120):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def steps(folder):
    return [event["step"] for event in read_journal(folder) if event["what"] == "step"]


def alarms(run):
    return [(event["kind"], event["text"]) for event in run.history if event["what"] == "alarm"]


def is_whole(run, whole):
    return run.state == "finished" and weights_hash(run.model) == whole.hash


# ---- processes that end

def test_killed_again_and_again(tmp_path, children, whole, table_row):
    folder, chance, kills = tmp_path / "words", random.Random(7), 0
    options = dict(save_steps=1)
    for target in (chance.randint(1, 3), chance.randint(4, 5), chance.randint(6, 7)):
        number = children.start(folder, options=options, hook="slow")
        until(lambda: target in steps(folder))
        time.sleep(chance.random() * 0.06)  # anywhere in a step or a save
        os.kill(number, signal.SIGKILL)
        kills += children.wait(number) == -signal.SIGKILL
    assert all(verify_folder(path) == [] for path in checkpoints(folder))
    assert kills == 3 and is_whole(opened(folder).fit(), whole)
    table_row("process", "killed (SIGKILL) three times, at random moments", "goes on from the newest whole state; the end is bit-identical", points=3)


def test_killed_between_backward_and_optimizer(tmp_path, children, whole):
    folder = tmp_path / "words"
    number = children.start(folder, options=dict(save_steps=1), hook="before_optimizer")
    until((tmp_path / "there").exists)
    os.kill(number, signal.SIGKILL)
    assert children.wait(number) == -signal.SIGKILL and checkpoints(folder)[-1].name == "checkpoint-3"
    assert is_whole(opened(folder).fit(), whole)


@pytest.mark.parametrize("hook, way, code", [("long_call", "fit", 128 + signal.SIGTERM), ("long_sleep", "start", -signal.SIGTERM), ("slow", "fit", -signal.SIGTERM)])
def test_sigterm_saves_and_ends(tmp_path, children, whole, table_row, hook, way, code):
    folder = tmp_path / "words"
    number = children.start(folder, hook=hook, way=way)
    until((tmp_path / "there").exists if hook != "slow" else lambda: steps(folder))
    os.kill(number, signal.SIGTERM)
    assert children.wait(number) == code
    last = read_journal(folder)[-1]
    assert last["what"] == "interrupted" and checkpoints(folder)[-1].name == f"checkpoint-{last['step']}"
    if hook != "slow": assert last["step"] == 3
    if way == "fit": assert "SIGTERM heard" in Path(f"{folder}.log").read_text()
    assert is_whole(opened(folder).fit(), whole)
    if hook == "long_call": table_row("process", "SIGTERM in the middle of a long step", "gives the step up after 3 seconds, saves the state before it, ends; resumes bit-identically", plain_sigterm(tmp_path / "plain", children))


def plain_sigterm(folder, children) -> str:
    (folder.parent / "there").unlink()
    number = children.start(folder, way="plain", hook="long_sleep")
    until((folder.parent / "there").exists)
    os.kill(number, signal.SIGTERM)
    assert children.wait(number) == -signal.SIGTERM
    return "ends at once; the steps since the last checkpoint are lost" if not list(folder.glob("checkpoint-*")) else "saves"


def test_a_second_interrupt_ends_at_once(tmp_path, children, whole, table_row):
    folder = tmp_path / "words"
    number = children.start(folder, options=dict(save_steps=1), hook="long_sleep")
    until((tmp_path / "there").exists)
    os.kill(number, signal.SIGINT)
    until(lambda: "interrupt heard" in Path(f"{folder}.log").read_text())
    os.kill(number, signal.SIGINT)
    assert children.wait(number) == 130
    assert read_journal(folder)[-1]["what"] == "failed" and all(verify_folder(path) == [] for path in checkpoints(folder))
    assert is_whole(opened(folder).fit(), whole)
    table_row("process", "Ctrl-C twice", "the first asks for an end after the step, the second ends at once; resumes bit-identically from the newest checkpoint")


def test_a_worker_that_dies(tmp_path, children, whole, table_row):
    folder = tmp_path / "words"
    number = children.start(folder, options=dict(dataloader_num_workers=1, save_steps=1), hook="kills_worker")
    assert children.wait(number) == 1
    last = read_journal(folder)[-1]
    assert last["what"] == "failed" and "worker" in last["error"] and "dataloader_num_workers=0" in last["advice"]
    saved = checkpoints(folder)[-1]
    assert saved.name != "checkpoint-0" and verify_folder(saved) == [] and is_whole(opened(folder, dataloader_num_workers=0).fit(), whole)
    table_row("process", "a data worker is killed", "ends with at most the step under way lost, and says how to go on without workers; bit-identical")


# ---- disks

@pytest.fixture(params=["tmpfs", "shim"])
def small_disk(request, tmp_path):
    "A folder on a disk that can be filled and cleared: a real one of 8 MiB where this user may mount it, and one of Python's."
    folder = tmp_path / "disk"
    folder.mkdir()
    if request.param == "shim":
        with Shim(folder, 0) as shim:
            yield SimpleNamespace(is_real=False, folder=folder, fill=lambda: setattr(shim, "is_full", True), clear=lambda: setattr(shim, "is_full", False))
        return
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("this user may not mount a disk")
    yield SimpleNamespace(is_real=True, folder=folder, fill=lambda: fill(folder / "filler"), clear=(folder / "filler").unlink)
    subprocess.run(["umount", "-l", folder], check=True)


def fill(path):
    with open(path, "wb", buffering=0) as file:
        try:
            while True: file.write(bytes(4096))
        except OSError: pass


def test_a_full_disk_is_trained_through(small_disk, whole, table_row, monkeypatch):
    monkeypatch.setattr(training, "RETRY", 0.0)
    said, run = [], new_run(small_disk.folder, save_steps=2)
    run.say = said.append
    run.callbacks += [At("on_step_begin", 3, small_disk.fill), At("on_step_begin", 6, small_disk.clear)]
    assert is_whole(run.fit(), whole)
    assert steps(run.folder) == list(range(1, 9))  # no line of the journal is lost
    assert "Training goes on, and it is tried again" in alarms(run)[0][1] and alarms(run)[-1] == ("disk", "saving works again")
    assert small_disk.is_real or any("lines are kept in memory" in text for text in said)  # a real one has room left in the journal's last block
    assert all(verify_folder(path) == [] for path in [*checkpoints(run.folder), run.folder / "adapter"])
    table_row("disk", "full from step 4 to 6 of 8", "trains on, says so, tries each save again; nothing is lost, not even a line of the journal")


def test_a_full_disk_at_the_end_is_waited_for(small_disk, whole):
    said, run = [], new_run(small_disk.folder)

    def say(text):
        said.append(text)
        if "waits for room" in text: threading.Timer(0.2, small_disk.clear).start()
    run.say = say
    run.callbacks += [At("on_step_begin", 7, small_disk.fill)]
    assert is_whole(run.fit(), whole) and verify_folder(run.folder / "adapter") == []
    assert [text for text in said if "waits for room" in text]


def test_no_room_in_time_is_an_error(small_disk, whole, monkeypatch):
    monkeypatch.setattr(training, "PATIENCE", 0.0)
    run = new_run(small_disk.folder, save_steps=2)
    run.callbacks += [At("on_step_begin", 5, small_disk.fill)]
    with pytest.raises(FtkitError, match="in memory only: save them elsewhere"):
        run.fit()
    small_disk.clear()
    assert run.state == "failed" and weights_hash(run.model) == whole.hash and is_whole(opened(run.folder).fit(), whole)


def test_plain_on_a_full_disk(tmp_path, table_row):
    with Shim(tmp_path, 0) as shim:
        with pytest.raises(Exception) as caught:
            plain(tmp_path / "plain", save_steps=2, callbacks=[At("on_step_begin", 3, lambda: setattr(shim, "is_full", True))])
    left = sorted(path.name for path in (tmp_path / "plain").glob("checkpoint-*"))
    assert "No space" in str(caught.value) or isinstance(caught.value, OSError)
    table_row("disk", "full from step 4 on, until the end", "trains to the end, waits ten minutes for room, then fails with the weights in memory; older checkpoints are whole", f"ends with {type(caught.value).__name__} at the next save; on disk: {', '.join(left)}, the last one not whole")


def test_a_folder_on_a_read_only_disk(tmp_path, whole, table_row):
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("this user may not mount a disk")
    try:
        shutil.copytree(whole.folder, place / "words")
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        with pytest.raises(FtkitError, match="cannot open .*: Read-only file system"):
            opened(place / "words")
    finally: subprocess.run(["umount", "-l", place], check=True)
    table_row("disk", "the run's folder is read-only", "one line says so before anything is trained")


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_folder_that_vanishes(tmp_path, whole, table_row, monkeypatch, comes_back):
    monkeypatch.setattr(training, "RETRY", 0.0)
    run = new_run(tmp_path, save_steps=2)
    run.callbacks += [At("on_step_begin", 3, lambda: run.folder.rename(tmp_path / "away"))]
    if comes_back:
        run.callbacks += [At("on_step_begin", 6, lambda: (tmp_path / "away").rename(run.folder))]
        assert is_whole(run.fit(), whole) and steps(run.folder) == list(range(1, 9))
    else:
        with pytest.raises(FtkitError, match="run's folder was removed"):
            run.fit()
        assert not run.folder.exists() and weights_hash(run.model) == whole.hash
    if comes_back: table_row("disk", "the run's folder is away for three steps", "trains on, saves when it is back; never makes half a folder anew")


# ---- the journal, and the clock

def test_torn_and_binary_lines(tmp_path, whole, table_row):
    folder, said = shutil.copytree(whole.folder, tmp_path / "words"), []
    for name in ("checkpoint-8", "adapter"): shutil.rmtree(folder / name)
    with open(folder / "journal.jsonl", "ab") as file: file.write(b"\x00\xff\x1b[2J\n[1]\n" + bytes(2000) + b'\n{"what": "st')
    monkey = training.Run.say
    training.Run.say = lambda self, text: said.append(text)
    try: run = opened(folder)
    finally: training.Run.say = monkey
    (line,) = [text for text in said if "is no event" in text]
    assert "and 2 more" in line and line.isprintable() and "journal.jsonl" in line
    assert is_whole(run.fit(), whole) and run.history[-1]["what"] == "finished"
    table_row("disk", "binary, foreign and half lines in the journal", "passed over and named once; the next line stands on its own")


def test_a_clock_that_jumps(tmp_path, whole, table_row, monkeypatch):
    shift, real = [0.0], time.time
    monkeypatch.setattr(time, "time", lambda: real() + shift[0])
    stamp = lambda: (datetime.now(timezone.utc) + timedelta(seconds=shift[0])).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    for module in (controlling, training): monkeypatch.setattr(module, "utc_now", stamp)
    monkeypatch.setattr(training, "RING_SHARE", 1e6)
    run, asked = new_run(tmp_path, save_steps=1, save_total_limit=2), []
    jump = lambda seconds: lambda: (shift.__setitem__(0, seconds), asked.append(run.control.evaluate()), send(run.folder, "sample"))
    run.callbacks += [At("on_step_begin", 2, jump(-7200.0)), At("on_step_begin", 4, jump(3e8)), At("on_step_begin", 6, jump(-86400.0))]
    assert is_whole(run.start().wait(), whole)
    answers = [event["status"] for event in run.history if event["what"] == "control"]
    assert answers == ["applied"] * 6 and [one.step for one in asked] == [3, 5, 7]
    assert [path.name for path in checkpoints(run.folder)] == ["checkpoint-0", "checkpoint-7", "checkpoint-8"]
    view = RunView(run.folder)
    view.poll()
    assert view.state == "finished" and 0 <= view.silence() and (view.pace() is None or 0 <= view.pace() < 60)
    table_row("process", "the clock jumps back and forward by hours and years", "no effect: requests are heard, rotation and the end are the same", points=3)


# ---- memory

def hungry(monkeypatch, most_tokens, refs=None, on_cpu=False):
    "Memory for so many tokens at a time, and an error with the frames of a real one; from `limit[0]` on."
    sum_of, limit = training.loss_sum, [math.inf]

    def loss_sum(model, batch, plan):
        activations = torch.ones(1000)
        total = sum_of(model, batch, plan)
        if model.training and batch["input_ids"].numel() > limit[0]:
            if refs is not None: refs.append(weakref.ref(activations)), refs.append(weakref.ref(total))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return total
    monkeypatch.setattr(training, "loss_sum", loss_sum)
    return limit, lambda: limit.__setitem__(0, most_tokens)


def longest(run):
    return max(run.data["length"])


def test_memory_that_runs_out_halves_the_micro_batch_by_choice(tmp_path, table_row, monkeypatch):
    stopped = new_run(tmp_path)
    stopped._script = {3: [("stop", None)]}
    stopped.fit()
    by_hand = opened(stopped.folder, per_device_train_batch_size=2, gradient_accumulation_steps=2).fit()
    refs, alive = [], []
    limit, begins = hungry(monkeypatch, 2 * longest(stopped), refs)
    run = new_run(tmp_path, name="short", on_out_of_memory="halve")
    run.callbacks += [At("on_step_begin", 3, begins), At("on_step_begin", 4, lambda: alive.extend(ref for ref in refs if ref() is not None))]
    run.fit()
    assert refs and not alive  # the next step finds the memory given back
    assert weights_hash(run.model) == weights_hash(by_hand.model) and steps(run.folder) == list(range(1, 9))
    (event,) = [event for event in run.history if event["what"] == "control"]
    assert (event["action"], event["source"], event["status"], event["step"], event["old"], event["new"]) == ("halve", "memory", "applied", 3, [4, 1], [2, 2])
    assert steps(opened(run.folder, max_steps=9).fit().folder)[-1] == 9  # and it stays halved
    table_row("memory", "the GPU's memory runs out in step 4 (on_out_of_memory='halve')", "the step does not count, half the rows twice as often, the same gradient; goes on in the same process, bit-identical to a run resumed so by hand", plain_memory(tmp_path))


def plain_memory(folder) -> str:
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.state.global_step == 3: raise torch.OutOfMemoryError("CUDA out of memory.")
        return model(**inputs).loss
    with pytest.raises(torch.OutOfMemoryError):
        plain(folder / "plain", compute_loss=compute_loss)
    return "ends with OutOfMemoryError; the steps since the last checkpoint are lost" if not list((folder / "plain").glob("checkpoint-*")) else "saves"


def test_the_gradient_of_halves_is_the_same(tmp_path):
    def gradients(rows):
        found, run = {}, new_run(tmp_path, dropout=0.0, max_steps=1, per_device_train_batch_size=rows, gradient_accumulation_steps=4 // rows)
        run.callbacks.append(At("on_pre_optimizer_step", 0, lambda: found.update({name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None})))
        run.fit()
        return found
    whole, *halves = gradients(4), gradients(2), gradients(1)
    for half in halves:
        assert half.keys() == whole.keys()
        for name, gradient in whole.items(): assert torch.allclose(half[name], gradient, rtol=1e-4, atol=1e-6)


def test_memory_that_runs_out_ends_an_unwatched_run_saved_with_an_offer(tmp_path, monkeypatch):
    limit, begins = hungry(monkeypatch, 0)
    run = new_run(tmp_path)
    limit_of_two = 2 * longest(run)
    run.callbacks += [At("on_step_begin", 3, lambda: limit.__setitem__(0, limit_of_two))]
    with pytest.raises(FtkitError, match=r"memory ran out in step 4, which does not count: 4 rows at a time, .*on_out_of_memory='halve'"):
        run.fit()
    assert checkpoints(run.folder)[-1].name == "checkpoint-3" and run.state == "failed"
    assert opened(run.folder, on_out_of_memory="halve").fit().state == "finished"
    assert [event["new"] for event in read_journal(run.folder) if event["what"] == "control"] == [[2, 2]]


def test_memory_that_runs_out_pauses_a_steered_run(tmp_path, monkeypatch):
    limit, begins = hungry(monkeypatch, 0)
    run = new_run(tmp_path)
    run.callbacks += [At("on_step_begin", 3, lambda: limit.__setitem__(0, 2 * longest(run)))]
    run.start()
    until(lambda: run.state == "paused")
    view = RunView(run.folder)
    view.poll()
    assert run.step == 3 and view.state == "paused" and "Ask for halve" in view.alarm["text"]
    hand = run.control
    hand.resume()
    until(lambda: len(alarms(run)) == 2)  # the same again
    asked = hand.request("halve")
    assert hand.answered(asked, 60) and asked.status == "applied"
    hand.resume()
    assert run.wait().state == "finished" and steps(run.folder) == list(range(1, 9))
    limit[0] = math.inf
    again = replay(run, tiny_model("qwen")[0], quiet=True)
    assert weights_hash(again.model) == weights_hash(run.model)


def test_a_single_row_that_does_not_fit_cannot_be_halved(tmp_path, monkeypatch):
    limit, begins = hungry(monkeypatch, 1)
    run = new_run(tmp_path, on_out_of_memory="halve", callbacks=(At("on_step_begin", 3, begins),))
    with pytest.raises(FtkitError, match="a single row at a time already: take gradient_checkpointing=True"):
        run.fit()
    assert run.options["per_device_train_batch_size"] == 1 and checkpoints(run.folder)[-1].name == "checkpoint-3"


def test_an_evaluation_that_runs_out_of_memory_takes_fewer_rows(tmp_path, monkeypatch):
    sum_of, sizes = training.loss_sum, []

    def loss_sum(model, batch, plan):
        if not model.training: sizes.append(len(batch["input_ids"]))
        if not model.training and len(batch["input_ids"]) > 1: raise torch.OutOfMemoryError("CUDA out of memory.")
        return sum_of(model, batch, plan)
    run = new_run(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2)
    expected = run.evaluate()
    monkeypatch.setattr(training, "loss_sum", loss_sum)
    run.fit()
    held = [event["held_out_loss"] for event in run.history if event["what"] == "evaluate"]
    assert held[0] == pytest.approx(expected, rel=1e-5) and sizes[:3] == [3, 2, 1]


def test_a_dry_pass_finds_it_before_the_first_step_and_leaves_no_trace(tmp_path, whole, table_row, monkeypatch):
    run = new_run(tmp_path, dry_pass=True).fit()
    (dry,) = [event for event in run.history if event["what"] == "dry_pass"]
    assert is_whole(run, whole) and (dry["rows"], dry["length"]) == (4, longest(run)) and not (run.folder / ".tried").exists()
    limit, begins = hungry(monkeypatch, 0)
    limit[0] = 2 * longest(run)
    with pytest.raises(FtkitError, match="memory ran out when the longest batch was tried: 4 rows"):
        new_run(tmp_path, name="asks", dry_pass=True).fit()
    assert steps(tmp_path / "asks") == []
    halves = new_run(tmp_path, name="halves", dry_pass=True, on_out_of_memory="halve").fit()
    assert halves.state == "finished" and [event["rows"] for event in halves.history if event["what"] == "dry_pass"] == [2]
    limit[0] = math.inf
    begun_so = new_run(tmp_path, name="so", per_device_train_batch_size=2, gradient_accumulation_steps=2).fit()
    assert weights_hash(begun_so.model) == weights_hash(halves.model)
    table_row("memory", "the longest batch does not fit", "found by a dry pass before the first step")


def test_the_machines_own_memory(tmp_path, children, table_row):
    folder = tmp_path / "words"
    number = children.start(folder, options=dict(on_out_of_memory="halve"), hook="little_memory")
    assert children.wait(number) == 0, Path(f"{folder}.log").read_text()
    assert [event["new"] for event in read_journal(folder) if event["what"] == "control"] == [[2, 2]] and steps(folder) == list(range(1, 9))
    table_row("memory", "the machine's memory is limited (RLIMIT_AS) in step 4", "as for a GPU: half the rows twice as often, in the same process")


# ---- numbers

def poisoned(monkeypatch, row, kind="loss"):
    sum_of = training.loss_sum
    bad = lambda batch: any(ids[mask.bool()].tolist() == row["input_ids"] for ids, mask in zip(batch["input_ids"], batch["attention_mask"]))
    monkeypatch.setattr(training, "loss_sum", lambda model, batch, plan: sum_of(model, batch, plan) * (math.nan if bad(batch) else 1.0))


def test_a_row_that_gives_no_number_is_named_and_nothing_is_spoilt(tmp_path, whole, table_row, monkeypatch):
    run = new_run(tmp_path, save_steps=1)
    poisoned(monkeypatch, run.data[9])
    with pytest.raises(FtkitError, match=r"the loss of step (\d) is not a number, so it does not count. Its rows: row 9 \"[^\"]*regal[^\"]*\"\. ") as caught:
        run.fit()
    step = int(str(caught.value).split("step ")[1][0])
    assert checkpoints(run.folder)[-1].name == f"checkpoint-{step - 1}" and training._is_sound(run.model)
    monkeypatch.undo()
    assert is_whole(opened(run.folder).fit(), whole)
    table_row("numbers", "a row whose loss is NaN", "the step is not taken, the row is named, the weights stay sound; saved before it", plain_nan(tmp_path))


def plain_nan(folder) -> str:
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs).loss * (math.nan if self.state.global_step == 3 else 1.0)
    trainer = plain(folder / "plain", compute_loss=compute_loss)
    spoilt = not training._is_sound(trainer.model)
    return "trains on to the end with spoilt weights, and saves them as checkpoints" if spoilt and list((folder / "plain").glob("checkpoint-*")) else "keeps the weights"


def test_a_gradient_that_is_no_number(tmp_path, whole, monkeypatch):
    run = new_run(tmp_path)
    seen = []
    spoil = lambda: training._trained(run.model)[0].register_hook(lambda gradient: seen.append(1) or gradient * (math.inf if len(seen) == 1 else 1.0))
    run.callbacks.append(At("on_step_begin", 3, spoil))
    run.start()
    until(lambda: run.state == "paused")
    ((kind, text),) = alarms(run)
    assert (kind, run.step) == ("nan", 3) and text.startswith("the gradient of step 4") and "rewind to an earlier step" in text
    run.control.resume()  # it was a passing fault: the step is taken again
    assert is_whole(run.wait(), whole)


# ---- hangs

def test_a_hang_is_told_once_with_the_stacks(tmp_path, whole, table_row, monkeypatch):
    monkeypatch.setattr(trouble, "HANG_SECONDS", 1.5)
    monkeypatch.setattr(trouble, "HANG_TIMES", 1e-9)
    released = threading.Event()
    def waits_for_a_lock(): assert released.wait(120)
    run = new_run(tmp_path)
    run._script = {5: [("pause", None)]}
    run.callbacks.append(At("on_step_begin", 6, waits_for_a_lock))
    run.start()
    until(lambda: run.state == "paused" and run.step == 5)
    time.sleep(4)  # a pause is no hang
    assert alarms(run) == []
    run.control.resume()
    until(lambda: alarms(run))
    released.set()
    assert is_whole(run.wait(), whole)
    events = [event for event in run.history if event["what"] == "alarm"]
    assert [event["kind"] for event in events] == ["hang", "hang"] and events[1]["over"] and "waits_for_a_lock" in events[0]["stacks"]
    table_row("process", "a step that hangs", "after twenty times the usual time the journal has the stack of every thread, once; a pause is no hang")
