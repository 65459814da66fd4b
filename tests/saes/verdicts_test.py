"""Verdicts name the faults of bad SAEs and no faults of good ones."""

import math
import re

import pytest

from gemma_scope_jax.saes import verdicts

# The quickstart's SAE of 4,096 latents, measured on 64 rows (results/quickstart.json).
GOOD = {
    "l0": 57.1, "fvu": 0.032, "cosine": 0.98, "delta_loss": 0.193, "delta_loss_se": 0.012, "clean_loss": 3.3,
    "mean_ablation_loss": 7.58, "zero_ablation_loss": 24.2, "dead_fraction": 0.299, "dense_fraction": 0.026,
    "activations": 16_253,
}  # fmt: skip


def judge(width=4096, target_l0=0.0, **changes):
    return verdicts.verdict(GOOD | changes, width, target_l0)


def test_the_verdict_of_a_good_sae_is_one_short_line():
    good = judge()
    assert not good.faults
    assert good.line == "no faults: delta loss is 0.193 nats and mean ablation costs 4.28 nats, at L0 57.1"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        # Loss recovered against mean ablation is −6.95 although the cosine is 0.98.
        ({"delta_loss": 34.0}, r"worse than mean ablation \(4.280\) and zero ablation \(20.900\): delta loss is 34"),
        ({"delta_loss": 5.0}, r"worse than mean ablation \(4.280\): delta loss is 5.000 nats. Next: .*zer.center"),
        ({"delta_loss": 2.6}, "recovers less than half: delta loss is 2.600 nats .* Next: train on more tokens"),
        ({"fvu": 1.3}, "FVU 1.3 is above 1: the mean of the activations is a better"),
        ({"l0": 0.0, "dead_fraction": 1.0}, "no latent fires.* Next: if you trained it, lower sparsity_coeff"),
        ({"l0": 2000.0, "dead_fraction": 0.1}, "hardly sparse: 49% of latents fire on an activation. Next: raise"),
        ({"dead_fraction": 0.3, "activations": 130_016}, "dead: 30% of latents never fired on 130,016 activations"),
        ({"dead_fraction": 0.6}, "silent: 60% of latents never fired on 16,253 activations. Next: give more --rows"),
        ({"dense_fraction": 0.05}, "dense: 5.0% of latents fire on over 10% of activations"),
        ({"target_l0": 100.0}, "L0 57.1 is 43% below its target of 100. Next: lower sparsity_coefficients"),
        ({"target_l0": 40.0}, "L0 57.1 is 43% above its target of 40. Next: raise sparsity_coefficients"),
        ({"fvu": None}, "FVU nan is meaningless: the activations do not vary"),
        ({"fvu": -128_415.0}, "FVU -1.28e[+]05 is meaningless"),
        ({"fvu": "<b>"}, "FVU nan is meaningless"),
        ({"delta_loss": None}, "delta loss is not a number"),
    ],
)  # fmt: skip
def test_the_verdict_of_a_bad_sae_names_the_fault_and_the_next_step(changes, said):
    bad = judge(**changes)
    assert len(bad.faults) == 1 and "Next: " in bad.line
    assert re.search(said, bad.line), bad.line


def test_the_worst_fault_comes_first_and_decides_the_next_step():
    bad = judge(delta_loss=5.0, fvu=2.0, dense_fraction=0.2)
    assert [fault.split()[0] for fault in bad.faults] == ["worse", "FVU", "dense:"]
    assert bad.step == judge(delta_loss=5.0).step


@pytest.mark.parametrize(
    ("width", "l0", "dense"),
    # From results/sweep.json and results/targets.json; the published JumpReLU SAEs of width 131k have under 0.06%.
    [
        (2048, 152.2, 0.265),
        (2048, 60.7, 0.054),
        (2048, 34.8, 0.011),
        (1024, 121.5, 0.508),
        (131_072, 75.0, 0.0006),
    ],
)
def test_a_narrow_sae_is_not_called_dense_because_of_its_width(width, l0, dense):
    assert not judge(width, l0=l0, dense_fraction=dense, dead_fraction=0.05).faults


def test_a_difference_within_the_standard_error_is_not_a_fault():
    """For attention outputs at some layers, an ablation costs as little as the splice."""
    little = {"mean_ablation_loss": 3.31, "zero_ablation_loss": 3.31, "delta_loss": 0.017}
    assert not judge(**little, delta_loss_se=0.014).faults
    assert judge(**little, delta_loss_se=0.002).faults
    assert judge(**little, delta_loss_se=math.nan).faults  # One row has no standard error.
    nothing = judge(mean_ablation_loss=3.29, zero_ablation_loss=3.2, delta_loss=-0.001, delta_loss_se=0.0)
    assert nothing.line.startswith("delta loss (-0.001) cannot judge it: mean ablation costs nothing (-0.010")


def test_the_verdict_after_training_says_nothing_of_losses():
    training = {name: GOOD[name] for name in ("l0", "fvu")}
    assert verdicts.verdict(training, 4096).line == (
        "no faults at L0 57.1 and FVU 0.032; run gemma-scope evaluate for delta loss, which decides"
    )
    assert verdicts.verdict(training | {"fvu": 1.5}, 4096).faults


def test_a_text_with_a_higher_delta_loss_is_reported_although_its_fvu_is_lower():
    """On news, delta loss was 0.93 instead of 0.19 while FVU improved."""
    own = {"delta_loss": 0.19, "delta_loss_se": 0.012, "fvu": 0.032}
    news = {"delta_loss": 0.93, "delta_loss_se": 0.03, "fvu": 0.021}
    assert verdicts.beside_own(news, own) == (
        "delta loss is 0.930, and 0.190 on the training text, although FVU is lower here (0.021 and 0.032)"
    )
    assert "although" not in verdicts.beside_own(news | {"fvu": 0.05}, own)
    assert verdicts.beside_own(own | {"delta_loss": 0.2}, own) == ""
    assert verdicts.beside_own(own, {"delta_loss": [], "fvu": "x"}) == ""


def test_only_saes_with_faults_are_listed():
    one, bad = judge(), judge(fvu=2.0)
    assert verdicts.lines({"a": one}) == [f"Verdict: {one.line}."]
    assert verdicts.lines({"a": one, "b": one}) == ["Verdict: no faults in 2 of 2 SAEs."]
    many = verdicts.lines({"a": one} | {f"b{i}": bad for i in range(8)})
    assert many[0] == "Verdict: no faults in 1 of 9 SAEs." and many[1] == f"b0: {bad.line}."
    assert len(many) == 7 and many[-1] == "And 3 more with faults."
    assert verdicts.lines({}) == []
