"""Packing beside padding rows of like length: the same steps, the same rows in them, timed in turn.

    python bench/packing.py                          # both kinds of rows of train.py, steps of 32 in micro-batches of 8
    python bench/packing.py --data demo --steps 4 --rounds 3
    python bench/packing.py --random-config llama-1b # a GPU machine without a model

    random    padded, rows in random order
    length    padded, rows of like length side by side (ftkit's default)
    packed    the steps of `length`, several samples to a row of at most --max-length tokens
    random+   the steps of `random`, packed

Real tokens a second of forward and backward over whole steps (no optimizer, which costs the same), all in one process, in turn,
after one step of each that is not counted. Shared beginnings are run once where the loss plan says so, which packed rows cannot.
"""
import argparse
import json
import statistics
import time
from importlib.resources import files
from pathlib import Path

from train import SHAPES, encoded_rows, load, pick_format, with_adapter


def batches_of(way: str, rows, options, tokenizer):
    "For each step its micro-batches as tensors."
    from ftkit.batches import StepRows, StepSampler, collate_rows
    order, capacity = "random" if way.startswith("random") else "group_by_length", options.max_length if way in ("packed", "random+") else None
    sampler = StepSampler(rows["length"], options.batch * options.parts, options.parts, 0, order, True, capacity)
    parts, fetch = list(sampler), StepRows(rows, 0).__getitems__
    steps = [[part for part in parts[k:k + options.parts] if part] for k in range(0, len(parts), options.parts)]
    return [[collate_rows(fetch(part), tokenizer.pad_token_id) for part in step] for step in steps[:options.steps]]


def seconds(model, steps, plan, device) -> float:
    import torch

    from ftkit.loss import loss_sum
    began = time.perf_counter()
    for step in steps:
        for batch in step: loss_sum(model, {k: v.to(device) for k, v in batch.items()}, plan).backward()
        model.zero_grad()
    if device.type == "cuda": torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(kind: str, model, tokenizer, options, device) -> list[dict]:
    from datasets import Dataset

    from ftkit.data import load_records
    from ftkit.loss import loss_plan
    rows = Dataset.from_list(encoded_rows(kind, tokenizer, load_records(Path(str(files("ftkit") / "assets" / "tickets.jsonl")))))
    ways, plan = ("random", "length", "packed", "random+"), loss_plan(model)
    steps = {way: batches_of(way, rows, options, tokenizer) for way in ways}
    for way in ways: seconds(model, steps[way][:1], plan, device)
    spent = {way: [] for way in ways}
    for _ in range(options.rounds):
        for way in ways: spent[way].append(seconds(model, steps[way], plan, device))
    figures = []
    for way in ways:
        batches = [batch for step in steps[way] for batch in step]
        real, cells = (sum(f(batch) for batch in batches) for f in (lambda b: int(b["attention_mask"].sum()), lambda b: b["input_ids"].numel()))
        speeds = [real / s for s in spent[way]]
        figures.append(dict(rows=kind, way=way, real=real, padding=cells / real - 1, micro_batches=len(batches), speeds=speeds, speed=statistics.median(speeds), plan=plan.reason))
    for figure, beside in zip(figures, [figures[0], figures[1], figures[1], figures[0]]):
        figure["ratio"] = statistics.median(a / b for a, b in zip(figure["speeds"], beside["speeds"]))
        print(f"{kind:<6}{figure['way']:<9}{figure['real']:>8,} tokens  {figure['padding']:>5.0%} padding  {figure['micro_batches']:>3} micro-batches  {figure['speed']:>8,.0f} tokens/s  {figure['ratio']:.2f} of {beside['way']}")
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--random-config", help=f"random weights of this shape: {', '.join(SHAPES)}")
    parser.add_argument("--data", default="demo,own", help="kinds of rows, as in train.py")
    parser.add_argument("--steps", type=int, default=3, help="steps of each way in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8, help="rows of a micro-batch")
    parser.add_argument("--parts", type=int, default=4, help="micro-batches of a step")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens of a packed row")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.rank, options.alpha = 16, 32
    from ftkit.core import pick_device
    device = pick_device()[0]
    model, tokenizer = load(options, pick_format("c", device, options.dtype), device)
    model = with_adapter(model, options, 0.0).train()
    figures = [figure for kind in options.data.split(",") for figure in measure(kind, model, tokenizer, options, device)]
    print(f"{next(model.parameters()).dtype}, {model.get_base_model().config._attn_implementation} attention; {figures[0]['plan']}")
    if options.json: options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
