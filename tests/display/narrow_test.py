"""Tables in a terminal of 80 columns: no table is wider, and no number is broken."""

import dataclasses
import re

import numpy as np
import pytest
from random_evaluations import evaluation

from gemma_scope_jax.analysis import prompt_activations
from gemma_scope_jax.analysis.attribution import ablation, gradients
from gemma_scope_jax.analysis.contrasts import correction, find
from gemma_scope_jax.analysis.layers import flow, links, logit_lens
from gemma_scope_jax.analysis.steering import sweep
from gemma_scope_jax.cli import plan
from gemma_scope_jax.display import tables
from gemma_scope_jax.evaluation import detection, probing, report, side_by_side
from gemma_scope_jax.training import forecast, memory

NAMES = tuple(f"layer_{layer}_resid_post_width_16384_lambda_0.00061" for layer in range(9, 14))
TOKENS = (" presidential", "1", "9", "8", " of", "\n")
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def shown(capsys):
    """Returns the output without the given sentences; no line of it has more than 80 characters."""

    def read(*sentences):
        text = capsys.readouterr().out
        for sentence in sentences:
            assert f"{sentence}\n" in text
            text = text.replace(f"{sentence}\n", "")
        assert max(len(line) for line in text.split("\n")) <= 80, text
        return text

    return read


def large(count):
    return 12345.678 * RNG.random(count)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_evaluations(count, shown):
    results = {
        name: dataclasses.replace(evaluation(n), l0=123.45, delta_loss=-0.0123)
        for n, name in enumerate(NAMES[:count])
    }
    report.print_table(results, "sotu, held-out")
    text = shown()
    for result in results.values():
        assert f"-0.0123 ± {result.delta_loss_se:.4f}" in text and " 123.5" in text
    if count < 4:
        first = [line.split("  ")[0] for line in text.partition("──\n")[2].split("\n")]
        assert first[:2] == ["L0", "delta loss, nats"] and first[2].startswith("loss recovered,")
    else:
        assert text.index("L0") < text.index("delta loss") < text.index("FVU")


def test_evaluations_side_by_side(shown):
    suites = {
        f"runs/number_{n}": side_by_side.Suite({"text": "t"}, {name: evaluation(n) for name in NAMES})
        for n in range(3)
    }
    side_by_side.comparison(suites, is_compared=True).show()
    result = suites["runs/number_2"].results[NAMES[4]]
    assert f"{result.fvu:.4f} ± {result.fvu_se:.4f}" in shown()


def test_probes_and_detections(shown):
    probe = probing.Probe((), np.array([0.0, 1.0, 1.0, 1.0]))
    few = dict.fromkeys(probing.FEATURES, probe)
    tasks = [probing.Task(name, probe, few, few, probe) for name in ("war", "peace")]
    probing.print_table(dict.fromkeys(NAMES, tasks), 9)
    probing.print_table({NAMES[0]: tasks}, 9)
    text = shown(f"Standard errors are at most {probe.accuracy_se:.3f}.")
    assert text.count(" 0.750  0.750  0.750  0.750  0.750") == 5 + 3
    words = {"on": TOKENS, "before": TOKENS}
    found = detection.Detection(*[0.5] * 7, (detection.Latent(12345, 0.1, 0.9, 0.9, 0.5, words),))
    detection.print_tables(dict.fromkeys(NAMES[:2], found), 9)
    text = shown()
    assert len(re.findall(r" 0\.500 ± 0\.500(?!\d)", text)) == 2 * 3
    assert len(re.findall(r"(?m)^ *12345 +10\.00% +0\.900 ", text)) == 2


def test_the_latents_of_a_prompt(shown):
    f_LxM = np.zeros((len(TOKENS), 16384))
    f_LxM[:, 12340:12345] = [2729.4, 459.2, 34.56, 0.1234, 1.0]
    error, frequency = {NAMES[0]: np.ones(len(TOKENS))}, {NAMES[0]: np.zeros(16384)}
    prompt_activations.Reading("m", TOKENS, {NAMES[0]: f_LxM}, error, frequency).show()
    text = shown()
    assert "strongest 5, as latent:activation" in " ".join(text.split())
    for pair in ("12340:2729", "12341:459", "12342:34.6", "12343:0.123", "12344:1"):
        assert len(re.findall(rf"(?<!\S){pair}(?!\S)", text)) == len(TOKENS)


