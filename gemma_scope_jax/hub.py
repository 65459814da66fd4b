"""SAEs in Hugging Face's repositories: fetched whole and checked, without what else lies there; and published."""

import fnmatch
import hashlib
import pathlib
import re

from gemma_scope_jax import files
from gemma_scope_jax.formats import detect
from gemma_scope_jax.printing import quoted

_LOCATION = re.compile(r"hf://([\w.-]+/[\w.-]+?)(?:@([\w./-]+?))?(?:/([^@]*))?")


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
        path = files.expanded(location)
        if not path.exists():
            raise ValueError(f"{path} does not exist")
        return path
    root, inside = _fetch(location)
    path = root / inside
    if not path.exists():
        raise ValueError(f"{location}: the repository has no SAE in {quoted(inside)}")
    _check_whole(location, path)
    return path


def _fetch(location: str) -> tuple[pathlib.Path, str]:
    """Where the cache has a repository with the SAEs of a location, and the location's folder in it."""
    match = _LOCATION.fullmatch(location)
    if not match or ".." in location.split("/"):
        raise ValueError(f"{location} is not hf://OWNER/NAME/FOLDER or hf://OWNER/NAME@REVISION/FOLDER")
    repository, revision, inside = match[1], match[2], (match[3] or "").strip("/")
    import huggingface_hub  # Slow to import.

    # Of a file, what lies beside it comes too: it says what the SAE is of.
    is_file = any(fnmatch.fnmatch(pathlib.PurePosixPath(inside).name, name) for name in detect.FILES)
    folder = str(pathlib.PurePosixPath(inside).parent) if is_file else inside
    patterns = [name if folder in ("", ".") else f"{folder}/{name}" for name in detect.FILES]
    try:
        root = huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=patterns)
    except Exception as error:  # Many kinds: no network, no such repository, terms not accepted.
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"cannot fetch {location} ({reason})") from error
    return pathlib.Path(root), inside


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
