"""Writes dashboards in the format of SAEDashboard's batch files, which Neuronpedia imports."""

import json
import pathlib
from collections.abc import Callable

import numpy as np

from gemma_scope_jax.analysis.dashboards import collect
from gemma_scope_jax.analysis.dashboards.website import Dashboards
from gemma_scope_jax.models import registry
from gemma_scope_jax.models.sites import SITES
from gemma_scope_jax.runtime import files
from gemma_scope_jax.saes import saving

PER_BATCH = 128  # latents
ALIGNED = 3  # largest components of a decoder direction that are listed


def write(folder: pathlib.Path, shown: Dashboards, length: int, text_of: Callable[[int], str]) -> None:
    """Writes `batch-{n}.json`, `run_settings.json` and `skipped_indexes.json` for one SAE, without dead latents.

    Correlations, the histogram of logits and the attention heads' shares of a decoder direction are not measured, so
    their lists are empty.

    Args:
      folder: the folder to write to, which can already exist.
      shown: the contents of the SAE's dashboards.
      length: the number of tokens in a row.
      text_of: returns the text of a token id.
    """
    about = {
        "model_id": registry.spec(shown.model).hugging_face.split("/")[-1],
        "layer": shown.subject.spliced.layer,
        "sae_set": shown.name,
    }
    alive = np.flatnonzero(~shown.gathered.is_dead_M)
    for number, start in enumerate(range(0, len(alive), PER_BATCH)):
        features = [_feature(shown, int(i), length, text_of) for i in alive[start : start + PER_BATCH]]
        _write(folder / f"batch-{number}.json", about | {"sae_id_suffix": None, "features": features})
    frequency_M = shown.gathered.frequency_M
    skipped = {
        "log_sparsity": np.log10(frequency_M + 1e-10).round(3).tolist(),
        "skipped_indexes": np.flatnonzero(shown.gathered.is_dead_M).tolist(),
    }
    _write(folder / "skipped_indexes.json", about | skipped)
    settings = {
        "hook_name": SITES[shown.subject.site.kind].transformer_lens.format(shown.subject.site.layer),
        "huggingface_dataset_path": saving.public_name(shown.text),
        "n_prompts_total": shown.gathered.rows,
        "n_tokens_in_prompt": length,
        "n_features_at_a_time": PER_BATCH,
    }
    _write(folder / "run_settings.json", about | settings)


def _write(path: pathlib.Path, value: dict) -> None:
    files.write_text(path, json.dumps(value, allow_nan=False))


def _round(values: np.ndarray) -> list[float]:
    return [round(float(value), 3) for value in values]


def _feature(shown: Dashboards, latent: int, length: int, text_of: Callable[[int], str]) -> dict:
    g = shown.gathered
    direction_O = np.asarray(shown.subject.sae.W_dec[latent], np.float32)
    aligned = np.argsort(-np.abs(direction_O), kind="stable")[:ALIGNED]
    share_O = np.abs(direction_O) / max(float(np.abs(direction_O).sum()), 1e-30)
    bins = np.flatnonzero(g.histogram_MxH[latent])
    bins = np.arange(bins[0], bins[-1] + 1)
    empty = (
        "correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson",
        "correlated_features_indices", "correlated_features_l1", "correlated_features_pearson",
        "logits_hist_data_bar_heights", "logits_hist_data_bar_values", "decoder_weights_dist",
    )  # fmt: skip
    up, up_values, down, down_values = (
        ([], [], [], []) if shown.logits is None else (part[latent] for part in shown.logits)
    )
    return {
        "feature_index": latent,
        "neuron_alignment_indices": aligned.tolist(),
        "neuron_alignment_values": _round(direction_O[aligned]),
        "neuron_alignment_l1": _round(share_O[aligned]),
        **{name: [] for name in empty},
        "pos_str": [text_of(token) for token in up],
        "pos_values": _round(up_values),
        "neg_str": [text_of(token) for token in down],
        "neg_values": _round(down_values),
        "frac_nonzero": float(g.frequency_M[latent]),
        # The bins have a constant ratio, so the middle of each bar is the geometric mean of its edges.
        "freq_hist_data_bar_values": _round(np.sqrt(collect.EDGES[bins] * collect.EDGES[bins + 1])),
        "freq_hist_data_bar_heights": g.histogram_MxH[latent, bins].tolist(),
        "n_prompts_total": g.rows,
        "n_tokens_in_prompt": length,
        "dataset": saving.public_name(shown.text),
        "activations": _activations(shown, latent, text_of),
        "vector": _round(direction_O),
    }


def _activations(shown: Dashboards, latent: int, text_of: Callable[[int], str]) -> list[dict]:
    """The top passages and one passage of each band; top passages have -1 as `bin_min` and `bin_contains`."""
    g = shown.gathered

    def activation(firings: collect.Firings, index: int, bounds: tuple[float, float, float]) -> dict:
        found = shown.passages(g.options, firings, latent, index)
        return {
            **dict(zip(("bin_min", "bin_max", "bin_contains"), bounds, strict=True)),
            "tokens": [text_of(int(token)) for token in found.tokens],
            "values": _round(found.values),
            "qualifying_token_index": found.peak,
        }

    made = [
        activation(g.top, int(i), (-1, round(float(g.max_M[latent]), 3), -1))
        for i in np.flatnonzero(g.top.row_MxK[latent] >= 0)
    ]
    value_R = g.sample.window_MxKxT[latent, :, g.options.before]
    drawn = (g.sample.row_MxK[latent] >= 0).sum()
    for band in collect.bands(g, latent):
        least, most = float(value_R[band].min()), float(value_R[band].max())
        made.append(
            activation(g.sample, int(band[0]), (round(least, 3), round(most, 3), round(band.size / drawn, 3)))
        )
    return made
