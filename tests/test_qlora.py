"""What 02_qlora.ipynb cannot hold comfortably: packed models in runs, on disk and in trouble; what merging may cost."""
import sys

import pytest
import torch
from stopping import At, same, stop, weights

from ftkit.control import send
from ftkit.data import FtkitError, collate, encode_data
from ftkit.lora import add_lora
from ftkit.loss import loss_plan, loss_sum, plain_loss
from ftkit.models import load_model, quantization, tiny_model
from ftkit.train import Run, _base_fingerprint, _read_config

bitsandbytes = pytest.importorskip("bitsandbytes")
from ftkit.qlora import dequantize, init_loftq, weight_bytes  # noqa: E402  after the skip

WORDS = "stressed drawer lager repaid warts gums decal diaper parts regal sloops smart straw tuber".split()
RECORDS = [dict(instruction="Say it backwards.", input=word, output=word[::-1]) for word in WORDS]
OPTIONS = dict(max_steps=6, per_device_train_batch_size=3, learning_rate=3e-3, save_steps=2, eval_steps=3, seed=3, quiet=True, name="words")
IDS = torch.randint(3, 250, (3, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A tiny model on disk, so that runs can load it by its name."
    path = tmp_path_factory.mktemp("base")
    for part in tiny_model("qwen"):
        part.save_pretrained(path)
    return path


def load(folder, how="nf4", **more):
    return load_model(folder, dtype=torch.float32, device="cpu", quantize=how, **more)


def new_run(folder, root, how="nf4", **more):
    model, tokenizer = load(folder, how)
    adapted = add_lora(model, rank=4, targets="all-linear")
    return Run(adapted, tokenizer, RECORDS[:11], RECORDS[11:], root=root, **{**OPTIONS, **more})


@pytest.fixture(scope="module")
def never_stopped(folder, tmp_path_factory):
    return new_run(folder, tmp_path_factory.mktemp("whole")).fit()


def test_the_adapter_stays_float32_and_the_base_as_it_was(folder, never_stopped):
    assert {weight.dtype for weight in weights(never_stopped).values()} == {torch.float32}
    config = _read_config(never_stopped.folder)
    assert (config["method"], config["model"]["quantize"]) == ("qlora", "nf4")
    assert config["model"]["parameters"] - config["model"]["trainable"] == sum(p.numel() for p in load(folder, None)[0].parameters())
    assert _base_fingerprint(never_stopped.model) == config["model"]["base_sha256"]
    fresh = load(folder)[0]
    for name, layer in never_stopped.model.get_base_model().named_modules():
        if hasattr(layer, "base_layer"):
            assert torch.equal(layer.base_layer.weight.data, fresh.get_submodule(name).weight.data)


@pytest.mark.parametrize("options", [{}, {"optim": "adamw_8bit"}, {"optim": "paged_adamw_32bit"}, {"gradient_checkpointing": True}])
def test_a_run_goes_on_bit_for_bit(folder, tmp_path, options):
    whole = new_run(folder, tmp_path, **options).fit()
    run = new_run(folder, tmp_path, callbacks=(At(3, stop),), **options).fit()
    assert run.step == 3
    again = Run.open(run.folder, quiet=True).fit()
    assert (again.state, quantization(again.model)) == ("finished", "nf4") and same(weights(again), weights(whole))


def test_int8_goes_on_bit_for_bit(folder, tmp_path):
    whole = new_run(folder, tmp_path, "int8").fit()
    run = new_run(folder, tmp_path, "int8", callbacks=(At(3, stop),)).fit()
    again = Run.open(run.folder, quiet=True).fit()
    assert quantization(again.model) == "int8" and same(weights(again), weights(whole))


def test_steered_without_a_trace(folder, tmp_path, never_stopped):
    def ask(control):
        for action in ("pause", "sample", "evaluate", "checkpoint", "resume"):
            send(run.folder, action)
    run = new_run(folder, tmp_path, callbacks=(At(2, ask),))
    run.fit()
    assert same(weights(run), weights(never_stopped))
    answers = run.sample(RECORDS[:1], max_new_tokens=4, at="base")
    assert isinstance(answers[0], str) and run.sample(RECORDS[:1], max_new_tokens=4, at=2) is not None
    assert same(weights(run), weights(never_stopped))


def test_a_rewind_leads_to_the_same_end(folder, tmp_path, never_stopped):
    run = new_run(folder, tmp_path)
    run._script = {5: [("rewind", 2)]}
    run.start().wait()
    assert any(e["what"] == "rewind" for e in run.history) and same(weights(run), weights(never_stopped))


def test_a_process_of_its_own(folder, tmp_path, never_stopped):
    run = new_run(folder, tmp_path).start(detached=True)
    run.wait(120)
    assert run.state == "finished" and run.history[-1]["weights"] == never_stopped.history[-1]["weights"]


def test_another_packing_is_refused(folder, never_stopped):
    with pytest.raises(FtkitError, match="was trained on nf4 weights and the model given has plain ones"):
        Run.open(never_stopped.folder, load(folder, None)[0], quiet=True)


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_the_fast_loss_is_the_plain_one_or_says_why_not(folder, how):
    model, tokenizer = load(folder, how)
    adapted = add_lora(model, rank=4, targets="all-linear")
    plan = loss_plan(adapted)
    assert plan.head or plan.reason
    data = encode_data(RECORDS, tokenizer)
    batch = collate([data[i] for i in range(6)], pad_token_id=0)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    for mode in (True, False):
        adapted.train(mode)
        wanted, got = (torch.autograd.grad(loss, trained) + (loss.detach(),) for loss in (plain_loss(adapted, batch), loss_sum(adapted, batch, plan)))
        off, size = (torch.stack([t.norm() for t in tensors]).norm() for tensors in ([a - b for a, b in zip(wanted, got)], wanted))
        assert off / size < 1e-4, (how, mode, plan)


def test_a_packed_folder_is_read_as_it_is(folder, tmp_path):
    packed, tokenizer = load_model(folder, dtype=torch.bfloat16, device="cpu", quantize="nf4")
    packed.save_pretrained(tmp_path), tokenizer.save_pretrained(tmp_path)
    for how in (None, "nf4"):
        model, _ = load(tmp_path, how)
        layer = model.model.layers[0].mlp.up_proj
        assert quantization(model) == "nf4" and layer.compute_dtype == layer.weight.quant_state.dtype == torch.float32
        assert torch.equal(layer.weight.data, packed.model.layers[0].mlp.up_proj.weight.data)
    with pytest.raises(FtkitError, match="quantized on disk already"):
        load(tmp_path, "int8")


def test_what_cannot_be_quantized_says_so(folder, monkeypatch):
    with pytest.raises(FtkitError, match="quantize is 'nf3', there are nf4, int8"):
        load(folder, "nf3")
    model, tokenizer = load(folder)
    with pytest.raises(FtkitError, match="nf4 weights cannot be trained themselves"):
        Run(model, tokenizer, RECORDS, **OPTIONS)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(FtkitError, match=r"bitsandbytes is not installed: pip install 'ftkit\[qlora\]'"):
        load(folder)
    plain, tokenizer = load(folder, None)
    with pytest.raises(FtkitError, match=r"ftkit\[qlora\]"):
        Run(add_lora(plain), tokenizer, RECORDS, **{**OPTIONS, "optim": "paged_adamw_8bit"})


# ---- merging: a fine-tune of a fiftieth of the weights' size

def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits.float().log_softmax(-1)


def drift(p, q):
    return (p.exp() * (p - q)).sum(-1).mean().item()


def tuned(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += 0.01 * torch.randn(weight.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def apart(folder):
    return tuned(add_lora(load(folder)[0], rank=4, targets="all-linear"))


def test_dequantized_and_merged_it_computes_what_was_trained(folder, apart):
    reference = logits(apart)
    with apart.disable_adapter():
        size = drift(reference, logits(apart))
    before = weight_bytes(apart)
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        plain = dequantize(apart, dtype)
        assert drift(reference, logits(plain.float())) < bound * size
        assert drift(reference, logits(dequantize(apart, dtype).merge_and_unload().float())) < bound * size
    assert weight_bytes(apart) == before and torch.equal(logits(apart), reference)


def test_merged_onto_the_original_it_is_off_by_the_packing(folder, apart):
    reference, original, packed = logits(apart), logits(load(folder, None)[0]), logits(load(folder)[0])
    model = add_lora(load(folder, None)[0], rank=4, targets="all-linear")
    model.load_state_dict({name: weight for name, weight in apart.state_dict().items() if "lora_" in name}, strict=False)
    assert drift(reference, logits(model.merge_and_unload())) < 3 * drift(original, packed)


def test_merged_back_into_four_bits_most_is_lost(folder, apart, tmp_path):
    reference = logits(apart)
    with apart.disable_adapter():
        size = drift(reference, logits(apart))
    dequantize(apart).merge_and_unload().save_pretrained(tmp_path)
    tiny_model("qwen")[1].save_pretrained(tmp_path)
    back = drift(reference, logits(load(tmp_path)[0]))
    assert back > 100 * drift(reference, logits(dequantize(apart).merge_and_unload()))
    assert back > 0.2 * size


def test_loftq_begins_nearer_to_the_original(folder):
    exact, model = logits(load(folder, None)[0]), load(folder)[0]
    packed = drift(exact, logits(model))
    adapted = add_lora(model, rank=16, targets="all-linear")
    assert init_loftq(adapted) < 0.9
    assert drift(exact, logits(adapted)) < packed
    with pytest.raises(FtkitError, match="no adapter on packed layers"):
        init_loftq(add_lora(load(folder, None)[0]))
    with pytest.raises(FtkitError, match="plain LoRA"):
        init_loftq(add_lora(load(folder)[0], variant="dora"))


def test_dora_works_in_four_bits_and_is_refused_in_eight(folder):
    model = load(folder)[0]
    reference = logits(model)
    adapted = add_lora(model, rank=4, targets="all-linear", variant="dora")
    assert drift(reference, logits(adapted)) < 1e-6
    trained = logits(tuned(adapted))
    assert drift(trained, logits(dequantize(adapted).merge_and_unload())) < 1e-6
    with pytest.raises(FtkitError, match="'dora' does not work on int8"):
        add_lora(load(folder, "int8")[0], variant="dora")


def test_weights_are_counted_alike_with_and_without_adapter_and_after_use(folder):
    for how, bits in (("nf4", 4), ("int8", 8)):
        model = load(folder, how)[0]
        before = weight_bytes(model)
        adapted = add_lora(model, rank=4, targets="all-linear")
        logits(adapted)
        after = weight_bytes(adapted)
        trained = sum(p.nbytes for p in adapted.parameters() if p.requires_grad)
        assert (after.packed, after.scales, after.plain) == (before.packed, before.scales, before.plain + trained)
        linear = sum(layer.weight.numel() for name, layer in load(folder, None)[0].named_modules() if isinstance(layer, torch.nn.Linear) and name != "lm_head")
        assert before.packed == linear * bits // 8
