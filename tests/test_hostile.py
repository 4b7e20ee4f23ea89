"""Files from strangers: every loader that ftkit has is given folders full of canaries, and none of them sings.

A canary is a pickle that makes a file when it is opened. `torch.load` and `input` are traps: nothing here may call them.
"""

import builtins
import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from ftkit.checkpoint import MANIFEST, _write_manifest, checkpoints
from ftkit.cli import main
from ftkit.control import LineReader, LineWriter, send
from ftkit.data import FtkitError, encode, load_records
from ftkit.export import export, verify_export
from ftkit.inference import load_tuned
from ftkit.live import RunView, panel
from ftkit.lora import add_lora, load_adapter
from ftkit.models import _read_gguf, load_model, tiny_model
from ftkit.replay import replay
from ftkit.train import Run, _read_config

transformers.logging.set_verbosity_error()
CPU = dict(dtype=torch.float32, device="cpu")
RECORDS = [dict(instruction="Say it.", input=word, output=word.upper()) for word in "one two three four five six".split()]
OPTIONS = dict(quiet=True, max_steps=6, per_device_train_batch_size=3, learning_rate=3e-2, eval_strategy="no", save_steps=3, prompts=[], allow="held_out_in_training")
PICKLES = ["pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_0.pth", "model.ckpt",
           "consolidated.00.pth", "tokenizer.pkl", "vocab.pkl", "vocab-file.bin", "state.pickle", "custom_checkpoint_0.pkl"]
posix_only = pytest.mark.skipif(os.name != "posix", reason="needs links and pipes")


class Canary:
    def __init__(self, path): self.path = path
    def __reduce__(self): return open, (str(self.path), "w")


@pytest.fixture(autouse=True)
def traps(monkeypatch):
    "Neither a pickle nor a question in the middle of a program."
    def trap(*args, **kwargs): raise AssertionError("torch.load or input was called")
    monkeypatch.setattr(torch, "load", trap)
    monkeypatch.setattr(builtins, "input", trap)


@pytest.fixture
def canary(tmp_path):
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


def strew(folder: Path, canary: Path):
    "Pickles under every name that a loader might look for, code and arrays of objects, into each folder below."
    for place in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        for name in PICKLES: (place / name).write_bytes(pickle.dumps(Canary(canary)))
        np.save(place / "data.npy", np.array([Canary(canary)], dtype=object), allow_pickle=True)
        for name in ("modeling_special.py", "configuration_special.py", "tokenization_special.py", "adapter.py", "ftkit.py"): (place / name).write_text(f"open({str(canary)!r}, 'w')\n")
        if (place / MANIFEST).exists():  # a stranger seals the folder anew
            (place / MANIFEST).unlink()
            _write_manifest(place)


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    "A base, a run of it with checkpoints and a result, and exports: as they come from people one trusts."
    root = tmp_path_factory.mktemp("clean")
    model, tokenizer = tiny_model()
    model.save_pretrained(root / "base"), tokenizer.save_pretrained(root / "base")
    model, tokenizer = load_model(root / "base", **CPU)
    run = Run(add_lora(model, targets="all-linear"), tokenizer, RECORDS, RECORDS[:2], name="run", root=root, **OPTIONS).fit()
    export(run, root / "merged"), export(run, root / "alone", form="adapter")
    return root


@pytest.fixture
def world(clean, tmp_path):
    "The same in a folder of its own; the base keeps its place, which the run and the adapter name."
    for name in ("run", "merged", "alone"): shutil.copytree(clean / name, tmp_path / name)
    shutil.copytree(clean / "base", tmp_path / "base")
    return tmp_path


def cli(*arguments):
    done = CliRunner().invoke(main, [*map(str, arguments)], standalone_mode=False)
    if done.exception: raise done.exception
    assert done.return_value in (None, 0), done.output


def base_of(world): return load_model(world / "base", **CPU)


def rows(world, name="rows.jsonl"):
    (world / name).write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return world / name


