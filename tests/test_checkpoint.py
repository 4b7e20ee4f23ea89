"What a notebook cannot hold of ftkit.checkpoint: kills and errors at every line, damaged files, other processes, other optimizers."
import errno
import json
import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ftkit import checkpoint as module
from ftkit.checkpoint import (
    checkpoints, load_optimizer, load_rng, load_state, newest_checkpoint, pack, remove_folder, save_optimizer, save_rng, save_state,
    sweep_temporary, unpack, verify_folder, write_folder,
)
from ftkit.data import FtkitError

posix = pytest.mark.skipif(os.name == "nt", reason="needs fork and signals of POSIX")
CONTENT = {"weights.bin": bytes(range(256)) * 300, "inner/state.json": b'{"step": 1}', "empty": b""}


def write_files(folder):
    (folder / "inner").mkdir()
    for name, content in CONTENT.items():
        with open(folder / name, "wb", buffering=0) as file:
            file.write(content[: len(content) // 2])
            file.write(content[len(content) // 2 :])


@pytest.fixture
def run(tmp_path):
    "A run's folder with a good checkpoint."
    write_folder(tmp_path / "checkpoint-10", write_files)
    return tmp_path


# ---- writing, interrupted

def at_line(number, act):
    "Call `act` at the so-manieth line that the module or `write_files` executes; returns a list with the count so far."
    count = [0]

    def trace(frame, event, argument):
        if frame.f_code.co_filename != module.__file__ and frame.f_code.co_name != "write_files":
            return None
        if event == "line":
            count[0] += 1
            if count[0] == number:
                act()
        return trace

    sys.settrace(trace)
    return count


def lines_of(call):
    count = at_line(0, None)
    try:
        call()
    finally:
        sys.settrace(None)
    return count[0]


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def forked(call, number):
    "Run `call` in another process and kill it at that line; returns the exit status."
    child = os.fork()
    if not child:
        try:
            at_line(number, kill)
            call()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


@posix
def test_kill_at_every_line_of_a_save(run):
    total = lines_of(lambda: write_folder(run / "checkpoint-0", write_files))
    remove_folder(run / "checkpoint-0")
    ends = set()
    for number in range(1, total + 1):
        assert forked(lambda: write_folder(run / "checkpoint-20", write_files), number) == signal.SIGKILL
        newest, reasons = newest_checkpoint(run)
        assert reasons == [] and verify_folder(newest) == [] and verify_folder(run / "checkpoint-10") == []
        ends.add(newest.name)
        assert len(sweep_temporary(run)) + (newest.name == "checkpoint-20") <= 1
        if newest.name == "checkpoint-20":
            remove_folder(newest)
        assert os.listdir(run) == ["checkpoint-10"]
    assert total > 50 and ends == {"checkpoint-10", "checkpoint-20"}


@posix
def test_kill_at_every_line_of_a_removal(run):
    for number in range(1, lines_of(lambda: remove_folder(write_folder(run / "checkpoint-0", write_files))) + 1):
        forked(lambda: remove_folder(run / "checkpoint-10"), number)
        newest, reasons = newest_checkpoint(run)
        assert reasons == []
        sweep_temporary(run)
        assert os.listdir(run) == (["checkpoint-10"] if newest else [])
        if not newest:
            write_folder(run / "checkpoint-10", write_files)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=["disk", "interrupt"])
def test_error_at_every_line_of_a_save(run, error):
    "A full disk and an interrupt leave nothing half done, and what is left hidden is swept up."
    def fail():
        raise error

    total = lines_of(lambda: write_folder(run / "checkpoint-0", write_files))
    remove_folder(run / "checkpoint-0")
    told = 0
    for number in range(1, total + 1):
        at_line(number, fail)
        try:
            write_folder(run / "checkpoint-20", write_files)
        except (FtkitError, OSError, KeyboardInterrupt) as caught:
            told += isinstance(caught, FtkitError)
        finally:
            sys.settrace(None)
        module._writing.clear()  # as in a later process
        sweep_temporary(run)
        assert sorted(os.listdir(run)) in (["checkpoint-10"], ["checkpoint-10", "checkpoint-20"]), number
        assert newest_checkpoint(run)[1] == []
        if (run / "checkpoint-20").exists():
            remove_folder(run / "checkpoint-20")
    assert told > total * 0.7 if isinstance(error, OSError) else told == 0  # a few lines lie before and after the building


@pytest.mark.parametrize("name", ["fsync", "rename", "mkdir"])
def test_full_disk(run, name, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, name, full)
        with pytest.raises(FtkitError, match=r"^cannot write .*checkpoint-20: No space left on device; nothing that was there before is lost$"):
            write_folder(run / "checkpoint-20", write_files)
    assert os.listdir(run) == ["checkpoint-10"] and newest_checkpoint(run) == (run / "checkpoint-10", [])


def test_safetensors_on_a_full_disk(run):
    from safetensors import SafetensorError

    def write(folder):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(FtkitError, match="cannot write .*: .*No space left"):
        write_folder(run / "checkpoint-20", write)
    assert os.listdir(run) == ["checkpoint-10"]


def test_never_overwrites(run):
    before = verify_folder(run / "checkpoint-10"), os.stat(run / "checkpoint-10").st_mtime_ns
    with pytest.raises(FtkitError, match="never overwritten"):
        write_folder(run / "checkpoint-10", write_files)

    def race(folder):
        write_files(folder)
        write_folder(run / "checkpoint-20", write_files)  # another process was quicker

    with pytest.raises(FtkitError, match="cannot write"):
        write_folder(run / "checkpoint-20", race)
    assert before == (verify_folder(run / "checkpoint-10"), os.stat(run / "checkpoint-10").st_mtime_ns)
    assert verify_folder(run / "checkpoint-20") == [] and len(os.listdir(run)) == 2


def test_other_errors_of_the_writer_stay_what_they_are(run):
    with pytest.raises(ZeroDivisionError):
        write_folder(run / "checkpoint-20", lambda folder: 1 / 0)
    with pytest.raises(FtkitError, match="not a plain file"):
        write_folder(run / "checkpoint-20", lambda folder: (folder / "link").symlink_to("/etc/hostname"))
    with pytest.raises(FtkitError, match="manifest.json is a name"):
        write_folder(run / "checkpoint-20", lambda folder: (folder / "manifest.json").touch())
    assert os.listdir(run) == ["checkpoint-10"]


@posix
def test_read_only_folder(tmp_path_factory):
    from test_control import as_nobody

    folder = tmp_path_factory.mktemp("shared")
    for parent in (folder, *list(folder.parents)[:2]):
        parent.chmod(0o755)
    folder.chmod(0o555)
    lines = as_nobody(lambda: write_folder(folder / "checkpoint-1", write_files))
    folder.chmod(0o755)
    assert len(lines) == 1 and "checkpoint-1: Permission denied" in lines[0]


# ---- damage

def flip(path, at=0, bit=1):
    content = bytearray(path.read_bytes())
    content[at] ^= bit
    path.write_bytes(content)


DAMAGE = {
    "weights.bin: its contents have changed": lambda folder: flip(folder / "weights.bin", 76799, 128),
    "inner/state.json: its contents have changed": lambda folder: flip(folder / "inner/state.json"),
    "weights.bin: 100 bytes, 76800 were written": lambda folder: os.truncate(folder / "weights.bin", 100),
    "empty: 1 bytes, 0 were written": lambda folder: (folder / "empty").write_bytes(b"x"),
    "weights.bin: missing": lambda folder: (folder / "weights.bin").unlink(),
    "inner/extra.bin: not in the manifest": lambda folder: (folder / "inner/extra.bin").touch(),
    "manifest.json: missing": lambda folder: (folder / "manifest.json").unlink(),
    "manifest.json: not readable": lambda folder: os.truncate(folder / "manifest.json", 50),
    "manifest.json: not": lambda folder: (folder / "manifest.json").write_text("[]"),
    "manifest.json: its own SHA-256": lambda folder: (folder / "manifest.json").write_text((folder / "manifest.json").read_text().replace("76800", "76801")),
    "empty: not a plain file": lambda folder: ((folder / "empty").unlink(), (folder / "empty").symlink_to(folder / "weights.bin")),
}


@pytest.mark.parametrize("problem", DAMAGE)
def test_damage_is_named_and_passed_over(run, problem):
    folder = write_folder(run / "checkpoint-20", write_files)
    DAMAGE[problem](folder)
    found = verify_folder(folder)
    assert len(found) == 1 and found[0].startswith(problem)
    newest, reasons = newest_checkpoint(run)
    assert newest.name == "checkpoint-10" and reasons == [f"checkpoint-20 passed over: {found[0]}"]


def test_every_flipped_bit_of_a_manifest_is_seen_or_harmless(run):
    manifest = run / "checkpoint-10" / "manifest.json"
    whole = manifest.read_bytes()
    unseen = 0
    for at in range(len(whole)):
        flip(manifest, at, 1 << at % 7)
        unseen += not verify_folder(run / "checkpoint-10")
        manifest.write_bytes(whole)
    assert unseen < len(whole) / 10  # white space, and the number of the format


def test_what_people_leave_in_a_folder_is_no_damage(run):
    folder = run / "checkpoint-10"
    (folder / ".DS_Store").touch()
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / ".ipynb_checkpoints" / "state-checkpoint.json").touch()
    assert verify_folder(folder) == []


def test_only_numbered_folders_count(run):
    for name in ("checkpoint-9", "checkpoint-100", "checkpoint-x", "checkpoint-", "adapter", ".checkpoint-300.tmp-host-1-01234567", "checkpoint-7-old"):
        (run / name).mkdir()
    (run / "checkpoint-500").touch()
    assert [path.name for path in checkpoints(run)] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    assert newest_checkpoint(run) == (run / "checkpoint-10", ["checkpoint-100 passed over: manifest.json: missing"])
    assert checkpoints(run / "nowhere") == []


@posix
def test_sweep_spares_the_living(run):
    def temporary(process, host=None):
        path = run / f".checkpoint-20.tmp-{host or module._host()}-{process}-0123abcd"
        path.mkdir()
        return path

    living = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    theirs, left, foreign, reused = temporary(living.pid), temporary(dead.pid), temporary(1, "elsewhere"), temporary(os.getppid())
    (run / ".checkpoint-20.tmp-notes").mkdir()
    os.utime(reused, (1e9, 1e9))  # older than the process that has its number now
    assert sorted(sweep_temporary(run)) == sorted([left, reused])
    assert theirs.exists() and foreign.exists() and (run / ".checkpoint-20.tmp-notes").exists()
    living.communicate(b"\n")
    assert sweep_temporary(run) == [theirs]


def test_sweep_spares_a_save_of_this_process(run):
    def write(folder):
        write_files(folder)
        assert sweep_temporary(run) == [] and folder.exists()

    write_folder(run / "checkpoint-20", write)


# ---- state

@pytest.mark.parametrize("value", [
    None, True, 0, -1, 2**70, 0.1, 5e-324, math.inf, -math.inf, -0.0, "", "é😀", (), [], {}, (1, (2.0, [None, (3,)])), {"a": {1: {"tensor": "x"}, None: (1,)}}, {2.5: "x", True: 0},
])
def test_values_come_back_equal_in_type(value, tmp_path):
    save_state(value, tmp_path, "state")
    json.loads((tmp_path / "state.json").read_text(), parse_constant=pytest.fail)
    loaded = load_state(tmp_path, "state")
    assert repr(loaded) == repr(value)


def test_nan_and_numpy_numbers(tmp_path):
    save_state([math.nan, np.float32(0.5), np.int64(3), np.bool_(True)], tmp_path, "state")
    loaded = load_state(tmp_path, "state")
    assert math.isnan(loaded[0]) and loaded[1:] == [0.5, 3, True]


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_kind_come_back(dtype, tmp_path):
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6).to(dtype)
    shared = {"base": base, "again": base, "row": base[1], "column": base[:, 1], "turned": base.T, "scalar": base[0, 3], "none": base[:0], "wide": base[:1].expand(3, 6)}
    save_state(shared, tmp_path, "state")
    loaded = load_state(tmp_path, "state")
    for name, tensor in shared.items():
        assert loaded[name].dtype == dtype and loaded[name].shape == tensor.shape
        assert loaded[name].contiguous().flatten().view(torch.uint8).tolist() == tensor.contiguous().flatten().view(torch.uint8).tolist()


def test_loaded_state_does_not_hang_on_the_file(tmp_path):
    save_state({"a": torch.ones(100000)}, tmp_path, "state")
    loaded = load_state(tmp_path, "state")
    with open(tmp_path / "state.safetensors", "r+b") as file:
        file.truncate(0)
    assert loaded["a"].sum() == 100000


@pytest.mark.parametrize("text", ["", "{", "[1", '{"tensor": "absent"}', '{"what": 1}', "{}", '{"float": 3}', '{"dict": 3}', '{"dict": [[["a"], 1]]}'])
def test_damaged_state_is_one_line(text, tmp_path):
    save_state({"a": torch.ones(2)}, tmp_path, "state")
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(FtkitError, match="^cannot read .*state.json") as caught:
        load_state(tmp_path, "state")
    assert "\n" not in str(caught.value)


def test_truncated_tensors_are_one_line(tmp_path):
    save_state({"a": torch.ones(200)}, tmp_path, "state")
    os.truncate(tmp_path / "state.safetensors", 300)
    with pytest.raises(FtkitError, match="^cannot read .*state.safetensors"):
        load_state(tmp_path, "state")


@pytest.mark.parametrize("value", [print, object(), {1, 2}, {(1, 2): 3}, 1j, b"bytes"], ids=repr)
def test_what_only_pickle_keeps_is_refused(value):
    with pytest.raises(FtkitError, match="only pickle could keep"):
        pack({"x": value}, {})


def test_pack_is_undone_by_unpack():
    tensors = {}
    packed = pack((torch.ones(2), {"a": [torch.zeros(1)]}), tensors)
    first, second = unpack(json.loads(json.dumps(packed)), tensors)
    assert list(tensors) == ["value/0", "value/1/a/0"] and first.tolist() == [1, 1] and second["a"][0].tolist() == [0]


# ---- the optimizer

class Factored(torch.optim.Optimizer):
    "Like Adafactor: rows and columns, a number, None, and a list in the state."

    def __init__(self, parameters, lr=torch.tensor(0.01), eps=(1e-30, 1e-3), beta=None):
        super().__init__(parameters, dict(lr=lr, eps=eps, beta=beta))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(step=0, rms=0.0, moment=None, history=[], row=torch.zeros(p.shape[:-1], dtype=torch.float32), table=torch.ones(3))
                state["step"] += 1
                state["rms"] = float(p.float().pow(2).mean().sqrt())
                state["history"] = [*state["history"][-2:], state["rms"]]
                state["row"].mul_(0.9).add_(p.grad.float().pow(2).mean(-1), alpha=0.1)
                p.sub_(group["lr"] * state["rms"] / state["step"] * p.grad / (state["row"].unsqueeze(-1).sqrt() + group["eps"][1]).to(p.dtype))


OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.95)),
    "adamw fused": lambda groups: torch.optim.AdamW(groups, lr=1e-2, fused=True),
    "adamw foreach amsgrad": lambda groups: torch.optim.AdamW(groups, lr=1e-2, foreach=True, amsgrad=True),
    "adamw tensor lr": lambda groups: torch.optim.AdamW(groups, lr=torch.tensor(1e-2)),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-2),
    "sgd momentum": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9, nesterov=True),
    "nadam": lambda groups: torch.optim.NAdam(groups, lr=1e-2),
    "adafactor": lambda groups: torch.optim.Adafactor(groups, lr=1e-2),
    "rprop": lambda groups: torch.optim.Rprop(groups, lr=1e-2),
    "factored": Factored,
}


