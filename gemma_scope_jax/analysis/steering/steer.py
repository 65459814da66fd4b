"""Text that Gemma writes as it is and with latents changed, side by side."""

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

NUM_TOKENS = 40  # The most that are written behind a prompt, unless another number is given.


@dataclasses.dataclass(frozen=True)
class Steered(Result):
    """What Gemma writes behind prompts as it is, and with latents changed."""

    model: str
    edits: tuple[Edit, ...]
    prompts: tuple[str, ...]
    # Each prompt's replies, as many as there are samples.
    clean: tuple[tuple[str, ...], ...]
    changed: tuple[tuple[str, ...], ...]
    temperature: float = 0.0
    seed: int = 0

    @property
    def how(self) -> str:
        """How tokens were chosen."""
        if self.temperature == 0:
            return "the likeliest tokens"
        return f"tokens drawn at temperature {self.temperature:g}, seed {self.seed}"

    @property
    def pairs(self) -> list[tuple[str, list[tuple[str, str, str]]]]:
        """Each prompt with its pairs of replies: what they begin with alike, and how each goes on."""
        return [
            (prompt, [_parted(*pair) for pair in zip(clean, changed, strict=True)])
            for prompt, clean, changed in zip(self.prompts, self.clean, self.changed, strict=True)
        ]

    def records(self) -> Iterator[dict[str, object]]:
        """A row for each pair of replies."""
        for prompt, clean, changed in zip(self.prompts, self.clean, self.changed, strict=True):
            yield from records_of({"prompt": prompt, "clean": list(clean), "changed": list(changed)})

    def show(self) -> None:
        """Prints the replies side by side, ↵ for a new line; what they begin with alike is dim."""
        for edit in self.edits:
            tables.show(printable(edit_syntax.written(edit)), "bold")
        tables.show(self.how, "dim")
        for prompt, pairs in self.pairs:
            title = rich.text.Text(lines(prompt))
            table = tables.Table(
                title=title, title_justify="left", expand=True, show_lines=True, title_style="italic"
            )
            for heading in ("as it is", "changed"):
                table.add_column(heading, ratio=1, overflow="fold")
            for replies in pairs:
                # A steered model may write nothing but new lines.
                alike, *rest = (lines(text.replace("\n", "↵")) for text in replies)
                table.add_row(*(rich.text.Text.assemble((alike, "dim"), one) for one in rest))
            tables.show(table)

    def write_html(self, path: str | pathlib.Path) -> None:
        """Writes a page of the same that needs no network."""
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
    """Has Gemma go on with prompts, once as it is and once with latents changed, by the same draws.

    Args:
      scope: the model and the SAEs.
      prompts: one or several.
      changes: of latents, in the prompts and the replies unless they say otherwise.
      num_tokens: the most that are written behind one prompt.
      temperature: 0: the likeliest token each time.
      samples: replies to each prompt.
      seed: of the draws.
      chat: a prompt is a user's turn, which the model answers.

    Raises:
      ValueError: there is no prompt or no change, an SAE or latent does not exist, or a number is out of range.
    """
    prompts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    if not prompts or not changes:
        raise InputError(f"there is no {'change' if prompts else 'prompt'}; give at least one")
    if samples < 1 or (samples > 1 and temperature == 0):
        raise InputError(
            f"samples is {samples}, temperature {temperature:g}; samples must be at least 1, and with several the "
            "temperature above 0, or they would all be the same"
        )
    if empty := [number for number, text in enumerate(prompts) if not text]:
        raise InputError(f"prompt {empty[0]} is empty; give a text of at least one token")
    as_prompt = generation.chat_prompt if chat else generation.text_prompt
    tokens = [as_prompt(scope.tokenizer, prompt) for prompt in prompts for _ in range(samples)]
    # Unchanged it is the same compiled program, with latents that keep their values: only edits make a difference.
    kept = [dataclasses.replace(edit, scale=1.0, add=0.0) for edit in changes]
    replies = []
    for made in (kept, changes):
        write = edits.writes(scope, made)
        stop = generation.stop_tokens(scope.tokenizer)
        written = generation.generate(scope.gemma, tokens, num_tokens, temperature, seed, write, stop)
        texts = [generation.reply_text(scope.tokenizer, reply) for reply in written]
        replies.append(tuple(tuple(texts[i : i + samples]) for i in range(0, len(texts), samples)))
    return Steered(scope.config.model, tuple(changes), prompts, *replies, temperature, seed)
