"""Hugging Face's hub: parsing locations, fetching files and uploading folders."""

import pathlib
import re
import urllib.parse
from collections.abc import Sequence
from typing import NamedTuple

from gemma_scope_jax.runtime.errors import NotFoundError
from gemma_scope_jax.runtime.printing import printable

# As elsewhere on the hub, a slash in a revision is %2F, except in the hub's own names, such as refs/pr/3.
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


def refuse_address(location: str) -> None:
    """Raises ValueError if a location is a web address of the hub; the message says what to give instead."""
    if match := _ADDRESS.fullmatch(location):
        repository, revision, inside = match[1], f"@{match[2]}" if match[2] else "", match[3] or ""
        raise NotFoundError(f"{location} is a web address; give hf://{repository}{revision}{inside}")


def place_of(location: str) -> Place:
    """Parses a location of the form `hf://OWNER/NAME@REVISION/FOLDER`.

    Raises:
      ValueError: if the location does not have this form.
    """
    match = _LOCATION.fullmatch(location)
    revision = urllib.parse.unquote(match[2]) if match and match[2] else None
    if not match or ".." in [*location.split("/"), *(revision or "").split("/")]:
        raise NotFoundError(f"{location} is not hf://OWNER/NAME/FOLDER or hf://OWNER/NAME@REVISION/FOLDER")
    return Place(match[1], revision, (match[3] or "").strip("/"))


def snapshot(location: str, place: Place, patterns: Sequence[str]) -> pathlib.Path:
    """The cached folder of a repository, with the files that match a pattern; missing files are fetched.

    Raises:
      ValueError: if the files are not in the cache and cannot be fetched.
    """
    import huggingface_hub  # Slow to import.
    from huggingface_hub import constants

    try:
        found = huggingface_hub.snapshot_download(
            place.repository, revision=place.revision, allow_patterns=list(patterns)
        )
    except Exception as error:  # Many kinds: no network, no such repository, terms not accepted.
        if constants.HF_HUB_OFFLINE:
            raise NotFoundError(not_cached(location)) from error
        reason = printable(" ".join(str(error).split()), 300)
        raise NotFoundError(
            f"cannot fetch {location} ({reason}); if it has terms, accept them and run `hf auth login`"
        ) from error
    return pathlib.Path(found)


def not_cached(location: str) -> str:
    """The message for a location that is not in the cache while HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants

    return (
        f"{location} is not in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids asking the hub; "
        "fetch it once without that variable"
    )


def push(folder: pathlib.Path, repository: str) -> str:
    """Uploads a folder to a repository, which is created if it does not exist, and returns its address.

    Raises:
      ValueError: if the repository cannot be created or written to.
    """
    import huggingface_hub

    try:
        api = huggingface_hub.HfApi()
        url = api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    except Exception as error:  # Many kinds: no network, not logged in, no permission.
        reason = " ".join(str(error).split())[:300]
        raise NotFoundError(
            f"cannot push to {repository} ({reason}); log in with `hf auth login`, then run `hf upload "
            f"{repository} {folder}`"
        ) from error
    return str(url)
