"""From a path to a report: opens a run or an exported SAE, evaluates it, and shows and stores the numbers."""

import dataclasses
import pathlib
from collections.abc import Mapping

import jax
import rich.console
import rich.table

from gemma_scope_jax import (
    bank,
    data,
    evaluation,
    export,
    gemma,
    hosts,
    hub,
    interrupt,
    page,
    plots,
    runs,
    sharding,
    stored,
)
from gemma_scope_jax import config as config_lib


@dataclasses.dataclass(frozen=True)
class Opened:
    """What lies at a path."""

    config: config_lib.Config  # to evaluate with
    subjects: dict[str, evaluation.Subject]
    rows: pathlib.Path  # the folder of those that the SAEs were trained on
    members: dict[str, bank.Member]  # of a run
    step: int | None = None  # of a run, at which they are as they are here


# What is for files: a run is evaluated as it was trained.
_OF_FILES = ("text", "weights", "tokenizer", "dtype", "model", "site", "target_site")


def open_path(location: str | pathlib.Path, **overrides: str | None) -> Opened:
    """The SAEs of a run's newest checkpoint, or of a file in any format, and what to evaluate them on.

    Args:
      location: a run directory, or a path or `hf://OWNER/NAME/FOLDER` of an SAE.
      **overrides: of `_OF_FILES`; None: as the file says.

    Raises:
      ValueError: there is neither, or options were given that only files take.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    path = hub.local(str(location))
    if runs.is_run(path):
        if given:
            raise ValueError(
                f"--{next(iter(given))} is for SAEs in files; a run is evaluated as it was trained"
            )
        return _open_run(path)
    return _open_stored(str(location), given)


def _open_run(path: pathlib.Path) -> Opened:
    run, state = runs.open_run(path)
    members = {member.name: member for member in run.plan.members}
    subjects = {
        name: evaluation.Subject(
            folded,
            members[name].site,
            state.normalizers[str(members[name].target_site)].ablation_mean_D,
            members[name].target_site,
        )
        for name, folded in export.folded_saes(run.plan, state)
    }
    return Opened(run.config, subjects, runs.run_rows(run.config, path), members, int(state.step))


def _open_stored(location: str, given: dict[str, str]) -> Opened:
    found = list(stored.read(location, *(given.get(name, "") for name in ("model", "site", "target_site"))))
    about, model = found[0].about, found[0].model
    for name in ("weights", "tokenizer"):
        chosen = given.get(name) or getattr(about, name)
        if chosen and "://" not in chosen and not pathlib.Path(chosen).expanduser().exists():
            raise ValueError(f"{location}: {name} {chosen} does not exist here; give another --{name}")
    told = {"text": about.text, "weights": about.weights, "tokenizer": about.tokenizer}
    if says := ", ".join(f"{name} {value}" for name, value in told.items() if value and not given.get(name)):
        print(f"The file names {says}.", flush=True)
    # Files of others do not say how they were trained: the defaults then, with Gemma in float32.
    config = config_lib.from_dict(
        {
            "model": model,
            "weights": given.get("weights", about.weights),
            "tokenizer": given.get("tokenizer", about.tokenizer),
            "gemma_dtype": given.get("dtype", about.gemma_dtype),
            "data": {
                "text": given.get("text") or about.text or data.DataConfig().text,
                "context_length": about.context_length,
                "held_out_fraction": about.held_out_fraction,
                "seed": about.data_seed,
                "chat_template": about.chat_template,
            },
        }
    )
    for one in found:
        if one.site.layer != one.target_site.layer:
            raise ValueError(
                f"{location} reads {one.site} and predicts {one.target_site}; only one layer at a time is evaluated"
            )
    subjects = {
        one.name: evaluation.Subject(one.sae, one.site, one.about.site_mean_O, one.target_site)
        for one in found
    }
    rows = data.cached(config.data, about.rows) if about.rows and "text" not in given else None
    return Opened(config, subjects, rows or runs.prepare_rows(config), {})


def evaluate_path(
    path: str | pathlib.Path,
    rows: int | None = None,
    rows_per_batch: int | None = None,
    out: pathlib.Path | None = None,
    is_fast: bool = False,
    split: str = data.HELD_OUT,
    **overrides: str | None,
) -> dict[str, evaluation.Evaluation]:
    """Evaluates what lies at a path; writes evaluation.json, .csv, .html and .png, and prints a table.

    Args:
      path: see `open_path`.
      rows: how many, at most all of the split; None: as the config says.
      rows_per_batch: in one pass; likewise.
      out: the folder to write to; None: beside the SAE or in the run.
      is_fast: without what costs most; see `evaluation.evaluate`.
      split: of the rows, one of `data.TRAIN` and `data.HELD_OUT`.
      **overrides: see `open_path`.
    """
    interrupts = interrupt.Interrupts()
    interrupts.forbid_saving("an evaluation writes its results when it ends")
    try:
        opened = open_path(path, **overrides)
        config = opened.config
        rows = config.evaluation.rows if rows is None else rows
        rows_per_batch = config.evaluation.rows_per_batch if rows_per_batch is None else rows_per_batch
        for name, value in (("rows", rows), ("rows_per_batch", rows_per_batch)):
            if value < 1:
                raise ValueError(f"--{name} is {value}; it must be at least 1")
        out = out or _beside(path)
        if out.exists() and not out.is_dir():
            raise ValueError(f"--out={out} is a file; give a folder")
        out.mkdir(parents=True, exist_ok=True)  # Before an hour's work, not after it.
        mesh, loaded = load_gemma(config)
        results = evaluation.evaluate(
            loaded,
            opened.subjects,
            data.open_rows(opened.rows, data.TRAIN),
            data.open_rows(opened.rows, split),
            rows,
            rows_per_batch,
            config.data.masked_prefix,
            is_fast,
            mesh,
        )
        if not hosts.is_first():
            return results
        about = {
            "model": config.model,
            "text": config.data.text,
            "split": split,
            "context_length": config.data.context_length,
            "step": opened.step,
        }
        page.write_json(out / "evaluation.json", results, about)
        plots.write_plot(out / "evaluation.png", results)
        page.write_csv(out / "evaluation.csv", results)
        written = ["evaluation.json", "evaluation.csv", "evaluation.png"]
        if found := sweeps(opened.members):
            plots.write_pareto(out / "pareto.png", results, found)
            written.append("pareto.png")
        options = {"rows": rows, "rows_per_batch": rows_per_batch, "split": split, **overrides}
        flags = [f"--{name}={value}" for name, value in options.items() if value is not None]
        page.write_html(
            out / "evaluation.html",
            results,
            about,
            " ".join(["python evaluate.py", str(path), *flags, *(["--fast"] if is_fast else [])]),
            {name: subject.spliced.layer for name, subject in opened.subjects.items()},
            {"Sweeps": out / "pareto.png"} if "pareto.png" in written else None,
        )
        written.append("evaluation.html")
        print_table(results)
        print(f"Wrote {', '.join(str(out / name) for name in written)}", flush=True)
        return results
    finally:
        interrupts.close()


def load_gemma(config: config_lib.Config) -> tuple[jax.sharding.Mesh, gemma.Gemma]:
    """The whole model, split over all devices if it is run in parallel; rows then lie over all of them."""
    mesh = sharding.make_mesh(1, 0) if jax.devices()[0].platform != "cpu" else evaluation.one_device()
    model = gemma.build_model(config.model)
    layers, dtype = model.config.num_layers, config_lib.dtype(config)
    placement = runs.placement_of(config, mesh, model, layers)
    return mesh, gemma.load(config.model, config.weights, dtype, layers, placement)


def _beside(location: str | pathlib.Path) -> pathlib.Path:
    """Where results go unless another place is named: to the SAE or run; of a hub's, below the current folder."""
    if str(location).startswith("hf://"):
        return pathlib.Path("evaluations", *str(location).removeprefix("hf://").split("/"))
    path = pathlib.Path(location).expanduser()
    return path.parent if path.is_file() else path


