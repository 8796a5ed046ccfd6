"""How several machines agree about a launch: by the store that the first of them serves at DISTRIBUTED.ENDPOINT.

The first machine decides; the others ask, report and obey. A Meeting lasts as long as the outermost launch of a process;
every launch in it (a run, or each stage of a pipeline) is a Session with keys of its own:

    offer      what is launched, and the processes of a machine
    verdict    how it ended, for every machine
    stop       the number of a signal that one of the machines got
    objection  why a machine other than the first had to leave
    round      number of the present try to run the processes; rounds.py says what its keys are
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import platform
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.distributed import PrefixStore, Store, TCPStore

from vissl_like import __version__
from vissl_like.config.plan import PLAN_FILE
from vissl_like.config.saved import differences, relevant
from vissl_like.config.schema import Distributed, Job
from vissl_like.errors import ConfigError
from vissl_like.launch import folder
from vissl_like.launch.endings import DONE, Ending, RunFailed
from vissl_like.launch.endpoint import Endpoint, addresses_of, endpoint_of, is_first
from vissl_like.launch.machine import Processes

log = logging.getLogger(__name__)

NOTHING = "-"
#: Seconds that the first machine waits for the others to read how it ended.
_FAREWELL_S = 10.0
#: Seconds within which a shared file system shows a new file to everybody (60: the longest that NFS caches a folder).
_CACHES_S = 60.0
_POLL_S = 0.2
_STORE_TIMEOUT = datetime.timedelta(seconds=60)
_ERRORS = (RuntimeError, ValueError, OSError)


class Board:
    """Texts and counters that all machines see. Raises RunFailed when the first machine is gone."""

    def __init__(self, store: Store, endpoint: Endpoint) -> None:
        self._store = store
        self._endpoint = endpoint

    def below(self, prefix: str) -> Board:
        """The part of the board whose keys begin with `prefix`/."""
        return Board(PrefixStore(prefix, self._store), self._endpoint)

    def write(self, key: str, text: str) -> None:
        with self._answering():
            self._store.set(key, text)

    def write_first(self, key: str, text: str) -> None:
        """Write in place of NOTHING; what is there already stays."""
        with self._answering():
            self._store.compare_set(key, NOTHING, text)

    def read(self, *keys: str) -> list[str]:
        """Texts of keys that were written before."""
        with self._answering():
            return [value.decode() for value in self._store.multi_get(list(keys))]

    def count(self, key: str, add: int = 0) -> int:
        """Raise a counter and return it; it begins at 0."""
        with self._answering():
            return self._store.add(key, add)

    def has(self, *keys: str) -> bool:
        """Whether all these keys were written."""
        with self._answering():
            return bool(self._store.check(list(keys)))

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except _ERRORS as error:
            raise RunFailed(
                f"the first machine ({self._endpoint}) does not answer any more; start the same command again on all "
                "machines to resume."
            ) from error


class Session:
    """One launch, as the machines see it together."""

    def __init__(self, meeting: Meeting, job: Job, processes: Processes, run_dir: Path) -> None:
        self.meeting = meeting
        self.processes_per_node = processes.local
        self._settings = _settings(job, processes)
        self.board = meeting.board.below(str(run_dir))
        self.run_dir = run_dir
        self.is_first = meeting.is_first
        self.is_outermost = str(run_dir) == meeting.run_dir

    # ------------------------------------------------------------------------------------------------ the first machine
    @contextlib.contextmanager
    def leading(self) -> Iterator[None]:
        """Begin the session, and tell the others if it ends with an error."""
        for key in ("verdict", "stop", "objection"):
            self.board.write(key, NOTHING)
        self.board.write("round", "0")
        self.board.write("begun", "")
        try:
            yield
        except BaseException as error:
            self.conclude(Ending.of(error))
            raise

    def offer(self) -> None:
        """Say what is launched, once the run folder is prepared."""
        started = folder.read_json(self.run_dir / folder.LAUNCH_FILE)["started"]
        content = {"host": platform.node(), "started": started, "settings": self._settings}
        self.board.write("offer", json.dumps(content))

    def conclude(self, ending: Ending) -> None:
        """Say how it ended; the first word counts."""
        self.board.write_first("verdict", ending.to_json())

    # ----------------------------------------------------------------------------------------------- the other machines
    @contextlib.contextmanager
    def following(self) -> Iterator[Ending | None]:
        """Take part in what the first machine launches. Yields its verdict if it ended before it began, else None.

        Raises ConfigError if this machine was started with other settings or does not see the run folder.
        """
        ending = self._wait_for_offer()
        if ending is None:
            try:
                self._check_offer()
            except ConfigError as error:
                self.meeting.refuse(str(error))
                raise
            log.info("%s: with the first machine at %s, which writes there", self.run_dir, self.meeting.endpoint)
        try:
            yield ending
        except BaseException as error:
            with contextlib.suppress(RunFailed):
                self.board.write_first("objection", Ending.of(error).to_json())
            raise

    def _wait_for_offer(self) -> Ending | None:
        while not self.board.has("begun"):
            time.sleep(_POLL_S)
        while not self.board.has("offer"):
            ending = self.verdict()
            if ending is not None:
                return ending
            time.sleep(_POLL_S)
        return self.verdict()

    def _check_offer(self) -> None:
        offer = json.loads(self.board.read("offer")[0])
        first = f"the first machine ({offer['host']}, {self.meeting.endpoint})"
        different = differences(offer["settings"], self._settings)
        if different:
            lines = "\n".join(f"  {line}" for line in different)
            raise ConfigError(
                f"{first} was started with other settings than this one ({platform.node()}):\n{lines}\n"
                "Start the same command with the same version on every machine."
            )
        patience = time.monotonic() + min(_CACHES_S, self.meeting.options.JOIN_TIMEOUT_S)
        while not self._sees_folder(started=offer["started"]):
            if time.monotonic() > patience:
                raise ConfigError(
                    f"config.RUN.DIR={str(self.run_dir)!r}: this machine ({platform.node()}) does not see what {first} "
                    "wrote there. Choose a folder on a file system that all machines share."
                )
            time.sleep(_POLL_S)

    def _sees_folder(self, *, started: str) -> bool:
        """Whether all is there that the processes read; a shared file system shows files to other machines one by one."""
        is_this_start = folder.read_json(self.run_dir / folder.LAUNCH_FILE).get("started") == started
        return is_this_start and folder.is_run(self.run_dir) and (self.run_dir / PLAN_FILE).is_file()

    def wait_for_end(self) -> dict[str, Any]:
        """The results of the first machine, or its error as an exception."""
        while (ending := self.verdict()) is None:
            time.sleep(_POLL_S)
        if ending.kind != DONE:
            raise ending.exception
        return ending.results

    # ------------------------------------------------------------------------------------------------------- every machine
    def verdict(self) -> Ending | None:
        """How the launch ended, if it did. On the first machine another one's objection becomes the verdict."""
        verdict, objection = self.board.read("verdict", "objection")
        if verdict == NOTHING and objection != NOTHING and self.is_first:
            self.conclude(Ending.from_json(objection))
            verdict = objection
        return None if verdict == NOTHING else Ending.from_json(verdict)


