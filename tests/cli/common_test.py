"""Code shared by the commands: one-line errors, and output that the terminal cannot show."""

import os
import re
import subprocess
import sys

import pytest

from gemma_scope_jax.cli import common
from gemma_scope_jax.runtime import errors


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(13, "Permission denied", "a/b"), "a/b: Permission denied"),
        (FileExistsError(17, "File exists", "a"), "a: File exists"),
        (OSError(39, "Directory not empty", "a", None, "b"), "a: b: Directory not empty"),
        (OSError(30, "Read-only file system"), "Read-only file system"),
        (OSError("Not a gzipped file"), "Not a gzipped file"),
        (OSError(40, "Too many levels of links", "a\x1b[1m"), r"a\\x1b\[1m: Too many levels of links"),
        (OSError(28, "No space left on device", "a"), "the disk is full; .*a"),
        (errors.InputError("bad"), "bad"),
        (ValueError("a library's own"), None),
        (KeyError("defect"), None),
    ],
)
def test_system_errors_are_shown_in_one_line_with_the_file_name(error, message):
    found = common.explain(error)
    assert found is None if message is None else re.fullmatch(f".*{message}.*", found) and len(found) < 500


def test_a_name_that_the_terminal_cannot_show_does_not_end_the_command():
    program = (
        r'from gemma_scope_jax.cli import common; common.run(lambda: print("Wrote \udce9/±", flush=True))'
    )
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment, check=True)
    assert done.stdout == b"Wrote \\udce9/\\xb1\n"
