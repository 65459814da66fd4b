"""Finds SAEs at a path, at several paths with `*`, or in a Hugging Face Hub repository, and checks downloads."""

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
    """Whether `*` in a location is a wildcard, and not part of the name of an existing path."""
    return "*" in location and not files.expanded(location).exists()


def paths(location: str) -> list[pathlib.Path]:
    """The local paths of a location: one, or with `*` every match that holds an SAE.

    Raises:
      ValueError: if there is no match, or as in `local`.
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
    """The local path of a location; `hf://OWNER/NAME/FOLDER` is downloaded to Hugging Face's cache.

    An interrupted download resumes where it stopped. Only the files of SAEs are downloaded, not examples.

    Raises:
      ValueError: if the path or repository does not exist, or if a file does not match the hub's digest.
    """
    if not location.startswith("hf://"):
        hub.refuse_address(location)
        path = files.expanded(location)
        if not path.exists():
            is_like = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)+", location)
            hint = f"; for a folder on the Hugging Face Hub, give hf://{location}" if is_like else ""
            raise NotFoundError(f"{path} does not exist{hint}")
        return path
    root, inside = _fetch(location)
    path = root / inside
    if not path.exists():
        raise NotFoundError(_nothing(location))
    _check_whole(location, path)
    return path


def _fetch(location: str) -> tuple[pathlib.Path, str]:
    """Downloads the SAEs of a location; returns the repository's folder in the cache, and the path within it."""
    place = hub.place_of(location)
    inside = place.folder
    # For a file, also fetch the config beside it, which names the model and site.
    is_file = any(fnmatch.fnmatch(pathlib.PurePosixPath(inside).name, name) for name in formats.files())
    folder = str(pathlib.PurePosixPath(inside).parent) if is_file else inside
    patterns = [name if folder in ("", ".") else f"{folder}/{name}" for name in formats.files()]
    return hub.snapshot(location, place, patterns), inside


def _nothing(location: str) -> str:
    """The error message for a location without an SAE; it lists folders of the repository that have one."""
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return hub.not_cached(location)
    place = hub.place_of(location)
    try:
        names = huggingface_hub.HfApi().list_repo_files(place.repository, revision=place.revision)
    except Exception as error:
        reason = printable(" ".join(str(error).split()))
        return f"{location} is not in the cache, and its repository cannot be listed ({reason})"
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
            f"{location}: the download of {', '.join(damaged)} is damaged (its digest is not the hub's); the files "
            "have been removed, download them again"
        )


def _is_whole(file: pathlib.Path) -> bool:
    """Whether a large file matches the digest that is its name in the cache; a file that does not is removed.

    Each file is checked only once, since the cache never changes it.
    """
    blob = file.resolve()
    mark = blob.with_name(f"{blob.name}.checked")
    if not re.fullmatch("[0-9a-f]{64}", blob.name) or mark.exists():
        return True
    with blob.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found == blob.name:
        with contextlib.suppress(OSError):  # The cache may be read-only.
            mark.touch()
        return True
    file.unlink()
    blob.unlink(missing_ok=True)
    return False
