"""Runs, a checkpoint and exports of the first version of this code still open, and evaluate to the same numbers.

Commit 2174244 made `fixtures/first_generation.tar.xz`. It contains the small model and its text (`inputs`), a run of
20 steps (`finished`) with its evaluation on eight rows, the same run stopped after six steps (`stopped`), and the
finished run exported to every format (`exports`). Its paths are relative, so it can be unpacked in any folder.
"""

import json
import pathlib
import re
import tarfile

import numpy as np
import pytest

from gemma_scope_jax.cli import evaluate as evaluate_cli
from gemma_scope_jax.saes import formats, loading
from gemma_scope_jax.training import export, loop, runs

ARCHIVE = pathlib.Path(__file__).parent / "fixtures" / "first_generation.tar.xz"
# XLA rounds differently on another machine, and twenty steps amplify the difference.
ROUNDING = dict(rtol=1e-3, atol=1e-5)


@pytest.fixture
def first_generation(tmp_path, monkeypatch):
    """The unpacked archive, as the current folder."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def saes_of(workdir):
    run, state = runs.open_run(workdir)
    return dict(export.folded_saes(run.plan, state))


def assert_same(found, wanted, **tolerance):
    for name, value in vars(wanted).items():
        if value is None:
            assert getattr(found, name) is None
        else:
            np.testing.assert_allclose(getattr(found, name), value, **tolerance)


def test_a_finished_run_folds_to_the_saes_that_it_wrote(first_generation):
    found = saes_of(first_generation / "finished")
    written = {one.name: one.sae for one in loading.read(first_generation / "finished" / "sae" / "*")}
    assert len(found) == 4 and found.keys() == written.keys()
    for name, sae in found.items():
        assert_same(sae, written[name], rtol=2e-6, atol=1e-6)  # Folding again rounds differently.


def test_a_stopped_run_resumes_to_the_same_end(first_generation):
    workdir = first_generation / "stopped"
    loop.train(loading.run_config(workdir), workdir)
    assert int(runs.open_run(workdir)[1].step) == 20
    wanted = saes_of(first_generation / "finished")
    for name, sae in saes_of(workdir).items():
        assert_same(sae, wanted[name], **ROUNDING)


def test_a_finished_run_evaluates_to_the_same_numbers(first_generation):
    before = json.loads((first_generation / "finished" / "evaluation.json").read_text())["sae"]
    now = evaluate_cli.evaluate_path("finished", rows=8, rows_per_batch=4, out=first_generation / "out")
    for name, result in now.items():
        for number in ("l0", "fvu", "delta_loss", "delta_loss_se", "kl", "r_l0", "cosine", "dead_fraction"):
            assert getattr(result, number) == pytest.approx(before[name][number], rel=1e-4, abs=1e-5), number


@pytest.mark.parametrize("file_format", formats.written())
def test_exports_of_every_format_are_read(first_generation, file_format):
    finished = saes_of(first_generation / "finished").values()
    exported = first_generation / "exports" / file_format
    files = [path for path in exported.rglob("*") if path.suffix in (".safetensors", ".npz", ".pt")]
    places = sorted({path.parent for path in files})
    assert places
    for place in places:
        layer = re.search(r"layer_\d", str(place.relative_to(exported)) + files[0].name)[0]
        site = (
            f"{layer}_resid_post" if file_format == "gemma_scope" else ""
        )  # Its files do not name the site.
        (one,) = loading.read(place, "tiny", site)
        # Not exact: XLA's optimisations may differ from then, and fused multiply-adds round only once.
        assert any(np.allclose(one.sae.b_dec, sae.b_dec, rtol=1e-6, atol=0) for sae in finished)
