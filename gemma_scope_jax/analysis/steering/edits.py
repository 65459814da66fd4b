"""Edits of single latents, applied during Gemma's forward pass.

The reconstruction error of an SAE is kept: when latents f are replaced by f', an activation y becomes
y + (f' − f) W_dec. Latents that keep their values therefore change nothing.

Shapes: S rows, L tokens, K edited latents, D and O widths of an SAE's input and output sites.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.analysis.session import Scope
from gemma_scope_jax.models import interventions, masking
from gemma_scope_jax.models.sites import Site
from gemma_scope_jax.runtime import ranges
from gemma_scope_jax.runtime.errors import InputError
from gemma_scope_jax.runtime.printing import quoted
from gemma_scope_jax.saes import jumprelu

# The tokens that an edit applies to. A range counts from 0, the first token after BOS, and continues into the reply.
Tokens = Literal["all", "prompt", "reply"] | range
_END = np.iinfo(np.int32).max


@dataclasses.dataclass(frozen=True)
class Edit:
    """Replaces the activation f of a latent by scale · f + add, except at BOS, EOS and PAD."""

    sae: str  # its name in the scope
    latent: int
    scale: float = 1.0
    add: float = 0.0  # in units of the activation
    tokens: Tokens = "all"


def ablate(sae: str, latent: int, tokens: Tokens = "all") -> Edit:
    """An edit that sets the latent's activation to 0."""
    return Edit(sae, latent, 0.0, 0.0, tokens)


def clamp(sae: str, latent: int, value: float, tokens: Tokens = "all") -> Edit:
    """An edit that sets the latent's activation to `value`."""
    return Edit(sae, latent, 0.0, value, tokens)


def scale(sae: str, latent: int, by: float, tokens: Tokens = "all") -> Edit:
    """An edit that multiplies the latent's activation by `by`."""
    return Edit(sae, latent, by, 0.0, tokens)


def add(sae: str, latent: int, value: float, tokens: Tokens = "all") -> Edit:
    """An edit that adds `value` to the latent's activation, also where the activation is 0."""
    return Edit(sae, latent, 1.0, value, tokens)


class EditArrays(NamedTuple):
    """The edits of one SAE as arrays. Edits of the same number of latents share a compiled program."""

    W_enc_DxK: np.ndarray
    b_enc_K: np.ndarray
    threshold_K: np.ndarray
    W_dec_KxO: np.ndarray
    # By row, or [1, K] for all rows.
    scale_SxK: np.ndarray
    add_SxK: np.ndarray
    # The first position and the one after the last, where BOS is 0; and whether prompts and replies are edited.
    first_K: np.ndarray
    last_K: np.ndarray
    in_prompt_K: np.ndarray
    in_reply_K: np.ndarray


def stack_edits(
    subject: jumprelu.SAE,
    latents_K: Sequence[int],
    scale_SxK: np.ndarray,
    add_SxK: np.ndarray,
    tokens: Sequence[Tokens] | None = None,
) -> EditArrays:
    """The edits of one SAE as arrays; scale and add can differ by row.

    Args:
      subject: the SAE.
      latents_K: the edited latents.
      scale_SxK: the factor of each activation.
      add_SxK: the value added to each activation.
      tokens: the tokens that each latent is edited at; None: all.

    Raises:
      ValueError: if `tokens` contains a value other than those of `Tokens`.
    """
    latents_K = np.asarray(latents_K)
    spans = [_span(of) for of in tokens or ["all"] * len(latents_K)]
    first_K, last_K, in_prompt_K, in_reply_K = (np.array(column) for column in zip(*spans, strict=True))
    return EditArrays(
        W_enc_DxK=np.asarray(subject.W_enc)[:, latents_K],
        b_enc_K=np.asarray(subject.b_enc)[latents_K],
        threshold_K=np.asarray(subject.threshold)[latents_K],
        W_dec_KxO=np.asarray(subject.W_dec)[latents_K],
        scale_SxK=np.asarray(scale_SxK, np.float32),
        add_SxK=np.asarray(add_SxK, np.float32),
        first_K=first_K.astype(np.int32),
        last_K=last_K.astype(np.int32),
        in_prompt_K=in_prompt_K,
        in_reply_K=in_reply_K,
    )


def from_token(first: int) -> range:
    """The range of all tokens from `first` on, in prompts and replies."""
    return range(first, int(_END) - 1)


