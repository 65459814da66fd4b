"""Modules that moved into subpackages can still be imported by their old names, with a deprecation warning."""

import subprocess
import sys

import pytest

import gemma_scope_jax
from gemma_scope_jax.models import sites


@pytest.mark.parametrize("name", gemma_scope_jax._MOVED)
def test_old_names_warn_with_the_new_name(name):
    with pytest.warns(DeprecationWarning, match=rf"^gemma_scope_jax.{name} is now gemma_scope_jax\.\w+"):
        assert vars(getattr(gemma_scope_jax, name))


def test_a_module_that_was_split_has_the_names_of_all_its_parts():
    with pytest.warns(DeprecationWarning):
        from gemma_scope_jax import gemma
    assert gemma.Site("embed", 0) and gemma.BOS == 2 and gemma.run_blocks and gemma.load and gemma.logits
    assert gemma.depth is sites.blocks_needed


def test_an_unknown_name_raises_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        gemma_scope_jax.nothing  # noqa: B018


def test_the_package_itself_imports_nothing_heavy():
    code = "import sys, gemma_scope_jax; print(*sorted({'jax', 'numpy', 'gemma', 'tensorflow'} & sys.modules.keys()))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "\n"
    )
