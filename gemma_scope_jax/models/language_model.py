"""A Gemma with its tokenizer: from text to activations and to generated text."""

import dataclasses
import functools
import numbers
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from gemma_scope_jax.models import forward, generation, masking, sites
from gemma_scope_jax.models.gemma import Gemma
from gemma_scope_jax.models.interventions import Intervention
from gemma_scope_jax.models.sites import Site
from gemma_scope_jax.models.tokenizer import Tokenizer
from gemma_scope_jax.runtime.errors import InputError


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A Gemma, or its first blocks, and its tokenizer."""

    gemma: Gemma
    tokenizer: Tokenizer

    @property
    def name(self) -> str:
        return self.gemma.name

    def tokens(self, text: str) -> list[int]:
        """Token ids of a text, BOS first.

        Raises:
          ValueError: if the text has no token.
        """
        ids = self.tokenizer.encode(text)
        if not ids:
            raise InputError("the text is empty; give at least one token")
        return [masking.BOS, *ids]

    def words(self, text: str) -> list[str]:
        """The tokens of a text, each decoded, one for each row of `activations`."""
        return [self.tokenizer.decode([token]) for token in self.tokens(text)[1:]]

    def activations(self, text: str | Sequence[int], site: Site | str) -> jax.Array:
        """A site's activations [L, D] on the tokens of a text, in float32, without the row of BOS.

        No SAE was trained on BOS, so no SAE should read its activation.

        Args:
          text: the text, or token ids with BOS first.
          site: the name of a site, such as `layer_9_resid_post`, or the `site` of an SAE.

        Raises:
          ValueError: if the text is invalid, there is no such site, or its block is not loaded.
        """
        place = sites.site_from_hook(site) if isinstance(site, str) else site
        sites.check_site(self.gemma.module, place)
        if sites.blocks_needed([place]) > self.gemma.num_layers:
            raise InputError(
                f"{place} is after the {self.gemma.num_layers} loaded blocks of {self.name}; load more blocks"
            )
        ids = self.tokens(text) if isinstance(text, str) else list(text)
        if len(ids) < 2 or not all(isinstance(token, numbers.Integral) for token in ids):
            raise InputError(
                "the text must be one string, or token ids with BOS first and at least one token after it"
            )
        # Padded to a multiple of 16, so that few programs are compiled.
        padded = ids + [masking.PAD] * (-len(ids) % 16)
        values = _read(self.gemma, jnp.asarray([padded]), place)
        return values[0, 1 : len(ids)].astype(jnp.float32)

    def generate(
        self,
        prompt: str,
        num_tokens: int = 40,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        chat: bool = False,
        write: Mapping[Site, Intervention] | None = None,
    ) -> str:
        """The model's continuation of a prompt or, with `chat`, its answer to it; see `generation.generate`."""
        ids = (generation.chat_prompt if chat else generation.text_prompt)(self.tokenizer, prompt)
        stop = generation.stop_tokens(self.tokenizer)
        (reply,) = generation.generate(self.gemma, [ids], num_tokens, temperature, seed, write, stop)
        return generation.reply_text(self.tokenizer, reply)


@functools.partial(jax.jit, static_argnames="site")
def _read(gemma: Gemma, tokens_SxL: jax.Array, site: Site) -> jax.Array:
    return forward.read_sites(gemma.gathered(), tokens_SxL, [site])[site]
