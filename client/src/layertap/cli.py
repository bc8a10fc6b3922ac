"""The `layertap` command. What draws its output comes with the extra `cli`."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command; exits with 1 after any error."""
    try:
        from layertap._commands import commands
    except ModuleNotFoundError as error:
        if error.name not in ("click", "rich"):
            raise
        sys.exit("The layertap command needs its extra: pip install 'layertap[cli]'")
    commands()
