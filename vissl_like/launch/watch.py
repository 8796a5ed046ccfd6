"""Who takes part in a round, whether the others are alive, and what follows from how their processes ended.

A round is one try to run the processes of all machines. Keys of round R on the session's board:

    R/machines   how many other machines came; each takes the next number, the first machine has 0
    R/machine/K  host and address of machine K
    R/go         set by the first machine when all are there: the port of the store that the ranks meet at
    R/beat/K     a counter that machine K raises while it lives
    R/failed     how many machines' processes failed; R/ending/K how those of machine K ended
"""

from __future__ import annotations

import json
import logging
import platform
import time
from dataclasses import dataclass, replace

from torch.distributed import Store, TCPStore

from vissl_like.errors import ConfigError
from vissl_like.launch.endings import DEFECT, DONE, GRAVITY, KILLED, LOST, MISTAKE, STOPPED, Ending, Killed
from vissl_like.launch.endpoint import address_towards, addresses_of
from vissl_like.launch.nodes import NOTHING, Session
from vissl_like.launch.ranks import hand_on

log = logging.getLogger(__name__)

POLL_S = 0.2
#: Seconds without a sign of life after which a machine counts as lost: it may be ending its ranks for half of them.
_SILENT_S = 60.0
#: The same where its ranks do not run yet, or another machine waits to take its place.
_SILENT_AND_REPLACED_S = 10.0
#: Seconds that a machine waits for a place when all machines are there.
_SPARE_S = 90.0
#: Seconds that the endings of other machines are waited for: when one failed, and when the first one is done.
_CAUSES_S, _DONE_S = 3.0, 60.0


class RoundOver(Exception):
    """Processes on another machine ended: this machine's are to be ended, too."""


@dataclass(frozen=True)
class Round:
    """One try, as this machine takes part in it. The ranks meet at host:port; `peer` is another machine's address."""

    number: int
    machine: int
    num_machines: int
    host: str
    port: int
    peer: str
    server: Store | None = None
    """The store of host:port, on the first machine."""

    def key(self, name: str) -> str:
        """The key of this round on the board."""
        return f"{self.number}/{name}"


