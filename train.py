"""Trains a bank of sparse autoencoders, or continues a run.

python train.py --config=configs/quickstart.py --workdir=runs/quickstart [--config.field=value ...]

On a slice of several hosts, the same command on each of them; see docs/pods.md.
"""

import pathlib
import re
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from gemma_scope_jax import cli

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run's config file.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's directory. An unfinished run in it is continued.")
flags.mark_flags_as_required(["config", "workdir"])


def parse(argv: list[str]) -> list[str]:
    """Reads the flags, and with them the config file; a mistake in either is the user's to mend."""
    try:
        rest = flags.FLAGS(argv)
        _CONFIG.value.to_dict()  # A config file that cannot be loaded is an error only when it is looked at.
        return rest
    except (AttributeError, KeyError) as error:
        # ml_collections says the name, in quotes of quotes, and perhaps a better one.
        name = re.search(r"\w+", str(error))[0]
        argument = next((argument for argument in argv if f".{name}" in argument), None)
        if argument is None:  # Raised by the config file itself, so its traceback is what helps.
            raise
        better = re.search(r"Did you mean \W*(\w+)", str(error))
        hint = f"; did you mean {better[1]!r}?" if better else ""
        raise ValueError(f"the config has no field {name!r}, named by {argument}{hint}") from error
    except (TypeError, OSError, flags.Error) as error:
        # A mistake within the config file comes with its traceback; the last line says what it is.
        raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from error


def main(argv: list[str]) -> None:
    """Runs the training and exits with its code."""
    if len(argv) > 1:
        raise ValueError(f"unexpected argument {argv[1]!r}; fields are set by --config.field=value")
    # Imported late: a mistyped flag should not cost the seconds that JAX and Gemma take.
    from gemma_scope_jax import config, hosts, training

    logging.set_verbosity(logging.WARNING)  # Orbax tells of every file.
    made = config.from_dict(_CONFIG.value.to_dict())
    hosts.initialize(made.hosts.heartbeat_timeout_seconds)
    sys.exit(training.train(made, pathlib.Path(_WORKDIR.value)))


if __name__ == "__main__":
    cli.run(lambda: app.run(main, flags_parser=parse))
