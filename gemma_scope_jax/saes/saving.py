"""SAEs as files of every format, in the units and on the site that its readers expect."""

import dataclasses
import pathlib
from collections.abc import Mapping

import jax
import numpy as np

from gemma_scope_jax.models import forward, placement, registry
from gemma_scope_jax.models.sites import SITES, Site
from gemma_scope_jax.runtime import files, printing
from gemma_scope_jax.runtime.printing import printable
from gemma_scope_jax.saes import jumprelu, loading
from gemma_scope_jax.saes.formats import (
    circuit_tracer,
    common,
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    saelens,
)


def write(place: pathlib.Path, file_format: str, one: loading.Stored, dtype: str = "float32") -> pathlib.Path:
    """Writes an SAE that is `in_convention` to a folder; returns it, or the file that is the SAE.

    Args:
      place: the folder; of circuit-tracer's transcoders one for all layers.
      file_format: one of `formats.WRITTEN`.
      one: the SAE.
      dtype: of the matrices, one of `common.DTYPES`; thresholds and biases are always float32.
    """
    folded, is_transcoder = one.sae, one.target_site != one.site

    def hook(site: Site) -> str:
        names = SITES[site.kind]
        return (names.hugging_face if file_format == "gemma_scope_2" else names.transformer_lens).format(
            site.layer
        )

    about = dataclasses.replace(
        one.about,
        model_name=registry.spec(one.model).hugging_face,
        hook_name=hook(one.site),
        hook_name_out=hook(one.target_site) if is_transcoder else None,
    )
    match file_format:
        case "saelens":
            saelens.write(place, folded, about, dtype)
        case "gemma_scope":
            place = place / "params.npz"
            gemma_scope.write(place, folded)
        case "gemma_scope_2":
            gemma_scope_2.write(place, folded, about, dtype)
        case "dictionary_learning":
            dictionary_learning.write(place, folded, about, dtype)
        case "circuit_tracer":
            circuit_tracer.write_config(place, about)
            place = circuit_tracer.write(place, folded, one.site.layer, dtype)
    return place


def obstacle(file_format: str, site: Site, target_site: Site, skip: bool, dtype: str) -> str | None:
    """Why a format has no place for an SAE, if it has none."""
    is_transcoder = site != target_site
    if file_format == "gemma_scope" and skip:
        return gemma_scope.NO_SKIP
    if file_format == "gemma_scope" and dtype != "float32":
        return "would be in bfloat16, which NumPy's files have no type for"
    if file_format == "dictionary_learning" and is_transcoder:
        return dictionary_learning.NO_TRANSCODER
    if file_format == "circuit_tracer" and not is_transcoder:
        return "is no transcoder, and circuit-tracer reads nothing else"
    if file_format == "circuit_tracer" and site.layer != target_site.layer:
        return f"reads layer {site.layer} and predicts layer {target_site.layer}; it knows one alone"
    if file_format == "gemma_scope_2" and target_site.kind == "mlp_in_gain_free":
        return "is of mlp_in_gain_free, for which Hugging Face has no name"
    wanted = _TRANSCODERS_READ.get(file_format)
    if is_transcoder and wanted and site.kind not in _TRANSCODERS_READ.values():
        return f"reads {site}; --format={file_format} is for transcoders of {wanted}"
    return None


def obstacles(
    wanted: list[tuple[str, str, Site, Site, bool]],
    dtype: str,
    model: str,
    weights: str,
    gemma_dtype: jax.typing.DTypeLike,
) -> tuple[dict[tuple[str, str], str], dict[int, jax.Array]]:
    """What keeps SAEs out of formats, by format and name, and the gains that it takes to convert the others.

    Args:
      wanted: format, name, site, target site, and whether there is a skip connection.
      dtype: of the matrices.
      model: its name.
      weights: Gemma's; read only if a transcoder has to be converted.
      gemma_dtype: that they are read in.
    """
    found = {(f, name): obstacle(f, *sites, skip, dtype) for f, name, *sites, skip in wanted}
    layers = {
        site.layer
        for f, name, site, target, _ in wanted
        if _needs_gain(f, site, target) and not found[f, name]
    }
    gains = mlp_gains(model, weights, gemma_dtype, sorted(layers))
    for f, name, site, target, _ in wanted:
        found[f, name] = found[f, name] or _lost_gain(f, site, target, gains)
    return {key: why for key, why in found.items() if why}, gains


def without_paths(about: common.About) -> common.About:
    """What is told of an SAE without what only this machine knows: of a text its file's name, of others nothing."""

    def address(path: str) -> str:
        return public_name(path) if "://" in path and not path.startswith("file:") else ""

    return dataclasses.replace(
        about,
        text=public_name(about.text),
        weights=address(about.weights),
        tokenizer=address(about.tokenizer),
    )