LOADERS = {  # all ways into ftkit for a file that somebody else has made
    "load_model": lambda w: load_model(w / "base", **CPU),
    "load_model of an export": lambda w: load_model(w / "merged", **CPU),
    "load_tuned of a run": lambda w: load_tuned(w / "run", **CPU),
    "load_tuned of an adapter": lambda w: load_tuned(w / "alone", base=w / "base", **CPU),
    "load_tuned of a checkpoint": lambda w: load_tuned(checkpoints(w / "run")[-1], base=w / "base", **CPU),
    "load_adapter": lambda w: load_adapter(base_of(w)[0], w / "alone"),
    "Run.open": lambda w: Run.open(w / "run", base_of(w)[0], max_steps=8, quiet=True).fit(),
    "branch": lambda w: Run.open(w / "run", base_of(w)[0], quiet=True).branch(3, name="other", max_steps=4).fit(),
    "replay": lambda w: replay(w / "run", base_of(w)[0], quiet=True),
    "export": lambda w: export(w / "run", w / "exported"),
    "verify_export": lambda w: verify_export(w / "run", w / "merged"),
    "panel": lambda w: panel(w / "run").close(),
    "ftkit train": lambda w: cli("train", rows(w), "--model", w / "base", "--steps", 1, "--root", w / "new", "--held-out", 0, "--dtype", "float32"),
    "ftkit resume": lambda w: cli("resume", w / "run", "--steps", 8),
    "ftkit export": lambda w: cli("export", w / "run", "--out", w / "by-hand"),
}


