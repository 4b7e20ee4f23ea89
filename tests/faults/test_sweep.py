"""A run that is hurt at every call to the file system goes on to the same weights, bit for bit; see sweep.py and shim.py.

In a usual run of the tests every call of a LoRA run's save, rotation and adapter is hit by one of the acts, and the other kinds of runs at
some; with FTKIT_FAULT_TABLE=all every call of every kind is hit, which takes half an hour. FTKIT_FAULT_TABLE=1 or =all writes the table of the docs.
"""
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import table

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs fork and /proc")
SAVING = "saves, rotations and the final adapter"
ACTS = {
    "exit": "the process ends at any call of {}",
    "power": "the power goes at any call of {}: what was not flushed is lost",
    "full": "the disk is full from any call of {} on",
    "error": "an input/output error at any call of {}",
    "missing": "a file of the newest checkpoint is lost", "cut": "a file of the newest checkpoint is cut in half",
    "empty": "a file of the newest checkpoint is empty", "bit": "one bit of a file of the newest checkpoint is flipped",
}
DAMAGE = ("missing", "cut", "empty", "bit")
LORA, FULL, PLAIN, EXPORT = dict(), dict(method="full"), dict(what="plain"), dict(what="export")
# accumulation, workers, an epoch that ends at a save, one that ends within a step, resumes of resumes
OTHERS = [
    dict(accumulation=4), dict(workers=2), dict(method="full", accumulation=4), dict(method="full", workers=2), dict(accumulation=4, workers=2),
    dict(rows=8, stops=[1, 2]), dict(method="full", rows=5, stops=[1, 2, 3]),
]
LAYOUTS = [
    dict(options=dict(packing=True)), dict(method="full", accumulation=4, options=dict(packing=True)), dict(options=dict(packing=True), workers=2, rows=9, stops=[1, 3]),
    dict(data="drawn"), dict(data="drawn", workers=2, accumulation=4), dict(data="drawn", method="full", rows=8, stops=[1, 2]), dict(data="drawn", options=dict(packing=True)),
]


def tasks() -> list[dict]:
    every = (lambda many: 1) if table.is_complete() else (lambda many: many)
    hurt = [dict(case=LORA, act=act, first=1 if table.is_complete() else first, every=every(many)) for act, first, many in (("exit", 1, 2), ("full", 2, 4), ("power", 4, 4), ("error", 8, 16))]
    hurt += [dict(case=FULL, act=act, first=first, every=every(many)) for act, first, many in (("exit", 3, 12), ("power", 9, 12))]
    hurt += [dict(case=case, act=act, first=first, every=4 if table.is_complete() else 80) for number, case in enumerate(OTHERS + LAYOUTS) for act, first in (("exit", 5 + 4 * number), ("power", 25 + 4 * number))]
    hurt += [dict(case=EXPORT, act=act, first=first, every=every(8)) for act, first in (("exit", 1), ("power", 3), ("full", 5))]
    hurt += [dict(case={**case, "stops": [2, 4]}, act=act, first=first, every=every(many)) for case, many in ((LORA, 1 if table.is_wanted() else 4), (PLAIN, 1 if table.is_wanted() else 9)) for first, act in enumerate(DAMAGE, 1)]
    hurt += [dict(case=PLAIN, act=act, every=every(5 if table.is_wanted() else 25)) for act in ("exit", "power", "full", "error")]
    return hurt + controls()


def controls() -> list[dict]:
    "Runs with something broken on purpose: what these tests must not let pass."
    return [dict(case=dict(control="no cursor"), act="exit", first=3, every=60), dict(case=dict(control="no check"), act="power", first=40, every=16)]


@pytest.fixture(scope="module")
def points(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "tasks.json").write_text(json.dumps(tasks()))
    (folder / "work").mkdir()
    command = [sys.executable, Path(__file__).with_name("sweep.py"), folder / "work", folder / "tasks.json"]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads((folder / "work" / "results.json").read_text())["points"]


def problem(point: dict) -> str | None:
    "What is wrong after a point, None for nothing."
    where = f"{point['act']} at {point['at']} {point['call']} of {point['case']}: "
    if point.get("error"):
        return where + point["error"]
    if point["weights"] != point["wanted"]:
        return where + "other weights"
    return where + str(point["problems"] + point["left"]) if point["problems"] or point["left"] or point["state"] != "finished" else None


def is_lost(point: dict) -> bool:
    "Whether a resume fails or ends with other weights."
    return bool(point.get("error")) or point["weights"] != point["wanted"]


def of(points, what=None, acts=None, control=None) -> list[dict]:
    chosen = [p for p in points if p["case"]["control"] == control]
    return [p for p in chosen if (what is None or p["case"]["what"] == what) and (acts is None or p["act"] in acts)]


def told_here(points) -> str:
    "What happened, in words."
    good = sum(problem(p) is None for p in points)
    return f"{good} of {len(points)} go on to the same weights, bit for bit"


def told_plain(points) -> str:
    ends = Counter("fails" if p.get("error") else "same" if p["weights"] == p["wanted"] else "wrong" for p in points)
    return f"of {len(points)}: {ends['fails']} cannot be resumed, {ends['wrong']} resume silently with other weights, {ends['same']} resume right"


def test_every_run_goes_on_to_the_same_weights(points):
    assert [line for p in of(points, "train") if (line := problem(p))] == []


def test_every_call_of_a_save_was_hit(points):
    hurt = [p for p in of(points, "train", ("exit", "power", "full", "error")) if p["case"]["method"] == "lora" and p["case"]["accumulation"] == 1 and not p["case"]["workers"] and p["case"]["stops"] == [2]]
    hit = {p["at"] for p in hurt}
    assert hit == set(range(1, max(hit) + 1)) and len(hit) > 100
    assert {p["call"][0] for p in hurt} == {"open", "write", "fsync", "mkdir", "rename", "unlink"}
    assert {p["from_step"] for p in hurt} >= {2, 4, 6}  # and 5, where the newest whole step was saved when its own save failed
    assert len(of(points)) >= 200


def test_every_fault_happened(points):
    for p in of(points, acts=("exit", "power")):
        assert p["ended"] == 77, p
    assert {p["ended"] for p in of(points, acts=("full",))} <= {0, 1}


def test_an_export_is_whole_or_not_there(points):
    assert [line for p in of(points, "export") if (line := problem(p))] == []
    assert {p["from_step"] for p in of(points, "export")} <= {0, 1}


def test_damage_is_not_gone_on_from(points):
    for p in of(points, "train", DAMAGE):
        assert p["from_step"] == 2, p


def test_a_run_without_its_place_in_the_data_would_be_found_out(points):
    assert any(is_lost(p) for p in of(points, control="no cursor"))


def test_checkpoints_that_nobody_flushes_and_checks_would_be_found_out(points):
    assert any(is_lost(p) for p in of(points, control="no check"))


def test_the_table_of_saves(points, table_row):
    "What the table says of ftkit is what the tests above hold; of plain Trainer, what it did."
    plain = of(points, "plain")
    assert any(p.get("error") for p in plain) and len(plain) >= 10
    for act, fault in ACTS.items():
        here = of(points, "train", (act,))
        table_row("saving", fault.format(SAVING), told_here(here), told_plain(of(points, "plain", (act,))), len(here))
    exports = of(points, "export")
    table_row("saving", "the process ends, the power goes or the disk is full at any call of an export", f"{sum(problem(p) is None for p in exports)} of {len(exports)} leave a whole export or none; made again, it is the same", None, len(exports))
