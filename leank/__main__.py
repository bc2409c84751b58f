"""The command ``leank``, also ``python -m leank``."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command; returns 2 where its extra is not installed, 130 after Ctrl-C."""
    try:
        from leank.cli import app
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("typer", "rich"):
            raise
        print(f"leank: needs {package}: pip install 'leank[cli]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("leank: stopped", file=sys.stderr)
        return 130
    app()
    return 0


if __name__ == "__main__":
    sys.exit(main())
