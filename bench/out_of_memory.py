"""Memory that really runs out on a GPU: `python bench/out_of_memory.py`, on a machine that has one.

A model of random weights is trained with all of the GPU, then with less and less of it, so that its memory runs out in a step
(no dry pass) or in the dry pass, and the run halves its micro-batch. The losses of each must be those of the first, to rounding.
"""
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ftkit.models import tiny_model
from ftkit.train import Run

assert torch.cuda.is_available(), "this needs a GPU"
TOKENIZER = tiny_model("llama")[1]
RECORDS = [dict(instruction="Say it backwards.", input="stressed " * (20 + n % 30), output="desserts " * (20 + n % 30)) for n in range(128)]
CONFIG = LlamaConfig(vocab_size=len(TOKENIZER), hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8, pad_token_id=TOKENIZER.pad_token_id)


def losses(gib, **more):
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).cuda()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / torch.cuda.get_device_properties(0).total_memory))
    run = Run(model, TOKENIZER, RECORDS, root=tempfile.mkdtemp(), max_steps=6, per_device_train_batch_size=32, learning_rate=1e-4, save_steps=100, on_out_of_memory="halve", max_length=1024, allow=("cut_answers", "held_out_in_training"), **more)
    run.fit()
    events, peak = run.history, torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    halved = [event["new"] for event in events if event["what"] == "control"]
    print(f"{gib:g} GiB, {more}: micro-batches {halved or 'unchanged'}, peak {peak:.2f} GiB", flush=True)
    found = [event["loss"] for event in events if event["what"] == "step"]
    run.free()
    return found


first = losses(1000, dry_pass=False)
for gib in (4, 2):
    for dry in (False, True):
        again = losses(gib, dry_pass=dry)
        assert len(again) == len(first) and all(abs(a - b) < 1e-3 for a, b in zip(first, again)), (first, again)
print("the losses are the same")
