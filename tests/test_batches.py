"""Which rows are in which step: the same after a resume, a split, with loading processes, and for data that draws."""
import contextlib
import random

import numpy as np
import pytest
import torch
from stopping import At, stop

import ftkit.batches as batches
import ftkit.train as training
from ftkit.data import FtkitError, encode_data
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
    halved, after, parts = watched(opened(stopped.folder))
    assert before | after == straight and halved.batch == 3 and halved.step == 8
    assert [parts[step] for step in sorted(parts)] == [2, 2, 2, 2, 2, 2]


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
