"""The numbers of an SAE's evaluation, and the file beside it that has them."""

import dataclasses
import pathlib
from collections.abc import Mapping

import numpy as np

from gemma_scope_jax import config as config_lib
from gemma_scope_jax.runtime import files
from gemma_scope_jax.runtime.errors import FormatError
from gemma_scope_jax.runtime.printing import printable, quoted, shareable

QUANTILES = (5, 25, 50, 75, 95)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The numbers of one SAE. Losses are in nats per prediction; `_se` is a standard error over rows.

    What was not measured is None.
    """

    l0: float
    l0_se: float
    l0_quantiles: tuple[int, ...]  # over activations, at `QUANTILES` per cent
    # ‖y − ŷ‖² over ‖y − mean‖², y being what is spliced and the mean that of the evaluated activations.
    fvu: float
    fvu_se: float
    fvu_per_dimension: float  # the mean over dimensions of the same ratio in each
    fvu_per_dimension_se: float
    explained_variance_elements: (
        float  # 1 − mean squared error over the variance of all elements, as in tutorials
    )
    explained_variance_elements_se: float
    explained_variance_tokens: (
        float  # the mean over tokens of 1 − ‖y − ŷ‖² / ‖y − site's mean‖², as SAELens had it
    )
    explained_variance_tokens_se: float
    cosine: float  # of y and ŷ, the mean over tokens
    cosine_se: float
    norm_ratio: float  # ‖ŷ‖ / ‖y‖, likewise
    norm_ratio_se: float
    delta_loss: float
    delta_loss_se: float
    clean_loss: float
    clean_loss_se: float
    spliced_loss: float
    zero_ablation_loss: float
    mean_ablation_loss: float
    loss_recovered_zero: float
    loss_recovered_zero_se: float
    loss_recovered_mean: float
    loss_recovered_mean_se: float
    kl: float | None  # KL(clean ‖ spliced) of the predictions of the next token
    kl_se: float | None
    r_l0: float | None  # uniformity of active latent importance
    r_l0_se: float | None
    dead_fraction: float  # of latents that never fire on the evaluated tokens
    dense_fraction: float  # of latents that fire on more than a tenth of them
    decoder_cosine: float  # of a latent's decoder direction with that next to it, the median over latents
    rows: int
    activations: int  # positions that L0, FVU and frequencies are over
    tokens: int  # predictions scored
    # Distributions, which are not in the table.
    frequency: np.ndarray  # [M], of each latent's firing
    nearest_cosine: np.ndarray  # [M], of each decoder direction with that next to it
    threshold: np.ndarray  # [M]
    decoder_norm: np.ndarray  # [M]
    encoder_norm: np.ndarray  # [M]
    l0_counts: np.ndarray  # [highest L0 + 1], activations on which so many latents fire
    by_position: Mapping[
        str, np.ndarray
    ]  # [L]: behind a document's BOS; see `evaluation.metrics.at_positions`
    by_row: Mapping[str, np.ndarray]  # [S]: sums of each row; see `evaluation.metrics.difference`
    more: Mapping[str, float | None] = dataclasses.field(default_factory=dict)  # numbers that were registered


def numbers(result: Evaluation) -> dict[str, float | int | tuple | None]:
    """All but the distributions; what is not finite is None."""
    found = {
        key: value for key, value in vars(result).items() if not isinstance(value, (np.ndarray, Mapping))
    }
    found |= result.more
    return {key: None if isinstance(v, float) and not np.isfinite(v) else v for key, v in found.items()}


# All of an evaluation that is a single number, or a few.
SCALARS = [
    field.name
    for field in dataclasses.fields(Evaluation)
    if field.type not in (np.ndarray, Mapping[str, np.ndarray], Mapping[str, float | None])
]


def number(result: object, name: str) -> float | None:
    """A number of an evaluation by name, its own or a registered one; None: it was not measured."""
    return getattr(result, name, None) if hasattr(result, name) else getattr(result, "more", {}).get(name)


def read_numbers(path: pathlib.Path) -> dict:
    """What an evaluation.json says, checked: `SCALARS` of each SAE under "sae", and what they were measured on.

    What was not measured, or not by the version that wrote it, is None.

    Raises:
      ValueError: it is no evaluation.
    """
    found = files.read_json(path)
    saes = found.pop("sae", None)
    if not isinstance(saes, dict) or not saes or not all(isinstance(of, dict) for of in saes.values()):
        raise FormatError(f"{path} has no numbers of SAEs; remove it, and run gemma-scope evaluate again")
    checked = {
        name: {key: of.get(key) for key in SCALARS}
        | {key: value for key, value in of.items() if _is_registered(key) and _is_number(value)}
        for name, of in saes.items()
    }
    for name, of in checked.items():
        for key, value in of.items():
            values = value if key == "l0_quantiles" and isinstance(value, list) else [value]
            if not all(map(_is_number, values)):
                raise FormatError(f"{path} is no evaluation: {key} of {printable(name)} is {quoted(value)}")
            if key.endswith("_se") and value is not None and value < 0:
                raise FormatError(f"{path} is no evaluation: {key} of {printable(name)} is below zero")
    about = {
        key: value for key, value in found.items() if value is None or isinstance(value, (str, int, float))
    }
    return {**about, "sae": checked}


def _is_registered(key: str) -> bool:
    """Whether a key may be a number that somebody has added to the metrics."""
    return key.isidentifier() and not key.startswith("_") and key not in Evaluation.__dataclass_fields__


def _is_number(value: object) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value is None or (is_number and abs(value) < 1e30)


def own_evaluation(
    folder: pathlib.Path, config: config_lib.Config, step: int | None
) -> tuple[dict | None, dict[str, object]]:
    """The evaluation in a folder, and what it was made of that is not the SAEs' own, by name.

    Their own are the model, the text and its held-out rows, all positions, and their newest step.

    Args:
      folder: the run's, or that of an SAE in files.
      config: as the run or the file says.
      step: at which the run is; None: of an SAE in files.

    Returns:
      What evaluation.json holds, None if there is none; and the differences, of an own one none.

    Raises:
      ValueError: it is damaged.
    """
    path = folder / "evaluation.json"
    if not path.exists():
        return None, {}
    found = read_numbers(path)
    own = {
        "step": step, "model": config.model, "dtype": config.gemma_dtype, "text": config.data.text,
        "split": "held_out", "turns": None, "context_length": config.data.context_length,
        "weights": config.weights, "tokenizer": config.tokenizer,
    }  # fmt: skip

    def is_same(name: str) -> bool:
        # Evaluations have their paths without the user's name, older ones with it.
        return shareable(found.get(name)) == shareable(own[name])

    return found, {name: found.get(name) for name in own if not is_same(name)}
