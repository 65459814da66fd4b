"""Configs of runs, one a file; in an installed package they are `gemma_scope_jax.configs`."""