def sweeps(members: Mapping[str, bank.Member]) -> dict[str, dict[str, str]]:
    """Members that differ only in λ or in their target L0, in that order: by label, names and differences."""
    found: dict[str, dict[str, str]] = {}
    by_setting = sorted(members.items(), key=lambda item: (item[1].target_l0, item[1].sparsity_coefficient))
    for name, member in by_setting:
        seed = f", seed {member.seed}" if member.seed else ""
        skip = ", skip" if member.skip else ""
        aim = f", {member.objective}" if member.target_l0 else ""
        label = f"{member.place}{skip}, {bank.width_name(member.width)}{aim}{seed}"
        setting = f"L0* {member.target_l0:g}" if member.target_l0 else f"λ {member.sparsity_coefficient:g}"
        found.setdefault(label, {})[name] = setting
    return {label: points for label, points in found.items() if len(points) > 1}


_OF_MANY = ("l0", "fvu", "delta_loss", "loss_recovered_mean", "dead_fraction", "dense_fraction")


def print_table(results: dict[str, evaluation.Evaluation]) -> None:
    """The numbers of every SAE: a column each, or of more than three a row each with those that matter most."""
    first = next(iter(results.values()))
    table = rich.table.Table(
        title=f"Held-out text: {first.rows:,} rows, {first.activations:,} activations, {first.tokens:,} predictions"
    )
    console = rich.console.Console()
    if len(results) > 3:
        table.add_column("", no_wrap=True)
        # Wider than a narrow terminal, where a row then takes two lines, rather than without the names.
        console.width = max(console.width, max(map(len, results)) + 115)
        for number in _OF_MANY:
            table.add_column(page.NUMBERS[number][0], justify="right")
        for name, result in results.items():
            table.add_row(name, *(page.shown(result, number) for number in _OF_MANY))
    else:
        table.add_column("")
        for name in results:
            table.add_column(name, justify="right", overflow="fold")
        for number, (label, _, _) in page.NUMBERS.items():
            table.add_row(label, *(page.shown(result, number) for result in results.values()))
    console.print(table)
