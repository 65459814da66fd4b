"""From a path to a report: opens a run or an exported SAE, evaluates it, and shows and stores the numbers."""

import pathlib

import rich.console
import rich.table

from gemma_scope_jax import config as config_lib
from gemma_scope_jax import data, evaluation, gemma, interrupt, training
from gemma_scope_jax.formats import saelens

# The config to evaluate with, the SAEs, and the folder of the rows they were trained on.
Opened = tuple[config_lib.Config, dict[str, evaluation.Subject], pathlib.Path]


def open_path(path: pathlib.Path, **overrides: str | None) -> Opened:
    """The SAEs of a run's newest checkpoint, or an exported one, and what to evaluate them on.

    Raises:
      ValueError: the path is neither, or options were given that only an exported SAE takes.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    if (path / "config.json").exists():
        if given:
            raise ValueError(
                f"--{next(iter(given))} is for exported SAEs; a run is evaluated as it was trained"
            )
        return _open_run(path)
    if saelens.is_folder(path):
        return _open_saelens(path, given)
    raise ValueError(f"{path} is neither a run directory (config.json) nor an exported SAE (cfg.json)")


def _open_run(path: pathlib.Path) -> Opened:
    run, state = training.open_run(path)
    folded = training.folded_saes(run, state)
    subjects = {
        member.name: evaluation.Subject(
            folded[member.name], member.site, state.normalizers[str(member.site)].ablation_mean_D
        )
        for member in run.plan.members
    }
    return run.config, subjects, training.run_rows(run.config, path)


def _open_saelens(path: pathlib.Path, given: dict[str, str]) -> Opened:
    sae, about = saelens.read(path)
    config = config_lib.from_dict(
        {
            "model": gemma.name_from_hugging_face(about.model_name),
            "weights": given.get("weights", about.weights),
            "tokenizer": about.tokenizer,
            "gemma_dtype": given.get("dtype", about.gemma_dtype),
            "data": {
                "text": given.get("text", about.text),
                "context_length": about.context_length,
                "held_out_fraction": about.held_out_fraction,
                "seed": about.data_seed,
                "chat_template": about.chat_template,
            },
        }
    )
    site = gemma.site_from_hook(about.hook_name)
    model = gemma.build_model(config.model)
    gemma.check_site(model, site)
    if sae.W_enc.shape[0] != gemma.site_width(model, site):
        raise ValueError(
            f"{path} takes activations of width {sae.W_enc.shape[0]}, but {site} of {config.model} has width "
            f"{gemma.site_width(model, site)}"
        )
    subject = evaluation.Subject(sae, site, saelens.read_site_mean(path))
    rows = data.cached(config.data, about.rows) if about.rows and "text" not in given else None
    return config, {path.resolve().name: subject}, rows or training.prepare_rows(config)


def evaluate_path(
    path: pathlib.Path,
    rows: int | None = None,
    rows_per_batch: int | None = None,
    out: pathlib.Path | None = None,
    **overrides: str | None,
) -> dict[str, evaluation.Evaluation]:
    """Evaluates what lies at a path on held-out rows; writes evaluation.json and .png and prints a table."""
    interrupts = interrupt.Interrupts()
    interrupts.forbid_saving("an evaluation writes its results when it ends")
    try:
        config, subjects, folder = open_path(path, **overrides)
        rows = config.evaluation.rows if rows is None else rows
        rows_per_batch = config.evaluation.rows_per_batch if rows_per_batch is None else rows_per_batch
        for name, value in (("rows", rows), ("rows_per_batch", rows_per_batch)):
            if value < 1:
                raise ValueError(f"--{name} is {value}; it must be at least 1")
        loaded = gemma.load(config.model, config.weights, config_lib.dtype(config))
        results = evaluation.evaluate(
            loaded,
            subjects,
            data.open_rows(folder, data.TRAIN),
            data.open_rows(folder, data.HELD_OUT),
            rows,
            rows_per_batch,
            config.data.masked_prefix,
        )
        out = out or path
        out.mkdir(parents=True, exist_ok=True)
        about = {
            "model": config.model,
            "text": config.data.text,
            "split": data.HELD_OUT,
            "context_length": config.data.context_length,
        }
        evaluation.write_json(out / "evaluation.json", results, about)
        evaluation.write_plot(out / "evaluation.png", results)
        print_table(results)
        print(f"Wrote {out / 'evaluation.json'} and {out / 'evaluation.png'}", flush=True)
        return results
    finally:
        interrupts.close()


def print_table(results: dict[str, evaluation.Evaluation]) -> None:
    """The numbers of every SAE, a column each."""
    first = next(iter(results.values()))
    table = rich.table.Table(
        title=f"Held-out text: {first.rows:,} rows, {first.activations:,} activations, {first.tokens:,} predictions"
    )
    table.add_column("")
    for name in results:
        table.add_column(name, justify="right", overflow="fold")

    def add(label: str, form: str) -> None:
        table.add_row(label, *(form.format(r=result) for result in results.values()))

    add("L0", "{r.l0:.1f}")
    add("FVU", "{r.fvu:.4f}")
    add("delta loss (nats)", "{r.delta_loss:.4f} ± {r.delta_loss_se:.4f}")
    add("clean loss", "{r.clean_loss:.4f}")
    add("spliced loss", "{r.spliced_loss:.4f}")
    add("zero ablation", "{r.zero_ablation_loss:.4f}")
    add("mean ablation", "{r.mean_ablation_loss:.4f}")
    add("loss recovered, zero", "{r.loss_recovered_zero:.4f}")
    add("loss recovered, mean", "{r.loss_recovered_mean:.4f}")
    add("never fired here", "{r.dead_fraction:.2%}")
    rich.console.Console().print(table)