def _span(tokens: Tokens) -> tuple[int, int, bool, bool]:
    """The first position, the one after the last, whether prompts are edited, whether replies are."""
    if isinstance(tokens, range):
        if tokens.step != 1 or tokens.start < 0:
            raise InputError(
                f"the tokens of an edit are {tokens}; give a range with step 1 and a start of 0 or more"
            )
        if not tokens or tokens.stop >= _END:
            raise InputError(
                f"the tokens of an edit are {tokens.start}:{ranges.shown(tokens.stop)}; the end, which is "
                f"excluded, must be {tokens.start + 1:,} to {_END - 1:,}"
            )
        return tokens.start + 1, tokens.stop + 1, True, True
    spans = {"all": (True, True), "prompt": (True, False), "reply": (False, True)}
    if tokens not in spans:
        raise InputError(
            f"the tokens of an edit are {quoted(tokens)}; give a range or one of {', '.join(spans)}"
        )
    return 1, _END, *spans[tokens]


def writes(scope: Scope, edits: Sequence[Edit]) -> dict[Site, jax.tree_util.Partial]:
    """Converts edits to interventions for `generation.generate` and `passes.written`, the same for all rows.

    Raises:
      ValueError: if an SAE or latent does not exist, a latent is edited twice, or a number is out of range.
    """
    by_sae: dict[str, list[Edit]] = {}
    for edit in edits:
        scope.check_latent(edit.sae, edit.latent)
        check_change(edit)
        by_sae.setdefault(edit.sae, []).append(edit)
    made = {}
    for name, some in by_sae.items():
        latents = [edit.latent for edit in some]
        if twice := {latent for latent in latents if latents.count(latent) > 1}:
            raise InputError(f"latent {min(twice)} of {name} is edited twice; combine the two edits into one")
        made[name] = stack_edits(
            scope.subjects[name].sae,
            latents,
            np.array([[edit.scale for edit in some]]),
            np.array([[edit.add for edit in some]]),
            [edit.tokens for edit in some],
        )
    return writes_of_saes(scope, made)


def check_change(edit: Edit) -> None:
    """Raises ValueError if the scale, the added value or the tokens of an edit are out of range."""
    ranges.check("the scale of an edit", edit.scale, ranges.SIGNED)
    ranges.check("the added value of an edit", edit.add, ranges.SIGNED)
    _span(edit.tokens)


def writes_of_saes(scope: Scope, edits: Mapping[str, EditArrays]) -> dict[Site, jax.tree_util.Partial]:
    """Converts the edits of each SAE to interventions by site; see `writes`."""
    of_site: dict[Site, list[tuple[Site, EditArrays]]] = {}
    for name, of in edits.items():
        subject = scope.subjects[name]
        of_site.setdefault(subject.spliced, []).append((subject.site, of))
    # Writes the input site of a transcoder unchanged, so that its value is available at the target site.
    write = {read: jax.tree_util.Partial(_unchanged) for some in of_site.values() for read, _ in some}
    for site, some in of_site.items():
        reads, of = zip(*some, strict=True)
        write[site] = jax.tree_util.Partial(_changed(site, reads), of)
    return write


def _unchanged(x_SxLxD: jax.Array, where: interventions.Where) -> jax.Array:
    del where
    return x_SxLxD


# Cached, because JAX reuses a compiled program only for the same function object.
@functools.cache
def _changed(site: Site, reads: tuple[Site, ...]) -> Callable[..., jax.Array]:
    def change(edits: tuple[EditArrays, ...], y_SxLxO: jax.Array, where: interventions.Where) -> jax.Array:
        changed_SxLxO = y_SxLxO.astype(jnp.float32)
        for read, of in zip(reads, edits, strict=True):
            x_SxLxD = y_SxLxO if read == site else where.passed[read]
            changed_SxLxO += _difference(of, x_SxLxD.astype(jnp.float32), where)
        return changed_SxLxO.astype(y_SxLxO.dtype)

    return change


def _difference(edits: EditArrays, x_SxLxD: jax.Array, where: interventions.Where) -> jax.Array:
    """(f' − f) W_dec, [S, L, O]."""
    highest = jax.lax.Precision.HIGHEST
    pre_SxLxK = jnp.matmul(x_SxLxD, edits.W_enc_DxK, precision=highest) + edits.b_enc_K[None, None]
    f_SxLxK = jnp.where(pre_SxLxK > edits.threshold_K[None, None], jax.nn.relu(pre_SxLxK), 0)
    positions_SxLx1 = where.positions_SxL[..., None]
    is_within_SxLxK = (positions_SxLx1 >= edits.first_K[None, None]) & (
        positions_SxLx1 < edits.last_K[None, None]
    )
    is_meant_SxLxK = jnp.where(
        where.is_prompt_SxL[..., None], edits.in_prompt_K[None, None], edits.in_reply_K[None, None]
    )
    is_special_SxLx1 = masking.is_special(where.tokens_SxL)[..., None]
    new_SxLxK = edits.scale_SxK[:, None] * f_SxLxK + edits.add_SxK[:, None]
    change_SxLxK = jnp.where(is_within_SxLxK & is_meant_SxLxK & ~is_special_SxLx1, new_SxLxK - f_SxLxK, 0)
    return jnp.matmul(change_SxLxK, edits.W_dec_KxO, precision=highest)
