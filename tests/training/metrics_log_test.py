"""A run's log, its progress line, and its warnings, for example of thresholds that do not move."""

import dataclasses
import json
import pathlib
import re

import numpy as np
import pytest
import tiny

from gemma_scope_jax import config
from gemma_scope_jax.training import bank, metrics_log, plans, step

PLAN = plans.make_plan(
    tiny.run_config(pathlib.Path("nowhere"), banks__main__sparsity_coefficients=(0.0, 1e-3)),
    tiny.TinyGemma(),
    1,
    1,
)
SPEED = {"tokens_per_second": 1234.0, "gemma_utilisation": None, "saes_utilisation": None}
NAMES = [member.name for member in PLAN.members]


def entries(**changes):
    values = {
        "l0": 60.0,
        "fvu": 0.1,
        "dead_latents": None,
        "dense_latents": 3,
        "theta_from_error": 1.0,
        "theta_from_sparsity": 1.0,
        "theta_reached": 0.9,
        "sparsity_coefficient": 1e-3,
    } | changes
    return [{"step": i, "speed": SPEED, "sae": dict.fromkeys(NAMES, values)} for i in range(6)]


def test_thresholds_moved_by_error_and_sparsity_cause_no_warning():
    assert metrics_log.stuck_thresholds(PLAN, entries()) == []


@pytest.mark.parametrize(
    ("changes", "said", "count"),
    [
        ({"theta_reached": 0.02}, r"only 2.0% of thresholds .* raise banks.main.bandwidth", 2),
        (
            {"theta_from_sparsity": 0.001},
            r"sparsity makes up 0.1% .* raise banks.main.sparsity_coefficients",
            1,
        ),
        (
            {"theta_from_error": 0.001},
            r"the error makes up 0.1% .* lower banks.main.sparsity_coefficients",
            1,
        ),
    ],
)
def test_the_warning_of_stuck_thresholds_names_the_field_to_change(changes, said, count):
    """An SAE without a penalty gets no warning about its small share of sparsity."""
    warnings = metrics_log.stuck_thresholds(PLAN, entries(**changes))
    assert len(warnings) == count
    for warning in warnings:
        assert re.search(said, warning), warning


def test_the_share_of_sparsity_is_judged_at_the_final_lambda():
    """λ has risen to a hundredth of its final value, and so the share is a hundredth of the final one."""
    early = entries(theta_from_sparsity=0.005, sparsity_coefficient=1e-5)
    assert metrics_log.stuck_thresholds(PLAN, early) == []
    assert len(metrics_log.stuck_thresholds(PLAN, entries(theta_from_sparsity=0.005))) == 1


def test_thresholds_are_watched_for_a_thousand_updates_or_half_of_a_short_run():
    assert metrics_log.watched_steps(PLAN) == 5  # Half of ten steps.


def test_a_too_small_learning_rate_causes_a_warning():
    """Gemma Scope's rate is for a million updates; in two thousand, a threshold moves by 15 per cent at most."""
    few = 2_000 * config.OptimizerConfig().learning_rate
    (of_window, of_rates) = metrics_log.check_plan(PLAN, 40, few)
    assert "by a factor of 1.15 at most" in of_rates
    assert "banks.main.window_updates is 2500 and there will be 40 updates" in of_window
    assert metrics_log.check_plan(PLAN, 40, 976_562 * config.OptimizerConfig().learning_rate) == [of_window]


def test_the_progress_line_shows_ranges_over_the_saes_and_unknown_values():
    entry = entries()[0]
    entry["sae"][NAMES[1]] = entry["sae"][NAMES[1]] | {"l0": 20.0, "fvu": 0.25}
    assert (
        metrics_log.progress(entry) == "1,234 tok/s, L0 20.0–60.0, FVU 0.100–0.250, dead ?, dense 3, 2 SAEs"
    )
    assert metrics_log.progress({"speed": SPEED, "sae": {}}) == "1,234 tok/s"


def test_the_end_of_a_run_is_judged_by_its_last_values(tmp_path):
    def write(**last):
        lines = entries(l0=15.0, dead_latents=8, dense_latents=0) + entries(
            l0=10.0, dead_latents=8, dense_latents=0
        )
        lines[-1] = entries(l0=12.0, dead_latents=40, dense_latents=0, **last)[0]
        lines = [line | {"step": i} for i, line in enumerate(lines)]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    write()
    assert metrics_log.last_values(tmp_path, 100)[NAMES[0]]["l0"] == 12.0
    assert metrics_log.last_values(tmp_path, 10)[NAMES[0]]["l0"] == 10.0
    assert metrics_log.judge(PLAN, tmp_path, 10)[NAMES[0]].faults == ()
    (fault,) = metrics_log.judge(PLAN, tmp_path, 100)[NAMES[0]].faults
    assert fault == "dead: 62% of latents never fired on 80,000 activations"  # The activations of a window.
    write(fvu=1.5)
    assert metrics_log.judge(PLAN, tmp_path, 100)[NAMES[1]].faults[0].startswith("FVU 1.5")
    assert metrics_log.judge(PLAN, tmp_path / "none", 100) == {}


