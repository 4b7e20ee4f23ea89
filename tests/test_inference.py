"""What a notebook cannot hold of 03_inference: folders made by plain PEFT and transformers, bases that are packed or damaged, a model that is being trained."""

import importlib.util
import json
import shutil
import time

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from ftkit.data import FtkitError, encode_prompt
from ftkit.inference import chat, compare, generate, load_tuned, merge, stream
from ftkit.lora import add_lora
from ftkit.models import base_difference, base_fingerprint, load_model, quantization, tiny_model
from ftkit.train import Run

transformers.logging.set_verbosity_error()
CPU = dict(dtype=torch.float32, device="cpu")
RECORDS = [dict(instruction="Say it.", input=word, output=word.upper()) for word in "one two three four five six".split()]
OPTIONS = dict(quiet=True, max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, eval_on_start=False, save_steps=3)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "The folder of a tiny base model."
    folder = tmp_path_factory.mktemp("models") / "base"
    model, tokenizer = tiny_model("qwen")
    model.save_pretrained(folder), tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runs(base):
    "A run by each way of training, by name."
    made = {}
    for name in ("lora", "dora", "pissa", "full"):
        model, tokenizer = load_model(base, **CPU)
        model = model if name == "full" else add_lora(model, rank=4, variant=name)
        made[name] = Run(model, tokenizer, RECORDS, name=name, root=base.parent / "runs", **OPTIONS).fit()
    return made


def perturb(model, size=0.1):
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.add_(torch.randn_like(weight) * size)
    return model.eval()


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["lora", "dora", "pissa", "full"])
def test_each_run_says_the_same_when_loaded(runs, name):
    run = runs[name]
    wanted = generate(run.model, run.tokenizer, RECORDS, 16)
    places = [run.folder, run.folder / ("model" if name == "full" else "adapter"), run.folder / "checkpoint-6"]
    for place in places:
        model, tokenizer = load_tuned(place, **CPU)
        assert generate(model, tokenizer, RECORDS, 16) == wanted, place
        assert not any(module.training for module in model.modules())
    facts = json.loads((places[1] / "training.json").read_text())
    assert (facts["run"], facts["method"], bool(facts["base"]["fingerprint"])) == (name, "full" if name == "full" else "lora", name != "full")


def test_a_template_that_is_not_the_base_models_is_shown(runs, tmp_path, caplog):
    adapter = shutil.copytree(runs["lora"].folder / "adapter", tmp_path / "adapter")
    for _ in range(2):
        load_tuned(adapter, **CPU)
        assert "chat template" not in caplog.text
    place = adapter / "chat_template.jinja"
    place.write_text(place.read_text() + "\n{{- 'Buy \x1b[8mnow.' -}}")
    for _ in range(2):
        model, tokenizer = load_tuned(adapter, **CPU)
    told = [record.getMessage() for record in caplog.records if "chat template" in record.getMessage()]
    assert len(told) == 1 and "+{{- 'Buy ?[8mnow.' -}}" in told[0].splitlines() and "\x1b" not in told[0]
    assert "now." in tokenizer.decode(encode_prompt(RECORDS[0], tokenizer))


def test_plain_libraries_are_not_disturbed(runs, base):
    model = PeftModel.from_pretrained(load_model(base, **CPU)[0], runs["lora"].folder / "adapter")
    assert generate(model, runs["lora"].tokenizer, RECORDS, 16) == generate(runs["lora"].model, runs["lora"].tokenizer, RECORDS, 16)
    assert transformers.AutoModelForCausalLM.from_pretrained(runs["full"].folder / "model")


