"""Exports in a real llama.cpp, from a tuned demo model; and what a notebook cannot show: a disk that takes no more, a client of the hub.

llama.cpp comes ready-built in the wheel `xllamacpp`; without it its tests are skipped. Its server listens on loopback only.
"""
import json
import shutil
import socket
import urllib.request
from pathlib import Path

import huggingface_hub
import peft
import pytest
import torch
import transformers
from tiny_tokenizers import byte_level

from ftkit.checkpoint import verify_folder
from ftkit.data import FtkitError, encode_prompt, end_of_turn_ids
from ftkit.demo import tickets
from ftkit.export import _continuations, _general_facts, _log_probs, _margin, _without_token, _write_gguf, export, push, verify_export
from ftkit.lora import add_lora
from ftkit.models import CHATML, load_model, tiny_model
from ftkit.train import Run

CONVERSATION = [{"role": "user", "content": "It's 33 or 1,234.5 €: naïve café, 東京 🙂?\n\nWhy"}]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "The demo model after four steps on tickets: enough for other answers than the base's."
    model, tokenizer = load_model("smollm2-135m", dtype=torch.float32)
    train, held_out = tickets()
    options = dict(learning_rate=3e-3, per_device_train_batch_size=4, max_steps=4, warmup_steps=0, eval_strategy="no", max_length=512)
    adapted = add_lora(model, rank=16, targets="all-linear", seed=42)
    return Run(adapted, tokenizer, train[:16], held_out[:4], root=tmp_path_factory.mktemp("runs"), quiet=True, prompts=[], **options).fit()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    model, tokenizer = tiny_model("llama")
    records = [{"instruction": q, "output": a} for q, a in zip(["one", "two"] * 4, ["a router", "a watch"] * 4)]
    options = dict(learning_rate=2e-2, per_device_train_batch_size=4, max_steps=20, eval_strategy="no", allow="held_out_in_training")
    tokenizer = bpe()
    model.resize_token_embeddings(len(tokenizer))
    return Run(add_lora(model, targets="all-linear"), tokenizer, records, records[:2], root=tmp_path_factory.mktemp("tiny"), quiet=True, prompts=[], **options).fit()


@pytest.fixture(scope="module")
def four_bit(tiny, tmp_path_factory):
    "A run of an adapter on the tiny run's result, in four bits."
    pytest.importorskip("bitsandbytes")
    tmp_path = tmp_path_factory.mktemp("packed")
    export(tiny, tmp_path / "base", numbers="f32")
    model, tokenizer = load_model(tmp_path / "base", quantize="nf4", device="cpu")
    records = [{"instruction": q, "output": a} for q, a in zip(["one", "two"] * 4, ["an app", "a vacuum"] * 4)]
    options = dict(learning_rate=2e-2, per_device_train_batch_size=4, max_steps=20, eval_strategy="no", allow="held_out_in_training")
    return Run(add_lora(model, targets="all-linear"), tokenizer, records, records[:2], root=tmp_path / "runs", quiet=True, prompts=[], **options).fit()


def bpe():
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level(marks), bos_token=marks[1], eos_token=marks[2], pad_token=marks[0], chat_template=CHATML)


class LlamaCpp:
    "llama.cpp with one model, in this process."

    def __init__(self, path: Path):
        engine = pytest.importorskip("xllamacpp")
        params = engine.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel, params.port, params.warmup = str(path), 512, 1, free_port(), False
        params.cpuparams.n_threads = 1  # more of them spin while they wait, and starve whatever else runs
        self.server = engine.Server(params)

    def ask(self, place: str, **body) -> dict:
        request = urllib.request.Request(f"{self.server.listening_address}/{place}", json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=600) as reply:
            return json.load(reply)

    def scores(self, ids: list[int], count: int = 10) -> dict[int, float]:
        "The likeliest next tokens and their log-probabilities."
        reply = self.ask("completion", prompt=ids, n_predict=1, n_probs=count, temperature=0, cache_prompt=False)
        return {token["id"]: token["logprob"] for token in reply["completion_probabilities"][0]["top_logprobs"]}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def torch_scores(model, ids: list[int]) -> torch.Tensor:
    return _log_probs(model, [{"input_ids": [*ids, 0], "labels": [-100] * len(ids) + [0]}])[0]


