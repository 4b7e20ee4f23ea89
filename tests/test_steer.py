"""Hostile hands on a run in the background: talk, rewinds, failures, kills, second starts, processes of their own; and that replay and proof can fail."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import peft
import psutil
import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from ftkit import replay as replaying
from ftkit import train as training
from ftkit.checkpoint import _write_manifest, checkpoints, load_state, save_state, verify_folder
from ftkit.control import confirmation, read_journal, send
from ftkit.data import FtkitError
from ftkit.models import generate, load_model, tiny_model
from ftkit.replay import prove_resume, replay, timeline
from ftkit.train import Run, load_weights, weights_hash

ROOT = Path(__file__).resolve().parent.parent
WORDS = "stressed drawer lager repaid warts gums decal diaper parts regal sloops smart straw tuber".split()
RECORDS = [dict(instruction="Say it backwards.", input=word, output=word[::-1]) for word in WORDS]
# 11 rows in steps of 4: three steps an epoch, so step 4 on is the second one; dropout draws random numbers at each
OPTIONS = dict(max_steps=8, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=3e-3, save_steps=100, eval_steps=5, seed=3, quiet=True, name="words")
posix = pytest.mark.skipif(os.name == "nt", reason="needs signals of POSIX")


def adapted(model=None):
    torch.manual_seed(5)
    config = peft.LoraConfig(r=4, lora_dropout=0.2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(model or tiny_model("qwen")[0], config)


def new_run(root, script=None, model=None, **more):
    run = Run(model or adapted(), tiny_model("qwen")[1], RECORDS[:11], RECORDS[11:], root=root, **{**OPTIONS, **more})
    run._script = {step: list(actions) for step, actions in (script or {}).items()}
    return run


def opened(folder, **more):
    return Run.open(folder, *tiny_model("qwen"), quiet=True, **more)


def course(run):
    "Loss and gradient of each surviving step, to the last bit."
    return [(e["step"], e["loss"], e["grad_norm"], e["learning_rate"]) for e in replaying._surviving(run.history) if e["what"] == "step"]


def until(what, seconds=60):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def paused_at(run, step):
    until(lambda: run.state == "paused" and run.step == step)
    return run.control


def total(folder):
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


class On(TrainerCallback):
    "Do something at an event of one step, once."

    def __init__(self, event, step, do):
        def act(args, state, control, **kwargs):
            if state.global_step == step and not self.done:
                self.done = True
                do()
        self.done = False
        setattr(self, event, act)


def pull():
    raise RuntimeError("the cable was pulled")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "Tiny models gain nothing from a second one, and lose much where the machine is busy."
    before, threads = os.environ.get("OMP_NUM_THREADS"), torch.get_num_threads()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    os.environ.pop("OMP_NUM_THREADS") if before is None else os.environ.update(OMP_NUM_THREADS=before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, one_thread):
    "The run that nobody touched: what it computed, and the hash of its end."
    run = new_run(tmp_path_factory.mktemp("whole")).fit()
    return SimpleNamespace(course=course(run), hash=weights_hash(run.model), folder=run.folder)


@pytest.fixture(autouse=True)
def no_process_stays(tmp_path):
    "A test that is cut off leaves no process of its own training on."
    yield
    for folder in (path.parent for path in tmp_path.rglob("journal.jsonl")):
        for number in {e["process"] for e in read_journal(folder) if e.get("process") not in (None, os.getpid())}:
            try:
                process = psutil.Process(number)
                if str(folder.name) in " ".join(process.cmdline()) or str(tmp_path) in " ".join(process.cmdline()): process.kill()
            except psutil.Error: pass


@pytest.fixture
def snapshots_each_step(monkeypatch):
    monkeypatch.setattr(training, "RING_SHARE", 1e6)


def is_whole(run, whole):
    return run.state == "finished" and course(run) == whole.course and weights_hash(run.model) == whole.hash


# ---- pause, talk, go on

def test_pause_talk_go_on_leaves_no_trace(tmp_path, whole, snapshots_each_step):
    run = new_run(tmp_path, {4: [("pause", None)]}).start()
    paused_at(run, 4)
    chat = [dict(messages=[dict(role="user", content="Hello?"), dict(role="assistant", content="Yes."), dict(role="user", content="Backwards, please.")])]
    now, base, earlier = (run.sample(chat, at=at, max_new_tokens=8) for at in ("now", "base", 1))
    assert now == run.sample(chat, max_new_tokens=8) and len(base) == len(earlier) == 1
    assert run.evaluate() > 0
    asked = [run.control.sample(["Hello?"], at=["now", "base", 2]), run.control.evaluate(), run.control.checkpoint()]
    assert all(run.control.answered(one, 60) and one.status == "applied" for one in asked)
    torch.manual_seed(0), torch.rand(100)  # what other cells do
    run.control.resume()
    assert is_whole(run.wait(), whole)


def test_a_pause_in_the_middle_of_a_step(tmp_path):
    fours, asked = dict(per_device_train_batch_size=1, gradient_accumulation_steps=4), []
    straight = new_run(tmp_path, **fours).fit()
    run = new_run(tmp_path, **fours, callbacks=(On("on_substep_end", 4, lambda: asked.append(run.control.pause())),)).start()
    until(lambda: asked and asked[0].status == "applied")
    steps = [e["tokens"] for e in run.history if e["what"] == "step"]
    assert (run.state, run.step) == ("paused", 4) and run.tokens > steps[-1]
    run.sample(at="base", max_new_tokens=4), run.evaluate()
    saved = run.control.checkpoint()  # needs the rest of the step; then the pause is held again
    assert run.control.answered(saved, 60) and (saved.status, saved.step) == ("applied", 5)
    paused_at(run, 5)
    assert [e["paused"] for e in run.history if e["what"] == "step" and "paused" in e] == [True]
    assert course(run) == course(straight)[:5]
    run.control.resume()
    assert course(run.wait()) == course(straight) and weights_hash(run.model) == weights_hash(straight.model)


def test_what_is_asked_behind_a_rewind_is_meant_for_the_step_gone_back_to(tmp_path):
    def ask(): asked.extend([run.control.rewind(0), run.control.set_lr(1e-4)])
    fours, asked = dict(per_device_train_batch_size=1, gradient_accumulation_steps=4), []
    run = new_run(tmp_path, **fours, callbacks=(On("on_substep_end", 4, ask),))
    run.start().wait()
    assert [(one.status, one.step) for one in asked] == [("applied", 5), ("applied", 0)]
    assert {rate for *_, rate in course(run)} == {1e-4} and run.state == "finished"


def test_what_is_asked_while_the_end_is_saved_is_refused(tmp_path, monkeypatch):
    run, asked, save = new_run(tmp_path, max_steps=2), [], Run.save
    monkeypatch.setattr(Run, "save", lambda self: (asked.append(run.control.pause()), save(self)))
    run.start().wait()
    assert (asked[0].status, asked[0].reason) == ("refused", "the run has ended")
    asked.append(run.control.stop())
    again = opened(run.folder, max_steps=3)
    assert again.fit().step == 3


def test_another_run_is_made_while_one_trains(tmp_path):
    run, made = new_run(tmp_path), []
    run.callbacks.append(On("on_step_begin", 3, lambda: made.append(new_run(tmp_path, name="other"))))
    assert run.start().wait().state == "finished"
    assert made[0].fit().step == 8


def test_a_second_run_on_a_model_in_training_is_refused_at_once(tmp_path, whole):
    stepping, gate = threading.Event(), threading.Event()
    run = new_run(tmp_path, callbacks=(On("on_step_begin", 1, lambda: (stepping.set(), gate.wait(60))),)).start()
    assert stepping.wait(60)
    with pytest.raises(FtkitError, match="is being trained by"):
        new_run(tmp_path, model=run.model)
    gate.set()
    assert is_whole(run.wait(), whole)


def test_a_pause_is_nobodys_time(tmp_path):
    run = new_run(tmp_path, {4: [("pause", None)]}).start()
    paused_at(run, 4)
    time.sleep(3)
    run.control.resume()
    assert max(sum(e["seconds"].values()) for e in run.wait().history if e["what"] == "step" and e["step"] > 3) < 3


def test_going_back_in_a_pause_stays_a_pause(tmp_path, whole, snapshots_each_step):
    run = new_run(tmp_path, {5: [("pause", None)]}).start()
    paused_at(run, 5).rewind(3)
    paused_at(run, 3).resume()
    assert is_whole(run.wait(), whole) and [e["paused"] for e in run.history if e["what"] == "rewind"] == [True]


def test_a_resume_in_the_middle_of_an_answer_waits_for_it(tmp_path, whole, snapshots_each_step, monkeypatch):
    run, seen = new_run(tmp_path, {4: [("pause", None)]}).start(), []

    def slow(*args, **kwargs):
        run.control.resume(), run.control.checkpoint()
        time.sleep(1.0)
        seen.append((run.step, (run.folder / "checkpoint-5").exists()))
        return generate(*args, **kwargs)
    paused_at(run, 4)
    monkeypatch.setattr(training, "generate", slow)
    run.sample(at=1, max_new_tokens=4)  # the weights of step 1 are in the model all the while
    monkeypatch.setattr(training, "generate", generate)
    assert is_whole(run.wait(), whole) and seen == [(4, False)]
    load_weights(run.model, run.folder / "checkpoint-4")  # saved after the answer: not the weights of step 1
    assert verify_folder(run.folder / "checkpoint-4") == [] and timeline(run.history).end == 8


def test_asking_while_a_step_is_under_way_is_refused(tmp_path, whole):
    stepping, gate = threading.Event(), threading.Event()
    run = new_run(tmp_path, callbacks=(On("on_step_begin", 3, lambda: (stepping.set(), gate.wait(60))),)).start()
    assert stepping.wait(60)
    for ask in (run.sample, run.evaluate, run.save):
        with pytest.raises(FtkitError, match="pause it first"):
            ask()
    with pytest.raises(FtkitError, match="stop it first"):
        run.free()
    gate.set()
    assert is_whole(run.wait(), whole)


def test_started_paused_and_stopped_at_once(tmp_path):
    run = new_run(tmp_path).start(paused=True)
    assert run.is_training and run.state == "paused"
    assert run.wait(timeout=0.1) is run and run.is_training
    run.control.stop()
    assert (run.wait().state, run.step) == ("stopped", 0)
    assert [e["what"] for e in run.history if e["what"] == "step"] == []
    again = replay(run, tiny_model("qwen")[0], quiet=True)
    assert (again.step, again.state, weights_hash(again.model)) == (0, "stopped", weights_hash(run.model))


# ---- exact state

@pytest.mark.parametrize("order, at", [("group_by_length", 2), ("group_by_length", 5), ("random", 5), ("sequential", 4)])
def test_stopped_anywhere_resumes_exactly(tmp_path, order, at):
    more = dict(train_sampling_strategy=order, warmup_steps=2)
    straight = new_run(tmp_path, **more).fit()
    stopped = new_run(tmp_path, {at: [("sample", None), ("stop", None)]}, **more).fit()
    resumed = opened(stopped.folder)
    resumed.sample(max_new_tokens=4)
    torch.rand(7)
    assert course(resumed.fit()) == course(straight) and weights_hash(resumed.model) == weights_hash(straight.model)


def test_opened_or_detached_it_answers_with_its_own_weights(tmp_path, whole):
    run = opened(whole.folder)
    base, tokenizer = tiny_model("qwen")
    plain = peft.PeftModel.from_pretrained(base, whole.folder / "adapter").eval()
    assert run.step == 8 and weights_hash(run.model) == whole.hash
    assert run.sample(max_new_tokens=8) == generate(plain, tokenizer, run.prompts, max_new_tokens=8)


# ---- going back

def test_back_to_a_step_that_only_the_disk_has(tmp_path, whole, snapshots_each_step, monkeypatch):
    monkeypatch.setattr(training, "RING_COUNT", 2)
    run = new_run(tmp_path, {7: [("pause", None)]}).start()
    paused_at(run, 7)
    assert run._ring.steps() == [6, 7] and run.rewindable() == list(range(8))
    assert [e["snapshots"] for e in run.history if e["what"] == "step"][-1] == [1, 2, 3, 4, 5, 6]
    asked = run.control.rewind(2)
    run.control.resume()
    assert is_whole(run.wait(), whole)
    assert (asked.status, next(e["back_from"] for e in run.history if e["what"] == "rewind")) == ("applied", 7)


def test_snapshots_on_disk_stay_within_their_budget(tmp_path, whole, snapshots_each_step, monkeypatch):
    one = new_run(tmp_path, max_steps=2).start().wait()
    budget = int(3.5 * total(one.folder / "snapshots" / "checkpoint-1"))
    monkeypatch.setattr(training, "SNAPSHOT_BUDGET", budget)
    run, most = new_run(tmp_path, {8: [("pause", None)]}, max_steps=9), []
    run.callbacks.append(type("Look", (TrainerCallback,), {"on_step_end": lambda self, *a, **k: most.append(total(run.folder / "snapshots")) if (run.folder / "snapshots").is_dir() else None})())
    run.start()
    paused_at(run, 8)
    assert max(most) <= budget and len(checkpoints(run.folder / "snapshots")) == 3
    assert all(verify_folder(folder) == [] for folder in checkpoints(run.folder / "snapshots"))
    run.control.stop(), run.wait()


def test_a_disk_that_takes_no_snapshot_does_not_end_the_run(tmp_path, whole, snapshots_each_step, monkeypatch):
    def full(path, write):
        if path.parent.name == "snapshots":
            raise FtkitError("cannot write: No space left on device")
        return write_folder(path, write)
    write_folder, said = training.write_folder, []
    monkeypatch.setattr(training, "write_folder", full)
    run = new_run(tmp_path)
    run.say = said.append
    assert is_whole(run.start().wait(), whole)
    assert [text for text in said if "snapshots" in text] == ["no snapshots on disk, for ten minutes at least: cannot write: No space left on device"]


def test_a_state_too_large_is_not_even_copied(tmp_path, whole, snapshots_each_step, monkeypatch):
    monkeypatch.setattr(training, "RING_BYTES", 10)
    monkeypatch.setattr(training, "SNAPSHOT_BUDGET", 10)
    monkeypatch.setattr(training.Trainer, "_snapshot", pull)
    run = new_run(tmp_path).start().wait()
    assert is_whole(run, whole) and run.rewindable() == [0, 8]


def test_back_under_a_limit_of_one_checkpoint(tmp_path, whole, snapshots_each_step):
    run = new_run(tmp_path, {7: [("rewind", 3)]}, save_steps=2, save_total_limit=1).start().wait()
    assert is_whole(run, whole) and [f.name for f in checkpoints(run.folder)] == ["checkpoint-0", "checkpoint-8"]


@pytest.mark.parametrize("strategy", ["steps", "no"])
def test_a_kill_loses_no_step_that_is_on_disk(tmp_path, whole, snapshots_each_step, strategy):
    run = new_run(tmp_path, {7: [("pause", None)]}, save_strategy=strategy).start()
    hand = paused_at(run, 7)
    shutil.copytree(run.folder, tmp_path / "killed")  # what a kill leaves
    hand.stop(), run.wait()
    newest = checkpoints(tmp_path / "killed" / "snapshots")[-1]
    assert newest.name == "checkpoint-7"
    again = opened(tmp_path / "killed")
    assert again.step == 7
    (newest / "rng.json").write_text("{}")  # and one that is damaged is passed over
    again = opened(tmp_path / "killed")
    assert again.step == 6 and again.start().wait().step == 8
    assert is_whole(again, whole) and [e["step"] for e in again.history if e["what"] == "resume"] == [6]


def test_back_to_a_damaged_checkpoint_is_refused_and_the_run_goes_on(tmp_path, whole):
    def damage(): (run.folder / "checkpoint-2" / "rng.json").write_text("{}")
    run = new_run(tmp_path, {5: [("rewind", 2)]}, save_steps=2, callbacks=(On("on_step_begin", 4, damage),))
    run.fit()
    (answer,) = [e for e in run.history if e["what"] == "control"]
    assert answer["status"] == "refused" and "damaged" in answer["reason"] and is_whole(run, whole)


def test_back_again_and_again(tmp_path, whole, snapshots_each_step):
    run = new_run(tmp_path, {3: [("rewind", 1)], 5: [("rewind", 4)], 7: [("rewind", 0)]}).start().wait()
    assert is_whole(run, whole) and len(timeline(run.history).detours) == 3


def test_what_callbacks_count_goes_back_too(tmp_path, snapshots_each_step):
    more = dict(max_steps=30, eval_steps=1, save_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=False)
    straight = new_run(tmp_path, **more, callbacks=(EarlyStoppingCallback(4, early_stopping_threshold=10.0),)).fit()
    assert 2 < straight.step < 30
    for save_steps in (1, 100):  # from a checkpoint, from a snapshot
        run = new_run(tmp_path, {straight.step - 1: [("rewind", straight.step - 2)]}, **more, callbacks=(EarlyStoppingCallback(4, early_stopping_threshold=10.0),))
        if save_steps == 100: run.callbacks[0:0] = [On("on_step_begin", straight.step - 2, lambda: [training.remove_folder(f) for f in checkpoints(run.folder) if f.name == f"checkpoint-{straight.step - 2}"])]
        run.start().wait()
        assert (run.step, course(run)) == (straight.step, course(straight))


# ---- trouble

@pytest.mark.parametrize("event, way", [("on_step_begin", "start"), ("on_substep_end", "fit"), ("on_step_end", "fit"), ("on_pre_optimizer_step", "fit")])
def test_an_error_ends_the_run_saved_at_its_last_whole_step(tmp_path, whole, event, way):
    run = new_run(tmp_path, callbacks=(On(event, 4, pull),))
    with pytest.raises(RuntimeError, match="cable"):
        run.start().wait() if way == "start" else run.fit()
    failed = run.history[-1]
    assert (run.state, failed["what"], "cable" in failed["traceback"], "Run.open" in failed["advice"]) == ("failed", "failed", True, True)
    assert [f.name for f in checkpoints(run.folder)] == ["checkpoint-0", "checkpoint-4"][: 1 if event == "on_pre_optimizer_step" else 2]
    run.callbacks.clear()
    again = run if way == "start" else opened(run.folder)
    assert again.fit().wait() is again and weights_hash(again.model) == whole.hash
    assert course(again) == [step for step in whole.course if event != "on_step_end" or step[0] != 4]  # that one's loss was not logged yet


def test_a_loss_that_is_no_number_ends_fit_and_spoils_no_checkpoint(tmp_path, whole):
    def spoil(): training._trained(run.model)[0].data.fill_(float("nan"))
    run = new_run(tmp_path, save_steps=1, callbacks=(On("on_step_begin", 3, spoil),))
    with pytest.raises(FtkitError, match="the loss of step 4 is not a number, so it does not count; the weights were spoilt before it. Its rows: row "):
        run.fit()
    assert checkpoints(run.folder)[-1].name == "checkpoint-3" and not (run.folder / "adapter").exists()
    assert [e["what"] for e in run.history][-2:] == ["alarm", "failed"]
    assert is_whole(opened(run.folder).fit(), whole)


def test_a_loss_that_is_no_number_pauses_a_steered_run(tmp_path, whole, snapshots_each_step):
    def spoil(): training._trained(run.model)[0].data.fill_(float("nan"))
    run = new_run(tmp_path, logging_steps=3, save_steps=1, callbacks=(On("on_step_begin", 3, spoil),)).start()
    hand = paused_at(run, 3)  # at the step before, whether or not it was logged
    assert [s for s in run._ring.steps() if s > 3] == [] and checkpoints(run.folder)[-1].name == "checkpoint-3"
    hand.rewind(2), hand.resume()
    assert (run.wait().state, weights_hash(run.model)) == ("finished", whole.hash)


def test_an_overflow_under_the_loss_scale_is_no_alarm():
    weight, journal, said = torch.nn.Parameter(torch.ones(2)), [], []
    run = SimpleNamespace(trainer=SimpleNamespace(accelerator=SimpleNamespace(scaler=object())), _trouble=None, step=1, tokens=1, _steered=True, state="running", say=said.append,
                          model=SimpleNamespace(parameters=lambda: [weight]), journal=SimpleNamespace(write=lambda *a, **k: journal.append(k)))
    Run._notice_trouble(run, dict(loss=2.0, grad_norm=float("inf")))
    assert (run.state, journal) == ("running", [])
    Run._notice_trouble(run, dict(loss=float("nan"), grad_norm=1.0))
    assert run.state == "paused" and not run._trouble and "sound still" in journal[0]["text"]


@posix
def test_an_interrupt_ends_only_the_waiting(tmp_path, whole):
    run = new_run(tmp_path, {3: [("pause", None)]}).start()
    paused_at(run, 3)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    before = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        with pytest.raises(KeyboardInterrupt):
            run.wait()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert run.is_training
    run.control.resume()
    assert is_whole(run.wait(), whole)


def test_a_pause_ends_when_its_folder_is_removed(tmp_path):
    run = new_run(tmp_path, {4: [("pause", None)]}).start()
    paused_at(run, 4)
    shutil.rmtree(run.folder)
    until(lambda: not run.is_training)
    with pytest.raises(FtkitError, match="was removed while the run was paused"):
        run.wait()
    assert run.state == "failed" and not run.folder.exists()


# ---- twice

def test_a_second_start_is_refused_wherever_it_comes_from(tmp_path):
    run = new_run(tmp_path).start(paused=True)
    until(lambda: checkpoints(run.folder))
    other = opened(run.folder)
    for start, words in ((run.start, "training already"), (run.fit, "training already"), (other.start, "another Run object of this process"), (lambda: other.start(paused=True), "another Run object")):
        with pytest.raises(FtkitError, match=words):
            start()
    code = "import sys; from ftkit.train import Run; from ftkit.models import tiny_model; Run.open(sys.argv[1], *tiny_model('qwen')).start()"
    done = subprocess.run([sys.executable, "-c", code, str(run.folder)], cwd=ROOT, capture_output=True, text=True)
    assert re.search(r"is being trained by another process already \(process \d+ .*\); steer it with: ftkit steer", done.stderr.splitlines()[-1])
    run.control.stop()
    run.wait()
    assert other.fit().state == "finished"  # and does not begin paused


def test_many_threads_start_one_run(tmp_path):
    run, results = new_run(tmp_path, {1: [("pause", None)]}), []

    def begin():
        try: results.append(run.start())
        except FtkitError as error: results.append(str(error))
    threads = [threading.Thread(target=begin) for _ in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert results.count(run) == 1 and all("training already" in str(r) for r in results if r is not run)
    paused_at(run, 1).stop()
    assert run.wait().state == "stopped"


def test_one_model_is_not_trained_by_two_runs_at_once(tmp_path):
    model = adapted()
    run, other = new_run(tmp_path, model=model).start(paused=True), new_run(tmp_path, model=model)
    for use in (other.start, other.fit, other.sample, lambda: Run.open(run.folder, model, quiet=True)):
        with pytest.raises(FtkitError, match="shares its model"):
            use()
    run.control.stop()
    run.wait()
    assert other.fit().state == "finished"


def test_two_runs_in_one_process_are_told_of_their_random_numbers(tmp_path):
    run, said = new_run(tmp_path).start(paused=True), []
    other = new_run(tmp_path, max_steps=1)
    other.say = said.append
    other.fit()
    assert [text for text in said if "the same random numbers" in text]
    run.control.stop(), run.wait()


def test_two_runs_on_one_gpu_are_warned_of(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(training, "_card", lambda device: "GPU-1")

    def beside(said):
        weight = SimpleNamespace(device=torch.device("cuda", 0))
        return Run._beside_others(SimpleNamespace(model=SimpleNamespace(parameters=lambda: iter([weight])), say=said.append))
    first, second, third = [], [], []
    with beside(first), beside(second): pass
    with beside(third): pass
    assert first == third == [] and len(second) == 1 and "another run trains on cuda:0" in second[0]


# ---- branches

def test_trunk_and_branches_can_all_be_trained_and_asked(tmp_path, whole, snapshots_each_step):
    trunk = new_run(tmp_path, {5: [("stop", None)]}).start().wait()
    end = weights_hash(trunk.model)
    twig = trunk.branch(at=3, learning_rate=1e-2)  # nobody saved step 3
    assert twig.step == 3 and twig.fit().state == "finished"
    leaf = twig.branch(at=8, name="leaf", max_steps=10).start().wait()
    assert (leaf.step, [e["step"] for e in leaf.history if e["what"] == "step"]) == (10, [9, 10])
    trunk.sample(max_new_tokens=2)  # its own weights, though the branches trained the same object
    assert weights_hash(trunk.model) == end
    twig.save()
    assert weights_hash(twig.model) == timeline(twig.history).weights
    assert is_whole(trunk.start().wait(), whole)


def test_a_branch_waits_while_its_trunk_is_asked(tmp_path, monkeypatch, snapshots_each_step):
    trunk = new_run(tmp_path, {5: [("stop", None)]}).start().wait()
    alone = weights_hash(trunk.branch(at=3, name="alone").fit().model)
    twig, seen = trunk.branch(at=3), []
    starting = threading.Thread(target=twig.start)

    def slow(*args, **kwargs):
        starting.start()
        time.sleep(1.0)
        seen.append([e for e in twig.history if e["what"] in ("start", "resume")])
        return generate(*args, **kwargs)
    monkeypatch.setattr(training, "generate", slow)
    trunk.sample(at=2, max_new_tokens=4)  # the weights of step 2 are in the model that both share
    monkeypatch.setattr(training, "generate", generate)
    starting.join()
    assert seen == [[]] and weights_hash(twig.wait().model) == alone


def test_a_rate_given_at_a_resume_ends_the_hands_also_where_it_is_the_schedules(tmp_path):
    trunk = new_run(tmp_path, {3: [("lr", 1e-4)], 5: [("stop", None)]}).fit()
    with pytest.raises(FtkitError, match="would end it"):
        trunk.branch(name="short", max_steps=4)
    assert not (tmp_path / "short").exists()
    twig = trunk.branch(name="twig", learning_rate=OPTIONS["learning_rate"]).fit()
    kept = trunk.branch(name="kept").fit()
    again = opened(trunk.folder, learning_rate=OPTIONS["learning_rate"])
    again._script = {7: [("rewind", 5)]}
    assert again.fit().state == "finished"
    for run, resets in ((twig, 1), (kept, 0), (again, 2)):
        later = [e for e in run.history if e["what"] == "step" and e["step"] > 5]
        assert {e["learning_rate"] == e["scheduled_learning_rate"] for e in later} == {bool(resets)}
        assert len([e for e in run.history if e["what"] == "learning_rate_at_resume"]) == resets
        assert weights_hash(replay(run, tiny_model("qwen")[0], quiet=True).model) == timeline(run.history).weights


def test_a_branch_ends_the_run_also_where_another_object_trains_it(tmp_path, monkeypatch, snapshots_each_step):
    run = new_run(tmp_path, {4: [("pause", None)]}).start()
    paused_at(run, 4)
    other = opened(run.folder)
    monkeypatch.setattr(training, "confirmation", lambda *args: None)
    with pytest.raises(FtkitError, match="did not end when it was asked to"):
        other.branch(at=2)
    monkeypatch.undo()
    twig = other.branch(at=2)
    assert not run.is_training and run.state == "stopped" and twig.fit().state == "finished"


def test_a_branch_of_a_run_that_saves_nothing(tmp_path):
    run = new_run(tmp_path, {4: [("pause", None)]}, save_strategy="no").start()
    paused_at(run, 4)
    assert run.branch().step == run.step == 4


@pytest.mark.parametrize("wrong", [dict(learning_rat=1), dict(name="../x"), dict(at=77), dict(packing="tight"), dict(warmup_steps=object())])
def test_a_branch_that_cannot_be_is_refused_before_anything_happens(tmp_path, wrong):
    run = new_run(tmp_path).start(paused=True)
    with pytest.raises(FtkitError):
        run.branch(**wrong)
    assert [path.name for path in tmp_path.iterdir()] == ["words"] and run.is_training
    assert not [e for e in run.history if e["what"] == "branch"]
    run.control.stop(), run.wait()


# ---- processes that end

SCRIPT = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_steer
from pathlib import Path
run = test_steer.new_run(Path(sys.argv[1]), {{4: [("pause", None)]}} if sys.argv[2] == "kill" else {{}})
run.start()
test_steer.until(lambda: run.step >= 4)
print("there", flush=True)
if sys.argv[2] == "kill": run.wait()
"""


