"""SAEs in Hugging Face's repositories: fetched whole and checked, without what else lies there; and published."""

import contextlib
import fnmatch
import hashlib
import pathlib
import re
import urllib.parse
from collections.abc import Sequence
from typing import NamedTuple

from gemma_scope_jax.formats import detect
from gemma_scope_jax.runtime import files
from gemma_scope_jax.runtime.printing import printable

# As elsewhere of the hub's: a slash in a revision is %2F, but in those that it names itself, as refs/pr/3.
_LOCATION = re.compile(r"hf://([\w.-]+/[\w.-]+?)(?:@(refs/[\w.-]+/[\w.-]+|[\w.%-]+))?(?:/([^@]*))?")
_ADDRESS = re.compile(
    r"https?://(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)"
    r"(?:/(?:tree|blob|resolve)/(refs/[\w.-]+/[\w.-]+|[\w.%-]+)(/[^?#]*)?)?(?:[?#].*)?/?"
)


class Place(NamedTuple):
    """A folder of a repository on the hub."""

    repository: str
    revision: str | None
    folder: str


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
    found = sorted(path for path in matches if detect.format_of(path))
    if not found:
        if location.startswith("hf://"):
            raise ValueError(_nothing(location))
        raise ValueError(f"{location} matches no SAE")
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
        if match := _ADDRESS.fullmatch(location):
            repository, revision, inside = match[1], f"@{match[2]}" if match[2] else "", match[3] or ""
            raise ValueError(f"{location} is an address; give hf://{repository}{revision}{inside}")
        path = files.expanded(location)
        if not path.exists():
            is_like = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)+", location)
            hint = f"; one on Hugging Face's hub is given as hf://{location}" if is_like else ""
            raise ValueError(f"{path} does not exist{hint}")
        return path
    root, inside = _fetch(location)
    path = root / inside
    if not path.exists():
        raise ValueError(_nothing(location))
    _check_whole(location, path)
    return path


def place_of(location: str) -> Place:
    """What `hf://OWNER/NAME@REVISION/FOLDER` means.

    Raises:
      ValueError: it is not of that form.
    """
    match = _LOCATION.fullmatch(location)
    revision = urllib.parse.unquote(match[2]) if match and match[2] else None
    if not match or ".." in [*location.split("/"), *(revision or "").split("/")]:
        raise ValueError(f"{location} is not hf://OWNER/NAME/FOLDER or hf://OWNER/NAME@REVISION/FOLDER")
    return Place(match[1], revision, (match[3] or "").strip("/"))


def snapshot(location: str, place: Place, patterns: Sequence[str]) -> pathlib.Path:
    """Where the cache has those files of a repository whose names match a pattern; they are fetched if need be.

    Raises:
      ValueError: they are neither in the cache nor to be had.
    """
    import huggingface_hub  # Slow to import.
    from huggingface_hub import constants

    try:
        found = huggingface_hub.snapshot_download(
            place.repository, revision=place.revision, allow_patterns=list(patterns)
        )
    except Exception as error:  # Many kinds: no network, no such repository, terms not accepted.
        if constants.HF_HUB_OFFLINE:
            raise ValueError(_not_cached(location)) from error
        reason = printable(" ".join(str(error).split()), 300)
        raise ValueError(
            f"cannot fetch {location} ({reason}); if it has terms, accept them and `hf auth login`"
        ) from error
    return pathlib.Path(found)


def _fetch(location: str) -> tuple[pathlib.Path, str]:
    """Where the cache has a repository with the SAEs of a location, and the location's folder in it."""
    place = place_of(location)
    inside = place.folder
    # Of a file, what lies beside it comes too: it says what the SAE is of.
    is_file = any(fnmatch.fnmatch(pathlib.PurePosixPath(inside).name, name) for name in detect.FILES)
    folder = str(pathlib.PurePosixPath(inside).parent) if is_file else inside
    patterns = [name if folder in ("", ".") else f"{folder}/{name}" for name in detect.FILES]
    return snapshot(location, place, patterns), inside


def _not_cached(location: str) -> str:
    from huggingface_hub import constants

    return (
        f"{location} is not in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids to ask the hub; "
        "fetch it once without that variable"
    )


def _nothing(location: str) -> str:
    """Why there is no SAE at a location, and where in its repository there are some."""
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return _not_cached(location)
    place = place_of(location)
    try:
        names = huggingface_hub.HfApi().list_repo_files(place.repository, revision=place.revision)
    except Exception as error:
        reason = printable(" ".join(str(error).split()))
        return f"{location} is not in the cache, and the hub cannot be asked ({reason})"
    weights = [
        name for name in detect.FILES if not name.endswith((".json", ".yaml", "site_mean.safetensors"))
    ]
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
        raise ValueError(
            f"{', '.join(damaged)} of {location} arrived damaged, not of the digest that the hub gives; what was "
            "fetched is removed, fetch it again"
        )


def own_folder(location: str | pathlib.Path) -> pathlib.Path:
    """Where results of what lies at a location go: to the SAE or run; of a hub's, below the current folder."""
    if str(location).startswith("hf://"):
        parts = str(location).removeprefix("hf://").replace("*", "_").split("/")
        return pathlib.Path("evaluations", *parts)
    path, _ = files.matching(location)
    return path.parent if path.is_file() else path


def results_folder(
    location: str | pathlib.Path, out: pathlib.Path | None, label: pathlib.Path | None = None
) -> pathlib.Path:
    """The folder for results of what lies at a location, made before an hour's work and not after it.

    Args:
      location: of an SAE or run.
      out: the folder, if it is given; else it is `own_folder`.
      label: of results that do not belong there but below it, in `evaluations/LABEL`.

    Raises:
      ValueError: it is a file, or nothing can be written there.
    """
    if out is None:
        out = own_folder(location)
        out = out if label is None else out / "evaluations" / label
    files.check_output(out, is_folder=True)
    out.mkdir(parents=True, exist_ok=True)
    return out


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


def push(folder: pathlib.Path, repository: str) -> str:
    """Uploads a folder to a repository, which is made if there is none; returns its address.

    Raises:
      ValueError: it cannot be made or written to.
    """
    import huggingface_hub

    try:
        api = huggingface_hub.HfApi()
        url = api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    except Exception as error:  # Many kinds: no network, not logged in, no right to.
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"cannot push to {repository} ({reason}); log in with `hf auth login`, then `hf upload "
            f"{repository} {folder}`"
        ) from error
    return str(url)