# ---- a real llama.cpp

@pytest.fixture(scope="module", params=["f16", "q8_0"])
def exported(run, tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("out") / request.param
    certificate = export(run, folder, "gguf", request.param)
    return request.param, next(folder.glob("*.gguf")), certificate


def test_llama_cpp_sees_the_tokens_of_the_training_and_answers_as_the_run(run, exported):
    numbers, path, certificate = exported
    llama, tokenizer, stop = LlamaCpp(path), run.tokenizer, end_of_turn_ids(run.tokenizer)
    text = tokenizer.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert llama.ask("apply-template", messages=CONVERSATION)["prompt"] == text
    assert llama.ask("tokenize", content=text, add_special=True, parse_special=True)["tokens"] == ids  # one begin token
    loose = 0.1 if numbers == "f16" else 0.5
    for record in tickets()[1][:2 if numbers == "f16" else 1]:
        prompt = encode_prompt(record, tokenizer)
        mine = _continuations(run.model, [prompt], stop, tokens=24)[0]
        reply = llama.ask("completion", prompt=prompt, n_predict=len(mine), temperature=0, return_tokens=True, cache_prompt=False)
        theirs = [token for token in reply["tokens"] if token not in stop]
        assert theirs == mine or _margin(run.model, prompt, mine, theirs, stop[0]) < loose
        wanted = torch_scores(run.model.eval(), prompt)
        assert all(abs(score - float(wanted[token])) < loose for token, score in llama.scores(prompt, 3).items())


def test_llama_cpp_ends_its_turn_in_chat(run, exported):
    llama = LlamaCpp(exported[1])
    prompt = [{"role": "user", "content": "Say hi."}]
    mine = run.tokenizer.decode(_continuations(run.model, [run.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]], end_of_turn_ids(run.tokenizer), tokens=60)[0])
    reply = llama.ask("v1/chat/completions", messages=prompt, max_tokens=60, temperature=0)["choices"][0]
    assert reply["message"]["content"][:8] == mine[:8]
    assert "<|im_" not in reply["message"]["content"]


SHAPE = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.1)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
FAMILIES = {
    "llama": lambda size: transformers.LlamaConfig(vocab_size=size, **SHAPE, tie_word_embeddings=True),
    "llama, biases": lambda size: transformers.LlamaConfig(vocab_size=size, **SHAPE, attention_bias=True, mlp_bias=True),
    "llama, linear": lambda size: transformers.LlamaConfig(vocab_size=size, **SHAPE, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}),
    "llama 3": lambda size: transformers.LlamaConfig(vocab_size=size, **SHAPE, rope_parameters=LLAMA3),
    "mistral": lambda size: transformers.MistralConfig(vocab_size=size, **SHAPE, head_dim=32, sliding_window=None),
    "qwen2": lambda size: transformers.Qwen2Config(vocab_size=size, **SHAPE, tie_word_embeddings=True),
    "qwen3": lambda size: transformers.Qwen3Config(vocab_size=size, **SHAPE, head_dim=128),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_what_torch_computes(family, tmp_path):
    tokenizer = bpe()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family](len(tokenizer) + 5), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) if parameter.ndim == 1 else 0)
    _write_gguf(model, tokenizer, tmp_path / "model.gguf", "f32", _general_facts({"base_model": family}, "f32"))
    rows = ([(step * i) % 200 + 10 for i in range(150)] for step in range(7, 60))
    shown = lambda row: (token := int(torch_scores(model, row).argmax())) > 2 and tokenizer.decode([token]).isascii()
    ids = next(row for row in rows if shown(row))  # the server tells no scores of an end token, nor of half a character
    wanted, got = torch_scores(model, ids), LlamaCpp(tmp_path / "model.gguf").scores(ids)
    assert len(got) == 10 and all(abs(score - float(wanted[token])) < 0.05 for token, score in got.items())


# ---- folders

def test_a_run_folder_and_an_adapter_folder_are_exported_as_the_run_is(run, tmp_path):
    adapter = run.save(license="apache-2.0")
    whole = export(run.folder, tmp_path / "from-run", "adapter")
    alone = export(adapter, tmp_path / "from-adapter", "adapter")
    assert whole.ok and alone.ok and abs(whole.effect - alone.effect) < 1e-4 * whole.effect


