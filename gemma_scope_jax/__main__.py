"""python -m gemma_scope_jax COMMAND"""

from gemma_scope_jax.cli import common, main

if __name__ == "__main__":
    common.run(main.main)
