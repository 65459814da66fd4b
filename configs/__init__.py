"""Configs of runs, one per file; in an installed package this folder is `gemma_scope_jax.configs`."""
