"""What every look inside needs: a whole Gemma, its tokenizer, and SAEs at some of its sites."""

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


def _no_text() -> token_rows.Rows:
    raise InputError("these SAEs were put together without a text; open_scope opens them with one")


@dataclasses.dataclass(frozen=True)
class Scope:
    """A model with SAEs on the devices."""

    config: config_lib.Config
    gemma: Gemma
    tokenizer: tokenizer.Tokenizer
    subjects: Mapping[str, attached.Subject]
    placed: Mapping[str, jumprelu.SAE]  # the same SAEs on the devices
    # [M] by SAE, of each latent's firing on the text of the run's evaluation; of those that were evaluated.
    frequency: Mapping[str, np.ndarray]
    held_out: Callable[[], token_rows.Rows] = _no_text  # Opens the rows that evaluations are on.

    def __post_init__(self) -> None:
        # Whether a latent fires would depend on all others, which few of the looks inside ask.
        if of_top_k := [name for name, subject in self.subjects.items() if subject.top_k is not None]:
            raise InputError(
                f"{of_top_k[0]} keeps the {self.subjects[of_top_k[0]].top_k} strongest latents; only "
                "SAEs with thresholds are looked into"
            )

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites that SAEs read and give."""
        sites = (site for s in self.subjects.values() for site in (s.site, s.spliced))
        return tuple(dict.fromkeys(sites))

    def check_latent(self, name: str, latent: int) -> None:
        """Raises ValueError if there is no such SAE or latent."""
        if name not in self.subjects:
            raise InputError(f"there is no SAE {quoted(name)}; there are {', '.join(self.subjects)}")
        width = len(self.subjects[name].sae.b_enc)
        if not 0 <= latent < width:
            raise InputError(f"{name} has no latent {latent}; it has 0 to {width - 1}")


def open_scope(path: str | pathlib.Path, **overrides: str | None) -> Scope:
    """Opens the SAEs of a run or of files, with their model.

    Args:
      path: a run directory; or a path or `hf://OWNER/NAME/FOLDER` of an SAE, or of several with `*`.
      **overrides: see `opening.open_path`.
    """
    return open_session(opening.open_path(path, **overrides))


def open_session(opened: opening.Opened, model: LanguageModel | None = None) -> Scope:
    """A scope of SAEs that are opened; of a model that is loaded, or else loads it."""
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
    """The token ids of a text, behind BOS.

    Raises:
      ValueError: it has none.
    """
    tokens = scope.tokenizer.encode(text)
    if not tokens:
        raise InputError("the text is empty; give one of at least one token")
    return [masking.BOS, *tokens]


def one_token(scope: Scope, text: str) -> int:
    """The token that a text is.

    Raises:
      ValueError: it is several, or none.
    """
    tokens = scope.tokenizer.encode(text)
    if len(tokens) != 1:
        pieces = " + ".join(repr(scope.tokenizer.decode([token])) for token in tokens)
        raise InputError(
            f"{text!r} is {len(tokens)} tokens ({pieces or 'none'}); give a text of one token, most words with the "
            "space before them"
        )
    return tokens[0]


def only(scope: Scope, name: str) -> Scope:
    """A scope of one of its SAEs.

    Raises:
      ValueError: there is none of that name.
    """
    if name not in scope.subjects:
        raise InputError(f"there is no SAE {name!r}; there are {', '.join(scope.subjects)}")
    by_name = ("subjects", "placed", "frequency")
    chosen = {field: {k: v for k, v in getattr(scope, field).items() if k == name} for field in by_name}
    return dataclasses.replace(scope, **chosen)


def place_prompts(scope: Scope, prompts: Sequence[Sequence[int]]) -> jax.Array:
    """Token ids, each with its BOS, as rows [S, L] on the devices.

    They are `padded`, and with rows of PAD alone to as many as the devices divide.
    """
    rows = -(-len(prompts) // scope.gemma.mesh.size) * scope.gemma.mesh.size
    tokens_SxL = padded([*prompts, *[[]] * (rows - len(prompts))])
    return jax.make_array_from_callback(
        tokens_SxL.shape,
        jax.NamedSharding(scope.gemma.mesh, sharding.TOKENS),
        lambda index: tokens_SxL[index],
    )


def place_copies(scope: Scope, prompt: Sequence[int], at_least: int) -> jax.Array:
    """The same prompt in at least so many rows [S, L], as many as the devices divide: none is of PAD alone."""
    return place_prompts(scope, [prompt] * (-(-at_least // scope.gemma.mesh.size) * scope.gemma.mesh.size))


def padded(prompts: Sequence[Sequence[int]]) -> np.ndarray:
    """Prompts as rows [N, L], padded behind, so that each token sees what it would see alone.

    L is a multiple of 16, so that prompts of about one length are of one shape.
    """
    length = -(-max(map(len, prompts)) // 16) * 16
    tokens_NxL = np.full((len(prompts), length), masking.PAD, np.int32)
    for row_L, prompt in zip(tokens_NxL, prompts, strict=True):
        row_L[: len(prompt)] = prompt
    return tokens_NxL


@functools.partial(jax.jit, static_argnames="mesh")
def is_kept(mesh: jax.sharding.Mesh, tokens_SxL: jax.Array) -> jax.Array:
    """Which positions of placed prompts count, [S, L]: all but those of BOS, EOS and PAD."""
    return sharding.constrain(mesh, masking.is_kept(tokens_SxL, 0), sharding.TOKENS)


@functools.partial(jax.jit, static_argnames="mesh")
def reconstruct(
    mesh: jax.sharding.Mesh, subject: jumprelu.SAE, x_SxLxD: jax.Array, y_SxLxO: jax.Array
) -> dict[str, jax.Array]:
    """An SAE on the first row: latents, y and its reconstruction in Gemma's dtype, ‖y‖ and ‖y − ŷ‖ / ‖y‖."""
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
    """Of an evaluation that lies beside the SAEs."""
    file = path / "evaluation.npz"
    if not file.exists():
        return {}
    shapes = {f"{name}/frequency": subject.sae.b_enc.shape for name, subject in subjects.items()}
    return {key.removesuffix("/frequency"): value for key, value in files.read_npz(file, shapes).items()}
