"""The commands that measure: `evaluate`, `compare`, `detect`, `probe`.

Each imports what it runs when it runs: --help must not take seconds.
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
    Seed,
)


def evaluate(
    path: Positional[str],
    rows: MaybeCount = None,
    rows_per_batch: MaybeCount = None,
    split: Literal["held_out", "train"] = "held_out",
    fast: Flag = False,
    baselines: Flag = False,
    text: Repeated[str] = (),
    turns: Literal["all", "user", "model"] | None = None,
    out: MaybePlace = None,
    others: Others = AS_SAID,
) -> None:
    """Evaluate SAEs: how sparse they are, what they give back, and what they cost Gemma's predictions.

    gemma-scope evaluate runs/quickstart --rows 64

    gemma-scope evaluate hf://google/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82 --dtype bfloat16

    Args:
      path: a run directory; or a path or hf://OWNER/NAME/FOLDER of an SAE in any format, or of several with *.
      rows: how many to evaluate on, at most all.
      rows_per_batch: in one pass of the model.
      split: which rows.
      fast: without KL and r_L0, which take most of the time.
      baselines: beside each SAE its own top k, a random decoder, an untrained SAE and principal components.
      text: to evaluate on, as data.text of a config. May be given again, each SOURCE or NAME=SOURCE; then there is a
        table by text.
      turns: in the chat template, whose turns count.
      out: folder for the results; by default the path or, for another text or model, evaluations/… below it.
      others: of the model and of files.
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


def compare(folders: Positional[tuple[Place, ...]], out: Place) -> None:
    """Set evaluations side by side, each held against the first.

    gemma-scope compare runs/a runs/b --out compared

    Args:
      folders: what evaluate was given, or its --out; two or more.
      out: folder to write to.
    """
    common.check_outputs(out=out)
    from gemma_scope_jax.cli import compare as compare_lib

    compare_lib.compare(folders, out)


def detect(
    path: Positional[str],
    text: MaybeText = None,
    rows: MaybeCount = None,
    latents: Count = 100,
    seed: Seed = 0,
    rows_per_batch: MaybeCount = None,
    out: MaybePlace = None,
    others: Others = AS_SAID,
) -> None:
    """Measure whether what a latent's strongest passages share tells where else it fires.

    gemma-scope detect runs/quickstart --rows 64 --latents 20

    Args:
      path: as for evaluate.
      text: another than the run's, as data.text of a config.
      rows: held-out rows.
      latents: so many of each SAE are scored.
      seed: of the latents and positions that are drawn.
      rows_per_batch: in one pass of the model.
      out: folder for the results; by default as for evaluate.
      others: of the model and of files.
    """
    common.check_outputs(out=out)
    from gemma_scope_jax.cli import detect as detect_lib

    detect_lib.detect_path(path, rows, latents, seed, rows_per_batch, out, text=text, **others.given())


def probe(
    path: Positional[str],
    labelled: Place,
    seed: Seed = 0,
    rows_per_batch: MaybeCount = None,
    out: MaybePlace = None,
    others: Others = AS_SAID,
) -> None:
    """Measure how well a few latents tell the classes of labelled texts apart.

    gemma-scope probe runs/quickstart --labelled texts.jsonl

    Args:
      path: as for evaluate.
      labelled: a .jsonl file of a "text" and a "label" each, and perhaps a "group" that is not to be divided.
      seed: of the split into training and test texts.
      rows_per_batch: texts in one pass of the model.
      out: folder for the results; by default as for evaluate.
      others: of the model and of files.
    """
    common.check_outputs(out=out)
    from gemma_scope_jax.cli import probe as probe_lib

    probe_lib.probe_path(path, labelled, seed, rows_per_batch, out, **others.given())
