"""benchmarks/tpu.py reports the memory of a harvest, compiled here by the TPU's own compiler."""

import json
import pathlib
import subprocess
import sys

import pytest

from gemma_scope_jax.models import registry


@pytest.mark.skipif(not (pathlib.Path(sys.prefix) / "libtpu").exists(), reason="needs make .venv/libtpu")
def test_a_harvest_of_2b_fits_a_small_chip_and_needs_little_more_than_its_weights(tmp_path):
    path = tmp_path / "tpu.json"
    command = [sys.executable, "-m", "benchmarks.tpu", "--harvest=gemma2_2b", f"--json={path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (case,) = json.loads(path.read_text())["harvests"]

    # Gemma 2 2B, from its report: a vocabulary of 256,000 and D = 2,304. A block has q and o of 8 heads, k and v of 4
    # heads, a head width of 256, three MLP matrices of width 9,216, and four norms. Up to layer 12 there are thirteen
    # blocks. The final norm is loaded too.
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
def test_the_compiler_prints_nothing():
    program = (
        "from gemma_scope_jax.cli import common; common.find_tpu_compiler()\n"
        "from gemma_scope_jax.training import forecast\n"
        "print(len(forecast.slice_devices('v5e:2x4')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    assert done.stdout == "8\n" and done.stderr == "", done.stderr
