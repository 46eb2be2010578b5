"""The `safeproj` command, also as `python -m safeproj`."""

from __future__ import annotations

from safeproj.cli import signals


def main() -> None:
    """Run the command."""
    signals.at_once()
    from safeproj.cli.app import app

    try:
        app()
    except SystemExit as end:
        signals.leave(end.code)
        raise


if __name__ == "__main__":
    main()