def test_utilisation_is_relative_to_the_peak_and_separate_for_gemma_and_the_saes():
    speed = metrics_log.measure_speed(PLAN, 2.0, 0.5, (600, 400), 1000.0)
    assert (speed.tokens_per_second, speed.data_wait_s) == (PLAN.activations / 2, 0.5)
    assert (speed.gemma_utilisation, speed.saes_utilisation) == (0.3, 0.2)
    of_step = {"speed": vars(speed), "sae": {}}
    assert metrics_log.progress(of_step) == "64 tok/s, MFU Gemma 30% SAEs 20%"
    assert metrics_log.measure_speed(PLAN, 2.0, 0.5, (600, 100), None).gemma_utilisation is None


def line(step, **changes):
    speed = {"tokens_per_second": 1.0}
    return json.dumps(
        {"step": step, "speed": speed, "same_document_pairs": 0.5, "sae": {}} | changes
    ).encode()


@pytest.mark.parametrize(
    "damaged",
    [b'{"st', b"", b"[1]", b"1", b"null", b'{"step": 2}', b'{"step": "2", "sae": {}}', b'{"step": 2, "sae": []}',
     b'{"step": 2, "sae": {"a": 1}}', b"\xff\xfe", b"\0" * 99, b"[" * 10**5, line(1), line(3) + line(4)],
)  # fmt: skip
def test_a_damaged_line_affects_no_other_line_and_no_resumption(tmp_path, capsys, damaged):
    path = tmp_path / "metrics.jsonl"
    content = b"\n".join([line(1), damaged, line(3), line(4), line(9)[:20]])
    path.write_bytes(content)
    for _ in range(2):
        metrics_log.MetricsLog(tmp_path, 3).close()
        assert [entry["step"] for entry in metrics_log.read_metrics(tmp_path)] == [1, 3]
    told = capsys.readouterr().out
    aside = tmp_path / "metrics.jsonl.damaged.1"
    assert path.read_bytes() == line(1) + b"\n" + line(3) + b"\n"
    if damaged:  # An empty line is skipped without a message.
        assert told.count("\n") == 1 and "1 lines are damaged" in told and aside.read_bytes() == content
    else:
        assert not told and not aside.exists()


def test_warmups_longer_than_the_run_cause_warnings():
    long = dataclasses.replace(PLAN.optimizer, warmup_updates=41, sparsity_warmup_updates=100)
    _, of_rate, of_lambda = metrics_log.check_plan(dataclasses.replace(PLAN, optimizer=long), 40, 1.0)
    assert (
        "optimizer.warmup_updates is 41 and there will be 40 updates: the learning rate does not" in of_rate
    )
    assert "optimizer.sparsity_warmup_updates is 100" in of_lambda and "λ does not rise" in of_lambda


def test_undefined_numbers_are_none_and_reported(tmp_path):
    e = len(NAMES)
    values = {field.name: np.ones(e) for field in dataclasses.fields(bank.Metrics)}
    values |= {"activations_E": np.array([0, 7]), "fvu_E": np.full(e, np.nan)}
    values |= {"loss_E": np.array([np.nan, 1.0]), "l0_E": np.array([np.nan, 2.0])}
    nonfinite = {"layer_1_resid_post": step.Nonfinite(np.int32(3), np.int32(0))}
    metrics = step.Metrics(
        np.bool_(True), nonfinite, {"main": bank.Metrics(**values)}, np.zeros((4, 3), int), np.ones(4)
    )
    speed = metrics_log.measure_speed(PLAN, 1.0, 0.0, (0, 0), None)
    found = metrics_log.entry(PLAN, 5, metrics, speed, {NAMES[0]: {"l0": None, "fvu": None}})
    assert found["nonfinite"] == 3 and "NaN" not in json.dumps(found)
    assert found["sae"][NAMES[0]]["loss"] is None and found["sae"][NAMES[1]]["l0"] == 2
    assert "L0 2.0, FVU ?" in metrics_log.progress(found) and "held out FVU ?" in metrics_log.progress(found)
    first, second = metrics_log.undefined(found).values()
    assert f"in step 5 no activation counts for {NAMES[0]}" in first
    assert f"in step 5 all activations of {NAMES[1]} are the same" in second
    (tmp_path / "metrics.jsonl").write_text(json.dumps(found) + "\n")
    assert [v["l0"] for v in metrics_log.last_values(tmp_path, 5).values()] == [None, 2.0]
    assert "the activations do not vary" in metrics_log.judge(PLAN, tmp_path, 5)[NAMES[1]].line
    (of_second,) = metrics_log.stuck_thresholds(PLAN, [found])
    assert of_second.startswith(NAMES[1])
    values["loss_E"][1] = np.nan
    with pytest.raises(FloatingPointError, match="is nan at step 5"):
        metrics_log.entry(PLAN, 5, metrics, speed)
