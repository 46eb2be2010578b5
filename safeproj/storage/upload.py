"""A finished directory on the Hub: one commit, made by the Hub's own client."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safeproj import __version__
from safeproj.errors import SafeprojError
from safeproj.storage.source import HubPlace, hub_place
from safeproj.text import command_line, first_line, printable, shorten

_KEPT = {".gitattributes"}
"""Files of a repository that the Hub makes itself."""

_CARD = "README.md"


@dataclass(frozen=True)
class Uploaded:
    """What is on the Hub now.

    Attributes:
        url: of the commit, or of the pull request.
        warnings: what the user should know about it.
    """

    url: str
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Target:
    """Where a directory goes.

    Attributes:
        repo: the repository, `org/name`; it is made if there is none.
        private: whether only its owners see it.
        revision: the branch, made if there is none; `main` if None.
        create_pr: open a pull request in place of committing.
    """

    repo: str
    private: bool = False
    revision: str | None = None
    create_pr: bool = False

    def require_usable(self) -> None:
        """Refuse, before anything is read, what cannot be published to.

        Raises:
            SafeprojError: it is no name of a repository, there is no token, or the Hub is not to be
                asked.
        """
        from huggingface_hub import constants, get_token

        if hub_place(self.repo) != HubPlace(self.repo, "", None):
            raise SafeprojError(
                f"--push-to-hub {printable(self.repo)}: no name of a repository; expected org/name"
            )
        if constants.HF_HUB_OFFLINE:
            raise SafeprojError(
                f"--push-to-hub {self.repo}: HF_HUB_OFFLINE is set; unset it to publish"
            )
        if get_token() is None:
            raise SafeprojError(
                f"--push-to-hub {self.repo}: no token of the Hub; set HF_TOKEN, or log in with "
                "`hf auth login`"
            )

    def upload(self, directory: Path) -> Uploaded:
        """Put all files of a directory there, in one commit.

        Raises:
            SafeprojError: it did not work; the directory is as it was.
        """
        try:
            return self._uploaded(directory)
        except SafeprojError as error:
            problem = error.message
        except Exception as error:  # of the client, its transport, or the system
            problem = f"--push-to-hub {self.repo}: {_advice(error)}"
        raise SafeprojError(
            f"{problem}; {directory} is complete, and `{self._command(directory)}` goes on"
        )

    def _uploaded(self, directory: Path) -> Uploaded:
        from huggingface_hub import HfApi

        hub = HfApi()
        if not self.create_pr:
            hub.create_repo(self.repo, private=self.private or None, exist_ok=True)
        if self.private and not hub.model_info(self.repo).private:
            raise SafeprojError(
                f"--push-to-hub {self.repo}: it is there and public, which --private does not "
                "change; make it private on the Hub, or leave out --private"
            )
        if self.revision is not None and not self.create_pr:
            hub.create_branch(self.repo, branch=self.revision, exist_ok=True)
        before = set(hub.list_repo_files(self.repo, revision=self.revision))
        done: Any = hub.upload_folder(
            repo_id=self.repo,
            folder_path=directory,
            revision=self.revision,
            create_pr=self.create_pr,
            commit_message=f"Add what safeproj {__version__} wrote",
        )
        own = {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()}
        others = sorted(before - own - _KEPT)
        warnings = (*_about(others, self.repo), *_about_card(directory / _CARD))
        return Uploaded(str(done.pr_url or done.commit_url), tuple(warnings))

    def _command(self, directory: Path) -> str:
        """Return how the Hub's own command does the same."""
        words = ["hf", "upload", self.repo, str(directory), "."]
        words += ["--private"] if self.private else []
        words += ["--revision", self.revision] if self.revision is not None else []
        words += ["--create-pr"] if self.create_pr else []
        return command_line(words)


def _about(others: list[str], repo: str) -> Iterator[str]:
    if others:
        yield (
            f"{repo} has other files, which were there before and are not the directory's: "
            f"{shorten(others)}; delete them if they are of an adapter that was not patched"
        )


def _about_card(card: Path) -> Iterator[str]:
    from huggingface_hub import metadata_load

    found = metadata_load(card) if card.is_file() else None
    if not (found or {}).get("base_model"):
        yield (
            f"{_CARD} names no base_model, so that the Hub does not show what it belongs to; add "
            "it to the card"
        )


def _advice(error: Exception) -> str:
    """Return what went wrong, in words that say what to do."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.RevisionNotFoundError):
        return "it has no such --revision; expected a branch"
    if status in (401, 403) and not isinstance(error, errors.RepositoryNotFoundError):
        return "the token may not write there; check HF_TOKEN, or log in with `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such repository, or the token does not see it"
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
    what = f"{type(cause).__name__}: {printable(first_line(cause))}"
    return f"it could not be uploaded ({what})"
