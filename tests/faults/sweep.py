"""Runs that are hurt at every call to the file system, and taken up again. A process of its own, which forks a child per fault.

    python sweep.py FOLDER TASKS.json      writes FOLDER/results.json

A task is a case (see `CASE`), an act (of the shim, or of `DAMAGE`), and which calls to hit: every `every`-th, beginning with `first`. The child
of a fault opens a copy of a run that stands at step 2 of 6 and trains on: it resumes, saves and rotates twice, and writes the adapter. Where the
fault ends it, or an error does, another child takes the run up as a person would, and tells what came of it. One thread each, random weights.
"""
import gc
import hashlib
import json
import os
import shutil
import sys
import traceback
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from shim import ENDED, Shim  # noqa: E402

import ftkit.checkpoint  # noqa: E402
import ftkit.train  # noqa: E402
from ftkit.checkpoint import checkpoints, verify_folder  # noqa: E402
from ftkit.data import collate, encode_data  # noqa: E402
from ftkit.export import export  # noqa: E402
from ftkit.models import tiny_model  # noqa: E402
from ftkit.train import Run, weights_hash  # noqa: E402

torch.set_num_threads(1)
ftkit.train.PATIENCE = 0.0  # nobody makes room here
TOTAL = 6  # steps of every run
WORDS = "stressed drawer lager repaid warts gums decal diaper parts regal sloops smart straw tuber live star".split()
RECORDS = [dict(instruction="Say it backwards.", input=word, output=word[::-1]) for word in WORDS]
# what: train a run of ftkit; export one; or plain, the same training by transformers' own Trainer
# method: lora or full; accumulation: micro-batches of a step; workers: of the loader; rows: of the data, 2 to a micro-batch;
# stops: where the run was stopped and taken up before the fault; options: more for Run; control: what is broken on purpose
# data: records, or drawn: a dataset that makes its rows when they are fetched, no two alike, as one that streams and augments them does
CASE = dict(what="train", data="records", method="lora", accumulation=1, workers=0, rows=12, stops=[2], options={}, control=None)


def model_of(case: dict):
    model, tokenizer = tiny_model("qwen")
    torch.manual_seed(5)
    if case["method"] == "full":
        return model.requires_grad_(True).train(), tokenizer
    config = peft.LoraConfig(r=2, lora_dropout=0.2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config), tokenizer


def options_of(case: dict) -> dict:
    "Dropout or noise, so that the random states matter; a held-out loss, so that there is a best."
    more = dict(neftune_noise_alpha=5.0) if case["method"] == "full" and not case["options"].get("packing") else {}
    return dict(
        max_steps=TOTAL, per_device_train_batch_size=2, gradient_accumulation_steps=case["accumulation"], dataloader_num_workers=case["workers"],
        learning_rate=3e-3, save_steps=2, eval_steps=4, save_total_limit=2, seed=3, quiet=True, **more, **case["options"],
    )


class Drawing(torch.utils.data.Dataset):
    "Rows that begin with a token drawn at each fetch, from torch's own random state."

    def __init__(self, tokenizer, rows: int):
        self.rows = encode_data(RECORDS[:rows], tokenizer, 256)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, number):
        row = self.rows[number]
        return dict(input_ids=[int(torch.randint(3, 200, ()))] + row["input_ids"], labels=[-100] + row["labels"])


def made(case: dict, folder: Path, name: str, *callbacks) -> Run:
    model, tokenizer = model_of(case)
    data = Drawing(tokenizer, case["rows"]) if case["data"] == "drawn" else RECORDS[: case["rows"]]
    return Run(model, tokenizer, data, RECORDS[-2:], root=folder, name=name, prompts=[], callbacks=callbacks, **options_of(case))


def begin(case: dict, folder: Path) -> str:
    "A run stopped at the last of `stops`; and the weights at the end of one that never was."
    whole = made(case, folder, "whole").fit()
    made(case, folder, "begun", Stop(case["stops"][0])).fit()
    for step in case["stops"][1:]:
        opened(case, folder / "begun", Stop(step)).fit()
    return weights_hash(whole.model)


class Stop(transformers.TrainerCallback):
    "Ends a run after a step."

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


def base_of(case: dict):
    return tiny_model("qwen")


