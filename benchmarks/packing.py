"""The time to tokenise one long document and to pack its tokens into rows.

    python -m benchmarks.packing [--json=PATH]

The document is the default corpus in one line, repeated. The tokenizer is Gemma 3 270M's; a row has 1,024 tokens.
"""

import argparse
import itertools
import json
import os
import pathlib
import platform
import time

from gemma_scope_jax import config
from gemma_scope_jax.data import packing as packing_lib
from gemma_scope_jax.data import sources
from gemma_scope_jax.models import tokenizer

CHARACTERS = (10**5, 10**6, 10**7)
TOKENS = (10**5, 10**6, 10**7)


def processor() -> str:
    """The number of cores and the name of the processor."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return f"{os.cpu_count()} cores of {next(names, platform.processor() or platform.machine())}"


def measure() -> dict:
    """Seconds for each length of the document."""
    encode = tokenizer.load("gemma3_270m", "", "").encode
    corpus = " ".join(sources.documents(config.DEFAULT_TEXT)).replace("\n", " ")
    tokenising, packing = [], []
    for characters in CHARACTERS:
        line = (corpus * (characters // len(corpus) + 1))[:characters]
        start = time.perf_counter()
        tokens = encode(line)
        seconds = time.perf_counter() - start
        tokenising.append({"characters": characters, "tokens": len(tokens), "seconds": seconds})
    for count in TOKENS:
        document = list(itertools.islice(itertools.cycle(tokens), count))
        start = time.perf_counter()
        rows = sum(1 for _ in packing_lib.pack(iter([document]), 1024))
        packing.append({"tokens": count, "rows": rows, "seconds": time.perf_counter() - start})
    return {"processor": processor(), "tokenising": tokenising, "packing": packing}


def main() -> None:
    """Measures and prints; writes a file if --json is given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=pathlib.Path, help="file to write the numbers to")
    args = parser.parse_args()
    numbers = measure()
    print(json.dumps(numbers, indent=1))
    if args.json:
        args.json.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
