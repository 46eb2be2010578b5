"""`python -m safeproj` is the `safeproj` command."""

from safeproj.cli import main

if __name__ == "__main__":
    main()
