"""Steering: replies of Gemma with and without edits of latents, side by side."""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

import rich.console
import rich.table
import rich.text

from gemma_scope_jax.analysis.session import Scope
from gemma_scope_jax.analysis.steering import edit_syntax, edits
from gemma_scope_jax.analysis.steering.edits import Edit
from gemma_scope_jax.display import html, tables
from gemma_scope_jax.display.results import Result, records_of
from gemma_scope_jax.models import generation
from gemma_scope_jax.runtime.errors import InputError
from gemma_scope_jax.runtime.printing import lines, printable

NUM_TOKENS = 40  # The default maximum length of a reply.


@dataclasses.dataclass(frozen=True)
class Steered(Result):
    """Gemma's replies to prompts, without edits (`clean`) and with edits (`changed`)."""

    model: str
    edits: tuple[Edit, ...]
    prompts: tuple[str, ...]
    # By prompt, one reply per sample.
    clean: tuple[tuple[str, ...], ...]
    changed: tuple[tuple[str, ...], ...]
    temperature: float = 0.0
    seed: int = 0

    @property
    def how(self) -> str:
        """The decoding method."""
        if self.temperature == 0:
            return "greedy, the likeliest token each time"
        return f"tokens sampled at temperature {self.temperature:g}, seed {self.seed}"

    @property
    def pairs(self) -> list[tuple[str, list[tuple[str, str, str]]]]:
        """Each prompt with its pairs of replies, as (common start, rest of clean, rest of changed)."""
        return [
            (prompt, [_parted(*pair) for pair in zip(clean, changed, strict=True)])
            for prompt, clean, changed in zip(self.prompts, self.clean, self.changed, strict=True)
        ]

    def records(self) -> Iterator[dict[str, object]]:
        """One row per pair of replies."""
        for prompt, clean, changed in zip(self.prompts, self.clean, self.changed, strict=True):
            yield from records_of({"prompt": prompt, "clean": list(clean), "changed": list(changed)})

    def show(self) -> None:
        """Prints the replies side by side. Their common start is dim; ↵ marks a line break."""
        for edit in self.edits:
            tables.show(printable(edit_syntax.written(edit)), "bold")
        tables.show(self.how, "dim")
        for prompt, pairs in self.pairs:
            title = rich.text.Text(lines(prompt))
            table = rich.table.Table(
                title=title, title_justify="left", expand=True, show_lines=True, title_style="italic"
            )
            for heading in ("original", "edited"):
                table.add_column(heading, ratio=1, overflow="fold")
            for replies in pairs:
                # A steered model can write nothing but line breaks, so they are made visible.
                alike, *rest = (lines(text.replace("\n", "↵")) for text in replies)
                table.add_row(*(rich.text.Text.assemble((alike, "dim"), one) for one in rest))
            tables.show(table)

    def write_html(self, path: str | pathlib.Path) -> None:
        """Writes the replies to a self-contained HTML page."""
        html.render(
            pathlib.Path(path), "analysis/steering/steered.html.jinja", model=self.model, how=self.how,
            edits=[edit_syntax.written(edit) for edit in self.edits], pairs=self.pairs,
        )  # fmt: skip


def _parted(clean: str, changed: str) -> tuple[str, str, str]:
    alike = next((i for i, (a, b) in enumerate(zip(clean, changed, strict=False)) if a != b), None)
    alike = min(len(clean), len(changed)) if alike is None else alike
    return clean[:alike], clean[alike:], changed[alike:]


def steer(
    scope: Scope,
    prompts: str | Sequence[str],
    changes: Sequence[Edit],
    num_tokens: int = NUM_TOKENS,
    temperature: float = 0.0,
    samples: int = 1,
    seed: int = 0,
    chat: bool = False,
) -> Steered:
    """Generates replies to prompts twice, without and with edits of latents, with the same random numbers.

    Args:
      scope: the model and the SAEs.
      prompts: one or several texts.
      changes: the edits; they apply to prompts and replies unless their `tokens` say otherwise.
      num_tokens: the maximum length of a reply.
      temperature: the sampling temperature; 0: the likeliest token each time.
      samples: the number of replies to each prompt.
      seed: the seed for sampling.
      chat: whether a prompt is a user's turn in a chat, which the model answers.

    Raises:
      ValueError: if there is no prompt or no edit, an SAE or latent does not exist, or a number is out of range.
    """
    prompts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    if not prompts or not changes:
        raise InputError(f"there is no {'edit' if prompts else 'prompt'}; give at least one")
    if samples < 1 or (samples > 1 and temperature == 0):
        raise InputError(
            f"samples is {samples} at temperature {temperature:g}; samples must be at least 1, and more than one "
            "needs a temperature above 0, or all would be the same"
        )
    if empty := [number for number, text in enumerate(prompts) if not text]:
        raise InputError(f"prompt {empty[0]} is empty; give a text of at least one token")
    as_prompt = generation.chat_prompt if chat else generation.text_prompt
    tokens = [as_prompt(scope.tokenizer, prompt) for prompt in prompts for _ in range(samples)]
    # The clean run uses the same compiled program, with edits that keep every value, so that only the edits differ.
    kept = [dataclasses.replace(edit, scale=1.0, add=0.0) for edit in changes]
    replies = []
    for made in (kept, changes):
        write = edits.writes(scope, made)
        stop = generation.stop_tokens(scope.tokenizer)
        written = generation.generate(scope.gemma, tokens, num_tokens, temperature, seed, write, stop)
        texts = [generation.reply_text(scope.tokenizer, reply) for reply in written]
        replies.append(tuple(tuple(texts[i : i + samples]) for i in range(0, len(texts), samples)))
    return Steered(scope.config.model, tuple(changes), prompts, *replies, temperature, seed)
