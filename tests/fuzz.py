"""Damages files of every format at random and reads them, with limited memory and a time limit.

    python tests/fuzz.py FOLDER COUNT

Prints how many files were read and how many refused. Any error except ValueError ends the program.
"""

import collections
import dataclasses
import faulthandler
import json
import pathlib
import random
import resource
import shutil
import sys
import zipfile

import numpy as np

from gemma_scope_jax.evaluation import side_by_side
from gemma_scope_jax.runtime import files, safetensors_io
from gemma_scope_jax.saes import evaluation_file, formats
from gemma_scope_jax.saes.formats import (
    circuit_tracer,
    common,
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    saelens,
)
from gemma_scope_jax.saes.jumprelu import SAE

D, M = 8, 32
ABOUT = common.About(
    "google/gemma-2-2b", "blocks.3.ln2.hook_normalized", hook_name_out="blocks.3.hook_mlp_out"
)


def originals(folder: pathlib.Path) -> list[pathlib.Path]:
    """A small SAE or transcoder in each format."""
    rng = np.random.default_rng(0)
    shapes = {
        "W_enc": (D, M),
        "b_enc": (M,),
        "threshold": (M,),
        "W_dec": (M, D),
        "b_dec": (D,),
        "W_skip": (D, D),
    }
    arrays = {name: rng.random(shape, np.float32) for name, shape in shapes.items()}
    skip, plain = SAE(**arrays), SAE(**{**arrays, "W_skip": None})
    alone = common.About("google/gemma-2-2b", "blocks.3.hook_resid_post")
    saelens.write(folder / "saelens", skip, ABOUT)
    gemma_scope.write(folder / "gemma_scope", plain, common.About())
    gemma_scope_2.write(folder / "gemma_scope_2", skip, ABOUT)
    dictionary_learning.write(folder / "dictionary_learning", plain, alone)
    circuit_tracer.write(folder / "circuit_tracer", skip, ABOUT)
    layer = gemma_scope_2.Layer(
        *(arrays[k] for k in ("W_enc", "b_enc", "threshold")), arrays["W_dec"][:, None], arrays["b_dec"]
    )
    gemma_scope_2.write_layers(folder / "multi_layer", [layer])
    (folder / "compressed").mkdir()
    named = {k: v for k, v in arrays.items() if k != "W_skip"}
    np.savez_compressed(folder / "compressed" / "params.npz", **named)
    # The layout of SAELens 5.
    flat = {
        "architecture": "jumprelu", "hook_name": "blocks.3.hook_resid_post", "model_name": "gemma-2-2b",
        "activation_fn_str": "relu", "apply_b_dec_to_input": True, "finetuning_scaling_factor": False,
        "normalize_activations": "none", "context_size": 128,
    }  # fmt: skip
    (folder / "saelens_5").mkdir()
    files.write_json(folder / "saelens_5" / "cfg.json", flat)
    factor = {"scaling_factor": np.ones(M, np.float32)}
    safetensors_io.write_safetensors(folder / "saelens_5" / "sae_weights.safetensors", named | factor)
    (folder / "evaluation").mkdir()
    numbers = {field.name: 0.5 for field in dataclasses.fields(evaluation_file.Evaluation)} | {"rows": 40}
    files.write_json(
        folder / "evaluation" / "evaluation.json", {"model": "tiny", "sae": {"a": numbers, "b": numbers}}
    )
    sums = {f"{name}/by_row/{key}": rng.random(40) for name in "ab" for key in side_by_side.by_row()}
    np.savez_compressed(folder / "evaluation" / "evaluation.npz", **sums)
    return sorted(folder.iterdir())


def mutate(path: pathlib.Path, rng: random.Random) -> None:
    """Cuts or grows a file, overwrites bytes or lengths, swaps words, or renames a member of an archive."""
    content = bytearray(path.read_bytes())
    match rng.randrange(8):
        case 0:
            content = content[: rng.randrange(len(content) + 1)]
        case 1:
            content += rng.randbytes(rng.randrange(1, 200))
        case 2:
            for _ in range(rng.randrange(1, 20)):
                content[rng.randrange(len(content))] = rng.randrange(256)
        case 3:  # In the header.
            for _ in range(rng.randrange(1, 4)):
                content[rng.randrange(min(len(content), 300))] = rng.randrange(256)
        case 4:  # Possibly a length field.
            at = rng.randrange(len(content))
            content[at : at + 8] = rng.choice([b"\xff" * 8, b"\0" * 8, (2**40).to_bytes(8, "little")])
        case 5:
            digits = [i for i, byte in enumerate(content[:2000]) if 48 <= byte < 58]
            if digits:
                content[rng.choice(digits)] = rng.choice(b"0123456789-e")
        case 6:
            words = (
                b"W_enc",
                b"W_dec",
                b"b_enc",
                b"threshold",
                b"float32",
                b"jumprelu",
                b"F32",
                b"true",
                b"null",
            )
            content = content.replace(
                rng.choice(words), rng.choice([*words, b"../../etc/passwd", b'"', b"NaN"]), 1
            )
        case 7:
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as old:
                    members = {info.filename: old.read(info) for info in old.infolist()}
                name = rng.choice(list(members))
                members[rng.choice(["../" + name, "/etc/passwd", name + "x"])] = members.pop(name)
                with zipfile.ZipFile(path, "w") as new:
                    for key, value in members.items():
                        new.writestr(key, value)
                return
            path.unlink()
            return
    path.write_bytes(content)


def main(folder: pathlib.Path, count: int) -> None:
    """Damages and reads `count` files."""
    found = collections.Counter()
    places = originals(folder / "originals")
    for place in places:  # Imports all that reading needs.
        read(place)
    # Half a gigabyte more than is mapped already.
    mapped = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 2**29, mapped + 2**29))
    for seed in range(count):
        rng = random.Random(seed)
        place = rng.choice(places)
        broken = folder / "broken" / place.name
        shutil.copytree(place, broken)
        mutate(rng.choice(sorted(broken.iterdir())), rng)
        faulthandler.dump_traceback_later(20, exit=True)
        try:
            read(broken)
            found["read"] += 1
        except ValueError as error:
            assert len(str(error)) < 20_000, (seed, place.name)
            found["refused"] += 1
        except BaseException:
            print(f"seed {seed}, {place.name}", file=sys.stderr)
            raise
        faulthandler.cancel_dump_traceback_later()
        shutil.rmtree(folder / "broken")
    print(f"{found['read']} read, {found['refused']} refused")


def read(place: pathlib.Path) -> None:
    """Reads all SAEs or evaluations in a folder."""
    if place.name == "multi_layer":
        gemma_scope_2.read_layers(place)
    elif place.name == "evaluation":
        found = side_by_side.read(place)
        json.dumps(
            {name: vars(one) | {"by_row": None} for name, one in found.results.items()}, allow_nan=True
        )
    else:
        list(formats.read(place))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), int(sys.argv[2]))
