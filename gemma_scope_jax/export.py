"""SAEs in the formats and under the names that other tools know: a run's, and those of files."""

import contextlib
import dataclasses
import pathlib
import re
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from gemma_scope_jax import bank, log, runs, sae, step, stored
from gemma_scope_jax.data import token_rows
from gemma_scope_jax.formats import (
    circuit_tracer,
    common,
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    saelens,
)
from gemma_scope_jax.models import forward, registry
from gemma_scope_jax.models.sites import SITES, Site
from gemma_scope_jax.runtime import distributed, files, printing
from gemma_scope_jax.runtime.printing import printable, say


def folded_saes(plan: step.Plan, state: step.State) -> Iterator[tuple[str, sae.SAE]]:
    """Each member of each bank, by name, on raw activations and on the host: one at a time, for they are large."""
    for b in plan.banks:
        for i, member in enumerate(b.members):
            yield (
                member.name,
                distributed.fetch(bank.fold(b, state.banks[b.name].params, state.normalizers, i)),
            )


def measured_l0(run: runs.Run, state: step.State, workdir: pathlib.Path) -> dict[str, float]:
    """Each member's mean L0 as the state is: on held-out rows if that was evaluated, else of training's last updates.

    Those are in the run's log; of a run without one, the updates since the last whole window are taken.
    """
    number = int(state.step)
    evaluated, others = None, {}
    with contextlib.suppress(ValueError):  # A damaged one is no reason to export nothing.
        evaluated, others = runs.own_evaluation(workdir, run.config, number)
    held_out = {} if evaluated is None or others else evaluated.get("sae", {})
    logged = log.last_values(workdir, number)
    measured = {}
    for b in run.plan.banks:
        firing = distributed.fetch(state.banks[b.name].firing)
        for i, member in enumerate(b.members):
            known = [of[member.name]["l0"] for of in (held_out, logged) if member.name in of]
            known = [l0 for l0 in known if l0 is not None]
            rows = int(firing.rows_E[i])
            since = firing.count_ExM[i].sum() / rows if rows else firing.frequency_ExM[i].sum()
            measured[member.name] = float(known[0] if known else since)
    return measured


def write_own(run: runs.Run, state: step.State, folder: pathlib.Path, rows: str) -> list[pathlib.Path]:
    """Writes every member to `folder/<name>/` as a SAELens folder; `rows` names the dataset it was trained on."""
    l0 = measured_l0(run, state, folder.parent)
    members = {member.name: member for member in run.plan.members}
    with files.filling_folder(folder) if distributed.is_first() else contextlib.nullcontext() as partial:
        for name, folded in folded_saes(run.plan, state):
            if partial is not None:
                one = as_stored(run, state, members[name], folded, l0[name], rows)
                write(partial / name, "saelens", one)
    for name in members:
        say(f"Exported {folder / name}")
    return [folder / name for name in members]


def as_stored(
    run: runs.Run, state: step.State, member: bank.Member, folded: sae.SAE, l0: float, rows: str
) -> stored.Stored:
    """A run's member as if it came from a file; hooks are named by `write`."""
    config = run.config
    about = common.About(
        model_name=registry.spec(config.model).hugging_face,
        context_length=config.data.context_length,
        text=printing.without_credentials(config.data.text),
        l0=round(l0, 2),
        held_out_fraction=config.data.held_out_fraction,
        data_seed=config.data.seed,
        chat_template=config.data.chat_template,
        rows=rows,
        weights=printing.without_credentials(config.weights),
        tokenizer=printing.without_credentials(config.tokenizer),
        gemma_dtype=config.gemma_dtype,
        site_mean_O=np.asarray(state.normalizers[str(member.target_site)].ablation_mean_D),
    )
    return stored.Stored(member.name, folded, about, config.model, member.site, member.target_site)


def write(place: pathlib.Path, file_format: str, one: stored.Stored, dtype: str = "float32") -> pathlib.Path:
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


def layout(
    members: Mapping[str, bank.Member], l0: Mapping[str, float], file_format: str
) -> dict[str, pathlib.Path]:
    """Where each member goes below an export's folder, as in Google's repositories, by name.

    `resid_post/layer_9/width_16k/average_l0_71`, or in Gemma Scope 2's way `resid_post/layer_9_width_16k_l0_71`. Of
    members that would share a place, the later have their λ in it too, and if need be their whole name.
    circuit-tracer has a folder for all layers that are otherwise the same.
    """
    places: dict[str, pathlib.Path] = {}
    for name, member in members.items():
        if file_format == "circuit_tracer":
            places[name] = pathlib.Path(re.sub(r"layer_\d+_", "", name, count=1))
            continue
        kind = "transcoder" if member.is_transcoder else member.site.kind
        seed = f"_seed_{member.seed}" if member.seed else ""
        width, rounded = bank.width_name(member.width), round(l0[name])
        # Gemma Scope has its embedding SAEs beside its layers.
        layer = "embedding" if member.site.kind == "embed" else f"layer_{member.site.layer}"
        if file_format == "gemma_scope_2":
            affine = "_affine" if member.skip else ""
            place = f"{kind}/{layer}_width_{width}_l0_{rounded}{affine}{seed}"
        else:
            affine = "_skip" if member.skip else ""
            place = f"{kind}{affine}/{layer}/width_{width}/average_l0_{rounded}{seed}"
        if pathlib.Path(place) in places.values():
            place = f"{place}_lambda_{member.sparsity_coefficient}"
        if pathlib.Path(place) in places.values():
            place = f"{place}_{name}"
        places[name] = pathlib.Path(place)
    return places


