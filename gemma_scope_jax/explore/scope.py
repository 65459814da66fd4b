"""What every look inside needs: a whole Gemma, its tokenizer, and SAEs at some of its sites."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from gemma_scope_jax import config as config_lib
from gemma_scope_jax import data, evaluation, gemma, opening, passes, sae, sharding, tokenizer


def _no_text() -> data.Rows:
    raise ValueError("these SAEs were put together without a text; open_scope opens them with one")


@dataclasses.dataclass(frozen=True)
class Scope:
    """A model with SAEs on the devices."""

    config: config_lib.Config
    mesh: jax.sharding.Mesh
    loaded: gemma.Gemma
    tokenizer: tokenizer.Tokenizer
    subjects: Mapping[str, evaluation.Subject]
    placed: Mapping[str, sae.SAE]  # the same SAEs on the devices
    # [M] by SAE, of each latent's firing on the text of the run's evaluation; of those that were evaluated.
    frequency: Mapping[str, np.ndarray]
    held_out: Callable[[], data.Rows] = _no_text  # Opens the rows that evaluations are on.

    @property
    def sites(self) -> tuple[gemma.Site, ...]:
        """The sites that SAEs read and give."""
        sites = (site for s in self.subjects.values() for site in (s.site, s.spliced))
        return tuple(dict.fromkeys(sites))


def open_scope(path: str | pathlib.Path, **overrides: str | None) -> Scope:
    """Opens the SAEs of a run or of files, with their model.

    Args:
      path: a run directory; or a path or `hf://OWNER/NAME/FOLDER` of an SAE, or of several with `*`.
      **overrides: see `opening.open_path`.
    """
    opened = opening.open_path(path, **overrides)
    config = opened.config
    mesh, loaded = opening.load_gemma(config)
    return Scope(
        config,
        mesh,
        loaded,
        tokenizer.load(config.model, config.tokenizer, config.weights),
        opened.subjects,
        {name: passes.place(mesh, subject.sae) for name, subject in opened.subjects.items()},
        _frequencies(pathlib.Path(path), opened.subjects),
        lambda: data.open_rows(opened.rows, data.HELD_OUT),
    )


def prompt(scope: Scope, text: str) -> list[int]:
    """The token ids of a text, behind BOS.

    Raises:
      ValueError: it has none.
    """
    tokens = scope.tokenizer.encode(text)
    if not tokens:
        raise ValueError("the text is empty; give one of at least one token")
    return [gemma.BOS, *tokens]


def one_token(scope: Scope, text: str) -> int:
    """The token that a text is.

    Raises:
      ValueError: it is several, or none.
    """
    tokens = scope.tokenizer.encode(text)
    if len(tokens) != 1:
        pieces = " + ".join(repr(scope.tokenizer.decode([token])) for token in tokens)
        raise ValueError(
            f"{text!r} is {len(tokens)} tokens ({pieces or 'none'}); give a text of one token, most words with the "
            "space before them"
        )
    return tokens[0]


def place_prompts(scope: Scope, prompts: Sequence[Sequence[int]]) -> jax.Array:
    """Token ids, each with its BOS, as rows [S, L] on the devices.

    They are padded behind, so that each token sees what it would see alone; and with rows of PAD alone to as many as
    the devices divide. L is a multiple of 16, so that prompts of about one length are of one shape.
    """
    length = -(-max(map(len, prompts)) // 16) * 16
    rows = -(-len(prompts) // scope.mesh.size) * scope.mesh.size
    tokens_SxL = np.full((rows, length), gemma.PAD, np.int32)
    for row_L, prompt in zip(tokens_SxL, prompts, strict=False):
        row_L[: len(prompt)] = prompt
    return jax.make_array_from_callback(
        tokens_SxL.shape, jax.NamedSharding(scope.mesh, sharding.TOKENS), lambda index: tokens_SxL[index]
    )


@functools.partial(jax.jit, static_argnames="mesh")
def is_kept(mesh: jax.sharding.Mesh, tokens_SxL: jax.Array) -> jax.Array:
    """Which positions of placed prompts count, [S, L]: all but those of BOS, EOS and PAD."""
    return sharding.constrain(mesh, gemma.is_kept(tokens_SxL, 0), sharding.TOKENS)


def _frequencies(path: pathlib.Path, names: Mapping[str, object]) -> dict[str, np.ndarray]:
    """Of an evaluation that lies beside the SAEs."""
    file = path / "evaluation.npz"
    if not file.exists():
        return {}
    with np.load(file) as arrays:
        return {name: arrays[f"{name}/frequency"] for name in names if f"{name}/frequency" in arrays.files}
