"""Evaluation, compared with slow float64 NumPy and known cases; and the command line."""

import csv
import errno
import fcntl
import json
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from toys import Rows, random_sae

from gemma_scope_jax.analysis import session
from gemma_scope_jax.cli import compare as compare_cli
from gemma_scope_jax.cli import evaluate as evaluate_cli
from gemma_scope_jax.data import batching, token_rows
from gemma_scope_jax.evaluation import evaluate as evaluate_lib
from gemma_scope_jax.evaluation import metrics, opening
from gemma_scope_jax.models import (
    forward,
    masking,
    passes,
    placement,
    predictions,
    registry,
    weights,
)
from gemma_scope_jax.models.sites import SITES, Site, site_width
from gemma_scope_jax.runtime import resumable
from gemma_scope_jax.saes import attached, evaluation_file, jumprelu
from gemma_scope_jax.saes.formats import saelens
from gemma_scope_jax.training import loop

SITE = Site("resid_post", 1)


@pytest.fixture(scope="module")
def rows():
    return Rows(tiny.tokens(12, 24, special=0.1))


def evaluate(tiny_gemma, subject, rows, count=10, site=SITE, mean=None, per_batch=4):
    mean = np.full(subject.W_enc.shape[0], 0.5, np.float32) if mean is None else mean
    subjects = {"a": attached.Subject(subject, site, mean)}
    return evaluate_lib.evaluate(tiny_gemma, subjects, rows, rows, count, per_batch)[0]["a"]


def loss_in_float64(tiny_gemma, tokens, replace):
    """The summed loss and the count of each row, with the site's activations replaced one row at a time."""
    sums, counts = [], []
    for row in tokens:
        row = jnp.asarray(row)[None]

        def write(x, row=row):
            replaced = jnp.asarray(replace(np.asarray(x[0], np.float64)), x.dtype)[None]
            special = np.isin(np.asarray(row), [masking.BOS, masking.EOS, masking.PAD])[..., None]
            return jnp.where(special, x, replaced)

        x = forward.embed(tiny_gemma, row)
        x = forward.run_blocks(tiny_gemma, x, row, range(4), write={SITE: write})[0]
        x = np.asarray(x[0], np.float64)
        x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6)
        x = x * (1 + np.asarray(tiny_gemma.params["final_norm"]["scale"], np.float64))
        logits = x @ np.asarray(tiny_gemma.params["embedder"]["input_embedding"], np.float64).T
        logits = np.tanh(logits / 3.0) * 3.0
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        tokens_L = np.asarray(row[0])
        total = count = 0
        for t in range(len(tokens_L) - 1):
            if tokens_L[t] not in (masking.BOS, masking.EOS, masking.PAD) and tokens_L[t + 1] not in (
                masking.BOS,
                masking.PAD,
            ):
                total -= log_probs[t, tokens_L[t + 1]]
                count += 1
        sums.append(total)
        counts.append(count)
    return np.array(sums), np.array(counts)


