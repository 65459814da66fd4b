"""Measures the numbers of the README and of docs/ into results/*.json, and writes the tables that show them.

    python -m benchmarks.results [NAME ...]

Names:
  quickstart, baselines, step, tpu, tpu_evaluations, banks (cost of an additional SAE), packing (long documents)
  sweep, layers, sites, targets, transcoders: the suites of configs/quickstart_banks.py
  latent, attribution, steering, bias, links: analyses of runs/quickstart (by `make quickstart`) and runs/sites (by
    `sites`)
  peers, precision: need Python 3.11, and are left out when no name is given
  tables: only writes the tables

Each file contains the commands, the commit, the time and the numbers. A test compares the documents with the files.
"""

import argparse
import datetime
import functools
import json
import pathlib
import re
import subprocess
import tempfile
import types
from collections.abc import Mapping

import jax
import numpy as np

from benchmarks import looks
from benchmarks import packing as packing_lib
from benchmarks.commands import RESULTS, run
from gemma_scope_jax.data import prepare, token_rows
from gemma_scope_jax.evaluation import metrics, page
from gemma_scope_jax.models import forward, masking, registry, weights
from gemma_scope_jax.models.sites import SITES, Site
from gemma_scope_jax.saes import formats, jumprelu, loading
from gemma_scope_jax.training import export, metrics_log, runs

# The suites of configs/quickstart_banks.py, and the number of rows that each is evaluated on.
SUITES = {"sweep": 64, "layers": 16, "sites": 4, "targets": 32, "transcoders": 64}
_NAMES = (
    "README.md",
    "docs/results.md",
    "docs/comparison.md",
    "docs/models.md",
    "docs/metrics.md",
    "docs/explore.md",
)
DOCUMENTS = [pathlib.Path(name) for name in _NAMES]
IMAGES = pathlib.Path("docs/images")


def commit() -> str:
    """The hash of the current commit."""
    return subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()


def quickstart() -> tuple[list[str], dict]:
    """The quickstart's SAE on 512 held-out rows, and on the 64 rows that the quickstart evaluates itself."""
    with tempfile.TemporaryDirectory() as scratch:
        workdir = pathlib.Path(scratch) / "run"
        quickstart_s = run(f"make quickstart RUN={workdir}")
        few = json.loads((workdir / "evaluation.json").read_text())
        run(f"gemma-scope evaluate {workdir} --rows=512 --fast")
        many = json.loads((workdir / "evaluation.json").read_text())
        rows = token_rows.open_rows(prepare.rows_of(loading.run_config(workdir)), token_rows.TRAIN)
        ours, perfect = metrics_log.shuffle_quality(workdir, rows)
        (IMAGES / "quickstart.png").write_bytes((workdir / "evaluation.png").read_bytes())
    numbers = {
        "quickstart_s": quickstart_s,
        "same_document_pairs": ours,
        "same_document_pairs_in_a_perfect_shuffle": perfect,
        "rows_64": few,
        "rows_512": many,
    }
    commands = ["make quickstart", "gemma-scope evaluate runs/quickstart --rows=512 --fast"]
    return commands, numbers


def step() -> tuple[list[str], dict]:
    """The speed of the training step."""
    with tempfile.TemporaryDirectory() as scratch:
        path = pathlib.Path(scratch) / "step.json"
        run(f"python -m benchmarks.step --json={path}")
        return ["python -m benchmarks.step"], json.loads(path.read_text())


def banks() -> tuple[list[str], dict]:
    """The cost of each additional SAE in a bank."""
    with tempfile.TemporaryDirectory() as scratch:
        path = pathlib.Path(scratch) / "banks.json"
        run(f"python -m benchmarks.banks --json={path}")
        return ["python -m benchmarks.banks"], json.loads(path.read_text())


def packing() -> tuple[list[str], dict]:
    """The time to tokenise and pack a long document."""
    with tempfile.TemporaryDirectory() as scratch:
        path = pathlib.Path(scratch) / "packing.json"
        run(f"python -m benchmarks.packing --json={path}")
        return ["python -m benchmarks.packing"], json.loads(path.read_text())


