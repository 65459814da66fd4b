"""Trains sparse autoencoders, or continues a run: `python train.py CONFIG WORKDIR` is `gemma-scope train`.

On a slice of several hosts, run the same command on each host; see docs/pods.md.
"""

from gemma_scope_jax.cli import main

if __name__ == "__main__":
    main.script("train")
