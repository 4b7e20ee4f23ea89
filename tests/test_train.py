"""What 00c_train.ipynb cannot hold comfortably: adapters, interrupts, damage, Hugging Face's own options."""
import gc
import json
import signal
import weakref

import peft
import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from ftkit.checkpoint import checkpoints
from ftkit.control import send
from ftkit.data import FtkitError
from ftkit.models import tiny_model
from ftkit.preflight import preflight
from ftkit.train import Run

WORDS = "stressed drawer lager repaid warts gums decal diaper parts regal sloops smart straw tuber".split()
RECORDS = [dict(instruction="Say it backwards.", input=word, output=word[::-1]) for word in WORDS]
OPTIONS = dict(max_steps=6, per_device_train_batch_size=3, learning_rate=3e-3, save_steps=2, eval_steps=3, seed=3, quiet=True, name="words")


def adapted(seed=0):
    model, tokenizer = tiny_model("qwen", seed=seed)
    torch.manual_seed(5)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config), tokenizer


def new_run(root, **more):
    model, tokenizer = adapted()
    return Run(model, tokenizer, RECORDS[:11], RECORDS[11:], root=root, **{**OPTIONS, **more})


def weights(run):
    return {name: weight.detach().clone() for name, weight in run.model.named_parameters() if weight.requires_grad}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class At(TrainerCallback):
    "Do something at the end of one step."

    def __init__(self, step, do):
        self.step, self.do = step, do

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.do(control)


def stop(control):
    control.should_training_stop = True


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    return new_run(tmp_path_factory.mktemp("whole")).fit()


def test_adapter_loads_in_plain_peft_and_says_the_same(never_stopped):
    base, tokenizer = tiny_model("qwen")
    loaded = peft.PeftModel.from_pretrained(base, never_stopped.folder / "adapter")
    ids = torch.arange(10, 40)[None]
    never_stopped.model.eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, never_stopped.model(ids).logits)
        with loaded.disable_adapter():
            assert not torch.equal(loaded(ids).logits, never_stopped.model(ids).logits)


def test_no_pickle_anywhere(never_stopped):
    kinds = {path.suffix for path in never_stopped.folder.rglob("*") if path.is_file() and not path.name.startswith(".")}
    assert kinds <= {".safetensors", ".json", ".jsonl", ".yaml", ".parquet", ".md", ".jinja"}, kinds


def test_an_interrupt_ends_the_step_and_resume_gives_the_same_weights(tmp_path, never_stopped):
    run = new_run(tmp_path, callbacks=(At(3, lambda control: signal.raise_signal(signal.SIGINT)),))
    before = signal.getsignal(signal.SIGINT)
    run.fit()
    assert (run.state, run.step) == ("interrupted", 3)
    assert signal.getsignal(signal.SIGINT) is before
    assert not (run.folder / "adapter").exists()
    base, tokenizer = tiny_model("qwen")
    resumed = Run.open(run.folder, base, tokenizer, quiet=True).fit()
    assert resumed.state == "finished" and same(weights(resumed), weights(never_stopped))


def test_a_damaged_checkpoint_is_passed_over(tmp_path, never_stopped):
    run = new_run(tmp_path, callbacks=(At(5, stop),)).fit()
    newest = checkpoints(run.folder)[-1] / "adapter_model.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    resumed = Run.open(run.folder, *tiny_model("qwen"), quiet=True).fit()
    assert [e["step"] for e in resumed.history if e["what"] == "resume"] == [4]
    assert same(weights(resumed), weights(never_stopped))


def test_steered_through_the_folder_without_a_trace(tmp_path, never_stopped):
    asked = []
    def ask(control):
        for action in ("pause", "sample", "evaluate", "checkpoint", "resume"):
            asked.append(send(run.folder, action))
    run = new_run(tmp_path, callbacks=(At(2, ask),))
    run.fit()
    answers = {e["id"]: (e["action"], e["status"], e["step"]) for e in run.history if e["what"] == "control"}
    assert [answers[id] for id in asked] == [(a, "applied", 2) for a in ("pause", "sample", "evaluate", "checkpoint", "resume")]
    assert same(weights(run), weights(never_stopped))


