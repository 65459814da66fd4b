"""Which packages a wheel has; all else is in pyproject.toml.

The configs' home is the folder `configs`, and in an installed package they are `gemma_scope_jax.configs`. To say so
in pyproject.toml, every other package would have to be listed there by hand.
"""

import setuptools

setuptools.setup(
    packages=[*setuptools.find_packages(include=["gemma_scope_jax*"]), "gemma_scope_jax.configs"],
    package_dir={"gemma_scope_jax.configs": "configs"},
)
