"""Sparse probing, compared with slow float64 NumPy and with planted latents; and broken files."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from toys import random_sae

from gemma_scope_jax.cli import main
from gemma_scope_jax.cli import probe as probe_cli
from gemma_scope_jax.evaluation import probing
from gemma_scope_jax.models import forward, masking
from gemma_scope_jax.models.sites import Site
from gemma_scope_jax.runtime import sharding
from gemma_scope_jax.saes import attached
from gemma_scope_jax.training import loop

EMBED = Site("embed", 0)


def write(path, examples):
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))
    return path


def examples(count=30):
    """Texts of three classes; only the third class has the word QQ."""
    rng = np.random.default_rng(0)
    words = ["stars", "rivers", "laws", "bread", "song"]
    made = []
    for number in range(count):
        label = ("a", "b", "c")[number % 3]
        text = " ".join(rng.choice(words, size=2 + number % 4)) + (" QQ" if label == "c" else "")
        made.append({"text": f"{number} {text}", "label": label})
    return made


@pytest.fixture
def labelled(tmp_path):
    return write(tmp_path / "labelled.jsonl", examples())


def on_token(token, d=32):
    """A random SAE of the token embeddings, whose latent 7 fires on one token only."""
    embedding_VxD = np.asarray(tiny.params()["embedder"]["input_embedding"], np.float64) * np.sqrt(d)
    made = random_sae()
    direction_D = embedding_VxD[token] / np.square(embedding_VxD[token]).sum()
    others = np.delete(embedding_VxD @ direction_D, token)
    assert others.max() < 0.9
    arrays = {name: np.array(getattr(made, name)) for name in ("W_enc", "b_enc", "threshold")}
    arrays["W_enc"][:, 7], arrays["b_enc"][7], arrays["threshold"][7] = direction_D, 0, 0.95
    return made.replace(**arrays)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ([{"text": "x"}], 'labelled.jsonl:31 is not a JSON object with a "text" and a "label"'),
        (["x"], "labelled.jsonl:31 is not a JSON object"),
        ([{"text": " ", "label": "a"}], "labelled.jsonl:31: the text is ' ', expected a string"),
        ([{"text": ["x"], "label": "a"}], r"labelled.jsonl:31: the text is \['x'\]"),
        ([{"text": "x", "label": 1.5}], "labelled.jsonl:31: the label is 1.5, expected a string or a whole"),
        ([{"text": "x", "label": "a", "group": None}], "labelled.jsonl:31: the group is None"),
        ([{"text": "x", "label": "d"}], "too few texts of 'd' 1; give at least 10 of each class"),
    ],
)
def test_invalid_labelled_files_are_refused(tmp_path, broken, message):
    path = write(tmp_path / "labelled.jsonl", [*examples(), *broken])
    with pytest.raises(ValueError, match=message):
        probing.read_labelled(path)


def test_one_class_and_no_file_are_refused(tmp_path):
    one = write(tmp_path / "one.jsonl", [{"text": f"x{i}", "label": 5} for i in range(20)])
    with pytest.raises(ValueError, match="1 classes; give at least two"):
        probing.read_labelled(one)
    with pytest.raises(ValueError, match="does not exist; give a JSON Lines file"):
        probing.read_labelled(tmp_path / "none.jsonl")
    (tmp_path / "bytes.jsonl").write_bytes(b'{"text": "\xff", "label": 1}\n')
    with pytest.raises(ValueError, match=r"bytes.jsonl:1 is not in UTF-8"):
        probing.read_labelled(tmp_path / "bytes.jsonl")


def test_labels_are_strings_or_whole_numbers(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": f"x\u2028{i}", "label": i % 2} for i in range(20)])
    found = probing.read_labelled(path)
    assert list(np.unique(found.labels)) == ["0", "1"] and found.texts[3] == "x\u20283"


def test_the_test_part_is_a_third_of_each_class_and_keeps_groups_whole(tmp_path):
    labels = np.repeat(["a", "b", "c"], [120, 60, 30])
    single = probing.Labelled(list(map(str, range(210))), labels, np.arange(210))
    is_test_T = probing.split(single, 0)
    assert [is_test_T[labels == label].sum() for label in "abc"] == [40, 20, 10]
    assert np.array_equal(is_test_T, probing.split(single, 0))
    assert not np.array_equal(is_test_T, probing.split(single, 1))

    grouped = single._replace(groups=np.arange(210) // 5)
    is_test_T = probing.split(grouped, 0)
    assert 55 < is_test_T.sum() < 85
    assert set(is_test_T.reshape(-1, 5).sum(1)) == {0, 5}
    # A class that is one group cannot be in both parts.
    with pytest.raises(ValueError, match=r"no text of class '[abc]' is in the (test|training) part"):
        probing.split(single._replace(groups=np.unique(labels, return_inverse=True)[1]), 0)
    with pytest.raises(ValueError, match="the texts are of 2 groups, which cannot be split"):
        probing.split(single._replace(groups=np.arange(210) % 2), 0)
    # Groups that share a text count as one group.
    tied = grouped._replace(
        texts=["both" if i in (0, 7, 14) else text for i, text in enumerate(single.texts)]
    )
    for seed in range(20):
        assert probing.split(tied, seed)[:15].sum() in (0, 15)
    # A text in both parts would be known from training.
    path = write(tmp_path / "twice.jsonl", [{"text": f"{i % 30}", "label": i % 2} for i in range(60)])
    found = probing.read_labelled(path)
    is_test_T = probing.split(found, 0)
    assert all(len(set(is_test_T[i::30])) == 1 for i in range(30))


@pytest.mark.parametrize("devices", [1, 8])
def test_pooled_means_equal_slow_numpy(tiny_gemma, devices):
    site, subject = Site("resid_post", 2), random_sae()
    rows_TxL, cut = probing.rows_of(["stars", "a", "bread and song " * 3, "law"], tiny.encode, 16)
    assert rows_TxL.shape == (4, 16) and cut == 1
    assert rows_TxL[1].tolist() == [masking.BOS, *tiny.encode("a"), *[masking.PAD] * 14]
    subjects = {"one": attached.Subject(subject, site, None)}
    mesh = sharding.make_mesh(1, devices, jax.devices()[:devices])
    latents, values = probing.pool(tiny_gemma.replace(mesh=mesh), subjects, rows_TxL, 3)
    for row_L, f_M, x_D in zip(rows_TxL, latents["one"], values[site], strict=True):
        alone = jnp.asarray(row_L[row_L != masking.PAD])[None]  # Without padding, which is not pooled.
        x = forward.read_sites(tiny_gemma, alone, [site])[site]
        x = np.asarray(x[0, 1:], np.float64)
        pre = x @ np.float64(subject.W_enc) + subject.b_enc
        expected = np.where(pre > subject.threshold, np.maximum(pre, 0), 0).mean(0)
        assert (expected > 0).any()
        np.testing.assert_allclose(f_M, expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(x_D, x.mean(0), rtol=1e-4, atol=1e-4)


def logistic_in_float64(x, y):
    """The weights and bias that minimise ½‖w‖² + Σ log(1 + exp(-(±1)(w·x + b))), by Newton's method."""
    z, sign = np.column_stack([x, np.ones(len(x))]), np.where(y, 1.0, -1.0)
    w, ridge = np.zeros(z.shape[1]), np.diag([*[1.0] * x.shape[1], 0])
    for _ in range(50):
        p = 1 / (1 + np.exp(sign * (z @ w)))
        gradient = ridge @ w - z.T @ (sign * p)
        w -= np.linalg.solve(ridge + (z * (p * (1 - p))[:, None]).T @ z, gradient)
    return w


