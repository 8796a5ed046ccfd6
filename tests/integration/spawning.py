"""What multiprocessing starts anew ("spawn", "forkserver"), started as a fork of a process that has imported torch.

`prepare` is called by a process that is as clean as at its start, and leaves a copy of it beside it, the template. What
multiprocessing starts from then on are forks of the template: they know nothing of what the process has done since, yet
are its children, whose signals, deaths and exit codes are its own affair. Only the imports are spared.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from multiprocessing import util
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_libc = ctypes.CDLL(None, use_errno=True)


def prepare() -> None:
    """From here on, what multiprocessing of this process starts is a fork of this process as it is now (on Linux)."""
    if sys.platform != "linux":
        return
    process, template = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # the template waits: what it is sent is for the process
    if os.fork() == 0:
        _serve(template, mask)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    template.close()
    start_afresh = util.spawnv_passfds

    def start(path: str, args: Sequence[str], passfds: Sequence[int]) -> int:
        program = next((word for word in args if isinstance(word, str) and "multiprocessing" in word), "")
        if "spawn_main" not in program and "forkserver" not in program:
            return start_afresh(path, args, passfds)
        request = {"program": program, "fds": [0, 1, 2, *passfds], "env": dict(os.environ), "cwd": os.getcwd()}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # a real start is not interrupted, either
        try:
            adopt_orphans(True)
            socket.send_fds(process, [json.dumps(request).encode()], request["fds"])
            pid = int(process.recv(64))
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)  # an error if it is no child of this process
            return pid
        finally:
            adopt_orphans(False)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    util.spawnv_passfds = start


def adopt_orphans(wanted: bool) -> None:
    """Whether what is left of the children of this process becomes its child (on Linux)."""
    if sys.platform == "linux":
        _prctl(_PR_SET_CHILD_SUBREAPER, int(wanted))


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value})")


def _serve(requests: socket.socket, mask: set[signal.Signals]) -> None:
    """As the template: fork what is asked for, to the end of the process. `mask`: the signals that forks block."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.dup2(requests.fileno(), 3)
    requests.detach()
    null = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)
    os.closerange(4, 1 << 16)
    with socket.socket(fileno=3) as asked:
        while True:
            words, fds, _, _ = socket.recv_fds(asked, 1 << 20, 250)
            if not words:
                os._exit(0)
            asked.send(str(_start(json.loads(words), fds, mask)).encode())
            for number in fds:
                os.close(number)


def _start(request: dict[str, Any], fds: list[int], mask: set[signal.Signals]) -> int:
    """The process id of a new fork, which is an orphan."""
    reading, writing = os.pipe()
    between = os.fork()
    if between == 0:
        parent = os.getpid()
        if child := os.fork():
            os.write(writing, str(child).encode())
            os._exit(0)
        os.close(reading)
        os.close(writing)
        while os.getppid() == parent:
            time.sleep(0.0005)
        _run(request, fds, mask)
    os.close(writing)
    os.waitpid(between, 0)
    with os.fdopen(reading) as said:
        return int(said.read())


def _run(request: dict[str, Any], fds: list[int], mask: set[signal.Signals]) -> None:
    """As the fork: run `python -c program` with these files."""
    code = 1
    try:
        free = max(*fds, *request["fds"]) + 1
        copies = [fcntl.fcntl(number, fcntl.F_DUPFD, free) for number in fds]
        os.closerange(3, free)
        for copy, number in zip(copies, request["fds"]):
            os.dup2(copy, number)
            os.close(copy)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["env"])
        sys.argv = ["-c", "--multiprocessing-fork"]
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)  # now comes what it has been sent since it was forked
        prepare()
        exec(request["program"], {"__name__": "__main__"})
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
