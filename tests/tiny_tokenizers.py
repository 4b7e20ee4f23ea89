"""Tiny tokenizers of each family of chat models, made on the spot: byte-level BPE with the family's marks and its template."""
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(__file__).parent / "templates"
CORPUS = ["user assistant model system What is the capital of France? The capital is Paris. Today Date: 26 Jul 2024 ]{ ]{ ]{ think\n\n"] * 3
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# name: marks, begin token, end-of-text token, end-of-turn token, whether the template takes a system turn
FAMILIES = {
    "smollm2": (CHATML, "<|im_start|>", "<|im_end|>", "<|im_end|>", True),
    "llama3": (["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", True),
    "qwen3": ([*CHATML, "<think>", "</think>"], None, "<|endoftext|>", "<|im_end|>", True),
    "mistral": (["<s>", "</s>"], "<s>", "</s>", "</s>", False),
    "mistral_v3": (["<s>", "</s>", "[INST]", "[/INST]"], "<s>", "</s>", "</s>", True),
    "gemma": (["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "\n", "\n\n"], "<bos>", "<eos>", "<end_of_turn>", False),
    "phi3": (["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"], None, "<|endoftext|>", "<|end|>", True),
}


def byte_level(marks: list[str], split_newlines: bool = False) -> Tokenizer:
    "Byte-level BPE with a few merges; `marks` are the added tokens. Phi-3's swallow the white space behind them, as the real ones do."
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    swallow = "<|end|>" in marks
    tokenizer.add_tokens([
        AddedToken(mark, special=not mark.isspace() and "think" not in mark, rstrip=swallow and mark != "<|endoftext|>", normalized=False)
        for mark in marks
    ])
    return tokenizer


def family(name: str, pad_is_end: bool = True) -> PreTrainedTokenizerFast:
    "The tiny tokenizer of a family; pad is its end-of-turn token unless told otherwise."
    marks, begin, end_of_text, end_of_turn, _ = FAMILIES[name]
    marks = marks if pad_is_end else [*marks, "<|pad|>"]
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level(marks), bos_token=begin, eos_token=end_of_text,
        pad_token=end_of_turn if pad_is_end else "<|pad|>", chat_template=(TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"),
    )