def public_name(path: str) -> str:
    """A text without the folders of this machine, or an address without who opens it."""
    if path.startswith("tfds:") or ("://" in path and not path.startswith("file:")):
        return printing.shareable(path)
    return pathlib.PurePath(path).name


# What a format's readers feed its transcoders with; the others' files say it.
_TRANSCODERS_READ = {"gemma_scope": "mlp_in_gain_free", "gemma_scope_2": "mlp_in"}


def _needs_gain(file_format: str, site: Site, target_site: Site) -> bool:
    """Whether a transcoder reads what the MLP reads, but not in the form that the format's readers feed it with."""
    wanted = _TRANSCODERS_READ.get(file_format)
    return site != target_site and wanted is not None and site.kind != wanted


def in_convention(file_format: str, one: loading.Stored, gains: Mapping[int, jax.Array]) -> loading.Stored:
    """An SAE as a format's readers feed it, and on the site that they feed it with.

    Args:
      file_format: one of `formats.WRITTEN`.
      one: the SAE.
      gains: those of `mlp_gains`.

    Raises:
      ValueError: a gain is zero, so that what was read without it cannot be told from what is read with it.
    """
    if file_format == "gemma_scope" and one.site.kind == "embed":
        scale = loading.embedding_scale(one.model)
        return dataclasses.replace(one, sae=common.in_other_units(one.sae, 1 / scale))
    if not _needs_gain(file_format, one.site, one.target_site):
        return one
    gain_D = gains[one.site.layer]
    if file_format == "gemma_scope":
        # Trained behind the gain, fed before it. Where that is zero nothing got through, and 1 / inf keeps it so.
        gain_D = 1 / gain_D
    elif why := _lost_gain(file_format, one.site, one.target_site, gains):
        raise ValueError(f"{one.name} {why}")
    site = Site(_TRANSCODERS_READ[file_format], one.site.layer)
    return dataclasses.replace(one, sae=jax.device_get(jumprelu.read_scaled(one.sae, gain_D)), site=site)


def _lost_gain(file_format: str, site: Site, target_site: Site, gains: Mapping[int, jax.Array]) -> str | None:
    """Why a transcoder that reads before the gain cannot be had as one that reads behind it, if it cannot."""
    if file_format != "gemma_scope_2" or not _needs_gain(file_format, site, target_site):
        return None
    lost = int((gains[site.layer] == 0).sum())
    if not lost:
        return None
    return (
        f"and --format={file_format} differ in the gain of the norm before the MLP, of which {lost} are zero: what "
        "was read there without it is not known behind it. Train it on mlp_in, or choose another format"
    )


def mlp_gains(
    model: str, weights: str, dtype: jax.typing.DTypeLike, layers: list[int]
) -> dict[int, jax.Array]:
    """The gains of the MLPs' norms by layer; no weights are read for none."""
    if not layers:
        return {}
    gemma = placement.load(model, weights, dtype, num_layers=max(layers) + 1)
    return {layer: forward.mlp_in_gain(gemma.params, layer) for layer in layers}


def convert(
    location: str,
    file_format: str,
    out: pathlib.Path,
    dtype: str = "float32",
    weights: str = "",
    **sites: str,
) -> list[pathlib.Path]:
    """Writes an SAE of a file, or a set of transcoders, in another format; returns the paths.

    Args:
      location: a path or `hf://OWNER/NAME/FOLDER`, in any format.
      file_format: one of `formats.WRITTEN`.
      out: the folder to write to; of several SAEs each has one in it.
      dtype: of the matrices.
      weights: Gemma's, where the formats differ in the gain that a transcoder reads behind.
      **sites: see `loading.read`.

    Raises:
      ValueError: the SAE cannot be read, or the format has no place for it.
    """
    files.check_new(out)
    found = list(loading.read(location, **sites))
    wanted = [(file_format, one.name, one.site, one.target_site, one.sae.W_skip is not None) for one in found]
    first = found[0]
    named = first.about.weights
    if named and not weights and any(_needs_gain(file_format, one.site, one.target_site) for one in found):
        if first.is_of_run:
            weights = named
        else:
            print(f"The file names weights {printable(named)}. They are not used unless you give --weights.")
    hindered, gains = obstacles(wanted, dtype, first.model, weights, np.float32)
    if hindered:
        (_, name), why = next(iter(hindered.items()))
        raise ValueError(f"{name} {why}")
    is_one = len(found) == 1 or file_format == "circuit_tracer"
    folders = {} if is_one else files.folder_names(one.name for one in found)
    paths = []
    with files.filling_folder(out) as partial:
        for one in found:
            folder = partial / folders.get(one.name, "")
            path = write(folder, file_format, in_convention(file_format, one, gains), dtype)
            paths.append(out / path.relative_to(partial))
    return paths
