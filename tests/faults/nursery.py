"""Children that train, made quickly: a process that has imported everything forks one for each line on its input.

    python nursery.py          a line of JSON in: {"folder": ..., "options": {...}, "hook": name, "way": "fit" or "start"}; its process number out
                               {"wait": number} in: its exit status out, negative for a signal
"""
import hashlib
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import peft  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402
from transformers import Trainer, TrainerCallback, TrainingArguments  # noqa: E402

from ftkit import train, trouble  # noqa: E402
from ftkit.data import FtkitError, collate, encode_data  # noqa: E402
from ftkit.models import tiny_model  # noqa: E402
from ftkit.train import Run  # noqa: E402

torch.set_num_threads(1)
WORDS = "stressed drawer lager repaid warts gums decal diaper parts regal sloops smart straw tuber".split()
RECORDS = [dict(instruction="Say it backwards.", input=word, output=word[::-1]) for word in WORDS]
# 11 rows in steps of 4, the second epoch from step 4 on; dropout draws random numbers at each
OPTIONS = dict(max_steps=8, per_device_train_batch_size=4, learning_rate=3e-3, save_steps=100, eval_strategy="no", seed=3, quiet=True, name="words")


def adapted(dropout: float = 0.2):
    torch.manual_seed(5)
    config = peft.LoraConfig(r=4, lora_dropout=dropout, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(tiny_model("qwen")[0], config)


def new_run(root, dropout: float = 0.2, **more) -> Run:
    return Run(adapted(dropout), tiny_model("qwen")[1], RECORDS[:11], RECORDS[11:], root=root, **{**OPTIONS, **more})


def opened(folder, **more) -> Run:
    return Run.open(folder, *tiny_model("qwen"), **{"quiet": True, **more})


class At(TrainerCallback):
    "Do something at an event of one step, once."

    def __init__(self, event, step, do):
        def act(args, state, control, **kwargs):
            if state.global_step == step and not self.done:
                self.done = True
                do()
        self.done = False
        setattr(self, event, act)


# ---- what happens in a child

def mark(folder):
    (folder.parent / "there").touch()


def slow(run):
    class Slow(TrainerCallback):
        def on_step_begin(self, *args, **kwargs): time.sleep(0.03)
    run.callbacks.append(Slow())


def long_call(run):
    "The fourth step is deep in a call that Python cannot interrupt."
    trouble.GRACE = train.GRACE = 0.5
    run.callbacks.append(At("on_step_begin", 3, lambda: (mark(run.folder), hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9))))


def long_sleep(run):
    run.callbacks.append(At("on_step_begin", 3, lambda: (mark(run.folder), time.sleep(600))))


def before_optimizer(run):
    run.callbacks.append(At("on_pre_optimizer_step", 3, lambda: (mark(run.folder), time.sleep(600))))


def kills_worker(run):
    def kill():
        for child in psutil.Process().children(): child.kill()
    run.callbacks.append(At("on_step_begin", 3, kill))


def little_memory(run):
    "From step 3 on a step of more than two rows is more than the process may have."
    import resource
    held = lambda: psutil.Process().memory_info().vms
    limit, forward = lambda: resource.setrlimit(resource.RLIMIT_AS, (held() + 3 * 2**28, resource.RLIM_INFINITY)), train.loss_sum

    def hungry(model, batch, plan):
        activations = torch.empty(len(batch["input_ids"]) * 2**28, dtype=torch.uint8)  # 256 MiB a row
        return forward(model, batch, plan) + 0 * activations[0]
    train.loss_sum = hungry
    run.callbacks.append(At("on_step_begin", 3, limit))


HOOKS = dict(none=lambda run: None, slow=slow, long_call=long_call, long_sleep=long_sleep, before_optimizer=before_optimizer, kills_worker=kills_worker, little_memory=little_memory)


def work(task: dict):
    folder = Path(task["folder"])
    if task.get("way") == "plain": return plain(folder, task["hook"])
    run = opened(folder, quiet=False) if folder.exists() else new_run(folder.parent, **{"quiet": False, **task.get("options", {})})
    HOOKS[task.get("hook", "none")](run)
    run.start().wait() if task.get("way") == "start" else run.fit()


# ---- plain transformers, for the other column

def plain(folder, hook: str = "none", callbacks=(), compute_loss=None, **more):
    "The same rows and model, with transformers' own Trainer."
    tokenizer = tiny_model("qwen")[1]
    rows = encode_data(RECORDS[:11], tokenizer).select_columns(["input_ids", "labels", "length"])
    options = dict(max_steps=8, per_device_train_batch_size=4, learning_rate=3e-3, save_steps=5, seed=3, report_to="none", disable_tqdm=True, use_cpu=True, remove_unused_columns=False, logging_steps=1)
    made = type("Plain", (Trainer,), {"compute_loss": compute_loss} if compute_loss else {})
    trainer = made(adapted(), TrainingArguments(str(folder), **{**options, **more}), train_dataset=rows, callbacks=list(callbacks),
                   data_collator=lambda rows: collate(rows, tokenizer.pad_token_id))
    if hook == "long_sleep": trainer.add_callback(At("on_step_begin", 3, lambda: (mark(folder), time.sleep(600))))
    trainer.train()
    return trainer


# ---- the nursery

def child(task: dict):
    log = os.open(str(task["folder"]) + ".log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1), os.dup2(log, 2)
    code = 0
    try: work(task)
    except FtkitError as error: code = print(f"FtkitError: {error}", flush=True) or 3
    except KeyboardInterrupt: code = 130
    except BaseException as error: code = print(f"{type(error).__name__}: {error}", flush=True) or 1
    sys.stdout.flush()
    os._exit(code)


def main():
    for line in sys.stdin:
        task = json.loads(line)
        if "wait" in task:
            print(os.waitstatus_to_exitcode(os.waitpid(task["wait"], 0)[1]), flush=True)
            continue
        number = os.fork()
        if not number: child(task)
        print(number, flush=True)


if __name__ == "__main__":
    main()
