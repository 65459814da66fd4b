"""What those who measure share: where results lie, and commands that are shown and measured."""

import os
import pathlib
import subprocess
import sys
import time

RESULTS = pathlib.Path("results")


def run(command: str) -> float:
    """See `measure`; the seconds alone."""
    return measure(command)[0]


def measure(command: str) -> tuple[float, int]:
    """Runs a command, shows it and its output; the seconds it took, and bytes it had in memory at most.

    `python` is this Python.
    """
    print(f"$ {command}", flush=True)
    start = time.perf_counter()
    program, *arguments = command.split()
    process = subprocess.Popen([sys.executable if program == "python" else program, *arguments])
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return time.perf_counter() - start, used.ru_maxrss * 1024
