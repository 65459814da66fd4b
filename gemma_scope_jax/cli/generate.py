"""`generate`: has Gemma continue, or answer, the texts of a file."""

import json
import pathlib

from gemma_scope_jax import config as config_lib
from gemma_scope_jax.cli.common import say
from gemma_scope_jax.data import sources
from gemma_scope_jax.models import generation, placement, tokenizer
from gemma_scope_jax.runtime import files, locks
from gemma_scope_jax.runtime.errors import OutputError


def write_rollouts(
    config: config_lib.Config,
    prompts: pathlib.Path,
    out: pathlib.Path,
    num_tokens: int,
    temperature: float,
    seed: int,
    is_chat: bool,
    rows_per_batch: int,
) -> None:
    """Writes a JSON object `{"prompt": …, "text": …}` for each prompt, where `text` is the reply.

    Args:
      config: names the model, its weights, tokenizer and dtype.
      prompts: a file of texts; see `sources.read_prompts`.
      out: the JSON Lines file to write.
      num_tokens: the maximum number of new tokens for each prompt.
      temperature: of the sampling; see `generation.generate`.
      seed: of the sampling.
      is_chat: whether each text is a user's turn for the model to answer; otherwise the model continues the text.
      rows_per_batch: the number of prompts in one batch.

    Raises:
      ValueError: if there are no prompts, or `out` exists already.
    """
    files.check_output(out, is_folder=False)
    texts = sources.read_prompts(prompts)
    busy = f"another process is writing {out}; wait for it or stop it, or give another --out"
    with locks.locked(out.with_name(f".{out.name}.lock"), busy):
        if out.exists():  # Checked before an hour's work, not after it.
            raise OutputError(f"{out} already exists; remove it, or give another --out")
        found = tokenizer.load(config.model, config.tokenizer, config.weights)
        prompt = generation.chat_prompt if is_chat else generation.text_prompt
        gemma = placement.load_gemma(config)
        replies = generation.generate(
            gemma,
            [prompt(found, text) for text in texts],
            num_tokens,
            temperature,
            seed,
            stop=generation.stop_tokens(found),
            rows_per_batch=rows_per_batch,
        )
        with files.replacing_file(out) as partial, partial.open("w", encoding="utf-8") as lines:
            for text, reply in zip(texts, replies, strict=True):
                line = {"prompt": text, "text": generation.reply_text(found, reply)}
                lines.write(json.dumps(line, ensure_ascii=False) + "\n")
        say(f"Wrote {len(replies):,} replies of {sum(map(len, replies)):,} tokens to {out}.")
