"""The table of faults: what a test saw ftkit do, and what it saw plain `transformers.Trainer` do.

A test states a row through the fixture `table_row` (see conftest.py). With `FTKIT_FAULT_TABLE=1` in the environment, rows of
the tests that passed are put into `table.json` beside this file, in place of the rows with the same fault; `nbs/tutorials/faults.ipynb` shows it.
The one command: `FTKIT_FAULT_TABLE=1 python -m pytest tests/faults`
"""
import importlib.metadata
import json
import os
import platform
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

PATH = Path(__file__).with_name("table.json")
GROUPS = ("saving", "process", "disk", "numbers", "memory", "writers", "resume", "control")  # in this order in the table; others follow
PACKAGES = ("ftkit", "torch", "transformers", "trl", "peft", "safetensors")


@dataclass
class Row:
    "One fault."

    group: str  # one of `GROUPS`
    fault: str  # what was done to the run, in a few words; the key of the row
    here: str  # what ftkit did
    plain: str | None = None  # what plain `transformers.Trainer` did to the same; None: not tried
    points: int = 1  # how often the fault was injected, at different places
    test: str = ""  # which test stated it
    date: str = field(default_factory=lambda: time.strftime("%Y-%m-%d", time.gmtime()))
    versions: dict = field(default_factory=lambda: {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}})


def read(path: Path = PATH) -> list[dict]:
    "The rows of the committed table."
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def merge(rows: list[Row], path: Path = PATH) -> None:
    "Put rows into the table, in place of those of the same fault."
    known = {row["fault"]: row for row in read(path)} | {row.fault: asdict(row) for row in rows}
    rank = {group: number for number, group in enumerate(GROUPS)}
    ordered = sorted(known.values(), key=lambda row: (rank.get(row["group"], len(rank)), row["group"]))
    path.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def is_wanted() -> bool:
    "Whether this run of the tests is to write the table."
    return os.environ.get("FTKIT_FAULT_TABLE", "") not in ("", "0")
