"""Where SAEs lie: at a path, at several by `*`, or in a repository on the hub, fetched whole and checked."""

import contextlib
import fnmatch
import hashlib
import pathlib
import re

from gemma_scope_jax.runtime import files, hub
from gemma_scope_jax.runtime.errors import NotFoundError
from gemma_scope_jax.runtime.printing import printable
from gemma_scope_jax.saes import formats


def is_pattern(location: str) -> bool:
    """Whether a location names several places, by `*`, and is not the name of one that is there."""
    return "*" in location and not files.expanded(location).exists()


def paths(location: str) -> list[pathlib.Path]:
    """The places of a location as they can be opened: one, or with `*` in its folder all that hold an SAE.

    Raises:
      ValueError: there are none; else as `local`.
    """
    if not is_pattern(location):
        return [local(location)]
    if location.startswith("hf://"):
        root, inside = _fetch(location)
        matches = root.glob(inside)
    else:
        _, matches = files.matching(location)
    found = sorted(path for path in matches if formats.format_of(path))
    if not found:
        if location.startswith("hf://"):
            raise NotFoundError(_nothing(location))
        raise NotFoundError(f"{location} matches no SAE")
    if location.startswith("hf://"):
        for path in found:
            _check_whole(location, path)
    return found


def local(location: str) -> pathlib.Path:
    """A location as it can be opened: `hf://OWNER/NAME/FOLDER` becomes where Hugging Face's cache keeps that folder.

    An interrupted download goes on where it stopped. Only files that are SAEs' are fetched, no examples.

    Raises:
      ValueError: there is no such path or repository, or a file is not what the repository says it is.
    """
    if not location.startswith("hf://"):
        hub.refuse_address(location)
        path = files.expanded(location)
        if not path.exists():
            is_like = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)+", location)
            hint = f"; one on Hugging Face's hub is given as hf://{location}" if is_like else ""
            raise NotFoundError(f"{path} does not exist{hint}")
        return path
    root, inside = _fetch(location)
    path = root / inside
    if not path.exists():
        raise NotFoundError(_nothing(location))
    _check_whole(location, path)
    return path


def _fetch(location: str) -> tuple[pathlib.Path, str]:
    """Where the cache has a repository with the SAEs of a location, and the location's folder in it."""
    place = hub.place_of(location)
    inside = place.folder
    # Of a file, what lies beside it comes too: it says what the SAE is of.
    is_file = any(fnmatch.fnmatch(pathlib.PurePosixPath(inside).name, name) for name in formats.files())
    folder = str(pathlib.PurePosixPath(inside).parent) if is_file else inside
    patterns = [name if folder in ("", ".") else f"{folder}/{name}" for name in formats.files()]
    return hub.snapshot(location, place, patterns), inside


def _nothing(location: str) -> str:
    """Why there is no SAE at a location, and where in its repository there are some."""
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return hub.not_cached(location)
    place = hub.place_of(location)
    try:
        names = huggingface_hub.HfApi().list_repo_files(place.repository, revision=place.revision)
    except Exception as error:
        reason = printable(" ".join(str(error).split()))
        return f"{location} is not in the cache, and the hub cannot be asked ({reason})"
    weights = formats.weight_files()
    paths_in_it = [pathlib.PurePosixPath(name) for name in names]
    folders = sorted({str(p.parent) for p in paths_in_it if any(fnmatch.fnmatch(p.name, w) for w in weights)})
    near = [folder for folder in folders if folder.startswith(place.folder)] or folders
    some = f"has SAEs in {', '.join(near[:3])}" + (f" and {len(near) - 3:,} more" if len(near) > 3 else "")
    return f"{location}: the repository has no SAE in {place.folder!r}; it " + (
        printable(some, 250) if near else f"has none of {', '.join(weights)}"
    )


def _check_whole(location: str, path: pathlib.Path) -> None:
    beside = sorted((path if path.is_dir() else path.parent).iterdir())
    if damaged := [file.name for file in beside if file.is_file() and not _is_whole(file)]:
        raise NotFoundError(
            f"{', '.join(damaged)} of {location} arrived damaged, not of the digest that the hub gives; what was "
            "fetched is removed, fetch it again"
        )


def _is_whole(file: pathlib.Path) -> bool:
    """Compares a large file with the digest by which the cache calls it; removes it if it is another's.

    Once, since the cache never changes a file.
    """
    blob = file.resolve()
    mark = blob.with_name(f"{blob.name}.checked")
    if not re.fullmatch("[0-9a-f]{64}", blob.name) or mark.exists():
        return True
    with blob.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found == blob.name:
        with contextlib.suppress(OSError):  # Of a cache that may only be read.
            mark.touch()
        return True
    file.unlink()
    blob.unlink(missing_ok=True)
    return False
