"""A published run has Google's layout, a model card with the measured numbers, and no private data."""

import dataclasses
import json
import pathlib
import shutil
import types

import huggingface_hub
import numpy as np
import pytest
import tiny
import yaml

from gemma_scope_jax.cli import evaluate as evaluate_cli
from gemma_scope_jax.data import prepare
from gemma_scope_jax.saes import loading
from gemma_scope_jax.saes.formats import saelens
from gemma_scope_jax.training import loop, publish, runs

BANKS = {
    "main": dict(
        layers=(1, 2), sparsity_coefficients=(1e-3, 1e-2), width=64, bandwidth=0.1, initial_threshold=0.1
    )
}


@pytest.fixture(scope="module")
def evaluated(inputs, tmp_path_factory):
    """The workdir of a run with four SAEs, and their evaluations."""
    workdir = tmp_path_factory.mktemp("published") / "run"
    loop.train(tiny.run_config(inputs, banks=BANKS), workdir)
    return workdir, evaluate_cli.evaluate_path(workdir, rows=8)


@pytest.mark.parametrize("file_format", ("saelens", "gemma_scope"))
def test_a_repository_has_googles_layout_and_the_measured_numbers(evaluated, tmp_path, file_format):
    workdir, results = evaluated
    out = tmp_path / "out"
    paths = publish.publish(workdir, out, "someone/tiny-saes", "cc-by-4.0", file_format)
    card = huggingface_hub.ModelCard.load(out / "README.md")
    assert (card.data.license, card.data.base_model) == ("cc-by-4.0", "test/tiny")
    assert len(paths) == 4
    for (name, result), path in zip(results.items(), paths, strict=True):
        place = path if file_format == "saelens" else path.parent
        kind, layer, width, l0 = place.relative_to(out).parts
        assert (kind, layer, width) == ("resid_post", name[: len("layer_1")], "width_64")
        (row,) = (line for line in card.text.splitlines() if line.startswith(f"| `{place.relative_to(out)}`"))
        shown = [cell.strip() for cell in row.split("|")[2:-1]]
        assert shown[:2] == [f"{result.l0:.1f}", f"{result.fvu:.4f}"]
        assert shown[2] == f"{result.delta_loss:.4f} ± {result.delta_loss_se:.4f}"
        (found,) = loading.read(path, "tiny", f"{layer}_resid_post")
        assert np.isfinite(found.sae.W_enc).all()
        # All names use the L0 on held-out rows.
        assert l0.split("_lambda_")[0] == f"average_l0_{result.l0:.0f}"
        assert found.about.l0 in (None, round(result.l0, 2))
    assert "1,280 token positions of" in card.text and "λ 0.001, 0.01" in card.text
    assert "Gemma in float32, with weights from `weights`" in card.text and "of `text.jsonl`" in card.text
    for path in out.rglob("*"):  # No file names a folder of this machine.
        assert not path.is_file() or str(workdir.parents[1]).encode() not in path.read_bytes(), path
    assert "{{" not in card.text
    # The card has Gemma's terms, the limits of the evaluation, a verdict and a picture.
    assert (
        "[Gemma Terms of Use](https://ai.google.dev/gemma/terms)" in card.text
        and "under `cc-by-4.0`" in card.text
    )
    assert "rows longer than 16 tokens" in card.text and "problems" in card.text
    assert "![How often latents fire](evaluation.png)" in card.text
    assert (out / "evaluation.png").read_bytes() == (workdir / "evaluation.png").read_bytes()
    if file_format == "gemma_scope":
        return
    registry = yaml.safe_load((out / "saelens_registry.yaml").read_text())["tiny-saes"]
    assert registry["repo_id"] == "someone/tiny-saes" and registry["conversion_func"] is None
    for entry, result in zip(registry["saes"], results.values(), strict=True):
        saelens.read(out / entry["path"])
        assert entry["l0"] == round(result.l0, 2)
    asked = json.loads((out / "neuronpedia.json").read_text())
    ids = [source["id"] for source in asked["sources"]]
    assert len(set(ids)) == 4 and ids[0].startswith("1-tiny-saes-resid-post-width-64-lambda-0-001")
    sets = {source["setName"] for source in asked["sources"]}
    # A source set holds the same kind of SAE at all layers.
    assert len(sets) == 2 and sets == {made["name"] for made in asked["sourcesets"]}


