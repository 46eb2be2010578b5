"""The options by which what was written is published, once the gate has passed."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from safeproj.cli import signals, terminal
from safeproj.cli.usage import PUBLISHING
from safeproj.errors import SafeprojError
from safeproj.storage.upload import Target

if TYPE_CHECKING:
    from safeproj.cli.options import Talking
    from safeproj.gate.policy import Policy
    from safeproj.methods.interface import Method
    from safeproj.plan.full import FullModel
    from safeproj.report import Checks
    from safeproj.run.options import Options


@dataclass(frozen=True)
class Publishing:
    """Where it is published, and what it must pass before.

    Raises:
        SafeprojError: an option is given without --push-to-hub.
    """

    group: ClassVar[str] = PUBLISHING

    push_to_hub: Annotated[
        str | None,
        typer.Option(
            "--push-to-hub",
            metavar="ORG/NAME",
            help="Upload the directory to this repository of the Hugging Face Hub, which is made "
            "if there is none; with the token of HF_TOKEN or `hf auth login`.",
        ),
    ] = None
    policy: Annotated[
        Path | None,
        typer.Option(
            "--policy",
            metavar="FILE",
            help="What it must pass before, as of `safeproj check`.  [default: safeproj.toml, or "
            "tool.safeproj in pyproject.toml, of the current directory, if there is one]",
        ),
    ] = None
    private: Annotated[
        bool, typer.Option("--private", help="A repository that is made is private.")
    ] = False
    revision: Annotated[
        str | None,
        typer.Option(
            "--revision",
            metavar="BRANCH",
            help="The branch, which is made if there is none.  [default: main]",
        ),
    ] = None
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request in place of committing.")
    ] = False

    def __post_init__(self) -> None:
        given = {
            "--policy": self.policy is not None,
            "--private": self.private,
            "--revision": self.revision is not None,
            "--create-pr": self.create_pr,
        }
        for option in (name for name, is_given in given.items() if is_given):
            if self.push_to_hub is None:
                raise SafeprojError(f"{option} needs --push-to-hub, which says where")

    @property
    def target(self) -> Target | None:
        """Where it goes, None if it is not published."""
        if self.push_to_hub is None:
            return None
        return Target(self.push_to_hub, self.private, self.revision, self.create_pr)

    def begin(self, talking: Talking, *, many: bool = False, dry_run: bool = False) -> None:
        """Refuse, before anything is read, what cannot be published.

        Args:
            talking: whether progress is shown.
            many: whether there are many adapters.
            dry_run: whether nothing is written.

        Raises:
            SafeprojError: there is something.
        """
        if self.target is None:
            return
        for option, is_so in (("more than one adapter", many), ("--dry-run", dry_run)):
            if is_so:
                raise SafeprojError(
                    f"--push-to-hub {self.push_to_hub}: does not go with {option}; it publishes "
                    "what was written of one"
                )
        terminal.quiet_hub(talking.quiet)
        self.target.require_usable()
        self._policy()

    def publish(
        self, method: Method, written: Path | FullModel, options: Options, talking: Talking
    ) -> None:
        """Publish what was written, if that is asked for and it passes.

        Args:
            method: by which the gate scores it.
            written: the directory; or the full model in it.
            options: how.
            talking: how much is said.

        Raises:
            SafeprojError: it could not be uploaded.
            Exit: it did not pass: exit code 1, or 2 if that could not be decided.
        """
        if self.target is None:
            return
        place = written if isinstance(written, Path) else Path(written.source)
        policy = self._policy(place)
        signals.interruptible()
        if policy is not None:
            with terminal.observer(talking.quiet) as observer:
                checks = _checked(method, written, policy, replace(options, observer=observer))
            if checks.outcome.exit_code:
                _say(checks)
                terminal.say(
                    f"{place} is not published: it did not pass {policy.file}; it stays where it "
                    "is",
                    "error",
                )
                raise typer.Exit(checks.outcome.exit_code)
        uploaded = self.target.upload(place)
        signals.done()
        terminal.closing(uploaded.warnings, talking.quiet, f"published {uploaded.url}")

    def _policy(self, place: Path | None = None) -> Policy | None:
        """Return what is to be passed, None if nothing says so."""
        from safeproj.gate.policy import find_policy

        found = find_policy(self.policy, () if place is None else [place])
        return None if found.file is None else found


def _checked(method: Method, written: Path | FullModel, policy: Policy, options: Options) -> Checks:
    """Return what the gate finds; what the method needs is made for it."""
    from safeproj import api
    from safeproj.plan.select import Selection

    options = replace(options, selection=Selection(), dtype="keep", portable=False)
    own = method.checking
    sources = [str(written)] if isinstance(written, Path) else []
    ready: AbstractContextManager[Method] = own.prepared(sources, options)
    with ready as made:
        if isinstance(written, Path):
            return api.check(made, [written], policy, options)
        return api.check(made, written, policy, options)


def _say(checks: Checks) -> None:
    """Say what fails on stderr: stdout has the report."""
    from safeproj.report import FAILING, WIDTH, render

    for line in render(checks, FAILING, width=WIDTH, color=False).splitlines():
        terminal.say(line)
