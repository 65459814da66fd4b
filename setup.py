"""The packages of a wheel; everything else is in pyproject.toml.

The folder `configs` becomes the package `gemma_scope_jax.configs` when it is installed. In pyproject.toml, this would
require a list of all other packages by hand.
"""

import setuptools

setuptools.setup(
    packages=[*setuptools.find_packages(include=["gemma_scope_jax*"]), "gemma_scope_jax.configs"],
    package_dir={"gemma_scope_jax.configs": "configs"},
)