@posix
@pytest.mark.parametrize("way", ["kill", "leave"])
def test_the_process_ends_in_a_pause_or_while_training(tmp_path, whole, way):
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path), way], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == "there"
    if way == "kill": process.kill()
    assert process.wait(120) == (-signal.SIGKILL if way == "kill" else 0)
    last = read_journal(tmp_path / "words")[-1]["what"]
    assert last == "control" if way == "kill" else last in ("interrupted", "finished")
    assert is_whole(opened(tmp_path / "words").fit(), whole)


# ---- detached

@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    model, tokenizer = tiny_model("qwen")
    model.save_pretrained(folder), tokenizer.save_pretrained(folder)
    return folder


def named(base):
    return adapted(load_model(str(base), dtype=torch.float32)[0])


PARENT = f"""
import os, sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_steer
from pathlib import Path
test_steer.new_run(Path(sys.argv[1]), model=test_steer.named(Path(sys.argv[2]))).start(paused=True, detached=True)
os._exit(0)
"""


@posix
def test_detached_it_survives_its_parent_and_is_steered_by_its_folder(tmp_path, whole, base):
    subprocess.run([sys.executable, "-c", PARENT, str(tmp_path), str(base)], cwd=ROOT, check=True)
    folder = tmp_path / "words"
    until(lambda: any(e["what"] == "resume" for e in read_journal(folder)), 120)
    mine = Run.open(folder, quiet=True)
    with pytest.raises(FtkitError, match="another process"):
        mine.start()
    with pytest.raises(FtkitError, match="another process"):
        mine.start(detached=True)
    send(folder, "resume")
    until(lambda: read_journal(folder)[-1]["what"] == "finished", 120)
    process = next(e["process"] for e in reversed(read_journal(folder)) if e["what"] == "resume")
    until(lambda: not Path(f"/proc/{process}").exists() or sys.platform != "linux")
    longer = Run.open(folder, quiet=True, max_steps=9).fit()
    assert course(longer)[:8] == whole.course and longer.step == 9


