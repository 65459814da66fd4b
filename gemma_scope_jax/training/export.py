"""Writes a run's SAEs in the formats and under the names that other tools expect."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator, Mapping

import numpy as np

from gemma_scope_jax.data import token_rows
from gemma_scope_jax.models import registry
from gemma_scope_jax.runtime import distributed, files, printing, reporting
from gemma_scope_jax.runtime.errors import InputError
from gemma_scope_jax.runtime.reporting import say
from gemma_scope_jax.saes import evaluation_file, jumprelu, loading, naming, saving
from gemma_scope_jax.saes import formats as formats_lib
from gemma_scope_jax.saes.formats import common, saelens
from gemma_scope_jax.training import bank, checkpoint, metrics_log, runs, step


def folded_saes(plan: step.Plan, state: step.State) -> Iterator[tuple[str, jumprelu.SAE]]:
    """Yields each member of each bank, by name, on raw activations and on the host: one at a time, to save memory."""
    for b in plan.banks:
        for i, member in enumerate(b.members):
            yield (
                member.name,
                distributed.fetch(bank.fold(b, state.banks[b.name].params, state.normalizers, i)),
            )


def _with_bar[T](saes: Iterator[T], count: int) -> Iterator[T]:
    with reporting.bar("Writing", "SAE", count, speaks=distributed.is_first()) as bar:
        for one in saes:
            yield one
            bar.update()


def measured_l0(run: runs.Run, state: step.State, workdir: pathlib.Path) -> dict[str, float]:
    """The mean L0 of each member, by name.

    It is that of the run's evaluation on held-out rows, if there is one of this state. Otherwise it is that of the
    last training updates in the run's log or, without a log, that of the updates since the last whole window.
    """
    number = int(state.step)
    evaluated, others = None, {}
    with contextlib.suppress(ValueError):  # A damaged evaluation does not prevent an export.
        evaluated, others = evaluation_file.own_evaluation(workdir, run.config, number)
    held_out = {} if evaluated is None or others else evaluated.get("sae", {})
    logged = metrics_log.last_values(workdir, number)
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
    """Writes every member to `folder/NAME/` as a SAELens folder; `rows` is the name of the stored training rows."""
    l0 = measured_l0(run, state, folder.parent)
    members = {member.name: member for member in run.plan.members}
    with files.filling_folder(folder) if distributed.is_first() else contextlib.nullcontext() as partial:
        for name, folded in _with_bar(folded_saes(run.plan, state), len(members)):
            if partial is not None:
                one = as_stored(run, state, members[name], folded, l0[name], rows)
                saving.write(partial / name, "saelens", one)
    for name in members:
        say(f"Exported {folder / name}")
    return [folder / name for name in members]


def refresh(workdir: pathlib.Path) -> None:
    """Writes the SAEs of a run's newest checkpoint to its folder `sae`, unless they are already there.

    A finished run has them already, because training writes them at its end.

    Raises:
      ValueError: if no checkpoint can be read, or the folder cannot be written to.
    """
    newest = checkpoint.newest_step(workdir / "checkpoints")
    if newest is None or _is_fresh(workdir, newest):
        return
    files.check_output(workdir / "sae", is_folder=True)
    run, state = runs.open_run(workdir)
    if not _is_fresh(workdir, int(state.step)):  # The newest checkpoint can be damaged.
        write_own(run, state, workdir / "sae", token_rows.recorded(workdir) or "")


def _is_fresh(workdir: pathlib.Path, step: int) -> bool:
    """Whether the run's folder `sae` has every SAE as it was at a step."""
    config = loading.run_config(workdir)
    places = [workdir / "sae" / m.name for b in config.banks.values() for m in naming.members(b)]
    if not all((place / "cfg.json").exists() for place in places):
        return False
    written = [saelens.read_about(place).step for place in places]
    # Files without a step are of an older version, which wrote them at the end of a run, after the last checkpoint.
    ended = (workdir / "checkpoints" / str(step)).stat().st_mtime
    return all(
        at == step if at is not None else (place / "cfg.json").stat().st_mtime >= ended
        for at, place in zip(written, places, strict=True)
    )


