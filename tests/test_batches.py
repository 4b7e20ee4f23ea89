"""Which rows are in which step: the same after a resume, a split, with loading processes, and for data that draws."""
import contextlib
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from stopping import At, stop
from transformers import AutoModelForCausalLM, BloomConfig, MistralConfig

import ftkit.batches as batches
import ftkit.train as training
from ftkit.batches import mix, subset
from ftkit.data import FtkitError, encode_data
from ftkit.loss import LossPlan, loss_sum
from ftkit.models import tiny_model
from ftkit.train import Run, weights_hash

WORDS = "stressed drawer lager repaid warts gums decal diaper parts regal sloops smart straw tuber".split()
RECORDS = [dict(instruction="Say it backwards.", input=word, output=word[::-1]) for word in WORDS]
OPTIONS = dict(max_steps=8, per_device_train_batch_size=3, learning_rate=3e-3, save_steps=100, eval_strategy="no", seed=3, quiet=True, name="words")


def watched(run):
    "The run, trained, and for each of its steps the rows that it saw, in order of their content."
    seen, count = {}, run._count

    def counted(batch):
        rows = [tuple(row[mask == 1]) for row, mask in zip(batch["input_ids"].numpy(), batch["attention_mask"].numpy())]
        seen.setdefault(run.trainer.state.global_step + 1, []).append(rows)
        count(batch)
    run._count = counted
    return run.fit(), {step: sorted(row for part in parts for row in part) for step, parts in seen.items()}, {step: len(parts) for step, parts in seen.items()}


def new_run(root, data=RECORDS, **more):
    return Run(*tiny_model("llama"), data, root=root, **{**OPTIONS, **more})


def opened(folder, **more):
    return Run.open(folder, *tiny_model("llama", seed=1), quiet=True, **more)


@pytest.mark.parametrize("order", ["group_by_length", "random", "sequential"])
def test_micro_batches_can_be_halved_on_the_way(tmp_path, order):
    _, straight, _ = watched(new_run(tmp_path, train_sampling_strategy=order))
    stopped, before, parts = watched(new_run(tmp_path, train_sampling_strategy=order, callbacks=(At(2, stop),)))
    assert set(parts.values()) == {1} and before == {step: straight[step] for step in (1, 2)}
    config = (stopped.folder / "config.yaml").read_text()
    (stopped.folder / "config.yaml").write_text(config.replace("per_device_train_batch_size: 3", "per_device_train_batch_size: 2\n  gradient_accumulation_steps: 2"))
    halved, after, parts = watched(opened(stopped.folder, allow="settings"))
    assert before | after == straight and halved.batch == 3 and halved.step == 8
    assert [parts[step] for step in sorted(parts)] == [2, 2, 2, 2, 2, 2]


def seen_by(run, step):
    return sorted(tuple(row[mask == 1]) for batch in run.batches(step) for row, mask in zip(batch["input_ids"].numpy(), batch["attention_mask"].numpy()))


def losses(run):
    return {e["step"]: (e["loss"], e["grad_norm"], e["trained"], e["tokens"]) for e in run.history if e["what"] == "step"}


def test_packed_it_is_the_same_training(tmp_path):
    more = dict(per_device_train_batch_size=2, gradient_accumulation_steps=3, max_length=200, train_sampling_strategy="random")
    padded, _, parts = watched(new_run(tmp_path, **more))
    packed, _, fewer = watched(new_run(tmp_path, packing=True, **more))
    assert set(parts.values()) == {3, 1} and sum(fewer.values()) < sum(parts.values())
    for step, (loss, norm, *counts) in losses(padded).items():
        assert losses(packed)[step] == (pytest.approx(loss, rel=1e-5), pytest.approx(norm, rel=1e-4), *counts)
    for one, other in zip(padded.model.parameters(), packed.model.parameters()):
        assert torch.allclose(one, other, atol=2e-4)


class Drawing(torch.utils.data.Dataset):
    "Rows of which no two fetches are alike: each draws from all three random states of its process."

    def __init__(self, tokenizer):
        self.rows = encode_data(RECORDS, tokenizer)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, number):
        row = self.rows[number]
        noise = [random.randrange(3, 200), int(np.random.randint(3, 200)), int(torch.randint(3, 200, ()))]
        return dict(input_ids=noise + row["input_ids"], labels=[-100] * 3 + row["labels"])


def drawing_run(root, workers=0, **more):
    model, tokenizer = dropping()
    return Run(model, tokenizer, Drawing(tokenizer), root=root, **{**OPTIONS, "dataloader_num_workers": workers, **more})


def dropping(seed=0):
    "A model that draws while it trains, so that one number too many would show."
    model, tokenizer = tiny_model("llama", seed=seed)
    model.config.attention_dropout = 0.1
    return model, tokenizer


