"""Evaluates the SAEs of a run, or those in files: python evaluate.py RUN_OR_SAE, which is gemma-scope evaluate.

On a slice of several hosts, the same command on each of them.
"""

from gemma_scope_jax.cli import main

if __name__ == "__main__":
    main.script("evaluate")
