"""What 01a_full.ipynb cannot hold comfortably: full runs that are steered, branched, repeated and opened by name; mixed precision; 8-bit states."""
import json

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, TrainerCallback

import ftkit.train
from ftkit.data import FtkitError
from ftkit.full import layer_rates, train_fully, training_memory
from ftkit.models import tiny_model
from ftkit.replay import replay
from ftkit.train import Run, load_weights, save_weights, weights_hash

WORDS = "stressed drawer lager repaid warts gums decal diaper parts regal sloops smart straw tuber".split()
RECORDS = [dict(instruction="Say it backwards.", input=word, output=word[::-1]) for word in WORDS]
OPTIONS = dict(max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-3, save_steps=2, eval_steps=3, seed=3, quiet=True, name="words")


def new_run(root, kind="llama", freeze=("embeddings", "layers.0.mlp"), factors=None, **more):
    model, tokenizer = tiny_model(kind)
    train_fully(model, freeze=list(freeze))
    factors = layer_rates(model, 0.5) if factors is None else factors
    return Run(model, tokenizer, RECORDS[:11], RECORDS[11:], root=root, rate_factors=factors, **{**OPTIONS, **more})


def rates(run):
    return [event["learning_rate"] for event in run.history if event["what"] == "step"]


class SeeRates(TrainerCallback):
    "The rates with which the optimizer really steps; added behind ftkit's own callbacks, which set them."

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.seen.append({group["rate_factor"]: group["lr"] for group in optimizer.param_groups})


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    return new_run(tmp_path_factory.mktemp("runs")).fit()


def test_a_rate_by_hand_keeps_the_ratio_of_the_parts(tmp_path):
    see = SeeRates()
    run = new_run(tmp_path, factors={"layers.0": 0.1, "model.norm": 2.0}, freeze=(), callbacks=(see,))
    run._script = {2: [("lr", 3.3e-4)], 4: [("lr", "schedule")]}
    run.fit()
    for rate, step in zip(rates(run), see.seen, strict=True):
        assert step == pytest.approx({1.0: rate, 0.1: 0.1 * rate, 2.0: 2 * rate})
    assert rates(run)[2:4] == [3.3e-4, 3.3e-4] and rates(run)[4] != 3.3e-4


def test_a_rate_at_resume_keeps_the_ratio_too(tmp_path):
    stopped, see = new_run(tmp_path, callbacks=(StopAt(3),)).fit(), SeeRates()
    taken_up = Run.open(stopped.folder, *tiny_model("llama"), quiet=True, learning_rate=1e-4, callbacks=(see,)).fit()
    factors = layer_rates(taken_up.model, 0.5)
    assert set(see.seen[0]) == {1.0, *factors.values()}
    for rate, step in zip(rates(taken_up)[3:], see.seen, strict=True):
        assert step == pytest.approx({factor: factor * rate for factor in step})


def test_a_replay_and_a_branch_have_the_parts_and_their_rates(tmp_path, never_stopped, capsys):
    run = new_run(tmp_path)
    run._script = {3: [("lr", 4e-4)]}
    run.fit()
    again = replay(run, tiny_model("llama", seed=2)[0], quiet=True)
    assert "The weights are equal." in capsys.readouterr().out
    assert weights_hash(again.model) == weights_hash(run.model) != weights_hash(never_stopped.model)
    twig = new_run(tmp_path).fit().branch(at=2).fit()
    assert weights_hash(twig.model) == weights_hash(never_stopped.model)
    with pytest.raises(FtkitError, match="its first checkpoint is not here"):
        twig.sample(RECORDS[:1], at="base")
    with pytest.raises(FtkitError, match="rate_factors cannot change"):
        twig.branch(at=4, name="other", rate_factors={"norms": 3.0})
    assert not (tmp_path / "other").exists()  # refused before anything is made


def test_a_rewind_has_them_too(tmp_path, never_stopped, monkeypatch):
    monkeypatch.setattr(ftkit.train, "RING_SHARE", 100.0)
    run = new_run(tmp_path)
    run._script = {3: [("lr", 4e-4)], 5: [("rewind", 2)]}
    run.start().wait()
    assert weights_hash(run.model) == weights_hash(never_stopped.model)


def test_opened_by_name_the_frozen_parts_are_frozen_and_the_result_is_the_same(tmp_path, never_stopped):
    model, tokenizer = tiny_model("llama")
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    train_fully(model, freeze=["embeddings", "layers.0.mlp"])
    run = Run(model, tokenizer, RECORDS[:11], RECORDS[11:], root=tmp_path, rate_factors=layer_rates(model, 0.5), **OPTIONS, callbacks=(StopAt(3),)).fit()
    opened = Run.open(run.folder, quiet=True)
    assert {name for name, p in opened.model.named_parameters() if not p.requires_grad} == {name for name, p in model.named_parameters() if not p.requires_grad}
    assert weights_hash(opened.fit().model) == weights_hash(never_stopped.model)


