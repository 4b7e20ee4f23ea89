"""What 00c_train.ipynb cannot hold comfortably: adapters, interrupts, damage, Hugging Face's own options."""
import gc
import json
import os
import signal
import subprocess
import sys
import weakref

import peft
import pytest
import torch
from stopping import At, same, stop, weights
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
    with run._locked(), pytest.raises(FtkitError, match="another Run object of this process"):
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


FREED = """
import gc, sys
import psutil, torch
from transformers import LlamaConfig, LlamaForCausalLM
from ftkit.models import tiny_tokenizer
from ftkit.train import Run

def mebibytes():
    gc.collect()
    return psutil.Process().memory_info().rss / 2**20

def trained(width, layers):
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=8)
    options = dict(max_steps=1, save_strategy="no", per_device_train_batch_size=2, quiet=True)
    return Run(LlamaForCausalLM(config), tokenizer, [dict(instruction="a", output="b")] * 2, root=sys.argv[1], **options).fit()

trained(64, 1).free()  # what the libraries load once is not the run's
before = mebibytes()
run = trained(512, 8)
during = mebibytes()
run.free()
print(before, during, mebibytes())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc is asked to give memory back")
def test_free_gives_the_memory_back_to_the_system(tmp_path):
    command = [sys.executable, "-c", FREED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    before, during, after = map(float, done.stdout.split("\n")[-2].split()) if done.returncode == 0 else pytest.fail(done.stderr[-2000:])
    assert during - before > 150, "weights and moments of 17 million parameters were not there"
    assert after - before < 0.3 * (during - before), (before, during, after)


def test_evaluation_takes_no_more_rows_at_a_time_than_training(tmp_path, monkeypatch):
    from ftkit import train
    seen, loss_sum = {True: 0, False: 0}, train.loss_sum
    def counted(model, batch, plan):
        seen[torch.is_grad_enabled()] = max(seen[torch.is_grad_enabled()], len(batch["labels"]))
        assert torch.is_grad_enabled() == model.training
        return loss_sum(model, batch, plan)
    monkeypatch.setattr(train, "loss_sum", counted)
    run = new_run(tmp_path, per_device_train_batch_size=2, max_steps=1).fit()
    assert len(run.held_out) > 2 and seen == {True: 2, False: 2}
    run.evaluate()
    assert seen[False] == 2


def test_every_line_of_the_journal_is_json_with_the_common_fields(never_stopped):
    lines = [json.loads(line) for line in (never_stopped.folder / "journal.jsonl").read_text().splitlines()]
    assert all({"what", "step", "tokens", "time"} <= line.keys() for line in lines)
    assert [line["step"] for line in lines if line["what"] == "step"] == [1, 2, 3, 4, 5, 6]


def test_preflight_says_how_far_it_looked():
    from ftkit.data import encode_data
    _, tokenizer = tiny_model("llama")
    data = encode_data([dict(instruction="x" * 50, output="y")] * 1000, tokenizer, max_length=40)
    finding = preflight(data, tokenizer, seconds=0)[0]
    assert finding.check == "no_trained_tokens" and "256 such rows (of the first 256 rows looked at)" in finding.message
    finding = preflight(data, tokenizer, seconds=60)[0]
    assert "1,000 such rows" in finding.message and "looked at" not in finding.message


def test_a_finished_run_taken_up_again_trains_no_further(tmp_path):
    run = new_run(tmp_path, lr_scheduler_type="constant").fit()
    again = Run.open(run.folder, *tiny_model("qwen"), quiet=True).fit()
    assert (again.state, again.step) == ("finished", 6) and same(weights(again), weights(run))
    longer = Run.open(run.folder, tiny_model("qwen")[0], quiet=True, max_steps=8, save_steps=1).fit()
    assert longer.step == 8 and "checkpoint-7" in [path.name for path in checkpoints(run.folder)]


@pytest.mark.parametrize("option", ["gradient_checkpointing", "activation_checkpointing"])
def test_checkpointed_layers_compute_the_same(tmp_path, never_stopped, option):
    run = new_run(tmp_path, **{option: True}).fit()
    assert not run.trainer.plan.prefix
    for name, weight in weights(run).items():
        assert torch.allclose(weight, weights(never_stopped)[name], atol=1e-5)


def test_a_stop_under_load_best_model_keeps_the_last_weights(tmp_path):
    run = new_run(tmp_path, load_best_model_at_end=True, metric_for_best_model="eval_loss", learning_rate=5.0,
                  lr_scheduler_type="constant", eval_steps=1, save_steps=1, callbacks=(At(4, stop),))
    seen = {}
    run.callbacks.append(type("Look", (TrainerCallback,), {"on_step_end": lambda self, args, state, control, **_: seen.update({state.global_step: weights(run)})})())
    run.fit()
    from safetensors.torch import load_file
    saved = load_file(run.folder / "checkpoint-4" / "adapter_model.safetensors")
    assert all(torch.equal(saved[name.replace(".default", "")], weight) for name, weight in seen[4].items())


def test_weights_that_peft_would_not_save_are_refused(tmp_path):
    model, tokenizer = adapted()
    for name, weight in model.named_parameters():
        weight.requires_grad_(weight.requires_grad or "norm" in name)
    with pytest.raises(FtkitError, match="modules_to_save"):
        Run(model, tokenizer, RECORDS, root=tmp_path)


def test_options_that_would_do_nothing_are_refused(tmp_path):
    for option in (dict(padding_free=True), dict(packing="yes"), dict(torch_compile=True), dict(pad_to_multiple_of=8), dict(eval_steps=-1, eval_strategy="never")):
        with pytest.raises(FtkitError):
            new_run(tmp_path, **option)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", [
    dict(learning_rate=float("nan")), dict(learning_rate="abc"), dict(num_train_epochs="abc"), dict(per_device_train_batch_size=0), dict(gradient_accumulation_steps=0),
    dict(weight_decay="abc"), dict(seed=-1), dict(report_to="a_tracker"), dict(report_to="wandb"), dict(push_to_hub=True), dict(logging_strategy="no"), dict(name="two\nlines"), dict(name=""),
])
def test_wrong_values_are_found_before_there_is_a_folder(tmp_path, monkeypatch, option):
    import transformers
    monkeypatch.setattr("huggingface_hub.HfApi.whoami", lambda *arguments, **options: 1 / 0)
    monkeypatch.setattr(transformers.integrations.integration_utils, "is_wandb_available", lambda: False)
    with pytest.raises(FtkitError) as error:
        new_run(tmp_path, **option)
    assert next(iter(option)) in str(error.value) or "is not a name" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_trl_losses_are_trls(tmp_path, never_stopped):
    run = new_run(tmp_path, loss_type="dft").fit()
    assert run.trainer.trl_loss and run.state == "finished" and not same(weights(run), weights(never_stopped))


def test_allow_takes_a_name_or_several_and_knows_them(tmp_path):
    model, tokenizer = adapted()
    cut = RECORDS + [dict(instruction="word " * 100, output="cut")]
    run = Run(model, tokenizer, cut, root=tmp_path, allow="no_trained_tokens", max_length=64, quiet=True)
    assert run.allow == ("no_trained_tokens",)
    with pytest.raises(FtkitError, match="no finding"):
        Run(model, tokenizer, RECORDS, root=tmp_path, allow="everything", quiet=True)


def test_a_sample_that_fails_is_refused_and_the_run_goes_on(tmp_path, never_stopped, monkeypatch):
    run = new_run(tmp_path, callbacks=(At(2, lambda control: send(run.folder, "sample")),))
    monkeypatch.setattr(run, "_sample", lambda *a, **k: 1 / 0)
    run.fit()
    (answer,) = [e for e in run.history if e["what"] == "control"]
    assert answer["status"] == "refused" and "ZeroDivisionError" in answer["reason"]
    assert run.state == "finished" and same(weights(run), weights(never_stopped))


def test_a_lost_checkpoint_is_written_again(tmp_path, never_stopped):
    run = new_run(tmp_path, callbacks=(At(5, stop),)).fit()
    (checkpoints(run.folder)[-1] / "trainer_state.json").write_text("{}")
    resumed = Run.open(run.folder, *tiny_model("qwen"), callbacks=(At(5, stop),), quiet=True).fit()
    from ftkit.checkpoint import verify_folder
    assert checkpoints(run.folder)[-1].name == "checkpoint-5" and verify_folder(checkpoints(run.folder)[-1]) == []
    assert resumed.step == 5


def test_another_base_is_refused(tmp_path):
    run = new_run(tmp_path, callbacks=(At(2, stop),)).fit()
    with pytest.raises(FtkitError, match="not those of the model given"):
        Run.open(run.folder, *tiny_model("qwen", seed=9), quiet=True)


def test_adapters_kept_in_bfloat16_resume_exactly(tmp_path):
    def halved():
        model, tokenizer = tiny_model("qwen")
        torch.manual_seed(5)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        return peft.get_peft_model(model.bfloat16(), config, autocast_adapter_dtype=False), tokenizer
    whole = Run(*halved(), RECORDS[:11], root=tmp_path, **OPTIONS).fit()
    stopped = Run(*halved(), RECORDS[:11], root=tmp_path, callbacks=(At(3, stop),), **OPTIONS).fit()
    assert same(weights(Run.open(stopped.folder, *halved(), quiet=True).fit()), weights(whole))


def test_lines_that_unicode_calls_lines_do_no_harm(tmp_path):
    run = new_run(tmp_path, prompts=[dict(instruction="a\u2028b\x85c", output="d")], callbacks=(At(2, stop),)).fit()
    assert Run.open(run.folder, *tiny_model("qwen"), quiet=True).prompts == run.prompts
