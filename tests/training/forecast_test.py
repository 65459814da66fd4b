"""The forecasts of `plan` equal formulas by hand and the results of the TPU's own compiler."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import pytest
import tiny

from gemma_scope_jax.cli import common, plan
from gemma_scope_jax.runtime import devices
from gemma_scope_jax.training import flops, forecast, plans, step

needs_compiler = pytest.mark.skipif(
    not (pathlib.Path(sys.prefix) / "libtpu").exists(), reason="needs make .venv/libtpu"
)


def test_an_updates_flops_equal_those_of_its_products():
    banks = {
        "plain": dict(layers=(0, 1, 2), width=64),
        "skip": dict(layers=(1,), sites=("attn_out",), target_site="mlp_out", skip=True, width=128),
    }
    plan = plans.make_plan(tiny.run_config(pathlib.Path("nowhere"), banks=banks), tiny.TinyGemma(), 2, 1)
    # Three SAEs are padded to four, and the transcoder to two. D = 32, N·H = 64, and the batch is 32.
    assert flops.update_flops(plan.banks[0], tiny.TinyGemma(), 32) == 4 * 5 * (2 * 32 * 32 * 64)
    products = 2 * 64 * 128 + 3 * 32 * 128 + 2 * 64 * 32
    assert flops.update_flops(plan.banks[1], tiny.TinyGemma(), 32) == 2 * 2 * 32 * products
    of_gemma, of_banks = flops.step_flops(plan, tiny.TinyGemma(), 16)
    assert of_gemma == flops.harvest_flops(tiny.TinyGemma(), 8, 16, 3)
    assert of_banks == [4 * flops.update_flops(b, tiny.TinyGemma(), 32) for b in plan.banks]


HLO = """
  %a = f32[1,4096]{1,0} all-gather(%x), metadata={op_name="jit(step)/cond/banks/while/body/c"}
  %b = (f32[8]{0}, bf16[4,2]{1,0}) all-reduce(%y, %z), metadata={op_name="jit(step)/cond/banks/while/body/d"}
  %c = (bf16[288,512]{1,0}, bf16[2304,512]{1,0}) all-gather-start(%w), metadata={op_name="jit(step)/cond/gemma/e"}
  %d = bf16[2304,512]{1,0} all-gather-done(%c)
  %e = s32[] all-reduce(%v), metadata={op_name="jit(step)/reduce_sum"}
"""


def test_collectives_of_an_update_are_counted_once_for_each_update():
    found = forecast.parse_collectives(HLO, 16)
    assert [(c.kind, c.where, c.times, c.bytes) for c in found] == [
        ("all-gather", "banks", 16, 16 * 4 * 4096),
        ("all-gather", "gemma", 1, 2 * 2304 * 512),
        ("all-reduce", "banks", 16, 16 * (32 + 16)),
        ("all-reduce", "other", 1, 4),
    ]


@needs_compiler
def test_the_forecast_compiles_the_step_that_is_trained(inputs, monkeypatch, capsys):
    """If the training step has one more sum over all chips, the forecast counts it."""
    common.find_tpu_compiler()
    # Large enough to be split over chips, and small enough to compile in seconds.
    c = tiny.run_config(inputs, banks__main__width=1024, gemma_dtype="bfloat16")
    before = forecast.forecast(c, "v5e:2x4")
    assert (before.devices, before.data, before.latent) == (8, 1, 8)
    assert before.tokens_per_step == 128 and before.hours > 0
    total = before.gemma_s + before.banks_s + before.optimizer_s + before.collectives_s
    assert before.step_s == total
    # By hand: four updates of five products, each in six passes, on eight chips.
    assert before.banks_s == 4 * 6 * 5 * 2 * 32 * 32 * 1024 / (8 * 197e12)
    high = before.at("high")
    assert high.banks_s == before.banks_s / 2 and high.hours < before.hours
    assert high.step_s == pytest.approx(total - before.banks_s / 2, rel=1e-12)
    plan.show(before, 1.5)
    shown = " ".join(capsys.readouterr().out.split())
    assert "v5e:2x4: 8 devices, mesh 1 × 8, SAEs: 1" in shown
    assert (
        f"highest (this run) 6 {1000 * before.step_s:.1f} {before.hours:.2f} {1.5 * 8 * before.hours:,.2f}"
        in shown
    )
    assert f"high 3 {1000 * high.step_s:.1f} {high.hours:.2f}" in shown
    assert f"${1.5 * 8 * before.hours:,.2f} to ${1.5 * 16 * before.hours:,.2f} at $1.5 per chip-hour" in shown

    make_step = step.make_step

    def make_other_step(*args):
        step = make_step(*args)

        def other(state, batch, gemma):
            state, metrics = step(state, batch, gemma)
            tokens = batch.tokens_SxL.astype(jnp.float32)
            return state, metrics.replace(weight_B=metrics.weight_B + jnp.sum(jnp.sin(tokens)))

        return other

    monkeypatch.setattr(step, "make_step", make_other_step)
    after = forecast.forecast(c, "v5e:2x4")
    sums = [sum(x.times for x in f.collectives if x.kind == "all-reduce") for f in (before, after)]
    assert sums[1] > sums[0]


# From Cloud's pages: the number in a name of v4 and v5p counts cores, two for each chip; in v5e and v6e, chips.
@pytest.mark.parametrize(
    ("name", "topology"),
    [
        ("v5litepod-16", "v5e:4x4"),
        ("v5e-8", "v5e:2x4"),
        ("v6e-256", "v6e:16x16"),
        ("v5p-8", "v5p:2x2x1"),
        ("v5p-32", "v5p:2x2x4"),
        ("v4-512", "v4:4x8x8"),
        ("v5p:2x4x4", "v5p:2x4x4"),
    ],
)
def test_slices_are_found_by_clouds_names(name, topology):
    assert forecast.topology_of(name) == topology


def test_an_unknown_slice_size_is_refused_with_the_known_sizes():
    with pytest.raises(ValueError, match="there is no slice v5p-12; sizes of v5p are 8, 16, 32"):
        forecast.topology_of("v5p-12")


@needs_compiler
@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v9:2x2", "topology 'v9:2x2' is not KIND:AxB or KIND:AxBxC with KIND one of v4, v5e"),
        ("v5e:8", "topology 'v5e:8' is not KIND"),
        ("v5p:3x5", "cannot compile for v5p:3x5"),
    ],
)
def test_invalid_topologies_are_refused(topology, message):
    common.find_tpu_compiler()
    with pytest.raises(ValueError, match=message):
        forecast.slice_devices(topology)


def test_a_chip_is_identified_by_jaxs_device_kind():
    class Device:
        device_kind = "TPU v5 lite"

    assert devices.chip_of(Device()) == devices.CHIPS["v5e"]
    assert devices.chip_of(jax.devices()[0]) is None