def test_detached_with_other_options_the_journal_knows_them(tmp_path, base):
    first = new_run(tmp_path, {3: [("stop", None)]}, model=named(base)).fit()
    run = Run.open(first.folder, quiet=True, learning_rate=1e-3, max_steps=5).start(detached=True)
    assert run.state == "detached" and run.is_training
    assert (run.wait().state, run.step, run.is_training) == ("finished", 5, False)
    assert timeline(run.history).options == {3: {"learning_rate": 1e-3, "max_steps": 5}}
    again = replay(run, quiet=True)
    assert weights_hash(again.model) == timeline(run.history).weights
    run.sample(max_new_tokens=2)  # by the weights of the process that is gone
    assert weights_hash(run.model) == weights_hash(again.model)


def test_detached_it_tells_why_it_cannot_begin(tmp_path, base):
    run = new_run(tmp_path, model=named(base))
    text = (run.folder / "config.yaml").read_text()
    (run.folder / "config.yaml").write_text(text.replace(str(base), str(base / "gone")))
    run.start(detached=True)
    with pytest.raises(FtkitError, match="failed: .*gone"):
        run.wait()
    assert run.state == "failed" and "gone" in run.history[-1]["error"] and run.history[-1]["what"] == "failed"
    assert "Traceback" in run.history[-1]["traceback"] and run.history[0]["what"] == "checkpoint" and run.history[1]["what"] == "launching"
    (run.folder / "config.yaml").write_text(text)
    assert run.fit().state == "finished"
    for refused, words in ((new_run(tmp_path), "made in memory"), (new_run(tmp_path, model=named(base), callbacks=(On("on_step_end", 1, pull),)), "callbacks")):
        with pytest.raises(FtkitError, match=words):
            refused.start(detached=True)
        assert not checkpoints(refused.folder)


