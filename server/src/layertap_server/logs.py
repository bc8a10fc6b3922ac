"""The log: one line for each event, on standard error."""

from __future__ import annotations

import logging
import sys


def set_up_logging(level: str, process: str = "") -> None:
    """`process` is the name of this process of the server; empty if there is only one."""
    logging.basicConfig(
        stream=sys.stderr,
        level=level.upper(),
        format=f"%(asctime)s %(levelname)s {f'{process}: ' if process else ''}%(message)s",
    )
    for noisy in ("httpx", "transformers", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