class Watch:
    """The rounds of a session, seen from this machine."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.board = session.board
        self.options = session.meeting.options
        self.restarts = 0
        self.names: dict[int, str] = {}
        """Of the machines that are in the round, by number; known to the first machine."""
        self.beats: dict[int, tuple[str, float]] = {}
        self.num_refused = 0
        self.last_cause = ""

    # ----------------------------------------------------------------------------------------------------------- gathering
    def gather(self) -> Round:
        """Wait until all machines are there. Raises what ended the session meanwhile."""
        return self._gather_others() if self.session.is_first else self._join()

    def _gather_others(self) -> Round:
        wanted, number = self.options.NUM_NODES - 1, self._begin(self._present())
        log.info(
            "waiting for %d other machine%s at %s (at most %d s)",
            wanted, "s" * (wanted > 1), self.session.meeting.endpoint, self.options.JOIN_TIMEOUT_S,
        )  # fmt: skip
        deadline = time.monotonic() + self.options.JOIN_TIMEOUT_S
        while True:
            self._raise_verdict()
            self._show_refusals()
            self._note_arrivals(number)
            silent = self._silent(number, limit_s=_SILENT_AND_REPLACED_S)
            if len(self.names) >= wanted and not silent:
                return self._go(number)
            if len(self.names) >= wanted:  # one of them went away again
                number = self._begin(number + 1)
            if time.monotonic() > deadline:
                self.session.meeting.expected = len(self.names)
                raise self._missing()
            time.sleep(POLL_S)

    def _begin(self, number: int) -> int:
        self.names, self.beats = {}, {}
        self.board.write("round", str(number))
        return number

    def _present(self) -> int:
        return int(self.board.read("round")[0])

    def _note_arrivals(self, number: int) -> None:
        came = min(self.board.count(f"{number}/machines"), self.options.NUM_NODES - 1)
        for machine in range(1, came + 1):
            key = f"{number}/machine/{machine}"
            if machine not in self.names and self.board.has(key):
                there = json.loads(self.board.read(key)[0])
                self.names[machine] = f"{there['host']} ({there['address']})"
                log.info("machine %d of %d is here: %s", machine + 1, self.options.NUM_NODES, self.names[machine])

    def _show_refusals(self) -> None:
        board = self.session.meeting.board
        while self.num_refused < board.count("refusals") and board.has(f"refusal/{self.num_refused + 1}"):
            self.num_refused += 1
            log.warning("a machine cannot take part: %s", board.read(f"refusal/{self.num_refused}")[0])

    def _missing(self) -> Exception:
        here, wanted, wait_s = len(self.names) + 1, self.options.NUM_NODES, self.options.JOIN_TIMEOUT_S
        if self.restarts:
            return Killed(f"{self.last_cause}, and only {here} of {wanted} machines were there again within {wait_s} s")
        came = "; here: " + ", ".join([f"{platform.node()} (this one)", *self.names.values()])
        refused = f" {self.num_refused} could not take part, see above." * bool(self.num_refused)
        return ConfigError(
            f"config.DISTRIBUTED.NUM_NODES={wanted}: only {here} of {wanted} machines came to "
            f"{self.session.meeting.endpoint} within {wait_s} s (config.DISTRIBUTED.JOIN_TIMEOUT_S){came}.{refused} "
            "Start the same command on every machine."
        )

    def _go(self, number: int) -> Round:
        server = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        peer = json.loads(self.board.read(f"{number}/machine/1")[0])["address"]
        self.board.write(f"{number}/go", str(server.port))
        return Round(number, 0, self.options.NUM_NODES, "localhost", server.port, peer, server)

    def _join(self) -> Round:
        """Take a number in the present round, or in the next one, where a machine's place is free."""
        endpoint = self.session.meeting.endpoint
        peer = addresses_of(endpoint)[0][1]
        while True:
            number = self._present()
            machine = self.board.count(f"{number}/machines", add=1)
            if machine < self.options.NUM_NODES:
                self.board.count(f"{number}/beat/{machine}", add=1)
                there = {"host": platform.node(), "address": address_towards(peer)}
                self.board.write(f"{number}/machine/{machine}", json.dumps(there))
            port = self._wait_for_go(number, machine)
            if port is not None:
                return Round(number, machine, self.options.NUM_NODES, endpoint.host, port, peer)

    def _wait_for_go(self, number: int, machine: int) -> int | None:
        """The port of the ranks' store; None if another round began."""
        patience = time.monotonic() + _SPARE_S
        while self._present() == number:
            self._raise_verdict()
            if machine >= self.options.NUM_NODES:
                self._refuse_spare(patience)
            else:
                self.board.count(f"{number}/beat/{machine}", add=1)
                if self.board.has(f"{number}/go"):
                    return int(self.board.read(f"{number}/go")[0])
            time.sleep(POLL_S)
        return None

    def _refuse_spare(self, patience: float) -> None:
        if time.monotonic() > patience:
            problem = (
                f"config.DISTRIBUTED.NUM_NODES={self.options.NUM_NODES}: so many machines take part already, and all of them "
                f"answer; {platform.node()} is one more. Start the command once on each machine."
            )
            self.session.meeting.refuse(problem)
            raise ConfigError(problem)

    # ------------------------------------------------------------------------------------------------------ while ranks run
    def poll(self, now: Round, received: list[int]) -> None:
        """Give and look for signs of life, and hand a signal that one machine got on to all ranks.

        Raises RoundOver if this machine's processes are to be ended, or what ended the session.
        """
        self._raise_verdict()
        number, stop = self.board.read("round", "stop")
        if int(number) != now.number:
            raise RoundOver
        self.tell_signal(received)
        if stop != NOTHING and not received:
            received.append(int(stop))
            hand_on(int(stop))
        if not self.session.is_first:
            self.board.count(now.key(f"beat/{now.machine}"), add=1)
            return
        self._show_refusals()
        is_replaced = self.board.count(now.key("machines")) >= self.options.NUM_NODES
        limit_s = _SILENT_AND_REPLACED_S if is_replaced else _SILENT_S
        if self.board.count(now.key("failed")) or self._silent(now.number, limit_s=limit_s):
            raise RoundOver

    def tell_signal(self, received: list[int]) -> None:
        """Let all machines know that this one got a signal, if it did."""
        if received and self.board.read("stop")[0] == NOTHING:
            self.board.write_first("stop", str(received[0]))

    def _silent(self, number: int, *, limit_s: float) -> list[int]:
        """The machines whose beat has not changed for so long, by this machine's clock."""
        machines = list(self.names)
        texts = self.board.read(*(f"{number}/beat/{machine}" for machine in machines)) if machines else []
        clock = time.monotonic()
        for machine, text in zip(machines, texts):
            if self.beats.get(machine, ("", 0.0))[0] != text:
                self.beats[machine] = (text, clock)
        return [machine for machine in machines if clock - self.beats[machine][1] > limit_s]

    def _raise_verdict(self) -> None:
        verdict = self.session.verdict()
        if verdict is not None and verdict.kind != DONE:
            raise verdict.exception

    # ------------------------------------------------------------------------------------------------------------- endings
    def settle(self, now: Round, ending: Ending | None) -> Ending | None:
        """What follows for all machines from how this one's processes ended: the end, or None for another round.

        `ending` None: they were ended because others' did.
        """
        if ending is not None and ending.kind in (KILLED, LOST):
            ending = replace(ending, message=f"{ending.message}, on {platform.node()}")
        return self._decide(now, ending) if self.session.is_first else self._obey(now, ending)

    def _obey(self, now: Round, ending: Ending | None) -> Ending | None:
        if ending is not None:
            self.board.write(now.key(f"ending/{now.machine}"), ending.to_json())
            if ending.kind not in (DONE, STOPPED):
                self.board.count(now.key("failed"), add=1)
        while self._present() == now.number:
            verdict = self.session.verdict()
            if verdict is not None:
                return verdict
            self.board.count(now.key(f"beat/{now.machine}"), add=1)
            time.sleep(POLL_S)
        return None

    def _decide(self, now: Round, own: Ending | None) -> Ending | None:
        endings = self._collect(now, own)
        worst = min(endings, key=lambda ending: GRAVITY.index(ending.kind))
        if own is not None and own.kind == worst.kind:
            worst = own
        if own is not None and own.kind == DONE and worst.kind in (KILLED, LOST):
            log.warning("%s, after the work was done", worst.message)
            return own
        if worst.kind in (DONE, STOPPED, MISTAKE, DEFECT):
            return worst
        self.last_cause = worst.message
        if self.restarts >= self.options.MAX_RESTARTS:
            times = f"{self.restarts} restart{'s' * (self.restarts > 1)}"
            used = f", after {times} (config.DISTRIBUTED.MAX_RESTARTS)" if self.restarts else ""
            return replace(worst, message=worst.message + used)
        self.restarts += 1
        log.warning(
            "%s; starting again from the newest save (restart %d of %d)",
            worst.message, self.restarts, self.options.MAX_RESTARTS,
        )  # fmt: skip
        self._begin(now.number + 1)
        return None

    def _collect(self, now: Round, own: Ending | None) -> list[Ending]:
        """How the processes of all machines ended, as far as it becomes known in time."""
        found = {0: own} if own is not None else {}
        is_well = own is not None and own.kind in (DONE, STOPPED)
        deadline = time.monotonic() + (_DONE_S if is_well else _CAUSES_S)
        while len(found) < now.num_machines and time.monotonic() < deadline:
            self._raise_verdict()
            for machine in set(self.names) - set(found):
                if self.board.has(now.key(f"ending/{machine}")):
                    found[machine] = Ending.from_json(self.board.read(now.key(f"ending/{machine}"))[0])
            if self.board.count(now.key("failed")):
                deadline = min(deadline, time.monotonic() + _CAUSES_S)
            time.sleep(POLL_S)
        silent = self._silent(now.number, limit_s=_SILENT_AND_REPLACED_S)
        gone = [
            Ending(LOST, f"machine {one + 1}, {self.names[one]}, does not answer") for one in silent if one not in found
        ]
        return [*found.values(), *gone] or [Ending(LOST, "a machine does not answer")]