def test_features_accuracies_and_errors_equal_slow_numpy():
    rng = np.random.default_rng(0)
    y, is_test = rng.random(200) < 0.4, rng.random(200) < 0.3
    # The scales differ by a thousand; features are chosen by differences in standard deviations.
    x = (rng.normal(size=(200, 12)) + y[:, None] * rng.normal(size=12)) * 10.0 ** rng.integers(-2, 2, size=12)
    x[:, 4] = 3.0
    x[is_test & ~y, 7] += 100 * x[:, 7].std()  # Texts for testing do not affect the choice.
    centre, scale = x[~is_test].mean(0), x[~is_test].std(0)
    standard = (x - centre) / np.where(scale > 0, scale, 1)
    differences = [
        abs(np.mean([v for v, t, c in zip(column, is_test, y, strict=True) if c and not t])
            - np.mean([v for v, t, c in zip(column, is_test, y, strict=True) if not c and not t]))
        for column in standard.T
    ]  # fmt: skip
    best = sorted(range(12), key=lambda i: -differences[i])
    found = probing.fit(x.astype(np.float32), y, is_test, (1, 2, 5, 20, None))
    for number, probe in found.items():
        chosen = best[: number or 12]
        if number is not None:
            assert list(probe.features) == chosen
        w = logistic_in_float64(standard[~is_test][:, chosen], y[~is_test])
        correct = (standard[is_test][:, chosen] @ w[:-1] + w[-1] > 0) == y[is_test]
        assert probe.accuracy == correct.mean()
        p = correct.mean()
        np.testing.assert_allclose(probe.accuracy_se, np.sqrt(p * (1 - p) / is_test.sum()))
    assert found[None].features == () and found[1].accuracy > 0.6


