"""The `layertap` command. Its dependencies are installed by the extra `cli`."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command. Exits with status 1 if the extra `cli` is not installed, and with 130 after SIGINT."""
    try:
        _main()
    except KeyboardInterrupt:  # while modules are imported
        sys.exit(130)


def _main() -> None:
    try:
        from layertap._commands import commands
    except ModuleNotFoundError as error:
        if error.name not in ("click", "rich"):
            raise
        sys.exit("The layertap command needs the extra 'cli': pip install 'layertap[cli]'")
    commands()