def test_the_canary_sings(tmp_path):
    pickle.loads(pickle.dumps(Canary(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("way", LOADERS)
def test_pickles_beside_good_weights_are_not_opened(way, world, canary):
    for name in ("base", "run", "merged", "alone"): strew(world / name, canary)
    LOADERS[way](world)


def poison(folder: Path, canary: Path):
    "Pickles in the place of the weights."
    for path in folder.rglob("*.safetensors"): path.write_bytes(pickle.dumps(Canary(canary)))
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir() and (path / MANIFEST).exists():
            (path / MANIFEST).unlink()
            _write_manifest(path)


@pytest.mark.parametrize("way", [name for name in LOADERS if name not in ("panel", "replay")])
def test_pickles_that_call_themselves_safetensors(way, world, canary):
    for name in ("base", "run", "merged", "alone"): poison(world / name, canary)
    with pytest.raises(FtkitError) as error: LOADERS[way](world)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, of", [("pytorch_model.bin", "base"), ("adapter_model.bin", "alone")])
def test_pickles_alone(name, of, world, canary):
    for path in (world / of).glob("*.safetensors"): path.unlink()
    strew(world / of, canary)
    with pytest.raises(FtkitError, match="are pickled"): (load_model(world / of, **CPU) if of == "base" else load_tuned(world / of, base=world / "base", **CPU))
    if of == "alone":
        with pytest.raises(FtkitError, match="are pickled"): load_adapter(base_of(world)[0], world / of)


def test_rows_are_text(tmp_path, canary):
    for name in ("rows.jsonl", "rows.json", "rows.npy", "rows.parquet", "rows.pkl"):
        (tmp_path / name).write_bytes(pickle.dumps(Canary(canary)))
        with pytest.raises(FtkitError): load_records(tmp_path / name)


# --- settings that name code ---


def change(path: Path, **more): path.write_text(json.dumps(json.loads(path.read_text()) | more))


CODE = {"config.json": dict(auto_map={"AutoConfig": "configuration_special.C", "AutoModelForCausalLM": "modeling_special.M"}),
        "tokenizer_config.json": dict(auto_map={"AutoTokenizer": ["tokenization_special.T", None]}),
        "generation_config.json": dict(custom_generate="stranger/code")}
ATTRIBUTES = [dict(_attn_implementation_internal="stranger/kernel"), dict(_attn_implementation="stranger/kernel:f"), dict(attn_implementation="msa|stranger/kernel@main"), dict(_experts_implementation_internal="a/b"),
              dict(attn_implementation={"": "sdpa", "text_config": "stranger/kernel"}), dict(transformers_weights="adapter_model.bin"), dict(transformers_weights="../other.safetensors"), dict(_anything="text")]


@pytest.mark.parametrize("file", CODE)
def test_code_in_a_model(file, world, canary):
    strew(world / "base", canary)
    change(world / "base" / file, **CODE[file])
    with pytest.raises(FtkitError, match=f"brings code of its own .{file}: .*trust_remote_code='[0-9a-f]{{40}}'"): base_of(world)


@pytest.mark.parametrize("odd", ATTRIBUTES, ids=str)
def test_private_attributes_of_a_model(odd, world, canary):
    strew(world / "base", canary)
    change(world / "base" / "config.json", **odd)
    with pytest.raises(FtkitError, match="brings code of its own"): base_of(world)


@pytest.mark.parametrize("way, place", [("load_tuned of an adapter", "alone"), ("load_tuned of a run", "run/adapter"), ("Run.open", "run/tokenizer"), ("verify_export", "merged")])
def test_code_of_a_tokenizer(way, place, world, canary):
    strew(world / place, canary)
    change(world / place / "tokenizer_config.json", **CODE["tokenizer_config.json"])
    with pytest.raises(FtkitError, match="brings code of its own"): LOADERS[way](world)


@pytest.mark.parametrize("odd", [dict(auto_mapping={"base_model_class": "M", "parent_library": "antigravity"}), dict(megatron_config={"a": 1}, megatron_core="antigravity"), dict(auto_map={"a": "b.c"})], ids=str)
@pytest.mark.parametrize("way", ["load_tuned of an adapter", "load_adapter", "Run.open"])
def test_code_of_an_adapter(way, odd, world, canary):
    places = [world / "alone", *checkpoints(world / "run")]
    for place in places:
        change(place / "adapter_config.json", **odd)
        (place / MANIFEST).unlink(), _write_manifest(place)
    with pytest.raises(FtkitError, match="names? code|brings code"): LOADERS[way](world)


def test_an_adapter_cannot_vouch_for_the_code_of_its_base(world, canary):
    strew(world / "base", canary)
    change(world / "base" / "config.json", **CODE["config.json"])
    change(world / "alone" / "adapter_config.json", base_model_name_or_path=str(world / "base"))
    with pytest.raises(FtkitError, match="its base .* brings code of its own"): load_tuned(world / "alone", **CPU)


def own_code(folder: Path):
    "A model of a kind that only its own code knows."
    change(folder / "config.json", model_type="special", auto_map={"AutoConfig": "special.Config", "AutoModelForCausalLM": "special.Model"})
    (folder / "special.py").write_text("from transformers import LlamaConfig, LlamaForCausalLM\nclass Config(LlamaConfig): model_type = 'special'\nclass Model(LlamaForCausalLM): config_class = Config\n")


def test_code_is_trusted_by_its_revision(world):
    own_code(world / "base")
    with pytest.raises(FtkitError) as error: base_of(world)
    revision = str(error.value).split("trust_remote_code='")[1][:40]
    assert type(load_model(world / "base", **CPU, trust_remote_code=revision)[0]).__module__.startswith("transformers_modules")
    with (world / "base" / "special.py").open("a") as file: file.write("print('changed since')\n")
    with pytest.raises(FtkitError, match="another revision"): load_model(world / "base", **CPU, trust_remote_code=revision)
    with pytest.raises(FtkitError, match="True would trust whatever comes"): load_model(world / "base", **CPU, trust_remote_code=True)
    with pytest.raises(FtkitError, match="brings code of its own"): load_model(world / "base", **CPU, trust_remote_code=False)


@posix_only
def test_code_on_the_hub(world, canary, monkeypatch):
    "The hub's cache as its client lays it out; nothing is fetched."
    commit, cache = "0f" * 20, world / "hub"
    snapshot = cache / "models--stranger--model" / "snapshots" / commit
    (snapshot.parent.parent / "blobs").mkdir(parents=True), snapshot.mkdir(parents=True), (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text(commit)
    for number, path in enumerate((world / "base").iterdir()):
        shutil.copy(path, snapshot.parent.parent / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for module in (huggingface_hub.constants, transformers.utils.hub.constants):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(cache)), monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    model, _ = load_model("stranger/model", **CPU)
    assert model.config._name_or_path == "stranger/model"
    (snapshot / "config.json").unlink(), shutil.copy(world / "base" / "config.json", snapshot / "config.json"), strew(snapshot, canary)
    change(snapshot / "config.json", **CODE["config.json"])
    with pytest.raises(FtkitError, match=f"stranger/model brings code of its own .config.json: auto_map.*{commit}"): load_model("stranger/model", **CPU)
    shutil.copy(world / "base" / "config.json", snapshot / "config.json"), (snapshot / "adapter_config.json").write_text("{}")
    with pytest.raises(FtkitError, match="holds an adapter"): load_model("stranger/model", **CPU)
    (snapshot / "adapter_config.json").unlink(), (snapshot / "model.safetensors").unlink(), (snapshot / "model.safetensors").write_bytes(struct.pack("<Q", 2**60))
    with pytest.raises(FtkitError, match="no safetensors file"): load_model("stranger/model", **CPU)


@pytest.mark.parametrize("template", ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.__class__.__init__.__globals__ }}", "{{ (''|attr('format')).__globals__ }}", "{{ cycler.__init__.__globals__.os.system('true') }}", "{% include '/etc/hostname' %}"])
def test_a_template_stays_in_its_sandbox(template, tmp_path):
    tokenizer = tiny_model()[1]
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}" + template
    with pytest.raises(FtkitError) as error: encode(RECORDS[0], tokenizer)
    assert "\n" not in str(error.value)


# --- weights that are forged, and links ---


@pytest.mark.parametrize("way, place", [("load_model", "base/model.safetensors"), ("load_tuned of an adapter", "alone/adapter_model.safetensors"), ("load_adapter", "alone/adapter_model.safetensors"), ("verify_export", "merged/model.safetensors")])
@pytest.mark.parametrize("header", [struct.pack("<Q", 2**60), struct.pack("<Q", 2**24) + b"{" * 2**24, b"", b'\x10\0\0\0\0\0\0\0{"a":{},"a":{}} '], ids=["length", "deep", "empty", "twice"])
def test_forged_headers(way, place, header, world):
    (world / place).write_bytes(header)
    with pytest.raises(FtkitError, match="no safetensors file, or its beginning is damaged"): LOADERS[way](world)


@posix_only
@pytest.mark.parametrize("way, place", [("load_model", "base/config.json"), ("load_model", "base/model.safetensors"), ("load_tuned of an adapter", "alone/adapter_model.safetensors"), ("load_tuned of a run", "run/adapter/tokenizer.json"),
                                        ("Run.open", "run/config.yaml"), ("Run.open", "run/data/train.parquet"), ("Run.open", "run/tokenizer/tokenizer.json"), ("Run.open", "run/inbox.jsonl"), ("Run.open", "run/samples"),
                                        ("replay", "run/journal.jsonl"), ("panel", "run/journal.jsonl"), ("export", "run/checkpoint-6"), ("verify_export", "merged/model.safetensors")])
def test_links_that_lead_out(way, place, world, tmp_path_factory):
    away = tmp_path_factory.mktemp("away") / "file"
    if (world / place).exists(): shutil.move(world / place, away)
    elif place.endswith("samples"): away.mkdir()
    else: away.write_text("")
    (world / place).symlink_to(away)
    with pytest.raises(FtkitError, match="is a link that leads out of its folder|is not whole|passed over"): LOADERS[way](world)


@posix_only
def test_journal_and_inbox_follow_no_link_made_later(world):
    secret, run = world / "secret", world / "run"
    secret.write_text('{"what": "note", "step": 0, "text": "secret"}\n')
    view = RunView(run)
    (run / "journal.jsonl").unlink(), (run / "journal.jsonl").symlink_to(secret)
    assert not view.poll() and not LineReader(run / "journal.jsonl").take()
    with pytest.raises(FtkitError, match="cannot open"): LineWriter(run / "journal.jsonl")
    (run / "inbox.jsonl").unlink(missing_ok=True), (run / "inbox.jsonl").symlink_to(secret)
    with pytest.raises(FtkitError, match="cannot open"): send(run, "pause")
    assert secret.read_text().count("\n") == 1


def test_an_index_that_names_other_files(world):
    weights = load_file(world / "base" / "model.safetensors")
    (world / "base" / "model.safetensors").unlink()
    save_file(weights, world / "elsewhere.safetensors", metadata={"format": "pt"})
    for name in ("../elsewhere.safetensors", str(world / "elsewhere.safetensors"), "pytorch_model.bin"):
        (world / "base" / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, name)}))
        with pytest.raises(FtkitError, match="no safetensors file beside it"): base_of(world)