# What a format's readers feed its transcoders with; the others' files say it.
_TRANSCODERS_READ = {"gemma_scope": "mlp_in_gain_free", "gemma_scope_2": "mlp_in"}


def _needs_gain(file_format: str, site: Site, target_site: Site) -> bool:
    """Whether a transcoder reads what the MLP reads, but not in the form that the format's readers feed it with."""
    wanted = _TRANSCODERS_READ.get(file_format)
    return site != target_site and wanted is not None and site.kind != wanted


def in_convention(file_format: str, one: stored.Stored, gains: Mapping[int, jax.Array]) -> stored.Stored:
    """An SAE as a format's readers feed it, and on the site that they feed it with.

    Args:
      file_format: one of `formats.WRITTEN`.
      one: the SAE.
      gains: those of `mlp_gains`.

    Raises:
      ValueError: a gain is zero, so that what was read without it cannot be told from what is read with it.
    """
    if file_format == "gemma_scope" and one.site.kind == "embed":
        scale = stored.embedding_scale(one.model)
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
    return dataclasses.replace(one, sae=jax.device_get(sae.read_scaled(one.sae, gain_D)), site=site)


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
    loaded = registry.load(model, weights, dtype, num_layers=max(layers) + 1)
    return {layer: forward.mlp_in_gain(loaded.params, layer) for layer in layers}


def export_run(
    workdir: pathlib.Path,
    formats: tuple[str, ...],
    out: pathlib.Path,
    bank_name: str | None = None,
    dtype: str = "float32",
) -> list[pathlib.Path]:
    """Exports the newest state of a run directory in layouts such as Google's; returns the paths.

    Args:
      workdir: the run's.
      formats: of `formats.WRITTEN`. Of several each has a folder of its own, without what it has no place for.
      out: the folder to write to.
      bank_name: only this bank's SAEs; None: all.
      dtype: of the matrices.

    Raises:
      ValueError: there is no such bank, the only format has no place for a member, or a place is taken; nothing has
        been written then.
    """
    run, state = runs.open_run(workdir, banks=None if bank_name is None else [bank_name])
    return export_state(run, state, workdir, formats, out, dtype)


def export_state(
    run: runs.Run,
    state: step.State,
    workdir: pathlib.Path,
    formats: tuple[str, ...],
    out: pathlib.Path,
    dtype: str = "float32",
    is_public: bool = False,
) -> list[pathlib.Path]:
    """`export_run` of a run that is open.

    Args:
      run: as `runs.open_run` gives it.
      state: likewise.
      workdir: the run's.
      formats: see `export_run`.
      out: the folder to write to.
      dtype: of the matrices.
      is_public: whether paths of this machine are kept out of the files.

    Raises:
      ValueError: see `export_run`.
    """
    members = {member.name: member for member in run.plan.members}
    rows = token_rows.name_of(runs.run_rows(run.config, workdir))
    l0 = measured_l0(run, state, workdir)
    wanted = [
        (file_format, name, m.site, m.target_site, m.skip)
        for file_format in formats
        for name, m in members.items()
    ]
    dtype_of_gemma = registry.dtype(run.config)
    found, gains = obstacles(wanted, dtype, run.config.model, run.config.weights, dtype_of_gemma)
    layouts = {file_format: layout(members, l0, file_format) for file_format in formats}
    places: dict[str, dict[str, pathlib.Path]] = {file_format: {} for file_format in formats}
    for file_format, name, *_ in wanted:
        why = found.get((file_format, name))
        if why and len(formats) == 1:
            raise ValueError(f"{name} {why}; with --bank other SAEs are exported")
        if why:
            say(f"Left out of {file_format}: {name} {why}")
            continue
        place = pathlib.Path(file_format if len(formats) > 1 else ".", layouts[file_format][name])
        files.check_new(out / place)
        places[file_format][name] = place
    paths = []
    with files.filling_folder(out) as partial:
        for name, folded in folded_saes(run.plan, state):
            one = as_stored(run, state, members[name], folded, l0[name], rows)
            if is_public:
                one = dataclasses.replace(one, about=without_paths(one.about))
            for file_format, by_name in places.items():
                if name in by_name:
                    made = in_convention(file_format, one, gains)
                    path = write(partial / by_name[name], file_format, made, dtype)
                    paths.append(out / path.relative_to(partial))
    return paths


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
      **sites: see `stored.read`.

    Raises:
      ValueError: the SAE cannot be read, or the format has no place for it.
    """
    files.check_new(out)
    found = list(stored.read(location, **sites))
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
