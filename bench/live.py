"""What the live view of a run costs.

    python bench/live.py                     # a refresh of the plot at 10, 1,000 and 100,000 steps, and the memory it holds
    python bench/live.py --json figures.json

The events are invented, with every series of a real run in them: noisy loss and gradient norm, a warm-up and a
cosine, an evaluation, a checkpoint and samples twenty times, ten changes of the learning rate by hand. CPU time is
that of the whole process, so nothing that a refresh causes in another thread is left out. bench/README.md says how
to read the figures.
"""
import argparse
import gc
import json
import math
import os
import platform
import random
import statistics
import sys
import time
import tracemalloc

SIZES = (10, 1_000, 100_000)


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


def machine() -> dict:
    import matplotlib
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    return dict(python=platform.python_version(), matplotlib=matplotlib.__version__, system=platform.system(), cores=os.cpu_count(), load_before=load)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=30, help="refreshes timed at each size")
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured")
    options = parser.parse_args()
    about = machine()
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    refresh = [refresh_cost(steps, options.rounds) for steps in SIZES]
    print(f"\n{'steps':>9}{'refresh, CPU ms':>17}{'slowest':>10}{'KiB':>8}{'reading all, ms':>18}")
    for row in refresh:
        print(f"{row['steps']:9,}{row['refresh_ms']:17.1f}{row['slowest_ms']:10.1f}{row['bytes'] / 1024:8.1f}{row['read_all_ms']:18.1f}")
    held = memory_held(SIZES[-1])
    print(f"\nheld by the curves, KiB, at each tenth of {SIZES[-1]:,} steps: " + " ".join(f"{size / 1024:.0f}" for size in held))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(dict(machine=about, refresh=refresh, memory=held), file, indent=1)


if __name__ == "__main__":
    sys.exit(main())