def test_the_mean_over_tasks_counts_each_text_once():
    rng = np.random.default_rng(0)
    labels = np.array(["a", "b", "c"])[rng.integers(3, size=90)]
    f, x, is_test = rng.normal(size=(90, 30)), rng.normal(size=(90, 24)), np.arange(90) % 3 == 0
    of = probing.tasks(f, x, labels, is_test)
    assert [task.label for task in of] == ["a", "b", "c"]
    assert [task.label for task in probing.tasks(f, x, np.where(labels == "a", "a", "b"), is_test)] == ["b"]
    for task in of:
        assert task.majority.accuracy == (labels[is_test] != task.label).mean()
    mean = probing.mean(of)
    np.testing.assert_allclose(mean.latents[5].accuracy, np.mean([task.latents[5].accuracy for task in of]))
    correct = np.array([task.latents[5].correct_U for task in of])
    rng = np.random.default_rng(1)
    resampled = [correct[:, rng.integers(30, size=30)].mean() for _ in range(4000)]
    np.testing.assert_allclose(mean.latents[5].accuracy_se, np.std(resampled), rtol=0.05)


def test_a_planted_latent_of_one_class_is_found(tiny_gemma, labelled):
    """This latent alone classifies every text correctly."""
    found = probing.read_labelled(labelled)
    rows_TxL, _ = probing.rows_of(found.texts, tiny.encode, 64)
    subjects = {"planted": attached.Subject(on_token(tiny.encode("Q")[0]), EMBED, None)}
    latents, values = probing.pool(tiny_gemma, subjects, rows_TxL, 8)
    of = probing.tasks(latents["planted"], values[EMBED], found.labels, probing.split(found, 0))
    by_label = {task.label: task for task in of}
    assert by_label["c"].latents[1].accuracy == 1 and by_label["c"].latents[1].features == (7,)
    assert by_label["a"].latents[1].accuracy < 1


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("probed") / "run"
    loop.train(tiny.run_config(inputs, banks__main__sparsity_coefficients=(1e-3, 1e-1)), workdir)
    return workdir


def test_a_run_is_probed(run, labelled, tmp_path, capsys):
    results = probe_cli.probe_path(run, labelled, rows_per_batch=7, out=tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "probing.json").read_text())
    assert stored["classes"] == {"a": 10, "b": 10, "c": 10} and stored["cut_texts"] > 0
    assert list(stored["sae"]) == list(results) and len(results) == 2
    name, of = next(iter(results.items()))
    assert [task["class"] for task in stored["sae"][name]] == ["a", "b", "c"]
    first = stored["sae"][name][0]
    assert first["latents"]["2"]["accuracy"] == of[0].latents[2].accuracy
    assert len(first["latents"]["5"]["features"]) == 5 and set(first["dimensions"]) == {"1", "2", "5", "20"}
    shown = capsys.readouterr().out
    assert f" {of[0].latents[2].accuracy:.3f} " in shown and "Standard errors are at most 0." in shown
    assert "are longer than 16 tokens and were cut" in shown
    again = probe_cli.probe_path(run, labelled, out=tmp_path / "again")
    assert [task.latents[5].features for task in again[name]] == [task.latents[5].features for task in of]
    with pytest.raises(ValueError, match="--rows-per-batch is 0; it must be at least 1"):
        probe_cli.probe_path(run, labelled, rows_per_batch=0)


def test_the_command_passes_its_options_on(run, labelled, tmp_path, monkeypatch):
    asked = [
        "probe",
        str(run),
        f"--labelled={labelled}",
        "--seed=3",
        f"--out={tmp_path}",
        "--rows_per_batch=30",
    ]
    monkeypatch.setattr("sys.argv", ["gemma_scope_jax", *asked])
    main.run(sys.argv[1:])
    assert json.loads((tmp_path / "probing.json").read_text())["seed"] == 3
    monkeypatch.setattr("sys.argv", ["gemma_scope_jax", *asked, "--model=gemma2_2b"])
    with pytest.raises(ValueError, match="but layer_1_resid_post of gemma2_2b has width 2304"):
        main.run(sys.argv[1:])