def make(kind, dtype):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.Tanh(), torch.nn.Linear(12, 12), torch.nn.Linear(12, 3)).to(dtype)
    model[2].requires_grad_(False)  # as under LoRA
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1}, {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0}]
    return model, OPTIMIZERS[kind](groups)


def train(model, optimizer, steps):
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1 / (1 + s)) if steps.start == 0 else None
    for seed in steps:
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(seed)).to(next(model.parameters()).dtype)
        (model(x) - 1).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if schedule:
            schedule.step()


def everything(model, optimizer):
    states = [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return repr([model.state_dict(), states, settings])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_going_on_is_bit_exact(kind, dtype, tmp_path):
    torch.set_printoptions(profile="full", precision=20)
    try:
        model, optimizer = make(kind, dtype)
        train(model, optimizer, range(4))
        save_optimizer(optimizer, model, tmp_path)
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        again, fresh = make(kind, dtype)
        again.load_state_dict(weights)
        load_optimizer(fresh, again, tmp_path)
        assert everything(again, fresh) == everything(model, optimizer)
        for steps in (range(4, 5), range(5, 9)):
            train(model, optimizer, steps)
            train(again, fresh, steps)
            assert everything(again, fresh) == everything(model, optimizer)
    finally:
        torch.set_printoptions(profile="default")


def test_files_hold_no_pickle_and_only_trained_parameters(tmp_path):
    model, optimizer = make("adamw", torch.float32)
    train(model, optimizer, range(2))
    save_optimizer(optimizer, model, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["optimizer.json", "optimizer.safetensors"]
    text = (tmp_path / "optimizer.json").read_text()
    assert "0.weight" in text and "2.weight" not in text


def test_state_goes_by_name_not_by_order(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 4), "b": torch.nn.Linear(4, 4)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    (model["a"](torch.ones(1, 4)).sum() + 3 * model["b"](torch.ones(1, 4)).sum()).backward()
    optimizer.step()
    save_optimizer(optimizer, model, tmp_path)
    turned = torch.optim.SGD(list(model.parameters())[::-1], lr=0.1, momentum=0.9)
    load_optimizer(turned, model, tmp_path)
    for parameter in model.parameters():
        assert torch.equal(turned.state[parameter]["momentum_buffer"], optimizer.state[parameter]["momentum_buffer"])


def test_a_compiled_model_keeps_its_names(tmp_path):
    model, optimizer = make("adamw", torch.float32)
    train(model, optimizer, range(1))
    save_optimizer(optimizer, torch.compile(model), tmp_path)
    fresh = make("adamw", torch.float32)
    load_optimizer(fresh[1], fresh[0], tmp_path)
    assert len(fresh[1].state) == 4


def test_a_step_that_was_never_made(tmp_path):
    model, optimizer = make("adamw", torch.float32)
    save_optimizer(optimizer, model, tmp_path)
    other, fresh = make("adamw", torch.float32)
    train(other, fresh, range(1))
    load_optimizer(fresh, other, tmp_path)
    assert len(fresh.state) == 0


WRONG = {
    "that this run does not train: 0.bias (torch.float32 [12]), 0.weight": lambda m: (m[3], torch.optim.AdamW(m[3].parameters())),
    "no state for parameters that this run trains: 2.bias, 2.weight": lambda m: (m, torch.optim.AdamW(m.parameters())),
    "into other groups, of sizes": lambda m: (m, torch.optim.AdamW([p for n, p in m.named_parameters() if n[0] != "2"])),
    "made for another model": lambda m: (make("sgd", torch.float32)[0], torch.optim.AdamW(m.parameters())),
    "saved in another dtype for 0.bias": lambda m: (m.double(), torch.optim.AdamW([p for n, p in m.named_parameters() if n[0] != "2"])),
}


@pytest.mark.parametrize("problem", WRONG)
def test_state_of_other_parameters_is_refused(problem, tmp_path):
    model, optimizer = make("adamw", torch.float32)
    train(model, optimizer, range(1))
    save_optimizer(optimizer, model, tmp_path)
    other, fresh = WRONG[problem](make("adamw", torch.float32)[0])
    fresh.param_groups[0]["lr"] = 0.125
    with pytest.raises(FtkitError) as caught:
        load_optimizer(fresh, other, tmp_path)
    assert problem in str(caught.value) and "\n" not in str(caught.value)
    assert len(fresh.state) == 0 and fresh.param_groups[0]["lr"] == 0.125


def test_other_shapes_are_named(tmp_path):
    model, wide = torch.nn.Linear(4, 2), torch.nn.Linear(8, 2)
    save_optimizer(torch.optim.AdamW(model.parameters()), model, tmp_path)
    with pytest.raises(FtkitError, match=r"other shapes for weight \(torch.float32 \[2, 4\]\)"):
        load_optimizer(torch.optim.AdamW(wide.parameters()), wide, tmp_path)


# ---- random numbers

def draw():
    return (
        [random.random() for _ in range(3)], random.gauss(0, 1), np.random.rand(3).tolist(), np.random.standard_normal(),
        torch.rand(3).tolist(), torch.nn.functional.dropout(torch.ones(20)).tolist(),
    )


@pytest.mark.parametrize("before", range(4))
def test_random_numbers_go_on(before, tmp_path):
    for _ in range(before):  # at any place, with and without a second gaussian in store
        draw()
    save_rng(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["rng.json", "rng.safetensors"]
    expected = [draw() for _ in range(300)]
    assert load_rng(tmp_path) == []
    assert [draw() for _ in range(300)] == expected


def test_saving_does_not_draw(tmp_path):
    save_rng(tmp_path)
    expected = draw()
    load_rng(tmp_path)
    save_rng(tmp_path)
    assert draw() == expected


def test_random_numbers_in_another_process(tmp_path):
    save_rng(tmp_path)
    code = "import sys; sys.path.insert(0, sys.argv[2]); from test_checkpoint import draw, load_rng; load_rng(sys.argv[1]); print(draw())"
    output = subprocess.run([sys.executable, "-c", code, tmp_path, Path(__file__).parent], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    assert output.stdout.strip() == str(draw())


def test_a_device_that_is_not_here_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_accelerator_states", lambda: {"cuda:63": torch.zeros(16, dtype=torch.uint8)})
    save_rng(tmp_path)
    assert load_rng(tmp_path) == ["there is no cuda:63 here: its random numbers do not go on where they were"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_random_numbers_on_every_gpu(tmp_path):
    def draw_there():
        return [torch.rand(3, device=f"cuda:{i}").tolist() for i in range(torch.cuda.device_count())]

    draw_there()
    save_rng(tmp_path)
    expected = draw_there()
    assert load_rng(tmp_path) == [] and draw_there() == expected