def test_every_number_equals_slow_numpy(tiny_gemma, rows):
    subject = random_sae()
    result = evaluate(tiny_gemma, subject, rows)
    tokens = rows.tokens[token_rows.order(12, batching.ORDER_SEED, 0, 10)]

    def encode(x):
        pre = x @ np.float64(subject.W_enc) + subject.b_enc
        return np.where(pre > subject.threshold, np.maximum(pre, 0), 0)

    def reconstruct(x):
        return encode(x) @ np.float64(subject.W_dec) + subject.b_dec

    values = forward.read_sites(tiny_gemma, jnp.asarray(tokens), [SITE])[SITE]
    kept = ~np.isin(tokens, [masking.BOS, masking.EOS, masking.PAD])
    x = np.asarray(values, np.float64)[kept]
    f = encode(x)
    assert result.activations == len(x) and result.rows == 10
    np.testing.assert_allclose(result.l0, (f > 0).sum(1).mean(), rtol=1e-5)
    np.testing.assert_allclose(result.frequency, (f > 0).mean(0), atol=1e-6)
    np.testing.assert_allclose(result.dead_fraction, ((f > 0).sum(0) == 0).mean())
    fvu = np.square(reconstruct(x) - x).sum() / np.square(x - x.mean(0)).sum()
    np.testing.assert_allclose(result.fvu, fvu, rtol=1e-4)

    clean, count = loss_in_float64(tiny_gemma, tokens, lambda x: x)
    spliced, _ = loss_in_float64(tiny_gemma, tokens, reconstruct)
    zero, _ = loss_in_float64(tiny_gemma, tokens, lambda x: 0 * x)
    mean, _ = loss_in_float64(tiny_gemma, tokens, lambda x: 0 * x + 0.5)
    n = count.sum()
    assert result.tokens == n
    np.testing.assert_allclose(result.clean_loss, clean.sum() / n, rtol=1e-5)
    np.testing.assert_allclose(result.spliced_loss, spliced.sum() / n, rtol=1e-5)
    delta = (spliced - clean).sum() / n
    np.testing.assert_allclose(result.delta_loss, delta, rtol=1e-3)
    np.testing.assert_allclose(result.loss_recovered_zero, 1 - delta / ((zero - clean).sum() / n), rtol=1e-3)
    np.testing.assert_allclose(result.loss_recovered_mean, 1 - delta / ((mean - clean).sum() / n), rtol=1e-3)
    # The standard error is close to a bootstrap over rows.
    rng = np.random.default_rng(0)
    resampled = [(spliced - clean)[i].sum() / count[i].sum() for i in rng.integers(10, size=(4000, 10))]
    np.testing.assert_allclose(result.delta_loss_se, np.std(resampled) * np.sqrt(10 / 9), rtol=0.1)


@pytest.mark.parametrize("skip", [False, True])
def test_a_spliced_transcoder_equals_slow_numpy(tiny_gemma, rows, skip):
    """The prediction from the MLP's input replaces the MLP's output."""
    read, target = Site("mlp_in", 1), Site("mlp_out", 1)
    rng = np.random.default_rng(2)
    W_skip = rng.normal(size=(32, 32)).astype(np.float32) if skip else None
    subject = random_sae().replace(W_skip=W_skip)
    mean = np.full(32, 0.5, np.float32)
    subjects = {
        "transcoder": attached.Subject(subject, read, mean, target),
        "autoencoder": attached.Subject(random_sae(1), target, mean),
    }
    both, _ = evaluate_lib.evaluate(tiny_gemma, subjects, rows, rows, 10, 4)
    assert list(both) == ["transcoder", "autoencoder"]
    result = both["transcoder"]
    alone = evaluate(tiny_gemma, random_sae(1), rows, site=target)
    for key in ("l0", "fvu", "delta_loss", "zero_ablation_loss"):
        np.testing.assert_allclose(getattr(both["autoencoder"], key), getattr(alone, key), rtol=1e-6)

    tokens = jnp.asarray(rows.tokens[token_rows.order(12, batching.ORDER_SEED, 0, 10)])
    values = forward.read_sites(tiny_gemma, tokens, [read, target])
    x, y = (np.asarray(values[site], np.float64) for site in (read, target))
    pre = x @ np.float64(subject.W_enc) + subject.b_enc
    f = np.where(pre > subject.threshold, np.maximum(pre, 0), 0)
    prediction = f @ np.float64(subject.W_dec) + subject.b_dec + (x @ np.float64(W_skip) if skip else 0)
    kept = np.asarray(masking.is_kept(tokens, 0))
    np.testing.assert_allclose(result.l0, (f[kept] > 0).sum(1).mean(), rtol=1e-5)
    variance = np.square(y[kept] - y[kept].mean(0)).sum()
    np.testing.assert_allclose(result.fvu, np.square(prediction - y)[kept].sum() / variance, rtol=1e-4)
    mixed = jnp.asarray(np.where(kept[..., None], prediction, y), jnp.float32)
    out = forward.embed(tiny_gemma, tokens)
    out = forward.run_blocks(tiny_gemma, out, tokens, range(4), write={target: lambda _: mixed})[0]
    loss, scored = predictions.next_token_loss(tiny_gemma, out, tokens)
    np.testing.assert_allclose(result.spliced_loss, (loss * scored).sum() / scored.sum(), rtol=1e-5)