def suite(name: str, rows: int) -> tuple[list[str], dict]:
    """Trains and evaluates a suite of configs/quickstart_banks.py; an unfinished run is continued."""
    workdir = pathlib.Path("runs") / name
    # The commit at which training began; it can be older than the current commit.
    began = workdir / "commit"
    if not workdir.exists():
        workdir.mkdir(parents=True)
        began.write_text(commit())
    commands = [
        f"gemma-scope train quickstart_banks:{name} {workdir}",
        f"gemma-scope evaluate {workdir} --rows={rows} --fast",
    ]
    _, evaluate_s = (run(command) for command in commands)
    config, entries = loading.run_config(workdir), metrics_log.read_metrics(workdir)
    tokens = config.train.sequences_per_step * config.data.context_length
    # From the log, because a part of the run may be older. Compilation and checkpoints are not counted.
    train_s = sum(tokens / entry["speed"]["tokens_per_second"] for entry in entries)
    if (workdir / "pareto.png").exists():
        (IMAGES / f"{name}.png").write_bytes((workdir / "pareto.png").read_bytes())
    evaluated = json.loads((workdir / "evaluation.json").read_text())
    if name == "transcoders":
        evaluated["read_back"] = read_back(workdir)
    if name == "sites":
        trained_on = workdir / "on_training_text"
        commands.append(f"{commands[1]} --split=train --out={trained_on}")
        run(commands[-1])
        evaluated["on_training_text"] = json.loads((trained_on / "evaluation.json").read_text())["sae"]
    return commands, {
        "trained_at": began.read_text() if began.exists() else "unknown",
        "train_s": train_s,
        "evaluate_s": evaluate_s,
        "training": entries[-1]["sae"],
        **evaluated,
    }


def baselines() -> tuple[list[str], dict]:
    """The quickstart's SAE compared with its baselines."""
    workdir = pathlib.Path("runs/quickstart")
    commands = ["make quickstart", f"gemma-scope evaluate {workdir} --baselines --out={workdir}/baselines"]
    for command in commands:
        run(command)
    return commands, json.loads((workdir / "baselines" / "evaluation.json").read_text())


def read_back(workdir: pathlib.Path) -> dict[str, dict[str, float]]:
    """Relative errors of transcoders that are exported and read again, compared with the training form in float64.

    Each transcoder is exported in the format whose input it was trained on; the one with a skip connection also in
    SAELens' format. Tokens are counted separately if float32 may decide whether a pre-activation is above its
    threshold.
    """
    run, state = runs.open_run(workdir)
    rows = token_rows.open_rows(prepare.rows_of_run(run.config, workdir), token_rows.HELD_OUT)
    loaded = runs.load_gemma(run)
    tokens = jax.numpy.asarray(rows.read(np.arange(8)).tokens)
    kept = np.asarray(masking.is_kept(tokens, masking.masked_prefix(run.config.data)))
    found = {}
    for bank_name, file_format, kind in (
        ("plain", "gemma_scope", "mlp_in_gain_free"),
        ("skip", "gemma_scope_2", "mlp_in"),
        ("skip", "saelens", "mlp_in"),
    ):
        (plan,) = (b for b in run.plan.banks if b.name == bank_name)
        member = plan.members[0]
        with tempfile.TemporaryDirectory() as scratch:
            (path,) = export.export_run(workdir, (file_format,), pathlib.Path(scratch), bank_name)
            (stored,) = formats.read(path)
            again = stored.sae
        values = forward.read_sites(loaded, tokens, [Site(kind, member.site.layer)])
        x = np.asarray(next(iter(values.values())))[kept]
        got = np.asarray(jumprelu.decode(again, jumprelu.encode(again, x), x))

        trained = vars(state.banks[bank_name].params)
        p = {name: np.asarray(value[0], np.float64) for name, value in trained.items() if value is not None}
        read, target = (state.normalizers[str(site)] for site in (member.site, member.target_site))
        x = (x - np.float64(read.mean_D)) / float(read.scale)
        pre, threshold = x @ p["W_enc"] + p["b_enc"], np.exp(p["log_threshold"])
        expected = pre * (pre > threshold) @ p["W_dec"] + p["b_dec"]
        expected += x @ p["W_skip"] if member.skip else 0
        scale = float((target if plan.scale_target_by == "target" else read).scale)
        expected = scale * expected + np.float64(target.mean_D)

        error = np.linalg.norm(got - expected, axis=1) / np.linalg.norm(expected, axis=1)
        is_near = np.abs(pre - threshold).min(1) < 1e-5 * np.linalg.norm(x, axis=1)
        found[f"{bank_name} as {file_format}"] = {
            "tokens": error.size,
            "near_a_threshold": int(is_near.sum()),
            "median_relative_error": float(np.median(error)),
            "largest_elsewhere": float(error[~is_near].max()),
        }
    return found


