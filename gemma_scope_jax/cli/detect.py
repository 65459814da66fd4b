"""`detect`: how well a latent's strongest passages predict where else it fires."""

import pathlib

from gemma_scope_jax.cli.common import refresh, say
from gemma_scope_jax.data import batching, token_rows
from gemma_scope_jax.evaluation import detection, opening
from gemma_scope_jax.models import masking, placement, tokenizer
from gemma_scope_jax.runtime import files, printing, ranges


def detect_path(
    path: str | pathlib.Path,
    rows: int | None = None,
    latents: int = 100,
    seed: int = 0,
    rows_per_batch: int | None = None,
    out: pathlib.Path | None = None,
    **overrides: str | None,
) -> dict[str, detection.Detection]:
    """Scores latents of the SAEs at a path; writes detection.json and prints a table.

    Args:
      path: of a run or of SAEs; see `opening.open_path`.
      rows: the number of held-out rows to read, at most all; None: the config's.
      latents: the number of latents of each SAE to score, at most.
      seed: of the choice of latents and positions.
      rows_per_batch: rows in one forward pass; None: the config's.
      out: the folder to write to; None: see `opening.results_folder`.
      **overrides: settings that override the run's; see `opening.open_path`.

    Returns:
      The scores by SAE.
    """
    refresh(path)
    opened = opening.open_path(path, **overrides)
    config = opened.config
    rows = config.evaluation.rows if rows is None else rows
    per_batch = config.evaluation.rows_per_batch if rows_per_batch is None else rows_per_batch
    for name, value in (("rows", rows), ("latents", latents), ("rows_per_batch", per_batch)):
        ranges.check(f"--{name.replace('_', '-')}", value, ranges.COUNT)
    ranges.check("--seed", seed, ranges.SEED)
    out = opening.results_folder(opened, path, out)
    held_out = token_rows.open_rows(opened.rows, token_rows.HELD_OUT)
    order = token_rows.order(len(held_out), batching.ORDER_SEED, 0, min(rows, len(held_out)))
    decode = tokenizer.load(config.model, config.tokenizer, config.weights).decode
    gemma = placement.load_gemma(config)
    results = detection.detect(
        gemma,
        opened.subjects,
        held_out.read(order),
        latents,
        seed,
        per_batch,
        decode,
        masking.masked_prefix(config.data),
    )
    about = {
        "model": config.model,
        "step": opened.step,
        "text": printing.shareable(config.data.text),
        "context_length": config.data.context_length,
        "rows": len(order),
        "seed": seed,
    }
    written = {name: detection.numbers(result) for name, result in results.items()}
    files.write_json(out / "detection.json", about | {"sae": written})
    detection.print_tables(results, len(order))
    say(f"Wrote {out / 'detection.json'}")
    return results