GGUF = b"GGUF" + struct.pack("<I", 3)


@pytest.mark.parametrize("text", [struct.pack("<QQ", 2**60, 0), struct.pack("<QQ", 0, 2**60), struct.pack("<QQQ", 0, 1, 2**62), struct.pack("<QQQ", 0, 1, 1) + b"a" + struct.pack("<IIQ", 9, 7, 2**40),
                                  struct.pack("<QQQ", 0, 1, 17) + b"general.alignment" + struct.pack("<II", 4, 0), struct.pack("<QQQ", 1, 0, 1) + b"a" + struct.pack("<IQIQ", 1, 4, 0, 2**50),
                                  struct.pack("<QQQ", 0, 1, 1) + b"a" + struct.pack("<IIQ", 9, 9, 1) * 9], ids=["tensors", "facts", "string", "array", "alignment", "offset", "nested"])
def test_forged_gguf(text, tmp_path):
    (tmp_path / "a.gguf").write_bytes(GGUF + text + b"\0" * 64)
    with pytest.raises(FtkitError, match="is not a whole GGUF file"): _read_gguf(tmp_path / "a.gguf")


# --- a run's folder is its user's ---


@posix_only
def test_run_folders_are_private(clean):
    assert (clean / "run").stat().st_mode & 0o077 == 0


def test_a_run_of_a_stranger_is_read_as_text(world):
    config = world / "run" / "config.yaml"
    config.write_text(config.read_text() + "\nodd: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(FtkitError, match="cannot be read"): _read_config(world / "run")