def peers() -> tuple[list[str], dict]:
    """The speed of the same update in other libraries."""
    run("make --silent .venv-peers/installed")
    command = ["make", "--silent", "benchmark-peers"]
    return ["make benchmark-peers"], json.loads(
        subprocess.run(command, capture_output=True, check=True).stdout
    )


def tpu_evaluations() -> tuple[list[str], dict]:
    """The memory of evaluations on TPU slices."""
    run("make --silent .venv/libtpu")
    with tempfile.TemporaryDirectory() as scratch:
        path = pathlib.Path(scratch) / "tpu.json"
        command = "python -m benchmarks.tpu --evaluation=all"
        run(f"{command} --json={path}")
        return ["make .venv/libtpu", command], json.loads(path.read_text())


def tpu() -> tuple[list[str], dict]:
    """The memory of harvests and training steps on TPU slices."""
    run("make --silent .venv/libtpu")
    with tempfile.TemporaryDirectory() as scratch:
        path = pathlib.Path(scratch) / "tpu.json"
        run(f"python -m benchmarks.tpu --harvest=all --step=all --json={path}")
        return ["make .venv/libtpu", "python -m benchmarks.tpu --harvest=all --step=all"], json.loads(
            path.read_text()
        )


def precision() -> tuple[list[str], dict]:
    """The errors of activations in bfloat16."""
    run("make test-peers")
    with tempfile.TemporaryDirectory() as scratch:
        path = pathlib.Path(scratch) / "precision.json"
        run(f"python -m benchmarks.precision .peers --json={path}")
        return ["make test-peers", "python -m benchmarks.precision .peers"], json.loads(path.read_text())


def models_table() -> str:
    """A table of all registered models."""
    lines = ["| name | Hugging Face | layers | D | N·H | parameters, billions |", "|---|---|---|---|---|---|"]
    for name, known in registry.MODELS.items():
        config = known.module.config
        shapes = weights.parameter_shapes(known.module, config.num_layers)
        count = sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e9
        lines.append(
            f"| `{name}` | {known.hugging_face} | {config.num_layers} | {config.embed_dim:,} "
            f"| {config.num_heads * config.head_dim:,} | {count:.3f} |"
        )
    return "\n".join(lines)


# Descriptions and widths of the sites, for the table.
_SITES = {
    "embed": ("the token embeddings times √D", "D"),
    "attn_out": ("the heads' outputs, concatenated, before the output projection", "N·H"),
    "mlp_in_gain_free": ("the MLP's input, before the gain of its norm", "D"),
    "mlp_in": ("the MLP's input, after its norm", "D"),
    "mlp_out": ("the MLP's output, after its post-norm, as added to the residual stream", "D"),
    "resid_post": ("the residual stream after the block", "D"),
}


def sites_table() -> str:
    """A table of all kinds of sites."""
    lines = ["| site | activation | width | TransformerLens | Hugging Face |", "|---|---|---|---|---|"]
    for kind, names in SITES.items():
        lens, module = (name.format("L") for name in names)
        what, width = _SITES[kind]
        lines.append(f"| `{kind}` | {what} | {width} | `{lens}` | {f'`{module}`' if module else ''} |")
    return "\n".join(lines)


def precision_table(numbers: dict) -> str:
    """Relative errors in per cent, and losses, of each implementation."""
    ways = {
        "bfloat16, gemma's norms": "gemma",
        "bfloat16": "this package",
        "bfloat16, transformers": "transformers",
        "float32": "this package, float32",
    }
    lines = [f"| | {' | '.join(ways.values())} |", "|---|---|---|---|---|"]
    for site in next(iter(numbers["ways"].values()))["relative_error"]:
        errors = [numbers["ways"][way]["relative_error"][site] for way in ways]
        lines.append(f"| {site} | " + " | ".join(f"{100 * error:.2g}%" for error in errors) + " |")
    losses = " | ".join(f"{numbers['ways'][way]['loss']:.4f}" for way in ways)
    lines += [f"| loss, nats | {losses} |", ""]
    lines.append(f"Transformers' loss in float32 is {numbers['transformers_float32_loss']:.4f}.")
    return "\n".join(lines)


