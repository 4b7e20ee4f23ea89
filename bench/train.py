"""How fast ftkit fine-tunes, beside TRL's defaults and beside TRL as an expert would set it.

    python bench/train.py                          # three rounds of ten steps on both kinds of rows
    python bench/train.py --same-order             # the same batches for all: the loss of each step, compared
    python bench/train.py --compile --steps 30     # ftkit with compiled layers, its warm-up stated apart
    python bench/train.py --json figures.json      # everything measured, for a report

    a  classic      TRL's defaults: gradient checkpointing on, LoRA dropout 0.05, rows in random order;
                    float32 on a CPU, bfloat16 on a GPU
    b  expert       TRL set by hand: the format that ftkit measures as the fastest, no gradient checkpointing,
                    rows grouped by length, no LoRA dropout, fused AdamW
    c  ftkit        Run with its defaults
    d  ftkit+compile  the same with compile=True (only with --compile)

All get the same encoded rows (input_ids, labels), model, LoRA modules, rank, alpha, first weights, batch, learning
rate and schedule. Each recipe of each round is a fresh process, in turn (a b c, a b c, ...), so that peak memory
is its own and a slow moment of the machine meets all of them. bench/README.md says how to read the figures.
"""
import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# No import of torch up here: a child's peak memory on Linux must not begin with what its parent held.

NAMES = {"a": "TRL defaults", "a0": "TRL defaults, no dropout", "b": "TRL by an expert", "c": "ftkit", "d": "ftkit, compiled"}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
RULE = ("4 FLOPs per decoder weight and real token, and 4 per weight of the LM head and trained token: forward, and backward "
        "to the activations (frozen weights need no gradient of their own). Left out: attention scores, the adapter, the "
        "optimizer. What a recipe computes beyond it (padding, recomputed layers, the head on untrained positions) earns "
        "nothing; a beginning that the batch shares counts for every row, so a recipe that runs it once can pass 100%.")