def test_a_held_rate_survives_a_resume_and_a_rate_given_at_resume_wins(tmp_path, never_stopped):
    run = new_run(tmp_path, callbacks=(At(2, lambda control: send(run.folder, "lr=1e-4")), At(4, stop)))
    run.fit()
    rates = lambda run: {e["step"]: e["learning_rate"] for e in run.history if e["what"] == "step"}
    assert rates(run)[3] == rates(run)[4] == 1e-4
    assert rates(Run.open(run.folder, *tiny_model("qwen"), quiet=True).fit())[5] == 1e-4
    again = new_run(tmp_path, callbacks=(At(4, stop),)).fit()
    opened = Run.open(again.folder, *tiny_model("qwen"), quiet=True, learning_rate=1e-3).fit()
    scheduled = {e["step"]: e["scheduled_learning_rate"] for e in never_stopped.history if e["what"] == "step"}
    assert [rates(opened)[step] for step in (5, 6)] == pytest.approx([scheduled[step] / 3 for step in (5, 6)])
    assert [(e["old"], e["new"]) for e in opened.history if e["what"] == "learning_rate_at_resume"] == [(3e-3, 1e-3)]


def test_two_processes_cannot_train_one_run(tmp_path):
    run = new_run(tmp_path)
    with run._locked(), pytest.raises(FtkitError, match="another process"):
        run.fit()


def test_changed_data_is_refused(tmp_path):
    run = new_run(tmp_path, callbacks=(At(2, stop),)).fit()
    (run.folder / "data" / "train.parquet").write_bytes((run.folder / "data" / "held_out.parquet").read_bytes())
    with pytest.raises(FtkitError, match="not the data"):
        Run.open(run.folder, *tiny_model("qwen"), quiet=True)


def test_hugging_face_options_and_callbacks_still_work(tmp_path):
    run = new_run(tmp_path, max_steps=12, learning_rate=20.0, save_total_limit=1, eval_steps=1, save_steps=1, load_best_model_at_end=True,
                  metric_for_best_model="eval_loss", greater_is_better=False, callbacks=(EarlyStoppingCallback(2),)).fit()
    assert run.step < 12 and run.trainer.state.best_global_step is not None
    assert (run.folder / f"checkpoint-{run.trainer.state.best_global_step}").is_dir()
    assert run.trainer.evaluate()["eval_loss"] == pytest.approx(run.trainer.state.best_metric, rel=1e-5)


def test_a_second_run_on_the_same_model_collects_no_patches(tmp_path):
    model, tokenizer = adapted()
    for _ in range(2):
        Run(model, tokenizer, RECORDS, root=tmp_path, **{**OPTIONS, "max_steps": 1}).fit()
    assert "forward" not in vars(model) and "forward" not in vars(model.get_base_model())


def test_free_gives_the_model_back(tmp_path):
    run = new_run(tmp_path, max_steps=1).fit()
    seen = weakref.ref(run.model.get_base_model())
    run.free()
    gc.collect()
    assert seen() is None


def test_every_line_of_the_journal_is_json_with_the_common_fields(never_stopped):
    lines = [json.loads(line) for line in (never_stopped.folder / "journal.jsonl").read_text().splitlines()]
    assert all({"what", "step", "tokens", "time"} <= line.keys() for line in lines)
    assert [line["step"] for line in lines if line["what"] == "step"] == [1, 2, 3, 4, 5, 6]


def test_preflight_says_how_far_it_looked():
    from ftkit.data import encode_data
    _, tokenizer = tiny_model("llama")
    data = encode_data([dict(instruction="x" * 50, output="y")] * 1000, tokenizer, max_length=40)
    finding = preflight(data, tokenizer, seconds=0)[0]
    assert finding.name == "no_trained_tokens" and "256 such rows (of the first 256 rows looked at)" in finding.message
    finding = preflight(data, tokenizer, seconds=60)[0]
    assert "1,000 such rows" in finding.message and "looked at" not in finding.message