def go_on(case: dict, folder: Path) -> Run:
    if case["control"] == "no cursor":  # as if each resume began an epoch
        ftkit.train.Trainer._init_training_state = lambda self, *args: (super(ftkit.train.Trainer, self)._init_training_state(*args)[0], 0)
    if case["control"] == "no check":  # neither flushed nor verified
        ftkit.checkpoint._sync = lambda path: None
        ftkit.checkpoint._file_problem = lambda path, expected: None
        ftkit.checkpoint._read_manifest = lambda folder: {}
        ftkit.train.verify_folder = ftkit.checkpoint.verify_folder = lambda path: []
    return opened(case, folder).fit()


def opened(case: dict, folder: Path, *callbacks) -> Run:
    model, tokenizer = base_of(case)
    live = dict(data=Drawing(tokenizer, case["rows"])) if case["data"] == "drawn" else {}
    return Run.open(folder, model, tokenizer, callbacks=callbacks, quiet=True, **live)


# ---- what is done to whom

def begin_export(case: dict, folder: Path) -> str:
    (folder / "begun").mkdir()
    made(case, folder / "begun", "run").fit()
    shutil.copytree(folder / "begun", folder / "unhurt")
    hurt_export(case, folder / "unhurt")
    return export_sum(folder / "unhurt")


def hurt_export(case: dict, folder: Path):
    export(opened(case, folder / "run"), folder / "out")


def export_sum(folder: Path) -> str:
    return hashlib.sha256((folder / "out" / "model.safetensors").read_bytes()).hexdigest()


def up_export(case: dict, folder: Path) -> dict:
    "Export again where there is no export yet; one that is there must be whole."
    there = (folder / "out").exists()
    if not there:
        hurt_export(case, folder)
    left = sorted(path.name for path in folder.iterdir() if path.name not in ("run", "out"))
    return dict(weights=export_sum(folder), state="finished", problems=verify_folder(folder / "out"), left=left, from_step=int(there))


def plain_trainer(case: dict, folder: Path, *callbacks) -> transformers.Trainer:
    "transformers' own trainer, on the same model, rows and options."
    model, tokenizer = model_of(case)
    options = {key: value for key, value in options_of(case).items() if key not in ("quiet", "eval_steps")}
    args = transformers.TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", disable_tqdm=True, remove_unused_columns=False, logging_steps=1, save_strategy="steps",
        train_sampling_strategy="random", **options,
    )
    rows = encode_data(RECORDS[: case["rows"]], tokenizer, 256)
    return transformers.Trainer(
        model=model, args=args, train_dataset=rows, callbacks=list(callbacks), data_collator=partial(collate, pad_token_id=tokenizer.pad_token_id),
    )


def begin_plain(case: dict, folder: Path) -> str:
    whole = plain_trainer(case, folder / "whole")
    whole.train()
    plain_trainer(case, folder / "begun", Stop(case["stops"][0])).train()
    for step in case["stops"][1:]:
        plain_trainer(case, folder / "begun", Stop(step)).train(resume_from_checkpoint=True)
    return weights_hash(whole.model)


def hurt_plain(case: dict, folder: Path) -> transformers.Trainer:
    trainer = plain_trainer(case, folder)
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model(str(folder / "adapter"))
    return trainer


def up_plain(case: dict, folder: Path) -> dict:
    return dict(weights=weights_hash(hurt_plain(case, folder).model), state="finished", problems=[], left=[], from_step=None)


def up_train(case: dict, folder: Path) -> dict:
    "Go on, and look at what is there: sound checkpoints, a whole adapter."
    run = go_on(case, folder)
    place = run.folder / ("adapter" if case["method"] == "lora" else "model")
    problems = [f"{path.name}: {line}" for path in (place, *checkpoints(folder)) for line in verify_folder(path)]
    left = [path.name for path in folder.iterdir() if ".tmp-" in path.name or path.name.startswith(f".{place.name}")]
    resumed = [e["step"] for e in run.history if e["what"] in ("start", "resume")][-1]
    return dict(weights=weights_hash(run.model), state=run.state, problems=problems, left=left, from_step=resumed)


WORKS = dict(train=(begin, go_on, up_train), export=(begin_export, hurt_export, up_export), plain=(begin_plain, hurt_plain, up_plain))


# ---- damage to what lies on the disk

def flip(path: Path):
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    path.write_bytes(content)


