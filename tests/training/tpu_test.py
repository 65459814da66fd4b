"""The numbers of benchmarks/tpu.py for a harvest, compiled by the TPU's own compiler."""

import json
import pathlib
import subprocess
import sys

import pytest

from gemma_scope_jax.models import registry


@pytest.mark.skipif(not (pathlib.Path(sys.prefix) / "libtpu").exists(), reason="needs make .venv/libtpu")
def test_a_harvest_of_2b_fits_a_small_chip_and_needs_its_weights_and_little_more(tmp_path):
    path = tmp_path / "tpu.json"
    command = [sys.executable, "-m", "benchmarks.tpu", "--harvest=gemma2_2b", f"--json={path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (case,) = json.loads(path.read_text())["harvests"]

    # Gemma 2 2B by its report: a vocabulary of 256,000, D = 2,304; a block has q and o of 8 heads and k and v of 4,
    # each of 256, three matrices of the MLP of 9,216, and four norms. Thirteen blocks lie up to layer 12;
    # the last norm is kept as well.
    block = 2304 * (8 + 8 + 4 + 4) * 256 + 3 * 2304 * 9216 + 4 * 2304
    assert case["parameters"] == 256_000 * 2304 + 13 * block + 2304
    weights_bytes = 2 * case["parameters"]
    tokens_bytes = 4 * case["sequences_per_chip"] * (case["length"] + 2)
    assert weights_bytes + tokens_bytes <= case["argument_bytes"] <= 1.01 * weights_bytes
    activations_bytes = (
        2 * case["sequences_per_chip"] * case["length"] * registry.build_model("gemma2_2b").config.embed_dim
    )
    assert case["argument_bytes"] + activations_bytes <= case["peak_bytes"] < 16e9 / 4


@pytest.mark.skipif(not (pathlib.Path(sys.prefix) / "libtpu").exists(), reason="needs make .venv/libtpu")
def test_the_compiler_is_silent():
    program = (
        "from gemma_scope_jax.cli import common; common.find_tpu_compiler()\n"
        "from gemma_scope_jax.training import forecast\n"
        "print(len(forecast.slice_devices('v5e:2x4')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    assert done.stdout == "8\n" and done.stderr == "", done.stderr
