"""Makes the numbers of the README again, into results/*.json.

    python -m benchmarks.results [NAME ...]

Names: quickstart, step, and peers, which needs Python 3.11 and is left out when none is given.

Each file holds the commands, the commit, the time and the numbers. A test compares the README with them.
"""

import argparse
import datetime
import json
import pathlib
import subprocess
import sys
import tempfile
import time

from gemma_scope_jax import data, training

RESULTS = pathlib.Path("results")


def run(command: str) -> float:
    """Runs a command, shows it and its output; returns the seconds it took. `python` is this Python."""
    print(f"$ {command}", flush=True)
    start = time.perf_counter()
    program, *arguments = command.split()
    subprocess.run([sys.executable if program == "python" else program, *arguments], check=True)
    return time.perf_counter() - start


def quickstart() -> tuple[list[str], dict]:
    """The quickstart's SAE on 512 held-out rows, and on the 64 that the quickstart itself evaluates."""
    with tempfile.TemporaryDirectory() as scratch:
        workdir = pathlib.Path(scratch) / "run"
        quickstart_s = run(f"make quickstart RUN={workdir}")
        few = json.loads((workdir / "evaluation.json").read_text())
        run(f"python evaluate.py {workdir} --rows=512")
        many = json.loads((workdir / "evaluation.json").read_text())
        rows = data.open_rows(training.prepare_rows(training.read_config(workdir)), data.TRAIN)
        ours, perfect = training.shuffle_quality(workdir, rows)
        (RESULTS / "quickstart.png").write_bytes((workdir / "evaluation.png").read_bytes())
    numbers = {
        "quickstart_s": quickstart_s,
        "same_document_pairs": ours,
        "same_document_pairs_in_a_perfect_shuffle": perfect,
        "rows_64": few,
        "rows_512": many,
    }
    commands = ["make quickstart", "python evaluate.py runs/quickstart --rows=512"]
    return commands, numbers


def step() -> tuple[list[str], dict]:
    """The speed of the step."""
    with tempfile.TemporaryDirectory() as scratch:
        path = pathlib.Path(scratch) / "step.json"
        run(f"python -m benchmarks.step --json={path}")
        return ["python -m benchmarks.step"], json.loads(path.read_text())


def peers() -> tuple[list[str], dict]:
    """The speed of the same update elsewhere."""
    run("make --silent .venv-peers/installed")
    command = ["make", "--silent", "benchmark-peers"]
    return ["make benchmark-peers"], json.loads(
        subprocess.run(command, capture_output=True, check=True).stdout
    )


def tables() -> dict[str, str]:
    """What the README shows of each results file, by the file's name."""
    made = {path.name: json.loads(path.read_text())["numbers"] for path in sorted(RESULTS.glob("*.json"))}
    shown = {}
    if numbers := made.get("quickstart.json"):
        few, many = (next(iter(numbers[rows]["sae"].values())) for rows in ("rows_64", "rows_512"))

        def line(label: str, form: str) -> str:
            return f"| {label} | {form.format(**few)} | {form.format(**many)} |"

        shown["quickstart.json"] = "\n".join(
            [
                f"| held-out rows | {few['rows']} (`make quickstart`) | {many['rows']} |",
                "|---|---|---|",
                line("predictions scored", "{tokens:,}"),
                line("L0", "{l0:.1f}"),
                line("**delta loss**, nats", "**{delta_loss:.3f} ± {delta_loss_se:.3f}**"),
                line("FVU, outliers in full", "{fvu:.3f}"),
                line("clean loss", "{clean_loss:.3f}"),
                line("mean ablation", "{mean_ablation_loss:.3f}"),
                line("loss recovered (mean ablation)", "{loss_recovered_mean:.3f}"),
                line("loss recovered (zero ablation)", "{loss_recovered_zero:.3f}"),
                line("latents that never fire", "{dead_fraction:.1%}"),
                "",
                f"`make quickstart` took {numbers['quickstart_s'] / 60:.1f} minutes after the installation. "
                "Of the pairs of activations in a batch, "
                f"{numbers['same_document_pairs']:.2%} come from one document; in a perfect shuffle "
                f"{numbers['same_document_pairs_in_a_perfect_shuffle']:.2%} would.",
            ]
        )
    if numbers := made.get("step.json"):
        shown["step.json"] = "\n".join(
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
        shown["peers.json"] = "\n".join(
            [
                "| the same update | ms | ÷ five matmuls of its own framework |",
                "|---|---|---|",
                f"| here | {ours['update_ms']:.0f} | {ours['update_over_five_matmuls']:.2f} |",
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
    return shown


def update_readme(path: pathlib.Path = pathlib.Path("README.md")) -> None:
    """Puts the tables between their markers."""
    text = path.read_text(encoding="utf-8")
    for name, table in tables().items():
        before, rest = text.split(f"<!-- results/{name} -->\n")
        text = f"{before}<!-- results/{name} -->\n{table}\n<!-- end -->{rest.split('<!-- end -->', 1)[1]}"
    path.write_text(text, encoding="utf-8")


def main() -> None:
    """Measures what is named, or everything."""
    known = {"quickstart": quickstart, "step": step, "peers": peers}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", choices=list(known), default=["quickstart", "step"], help="results to make"
    )
    RESULTS.mkdir(exist_ok=True)
    for name in parser.parse_args().names:
        commands, numbers = known[name]()
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        made = {
            "commands": commands,
            "commit": commit,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "numbers": numbers,
        }
        (RESULTS / f"{name}.json").write_text(json.dumps(made, indent=1) + "\n")
        update_readme()


if __name__ == "__main__":
    main()
