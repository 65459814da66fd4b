"""Trains sparse autoencoders, or continues a run: python train.py CONFIG WORKDIR, which is gemma-scope train.

On a slice of several hosts, the same command on each of them; see docs/pods.md.
"""

from gemma_scope_jax.cli import main

if __name__ == "__main__":
    main.script("train")