def test_an_adapter_trained_on_four_bits_is_exported_as_it_answers(four_bit, tmp_path):
    certificate = export(four_bit, tmp_path / "out", "gguf", "f16")
    assert certificate.ok and certificate.arithmetic == "float32" and certificate.kept == 1


def test_a_disk_that_takes_no_more_leaves_nothing_under_the_name(tiny, tmp_path):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for form in ("safetensors", "gguf"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
        try:
            with pytest.raises(FtkitError, match="cannot write .*; nothing that was there before is lost"):
                export(tiny, tmp_path / form, form)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert list(tmp_path.iterdir()) == []
        assert export(tiny, tmp_path / "later" / form, form).ok  # and with room it works
        assert verify_folder(tmp_path / "later" / form) == []
        shutil.rmtree(tmp_path / "later")


# ---- the hub

def test_a_dry_run_needs_no_network(tiny, tmp_path, monkeypatch):
    export(tiny, tmp_path / "out", "adapter")
    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("a dry run opened a connection"))
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *args, **kwargs: pytest.fail("a dry run called the hub"))
    listed = push(tmp_path / "out", "me/tiny")
    assert {"adapter_model.safetensors", "certificate.json", "README.md"} <= set(listed.files) and "nothing was" in repr(listed)


def test_only_what_was_listed_is_sent_and_to_a_private_repository(tiny, tmp_path, monkeypatch):
    export(tiny, tmp_path / "out", "adapter")
    (tmp_path / "out" / ".env").write_text("HF_TOKEN=hf_abcdefghijkl")
    calls = {}
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, name, **kwargs: calls.update(repository=name, **kwargs))
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", lambda self, name, files, **kwargs: calls.update(files=[file.path_in_repo for file in files]) or "https://hub/me/tiny")
    sent = push(tmp_path / "out", "me/tiny", dry_run=False)
    assert calls["private"] is True and calls["files"] == list(sent.files) == list(push(tmp_path / "out", "me/tiny").files)
    assert ".env" not in calls["files"] and "https://hub/me/tiny" in repr(sent)


def test_no_token_in_what_is_said_or_logged(tiny, tmp_path, monkeypatch, capfd, caplog):
    export(tiny, tmp_path / "out", "adapter")
    token = "hf_" + "A1b2C3d4" * 4
    monkeypatch.setenv("HF_TOKEN", token)
    caplog.set_level("DEBUG")

    def refuse(self, *args, **kwargs):
        raise RuntimeError(f"401 Client Error: headers {{'authorization': 'Bearer {token}'}}")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(FtkitError) as error:
        push(tmp_path / "out", "me/tiny", dry_run=False)
    said = "".join(map(str, (error.value, error.value.__cause__, *capfd.readouterr(), caplog.text)))
    assert token not in said and "[token]" in said and error.value.__suppress_context__


# ---- where switching the adapter off does not give the base

