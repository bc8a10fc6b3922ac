"""`layertap-server` with two fronts and an engine that starts at once; it starts its processes again without
a limit. `python instant_server.py METRICS_PORT`."""

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
    supervisor.SILENCE_S = 3.0
    settings = Config(
        port=0,
        model=("fake=fake",),
        metrics_port=int(sys.argv[1]),
        grace_s=5.0,
        max_result_bytes=2**26,
        max_message_bytes=2**26,
    )
    supervisor.check_start = lambda config: None
    sys.exit(supervisor.run(settings, 2, "processes.instant_engine"))
