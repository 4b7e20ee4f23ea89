"""Which rows are in which step: the same after a resume, a split, with loading processes, and for data that draws."""
import pytest
import torch
from stopping import At, stop

from ftkit.models import tiny_model
from ftkit.train import Run

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