class Meeting:
    """The machines of a run, connected."""

    def __init__(self, store: Store, options: Distributed, run_dir: Path, *, first: bool) -> None:
        self.options = options
        self.endpoint = endpoint_of(options)
        self.board = Board(store, self.endpoint)
        self.is_first = first
        self.run_dir = str(run_dir)
        self.expected = options.NUM_NODES - 1
        self._is_refused = False

    def refuse(self, why: str) -> None:
        """Tell the first machine why this one does not take part."""
        self._is_refused = True
        number = self.board.count("refusals", add=1)
        self.board.write(f"refusal/{number}", why)

    def leave(self) -> None:
        """The first machine leaves last, so that the others can read how it ended."""
        if not self.is_first:
            if not self._is_refused:
                with contextlib.suppress(RunFailed):
                    self.board.count("left", add=1)
            return
        patience = time.monotonic() + _FAREWELL_S
        while self.board.count("left") < self.expected and time.monotonic() < patience:
            time.sleep(_POLL_S)
        self.board.write("closed", "")


_open: list[Meeting] = []


def is_meeting() -> bool:
    """Whether this launch is a part of one that has met the other machines already."""
    return bool(_open)


@contextlib.contextmanager
def meet(options: Distributed, run_dir: Path) -> Iterator[Meeting]:
    """Connect the machines, or go on in the meeting of the launch that this one is a part of.

    Raises ConfigError if nobody answers at the endpoint within JOIN_TIMEOUT_S.
    """
    if _open:
        yield _open[0]
        return
    if is_first(options):
        meeting = Meeting(_serve(options), options, run_dir, first=True)
        meeting.board.write("meeting", json.dumps({"run_dir": str(run_dir), "host": platform.node()}))
    else:
        meeting = Meeting(_visit(options), options, run_dir, first=False)
        _check_folder_name(meeting)
    _open.append(meeting)
    try:
        yield meeting
    finally:
        _open.clear()
        meeting.leave()


