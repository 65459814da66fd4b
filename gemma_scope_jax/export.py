"""A run's SAEs in the formats and under the names that other tools know."""

import dataclasses
import pathlib
from collections.abc import Iterator

import jax
import numpy as np

from gemma_scope_jax import bank, data, gemma, hosts, runs, sae, step
from gemma_scope_jax import config as config_lib
from gemma_scope_jax.formats import gemma_scope, gemma_scope_2, saelens

FORMATS = ("saelens", "gemma_scope", "gemma_scope_2")


def folded_saes(plan: step.Plan, state: step.State) -> Iterator[tuple[str, sae.SAE]]:
    """Each member of each bank, by name, on raw activations and on the host: one at a time, for they are large."""
    for b in plan.banks:
        for i, member in enumerate(b.members):
            yield member.name, hosts.fetch(bank.fold(b, state.banks[b.name].params, state.normalizers, i))


def measured_l0(plan: step.Plan, state: step.State) -> dict[str, float]:
    """Each member's mean L0 over the last whole window of training, or the one under way if it is the first."""
    measured = {}
    for b in plan.banks:
        firing = hosts.fetch(state.banks[b.name].firing)
        for i, member in enumerate(b.members):
            if firing.windows_E[i]:
                measured[member.name] = float(firing.frequency_ExM[i].sum())
            else:
                measured[member.name] = float(firing.count_ExM[i].sum() / max(firing.rows_E[i], 1))
    return measured


def write_own(run: runs.Run, state: step.State, folder: pathlib.Path, rows: str) -> list[pathlib.Path]:
    """Writes every member to `folder/<name>/` as a SAELens folder; `rows` names the dataset it was trained on."""
    l0 = measured_l0(run.plan, state)
    members = {member.name: member for member in run.plan.members}
    paths = []
    for name, folded in folded_saes(run.plan, state):
        paths.append(folder / name)
        if hosts.is_first():
            _write_saelens(run, state, members[name], folded, folder / name, rows, l0[name])
        print(f"Exported {folder / name}", flush=True)
    return paths


def _write_saelens(
    run: runs.Run,
    state: step.State,
    member: bank.Member,
    folded: sae.SAE,
    path: pathlib.Path,
    rows: str,
    l0: float,
) -> None:
    config = run.config
    about = saelens.About(
        model_name=gemma.spec(config.model).hugging_face,
        hook_name=gemma.hook_name(member.site),
        hook_name_out=gemma.hook_name(member.target_site) if member.is_transcoder else None,
        context_length=config.data.context_length,
        text=config.data.text,
        l0=l0,
        held_out_fraction=config.data.held_out_fraction,
        data_seed=config.data.seed,
        chat_template=config.data.chat_template,
        rows=rows,
        weights=config.weights,
        tokenizer=config.tokenizer,
        gemma_dtype=config.gemma_dtype,
    )
    saelens.write(path, folded, about, state.normalizers[str(member.target_site)].ablation_mean_D)


def layout(
    members: dict[str, bank.Member], l0: dict[str, float], file_format: str
) -> dict[str, pathlib.Path]:
    """Where each member goes below an export's folder, as in Google's repositories, by name.

    `resid_post/layer_9/width_16k/average_l0_71`, or in Gemma Scope 2's way `resid_post/layer_9_width_16k_l0_71`. Of
    members that would share a place, the later have their λ in it too, and if need be their whole name.
    """
    places: dict[str, pathlib.Path] = {}
    for name, member in members.items():
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


# What a format's readers feed its transcoders with; SAELens is told by each file.
_TRANSCODERS_READ = {"gemma_scope": "mlp_in_gain_free", "gemma_scope_2": "mlp_in"}


def _is_converted(member: bank.Member, file_format: str) -> bool:
    """Whether a transcoder reads what the MLP reads, but not in the form that the format's readers feed it with.

    Raises:
      ValueError: it reads something else, which the format has no place for.
    """
    wanted = _TRANSCODERS_READ.get(file_format)
    if not member.is_transcoder or wanted is None or member.site.kind == wanted:
        return False
    if member.site.kind not in _TRANSCODERS_READ.values():
        raise ValueError(
            f"{member.name} reads {member.site}; --format={file_format} is for transcoders of {wanted}"
        )
    return True