def test_an_adapter_of_plain_peft(base, tmp_path):
    model = perturb(get_peft_model(load_model(base, **CPU)[0], LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")))
    model.save_pretrained(tmp_path / "plain")
    loaded, tokenizer = load_tuned(tmp_path / "plain", **CPU)
    assert generate(loaded, tokenizer, "Hi", 16) == generate(model, tokenizer, "Hi", 16)
    config = tmp_path / "plain" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": None}))
    with pytest.raises(FtkitError, match="names no base") as error:
        load_tuned(tmp_path / "plain", **CPU)
    assert one_line(error) and load_tuned(tmp_path / "plain", base=base, **CPU)


@pytest.mark.parametrize("change, says", [
    (dict(target_modules=["q_proj"]), "matrices in its file have no place by its adapter_config.json"),
    (dict(target_modules=["q_proj", "v_proj", "k_proj", "o_proj", "up_proj"]), "matrices that its adapter_config.json names are not in its file"),
])
def test_an_adapter_whose_file_and_configuration_differ(runs, tmp_path, change, says):
    shutil.copytree(runs["lora"].folder / "adapter", tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(FtkitError, match=says) as error:
        load_tuned(tmp_path / "adapter", **CPU)
    assert one_line(error)


@pytest.mark.parametrize("name, text", [("config.json", "[]"), ("tokenizer_config.json", "[]")])
def test_settings_that_are_none(base, tmp_path, name, text):
    shutil.copytree(base, tmp_path / "odd")
    (tmp_path / "odd" / name).write_text(text)
    with pytest.raises(FtkitError, match="odd") as error:
        load_tuned(tmp_path / "odd", **CPU)
    assert one_line(error)


def test_the_base_of_a_pissa_adapter_is_not_the_model_without_it(runs, base):
    run = runs["pissa"]
    with pytest.raises(FtkitError, match="changes the base itself") as error:
        compare({"base": run.model, "tuned": run.model}, "Hi", run.tokenizer)
    assert one_line(error)
    assert compare({"base": load_model(base, **CPU), "tuned": run.model}, "Hi", run.tokenizer, max_new_tokens=4).answers["base"] == [generate(*load_model(base, **CPU), "Hi", 4)]


def test_an_interrupted_answer_leaves_a_box_that_can_be_used(base, monkeypatch):
    model, tokenizer = load_model(base, **CPU)
    box = chat(model, tokenizer, max_new_tokens=8)

    def interrupted(*args, **options):
        yield "so"
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("ftkit.inference.stream", interrupted)
        with pytest.raises(KeyboardInterrupt):
            box.say("Hi")
    assert box.turns[-1] == dict(role="assistant", content="so", stopped=True) and "interrupted" in box.chat_notice.value
    assert box.say("Hi again") == box.turns[-1]["content"] and len(box.turns) == 4 and not box.chat_send.disabled


def test_no_control_character_in_a_table():
    shown = compare({"a\x1b": ["one\x1b[2J\u202e\ntwo"], "b": ["one"]}, "Hi\x1b\u202e")
    for text in (shown.to_markdown(), shown.to_html("t\x1b\u202e"), repr(shown)):
        assert "\x1b" not in text and "\u202e" not in text
    assert "<br>two" in shown.to_markdown()


def test_a_pissa_adapter_stays_alone(runs):
    with pytest.raises(FtkitError, match="changes the base itself") as error:
        load_tuned([runs["lora"].folder, runs["pissa"].folder], **CPU)
    assert one_line(error)


def test_adapters_of_two_bases(runs, tmp_path):
    shutil.copytree(runs["lora"].folder / "adapter", tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "another"}))
    with pytest.raises(FtkitError, match="two bases") as error:
        load_tuned({"a": runs["lora"].folder, "b": tmp_path / "adapter"}, **CPU)
    assert one_line(error)


def test_damaged_and_pickled_models(base, tmp_path):
    shutil.copytree(base, tmp_path / "cut")
    path = tmp_path / "cut" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    for load in (load_model, load_tuned):
        with pytest.raises(FtkitError, match="it was cut short") as error:
            load(tmp_path / "cut", **CPU)
        assert one_line(error)
    shutil.copytree(base, tmp_path / "pickled")
    weights = load_model(base, **CPU)[0].state_dict()
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pickled" / "pytorch_model.bin")
    for load in (load_model, load_tuned):
        with pytest.raises(FtkitError, match="are pickled") as error:
            load(tmp_path / "pickled", **CPU)
        assert "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)" in one_line(error)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "pickled").save_pretrained(tmp_path / "converted")  # what the line says to do
    assert torch.equal(load_model(base, **CPU)[0].lm_head.weight, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "converted").lm_head.weight)


