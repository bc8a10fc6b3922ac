"""`layertap-server` with two fronts and an engine that starts at once; it starts its processes again without
a limit. `python instant_server.py METRICS_PORT [real]`; `real` is the default model instead."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from layertap_server.config import Config
from layertap_server.processes import supervisor

if __name__ == "__main__":
    tests = str(Path(__file__).parents[1])
    os.environ["PYTHONPATH"] = os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])
    supervisor.MAX_PAUSE_S = 0.2
    supervisor.is_frequent = lambda deaths, now: False
    is_real = sys.argv[2:] == ["real"]
    settings = Config(
        port=0,
        model=() if is_real else ("fake=fake",),
        metrics_port=int(sys.argv[1]),
        grace_s=5.0,
        max_result_bytes=2**26,
        max_message_bytes=2**26,
    )
    if is_real:
        sys.exit(supervisor.run(settings, 2))
    supervisor.SILENCE_S = 3.0
    supervisor.check_start = lambda config: None
    sys.exit(supervisor.run(settings, 2, "processes.instant_engine"))