def mlp_gains(run: runs.Run, file_format: str) -> dict[int, jax.Array]:
    """The gains of the MLPs' norms by layer, of the transcoders that are to be converted."""
    layers = [member.site.layer for member in run.plan.members if _is_converted(member, file_format)]
    if not layers:
        return {}
    config = run.config
    dtype = config_lib.dtype(config)
    loaded = gemma.load(config.model, config.weights, dtype, num_layers=max(layers) + 1)
    return {layer: gemma.mlp_in_gain(loaded.params, layer) for layer in layers}


def in_convention(
    member: bank.Member, folded: sae.SAE, gains: dict[int, jax.Array], file_format: str
) -> sae.SAE:
    """An SAE as a format's readers feed it; `gains` are those of `mlp_gains`.

    Raises:
      ValueError: a gain is zero, so that what was read without it cannot be told from what is read with it.
    """
    if not _is_converted(member, file_format):
        return folded
    gain_D = gains[member.site.layer]
    if file_format == "gemma_scope":
        # Trained behind the gain, fed before it. Where that is zero nothing got through, and 1 / inf keeps it so.
        return jax.device_get(sae.read_scaled(folded, 1 / gain_D))
    if lost := int((gain_D == 0).sum()):
        raise ValueError(
            f"{member.name} and --format={file_format} differ in the gain of the norm before the MLP, of which "
            f"{lost} are zero: what was read there without it is not known behind it. Train it on mlp_in, or choose "
            "another format"
        )
    return jax.device_get(sae.read_scaled(folded, gain_D))


def export_run(
    workdir: pathlib.Path, file_format: str, out: pathlib.Path, bank_name: str | None = None
) -> list[pathlib.Path]:
    """Exports the newest state of a run directory in a layout such as Google's; returns the paths.

    Args:
      workdir: the run's.
      file_format: one of `FORMATS`.
      out: the folder to write to.
      bank_name: only this bank's SAEs; None: all.

    Raises:
      ValueError: there is no such bank, the format has no place for a member, or a place is taken; nothing has been
        written then.
    """
    run, state = runs.open_run(workdir)
    if bank_name is not None:
        known = [b.name for b in run.plan.banks]
        if bank_name not in known:
            raise ValueError(f"{workdir} has no bank {bank_name!r}; choose one of {', '.join(known)}")
        only = tuple(b for b in run.plan.banks if b.name == bank_name)
        run = dataclasses.replace(run, plan=dataclasses.replace(run.plan, banks=only))
    rows = data.name_of(runs.run_rows(run.config, workdir))
    members = {member.name: member for member in run.plan.members}
    l0 = measured_l0(run.plan, state)
    paths = []
    places = layout(members, l0, file_format)
    for name, place in places.items():
        if (out / place).exists():
            raise ValueError(f"{out / place} is there already; remove it, or give another --out")
        if members[name].skip and file_format == "gemma_scope":
            raise ValueError(f"{name} {gemma_scope.NO_SKIP}; with --bank other SAEs are exported")
    gains = mlp_gains(run, file_format)
    for name, folded in folded_saes(run.plan, state):
        member, folder = members[name], out / places[name]
        converted = in_convention(member, folded, gains, file_format)
        match file_format:
            case "saelens":
                path = folder
                _write_saelens(run, state, member, converted, path, rows, l0[name])
            case "gemma_scope":
                path = folder / "params.npz"
                gemma_scope.write(path, converted)
            case "gemma_scope_2":
                path = folder
                site = gemma.Site("mlp_in", member.site.layer) if member.is_transcoder else member.site
                gemma_scope_2.write(
                    path,
                    converted,
                    gemma_scope_2.About(
                        model_name=gemma.spec(run.config.model).hugging_face,
                        hook_in=gemma.SITES[site.kind].hugging_face.format(site.layer),
                        hook_out=gemma.SITES[member.target_site.kind].hugging_face.format(member.site.layer),
                        l0=float(np.round(l0[name], 2)),
                    ),
                )
        paths.append(path)
        print(f"Exported {path}", flush=True)
    return paths