def stopped_and_opened(root, at, workers=0, **more):
    run, before, _ = watched(drawing_run(root, workers, callbacks=(At(at, stop),), **more))
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    model, tokenizer = dropping(1)
    with pytest.raises(FtkitError, match="give it again"):
        Run.open(run.folder, model, tokenizer, quiet=True)
    run, after, _ = watched(Run.open(run.folder, model, tokenizer, data=Drawing(tokenizer), quiet=True))
    return run, before | after


@pytest.fixture(scope="module")
def drawn_straight(tmp_path_factory):
    return watched(drawing_run(tmp_path_factory.mktemp("drawn")))


@pytest.mark.parametrize("at, workers", [(2, 0), (5, 2), (6, 0)])
def test_a_dataset_that_draws_resumes_exactly(tmp_path, drawn_straight, at, workers):
    straight, rows, _ = drawn_straight
    resumed, seen = stopped_and_opened(tmp_path, at, workers)
    assert seen == rows and losses(resumed) == losses(straight) and weights_hash(resumed.model) == weights_hash(straight.model)
    assert rows[1] != rows[6]  # the second epoch draws anew
    assert all(seen_by(resumed, step) == rows[step] for step in rows)  # and can be looked at


@pytest.mark.parametrize("broken", ["numbers", "cursor"])
def test_without_own_numbers_or_cursor_the_same_resume_goes_wrong(tmp_path, drawn_straight, monkeypatch, broken):
    if broken == "numbers":
        monkeypatch.setattr(batches, "own_randomness", lambda *place: contextlib.nullcontext())
        monkeypatch.setattr(training, "fingerprint", lambda data: "same")
        monkeypatch.setattr(training, "_data_facts", lambda data: data and dict(rows=14, tokens=1, trained_tokens=1, sha256="same"))
    straight, rows, _ = watched(drawing_run(tmp_path / "straight"))
    if broken == "cursor":
        monkeypatch.setattr(training.Trainer, "_init_training_state", lambda self, *args: (super(training.Trainer, self)._init_training_state(*args)[0], 0))
    resumed, seen = stopped_and_opened(tmp_path, 2)
    wrong = [step for step in range(3, 9) if seen.get(step) != rows[step]]
    assert len(wrong) >= 5 and weights_hash(resumed.model) != weights_hash(straight.model)


# ---- packing

def mistral():
    "Attention within a window of six tokens: shorter than the samples."
    config = MistralConfig(vocab_size=259, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, sliding_window=6, initializer_range=0.1)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).float().eval()


@pytest.mark.parametrize("model, attention", [(lambda: tiny_model("llama")[0], "sdpa"), (mistral, "sdpa"), (mistral, "eager"), (lambda: tiny_model("gemma")[0], "eager")], ids=["llama", "mistral", "mistral-eager", "gemma"])
def test_each_packed_sample_has_its_own_loss_and_gradient(model, attention):
    model = model()
    model.set_attn_implementation(attention)
    samples = [dict(row, labels=row["input_ids"]) for row in encode_data(RECORDS[:6], tiny_model("llama")[1])]
    weights = list(model.parameters())
    for flat in (False, True):
        rows = [[samples[k] for k in row] for row in batches.pack_rows([s["length"] for s in samples], 250)]
        assert 1 < len(rows) < 6
        packed = batches.collate_rows(rows, 0, flat)
        assert packed["position_ids"].shape == packed["input_ids"].shape
        order, starts = [s for row in rows for s in row], (packed["position_ids"] == 0) & (packed["attention_mask"] == 1)
        segments = starts.flatten().cumsum(0).view(starts.shape) * packed["attention_mask"]
        for number, sample in enumerate(order, 1):
            alone = batches.collate_rows([sample], 0)
            mine = dict(packed, labels=packed["labels"].masked_fill(segments != number, -100))
            for plan in (LossPlan(), LossPlan(True, True)):
                wanted, got = loss_sum(model, alone, plan), loss_sum(model, mine, plan)
                assert torch.allclose(got, wanted, rtol=1e-5)
                for one, other in zip(torch.autograd.grad(got, weights), torch.autograd.grad(wanted, weights)):
                    assert torch.allclose(one, other, rtol=1e-4, atol=1e-5 * other.abs().max().clamp(min=1))
        with_leak = {k: v for k, v in packed.items() if k != "position_ids"}
        assert not torch.allclose(loss_sum(model, with_leak, LossPlan()), loss_sum(model, packed, LossPlan()), rtol=1e-3)


def test_packing_is_refused_where_samples_would_not_be_kept_apart(tmp_path):
    model = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4)).float()
    tokenizer = tiny_model("llama")[1]
    with pytest.raises(FtkitError, match="packing=True: bloom models .* do not keep the samples of a row apart"):
        Run(model, tokenizer, RECORDS, root=tmp_path, packing=True, **OPTIONS)
    for more, why in ((dict(neftune_noise_alpha=5), "NEFTune"), (dict(packing="yes"), "it is true, false or 'auto'")):
        with pytest.raises(FtkitError, match=why):
            new_run(tmp_path, **{"packing": True, **more})
    assert not list(tmp_path.iterdir())
    run = Run(model, tokenizer, RECORDS, root=tmp_path, packing="auto", **{**OPTIONS, "quiet": False})
    assert run.options["packing"] is False


