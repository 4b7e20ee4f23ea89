"""How long `import ftkit` and `ftkit --help` take, beside `import torch`.

    python bench/import_time.py [--rounds 7]

Each round starts a fresh Python for each of them, in turn, so that a slow moment of the machine meets all
of them. What Python itself needs to start is measured the same way and listed first.
"""
import argparse
import statistics
import subprocess
import sys
import time

HELP = "import sys; sys.argv = ['ftkit', '--help']\nfrom ftkit.cli import main\nmain()"
CASES = {"python alone": "pass", "import ftkit": "import ftkit", "ftkit --help": HELP, "import torch": "import torch"}


def seconds(code: str) -> float:
    "Wall seconds of a fresh Python that runs this code."
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="times that each case is run, after one that is not counted")
    rounds = parser.parse_args().rounds
    times = {name: [] for name in CASES}
    for turn in range(rounds + 1):
        for name, code in CASES.items():
            took = seconds(code)
            if turn:
                times[name].append(took)
    torch = statistics.median(times["import torch"])
    print(f"{'':14}{'median s':>10}{'slowest s':>11}{'of import torch':>17}")
    for name, measured in times.items():
        median = statistics.median(measured)
        print(f"{name:14}{median:10.3f}{max(measured):11.3f}{median / torch:16.1%}")


if __name__ == "__main__":
    main()
