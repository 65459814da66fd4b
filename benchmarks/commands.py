"""What those who measure share: where results lie, and commands that are shown and timed."""

import pathlib
import subprocess
import sys
import time

RESULTS = pathlib.Path("results")


def run(command: str) -> float:
    """Runs a command, shows it and its output; returns the seconds it took. `python` is this Python."""
    print(f"$ {command}", flush=True)
    start = time.perf_counter()
    program, *arguments = command.split()
    subprocess.run([sys.executable if program == "python" else program, *arguments], check=True)
    return time.perf_counter() - start