DAMAGE = dict(missing=Path.unlink, cut=lambda path: os.truncate(path, path.stat().st_size // 2), empty=lambda path: os.truncate(path, 0), bit=flip)


def newest_files(folder: Path) -> list[Path]:
    return sorted(path for path in checkpoints(folder)[-1].rglob("*") if path.is_file())


# ---- children

def in_child(work, report: Path) -> int:
    "Fork; the child does `work` and writes what it returns. Returns the process's number."
    process = os.fork()
    if process:
        return process
    status = 0
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        result = work()
    except BaseException as error:
        result, status = dict(error=f"{type(error).__name__}: {error}"[:500], trace=traceback.format_exc()[-3000:]), 1
    report.write_text(json.dumps(result))
    os._exit(status)


def hurt(case: dict, folder: Path, at: int, act: str | None) -> dict:
    if act in DAMAGE:
        DAMAGE[act](newest_files(folder)[at - 1])
        return dict(calls=[])
    with Shim(folder, at, act) as shim:
        WORKS[case["what"]][1](case, folder)
    return dict(calls=shim.calls)


def taken_up(case: dict, folder: Path) -> dict:
    return WORKS[case["what"]][2](case, folder)


# ---- the sweep

def prepare(case: dict, place: Path) -> dict:
    "Make a run that stands where it is to be hurt; what a continuation that nothing hurts does, and the weights at the end of one."
    whole = {**case, "control": None}
    weights = WORKS[case["what"]][0](whole, place)
    files = [] if case["what"] == "export" else [["file", path.name] for path in newest_files(place / "begun")]
    copy = shutil.copytree(place / "begun", place / "count")
    return dict(begun=str(place / "begun"), weights=weights, files=files, **hurt(whole, copy, 0, None))


def prepared(cases: list[dict], folder: Path) -> dict:
    "What `prepare` says of each case, as many at a time as there are cores."
    reports, running = {}, set()
    for number, case in enumerate(cases):
        place = folder / f"case-{number}"
        place.mkdir()
        reports[json.dumps(case, sort_keys=True)] = place.with_suffix(".json")
        running.add(in_child(partial(prepare, case, place), place.with_suffix(".json")))
        while len(running) >= (os.cpu_count() or 1):
            running.discard(os.wait()[0])
    while running:
        running.discard(os.wait()[0])
    ready = {case: json.loads(report.read_text()) for case, report in reports.items()}
    for case, facts in ready.items():
        if "error" in facts:
            raise SystemExit(f"{case}: {facts['trace']}")
    return ready


class Points:
    "As many children at a time as there are cores."

    def __init__(self, folder: Path, most: int = os.cpu_count() or 1):
        self.folder, self.most, self.running, self.done = folder, most, {}, []

    def add(self, point: dict):
        while len(self.running) >= self.most:
            self.wait()
        place = self.folder / f"point-{len(self.done) + len(self.running)}-{os.urandom(4).hex()}"
        shutil.copytree(point["begun"], place)
        self.start(point, place, "hurt", lambda: hurt(point["case"], place, point["at"], point["act"]))

    def start(self, point, place, stage, work):
        report = place.with_suffix(f".{stage}.json")
        self.running[in_child(work, report)] = (point, place, stage, report)

    def wait(self):
        process, status = os.wait()
        if process not in self.running:
            return
        point, place, stage, report = self.running.pop(process)
        result = json.loads(report.read_text()) if report.exists() else {}
        report.unlink(missing_ok=True)
        if stage == "hurt":
            point["ended"], point["hurt_error"] = os.waitstatus_to_exitcode(status), result.get("error")
            return self.start(point, place, "up", lambda: taken_up(point["case"], place))
        point.update(result, exit=os.waitstatus_to_exitcode(status))
        shutil.rmtree(place, ignore_errors=True)
        self.done.append({key: value for key, value in point.items() if key != "begun"})

    def finish(self) -> list[dict]:
        while self.running:
            self.wait()
        return self.done


def main(folder: Path, tasks: list[dict]) -> dict:
    tasks = [{**task, "case": {**CASE, **task["case"]}} for task in tasks]
    ready = prepared([json.loads(text) for text in dict.fromkeys(json.dumps(task["case"], sort_keys=True) for task in tasks)], folder)
    gc.collect(), gc.freeze()  # what is here already need not be looked through by every child
    points = Points(folder)
    for task in tasks:
        facts = ready[json.dumps(task["case"], sort_keys=True)]
        places = facts["files"] if task["act"] in DAMAGE else facts["calls"]
        for at in range(task.get("first", 1), len(places) + 1, task.get("every", 1)):
            points.add(dict(case=task["case"], act=task["act"], at=at, call=places[at - 1], begun=facts["begun"], wanted=facts["weights"]))
    return dict(points=points.finish(), ended=ENDED)


if __name__ == "__main__":
    where = Path(sys.argv[1])
    (where / "results.json").write_text(json.dumps(main(where, json.loads(Path(sys.argv[2]).read_text()))))