def pissa_run(tmp_path, **options):
    base, tokenizer = tiny_model("llama")
    tokenizer = bpe()
    base.resize_token_embeddings(len(tokenizer))
    base.save_pretrained(tmp_path / "base"), tokenizer.save_pretrained(tmp_path / "base")
    base, tokenizer = load_model(tmp_path / "base", dtype=torch.float32, device="cpu")
    records = [{"instruction": q, "output": a} for q, a in zip(["one", "two"] * 4, ["a router", "a watch"] * 4)]
    config = peft.LoraConfig(init_lora_weights="pissa", r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    options = dict(learning_rate=2e-2, per_device_train_batch_size=4, max_steps=20, eval_strategy="no", allow="held_out_in_training") | options
    return Run(peft.get_peft_model(base, config), tokenizer, records, records[:2], root=tmp_path / "runs", quiet=True, prompts=[], **options)


def test_an_untrained_pissa_adapter_has_no_effect(tmp_path):
    run = pissa_run(tmp_path, learning_rate=0.0, max_steps=1).fit()
    with pytest.raises(FtkitError, match="no effect of tuning"):
        export(run, tmp_path / "out")


def test_a_trained_pissa_adapter_is_compared_with_the_base(tmp_path):
    run = pissa_run(tmp_path).fit()
    base = load_model(tmp_path / "base", dtype=torch.float32, device="cpu")[0]
    rows = [run.data[0]]
    with run._as_of("base"):
        assert torch.allclose(_log_probs(run.model, rows), _log_probs(base, rows), atol=1e-3)
    whole, alone = export(run, tmp_path / "out", numbers="f32"), export(run, tmp_path / "adapter", "adapter")
    assert whole.ok and alone.ok and whole.drift < 1e-4 and alone.drift < 1e-4 and abs(whole.effect - alone.effect) < 1e-4
    assert export(run.save(), tmp_path / "from-folder", numbers="f32").ok


def test_a_pissa_run_without_its_first_step_says_so(tmp_path):
    run = pissa_run(tmp_path, max_steps=1, save_strategy="no").fit()
    with pytest.raises(FtkitError, match="this kind of adapter changes the weights under it"):
        run.sample([{"instruction": "one"}], at="base")


def test_a_four_bit_run_is_exported_from_its_folder_as_it_answers(four_bit, tmp_path):
    export(four_bit.save(), tmp_path / "out", numbers="f32")
    assert verify_export(four_bit, tmp_path / "out").drift < 1e-3


def test_a_token_among_the_options_is_refused_and_not_repeated(tmp_path):
    with pytest.raises(FtkitError, match="hub_token would stand") as error:
        pissa_run(tmp_path, hub_token="hf_secret")
    assert "hf_secret" not in str(error.value) and not any("hf_secret" in path.read_text(errors="replace") for path in tmp_path.rglob("config.yaml"))


# ---- what an export says and refuses

def test_no_path_of_this_machine_and_no_licence_lost(tmp_path):
    run = pissa_run(tmp_path, report_to="none", eval_strategy="steps", eval_steps=10)
    (tmp_path / "base" / "README.md").write_text("---\nlicense: other\nlicense_name: house\nlicense_link: https://a.b/c\n---\n")
    adapter = run.fit().save()
    for number, (what, form) in enumerate([(run, "safetensors"), (run, "adapter"), (adapter, "safetensors"), (run, "gguf")]):
        certificate = export(what, tmp_path / f"out-{number}", form)
        texts = {path.name: path.read_bytes() for path in (tmp_path / f"out-{number}").iterdir()}
        assert certificate.base == "base" and not [name for name, text in texts.items() if str(tmp_path).encode() in text]
        card = texts["README.md"].decode()
        assert 'license_name: "house"' in card and "## Settings" in card and "held-out loss" in card and "losses.png" in card


def test_a_run_that_kept_no_checkpoint_is_exported_from_its_result(tmp_path):
    run = pissa_run(tmp_path, save_strategy="no").fit()
    run.save()
    assert export(run.folder, tmp_path / "out").ok


@pytest.mark.parametrize("spoil", ["cut", "architecture", "config", "vocabulary"])
def test_an_export_that_cannot_be_read_is_one_line(tiny, tmp_path, spoil):
    form = "gguf" if spoil in ("cut", "architecture") else "safetensors"
    export(tiny, tmp_path / "out", form, "f32")
    target = tmp_path / "out"
    if form == "gguf":
        path = next(target.glob("*.gguf"))
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2] if spoil == "cut" else data.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0lxama", 1))
    elif spoil == "config":
        (target / "config.json").write_text("[]")
    else:
        small, _ = load_model(target, dtype=torch.float32, device="cpu")
        small.resize_token_embeddings(40)
        small.config.update(dict(pad_token_id=0, bos_token_id=1, eos_token_id=2))
        small.save_pretrained(target)
        said = str(verify_export(tiny, target).problems)
        assert "drifted by nan" in said and "it has 40 embeddings" in said
        return
    with pytest.raises(FtkitError) as error:
        verify_export(tiny, target)
    assert "\n" not in str(error.value)


def test_a_file_with_a_token_is_not_sent(tiny, tmp_path):
    export(tiny, tmp_path / "out", "adapter")
    with open(tmp_path / "out" / "README.md", "a") as card:
        card.write("| hub_token | hf_" + "A1b2C3d4" * 4)
    with pytest.raises(FtkitError, match="seems to hold an access token") as error:
        push(tmp_path / "out", "me/tiny")
    assert "A1b2" not in str(error.value)


def test_a_blank_token_takes_no_blanks_out(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "  ")
    assert _without_token("a b c") == "a b c"