def test_only_evaluated_saes_are_published(evaluated, tmp_path):
    workdir, _ = evaluated
    measured = workdir / "evaluation.json"
    whole = measured.read_text()
    told = json.loads(whole)
    name = next(iter(told["sae"]))
    for changed in (
        told | {"step": told["step"] - 1},
        told | {"sae": {k: v for k, v in told["sae"].items() if k != name}},
    ):
        measured.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=r"of all SAEs of this run at step 14; run gemma-scope evaluate"):
            publish.publish(workdir, tmp_path / "out", "someone/tiny-saes", "mit")
    others = {"split": "train", "text": "papers", "dtype": "bfloat16", "turns": "model", "weights": "other"}
    for name, value in others.items():
        measured.write_text(json.dumps(told | {name: value}))
        with pytest.raises(
            ValueError, match=f"measured with {name} {value}, not with the run's own held-out rows"
        ):
            publish.publish(workdir, tmp_path / "out", "someone/tiny-saes", "mit")
    measured.write_text(whole)
    for repository in ("tiny-saes", "/", "someone/", "a/b/c"):
        with pytest.raises(ValueError, match="is not OWNER/NAME"):
            publish.publish(workdir, tmp_path / "out", repository, "mit")
    with pytest.raises(ValueError, match="is not a run directory"):
        publish.publish(tmp_path, tmp_path / "out", "someone/tiny-saes", "mit")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="already exists"):
        publish.publish(workdir, tmp_path / "mine", "someone/tiny-saes", "mit")
    assert not (tmp_path / "out").exists()


def test_the_card_reports_an_unfinished_warmup_of_lambda(evaluated, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(evaluated[0], workdir)
    publish.publish(workdir, tmp_path / "whole", "someone/tiny-saes", "cc-by-4.0")
    config = json.loads((workdir / "config.json").read_text())
    config["optimizer"]["sparsity_warmup_updates"] = 160
    (workdir / "config.json").write_text(json.dumps(config))
    publish.publish(workdir, tmp_path / "short", "someone/tiny-saes", "cc-by-4.0")
    whole, short = ((tmp_path / name / "README.md").read_text() for name in ("whole", "short"))
    assert "; 40 updates with batches of 32\n" in whole and "λ warmed up over 8 updates\n" in whole
    assert (
        "λ warmed up over 160 updates, but the run was shorter: λ ended at 25% of its value above\n" in short
    )


def test_a_licence_is_required(evaluated, tmp_path):
    for licence in ("", "CC BY 4.0"):
        with pytest.raises(ValueError, match=r"choose a licence for your SAEs.*/gemma/terms"):
            publish.publish(evaluated[0], tmp_path / "out", "someone/tiny-saes", licence)
    assert not (tmp_path / "out").exists()


def test_user_names_and_credentials_are_not_published(evaluated, tmp_path, monkeypatch):
    """Paths and addresses in a config can contain them; the files do not have to exist."""
    workdir, _ = evaluated
    secrets = ("alice", "hunter2", "hf_" + "a" * 30, "Signature")
    text = f"https://alice:hunter2@host.org/{secrets[2]}/text.jsonl?Signature=alice"
    given = {
        "text": "/home/alice/text.jsonl",
        "weights": text,
        "tokenizer": "file:///home/alice/tokenizer.model",
    }
    run, state = runs.open_run(workdir)
    config = dataclasses.replace(
        run.config,
        weights=given["weights"],
        tokenizer=given["tokenizer"],
        data=dataclasses.replace(run.config.data, text=given["text"]),
    )
    measured = json.loads((workdir / "evaluation.json").read_text())
    changed = tmp_path / "run"
    changed.mkdir()
    (changed / "evaluation.json").write_text(json.dumps(measured | given))
    (changed / "evaluation.png").write_bytes(b"")
    (changed / "metrics.jsonl").write_bytes((workdir / "metrics.jsonl").read_bytes())
    monkeypatch.setattr(loading, "is_run", lambda path: True)
    monkeypatch.setattr(runs, "open_run", lambda path: (dataclasses.replace(run, config=config), state))
    monkeypatch.setattr(prepare, "rows_of_run", lambda config, path: pathlib.Path("rows_0/1.0.0"))
    publish.publish(changed, tmp_path / "out", "someone/tiny-saes", "mit")
    for path in (tmp_path / "out").rglob("*"):
        for secret in secrets if path.is_file() else ():
            assert secret.encode() not in path.read_bytes(), (path, secret)
    assert "`https://host.org/hf_…/text.jsonl`" in (tmp_path / "out" / "README.md").read_text()


def test_pushing_uploads_the_folder_and_prints_the_address(evaluated, tmp_path, monkeypatch, capsys):
    workdir, _ = evaluated
    done = []
    api = types.SimpleNamespace(
        create_repo=lambda name, exist_ok: done.append(name) or f"https://hub/{name}",
        upload_folder=lambda repo_id, folder_path: done.append((repo_id, folder_path)),
    )
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    publish.publish(workdir, tmp_path / "out", "someone/tiny-saes", "mit", is_pushed=True)
    assert done == ["someone/tiny-saes", ("someone/tiny-saes", tmp_path / "out")]
    assert "Pushed to https://hub/someone/tiny-saes" in capsys.readouterr().out

    def refuse(*args, **kwargs):
        raise OSError("401")

    monkeypatch.setattr(api, "create_repo", refuse)
    with pytest.raises(ValueError, match=r"cannot push to someone/tiny-saes .*log in with `hf auth login`"):
        publish.publish(workdir, tmp_path / "again", "someone/tiny-saes", "mit", is_pushed=True)
