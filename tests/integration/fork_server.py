"""Starts runs as forks of a process that has imported torch once, so that a start takes one second instead of five.

    python fork_server.py SOCKET        ends when its stdin is closed

A client (forks.py, or the command of forks.write_command) connects to the socket and sends its stdin, stdout and stderr
with one JSON line: {argv, cwd, env, and if wanted program: a Python file in place of the command line, and kill_after_s:
seconds after which the run is killed, with all processes that it has started, namespace: the network that it runs in}.
The answer is its process id and, when it has ended, its exit code (negative: the signal that killed it), a line each. If
the client goes before that, the run is killed with its process group, which is named like the process.
This process itself never computes anything, which makes forking it safe. What a run starts by multiprocessing is forked,
too: see spawning.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import multiprocessing.process
import os
import runpy
import select
import signal
import socket
import sys
import threading
import traceback
from typing import Any

import spawning


def run(request: dict[str, Any]) -> int:
    """One run."""
    if "namespace" in request:
        enter(request["namespace"])
    spawning.prepare()
    if "kill_after_s" in request:
        threading.Timer(request["kill_after_s"], os.killpg, [os.getpgrp(), signal.SIGKILL]).start()
    os.chdir(request["cwd"])
    multiprocessing.process.ORIGINAL_DIR = request["cwd"]  # where the processes begin that the run starts
    os.environ.clear()
    os.environ.update(request["env"])
    from vissl_like.launch.main import main

    try:
        if "program" not in request:
            return main(request["argv"])
        sys.argv = [request["program"], *request["argv"]]
        runpy.run_path(request["program"], run_name="__main__")
        return 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1


def enter(namespace: str) -> None:
    """Go over to a network of `ip netns add`."""
    with open(f"/var/run/netns/{namespace}") as network:
        if ctypes.CDLL(None, use_errno=True).setns(network.fileno(), 0):  # os.setns came with Python 3.12
            raise OSError(ctypes.get_errno(), f"no way into the network {namespace}")


def answer(client: socket.socket) -> None:
    """Run what is asked for in a process of its own, and say how that ended."""
    words, streams, _, _ = socket.recv_fds(client, 1 << 20, 3)
    while not words.endswith(b"\n"):
        more = client.recv(1 << 20)
        assert more, "the client went before it had asked"
        words += more
    spawning.adopt_orphans(True)
    pid = os.fork()
    if pid == 0:
        os.setsid()
        with contextlib.suppress(OSError):
            client.sendall(f"{os.getpid()}\n".encode())
        client.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        code = run(json.loads(words))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    for stream in (*streams, 1, 2):
        os.close(stream)
    has_ended = threading.Event()
    telling = threading.Thread(target=tell, args=[client, pid, has_ended])
    telling.start()
    with contextlib.suppress(OSError):
        client.recv(1)  # it says nothing more: this is its end
    if not has_ended.is_set():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    telling.join()


def tell(client: socket.socket, pid: int, has_ended: threading.Event) -> None:
    """Say how the run ended, and wait for what it has left: where process 1 waits for nobody, that would stay for ever."""
    _, status = os.waitpid(pid, 0)
    has_ended.set()
    with contextlib.suppress(OSError):  # nobody waits for the answer any more
        client.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
        client.shutdown(socket.SHUT_RDWR)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()


def serve(path: str) -> None:
    import timm.optim  # noqa: F401
    import torchvision.transforms.v2  # noqa: F401
    from PIL import Image

    import vissl_like.engines.train
    import vissl_like.launch.local
    import vissl_like.launch.rounds
    import vissl_like.launch.verbs  # noqa: F401
    from vissl_like.config.check import load_job

    Image.init()
    load_job(["config=debug/supervised_synthetic", "config.DATA.TRAIN.DATA_PATHS=[]"])  # Hydra's imports and tables
    gc.collect()
    gc.freeze()  # a collection in a fork would touch, and so copy, all that it shares with this process
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        print("ready", flush=True)
        while sys.stdin not in select.select([sys.stdin, listener], [], [])[0]:
            client, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                answer(client)
                os._exit(0)
            client.close()
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
    os._exit(0)  # there is nothing to take apart


if __name__ == "__main__":
    serve(sys.argv[1])
