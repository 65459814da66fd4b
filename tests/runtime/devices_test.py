"""Tests for the features of devices."""

import types

import jax
import pytest

from gemma_scope_jax.runtime import devices


@pytest.mark.parametrize(
    ("platform", "cpuinfo", "dtype"),
    [
        ("tpu", "flags : fpu", "bfloat16"),
        ("gpu", "flags : fpu", "bfloat16"),
        ("cpu", "flags : fpu avx512f avx512_bf16 sse", "bfloat16"),
        ("cpu", "flags : fpu amx_tile amx_bf16", "bfloat16"),
        ("cpu", "Features : fp asimd bf16", "bfloat16"),
        ("cpu", "flags : fpu avx2 avx512f", "float32"),
    ],
)
def test_the_faster_dtype_follows_a_devices_features(monkeypatch, tmp_path, platform, cpuinfo, dtype):
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(devices, "_CPUINFO", tmp_path / "cpuinfo")
    assert devices.faster_dtype(types.SimpleNamespace(platform=platform)) == dtype


def test_without_a_list_of_features_a_cpu_uses_float32(monkeypatch, tmp_path):
    monkeypatch.setattr(devices, "_CPUINFO", tmp_path / "missing")
    assert devices.faster_dtype(jax.devices()[0]) == "float32"
