"""What the live view of a run costs, and how fast a run in training answers.

    python bench/live.py                     # everything, some eight minutes: the plot, then two real trainings
    python bench/live.py --parts plot        # a refresh at 10, 1,000 and 100,000 points, and the memory held
    python bench/live.py --parts cost        # steps a second with the panel open, against closed, in one training
    python bench/live.py --parts answers     # from asking to effect: the panel's buttons, and ftkit steer
    python bench/live.py --json figures.json

plot: the events are invented, with every series of a real run in them: noisy loss and gradient norm, a warm-up and
a cosine, an evaluation, a checkpoint and samples twenty times, ten changes of the learning rate by hand. CPU time is
that of the whole process, so nothing that a refresh causes in another thread is left out.

cost and answers: the demo's model is trained with LoRA in a real kernel (ipykernel), which this process starts as a
notebook would and from which it takes all messages; no browser draws them. bench/README.md says how to read the
figures.
"""
import argparse
import bisect
import gc
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from pathlib import Path

SIZES = (10, 1_000, 100_000)
PARTS = ("plot", "cost", "answers")


# ---- the plot ---------------------------------------------------------------------------------------------------

def invented(steps: int, seed: int = 0):
    "Events of a run of so many steps, as its journal would have them."
    draws, every = random.Random(seed), max(1, steps // 20)
    yield dict(what="start", step=0, tokens=0, run="bench", process=1, host="here")
    for n in range(1, steps + 1):
        rate = 1.5e-4 * min(1, 50 * n / steps) * (1 + math.cos(math.pi * n / steps))
        loss = 1.1 + 1.5 * math.exp(-5 * n / steps)
        yield dict(what="step", step=n, tokens=3000 * n, loss=loss + draws.gauss(0, 0.25), grad_norm=1 + abs(draws.gauss(0, 0.4)),
                   learning_rate=rate, scheduled_learning_rate=rate * 0.9, epoch=n / steps, tokens_per_second=300.0, memory=2**30)
        if n % every == 0:
            yield dict(what="evaluate", step=n, held_out_loss=loss + 0.1)
            yield dict(what="checkpoint", step=n, folder=f"checkpoint-{n}")
            yield dict(what="sample", step=n, file=f"samples/step-{n:06}.jsonl")
        if n % (2 * every) == 0:
            yield dict(what="control", step=n, action="lr", value=rate, status="applied", source="notebook")


def cpu_ms(call, rounds: int) -> list[float]:
    "CPU milliseconds of the process, for each call."
    took = []
    for _ in range(rounds):
        start = time.process_time()
        call()
        took.append(1000 * (time.process_time() - start))
    return took


def refresh_cost(steps: int, rounds: int) -> dict:
    "One refresh of a run that has so many steps: a new step is taken in, and the plot drawn anew."
    from ftkit.curves import Curves, draw
    curves, last, events = Curves(), steps, list(invented(steps))
    start = time.process_time()
    curves.take(events)
    taken = 1000 * (time.process_time() - start)

    def refresh():
        nonlocal last
        last += 1
        curves.take([dict(what="step", step=last, tokens=3000 * last, loss=1.0, grad_norm=1.0, learning_rate=1e-4, scheduled_learning_rate=1e-4)])
        return draw(curves)

    refresh()  # the first drawing imports matplotlib
    took = cpu_ms(refresh, rounds)
    return dict(steps=steps, refresh_ms=statistics.median(took), slowest_ms=max(took), bytes=len(refresh().encode()), read_all_ms=taken)


def memory_held(steps: int, looks: int = 10) -> list[int]:
    "Bytes that the curves hold, looked at ten times on the way to so many steps."
    from ftkit.curves import Curves, draw
    events, curves, held = invented(steps), Curves(), []
    draw(curves)  # what matplotlib keeps for itself is not the curves'
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for look in range(looks):
        for event in events:
            curves.take([event])
            if event["step"] >= steps * (look + 1) // looks:
                break
        draw(curves)
        gc.collect()
        held.append(tracemalloc.get_traced_memory()[0] - before)
    tracemalloc.stop()
    return held


# ---- in a kernel: a real training -------------------------------------------------------------------------------

def training(micro_batch: int, callback, **options):
    "The demo's model with LoRA, training in the background on the same few tickets again and again: every step is the same work."
    from datasets import Dataset
    from train import own_row

    from ftkit.demo import tickets
    from ftkit.lora import add_lora
    from ftkit.models import load_model
    from ftkit.train import Run
    model, tokenizer = load_model("smollm2-135m")
    rows = sorted((own_row(record, tokenizer) for record in tickets()[0]), key=lambda row: row["length"])
    count = micro_batch * options.get("gradient_accumulation_steps", 1)
    middle = len(rows) // 2
    data = Dataset.from_list(rows[middle:middle + count] * 250)
    run = Run(add_lora(model, rank=16), tokenizer, data, name="bench", callbacks=(callback,), quiet=True,
              per_device_train_batch_size=micro_batch, max_steps=100_000, learning_rate=1e-5, lr_scheduler_type="constant",
              train_sampling_strategy="sequential", save_steps=100_000, **options)
    return run.start()


def edges():
    "A callback that notes when each micro-batch ends: (Unix time, whether it was the last of its step)."
    from transformers import TrainerCallback

    class Edges(TrainerCallback):
        def __init__(self): self.stamps, self.bell = [], threading.Event()
        def on_substep_end(self, *args, **kwargs): self.note(False)
        def on_step_end(self, *args, **kwargs): self.note(True)

        def note(self, last):
            self.stamps.append((time.time(), last))
            self.bell.set()

        def next(self):
            "Wait for the next edge."
            self.bell.clear()
            if not self.bell.wait(600): raise SystemExit("the training stands still")
    return Edges()


def end(run):
    "Stop the training."
    run.control.stop()
    run.wait()


# ---- in a kernel: with the panel against without it -------------------------------------------------------------

def pace(noted, seconds: float) -> float:
    "Steps a second, from one step's end to another's."
    noted.next()
    first = len(noted.stamps) - 1
    time.sleep(seconds)
    noted.next()
    stamps = [stamp for stamp, _ in noted.stamps[first:]]
    return (len(stamps) - 1) / (stamps[-1] - stamps[0])


def cpu_seconds(thread) -> float:
    import psutil
    return next(one.user_time + one.system_time for one in psutil.Process().threads() if one.id == thread.native_id)


def with_panel(run, noted, seconds: float) -> dict:
    "One window with the panel shown."
    from IPython.display import display

    from ftkit.live import panel
    shown, drawn = panel(run), []
    display(shown)
    shown.plot.observe(drawn.append, "value")
    noted.next()  # what its opening costs is over
    drawn.clear()
    before, entered = cpu_seconds(shown._thread), time.perf_counter()
    steps = pace(noted, seconds)
    share = (cpu_seconds(shown._thread) - before) / (time.perf_counter() - entered)
    drawings = len(drawn)
    shown.close()
    return dict(pace=steps, cpu=share, drawings=drawings)


def without_panel(run, noted, seconds: float) -> dict:
    noted.next()
    return dict(pace=pace(noted, seconds))


def cost(pairs: int, window: float) -> dict:
    "Pairs of windows, in the order with without, without with, ..."
    noted, found = edges(), []
    run = training(2, noted)
    for _ in range(3): noted.next()
    with_panel(run, noted, 2.0)  # loads matplotlib
    for turn in range(pairs):
        order = [("with", with_panel), ("without", without_panel)][::-1 if turn % 2 else 1]
        found.append({name: look(run, noted, window) for name, look in order})
        print(f"pair {turn + 1} of {pairs}: " + ", ".join(f"{name} {found[-1][name]['pace']:.3f} steps/s" for name, _ in order), flush=True)
    end(run)
    return dict(window=window, pairs=found)


# ---- in a kernel: from asking to effect -------------------------------------------------------------------------

def until(condition):
    end = time.monotonic() + 120
    while not condition():
        if time.monotonic() > end: raise SystemExit("the run does not answer")
        time.sleep(0.005)


def press(shown, action: str):
    "Press the panel's button, as a browser's message does."
    if action == "lr":
        shown.lr_exact.value = f"{random.uniform(1e-6, 1e-5):.3e}"
        return shown.lr_set.click()
    until(lambda: shown.pause.description == {"pause": "Pause", "resume": "Resume"}[action] and not shown.pause.disabled)
    shown.pause.click()


def type_command(shown, action: str):
    "`ftkit steer` in a process of its own, as in a terminal."
    text = f"lr={random.uniform(1e-6, 1e-5):.3e}" if action == "lr" else action
    subprocess.run([sys.executable, "-c", "from ftkit.cli import main; main()", "steer", shown.view.folder, text, "--wait", "60"], check=True, capture_output=True)


def unix(stamp: str) -> float:
    from datetime import datetime
    return datetime.fromisoformat(stamp.replace("Z", "+00:00")).timestamp()


def ask(run, shown, noted, way, action: str) -> dict:
    "One request; from the moment at which it was made to that of its effect, both as the journal has them."
    from ftkit.control import read_journal
    noted.next() if action != "resume" else None
    time.sleep(random.random() * (noted.stamps[-1][0] - noted.stamps[-2][0]))
    before, entered = sum(e["what"] == "control" for e in read_journal(run.folder)), time.perf_counter()
    way(shown, action)
    returned = time.perf_counter() - entered
    until(lambda: sum(e["what"] == "control" for e in read_journal(run.folder)) > before)
    event = [e for e in read_journal(run.folder) if e["what"] == "control"][-1]
    if event["action"] != action or event["status"] != "applied": raise SystemExit(f"{action} was not applied: {event}")
    return dict(action=action, way=way.__name__, asked=unix(event["asked"]), seconds=unix(event["time"]) - unix(event["asked"]), returned=returned)


def micro_batch(asked: dict, stamps: list) -> float:
    "How long the micro-batch took that was under way when something was asked."
    times = [stamp for stamp, _ in stamps]
    at = bisect.bisect_right(times, asked["asked"])
    return times[min(at, len(times) - 1)] - times[at - 1]


def answers(asks: int) -> dict:
    "Each request so many times, by the panel's button and by a terminal."
    from ftkit.live import panel
    noted = edges()
    run = training(1, noted, gradient_accumulation_steps=4)
    shown, found = panel(run), []
    for _ in range(9): noted.next()
    for turn in range(asks):
        for way in (press, type_command):
            for action in ("lr", "pause", "resume"):
                found.append(ask(run, shown, noted, way, action))
            noted.next()  # the step that the pause has lengthened is no measure
        print(f"asked {turn + 1} of {asks} times", flush=True)
    noted.next()
    end(run)
    shown.close()
    rates = [one for one in found if one["action"] == "lr"]
    for one in rates: one["micro_batch"] = micro_batch(one, noted.stamps)
    usual = statistics.median(one["micro_batch"] for one in rates)
    for one in found:
        if one["action"] == "pause": one["micro_batch"] = usual  # its own has no end until the run goes on
    return dict(asked=found, accumulation=4)


# ---- the kernel from outside ------------------------------------------------------------------------------------

def in_kernel(call: str) -> dict:
    "What a function of this file gives back in a kernel of its own."
    from jupyter_client.manager import start_new_kernel
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        code = f"import json, sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import live; open({str(file)!r}, 'w').write(json.dumps(live.{call}))"
        manager, client = start_new_kernel(kernel_name="python3", cwd=folder, stderr=subprocess.DEVNULL)
        try: reply = client.execute_interactive(code, output_hook=heard, allow_stdin=False)
        finally:
            client.stop_channels()
            manager.shutdown_kernel(now=True)
        if reply["content"]["status"] != "ok": raise SystemExit(f"the kernel failed: {reply['content'].get('ename')}: {reply['content'].get('evalue')}")
        return json.loads(file.read_text())


def heard(message):
    "A message of the kernel; what it prints tells how far it is."
    if message["msg_type"] == "stream": print(message["content"]["text"], end="", file=sys.stderr, flush=True)
    if message["msg_type"] == "error": print("\n".join(message["content"]["traceback"]), file=sys.stderr)


# ---- reports ----------------------------------------------------------------------------------------------------

def report_plot(figures: dict):
    print(f"\n{'steps':>9}{'refresh, CPU ms':>17}{'slowest':>10}{'KiB':>8}{'reading all, ms':>18}")
    for row in figures["refresh"]:
        print(f"{row['steps']:9,}{row['refresh_ms']:17.1f}{row['slowest_ms']:10.1f}{row['bytes'] / 1024:8.1f}{row['read_all_ms']:18.1f}")
    print(f"\nheld by the curves, KiB, at each tenth of {SIZES[-1]:,} steps: " + " ".join(f"{size / 1024:.0f}" for size in figures["memory"]))


def report_cost(figures: dict):
    pairs = figures["pairs"]
    paces = {name: [pair[name]["pace"] for pair in pairs] for name in ("with", "without")}
    ratios, middle = [a / b for a, b in zip(paces["with"], paces["without"])], {name: statistics.median(values) for name, values in paces.items()}
    print(f"\nsteps a second, {len(pairs)} pairs of windows of {figures['window']:g} s")
    for name, values in paces.items(): print(f"{name + ' the panel':<20}{middle[name]:8.3f} in the median, {min(values):.3f} to {max(values):.3f}")
    print(f"{'with / without':<20}{middle['with'] / middle['without']:8.3f} of the medians; pair by pair {statistics.median(ratios):.3f} in the median, {min(ratios):.3f} at least (aimed at 0.98)")
    print(f"the panel's thread  {statistics.mean(pair['with']['cpu'] for pair in pairs):8.1%} of one core, {statistics.mean(pair['with']['drawings'] for pair in pairs):.1f} drawings a window")


def report_answers(figures: dict):
    asked, grace = figures["asked"], 0.1
    usual = statistics.median(one["micro_batch"] for one in asked if one["action"] == "lr")
    print(f"\nfrom asking to effect; micro-batch {usual:.2f} s in the median, {figures['accumulation']} a step")
    print(f"{'':<24}{'median, s':>10}{'longest, s':>12}   in time, of {sum(one['way'] == 'press' and one['action'] == 'lr' for one in asked)}")
    for action in ("lr", "pause", "resume"):
        for way, name in (("press", "button"), ("type_command", "ftkit steer")):
            some = [one for one in asked if (one["action"], one["way"]) == (action, way)]
            within = sum(one["seconds"] <= one.get("micro_batch", 0.0) + grace for one in some)
            told = f"{within} within " + ("a micro-batch + " if action != "resume" else "") + f"{1000 * grace:.0f} ms"
            print(f"{action + ', ' + name:<24}{statistics.median(one['seconds'] for one in some):10.3f}{max(one['seconds'] for one in some):12.3f}   {told}")
    print(f"the whole command `ftkit steer`, Python's start and its waiting for the answer included: {statistics.median(one['returned'] for one in asked if one['way'] == 'type_command'):.2f} s in the median")


def machine() -> dict:
    from importlib.metadata import version
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    versions = {name: version(name) for name in ("torch", "matplotlib", "ipywidgets", "ipykernel")}
    return dict(python=platform.python_version(), **versions, system=platform.system(), cores=os.cpu_count(), load_before=load)


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="which of plot, cost, answers")
    parser.add_argument("--rounds", type=int, default=30, help="plot: refreshes timed at each size")
    parser.add_argument("--pairs", type=int, default=12, help="cost: windows with the panel, and as many without")
    parser.add_argument("--window", type=float, default=10.0, help="cost: seconds of a window")
    parser.add_argument("--asks", type=int, default=12, help="answers: how often each thing is asked, each way")
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured")
    options = parser.parse_args()
    options.parts = options.parts.split(",")
    if set(options.parts) - set(PARTS): parser.error(f"--parts: there are {', '.join(PARTS)}")
    return options


def main():
    options = parse()
    figures = dict(machine=machine())
    print(", ".join(f"{name} {value}" for name, value in figures["machine"].items()))
    if "plot" in options.parts:
        figures |= dict(refresh=[refresh_cost(steps, options.rounds) for steps in SIZES], memory=memory_held(SIZES[-1]))
        report_plot(figures)
    if "cost" in options.parts:
        figures["cost"] = in_kernel(f"cost({options.pairs}, {options.window})")
        report_cost(figures["cost"])
    if "answers" in options.parts:
        figures["answers"] = in_kernel(f"answers({options.asks})")
        report_answers(figures["answers"])
    if options.json: Path(options.json).write_text(json.dumps(figures, indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