def test_a_run_of_an_earlier_version_is_opened_as_it_is(tmp_path):
    run = new_run(tmp_path, freeze=(), factors={}, callbacks=(StopAt(3),)).fit()
    config = yaml.safe_load((run.folder / "config.yaml").read_text())
    del config["frozen"], config["sha256"]
    (run.folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert Run.open(run.folder, *tiny_model("llama"), quiet=True).fit().state == "finished"


@pytest.mark.parametrize("fast", ["bfloat16", "float32"])
def test_a_bfloat16_model_is_trained_in_float32_and_multiplied_in_what_is_fast(tmp_path, monkeypatch, capsys, fast):
    monkeypatch.setattr(ftkit.train, "pick_dtype", lambda device: (getattr(torch, fast), "measured"))
    short = fast == "bfloat16"

    def start(**more):
        model, tokenizer = tiny_model("qwen")
        model.to(torch.bfloat16).config.dtype = torch.bfloat16  # as a loaded model has it
        train_fully(model, freeze="layers.0")
        return Run(model, tokenizer, RECORDS[:11], RECORDS[11:], root=tmp_path, **{**OPTIONS, **more})

    whole = start().fit()
    assert "weights cast from bfloat16 to float32" in capsys.readouterr().out
    assert whole.trainer.args.bf16 is short and whole.options.get("bf16", False) is short
    assert whole.model.config.dtype == torch.bfloat16  # saving has not changed what the model was loaded as
    assert json.loads((whole.folder / "model" / "config.json").read_text())["dtype"] == "float32"
    stopped = start(callbacks=(StopAt(3),)).fit()
    monkeypatch.setattr(ftkit.train, "pick_dtype", lambda device: (torch.float32 if short else torch.bfloat16, "measured elsewhere"))
    other = tiny_model("qwen", seed=1)[0].to(torch.bfloat16)  # another machine would choose otherwise
    other.config.dtype = torch.bfloat16
    taken_up = Run.open(stopped.folder, other, whole.tokenizer, quiet=True).fit()
    assert taken_up.trainer.args.bf16 is short
    assert weights_hash(taken_up.model) == weights_hash(whole.model)


def test_the_fast_loss_under_bfloat16_arithmetic_is_the_plain_one(tmp_path):
    from ftkit.data import collate, encode_data
    from ftkit.loss import LossPlan, loss_sum

    model, tokenizer = tiny_model("llama")
    rows = encode_data(RECORDS[:4], tokenizer)
    batch = collate([rows[i] for i in range(4)], tokenizer.pad_token_id)

    def gradient(plan, short=True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=short):
            loss = loss_sum(model, batch, plan)
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    exact = gradient(LossPlan(), short=False)
    off = {plan: ((gradient(plan) - exact).norm() / exact.norm()).item() for plan in (LossPlan(), LossPlan(True, True), LossPlan(True, True, attention=True))}
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert 1e-4 < off[LossPlan()] < 0.05  # it is bfloat16
    assert all(value < 2 * off[LossPlan()] for value in off.values())


def test_a_float16_model_is_cast_before_it_is_trained():
    model = tiny_model("llama")[0].to(torch.float16)
    assert {p.dtype for p in train_fully(model).parameters()} == {torch.float32}


def test_tied_weights_are_saved_once_and_every_family_comes_back(tmp_path):
    for kind in ("llama", "qwen", "gemma", "gpt2"):
        model = tiny_model(kind)[0]
        (tmp_path / kind).mkdir()
        save_weights(model, tmp_path / kind)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / kind).eval()
        ids = torch.arange(3, 40)[None]
        with torch.no_grad():
            assert torch.equal(again(ids).logits, model(ids).logits), kind
        other = tiny_model(kind, seed=1)[0]
        load_weights(other, tmp_path / kind)
        with torch.no_grad():
            assert torch.equal(other(ids).logits, model(ids).logits), kind


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit", "adafactor"])
def test_states_of_other_optimizers_are_counted(tmp_path, optim):
    if "8bit" in optim:
        pytest.importorskip("bitsandbytes")
    run = new_run(tmp_path, kind="qwen", freeze=(), max_steps=1, optim=optim, save_strategy="no")
    counted = training_memory(run.model, optim)
    run.fit()
    states = [{k: v for k, v in state.items() if not k.startswith("qmap")} for state in run.trainer.optimizer.state.values()]
    assert sum(v.nbytes for state in states for v in state.values() if isinstance(v, torch.Tensor)) == sum(counted.optimizer.values())
