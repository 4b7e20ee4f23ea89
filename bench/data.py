"""From JSONL to tokens and masks: ftkit beside TRL's own preparation.

    python bench/data.py                                # 52,000 Alpaca-shaped and 10,000 multi-turn rows, two rounds
    python bench/data.py --alpaca 5200 --chats 1000     # a quick look
    python bench/data.py --grow 1,2,4                   # memory on files of one, two and four times the rows
    python bench/data.py --json figures.json            # everything measured, for a report

    trl       datasets.load_dataset, then SFTTrainer's dataset preparation with assistant_only_loss=True
    trl x2    the same with dataset_num_proc=2
    ftkit     load_records, then encode_data
    stream    datasets.load_dataset, then encode_data: nothing is listed in memory
    again     ftkit a second time: the rows are in the cache

All read a file with the same conversations and use the same tokenizer and template, whose answers stand between generation
marks, which TRL needs. Each of them in each round is a fresh process, in turn, with caches of its own that are empty at the
start. Ids and labels are compared by their hash. bench/README.md says how to read the figures.
"""
import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path

WORDS = ("the of and a to in is you that it he was for on are as with his they at be this have from or one had by word but not what all were we when your can said there use an "
         "each which she do how their if will up other about out many then them these so some her would make like him into time has look two more write go see number no way could "
         "people my than first water been call who oil its now find long down day did get come made may part {} {}, {}: 12 7 2026 é naïve – “so” 日本").split()
MARKS = ("{%- for message in messages -%}{%- if loop.first and message.role != 'system' -%}{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}{%- endif -%}"
         "{{- '<|im_start|>' + message.role + '\\n' -}}{%- if message.role == 'assistant' -%}{%- generation -%}{{- message.content + '<|im_end|>' -}}{%- endgeneration -%}"
         "{%- else -%}{{- message.content + '<|im_end|>' -}}{%- endif -%}{{- '\\n' -}}{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}")


# ---- rows

def sentences(draw: random.Random, least: int, most: int) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(least, most))).capitalize() + "."


def alpaca_rows(count: int):
    draw = random.Random(1)
    for _ in range(count):
        given = sentences(draw, 10, 40) if draw.random() < 0.4 else ""
        yield {"instruction": sentences(draw, 8, 20), "input": given, "output": sentences(draw, 10, 100)}


def chat_rows(count: int):
    draw = random.Random(2)
    for _ in range(count):
        turns = [("user", "assistant")[turn % 2] for turn in range(2 * draw.randint(2, 5))]
        yield {"messages": [{"role": role, "content": sentences(draw, 5, 80)} for role in turns]}


def write_rows(path: Path, rows, as_messages: bool) -> None:
    from ftkit.data import to_messages
    with open(path, "w", encoding="utf-8") as file:
        for row in rows: file.write(json.dumps({"messages": to_messages(row)} if as_messages else row, ensure_ascii=False) + "\n")


# ---- one contender, in a process of its own

class Memory(threading.Thread):
    "The most memory of its own that this process held, files mapped into it apart: looked at every 10 ms (Linux)."

    def __init__(self):
        super().__init__(daemon=True)
        self.before, self.most, self.ended = self.now(), 0, threading.Event()

    def now(self) -> int:
        lines = Path("/proc/self/status").read_text().splitlines() if sys.platform == "linux" else []
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    def run(self):
        while not self.ended.wait(0.01): self.most = max(self.most, self.now())


def prepare_trl(path: Path, tokenizer, processes: int | None):
    import datasets
    import trl
    from transformers import LlamaConfig, LlamaForCausalLM
    datasets.disable_progress_bars()
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
    prepare, spent = trl.SFTTrainer._prepare_dataset, []

    def timed(*args, **options):   # the trainer's other work is not counted
        start, cpu = time.perf_counter(), time.process_time()
        result = prepare(*args, **options)
        spent.append((time.perf_counter() - start, time.process_time() - cpu))
        return result

    trl.SFTTrainer._prepare_dataset = timed
    settings = trl.SFTConfig(output_dir=str(path.parent / "trl"), assistant_only_loss=True, max_length=1024, dataset_num_proc=processes, report_to="none", use_cpu=True)
    memory = Memory()
    memory.start()
    start, cpu = time.perf_counter(), time.process_time()
    rows = datasets.load_dataset("json", data_files=str(path), split="train")
    loading = time.perf_counter() - start, time.process_time() - cpu
    trainer = trl.SFTTrainer(model=model, args=settings, train_dataset=rows, processing_class=tokenizer)
    return trainer.train_dataset, *(a + b for a, b in zip(loading, spent[0])), memory


def prepare_ftkit(path: Path, tokenizer, stream: bool):
    import datasets

    from ftkit.data import encode_data, load_records
    datasets.disable_progress_bars()
    memory = Memory()
    memory.start()
    start, cpu = time.perf_counter(), time.process_time()
    rows = datasets.load_dataset("json", data_files=str(path), split="train") if stream else load_records(path)
    data = encode_data(rows, tokenizer, max_length=1024)
    return data, time.perf_counter() - start, time.process_time() - cpu, memory


