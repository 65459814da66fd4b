"""Writes SAEs in every format, in the units and at the site that the format's readers expect."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from gemma_scope_jax.models import forward, placement, registry
from gemma_scope_jax.models.sites import SITES, Site
from gemma_scope_jax.runtime import files, printing
from gemma_scope_jax.runtime.errors import FormatError
from gemma_scope_jax.runtime.printing import printable
from gemma_scope_jax.runtime.reporting import say
from gemma_scope_jax.saes import formats, jumprelu, loading
from gemma_scope_jax.saes.formats import common


def write(
    place: pathlib.Path, file_format: str, one: loading.LoadedSAE, dtype: str = "float32"
) -> pathlib.Path:
    """Writes an SAE, converted by `in_convention`, to a folder; returns the folder, or the file that is the SAE.

    Args:
      place: the folder; circuit-tracer has one folder for the transcoders of all layers.
      file_format: one of `formats.written()`.
      one: the SAE.
      dtype: the dtype of the matrices, one of `common.DTYPES`; thresholds and biases are always float32.
    """
    to = formats.format_to_write(file_format)

    def hook(site: Site) -> str:
        return getattr(SITES[site.kind], to.hooks).format(site.layer)

    about = dataclasses.replace(
        one.about,
        model_name=registry.spec(one.model).hugging_face,
        hook_name=hook(one.site),
        hook_name_out=hook(one.target_site) if one.target_site != one.site else None,
    )
    return to.write(place, one.sae, about, dtype)


def obstacle(file_format: str, kind: common.Kind) -> str | None:
    """Why a format cannot hold an SAE; None if it can."""
    to = formats.format_to_write(file_format)
    if why := to.obstacle(kind):
        return why
    if kind.is_transcoder and to.transcoders_read and kind.site.kind not in _MLP_INPUTS:
        return f"reads {kind.site}; --format={file_format} is for transcoders that read {to.transcoders_read}"
    return None


def obstacles(
    wanted: Sequence[tuple[str, str, common.Kind]],
    model: str,
    weights: str,
    gemma_dtype: jax.typing.DTypeLike,
) -> tuple[dict[tuple[str, str], str], dict[int, jax.Array]]:
    """Why formats cannot hold SAEs, by format and name, and the gains needed to convert the others, by layer.

    Args:
      wanted: the format, name and kind of each SAE.
      model: the model's name.
      weights: Gemma's weights; read only if a transcoder has to be converted.
      gemma_dtype: the dtype that the weights are read in.
    """
    found = {(f, name): obstacle(f, kind) for f, name, kind in wanted}
    layers = {kind.site.layer for f, name, kind in wanted if _needs_gain(f, kind) and not found[f, name]}
    gains = mlp_gains(model, weights, gemma_dtype, sorted(layers))
    for f, name, kind in wanted:
        found[f, name] = found[f, name] or _lost_gain(f, kind, gains)
    return {key: why for key, why in found.items() if why}, gains


def without_paths(about: common.About) -> common.About:
    """An SAE's metadata without local paths: a text keeps its file name, weights and tokenizer only an address."""

    def address(path: str) -> str:
        return public_name(path) if "://" in path and not path.startswith("file:") else ""

    return dataclasses.replace(
        about,
        text=public_name(about.text),
        weights=address(about.weights),
        tokenizer=address(about.tokenizer),
    )


def public_name(path: str) -> str:
    """A local path's file name, or an address without credentials and user names."""
    if path.startswith("tfds:") or ("://" in path and not path.startswith("file:")):
        return printing.shareable(path)
    return pathlib.PurePath(path).name


# The two sites at the MLP's input; they differ in the gain of the norm before it.
_MLP_INPUTS = ("mlp_in_gain_free", "mlp_in")


def _needs_gain(file_format: str, kind: common.Kind) -> bool:
    """Whether a transcoder must be rescaled by the norm's gain to read the site that the format's readers use."""
    wanted = formats.FORMATS[file_format].transcoders_read
    return kind.is_transcoder and wanted != "" and kind.site.kind != wanted