@pytest.mark.parametrize("kind", list(SITES))
def test_a_perfect_reconstruction_costs_nothing(tiny_gemma, rows, kind):
    site = Site(kind, 0 if kind == "embed" else 2)
    d = site_width(tiny_gemma.module, site)
    identity = np.eye(d, dtype=np.float32)
    perfect = jumprelu.SAE(
        W_enc=np.concatenate([identity, -identity], 1),
        b_enc=np.zeros(2 * d, np.float32),
        threshold=np.zeros(2 * d, np.float32),
        W_dec=np.concatenate([identity, -identity], 0),
        b_dec=np.zeros(d, np.float32),
    )
    result = evaluate(tiny_gemma, perfect, rows, site=site)
    assert abs(result.delta_loss) < 1e-6 and result.fvu < 1e-10
    np.testing.assert_allclose(result.loss_recovered_zero, 1, atol=1e-5)
    np.testing.assert_allclose(result.l0, d)


def test_predicting_the_mean_has_an_fvu_of_one(tiny_gemma, rows):
    tokens = rows.tokens[token_rows.order(12, batching.ORDER_SEED, 0, 10)]
    values = forward.read_sites(tiny_gemma, jnp.asarray(tokens), [SITE])[SITE]
    mean = np.asarray(values)[~np.isin(tokens, [masking.BOS, masking.EOS, masking.PAD])].mean(0)
    constant = jax.tree.map(np.zeros_like, random_sae()).replace(b_dec=mean)
    result = evaluate(tiny_gemma, constant, rows, mean=mean)
    np.testing.assert_allclose(result.fvu, 1, rtol=1e-4)
    np.testing.assert_allclose(result.loss_recovered_mean, 0, atol=1e-5)
    assert result.dead_fraction == 1 and result.l0 == 0


def test_the_standard_error_shrinks_with_the_square_root_of_the_rows():
    rng = np.random.default_rng(0)
    numerator, denominator = rng.normal(1, 2, size=6400), rng.integers(5, 10, size=6400)
    _, few = metrics.ratio(numerator[:400], denominator[:400])
    _, many = metrics.ratio(numerator, denominator)
    np.testing.assert_allclose(few / many, 4, rtol=0.15)
    assert np.isnan(metrics.ratio(numerator[:1], denominator[:1])[1])


