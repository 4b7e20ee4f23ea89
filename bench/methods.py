"""LoRA, QLoRA and full fine-tuning on the same task: what is trained, memory by parts, speed, held-out scores, size on disk.

    python bench/methods.py                                    # the demo task, whole: one epoch each, 60 held-out answers
    python bench/methods.py --steps 4 --answers 0              # a quick look at speed and memory
    python bench/methods.py --methods lora,nf4,full --random-config llama-1b --steps 10 --answers 0   # random weights of that shape

Each method is a process of its own, so that its peak memory is its own. bench/README.md says how to read the figures.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

METHODS = {
    "lora": "LoRA", "nf4": "QLoRA, NF4 with double quantization", "int8": "LoRA on 8-bit weights", "full": "full, float32 weights",
}
RATES = dict(lora=2e-3, nf4=2e-3, int8=2e-3, full=2e-4)  # full: an order lower


# ---- one method, in a process of its own ------------------------------------------------------------------------

def load(method: str, options, folder: Path):
    "The base model as the method wants it, and its tokenizer."
    import torch

    from ftkit.models import load_model
    name, dtype = options.model, torch.float32 if method == "full" else None
    if options.random_config: name = random_model(options.random_config, folder)
    return load_model(name, dtype=dtype, **({"quantize": method} if method in ("nf4", "int8") else {}))


def random_model(config: str, folder: Path) -> str:
    "A folder with random weights of a shape, bfloat16, and the tokenizer whose tokens are bytes."
    import torch
    from train import SHAPES
    from transformers import AutoConfig, AutoModelForCausalLM

    from ftkit.core import pick_device
    from ftkit.models import tiny_tokenizer
    shape = dict(SHAPES.get(config) or json.loads(Path(config).read_text()))
    torch.manual_seed(0)
    made = AutoConfig.for_model(shape.pop("model_type"), **shape, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    with pick_device()[0]: model = AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def ready(method: str, model):
    "The same model with what the method trains made trainable."
    if method == "full":
        from ftkit.full import train_fully
        return train_fully(model)
    from ftkit.lora import add_lora
    return add_lora(model, rank=16, targets="all-linear", seed=42)


def held(device) -> int:
    "Bytes in use now: of the GPU's tensors, or of the whole process."
    import gc

    import torch
    gc.collect()
    if device.type == "cuda": return torch.cuda.memory_allocated()
    import psutil
    return psutil.Process().memory_info().rss


def forget_peak(device):
    import torch
    if device.type == "cuda": return torch.cuda.reset_peak_memory_stats()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark begins anew


def peak(device) -> int:
    import torch
    if device.type == "cuda": return torch.cuda.max_memory_allocated()
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


def parts(run) -> dict[str, int]:
    "Bytes of weights, gradients and optimizer state, from the tensors themselves."
    weights = list(run.model.parameters())
    states = getattr(run.trainer.optimizer, "optimizer", run.trainer.optimizer).state.values()
    return dict(weights=sum(p.nbytes for p in weights), gradients=sum(p.nbytes for p in weights if p.requires_grad),
                optimizer=sum(value.nbytes for state in states for value in state.values() if hasattr(value, "nbytes")))


def on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def worker(options) -> dict:
    "One method: load, train an epoch of the demo's rows, ask the held-out ones."
    import torch

    from ftkit.cli import training_speed
    from ftkit.demo import DEMO, tickets
    from ftkit.lora import trainable_share
    from ftkit.train import Run
    method, (train, held_out) = options.worker, tickets()
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = load(method, options, Path(folder) / "base")
        device, empty = model.device, held(model.device)
        model = ready(method, model)
        share = trainable_share(model)
        given = {**DEMO, "learning_rate": RATES[method], "save_strategy": "no"} | ({"max_steps": options.steps} if options.steps else {})
        run = Run(model, tokenizer, train, held_out[:20], root=folder, prompts=[], quiet=True, **given)
        forget_peak(device)
        started = time.perf_counter()
        run.fit()
        seconds, top = time.perf_counter() - started, peak(device)
        steps = [e for e in run.history if e["what"] == "step"]
        losses = [e["held_out_loss"] for e in run.history if e["what"] == "evaluate"]
        disk = on_disk(run.folder / ("model" if method == "full" else "adapter"))
        found = dict(method=method, name=METHODS[method], trainable=share.trainable, total=share.total, parts=parts(run), loaded=empty, peak=top, seconds=seconds,
                     steps=len(steps), tokens_per_second=training_speed(run.history), loss=[steps[0]["loss"], steps[-1]["loss"]], held_out_loss=losses, disk=disk,
                     dtype=str(next(p.dtype for p in model.parameters() if p.is_floating_point())).removeprefix("torch."), device=str(device), learning_rate=RATES[method], plan=run.plan.reason)
        return found | scores(run, tokenizer, held_out[:options.answers]) | dict(torch=torch.__version__)


def scores(run, tokenizer, records: list[dict]) -> dict:
    "Held-out answers against their tickets."
    if not records: return {}
    from ftkit.demo import LONGEST_ANSWER, score
    from ftkit.models import generate
    started = time.perf_counter()
    found = score(generate(run.model, tokenizer, records, LONGEST_ANSWER), records)
    return dict(parsed=found.parsed, fields=found.fields, exact=found.exact, answer_seconds=time.perf_counter() - started)


# ---- the table --------------------------------------------------------------------------------------------------

def run_worker(method: str, options) -> dict:
    "A fresh process for one method; what it prints is shown only if it fails."
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        command = [sys.executable, __file__, "--child", json.dumps({**vars(options), "worker": method}), "--json", str(out)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "TOKENIZERS_PARALLELISM": "false"})
        if done.returncode or not out.exists(): raise SystemExit(f"{done.stdout[-4000:]}\n{METHODS[method]} failed")
        return json.loads(out.read_text())


def table(found: list[dict]) -> str:
    "Markdown."
    mega = lambda size: f"{size / 1e6:,.1f}" if size < 10e6 else f"{size / 1e6:,.0f}"
    head = ["method", "weights' format", "trained", "weights, MB", "gradients, MB", "optimizer, MB", "process before, MB", "peak, MB", "the rest, MB", "real tokens/s", "held-out loss", "fields right", "wholly right", "on disk, MB"]
    rows = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for one in found:
        rest = one["peak"] - one["loaded"] - one["parts"]["gradients"] - one["parts"]["optimizer"]
        right = [f"{one[key]:.0%}" if key in one else "" for key in ("fields", "exact")]
        loss = f"{one['held_out_loss'][0]:.3f} to {one['held_out_loss'][-1]:.3f}" if one["held_out_loss"] else ""
        rows.append([one["name"], one["dtype"], f"{one['trainable'] / 1e6:.1f}M of {one['total'] / 1e6:.1f}M", *(mega(one["parts"][key]) for key in ("weights", "gradients", "optimizer")),
                     mega(one["loaded"]), mega(one["peak"]), mega(rest), f"{one['tokens_per_second']:,.0f}", loss, *right, mega(one["disk"])])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--methods", default="lora,nf4,full", help=f"which, in this order: {', '.join(METHODS)}")
    add("--model", default="smollm2-135m", help="any name that ftkit.models.load_model takes")
    add("--random-config", help="random weights of a shape instead: see bench/train.py")
    add("--steps", type=int, help="optimizer steps; without it, one epoch of the demo's rows")
    add("--answers", type=int, default=60, help="held-out messages to answer; 0 for none")
    add("--json", metavar="FILE", help="write everything that was measured")
    add("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    options = arguments()
    if options.child:
        found = worker(argparse.Namespace(**json.loads(options.child)))
        return Path(options.json).write_text(json.dumps(found))
    methods = options.methods.split(",")
    unknown = [method for method in methods if method not in METHODS]
    if unknown: raise SystemExit(f"unknown method {unknown[0]!r}: there are {', '.join(METHODS)}")
    found = []
    for method in methods:
        found.append(run_worker(method, options))
        print(f"{METHODS[method]}: {found[-1]['steps']} steps in {found[-1]['seconds']:.0f} s", flush=True)
    print("\n" + table(found))
    if options.json: Path(options.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