def kind_of(one: loading.LoadedSAE, dtype: str) -> common.Kind:
    """The kind of an SAE whose matrices are written in `dtype`."""
    return common.Kind(one.site, one.target_site, one.sae.W_skip is not None, dtype)


def in_convention(
    file_format: str, one: loading.LoadedSAE, gains: Mapping[int, jax.Array]
) -> loading.LoadedSAE:
    """Converts an SAE to the units and the site that a format's readers use.

    Args:
      file_format: one of `formats.written()`.
      one: the SAE.
      gains: the gains by layer from `mlp_gains`.

    Raises:
      ValueError: if a zero gain makes the conversion impossible.
    """
    to, kind = formats.FORMATS[file_format], kind_of(one, "float32")
    if to.embedding_scale and one.site.kind == "embed":
        scale = loading.embedding_scale(one.model)
        return dataclasses.replace(one, sae=common.in_other_units(one.sae, 1 / scale))
    if not _needs_gain(file_format, kind):
        return one
    gain_D = gains[one.site.layer]
    if to.transcoders_read == "mlp_in_gain_free":
        # Trained after the gain, used before it. A zero gain let nothing through, and dividing by inf keeps it so.
        gain_D = 1 / gain_D
    elif why := _lost_gain(file_format, kind, gains):
        raise FormatError(f"{one.name} {why}")
    site = Site(to.transcoders_read, one.site.layer)
    return dataclasses.replace(one, sae=jax.device_get(jumprelu.read_scaled(one.sae, gain_D)), site=site)


def _lost_gain(file_format: str, kind: common.Kind, gains: Mapping[int, jax.Array]) -> str | None:
    """Why a transcoder that reads before the gain cannot be converted to read after it; None if it can."""
    if formats.FORMATS[file_format].transcoders_read != "mlp_in" or not _needs_gain(file_format, kind):
        return None
    lost = int((gains[kind.site.layer] == 0).sum())
    if not lost:
        return None
    return (
        f"cannot be converted to --format={file_format}, which reads after the gain of the norm before the MLP: "
        f"{lost} of the gain's values are zero; train it on mlp_in, or choose another format"
    )


def mlp_gains(
    model: str, weights: str, dtype: jax.typing.DTypeLike, layers: list[int]
) -> dict[int, jax.Array]:
    """The gains of the norms before the MLPs, by layer; weights are read only if there are layers."""
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
    """Converts an SAE, or a set of transcoders, to another format; returns the paths written.

    Args:
      location: a path or `hf://OWNER/NAME/FOLDER`, in any format.
      file_format: one of `formats.written()`.
      out: the folder to write to; several SAEs each get a folder in it.
      dtype: the dtype of the matrices.
      weights: Gemma's weights; needed for a transcoder if only one of the formats reads after the norm's gain.
      **sites: see `loading.read`.

    Raises:
      ValueError: if the SAE cannot be read, or the format cannot hold it.
    """
    formats.format_to_write(file_format)
    files.check_new(out)
    say(f"Reading the SAEs at {location} …")
    found = list(loading.read(location, **sites))
    wanted = [(file_format, one.name, kind_of(one, dtype)) for one in found]
    first = found[0]
    named = first.about.weights
    if named and not weights and any(_needs_gain(file_format, kind) for *_, kind in wanted):
        if first.is_of_run:
            weights = named
        else:
            say(f"The file names weights {printable(named)}. They are not used unless you give --weights.")
    hindered, gains = obstacles(wanted, first.model, weights, np.float32)
    if hindered:
        (_, name), why = next(iter(hindered.items()))
        raise FormatError(f"{name} {why}")
    is_one = len(found) == 1 or formats.FORMATS[file_format].holds_many
    folders = {} if is_one else files.folder_names(one.name for one in found)
    paths = []
    say(f"Writing to {out} …")
    with files.filling_folder(out) as partial:
        for one in found:
            folder = partial / folders.get(one.name, "")
            path = write(folder, file_format, in_convention(file_format, one, gains), dtype)
            paths.append(out / path.relative_to(partial))
    return paths
