"""`ftkit demo`, whole but small: the real model, one step, a few messages, answers cut short."""
import json

import pytest
import torch

from ftkit import demo


@pytest.fixture
def small(monkeypatch):
    train, held_out = demo.tickets()
    monkeypatch.setattr(demo, "tickets", lambda: (train[:8], held_out[:4]))
    monkeypatch.setattr(demo, "LONGEST_ANSWER", 4)


def test_the_demo_leaves_what_it_says(small, tmp_path, capsys):
    facts = demo.run_demo(steps=1, out=tmp_path)
    folder = facts["folder"]
    assert folder == tmp_path / "demo" and facts["run"].state == "finished"
    for name in ("losses.png", "answers.jsonl", "scores.json", "config.yaml", "journal.jsonl", "adapter/adapter_model.safetensors"):
        assert (folder / name).stat().st_size > 0, name
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text().split("\n") if line]
    assert len(lines) == 4 and all(set(line) == {"message", "ticket", "base", "tuned"} for line in lines)
    assert "answers that parse as JSON" in capsys.readouterr().out
    card = (folder / "adapter" / "README.md").read_text()
    assert "Scores" in card and "smollm2-135m" in card

    import peft

    from ftkit.checkpoint import verify_folder
    from ftkit.models import load_model
    assert verify_folder(folder / "adapter") == []
    model, tokenizer = load_model("smollm2-135m", dtype=next(facts["run"].model.parameters()).dtype)
    loaded = peft.PeftModel.from_pretrained(model, folder / "adapter")
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    facts["run"].model.eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, facts["run"].model(input_ids=ids).logits)
