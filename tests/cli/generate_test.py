"""The generate command: from a file of prompts to a file of replies."""

import json
import sys

import pytest
import tiny

from gemma_scope_jax.cli import main as command
from gemma_scope_jax.models import generation, masking, placement


@pytest.fixture
def run(inputs, tmp_path, monkeypatch, tiny_gemma):
    """Runs the command on three prompts and returns the lines it wrote."""
    monkeypatch.setattr(placement, "load_gemma", lambda config: tiny_gemma)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("stars é", "bread", "a")))

    def run(*flags, out="out.jsonl"):
        given = ["generate", "--model=tiny", f"--prompts={prompts}", f"--out={tmp_path / out}", *flags]
        monkeypatch.setattr(sys, "argv", ["gemma_scope_jax", *given])
        command.run(sys.argv[1:])
        return [json.loads(line) for line in (tmp_path / out).read_text(encoding="utf-8").splitlines()]

    return run


def test_each_prompt_has_its_reply(run, tiny_gemma, capsys):
    found = run("--num_tokens=6", "--seed=3", "--rows_per_batch=2")
    words = tiny.load_tokenizer()
    prompts = [[masking.BOS, *words.encode(line["prompt"])] for line in found]
    replies = generation.generate(tiny_gemma, prompts, 6, seed=3, stop=(masking.EOS, 261), rows_per_batch=2)
    assert [line["prompt"] for line in found] == ["stars é", "bread", "a"]
    assert [line["text"] for line in found] == [generation.reply_text(words, reply) for reply in replies]
    assert any(line["text"] for line in found)
    assert f"Wrote 3 replies of {sum(map(len, replies))} tokens" in capsys.readouterr().out


def test_chat_prompts_are_turns(run, tiny_gemma):
    found = run("--num_tokens=6", "--temperature=0", "--chat", "--rows_per_batch=2")
    words = tiny.load_tokenizer()
    prompts = [generation.chat_prompt(words, line["prompt"]) for line in found]
    replies = generation.generate(
        tiny_gemma, prompts, 6, temperature=0, stop=(masking.EOS, 261), rows_per_batch=2
    )
    assert [line["text"] for line in found] == [generation.reply_text(words, reply) for reply in replies]


def test_nothing_is_overwritten_and_mistakes_are_reported_before_gemma_is_loaded(run, tmp_path, monkeypatch):
    monkeypatch.setattr(placement, "load_gemma", None)
    (tmp_path / "there.jsonl").write_text("kept")
    with pytest.raises(ValueError, match=r"there\.jsonl already exists; remove it"):
        run(out="there.jsonl")
    assert (tmp_path / "there.jsonl").read_text() == "kept"
    with pytest.raises(ValueError, match=r"there is no file .*none\.jsonl"):
        run(f"--prompts={tmp_path / 'none.jsonl'}")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="has no prompts"):
        run(f"--prompts={tmp_path / 'empty.jsonl'}")
    (tmp_path / "other.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "text": "b"}')
    with pytest.raises(ValueError, match=r'pairs\.jsonl has a "prompt" beside a "text"'):
        run(f"--prompts={tmp_path / 'pairs.jsonl'}")
    with pytest.raises(ValueError, match=r'other\.jsonl:1 is not a JSON object with a "text"'):
        run(f"--prompts={tmp_path / 'other.jsonl'}")
    assert not (tmp_path / "out.jsonl").exists()
