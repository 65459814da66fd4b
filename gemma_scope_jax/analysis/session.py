"""The inputs of every analysis: a whole Gemma, its tokenizer, and SAEs at some of its sites."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax import config as config_lib
from gemma_scope_jax.data import token_rows
from gemma_scope_jax.evaluation import opening
from gemma_scope_jax.models import masking, placement, tokenizer
from gemma_scope_jax.models.gemma import Gemma
from gemma_scope_jax.models.language_model import LanguageModel
from gemma_scope_jax.models.sites import Site
from gemma_scope_jax.runtime import files, sharding
from gemma_scope_jax.runtime.errors import InputError
from gemma_scope_jax.runtime.printing import quoted
from gemma_scope_jax.saes import attached, jumprelu

RUNNING = "Compiling and running Gemma on the prompt …"  # What analyses say before their first pass.


def _no_text() -> token_rows.Rows:
    raise InputError("this scope has no held-out text; open the SAEs with open_scope")


@dataclasses.dataclass(frozen=True)
class Scope:
    """A model and SAEs on the devices."""

    config: config_lib.Config
    gemma: Gemma
    tokenizer: tokenizer.Tokenizer
    subjects: Mapping[str, attached.Subject]
    placed: Mapping[str, jumprelu.SAE]  # the same SAEs on the devices
    # By SAE: how often each latent fires [M] on the text of the run's evaluation. Only evaluated SAEs are in it.
    frequency: Mapping[str, np.ndarray]
    held_out: Callable[[], token_rows.Rows] = _no_text  # Opens the rows that evaluations use.

    def __post_init__(self) -> None:
        # In a top-k SAE, whether a latent fires depends on all others, which most analyses do not take into account.
        if of_top_k := [name for name, subject in self.subjects.items() if subject.top_k is not None]:
            raise InputError(
                f"{of_top_k[0]} keeps the {self.subjects[of_top_k[0]].top_k} strongest latents of each "
                "activation; analyses support only SAEs with thresholds"
            )

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites that the SAEs read and reconstruct."""
        sites = (site for s in self.subjects.values() for site in (s.site, s.spliced))
        return tuple(dict.fromkeys(sites))

    def check_latent(self, name: str, latent: int) -> None:
        """Raises ValueError if the scope has no such SAE or the SAE no such latent."""
        if name not in self.subjects:
            raise InputError(f"there is no SAE {quoted(name)}; choose from {', '.join(self.subjects)}")
        width = len(self.subjects[name].sae.b_enc)
        if not 0 <= latent < width:
            raise InputError(f"{name} has no latent {latent}; its latents are 0 to {width - 1}")


def open_scope(path: str | pathlib.Path, **overrides: str | None) -> Scope:
    """Opens the SAEs of a run or of files, with their model.

    Args:
      path: a run directory; or a path or `hf://OWNER/NAME/FOLDER` of an SAE, or of several SAEs with `*`.
      **overrides: options of the model and the text; see `opening.open_path`.
    """
    return open_session(opening.open_path(path, **overrides))


def open_session(opened: opening.Opened, model: LanguageModel | None = None) -> Scope:
    """A scope of opened SAEs, with the loaded model; if `model` is None, loads the model."""
    config = opened.config
    gemma = model.gemma if model else placement.load_gemma(config)
    return Scope(
        config,
        gemma,
        model.tokenizer if model else tokenizer.load(config.model, config.tokenizer, config.weights),
        opened.subjects,
        {name: attached.place(gemma.mesh, subject.sae) for name, subject in opened.subjects.items()},
        _frequencies(files.expanded(opened.location), opened.subjects),
        lambda: token_rows.open_rows(opened.rows, token_rows.HELD_OUT),
    )


def prompt(scope: Scope, text: str) -> list[int]:
    """BOS and the token ids of a text.

    Raises:
      ValueError: if the text has no tokens.
    """
    tokens = scope.tokenizer.encode(text)
    if not tokens:
        raise InputError("the text is empty; give a text of at least one token")
    return [masking.BOS, *tokens]


def one_token(scope: Scope, text: str) -> int:
    """The id of the one token of a text.

    Raises:
      ValueError: if the text is not exactly one token.
    """
    tokens = scope.tokenizer.encode(text)
    if len(tokens) != 1:
        pieces = " + ".join(repr(scope.tokenizer.decode([token])) for token in tokens)
        raise InputError(
            f"{text!r} is {len(tokens)} tokens ({pieces or 'none'}); give a text of one token (most words "
            "need the space before them)"
        )
    return tokens[0]