def _serve(options: Distributed) -> Store:
    """The store of the endpoint, served by this process."""
    endpoint = endpoint_of(options)
    patience = time.monotonic() + _FAREWELL_S  # the run before this one may just be ending
    while True:
        try:
            return TCPStore("localhost", endpoint.port, is_master=True, wait_for_workers=False, timeout=_STORE_TIMEOUT)
        except _ERRORS as error:
            if time.monotonic() < patience:
                time.sleep(_POLL_S)
                continue
            raise ConfigError(
                f"config.DISTRIBUTED.ENDPOINT='{endpoint}': the port cannot be opened on this machine; another run may use "
                "it. End that, or choose another port, on every machine."
            ) from error


def _visit(options: Distributed) -> Store:
    """The store of the endpoint, served by the first machine, as soon as it is there."""
    endpoint, wait_s = endpoint_of(options), options.JOIN_TIMEOUT_S
    addresses_of(endpoint)
    deadline = time.monotonic() + wait_s
    is_told = False
    while (store := _connected(endpoint, wait_s=min(10, wait_s))) is None:
        if time.monotonic() > deadline:
            raise ConfigError(
                f"config.DISTRIBUTED.ENDPOINT='{endpoint}': nobody answered within {wait_s} s "
                "(config.DISTRIBUTED.JOIN_TIMEOUT_S). Start the same command on the machine that has this address, and "
                "let no firewall close the port."
            )
        if not is_told:
            log.info("waiting for the first machine at %s (at most %d s)", endpoint, wait_s)
            is_told = True
        time.sleep(_POLL_S)
    return store


def _connected(endpoint: Endpoint, *, wait_s: int) -> Store | None:
    """A connection to the meeting; None if there is none, or one that is just ending."""
    with contextlib.suppress(*_ERRORS):
        # torch would wait, and print, where nobody answers: it is asked only if somebody does.
        socket.create_connection((endpoint.host, endpoint.port), timeout=2).close()
        store = _store_of(endpoint, wait_s=wait_s)
        if store is not None and store.check(["meeting"]) and not store.check(["closed"]):
            return store
    return None


def _store_of(endpoint: Endpoint, *, wait_s: int) -> Store | None:
    """The store that is served there; None if it is no store: torch waits for ever for the answer of another program.

    What it prints about that, with the addresses of its functions, is not shown.
    """
    found: list[Store] = []

    def connect() -> None:
        with contextlib.suppress(*_ERRORS):
            store = TCPStore(endpoint.host, endpoint.port, wait_for_workers=False, timeout=_STORE_TIMEOUT)
            found.append(store)

    thread = threading.Thread(target=connect, name="connect", daemon=True)
    with _silent_stderr():
        thread.start()
        thread.join(timeout=wait_s)
    return found[0] if found else None


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    sys.stderr.flush()
    real, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(real, 2)
        os.close(real)
        os.close(nowhere)


def _check_folder_name(meeting: Meeting) -> None:
    first = json.loads(meeting.board.read("meeting")[0])
    if first["run_dir"] == meeting.run_dir:
        return
    problem = (
        f"the first machine ({first['host']}, {meeting.endpoint}) was started with other settings than this one "
        f"({platform.node()}):\n  config.RUN.DIR: there {first['run_dir']!r}, now {meeting.run_dir!r}\n"
        "Start the same command on every machine."
    )
    meeting.refuse(problem)
    raise ConfigError(problem)


def _settings(job: Job, processes: Processes) -> dict[str, Any]:
    """What has to be the same on every machine; through JSON, as it comes from another one."""
    settings = {
        "vissl_like": __version__,
        **relevant(job),
        "config.DISTRIBUTED.NUM_NODES": job.config.DISTRIBUTED.NUM_NODES,
        "processes per machine (config.DISTRIBUTED.NUM_PROC_PER_NODE)": processes.local,
        "device": processes.device,
    }
    return json.loads(json.dumps(settings))