def as_stored(
    run: runs.Run, state: step.State, member: naming.Member, folded: jumprelu.SAE, l0: float, rows: str
) -> loading.LoadedSAE:
    """A member of a run as a `LoadedSAE`; `saving.write` adds the names of hooks."""
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
        sparsity_coefficient=member.sparsity_coefficient,
        objective=member.objective,
        target_l0=member.target_l0,
        seed=member.seed,
        step=int(state.step),
        site_mean_O=np.asarray(state.normalizers[str(member.target_site)].ablation_mean_D),
    )
    return loading.LoadedSAE(
        member.name, folded, about, config.model, member.site, member.target_site, is_of_run=True
    )


def layout(
    members: Mapping[str, naming.Member], l0: Mapping[str, float], file_format: str
) -> dict[str, pathlib.Path]:
    """The path of each member in an export's folder, by name, as in the repositories that use the format."""
    to = formats_lib.FORMATS[file_format]
    places = {name: to.place(name, member, l0[name]) for name, member in members.items()}
    if to.holds_many:
        return {name: pathlib.Path(place) for name, place in places.items()}
    return naming.apart(places, members)


def export_run(
    workdir: pathlib.Path,
    formats: tuple[str, ...],
    out: pathlib.Path,
    bank_name: str | None = None,
    dtype: str = "float32",
) -> list[pathlib.Path]:
    """Exports the SAEs of a run's newest checkpoint in the layouts of other tools.

    Args:
      workdir: the run directory.
      formats: names from `saes.formats.written()`. With more than one format, each gets its own folder, which leaves
        out the SAEs that the format cannot hold.
      out: the folder to write to.
      bank_name: the bank whose SAEs are exported; None: all banks.
      dtype: the dtype of the matrices.

    Returns:
      The paths of the exported SAEs.

    Raises:
      ValueError: if there is no such bank, the only format cannot hold a member, or a path already exists; nothing
        is written.
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
    """Exports the SAEs of an open run; see `export_run`.

    Args:
      run: the run, from `runs.open_run`.
      state: the state to export, from `runs.open_run`.
      workdir: the run directory.
      formats: names from `saes.formats.written()`; see `export_run`.
      out: the folder to write to.
      dtype: the dtype of the matrices.
      is_public: whether to leave out paths of this machine from the files.

    Returns:
      The paths of the exported SAEs.

    Raises:
      ValueError: if the only format cannot hold a member, or a path already exists; nothing is written.
    """
    members = {member.name: member for member in run.plan.members}
    rows = token_rows.recorded(workdir) or ""
    l0 = measured_l0(run, state, workdir)
    wanted = [
        (file_format, name, common.Kind(m.site, m.target_site, m.skip, dtype))
        for file_format in formats
        for name, m in members.items()
    ]
    dtype_of_gemma = registry.dtype(run.config)
    found, gains = saving.obstacles(wanted, run.config.model, run.config.weights, dtype_of_gemma)
    layouts = {file_format: layout(members, l0, file_format) for file_format in formats}
    places: dict[str, dict[str, pathlib.Path]] = {file_format: {} for file_format in formats}
    for file_format, name, *_ in wanted:
        why = found.get((file_format, name))
        if why and len(formats) == 1:
            raise InputError(f"{name} {why}; choose other SAEs with --bank")
        if why:
            say(f"Left out of {file_format}: {name} {why}")
            continue
        place = pathlib.Path(file_format if len(formats) > 1 else ".", layouts[file_format][name])
        files.check_new(out / place)
        places[file_format][name] = place
    paths = []
    with files.filling_folder(out) as partial:
        for name, folded in _with_bar(folded_saes(run.plan, state), len(members)):
            one = as_stored(run, state, members[name], folded, l0[name], rows)
            if is_public:
                one = dataclasses.replace(one, about=saving.without_paths(one.about))
            for file_format, by_name in places.items():
                if name in by_name:
                    made = saving.in_convention(file_format, one, gains)
                    path = saving.write(partial / by_name[name], file_format, made, dtype)
                    paths.append(out / path.relative_to(partial))
    return paths