@pytest.mark.parametrize("slower", [None, 1])
def test_auto_takes_what_was_faster(tmp_path, monkeypatch, slower):
    seconds = lambda self, sampler, step: 2.0 if (sampler.capacity is None) == (slower is None) else 1.0
    monkeypatch.setattr(Run, "_seconds_of", seconds)
    said = []
    monkeypatch.setattr(Run, "say", lambda self, text: said.append(text))
    state = torch.get_rng_state()
    run = new_run(tmp_path, packing="auto")
    assert run.options["packing"] is (slower is None) and torch.equal(torch.get_rng_state(), state)
    assert f"packing {'on' if slower is None else 'off'}: a step takes" in said[-1]


def test_auto_measures_and_leaves_no_trace(tmp_path):
    run = new_run(tmp_path, packing="auto")
    assert run.options["packing"] in (True, False) and all(p.grad is None for p in run.model.parameters())


# ---- mixed, packed, killed

def mixed(root, **more):
    model, tokenizer = dropping()
    sets = {"words": (encode_data(RECORDS[:9], tokenizer), 2), "more": (encode_data(RECORDS[9:], tokenizer), 1)}
    options = dict(packing=True, gradient_accumulation_steps=2, per_device_train_batch_size=2, max_length=256, save_steps=2)
    return Run(model, tokenizer, subset(mix(sets, rows=17, seed=4), random=15, seed=4), root=root, **{**OPTIONS, **options, **more})


def test_killed_in_the_middle_of_a_mixed_and_packed_run(tmp_path):
    straight, rows, _ = watched(mixed(tmp_path))
    config = training._read_config(straight.folder)
    assert config["data"]["made_of"].startswith("a mixture (seed 4) of words: 11 rows") and config["rows_per_step"] == 4
    code = f"import os, test_batches as t; t.watched(t.mixed({str(tmp_path / 'killed')!r}, callbacks=(t.At(5, lambda control: os.kill(os.getpid(), 9)),)))"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}, capture_output=True)
    assert done.returncode == -9, done.stderr
    folder = tmp_path / "killed" / "words"
    resumed, after, _ = watched(Run.open(folder, *dropping(1), quiet=True))
    assert [e["step"] for e in resumed.history if e["what"] == "resume"] == [4] and set(after) == {5, 6, 7, 8}
    assert after == {step: rows[step] for step in after} and losses(resumed) == losses(straight)
    assert weights_hash(resumed.model) == weights_hash(straight.model)
    assert [e["position"] for e in resumed.history if e["what"] == "step"][-1] == [2, 0]


def test_another_number_of_rows_to_a_step_is_told(tmp_path, monkeypatch):
    stopped = new_run(tmp_path, callbacks=(At(2, stop),)).fit()
    said = []
    monkeypatch.setattr(Run, "say", lambda self, text: said.append(text))
    run = opened(stopped.folder, per_device_train_batch_size=7).fit()
    assert (run.batch, run.step) == (7, 8) and any("batch 3 before, 7 now): step 0 of epoch 1 of the new plan" in text for text in said)
    assert training._read_config(run.folder)["rows_per_step"] == 7
    assert opened(run.folder).batch == 7


def test_an_order_for_several_processes_is_refused(tmp_path):
    with pytest.raises(FtkitError, match="train_sampling_strategy='batch_rebalance' has no effect on Run: there are group_by_length, random, sequential"):
        new_run(tmp_path, train_sampling_strategy="batch_rebalance")


@pytest.mark.parametrize("options", [dict(label_smoothing_factor=0.1), dict(loss_type="dft")])
def test_packing_gives_way_to_trls_loss_when_it_is_left_to_ftkit(tmp_path, options, monkeypatch):
    monkeypatch.setattr(Run, "_try_packing", lambda self: (True, "forced"))
    assert new_run(tmp_path, packing="auto", **options).options["packing"] is False
    with pytest.raises(FtkitError, match="TRL's own loss"):
        new_run(tmp_path, packing=True, **options)


def test_packing_is_not_tried_where_the_trial_breaks(tmp_path, monkeypatch):
    def breaks(*args): raise AttributeError("no last_hidden_state")
    monkeypatch.setattr(training, "packing_problem", breaks)
    assert new_run(tmp_path, packing="auto").options["packing"] is False
    with pytest.raises(FtkitError, match="could not be tried.*last_hidden_state"):
        new_run(tmp_path, packing=True)
    with pytest.raises(FtkitError, match="packing is 1"):
        new_run(tmp_path, packing=1)