SHAPES = {  # for --random-config: the transformers configuration of well-known shapes
    "smollm2-135m": dict(model_type="llama", hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                         num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True),
    "llama-1b": dict(model_type="llama", hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
                     num_key_value_heads=8, head_dim=64, vocab_size=128256, tie_word_embeddings=True),
    "llama-8b": dict(model_type="llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                     num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False),
}


# ---- one recipe, in a process of its own ----------------------------------------------------------------------

def pick_format(recipe: str, device, wanted: str | None):
    "Number format of the weights: the classic one for (a), for the others the fastest (or the one asked for)."
    import torch

    from ftkit.core import pick_dtype
    if recipe[0] == "a": return torch.float32 if device.type == "cpu" else torch.bfloat16
    return getattr(torch, wanted) if wanted else pick_dtype(device)[0]


def load(options, dtype, device):
    "The base model and its tokenizer; random weights of a given shape where no model can be had."
    import torch

    from ftkit.models import load_model, tiny_tokenizer
    if not options.random_config: return load_model(options.model, dtype=dtype, device=device)
    from transformers import AutoConfig, AutoModelForCausalLM
    shape = dict(SHAPES.get(options.random_config) or json.loads(Path(options.random_config).read_text()))
    torch.manual_seed(0)
    config = AutoConfig.for_model(shape.pop("model_type"), **shape, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    with device: model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.config._name_or_path = f"random weights, {Path(options.random_config).stem}"
    return model, tiny_tokenizer()


def with_adapter(model, options, dropout: float):
    "The same first weights for every recipe: plain PEFT, the same seed."
    import peft
    import torch
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(
        r=options.rank, lora_alpha=options.alpha, lora_dropout=dropout, target_modules=TARGETS, task_type="CAUSAL_LM"))


def own_row(record: dict, tokenizer) -> dict:
    "The message itself first and a short instruction last, without template: rows that share nothing."
    prompt = tokenizer(record["input"].strip() + "\n\nThe ticket as JSON:\n", add_special_tokens=False)["input_ids"]
    answer = tokenizer(record["output"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return dict(input_ids=prompt + answer, labels=[-100] * len(prompt) + answer, length=len(prompt + answer), cut=0)


def encoded_rows(kind: str, tokenizer, records: list[dict]) -> list[dict]:
    "The demo's tickets as `own` or `demo` rows, in file order."
    from ftkit.data import encode_data
    from ftkit.models import shared_prefix_length
    if kind == "demo": return encode_data(records, tokenizer, max_length=1024).to_list()
    rows = sorted((own_row(record, tokenizer) for record in records), key=lambda row: row["input_ids"])
    kept = rows[:1]  # in dictionary order, a row shares most with its neighbour
    for row in rows[1:]:
        if shared_prefix_length([kept[-1]["input_ids"], row["input_ids"]]) < 16: kept.append(row)
    return kept


def split_rows(kind: str, tokenizer, options):
    "Rows to train on, rows to warm up on (the longest of them), rows for the loss at the end."
    import random
    from importlib.resources import files

    from datasets import Dataset

    from ftkit.data import load_records
    rows = encoded_rows(kind, tokenizer, load_records(Path(str(files("ftkit") / "assets" / "tickets.jsonl"))))
    random.Random(0).shuffle(rows)
    final, rows = rows[:16], rows[16:]
    count = options.steps * options.batch
    if count > len(rows): raise SystemExit(f"{count} rows are needed, there are {len(rows)}: fewer --steps or a smaller --batch")
    rows = rows[:count]
    longest = sorted(rows, key=lambda row: -row["length"])[:options.batch]
    warm = [longest[i % len(longest)] for i in range(options.batch * options.warmup)]
    return Dataset.from_list(rows), Dataset.from_list(warm) if warm else None, final


class Recorder:
    "Counts and times each step at the same place for all recipes: around `SFTTrainer.training_step`, which ftkit's trainer inherits."

    def __init__(self, device):
        self.counts, self.losses, self.norms, self.times, self.device = [], [], [], [], device

    @contextlib.contextmanager
    def listening(self):
        import trl
        recorder, step = self, trl.SFTTrainer.training_step

        def training_step(trainer, model, inputs, *args, **kwargs):
            mask, labels = inputs["attention_mask"], inputs["labels"]
            recorder.counts.append((int(mask.sum()), int(labels[:, 1:].ne(-100).sum()), mask.numel()))
            loss = step(trainer, model, inputs, *args, **kwargs)
            recorder.losses.append(loss.detach())
            return loss

        trl.SFTTrainer.training_step = training_step
        try: yield
        finally: trl.SFTTrainer.training_step = step

    def callback(self):
        from transformers import TrainerCallback
        recorder = self

        class Clock(TrainerCallback):
            def on_train_begin(self, *args, **kwargs): recorder.tick()
            def on_step_end(self, *args, **kwargs): recorder.tick()
            def on_log(self, args, state, control, logs=None, **kwargs):
                if "grad_norm" in (logs or {}): recorder.norms.append(float(logs["grad_norm"]))

        return Clock()

    def tick(self):
        import torch
        if self.device.type == "cuda": torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    def figures(self) -> dict:
        "Per step, and the whole from the start of training to the end of the last step, what lies between included."
        steps = [b - a for a, b in zip(self.times, self.times[1:])]
        losses = [loss.item() for loss in self.losses]
        assert len(steps) == len(losses) == len(self.counts) > 0, "a step was not recorded"
        assert len(self.norms) == len(steps) and min(self.norms) > 0, f"gradient norms {self.norms}: nothing was trained"
        real, trained, padded = (sum(column) for column in zip(*self.counts))
        mean = sum(loss * count[1] for loss, count in zip(losses, self.counts)) / trained
        return dict(real=real, trained=trained, padded=padded, seconds=self.times[-1] - self.times[0], step_seconds=steps,
                    losses=losses, mean_loss=mean, grad_norms=self.norms)


def same_options(options, seed: int = 42) -> dict:
    "What all three recipes are given."
    chosen = dict(per_device_train_batch_size=options.batch, learning_rate=options.learning_rate, num_train_epochs=1,
                  lr_scheduler_type="linear", warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0, max_length=1024, seed=seed,
                  logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True)
    return {**chosen, "train_sampling_strategy": "sequential"} if options.same_order else chosen


def fit_trl(recipe: str, model, tokenizer, rows, options, folder: Path, device, clock) -> str:
    "Recipes (a) and (b)."
    import torch
    import trl
    dtype = next(p for n, p in model.named_parameters() if "lora_" not in n).dtype
    chosen = dict(same_options(options), bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16, use_cpu=device.type == "cpu",
                  dataloader_pin_memory=device.type == "cuda")
    if recipe == "b":
        expert = dict(gradient_checkpointing=False, optim="adamw_torch_fused", train_sampling_strategy="group_by_length")
        chosen = {**expert, **chosen}
    config = trl.SFTConfig(output_dir=str(folder), **chosen)
    trl.SFTTrainer(model=model, args=config, train_dataset=rows.select_columns(["input_ids", "labels"]), processing_class=tokenizer, callbacks=[clock]).train()
    return "as TRL does it"


def fit_ftkit(recipe: str, model, tokenizer, rows, options, folder: Path, device, clock) -> str:
    "Recipes (c) and (d); ftkit's reason for its plan."
    from ftkit.train import Run
    run = Run(model, tokenizer, rows, root=folder, prompts=[], quiet=True, compile=recipe == "d", callbacks=[clock], **same_options(options)).fit()
    return run.plan.reason


def train_once(recipe: str, rows, options, folder: Path, device, dtype) -> tuple[dict, object]:
    "Load, adapt, train one epoch of the rows; what was measured, and the model."
    model, tokenizer = load(options, dtype, device)
    model = with_adapter(model, options, 0.05 if recipe == "a" else 0.0)
    recorder, fit = Recorder(device), fit_ftkit if recipe in "cd" else fit_trl
    model.train()
    with recorder.listening(): plan = fit(recipe, model, tokenizer, rows, options, folder, device, recorder.callback())
    return {**recorder.figures(), "plan": plan}, model


def peak_memory(device) -> dict[str, int]:
    "Bytes. On a CPU the process's high-water mark of resident memory, Python and libraries included."
    import torch
    if device.type == "cuda":
        return dict(allocated=torch.cuda.max_memory_allocated(), reserved=torch.cuda.max_memory_reserved())
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return dict(resident=int(fields["VmHWM"].split()[0]) * 1024)
    import resource
    unit = 1 if sys.platform == "darwin" else 1024
    return dict(resident=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def weight_counts(model) -> dict[str, int]:
    "Weights of the decoder's matrices and of the LM head (tied or not: both multiply)."
    base = model.get_base_model()
    decoder = sum(p.numel() for n, p in base.get_decoder().named_parameters() if "lora_" not in n and "embed" not in n)
    return dict(decoder=decoder, head=base.get_output_embeddings().weight.numel(),
                adapter=sum(p.numel() for p in model.parameters() if p.requires_grad))


def final_loss(model, rows: list[dict], pad: int, device) -> float:
    "Mean negative log-likelihood of the trained tokens of fixed rows, from the plain full logits, two rows at a time."
    import torch

    from ftkit.data import collate
    from ftkit.loss import plain_loss
    model.eval()
    total = count = 0.0
    with torch.no_grad():
        for i in range(0, len(rows), 2):
            batch = {k: v.to(device) for k, v in collate(rows[i:i + 2], pad).items()}
            total += plain_loss(model, batch).item()
            count += batch["labels"][:, 1:].ne(-100).sum().item()
    return total / count


def forget():
    "Give back what the warm-up held."
    import ctypes
    import gc

    import torch
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try: ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError): pass


def compiled_graphs() -> int:
    utils = sys.modules.get("torch._dynamo.utils")
    return utils.counters["stats"]["unique_graphs"] if utils else 0


def worker(options) -> dict:
    "One recipe on one kind of rows, once: warm-up with a model of its own, then the measured epoch."
    import torch

    from ftkit.core import measure_dtypes, pick_device
    started, load_before = time.perf_counter(), os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    if options.threads: torch.set_num_threads(options.threads)
    device = pick_device()[0]
    rates = [measure_dtypes(device)]
    dtype = pick_format(options.worker, device, options.dtype)
    tokenizer = load(options, dtype, torch.device("meta") if options.random_config else device)[1]
    rows, warm, final = split_rows(options.data, tokenizer, options)
    warm_seconds = 0.0
    with tempfile.TemporaryDirectory() as folder:
        if warm is not None:
            warm_seconds = -time.perf_counter()
            train_once(options.worker, warm, options, Path(folder) / "warm", device, dtype)
            warm_seconds += time.perf_counter()
        forget()
        graphs = compiled_graphs()
        figures, model = train_once(options.worker, rows, options, Path(folder) / "run", device, dtype)
    figures.update(memory=peak_memory(device), compiled_in_measured_epoch=compiled_graphs() - graphs)
    figures.update(final_loss=final_loss(model, final, tokenizer.pad_token_id or tokenizer.eos_token_id, device), weights=weight_counts(model))
    rates.append(measure_dtypes(device))
    figures["rates"] = {name: max(rate.get(name, 0) for rate in rates) for rate in rates for name in rate}
    return dict(recipe=options.worker, data=options.data, dtype=str(dtype).removeprefix("torch."), warmup_seconds=warm_seconds,
                process_seconds=time.perf_counter() - started, load_before=load_before, machine=machine(device), **figures)


def machine(device) -> dict:
    "Hardware and versions."
    import importlib.metadata as metadata

    import torch

    import ftkit
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    lines = dict(line.split(":", 1) for line in info.read_text().split("\n\n")[0].splitlines() if ":" in line) if info.exists() else {}
    lines = {k.strip(): v.strip() for k, v in lines.items()}
    flags = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16") if f in lines.get("flags", lines.get("Features", "")).split()]
    found = {"ftkit": ftkit.__version__}
    for package in "torch transformers peft trl datasets accelerate".split():
        try: found[package] = metadata.version(package)
        except metadata.PackageNotFoundError: pass
    gpu = torch.cuda.get_device_name(0) if device.type == "cuda" else None
    return dict(cpu=lines.get("model name", cpu), flags=flags, cores=os.cpu_count(), threads=torch.get_num_threads(), gpu=gpu,
                system=platform.system(), python=platform.python_version(), **found)


# ---- rounds, ratios, tables -----------------------------------------------------------------------------------

def run_worker(recipe: str, kind: str, options) -> dict:
    "A fresh process for one recipe; its figures. Its output is shown only if it fails."
    warmup = max(options.warmup, 4) if recipe == "d" else 0 if options.same_order else options.warmup
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        given = {**vars(options), "worker": recipe, "data": kind, "warmup": warmup}
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run([sys.executable, __file__, "--child", json.dumps(given), "--json", str(out)], env=environment,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode or not out.exists(): raise SystemExit(f"{done.stdout[-4000:]}\n{NAMES[recipe]} on {kind} rows failed")
        return {**json.loads(out.read_text()), "warmup_steps": warmup}


def rate(run: dict, what: str = "real") -> float:
    return run[what] / run["seconds"]


def needed_flops(run: dict) -> float:
    "By RULE."
    return 4.0 * (run["weights"]["decoder"] * run["real"] + run["weights"]["head"] * run["trained"])


def spread(values: list[float]) -> dict:
    return dict(median=statistics.median(values), min=min(values), max=max(values), all=values)


def summary(runs: list[dict], kind: str) -> dict:
    "Medians over the rounds, ratios round by round."
    runs = [run for run in runs if run["data"] == kind]
    peaks = {name: max(run["rates"].get(name, 0) for run in runs) for run in runs for name in run["rates"]}
    recipes, out = list(dict.fromkeys(run["recipe"] for run in runs)), dict(matrix_product_gflops=peaks, recipes={}, ratios={})
    for recipe in recipes:
        own = [run for run in runs if run["recipe"] == recipe]
        middle = lambda value: statistics.median(value(run) for run in own)
        peak = max(peaks.values()) * 1e9
        out["recipes"][recipe] = dict(
            name=NAMES[recipe], dtype=own[0]["dtype"], real=spread([rate(run) for run in own]), trained=middle(lambda r: rate(r, "trained")),
            padded=middle(lambda r: rate(r, "padded")), memory={k: max(run["memory"][k] for run in own) for k in own[0]["memory"]},
            seconds=middle(lambda r: r["seconds"]), warmup_seconds=middle(lambda r: r["warmup_seconds"]), warmup_steps=own[0]["warmup_steps"],
            mean_loss=middle(lambda r: r["mean_loss"]), final_loss=middle(lambda r: r["final_loss"]),
            grad_norm=spread([norm for run in own for norm in run["grad_norms"]]) | {"all": None},
            share_of_peak=middle(lambda r: needed_flops(r) / r["seconds"] / peak),
            compiled_in_measured_epoch=max(run["compiled_in_measured_epoch"] for run in own), plan=own[0]["plan"])
    rounds = sorted({run["round"] for run in runs})
    at = {(run["recipe"], run["round"]): rate(run) for run in runs}
    for over, under in (("c", "a"), ("c", "b"), ("b", "a"), ("d", "a"), ("d", "b"), ("d", "c")):
        if over in recipes and under in recipes: out["ratios"][f"{over}/{under}"] = spread([at[over, r] / at[under, r] for r in rounds])
    return out


def print_summary(kind: str, found: dict):
    rates = ", ".join(f"{name} {value:,.0f}" if value >= 10 else f"{name} {value:.1f}" for name, value in found["matrix_product_gflops"].items())
    print(f"\n{kind} rows (matrix product, GFLOP/s, best seen in this run: {rates})")
    print(f"{'':3}{'recipe':26}{'format':10}{'real':>9}{'trained':>9}{'padded':>9}  tokens/s  {'of peak':>8}{'GiB':>7}{'mean':>8}{'final':>8}  loss"
          f"{'grad norm':>20}{'seconds':>9}{'warm-up':>9}")
    for recipe, r in found["recipes"].items():
        memory = r["memory"].get("resident") or r["memory"]["allocated"]
        norms = f"{r['grad_norm']['min']:.2g} to {r['grad_norm']['max']:.2g}"
        print(f"{recipe:3}{r['name']:26}{r['dtype']:10}{r['real']['median']:9,.1f}{r['trained']:9,.1f}{r['padded']:9,.1f}{'':12}{r['share_of_peak']:8.0%}"
              f"{memory / 2**30:7.2f}{r['mean_loss']:8.4f}{r['final_loss']:8.4f}{norms:>26}{r['seconds']:9.1f}{r['warmup_seconds']:9.1f}")
        if "reserved" in r["memory"]: print(f"   reserved {r['memory']['reserved'] / 2**30:.2f} GiB")
        if r["compiled_in_measured_epoch"]: print(f"   {r['compiled_in_measured_epoch']} graphs were compiled inside the measured epoch: not warm")
    for name, ratio in found["ratios"].items(): print(f"   {name}: median {ratio['median']:.2f}, least {ratio['min']:.2f}")


def print_same_order(runs: list[dict], kind: str) -> dict:
    "The loss of each step where all recipes saw the same batches in the same order, and the largest difference to (b)."
    runs = {run["recipe"]: run for run in runs if run["data"] == kind}
    print(f"\n{kind} rows in the same order: loss of each step, nats per trained token")
    out = {}
    for recipe, run in runs.items():
        out[recipe] = dict(name=NAMES[recipe], dtype=run["dtype"], losses=run["losses"], grad_norms=run["grad_norms"], counts=[run["real"], run["trained"]])
        if "b" in runs:
            relative = lambda key: max(abs(x - y) / y for x, y in zip(run[key], runs["b"][key]))
            out[recipe].update(loss_off=relative("losses"), norm_off=relative("grad_norms"))
        off = f"   off (b) by at most {out[recipe]['loss_off']:.1e} of the loss, {out[recipe]['norm_off']:.1e} of the gradient norm" if "b" in runs else ""
        print(f"{recipe:3}{NAMES[recipe]:26}{run['dtype']:10}" + " ".join(f"{loss:.5f}" for loss in run["losses"]) + off)
    return out


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="smollm2-135m", help="any name that ftkit.models.load_model takes")
    add("--random-config", help=f"random weights of this shape instead: {', '.join(SHAPES)}, or a JSON file with a transformers configuration")
    add("--data", default="own,demo", help="kinds of rows: own (share nothing), demo (share the instruction)")
    add("--recipes", default="a,b,c", help="which recipes, in the order in which they take turns")
    add("--compile", action="store_true", help="also (d), ftkit with compile=True")
    add("--same-order", action="store_true", help="rows in file order for all, without dropout too (a0): compare the loss of each step, not the speed")
    add("--rounds", type=int, default=3, help="times that each recipe is run")
    add("--steps", type=int, default=None, help="measured steps: one epoch of steps * batch rows, the same rows for all (10; 3 with --same-order)")
    add("--warmup", type=int, default=2, help="steps before, with a model of their own, not counted; on the longest rows")
    add("--batch", type=int, default=8)
    add("--rank", type=int, default=16)
    add("--alpha", type=float, default=32)
    add("--learning-rate", type=float, default=2e-4)
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="for (b), (c) and (d), instead of the one measured as the fastest")
    add("--threads", type=int, help="of PyTorch on the CPU; default: PyTorch's own choice")
    add("--json", help="write everything here")
    add("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    options = arguments()
    if options.child:
        figures = worker(argparse.Namespace(**json.loads(options.child)))
        Path(options.json).write_text(json.dumps(figures))
        return
    options.steps = options.steps or (3 if options.same_order else 10)
    recipes = options.recipes.split(",") + (["d"] if options.compile else [])
    if options.same_order: options.rounds, recipes = 1, [r for recipe in recipes for r in (("a", "a0") if recipe == "a" else (recipe,))]
    kinds, runs, began = options.data.split(","), [], time.strftime("%Y-%m-%d")
    if unknown := (set(recipes) - set(NAMES)) | (set(kinds) - {"own", "demo"}): raise SystemExit(f"unknown: {', '.join(sorted(unknown))}")
    for number in range(options.rounds):
        for kind in kinds:
            for recipe in recipes:
                run = {**run_worker(recipe, kind, options), "round": number}
                if not runs: print(json.dumps(run["machine"]), flush=True)
                runs.append(run)
                print(f"round {number + 1} {kind:5}{recipe:3}{rate(run):9,.1f} real tokens/s, loss {run['mean_loss']:.4f}, load before {run['load_before']}", flush=True)
    result = dict(date=began, machine=runs[0]["machine"], settings={k: v for k, v in vars(options).items() if k not in ("child", "json")},
                  targets=TARGETS, rule=RULE, data={})
    for kind in kinds:
        if options.same_order: result["data"][kind] = print_same_order(runs, kind)
        else:
            result["data"][kind] = summary(runs, kind)
            print_summary(kind, result["data"][kind])
    print(f"\nshare of peak: {RULE}" if not options.same_order else "")
    if options.json: Path(options.json).write_text(json.dumps({**result, "runs": runs}, indent=1))


if __name__ == "__main__":
    main()