def tpu_table(numbers: dict) -> str:
    """Gigabytes on each chip, and times at peak rates."""
    lines = ["| compiled program | slice | weights, GB per chip | peak, GB per chip |", "|---|---|---|---|"]
    for case in numbers["harvests"]:
        split = ", split" if case["split"] else ""
        lines.append(
            f"| harvest of {case['model']} to layer {case['layer']}: {case['parameters'] / 1e9:.2f} billion "
            f"parameters{split} | {case['topology']} | {case['argument_bytes'] / 1e9:.2f} "
            f"| {case['peak_bytes'] / 1e9:.2f} |"
        )
    lines += [
        "",
        "| run | slice | mesh | peak / available, GB per chip | PFLOP per step | tokens/s at peak rates "
        "| hours at peak rates |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in numbers["steps"]:
        layers = f", layer {case['layers'][0]}" if case["layers"] else ""
        if "refused" in case:
            why = case["refused"]
            lines.append(
                f"| configs/{case['config']}.py:{case['suite']}{layers} | {case['topology']} | {why} | | | | |"
            )
            continue
        saes = f", {case['saes']} SAEs" if case["saes"] > 1 else ""
        lines.append(
            f"| configs/{case['config']}.py:{case['suite']}{layers}{saes} | {case['topology']} "
            f"| {case['data']} × {case['latent']} | {case['peak_bytes'] / 1e9:.1f} / {case['memory'] / 1e9:.0f} "
            f"| {(case['gemma_flops'] + case['banks_flops']) / 1e15:.2f} | {case['tokens_per_second']:,.0f} "
            f"| {case['hours']:.1f} |"
        )
    return "\n".join(lines)


def tpu_evaluations_table(numbers: dict) -> str:
    """The memory of evaluations on each chip, and their time at peak rates."""
    lines = [
        "| one SAE on 2,048 rows | slice | peak / available, GB per chip | PFLOP | minutes at peak rates |",
        "|---|---|---|---|---|",
    ]
    for case in numbers["evaluations"]:
        lines.append(
            f"| {case['model']}, layer {case['layer']}, {case['width']:,} latents | {case['topology']} "
            f"| {case['peak_bytes'] / 1e9:.1f} / {case['memory'] / 1e9:.0f} "
            f"| {(case['gemma_flops'] + case['sae_flops']) / 1e15:,.0f} | {case['minutes']:.1f} |"
        )
    return "\n".join(lines)


def numbers_table() -> str:
    """The definitions of all metrics of an evaluation."""
    lines = ["| metric | name in files | definition |", "|---|---|---|"]
    for name, metric in metrics.METRICS.items():
        lines.append(f"| {metric.label} | `{name}` | {metric.definition.replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def baselines_table(numbers: dict) -> str:
    """An SAE and its baselines."""
    keys = ("l0", "fvu", "delta_loss", "kl", "r_l0", "loss_recovered_mean")
    lines = [
        f"| | {' | '.join(metrics.METRICS[key].label for key in keys)} |",
        "|---" * (len(keys) + 1) + "|",
    ]
    for name, of in numbers["sae"].items():
        result = types.SimpleNamespace(**of)
        lines.append(f"| `{name}` | {' | '.join(page.shown(result, key) for key in keys)} |")
    cost = numbers["cost"]
    lines += [
        "",
        f"Measured on {of['rows']} held-out rows. A batch took {cost['seconds']:.1f} s. At the speed of its clean "
        f"pass, that pass with two ablations and one splice per SAE would take {cost['bound_seconds']:.1f} s.",
    ]
    return "\n".join(lines)


def sites_suite_table(numbers: dict) -> str:
    """L0, FVU and delta loss at each site of each layer, and their means on held-out and training text."""
    kinds = ("resid_post", "mlp_out", "attn_out")
    keys = ("l0", "fvu", "delta_loss")
    lines = [
        "| layer | " + " | ".join(f"{kind}: L0 | FVU | delta loss, nats" for kind in kinds) + " |",
        "|---" * (1 + 3 * len(kinds)) + "|",
    ]
    of_site = {
        tuple(re.match(r"layer_(\d+)_([a-z_]+?)_width", name).groups()): name for name in numbers["sae"]
    }
    for layer in range(18):
        cells = [str(layer)]
        for kind in kinds:
            result = types.SimpleNamespace(**numbers["sae"][of_site[str(layer), kind]])
            cells += [
                f"{result.l0:.1f}",
                f"{result.fvu:.3f}",
                f"{result.delta_loss:.3f} ± {result.delta_loss_se:.3f}",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| mean over layers | " + " | ".join(kinds) + " |", "|---|---|---|---|"]
    for key in keys:
        for what, results in (("held-out", numbers["sae"]), ("training text", numbers["on_training_text"])):
            means = [
                np.mean([results[name][key] for (_, k), name in of_site.items() if k == kind])
                for kind in kinds
            ]
            lines.append(
                f"| {metrics.METRICS[key].label}, {what} | {' | '.join(f'{mean:.3f}' for mean in means)} |"
            )
    first = next(iter(numbers["sae"].values()))
    minutes = [f"{numbers[key] / 60:.0f}" for key in ("train_s", "evaluate_s")]
    lines += [
        "",
        f"Measured on {first['rows']} rows with {first['tokens']:,} predictions. Training took {minutes[0]} minutes, "
        f"the evaluation on held-out rows {minutes[1]} minutes.",
    ]
    return "\n".join(lines)


def suite_table(numbers: dict) -> str:
    """The SAEs of a suite, in the order of its banks."""
    first = next(iter(numbers["sae"].values()))
    lines = [
        "| | L0 | FVU | delta loss, nats | loss recovered | never fire | dense |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, of in numbers["sae"].items():
        lines.append(
            f"| `{name}` | {of['l0']:.1f} | {of['fvu']:.3f} | {of['delta_loss']:.3f} ± {of['delta_loss_se']:.3f} "
            f"| {of['loss_recovered_mean']:.3f} | {of['dead_fraction']:.1%} | {of['dense_fraction']:.1%} |"
        )
    minutes = [f"{numbers[key] / 60:.0f}" for key in ("train_s", "evaluate_s")]
    return "\n".join(
        [
            *lines,
            "",
            f"Measured on {first['rows']} held-out rows with {first['tokens']:,} predictions. Loss recovered is "
            f"relative to mean ablation. Training took {minutes[0]} minutes, the evaluation {minutes[1]} minutes.",
            *(
                f"Exported and read again ({how}), the outputs have a median relative error of "
                f"{of['median_relative_error']:.1e} over {of['tokens']:,} tokens, compared with the training form in "
                f"float64. The largest error is {of['largest_elsewhere']:.1e}, except for {of['near_a_threshold']} "
                "tokens with a pre-activation within 1e-5 ‖x‖ of its threshold."
                for how, of in numbers.get("read_back", {}).items()
            ),
        ]
    )


def banks_table(numbers: dict) -> str:
    """The time of a step for each size of the bank."""
    lines = [
        "| SAEs | one step, s | separate runs, s | each additional SAE ÷ its five matmuls |",
        "|---|---|---|---|",
    ]
    for row in numbers["sizes"]:
        extra = row["extra_sae_over_five_matmuls"]
        ratio = f"{extra:.2f}" if extra else ""
        lines.append(f"| {row['saes']} | {row['step_s']:.2f} | {row['separate_runs_s']:.2f} | {ratio} |")
    return "\n".join(lines)


def packing_table(numbers: dict) -> str:
    """Seconds for each length of the document."""
    lines = ["| one document | seconds |", "|---|---|"]
    for kind, unit in (("tokenising", "characters"), ("packing", "tokens")):
        lines += [f"| {kind} {row[unit]:,} {unit} | {row['seconds']:.2g} |" for row in numbers[kind]]
    return "\n".join([*lines, "", f"Measured on {numbers['processor']}."])


def tables() -> dict[str, str]:
    """The tables of the documents, by the name in the marker before each table; measured ones with their source."""
    stored = {path.name: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    made = {name: of["numbers"] for name, of in stored.items()}
    shown = {"models": models_table(), "sites": sites_table(), "numbers": numbers_table()}
    by_file = {
        "tpu.json": tpu_table,
        "tpu_evaluations.json": tpu_evaluations_table,
        "precision.json": precision_table,
        "banks.json": banks_table,
        "packing.json": packing_table,
        "baselines.json": baselines_table,
        **dict.fromkeys((f"{name}.json" for name in SUITES), suite_table),
        "sites.json": sites_suite_table,
        **{f"{name}.json": table for name, (_, table) in looks.LOOKS.items()},
    }
    for name, table in by_file.items():
        if name in made:
            shown[f"results/{name}"] = table(made[name])
    if "links.json" in made:
        shown["flow"] = looks.flow_table(made["links.json"])
    if numbers := made.get("quickstart.json"):
        few, many = (next(iter(numbers[rows]["sae"].values())) for rows in ("rows_64", "rows_512"))

        def line(label: str, form: str) -> str:
            return f"| {label} | {form.format(**few)} | {form.format(**many)} |"

        shown["results/quickstart.json"] = "\n".join(
            [
                f"| on held-out rows | {few['rows']} (`make quickstart`) | {many['rows']} |",
                "|---|---|---|",
                line("L0, latents that fire on a token", "{l0:.1f}"),
                line("clean loss, nats", "{clean_loss:.2f}"),
                line("delta loss, nats", "{delta_loss:.3f} ± {delta_loss_se:.3f}"),
                line("loss recovered, against mean ablation", "{loss_recovered_mean:.3f}"),
                line("FVU", "{fvu:.3f}"),
                line("latents that never fire", "{dead_fraction:.1%}"),
            ]
        )
    if numbers := made.get("step.json"):
        shown["results/step.json"] = "\n".join(
            [
                "| | measured |",
                "|---|---|",
                "| SAE update ÷ the five dense matmuls it needs (640 × 4,096, batch 1,024, float32) "
                f"| {numbers['update_over_five_matmuls']:.2f} |",
                "| FLOP rate of the harvest ÷ that of a 4,096 × 4,096 matmul "
                f"| {numbers['harvest_over_matmul_rate']:.2f} |",
                f"| fused step ÷ the sum of its parts | {numbers['fused_over_parts']:.2f} |",
            ]
        )
    if "peers.json" in made and "step.json" in made:
        ours, theirs = made["step.json"], made["peers.json"]
        shown["results/peers.json"] = "\n".join(
            [
                "| implementation | ms per update | ÷ five matmuls in the same framework |",
                "|---|---|---|",
                f"| this package | {ours['update_ms']:.0f} | {ours['update_over_five_matmuls']:.2f} |",
                *(
                    f"| {label} | {theirs[f'{name}_ms']:.0f} | {theirs[f'{name}_over_five_matmuls']:.2f} |"
                    for name, label in (
                        ("sae_lens", "SAELens 6.54"),
                        ("dictionary_learning", "dictionary_learning 0.1"),
                    )
                ),
                "",
                f"The five matmuls take {ours['five_matmuls_ms']:.0f} ms in JAX and "
                f"{theirs['five_matmuls_ms']:.0f} ms in torch (`make benchmark-peers`).",
            ]
        )
    return {name: f"{table}{_source(name, stored)}" for name, table in shown.items()}


def _source(name: str, stored: Mapping[str, dict]) -> str:
    """The command, commit, date and machine of a measured table, as a line below it; nothing for other tables."""
    file = name.removeprefix("results/")
    if file not in stored:
        return ""
    of = stored[file]
    hardware = f", {of['hardware']}" if "hardware" in of else ""
    command = f"python -m benchmarks.results {file.removesuffix('.json')}"
    return f"\n\nMeasured by `{command}`, commit {of['commit'][:7]}, {of['date'][:10]}{hardware}."


def update_documents() -> None:
    """Writes the tables between their markers in the documents."""
    made = tables()
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        for name in re.findall(r"<!-- (\S+) -->", text):
            if name in made:
                before, rest = text.split(f"<!-- {name} -->\n")
                text = (
                    f"{before}<!-- {name} -->\n{made[name]}\n<!-- end -->{rest.split('<!-- end -->', 1)[1]}"
                )
        path.write_text(text, encoding="utf-8")


def main() -> None:
    """Measures the named results, or all of them, and updates the tables."""
    known = {
        "quickstart": quickstart,
        "baselines": baselines,
        "step": step,
        "tpu": tpu,
        "tpu_evaluations": tpu_evaluations,
        "banks": banks,
        "packing": packing,
        **{name: functools.partial(suite, name, rows) for name, rows in SUITES.items()},
        **{name: measure for name, (measure, _) in looks.LOOKS.items()},
        "peers": peers,
        "precision": precision,
    }
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names",
        nargs="*",
        choices=[*known, "tables"],
        default=[
            "quickstart",
            "baselines",
            "step",
            "tpu",
            "tpu_evaluations",
            "banks",
            "packing",
            *SUITES,
            *looks.LOOKS,
        ],
        help="results to measure",
    )
    RESULTS.mkdir(exist_ok=True)
    for name in parser.parse_args().names:
        if name == "tables":
            continue
        commands, numbers = known[name]()
        made = {
            "commands": commands,
            "commit": commit(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "hardware": packing_lib.processor(),
            "numbers": numbers,
        }
        (RESULTS / f"{name}.json").write_text(json.dumps(made, indent=1) + "\n")
    update_documents()


if __name__ == "__main__":
    main()