def test_an_interrupted_evaluation_resumes_after_the_last_whole_batch(
    tiny_gemma, rows, tmp_path, monkeypatch
):
    subjects = {
        "a": attached.Subject(random_sae(), SITE, None),
        "b/c": attached.Subject(random_sae(1), SITE, None),
    }

    def evaluated(parts):
        results, cost = evaluate_lib.evaluate(tiny_gemma, subjects, rows, rows, 10, 4, parts=parts)
        return results, cost

    want, cost = evaluated(None)
    assert cost.seconds > cost.bound_seconds / 3 > 0
    asked, clean = [], passes.clean

    def counted(*args):
        asked.append(args)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return clean(*args)

    means = evaluate_lib.site_means(tiny_gemma, (SITE,), rows, 4)
    monkeypatch.setattr(evaluate_lib, "site_means", lambda *args: means)
    monkeypatch.setattr(passes, "clean", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluated(resumable.Parts(tmp_path / "parts", {"of": "a"}))
    assert len(list((tmp_path / "parts").rglob("*.npz"))) == 2
    found, _ = evaluated(resumable.Parts(tmp_path / "parts", {"of": "a"}))
    assert len(asked) == 4  # One more pass, for the third batch.
    for name in want:
        assert evaluation_file.numbers(found[name]) == evaluation_file.numbers(want[name])
        np.testing.assert_array_equal(found[name].l0_counts, want[name].l0_counts)
    another = resumable.Parts(tmp_path / "parts", {"of": "another"})
    evaluated(another)
    assert len(asked) == 7  # Another evaluation does not use the first one's parts.
    another.remove()
    evaluated(resumable.Parts(tmp_path / "parts", {"of": "a"}))
    assert len(asked) == 7  # The first one's parts are still there.


def test_a_damaged_part_is_measured_again_with_a_message(tiny_gemma, rows, tmp_path, capsys):
    subjects = {"a": attached.Subject(random_sae(), SITE, np.zeros(32, np.float32))}

    def parts():
        return resumable.Parts(tmp_path / "parts", {"of": "a"})

    def evaluated():
        found, _ = evaluate_lib.evaluate(tiny_gemma, subjects, rows, rows, 8, 4, is_fast=True, parts=parts())
        return evaluation_file.numbers(found["a"])

    want = evaluated()
    capsys.readouterr()
    files = sorted(parts().folder.iterdir())
    whole = files[0].read_bytes()
    rng = np.random.default_rng(0)
    damaged = [b"", whole[:100], whole[:-1], whole[32:], pickle.dumps("something else")]
    for place in rng.integers(len(whole), size=200):  # One flipped bit each.
        damaged.append(whole[:place] + bytes([whole[place] ^ 1 << int(rng.integers(8))]) + whole[place + 1 :])
    for content in damaged:
        files[0].write_bytes(content)
        assert parts().read(0) is None
    assert capsys.readouterr().out == f"{files[0]} is damaged; measuring this batch again.\n" * len(damaged)
    assert evaluated() == want and files[0].read_bytes() == whole
    assert parts().read(0) is not None


def test_a_second_evaluation_is_refused_while_one_is_running(run, tmp_path, monkeypatch):
    with resumable.holding_parts(run / "evaluation.parts"):
        with pytest.raises(ValueError, match=f"another process is writing to {run}; wait for it or stop it"):
            evaluate_cli.evaluate_path(run, rows=8, is_fast=True)
        evaluate_cli.evaluate_path(run, rows=8, is_fast=True, out=tmp_path / "other")
    assert not (run / "evaluation.parts").exists()


def test_two_evaluations_at_once_succeed_on_a_disk_without_locks(run, tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    want = evaluate_cli.evaluate_path(run, rows=8, is_fast=True, out=tmp_path / "alone")
    assert "cannot be locked (No locks available)" in capsys.readouterr().out
    evaluate, found = evaluate_lib.evaluate, []

    def meanwhile(*args):
        """Runs a whole second evaluation during the first."""
        if not found:
            found.append(None)
            found.append(evaluate_cli.evaluate_path(run, rows=8, is_fast=True, out=tmp_path / "out"))
        return evaluate(*args)

    monkeypatch.setattr(evaluate_lib, "evaluate", meanwhile)
    found.append(evaluate_cli.evaluate_path(run, rows=8, is_fast=True, out=tmp_path / "out"))
    for of in found[1:]:
        for name in want:
            assert evaluation_file.numbers(of[name]) == evaluation_file.numbers(want[name])
    assert not list((tmp_path / "out").rglob("evaluation.parts"))


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("evaluated") / "run"
    loop.train(tiny.run_config(inputs, banks__main__sparsity_coefficients=(1e-3, 1e-1)), workdir)
    return workdir


def test_a_run_and_its_export_have_the_same_numbers(run, capsys, monkeypatch, inputs):
    results = evaluate_cli.evaluate_path(run, rows=8)
    stored = json.loads((run / "evaluation.json").read_text())
    assert set(stored["sae"]) == set(results) and len(results) == 2
    name, result = next(iter(results.items()))
    assert set(stored["sae"][name]) >= {
        "l0", "fvu", "delta_loss", "delta_loss_se", "clean_loss", "spliced_loss", "loss_recovered_zero",
        "loss_recovered_mean", "dead_fraction", "tokens", "rows", "activations",
    }  # fmt: skip
    assert (run / "evaluation.png").stat().st_size > 10_000
    shown = capsys.readouterr().out
    assert f"{result.tokens:,} predictions" in " ".join(shown.split()) and f"{result.l0:.1f}" in shown

    monkeypatch.setenv("HOME", str(inputs / "home"))  # Unlike this run, an export has its rows there.
    exported = evaluate_cli.evaluate_path(run / "sae" / name, rows=8)[name]
    for key in (
        "l0",
        "fvu",
        "delta_loss",
        "clean_loss",
        "tokens",
        "mean_ablation_loss",
        "loss_recovered_mean",
    ):
        np.testing.assert_allclose(
            getattr(exported, key), getattr(result, key), rtol=1e-3, atol=1e-4, err_msg=key
        )
    assert (run / "sae" / name / "evaluation.json").exists()
    assert saelens.read(run / "sae" / name)
    both = evaluate_cli.evaluate_path(f"{run}/sae/*", rows=8, is_fast=True)
    assert set(both) == set(results) and (run / "sae" / "evaluation.html").exists()
    np.testing.assert_allclose(both[name].delta_loss, result.delta_loss, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="matches no SAE"):
        evaluate_cli.evaluate_path(f"{run}/checkpoints/*")


def test_several_texts_have_a_page_each_and_one_table(run, inputs, tmp_path, capsys, monkeypatch):
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(json.dumps({"text": f"quite another text {i}"}) for i in range(5)))
    texts = [f"speeches={inputs / 'text.jsonl'}", str(other)]
    last = evaluate_cli.evaluate_path(run, rows=8, text=texts, out=tmp_path / "out", is_fast=True)
    found = {
        label: json.loads((tmp_path / "out" / label / "evaluation.json").read_text())
        for label in ("speeches", "other")
    }
    assert next(iter(last.values())).l0 == next(iter(found["other"]["sae"].values()))["l0"]
    # The training text keeps its held-out rows; all documents of another text are held out.
    alone = evaluate_cli.evaluate_path(run, rows=8, out=tmp_path / "alone", is_fast=True)
    assert {n: v["fvu"] for n, v in found["speeches"]["sae"].items()} == {n: v.fvu for n, v in alone.items()}
    assert found["other"]["sae"].popitem()[1]["rows"] == len(
        token_rows.open_rows(opening.open_path(run, text=str(other)).rows, token_rows.HELD_OUT)
    )
    with (tmp_path / "out" / "side_by_side.csv").open() as file:
        cells = {(c["number"], c["sae"], c["column"]): c["value"] for c in csv.DictReader(file)}
    for label, of in found.items():
        for name, numbers in of["sae"].items() if label == "speeches" else ():
            assert float(cells["delta_loss", name, label]) == numbers["delta_loss"]
    assert not list((tmp_path / "out").rglob("evaluation.parts"))
    html = (tmp_path / "out" / "other" / "evaluation.html").read_text()
    assert f"--text=other={other}" in html and f"--out={tmp_path / 'out' / 'other'}" in html
    with pytest.raises(ValueError, match="two texts have the name 'other'"):
        evaluate_cli.evaluate_path(run, text=[str(other), f"other={inputs / 'text.jsonl'}"])
    monkeypatch.setattr(
        placement, "load_gemma", lambda _: pytest.fail("loaded")
    )  # All errors come before loading.
    for texts, message in (
        (["..=sotu"], "cannot have the name '..'"),
        (
            [str(other), f"checkpoints={inputs / 'text.jsonl'}"],
            "checkpoints contains files, but no evaluation",
        ),
        ([str(other), f"{inputs / 'none.txt'}"], "matches no file"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_cli.evaluate_path(run, text=texts, out=run)


def test_evaluations_with_other_options_overwrite_nothing(run, tmp_path, capsys):
    """Another text, split or dtype, and baselines, have their own folders; the page says which text it is of."""
    other = tmp_path / "news.jsonl"
    other.write_text("\n".join(json.dumps({"text": f"quite another text {i}"}) for i in range(5)))
    options = {"rows": 2, "is_fast": True}
    results = evaluate_cli.evaluate_path(run, **options)
    name = next(iter(results))
    own = (run / "evaluation.json").read_bytes()
    about = json.loads(own)
    assert about["text_trained_on"] == about["text"] and not about["is_other_text"]
    verdict = about["sae"][name]["verdict"]
    assert verdict["line"] in (run / "evaluation.html").read_text().replace("&#39;", "'")
    assert f" of {len(results)} SAEs." in capsys.readouterr().out

    evaluate_cli.evaluate_path(run, text=str(other), **options)
    found = json.loads((run / "evaluations" / "news" / "evaluation.json").read_text())
    assert found["is_other_text"] and found["text_trained_on"] == about["text"]
    page = (run / "evaluations" / "news" / "evaluation.html").read_text()
    said = "compare delta loss, not FVU"
    assert "not the training text" in page and said in page
    assert said in capsys.readouterr().out
    evaluate_cli.evaluate_path(run, split="train", has_baselines=True, **options)
    with_baselines = json.loads((run / "evaluations" / "train_baselines" / "evaluation.json").read_text())[
        "sae"
    ]
    assert [n for n, of in with_baselines.items() if "verdict" in of] == list(results)
    assert (run / "evaluation.json").read_bytes() == own
    subjects = opening.open_path(run).subjects
    assert session._frequencies(run, subjects).keys() == results.keys()

    # A second text of the same name is refused before the first is overwritten.
    second = tmp_path / "second" / "news.jsonl"
    second.parent.mkdir()
    second.write_bytes(other.read_bytes())
    with pytest.raises(
        ValueError, match=r"news/evaluation.json is an evaluation with text .*give --text=NAME=SOURCE"
    ):
        evaluate_cli.evaluate_path(run, text=str(second), **options)
    opened = opening.open_path(run, text=f"{other}", dtype="bfloat16")
    place = opening.results_folder(
        opened, run, None, options=opening.options_of(opened, "train", "model", "baselines")
    )
    assert place == run / "evaluations" / "bfloat16_turns_model_train_baselines" / "news"
    assert opening.results_folder(opening.open_path(run), run, None) == run
    assert opening.results_folder(opened, run, tmp_path / "out") == tmp_path / "out"


def test_finished_texts_are_not_evaluated_again(run, inputs, tmp_path, monkeypatch):
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(json.dumps({"text": f"other words {i}"}) for i in range(12)))
    options = {"text": [f"a={inputs / 'text.jsonl'}", f"b={other}"], "rows": 8, "out": tmp_path / "out"}
    evaluate, calls = evaluate_lib.evaluate, []

    def once(*args):
        if calls:
            raise KeyboardInterrupt
        calls.append(args)
        return evaluate(*args)

    monkeypatch.setattr(evaluate_lib, "evaluate", once)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        evaluate_cli.evaluate_path(run, is_fast=True, **options)
    monkeypatch.setattr(evaluate_lib, "evaluate", evaluate)
    measured, measure = [], evaluate_lib._measure
    monkeypatch.setattr(evaluate_lib, "_measure", lambda *args: measured.append(args) or measure(*args))
    evaluate_cli.evaluate_path(run, is_fast=True, **options)
    assert len(measured) == 1  # The one batch of b.
    assert not list((tmp_path / "out").rglob("evaluation.parts"))


def test_the_training_text_is_recognised_by_any_name(run, inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(inputs)
    rows = opening.open_path(run).rows
    assert len(
        token_rows.open_rows(opening.open_path(run, text="./text.jsonl").rows, token_rows.HELD_OUT)
    ) == len(token_rows.open_rows(rows, token_rows.HELD_OUT))
    assert "are not held out" not in capsys.readouterr().out
    (inputs / "text.jsonl").with_name("more.jsonl").write_text('{"text": "more"}')
    opening.open_path(run, text="*.jsonl")
    (inputs / "more.jsonl").unlink()
    assert "also in the training text: 1, such as" in capsys.readouterr().out


def test_a_missing_text_is_refused_only_when_rows_are_needed(run):
    opened = opening.open_path(run, text="not/here.jsonl")
    assert opened.subjects
    with pytest.raises(ValueError, match="matches no file"):
        _ = opened.rows


def test_saes_with_different_stored_means_are_compared_with_one_mean(tiny_gemma):
    rows = Rows(tiny.tokens(8, 16))
    means = {"first": np.zeros(32, np.float32), "second": np.ones(32, np.float32), "none": None}

    def ablated(*names):
        subjects = {n: attached.Subject(random_sae(), SITE, means[n]) for n in names}
        found, _ = evaluate_lib.evaluate(tiny_gemma, subjects, rows, rows, 8, 8, is_fast=True)
        return [found[name].mean_ablation_loss for name in names]

    (measured,) = ablated("none")
    assert ablated("first", "second") == ablated("none", "first") == [measured, measured]
    assert ablated("first") != [measured]


def test_only_the_chosen_turns_count(run, tmp_path):
    """Replies to prompts in the chat template, as in rollouts of an instruction-tuned model."""
    rollouts = tmp_path / "rollouts.jsonl"
    lines = [json.dumps({"prompt": "a", "text": "wxyz"}) for _ in range(3)]
    rollouts.write_text("\n".join(lines))
    options = {"text": str(rollouts), "is_fast": True, "out": tmp_path / "out", "rows": 8}
    counted = {
        turns: next(iter(evaluate_cli.evaluate_path(run, turns=turns, **options).values()))
        for turns in ("user", "model")
    }
    # The template takes fourteen of a row's sixteen tokens.
    assert (counted["user"].activations, counted["model"].activations) == (3, 3)
    rollouts.write_text(lines[0].replace("a", "abc"))
    with pytest.raises(ValueError, match="no prediction counts in these rows"):
        evaluate_cli.evaluate_path(run, turns="model", **options)
    with pytest.raises(ValueError, match="the text has prompts and replies; set data"):
        evaluate_cli.evaluate_path(run, **options)


def test_a_run_is_evaluated_on_another_model_of_the_same_shape(run, inputs, tmp_path, monkeypatch):
    """As with a base model's SAEs in the instruction-tuned model, on the same rows."""
    monkeypatch.setitem(registry.MODELS, "tiny-it", registry.MODELS["tiny"])
    same = evaluate_cli.evaluate_path(run, rows=8, out=tmp_path / "a", is_fast=True)
    weights.save_orbax(str(tmp_path / "weights"), tiny.params(0.31))
    other = evaluate_cli.evaluate_path(
        run, rows=8, out=tmp_path / "b", is_fast=True, model="tiny-it", weights=str(tmp_path / "weights")
    )
    rounded = evaluate_cli.evaluate_path(run, rows=8, out=tmp_path / "c", is_fast=True, dtype="bfloat16")
    name = next(iter(same))
    assert same[name].tokens == other[name].tokens == rounded[name].tokens
    assert abs(other[name].clean_loss - same[name].clean_loss) > 1e-3
    assert 0 < abs(rounded[name].clean_loss - same[name].clean_loss) < 0.1
    compare_cli.compare([tmp_path / part for part in "abc"], tmp_path / "side")
    with (tmp_path / "side" / "side_by_side.csv").open() as file:
        cells = {(c["number"], c["sae"], c["column"]): c for c in csv.DictReader(file)}
    cell = cells["delta_loss", name, "c"]
    np.testing.assert_allclose(
        float(cell["difference"]), rounded[name].delta_loss - same[name].delta_loss, rtol=1e-6
    )
    # On the same rows, the error is far below that of two independent evaluations.
    assert (
        0
        < float(cell["difference_se"])
        < 0.5 * np.hypot(same[name].delta_loss_se, rounded[name].delta_loss_se)
    )
    shape = "reads activations of width 32, but .* has width 640"
    with pytest.raises(ValueError, match=shape):
        evaluate_cli.evaluate_path(run, model="gemma3_270m")


def test_invalid_paths_and_options_are_refused(tmp_path, run):
    with pytest.raises(ValueError, match="neither a run directory"):
        evaluate_cli.evaluate_path(tmp_path)
    with pytest.raises(ValueError, match="--rows is -1; it must be at least 1"):
        evaluate_cli.evaluate_path(run, rows=-1)
    with pytest.raises(ValueError, match="--site is for SAEs in files"):
        evaluate_cli.evaluate_path(run, site="layer_1_resid_post")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["evaluate.py", "nowhere"], "Error: nowhere does not exist"),
        (
            ["train.py", "--config=configs/quickstart.py", "--workdir=x", "--config.banks.main.widht=3"],
            "Error: the config has no field 'widht', named by --config.banks.main.widht=3; did you mean 'width'?",
        ),
    ],
)
def test_the_scripts_report_errors_in_one_line(command, message, tmp_path):
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    last_lines = done.stderr.strip().splitlines()[-3:]
    assert any(message in line for line in last_lines), done.stderr
    assert "Traceback" not in done.stderr
