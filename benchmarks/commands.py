"""Parts of several benchmarks: the folder of results, and running a command with its time and memory."""

import os
import pathlib
import subprocess
import sys
import time

RESULTS = pathlib.Path("results")


def run(command: str) -> float:
    """Runs a command like `measure`; returns only the seconds."""
    return measure(command)[0]


def measure(command: str) -> tuple[float, int]:
    """Prints and runs a command; returns its seconds and its peak memory in bytes.

    `python` in the command is this Python.
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
