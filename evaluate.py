"""Evaluates the SAEs of a run or of files: `python evaluate.py RUN_OR_SAE` is `gemma-scope evaluate`.

On a slice of several hosts, run the same command on each host.
"""

from gemma_scope_jax.cli import main

if __name__ == "__main__":
    main.script("evaluate")
