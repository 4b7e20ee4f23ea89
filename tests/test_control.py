"What a notebook cannot hold of ftkit.control: several processes, kills, odd disks."
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ftkit import control as module
from ftkit.control import ACTIONS, Control, Journal, LineReader, confirmation, new_events, parse_action, read_journal, send
from ftkit.data import FtkitError

ROOT = Path(__file__).resolve().parent.parent
posix = pytest.mark.skipif(os.name == "nt", reason="needs signals and permissions of POSIX")


def start(code, *arguments, **options):
    "A Python process with ftkit on its path."
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE, text=True, **options)


@pytest.fixture
def run(tmp_path):
    "A run's folder."
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    return tmp_path


def drop(folder, *lines):
    with open(folder / "inbox.jsonl", "ab") as file:
        for line in lines:
            file.write((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n")


# ---- asking

def test_import_is_light():
    code = "import sys, ftkit.control; print([m for m in ('torch', 'transformers', 'click', 'numpy', 'psutil', 'filelock') if m in sys.modules])"
    assert start(code).communicate()[0].strip() == "[]"


@pytest.mark.parametrize("text", ["", "=", "lr", "lr=", "lr=nan", "lr=inf", "lr=-inf", "lr=0", "lr=-1", "lr=10", "lr=1e999", "lr=true", "pause=1", "PAUSE", "stop now", "x" * 10000])
def test_wrong_action_is_refused_in_one_line(text):
    with pytest.raises(FtkitError) as caught:
        parse_action(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_every_action_can_be_asked():
    for action in ACTIONS:
        control = Control()
        assert control.request(action, {"lr": 1e-4, "rewind": 3}.get(action)).status == "queued"
        assert [request.action for request in control.take()] == [action]


def test_many_threads_ask_while_one_takes():
    control, taken = Control(), []

    def ask(rate):
        for i in range(200):
            control.set_lr(rate + i * 1e-6)

    threads = [threading.Thread(target=ask, args=(rate,)) for rate in (1e-3, 2e-3, 3e-3, 4e-3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        taken += control.take()
    for thread in threads:
        thread.join()
    taken += control.take()
    assert len(taken) == len({request.id for request in taken}) == 800
    for rate in (1, 2, 3, 4):  # each asker's own order is kept
        own = [request.value for request in taken if rate <= request.value * 1e3 < rate + 1]
        assert own == sorted(own) and len(own) == 200


@posix
def test_asking_from_a_signal_handler_while_waiting():
    control = Control()
    before = signal.signal(signal.SIGALRM, lambda *_: control.stop())
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        assert control.wait(30)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert control.take()[0].action == "stop"


def test_both_ways_merge_by_time(run):
    control = Control(run)
    control.pause()
    time.sleep(0.005)
    send(run, "sample")
    time.sleep(0.005)
    control.resume()
    assert [request.action for request in control.take()] == ["pause", "sample", "resume"]


# ---- the inbox

SENDER = """
import sys
from ftkit.control import send
folder, rate = sys.argv[1], float(sys.argv[2])
for i in range(50): print(send(folder, f"lr={rate + i * 1e-6:.6f}", source=sys.argv[2]))
"""


def test_several_processes_send_at_once(run):
    control, taken = Control(run), []
    senders = [start(SENDER, run, rate) for rate in ("0.001", "0.002", "0.003", "0.004")]
    while any(sender.poll() is None for sender in senders):
        taken += control.take()
        time.sleep(0.001)
    sent = [sender.communicate()[0].split() for sender in senders]
    taken += control.take()
    assert [sender.returncode for sender in senders] == [0] * 4
    assert {request.status for request in taken} == {"queued"}
    for rate, ids in zip(("0.001", "0.002", "0.003", "0.004"), sent):
        assert [request.id for request in taken if request.source == rate] == ids and len(ids) == 50


@posix
def test_kill_of_a_sender_in_the_middle_of_a_line(run):
    control = Control(run)
    killed = start("import os, sys\nfile = open(sys.argv[1] + '/inbox.jsonl', 'ab', buffering=0)\nfile.write(b'{\"action\": \"st')\nos.kill(os.getpid(), 9)", run)
    assert killed.wait() == -signal.SIGKILL
    assert control.take() == []
    assert control.take() == []
    send(run, "pause")
    assert [request.action for request in control.take()] == ["pause"]
    assert [event["status"] for event in read_journal(run)] == ["refused"]


def test_nothing_in_the_inbox_harms(run):
    control = Control(run)
    good = {"action": "pause"}
    noise = [b"", b"   ", b"pause", b"null", b"[1]", b"\x00" * 50, b"\xff\xfe", b"{}", b'{"action": "lr", "value": NaN}', b'{"action": "lr", "value": 1e999}',
             b'{"action": "lr", "value": "fast"}', b'{"action": {"a": []}}', b'{"action": "pause", "id": ["a"], "time": {}, "source": 7, "value": 0}', b"[" * 60000, b"{\"a\":" * 9000]
    drop(run, *noise, good)
    taken = []
    for step in range(20):
        taken += control.take(step)
    assert [request.action for request in taken] == ["pause"]
    refused = [event for event in read_journal(run) if event["status"] == "refused"]
    assert len(refused) == len(noise) - 2  # empty lines are nothing
    assert all(event["reason"] and len(json.dumps(event)) < 1000 for event in refused)


def test_a_huge_line_is_bounded_and_refused_once(run):
    control = Control(run)
    drop(run, b"x" * 5_000_000, {"action": "stop", "id": "after"})
    taken = [request for _ in range(200) for request in control.take()]
    assert [request.id for request in taken] == ["after"]
    events = read_journal(run)
    assert len(events) == 1 and "over 1048576 bytes" in events[0]["reason"]
    assert (run / "journal.jsonl").stat().st_size < 1000


def test_a_line_arrives_in_pieces(run):
    control = Control(run)
    line = json.dumps({"action": "lr", "value": 3e-4}).encode() + b"\n"
    with open(run / "inbox.jsonl", "ab", buffering=0) as file:
        for byte in line[:-1]:
            file.write(bytes([byte]))
            assert control.take() == []
        file.write(b"\n")
    assert [request.value for request in control.take()] == [3e-4]


def test_the_same_id_is_heard_once(run):
    control = Control(run)
    drop(run, {"id": "a", "action": "sample"}, {"id": "a", "action": "sample"})
    assert len(control.take()) == 1


def test_the_inbox_is_deleted_or_replaced(run):
    control = Control(run)
    drop(run, {"action": "pause"}, {"action": "sample"})
    assert len(control.take()) == 2
    (run / "inbox.jsonl").unlink()
    assert control.take() == []
    drop(run, {"action": "resume", "id": "new"})
    assert [request.id for request in control.take()] == ["new"]
    (run / "inbox.jsonl").unlink()
    (run / "inbox.jsonl").mkdir()
    assert control.take() == [] and not control.wait(0.2)


def test_an_idle_take_is_cheap(run):
    control = Control(run)
    send(run, "pause")
    control.take()
    begin = time.perf_counter()
    for _ in range(2000):
        control.take()
    assert (time.perf_counter() - begin) / 2000 < 500e-6  # measured: some microseconds


def test_waiting_for_the_inbox(run):
    control = Control(run)
    assert not control.wait(0.05)
    threading.Timer(0.1, send, (run, "resume")).start()
    assert control.wait(30) and control.take()[0].action == "resume"


# ---- a run's second process

def test_answered_requests_are_not_heard_again(run):
    control = Control(run)
    ids = [send(run, text) for text in ("pause", "resume")]
    for request in control.take():
        control.confirm(request, 4)
    again = Control(run)
    assert again.take() == [] and again.history == []
    assert [event["id"] for event in read_journal(run)] == ids


def test_requests_to_a_killed_process_are_refused(run):
    "A stop that was never answered must not end the run that is resumed the next day."
    Journal(run).write("step", step=3)
    id = send(run, "stop")
    lines = (run / "inbox.jsonl").read_text().splitlines()
    old = json.loads(lines[0]) | {"time": "2026-01-01T00:00:00.000Z"}
    (run / "inbox.jsonl").write_text(json.dumps(old) + "\n")
    control = Control(run)
    assert control.take() == []
    assert confirmation(run, id, 0)["reason"] == "sent before this process started"
    assert Control(run).take() == []
    assert len(read_journal(run)) == 2


def test_requests_before_an_earlier_processs_last_event_are_refused(run):
    "The kernel of a notebook is older than the process that was killed."
    id = send(run, "stop")
    time.sleep(0.005)
    Journal(run).write("step", step=9)  # the other process went on after that, and was killed
    assert Control(run).take() == []
    assert confirmation(run, id, 0)["status"] == "refused"


STARTING = """
import sys, time
print("up", flush=True)
sys.stdin.readline()
from ftkit.control import Control
control = Control(sys.argv[1])
print([request.action for request in control.take()], flush=True)
sys.stdin.readline()
print([request.action for request in control.take()])
control.close(0)
"""


def test_a_request_during_start_up_is_heard(run):
    Journal(run).write("step", step=3)
    process = start(STARTING, run, stdin=subprocess.PIPE)
    assert process.stdout.readline() == "up\n"
    early = send(run, "pause")  # the model is still being loaded
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "['pause']\n"
    late = send(run, "resume")
    assert process.communicate("\n")[0] == "['resume']\n"
    assert [confirmation(run, id, 0)["reason"] for id in (early, late)] == ["the run has ended"] * 2


def test_clocks_may_differ_once_the_run_listens(run):
    control = Control(run)
    drop(run, {"action": "pause", "time": "2001-01-01T00:00:00Z"}, {"action": "resume", "time": "2050-01-01T00:00:00+02:00"}, {"action": "stop", "time": "soon"})
    assert {request.action for request in control.take()} == {"pause", "resume", "stop"}


def test_confirmation_waits_for_the_step(run):
    control = Control(run)
    id = send(run, "lr=1e-4")

    def answer():
        time.sleep(0.2)
        for request in control.take():
            control.confirm(request, 7, tokens=4480, old=2e-4, new=1e-4)

    thread = threading.Thread(target=answer)
    thread.start()
    event = confirmation(run, id, timeout=30)
    thread.join()
    keys = ("what", "action", "old", "new", "source", "id", "status", "step", "tokens")
    assert [event[key] for key in keys] == ["control", "lr", 2e-4, 1e-4, "terminal", id, "applied", 7, 4480]
    assert confirmation(run, "unknown", timeout=0.1) is None


# ---- the journal

def test_numbers_that_json_lacks(run):
    journal = Journal(run)
    torch, np = pytest.importorskip("torch"), pytest.importorskip("numpy")
    journal.write("step", 1, loss=math.nan, high=math.inf, low=-math.inf, scalar=torch.tensor(2.5), bad=torch.tensor(math.nan),
                  array=np.arange(2), whole=np.int64(3), path=run, nested={"x": [math.nan]})
    raw = json.loads(journal.path.read_text(), parse_constant=pytest.fail)
    assert (raw["loss"], raw["scalar"], raw["array"], raw["whole"], raw["nested"]) == ("NaN", 2.5, [0, 1], 3, {"x": ["NaN"]})
    event, = read_journal(run)
    assert math.isnan(event["loss"]) and math.isnan(event["bad"]) and event["high"] == math.inf and event["low"] == -math.inf


WRITER = """
import sys
from ftkit.control import Journal
journal = Journal(sys.argv[1])
for i in range(10**9): journal.write("step", step=i, text="x" * 3000)
"""


@posix
def test_reader_while_the_writer_is_killed(run):
    offset, steps, chance = 0, [], random.Random(1)
    for _ in range(4):
        writer = start(WRITER, run)
        seen = len(steps)
        while len(steps) < seen + 50 + chance.randrange(200):
            events, offset = new_events(run, offset)
            steps += [event["step"] for event in events]
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        with open(run / "journal.jsonl", "ab") as file:
            file.write(b'{"what": "step", "step": 1')  # a kill within the write itself is rare; this is what it leaves
        events, offset = new_events(run, offset)
        steps += [event["step"] for event in events]
    Journal(run).write("end")
    events = read_journal(run)
    assert [event["step"] for event in events[:-1]] == steps and events[-1]["what"] == "end"
    starts = [i for i, step in enumerate(steps) if step == 0]
    assert len(starts) == 4
    for begin, end in zip(starts, starts[1:] + [len(steps)]):
        assert steps[begin:end] == list(range(end - begin))


def test_zero_bytes_after_a_power_cut(run):
    Journal(run).write("step", 1)
    with open(run / "journal.jsonl", "ab") as file:
        file.write(b"\0" * 4096)
    journal = Journal(run)
    journal.write("step", 2)
    assert journal.earlier is not None
    assert [event["step"] for event in read_journal(run)] == [1, 2]


class FullDisk:
    "A file that takes `room` bytes, then is full."

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        part = bytes(data[: self.room])
        if not part:
            raise OSError(28, "No space left on device")
        self.room -= len(part)
        return self.file.write(part)

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_full_disk(run):
    journal = Journal(run)
    journal.write("step", 1)
    good, journal._file = journal._file, FullDisk(journal._file, 20)
    for _ in range(2):
        with pytest.raises(FtkitError, match="^cannot write .*journal.jsonl: No space left on device$"):
            journal.write("step", 2)
    journal._file = good
    journal.write("step", 3)
    assert [event["step"] for event in read_journal(run)] == [1, 3]


def test_many_threads_write(run):
    journal = Journal(run)
    threads = [threading.Thread(target=lambda: [journal.write("step", i, text="y" * 500) for i in range(100)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(event["step"] for event in read_journal(run)) == sorted(list(range(100)) * 4)


def test_a_long_journal_reads_quickly(run):
    line = json.dumps({"what": "step", "step": 1, "tokens": 2, "time": "2026-11-24T09:30:00.250Z", "loss": 1.25, "learning_rate": 1e-4}) + "\n"
    (run / "journal.jsonl").write_text(line * 100_000)
    begin = time.perf_counter()
    assert len(read_journal(run)) == 100_000
    assert time.perf_counter() - begin < 10  # measured: half a second


def test_reader_takes_no_more_memory_than_its_limit(tmp_path):
    (tmp_path / "lines").write_bytes(b"a\n" * 10 + b"z" * 1000 + b"\nb\n")
    reader, found = LineReader(tmp_path / "lines", limit=7), []
    while reader.grown():
        found += [line for _, line in reader.take()]
    assert found == [b"a"] * 10 + [None, b"b"]


# ---- folders

def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(FtkitError, match="is no run's folder"):
        send(tmp_path, "pause")
    assert list(tmp_path.iterdir()) == []


@posix
def test_read_only_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    for parent in (folder, *list(folder.parents)[:2]):
        parent.chmod(0o755)
    (folder / "config.yaml").touch()
    folder.chmod(0o555)
    lines = as_nobody(lambda: Journal(folder), lambda: Control(folder), lambda: send(folder, "pause"))
    folder.chmod(0o755)
    assert len(lines) == 3 and all("Permission denied" in line for line in lines)


def as_nobody(*attempts):
    "The messages of attempts made without the rights of root, in a forked process."
    import filelock  # noqa: F401  (nobody may not be allowed to read the packages)

    source, sink = os.pipe()
    child = os.fork()
    if not child:
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            for attempt in attempts:
                try:
                    attempt()
                except FtkitError as error:
                    os.write(sink, f"{error}\n".encode())
        finally:
            os._exit(0)
    os.close(sink)
    with open(source) as file:
        lines = file.read().splitlines()
    os.waitpid(child, 0)
    return lines


def test_a_lock_that_is_never_given_back(run, monkeypatch):
    from filelock import FileLock

    with FileLock(run / ".inbox.lock"):
        with pytest.raises(FtkitError, match="another process has held its lock"):
            module._drop_in(run / "inbox.jsonl", b"{}", patience=0.1)