def contender(name: str, path: Path, tokenizer_path: str) -> dict:
    "Prepare the file and tell what it took."
    import torch   # all hold it, so that it is no difference
    from transformers import AutoTokenizer

    from ftkit.data import end_of_turn_ids, fingerprint
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    tokenizer.chat_template = MARKS
    end_of_turn_ids(tokenizer)   # the trial of the template, once per machine, is not counted
    if name.startswith("trl"): data, wall, cpu, memory = prepare_trl(path, tokenizer, 2 if name == "trl x2" else None)
    else: data, wall, cpu, memory = prepare_ftkit(path, tokenizer, name == "stream")
    memory.ended.set()
    return dict(name=name, rows=len(data), tokens=sum(map(len, data.select_columns("input_ids")["input_ids"])), wall=wall, cpu=cpu, before=memory.before, memory=memory.most,
                sha256=fingerprint(data), torch=torch.__version__)


def measure(name: str, path: Path, tokenizer: str, cache: Path) -> dict:
    "A contender in a fresh process."
    environment = os.environ | {"FTKIT_CACHE": str(cache / "ftkit"), "HF_DATASETS_CACHE": str(cache / "datasets"), "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, __file__, "--contender", name, "--file", str(path), "--tokenizer", tokenizer], env=environment, capture_output=True, text=True)
    if done.returncode: raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# ---- all of them

def compare(kind: str, rows, options, folder: Path) -> list[dict]:
    write_rows(folder / f"{kind}.jsonl", rows(), as_messages=False)
    write_rows(folder / f"{kind}-messages.jsonl", rows(), as_messages=True)
    found = []
    for turn in range(options.rounds):
        for name in options.contenders.split(","):
            path = folder / (f"{kind}-messages.jsonl" if name.startswith("trl") else f"{kind}.jsonl")
            cache = folder / f"cache-{kind}-{turn}" / ("ftkit" if name == "again" else name)
            found.append(measure(name, path, options.tokenizer, cache) | dict(kind=kind, round=turn))
            print(f"  {kind}, round {turn + 1}, {name}: {found[-1]['wall']:.2f} s", file=sys.stderr)
    return found


def show(kind: str, found: list[dict]) -> None:
    names, median = list(dict.fromkeys(one["name"] for one in found)), statistics.median
    print(f"\n{kind}: {found[0]['rows']:,} rows, {found[0]['tokens']:,} tokens; ids and labels {'equal' if len({one['sha256'] for one in found}) == 1 else 'NOT EQUAL'}\n")
    print("| | rows/s | seconds | CPU seconds | as fast as TRL | least | own memory, MiB | of it before |\n|---|---:|---:|---:|---:|---:|---:|---:|")
    for name in names:
        mine = [one for one in found if one["name"] == name]
        ratios = [trl["wall"] / one["wall"] for one in mine for trl in found if trl["name"] == "trl" and trl["round"] == one["round"]]
        speed = f"{median(ratios):.2f} | {min(ratios):.2f}" if ratios else "|"
        wall = median(one["wall"] for one in mine)
        print(f"| {name} | {mine[0]['rows'] / wall:,.0f} | {wall:.2f} | {median(one['cpu'] for one in mine):.2f} | {speed} | {max(one['memory'] for one in mine) / 2**20:,.0f} | {max(one['before'] for one in mine) / 2**20:,.0f} |")


def grow(options, folder: Path) -> list[dict]:
    "Memory while a file of some times the rows is encoded as a stream."
    found = []
    print("\n| rows | file, MiB | seconds | own memory beyond the start, MiB |\n|---:|---:|---:|---:|")
    for times in map(int, options.grow.split(",")):
        path = folder / f"grow-{times}.jsonl"
        write_rows(path, alpaca_rows(options.alpaca * times), as_messages=False)
        found.append(measure("stream", path, options.tokenizer, folder / f"cache-grow-{times}") | dict(kind="grow", bytes=path.stat().st_size))
        print(f"| {found[-1]['rows']:,} | {found[-1]['bytes'] / 2**20:,.0f} | {found[-1]['wall']:.1f} | {(found[-1]['memory'] - found[-1]['before']) / 2**20:,.0f} |", flush=True)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--alpaca", type=int, default=52_000, help="Alpaca-shaped rows; 0 leaves them out")
    parser.add_argument("--chats", type=int, default=10_000, help="multi-turn rows; 0 leaves them out")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--contenders", default="trl,trl x2,ftkit,again,stream", help="names from the list above, in their order")
    parser.add_argument("--grow", help="instead: memory at these multiples of the Alpaca rows")
    parser.add_argument("--tokenizer", help="folder of a tokenizer with ChatML marks; the demo model's if left out")
    parser.add_argument("--json", help="file for everything measured")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender: return print(json.dumps(contender(options.contender, Path(options.file), options.tokenizer)))
    if not options.tokenizer:
        from ftkit.models import prepare_demo_model
        options.tokenizer = str(prepare_demo_model())
    print(f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores ({platform.machine()}), load before {os.getloadavg()[0]:.1f}, Python {platform.python_version()}, "
          + ", ".join(f"{name} {version(name)}" for name in ("transformers", "tokenizers", "trl", "datasets", "torch")))
    found = []
    with tempfile.TemporaryDirectory() as folder:
        if options.grow: found += grow(options, Path(folder))
        else:
            for kind, count, rows in (("alpaca", options.alpaca, alpaca_rows), ("chats", options.chats, chat_rows)):
                if count:
                    found += (these := compare(kind, lambda: rows(count), options, Path(folder)))
                    show(kind, these)
    if options.json: Path(options.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
