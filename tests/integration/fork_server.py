"""Starts runs as forks of a process that has imported torch once, so that a start takes one second instead of five.

Reads one JSON line per run on stdin: {argv, env, stdout, stderr, and kill_after_s for a run that is killed after so many
seconds, with all processes that it has started}; answers with its exit code (negative: the signal that killed it). This
process itself never computes anything, which makes forking it safe.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from typing import Any


def child(request: dict[str, Any]) -> int:
    """One run, in a process group of its own."""
    os.setsid()
    if "kill_after_s" in request:
        threading.Timer(request["kill_after_s"], os.killpg, [os.getpgrp(), signal.SIGKILL]).start()
    os.environ.update(request["env"])
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    from vissl_like.launch.main import main

    try:
        return main(request["argv"])
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1


def serve() -> None:
    import torchvision.transforms.v2  # noqa: F401

    import vissl_like.engines.train  # noqa: F401

    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            code = child(json.loads(line))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve()