def test_layers(shown):
    length, ids = len(TOKENS), np.arange(len(TOKENS))
    seen = [
        logit_lens.Predictions(
            np.tile(ids, (r, 1)), *RNG.random((2, r, length)), np.full((r, length), 262143)
        )
        for r in (5, 5, 1)
    ]
    lens = logit_lens.Lens(TOKENS, tuple("89abc"), ids, True, *seen, dict(enumerate(TOKENS)))
    values = 12345.678 * np.ones((4, 5, length))
    flow.Flow("m", TOKENS, NAMES, ("resid_post",) * 5, tuple(range(9, 14)), *values, lens).show()
    text = shown()
    assert text.count(" 12,346") == 5 and text.count(" 262,143") == 11
    later = {name: -1.234e-5 * np.ones(3) for name in NAMES[1:]}
    ones = {name: 1.0 for name in later}
    links.Links(NAMES[0], 12345, 10**6, 10**5, 1.5, *(later,) * 4, {n: ones[n] * np.ones(3) for n in later},
                ones, dict.fromkeys(later, 9)).show()  # fmt: skip
    assert len(re.findall(r"(?<!\S)-1\.23e-05(?!\S)", shown())) == 5 * 12


def test_attributions_ablations_and_sweeps(shown):
    length = len(TOKENS)
    parts = gradients.Parts(
        ids := np.arange(length), 16000 + ids, large(length), -large(length), 16384, *RNG.random((4, length))
    )
    found = gradients.Attribution(
        "m", TOKENS, (2, *ids), (1, " Union"), (2, " a"), 0.5, dict.fromkeys(NAMES, parts)
    )
    found.show(30)
    text = shown()
    for number in parts.part_N:
        assert f" {number:+.4f}\n" in text
    made = ablation.Ablations(NAMES, 16000 + ids[:5], ids[:5], ids[:5], ids[:5] > 2, *RNG.random((2, 5)))
    made.show()
    assert " 16004 " in shown()
    sweep.Sweep(NAMES[0], 12345, "add", 1.0, TOKENS, ids[:4], *large((4, 4)), 3.0, 2, 9).show()
    assert " ± " in shown()


def test_contrasts_and_corrections(shown):
    latents = find.Latents(*RNG.random((2, 4)), np.full(4, 0.001), *large((5, 4)))
    made = find.Contrast("m", ("p",), ("q",), "mean", 0.05, True, 0.001, dict.fromkeys(NAMES, latents))
    made.show()
    assert f" {latents.first_M[3]:.4g} " in shown(made.about())
    outcome = correction.Outcome(*RNG.random((2, 3)), 1234.5, -0.1234, 0.0123)
    fixed = correction.Correction(" she", " he", False, ((NAMES[0], 1),), outcome, outcome, (outcome,) * 20)
    fixed.show()
    assert "-0.1234 ± 0.0123" in shown(fixed.about())


def test_plans(capsys):
    needs = [memory.Need("the step's activations", 10**10, "give less")]
    of = forecast.Forecast(
        "v5e:16x16", 256, 16, 16, 100, 112, 10**9, 4096, 16e9, needs, 10**10, 10**15, 10**15,
        [forecast.Collective("collective-permute", "other", 1024, 10**11)], *[0.001] * 4, 1,
    )  # fmt: skip
    assert plan.show(of, 1.2)
    text = capsys.readouterr().out.partition("At 4,096 tokens")[0]  # Sentences follow the tables.
    assert max(map(len, text.split("\n"))) <= 80 and "other" in text
    assert "SAEs: 100 (padded to 112)" in " ".join(text.split())


def test_text_is_wrapped_after_a_space_an_underscore_or_a_slash():
    assert tables.fold("layer_12_resid_post", 10) == ["layer_12_", "resid_post"]
    assert tables.fold("runs/a − runs/b", 8) == ["runs/a −", "runs/b"]
    assert tables.fold("xxxxxxxx 12", 5) == ["xxxxx", "xxx", "12"]
    assert tables.fold("日本語", 4) == ["日本", "語"]
    assert tables.fold("", 4) == []


def test_columns_that_do_not_fit_follow_in_a_second_table(shown):
    table = tables.Table("name", title="t")
    for n in range(9):
        table.add_column(f"a{n}", justify="right")
    table.add_row("x", *(f"{n}" * 12 for n in range(9)))
    tables.show(table)
    lines = [line.split() for line in shown().split("\n")]
    assert [line for line in lines if line[:1] == ["name"]] == [
        ["name", *(f"a{n}" for n in range(5))], ["name", *(f"a{n}" for n in range(5, 9))]
    ]  # fmt: skip
