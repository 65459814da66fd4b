"""The metrics of an SAE's evaluation, and the file evaluation.json that stores them."""

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
    """The evaluation of one SAE; docs/metrics.md and `evaluation.metrics.METRICS` define the metrics.

    Losses are in nats per prediction. `_se` is a standard error over rows. A metric that was not measured is None.
    """

    l0: float
    l0_se: float
    l0_quantiles: tuple[int, ...]  # of L0 over activations, at the percentages `QUANTILES`
    fvu: float
    fvu_se: float
    fvu_per_dimension: float
    fvu_per_dimension_se: float
    explained_variance_elements: float
    explained_variance_elements_se: float
    explained_variance_tokens: float
    explained_variance_tokens_se: float
    cosine: float
    cosine_se: float
    norm_ratio: float
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
    kl: float | None
    kl_se: float | None
    r_l0: float | None
    r_l0_se: float | None
    dead_fraction: float
    dense_fraction: float
    decoder_cosine: float  # median of `nearest_cosine`
    rows: int
    activations: int  # positions that L0, FVU and firing frequencies are averaged over
    tokens: int  # scored predictions
    # Distributions, stored as arrays.
    frequency: np.ndarray  # [M], share of activations on which each latent fires
    nearest_cosine: np.ndarray  # [M], largest cosine of each decoder direction with another latent's
    threshold: np.ndarray  # [M]
    decoder_norm: np.ndarray  # [M]
    encoder_norm: np.ndarray  # [M]
    l0_counts: np.ndarray  # [highest L0 + 1], the number of activations with each L0
    by_position: Mapping[
        str, np.ndarray
    ]  # [L], by position after a document's BOS; see `evaluation.metrics.at_positions`
    by_row: Mapping[str, np.ndarray]  # [S], sums of each row; see `evaluation.metrics.difference`
    more: Mapping[str, float | None] = dataclasses.field(
        default_factory=dict
    )  # metrics added with `evaluation.metrics.register`


def numbers(result: Evaluation) -> dict[str, float | int | tuple | None]:
    """All metrics and counts, without the distributions; a value that is not finite becomes None."""
    found = {
        key: value for key, value in vars(result).items() if not isinstance(value, (np.ndarray, Mapping))
    }
    found |= result.more
    return {key: None if isinstance(v, float) and not np.isfinite(v) else v for key, v in found.items()}


# The fields of an evaluation that are one number, or a few.
SCALARS = [
    field.name
    for field in dataclasses.fields(Evaluation)
    if field.type not in (np.ndarray, Mapping[str, np.ndarray], Mapping[str, float | None])
]


def number(result: object, name: str) -> float | None:
    """A metric of an evaluation by name, built in or registered; None if it was not measured."""
    return getattr(result, name, None) if hasattr(result, name) else getattr(result, "more", {}).get(name)


def read_numbers(path: pathlib.Path) -> dict:
    """Reads and checks an evaluation.json: the `SCALARS` of each SAE under "sae", and the model and rows.

    A metric that was not measured, or that an older version did not have, is None.

    Raises:
      ValueError: if the file is not a valid evaluation.
    """
    found = files.read_json(path)
    saes = found.pop("sae", None)
    if not isinstance(saes, dict) or not saes or not all(isinstance(of, dict) for of in saes.values()):
        raise FormatError(f"{path} has no metrics of SAEs; remove it, and run gemma-scope evaluate again")
    checked = {
        name: {key: of.get(key) for key in SCALARS}
        | {key: value for key, value in of.items() if _is_registered(key) and _is_number(value)}
        for name, of in saes.items()
    }
    for name, of in checked.items():
        for key, value in of.items():
            values = value if key == "l0_quantiles" and isinstance(value, list) else [value]
            if not all(map(_is_number, values)):
                raise FormatError(
                    f"{path} is not a valid evaluation: {key} of {printable(name)} is {quoted(value)}"
                )
            if key.endswith("_se") and value is not None and value < 0:
                raise FormatError(f"{path} is not a valid evaluation: {key} of {printable(name)} is negative")
    about = {
        key: value for key, value in found.items() if value is None or isinstance(value, (str, int, float))
    }
    return {**about, "sae": checked}


def _is_registered(key: str) -> bool:
    """Whether a key can be the name of a registered metric."""
    return key.isidentifier() and not key.startswith("_") and key not in Evaluation.__dataclass_fields__


def _is_number(value: object) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value is None or (is_number and abs(value) < 1e30)


def own_evaluation(
    folder: pathlib.Path, config: config_lib.Config, step: int | None
) -> tuple[dict | None, dict[str, object]]:
    """Reads the evaluation in a folder, and compares its settings with the SAEs' own.

    The SAEs' own settings are their model, the held-out rows of their training text, all positions, and their newest
    step.

    Args:
      folder: the folder of the run, or of an SAE in files.
      config: the config of the run or file.
      step: the run's training step; None: an SAE in files.

    Returns:
      The content of evaluation.json, None if it does not exist; and the settings in it that differ, by name.

    Raises:
      ValueError: if evaluation.json is damaged.
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
        # Only older evaluations have paths with the user's name.
        return shareable(found.get(name)) == shareable(own[name])

    return found, {name: found.get(name) for name in own if not is_same(name)}
