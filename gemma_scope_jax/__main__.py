"""`python -m gemma_scope_jax COMMAND`, the old form of `gemma-scope COMMAND`."""

import shlex
import sys

from gemma_scope_jax.cli import main, old_forms

if __name__ == "__main__":
    old_forms.warn(shlex.join(["gemma-scope", *sys.argv[1:]]))
    main.main()