@posix
def test_detached_and_killed(tmp_path, whole, base):
    run = new_run(tmp_path, model=named(base)).start(paused=True, detached=True)
    until(lambda: any(e["what"] == "plan" for e in run.history), 120)
    time.sleep(1.2)  # twice a bar's turn
    assert "step" not in (run.folder / "detached.log").read_text()
    os.kill(next(e["process"] for e in run.history if e["what"] == "resume"), signal.SIGKILL)
    with pytest.raises(FtkitError, match="signal 9"):
        run.wait()
    assert run.state == "failed" and is_whole(run.fit(), whole)


# ---- replay and proof

def test_a_replay_that_cannot_be_leaves_nothing(tmp_path, whole):
    run = new_run(tmp_path, {2: [("stop", None)]}).fit()
    with pytest.raises(FtkitError, match="made in memory"):
        replay(run, quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["words"]


def test_a_replay_of_a_replay_with_hands_at_every_turn(tmp_path, snapshots_each_step):
    run = new_run(tmp_path, {2: [("pause", None)], 4: [("lr", 1e-2)], 6: [("rewind", 3)], 7: [("lr", "schedule"), ("stop", None)]}).start()
    paused_at(run, 2).set_lr(5e-3), run.control.sample(["Hello?"], at=["base", 1]), run.control.resume()
    run.wait()
    again = replay(run, tiny_model("qwen")[0], quiet=True)
    once_more = replay(again, tiny_model("qwen")[0], quiet=True)
    assert weights_hash(again.model) == weights_hash(once_more.model) == timeline(run.history).weights
    assert course(again) == course(once_more) == course(run)


def sabotage(name, change):
    "A way to run the parts in this process, with the saved state changed before the second one."
    def parts(parts, on_cpu):
        for folder, _ in parts if len(parts) == 1 else ():
            checkpoint = checkpoints(folder)[-1]
            change(checkpoint)
            (checkpoint / "manifest.json").unlink()
            _write_manifest(checkpoint)
        with quiet_threads():
            replaying._parts(json.dumps(dict(parts=parts, threads=torch.get_num_threads())))
    return pytest.param(parts, id=name)


@contextmanager
def quiet_threads():
    before = torch.get_num_threads()
    try: yield
    finally: torch.set_num_threads(before)


def other_random(folder):
    state = load_state(folder, "rng")
    state["torch"] = torch.Generator().manual_seed(99).get_state()
    save_state(state, folder, "rng")


def no_moments(folder):
    state = load_state(folder, "optimizer")
    for one in state["parameters"].values(): one["state"]["exp_avg"].zero_()
    save_state(state, folder, "optimizer")


def other_schedule(folder):
    state = json.loads((folder / "ftkit.json").read_text())
    state["scheduler"]["last_epoch"] += 1
    (folder / "ftkit.json").write_text(json.dumps(state))


def nothing(folder): pass


@pytest.mark.parametrize("parts", [sabotage(f.__name__, f) for f in (nothing, other_random, no_moments, other_schedule)])
def test_the_proof_finds_what_is_wrong_with_a_checkpoint(tmp_path, base, parts, monkeypatch, request, capsys):
    monkeypatch.setattr(replaying, "_in_fresh_process", parts)
    proof = prove_resume(new_run(tmp_path, model=named(base)), steps=6)
    what = request.node.callspec.id
    assert proof.exact == (what == "nothing")
    assert ("Resume is exact" if proof.exact else "NOT exact") in capsys.readouterr().out
    assert proof.same("batches") and proof.same("learning_rate") == (what != "other_schedule")
    assert [step["loss"][0] == step["loss"][1] for step in proof.steps][:3] == [True] * 3