def only(scope: Scope, name: str) -> Scope:
    """A scope that has only the SAE with this name.

    Raises:
      ValueError: if there is no SAE with this name.
    """
    if name not in scope.subjects:
        raise InputError(f"there is no SAE {name!r}; choose from {', '.join(scope.subjects)}")
    by_name = ("subjects", "placed", "frequency")
    chosen = {field: {k: v for k, v in getattr(scope, field).items() if k == name} for field in by_name}
    return dataclasses.replace(scope, **chosen)


def place_prompts(scope: Scope, prompts: Sequence[Sequence[int]]) -> jax.Array:
    """Prompts of token ids with BOS, as rows [S, L] on the devices.

    Rows are `padded`. Rows of only PAD are added until the number of rows is divisible by the number of devices.
    """
    rows = -(-len(prompts) // scope.gemma.mesh.size) * scope.gemma.mesh.size
    tokens_SxL = padded([*prompts, *[[]] * (rows - len(prompts))])
    return jax.make_array_from_callback(
        tokens_SxL.shape,
        jax.NamedSharding(scope.gemma.mesh, sharding.TOKENS),
        lambda index: tokens_SxL[index],
    )


def place_copies(scope: Scope, prompt: Sequence[int], at_least: int) -> jax.Array:
    """Copies of one prompt [S, L], with S at least `at_least` and divisible by the number of devices."""
    return place_prompts(scope, [prompt] * (-(-at_least // scope.gemma.mesh.size) * scope.gemma.mesh.size))


def padded(prompts: Sequence[Sequence[int]]) -> np.ndarray:
    """Prompts as rows [N, L], padded at the end, so that each token attends to the same tokens as without padding.

    L is a multiple of 16, so that prompts of similar length have the same shape.
    """
    length = -(-max(map(len, prompts)) // 16) * 16
    tokens_NxL = np.full((len(prompts), length), masking.PAD, np.int32)
    for row_L, prompt in zip(tokens_NxL, prompts, strict=True):
        row_L[: len(prompt)] = prompt
    return tokens_NxL


@functools.partial(jax.jit, static_argnames="mesh")
def is_kept(mesh: jax.sharding.Mesh, tokens_SxL: jax.Array) -> jax.Array:
    """The mask [S, L] of counted positions of placed prompts: all except BOS, EOS and PAD."""
    return sharding.constrain(mesh, masking.is_kept(tokens_SxL, 0), sharding.TOKENS)


@functools.partial(jax.jit, static_argnames="mesh")
def reconstruct(
    mesh: jax.sharding.Mesh, subject: jumprelu.SAE, x_SxLxD: jax.Array, y_SxLxO: jax.Array
) -> dict[str, jax.Array]:
    """Runs an SAE on the first row: latents, y and its reconstruction in Gemma's dtype, ‖y‖ and ‖y − ŷ‖ / ‖y‖."""
    x_LxD, y_LxO = x_SxLxD[0].astype(jnp.float32), y_SxLxO[0].astype(jnp.float32)
    f_LxM = jumprelu.encode(subject, x_LxD)
    recon_LxO = jumprelu.decode(subject, f_LxM, x_LxD)
    norm_L = jnp.linalg.norm(y_LxO, axis=1)
    found = {
        "f_LxM": f_LxM,
        "y_LxO": y_SxLxO[0],
        "recon_LxO": recon_LxO.astype(y_SxLxO.dtype),
        "norm_L": norm_L,
        "error_L": jnp.linalg.norm(recon_LxO - y_LxO, axis=1) / norm_L,
    }
    return sharding.constrain(mesh, found, sharding.REPLICATED)


def _frequencies(path: pathlib.Path, subjects: Mapping[str, attached.Subject]) -> dict[str, np.ndarray]:
    """Reads each latent's frequency [M] from the evaluation beside the SAEs; empty if there is no evaluation."""
    file = path / "evaluation.npz"
    if not file.exists():
        return {}
    shapes = {f"{name}/frequency": subject.sae.b_enc.shape for name, subject in subjects.items()}
    return {key.removesuffix("/frequency"): value for key, value in files.read_npz(file, shapes).items()}