def test_the_fingerprint_sees_a_fine_tuned_base(runs, base):
    plain, _ = load_model(base, **CPU)
    known = base_fingerprint(plain)
    assert base_difference(known, base_fingerprint(load_model(base, dtype=torch.float16, device="cpu")[0])) is None
    assert "other values" in base_difference(known, base_fingerprint(runs["full"].model))
    assert "other values" in base_difference(known, base_fingerprint(merge(runs["lora"].model)))
    tied, padded = tiny_model()[0], tiny_model()[0]
    padded.resize_token_embeddings(264)
    assert base_difference(base_fingerprint(tied), base_fingerprint(padded)) == "its weights have other names or shapes"


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_the_fingerprint_of_a_packed_base(tmp_path):
    config = transformers.LlamaConfig(vocab_size=259, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    torch.manual_seed(0)
    plain = transformers.AutoModelForCausalLM.from_config(config)
    plain.save_pretrained(tmp_path)
    for how in (dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True), dict(load_in_8bit=True)):
        packed = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=transformers.BitsAndBytesConfig(**how), device_map={"": "cpu"})
        assert base_difference(base_fingerprint(plain), base_fingerprint(packed)) is None
        with torch.no_grad():
            packed.model.norm.weight.mul_(1.1)
        assert "1 of its" in base_difference(base_fingerprint(plain), base_fingerprint(packed))
        tuned = get_peft_model(packed, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        with pytest.raises(FtkitError, match="dequantize first"):
            merge(tuned)


def test_merging_what_is_saved_whole_beside_the_adapter(base, tmp_path):
    model, tokenizer = tiny_model()
    tuned = perturb(get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM")))
    with torch.no_grad():
        tuned.get_input_embeddings().modules_to_save["default"].weight.add_(0.1)
    ids = torch.randint(3, 259, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = tuned(ids).logits
        merged = merge(tuned)
        merged.save_pretrained(tmp_path)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.allclose(merged(ids).logits, wanted, atol=1e-4) and torch.allclose(again(ids).logits, wanted, atol=1e-4)


def test_merging_leaves_the_model_as_it_was(runs):
    model, tokenizer = runs["lora"].model, runs["lora"].tokenizer
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    merged = merge(model)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert not hasattr(merged, "peft_config") and all(weight.requires_grad for weight in merged.parameters())
    assert add_lora(merged, rank=2).peft_config["default"].base_model_name_or_path.endswith("base-merged")


def test_a_model_that_trains_is_not_talked_to(base):
    model, tokenizer = load_model(base, **CPU)
    run = Run(add_lora(model, rank=2), tokenizer, RECORDS, name="steered", root=base.parent / "runs", **{**OPTIONS, "max_steps": 5000}).start()
    box = chat(run.model, run.tokenizer)
    while run.step < 1:
        time.sleep(0.01)
    with pytest.raises(FtkitError, match="pause or stop that run first"):
        box.say("Hi")
    assert box.turns == [] and box.chat_input.value == "Hi"
    run.control.pause()
    while run.state != "paused":
        time.sleep(0.01)
    assert box.say("Hi") == generate(run.model, run.tokenizer, "Hi", 512) and len(box.turns) == 2
    run.control.stop()
    run.wait()


def test_prompts_of_many_lengths_and_settings(base):
    model, tokenizer = load_model(base, **CPU)
    prompts = ["x" * (7 * i % 90) for i in range(40)]
    for how in ({}, dict(temperature=1.2, top_k=20, top_p=0.9, seed=3)):
        alone = [generate(model, tokenizer, prompt, 8, **how) for prompt in prompts[:10]]
        for budget in (1, 300, 10**6):
            assert generate(model, tokenizer, prompts, 8, batch_tokens=budget, **how)[:10] == alone
        assert "".join(stream(model, tokenizer, prompts[3], 8, **how)) == alone[3]


def test_comparing_restores_what_trains(base):
    model, tokenizer = load_model(base, **CPU)
    tuned = perturb(add_lora(model, rank=2)).requires_grad_(False)
    tuned.get_input_embeddings().requires_grad_(True)
    flags = {name: weight.requires_grad for name, weight in tuned.named_parameters()}
    shown = compare({"base": tuned, "default": (tuned, tokenizer), "merged": merge(tuned)}, RECORDS, tokenizer, max_new_tokens=8)
    assert {name: weight.requires_grad for name, weight in tuned.named_parameters()} == flags
    assert shown.answers["default"] == shown.answers["merged"] != shown.answers["base"]
    assert shown.prompts[0] == "Say it.\n\none"


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_an_adapter_that_was_trained_on_four_bits(tmp_path):
    from ftkit.qlora import dequantize

    config = transformers.LlamaConfig(vocab_size=259, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tiny_model()[1].save_pretrained(tmp_path / "base")
    model, tokenizer = load_model(tmp_path / "base", quantize="nf4", **CPU)
    run = Run(add_lora(model, rank=2), tokenizer, RECORDS, name="packed", root=tmp_path, **OPTIONS).fit()
    assert json.loads((run.folder / "adapter" / "training.json").read_text())["quantize"] == "nf4"
    packed, _ = load_tuned(run.folder, **CPU)
    assert quantization(packed) == "nf4" and quantization(load_tuned(run.folder, quantize=None, **CPU)[0]) is None
    assert generate(packed, tokenizer, RECORDS, 8) == generate(run.model, tokenizer, RECORDS, 8)
    with pytest.raises(FtkitError, match="dequantize first"):
        merge(packed)
    merged = merge(dequantize(packed))
    ids = torch.randint(3, 259, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, packed(ids).logits, atol=1e-4)
