"""The Hugging Face hub: ids, and the files of a repository. No other file reads from it.

Nothing here runs unless the user named an id that is no local path.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from d2c_mlx.errors import InputError

__all__ = ["HubId", "download", "failures", "parse_hub_id", "remedy"]

_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[^@\s]+))?")


@dataclass(frozen=True)
class HubId:
    """A model repository, `owner/name`, and a branch, tag or commit of it; None is its default."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo


def parse_hub_id(text: str) -> HubId | None:
    """`owner/name` or `owner/name@revision`; None if it is neither."""
    match = _ID.fullmatch(text)
    return HubId(match["repo"], match["revision"]) if match else None


def download(
    one: HubId, patterns: Sequence[str], field: str, error: type[InputError]
) -> tuple[Path, str]:
    """Files of a repository, from the hub or from its cache on this machine.

    Args:
        one: what the user named.
        patterns: of the files that are needed; `*` stands for slashes too.
        field: the option that it was named in, for the message.
        error: what to raise.

    Returns:
        A directory, which is not there if nothing fits the patterns, and the commit that it is of.
    """
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(one.repo, revision=one.revision, allow_patterns=list(patterns))
    except failures() as caught:
        raise error(
            f"{field}: {str(one)!r} is no local path, and the hub did not give it"
            f" ({_reason(caught)}); {remedy(caught, one)}, or give a local directory"
        ) from None
    # The cache is laid out as snapshots/<commit>.
    return Path(found), Path(found).name


def failures() -> tuple[type[Exception], ...]:
    """What the client raises when the hub does not give or take something."""
    from huggingface_hub.errors import HfHubHTTPError

    # Its HTTP library is another one in each major version; the base of its own errors is that
    # library's. A wrong id is a ValueError, being offline an OSError.
    return (*HfHubHTTPError.__bases__, OSError, ValueError, RuntimeError)


def _reason(caught: Exception) -> str:
    lines = str(caught).strip().splitlines()
    return f"{type(caught).__name__}: {lines[0]}" if lines else type(caught).__name__


def remedy(caught: Exception, one: HubId) -> str:
    """What to do about one of `failures`."""
    from huggingface_hub import errors

    if isinstance(caught, errors.GatedRepoError):
        return f"{one.repo} is gated: ask for access on its page and log in with `hf auth login`"
    if isinstance(caught, errors.RevisionNotFoundError):
        return f"{one.repo} has no revision {one.revision!r}: check what follows the @"
    if isinstance(caught, errors.RepositoryNotFoundError):
        return "there is no such model, or it is private: check the id, or run `hf auth login`"
    return "check the id and the network"
