"""The processes of several machines, started together as often as it takes: torch elastic's agent on each machine.

A process that was killed, or a machine that does not answer, ends the round everywhere, and the next one begins as soon
as enough machines are there again; the ranks go on from the newest save. torch's own dynamic rendezvous is not used: it
compares clocks of different machines, ranks move between machines, and a machine that comes back finds the address of
the store that died with it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from torch.distributed import PrefixStore, TCPStore
from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.rendezvous.api import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from vissl_like.config.plan import Plan
from vissl_like.errors import Stopped, UserError
from vissl_like.launch import logs
from vissl_like.launch.endings import DONE, Ending
from vissl_like.launch.endpoint import interface_towards
from vissl_like.launch.nodes import Session
from vissl_like.launch.rank import left_words, run_rank
from vissl_like.launch.ranks import (
    GRACE_S,
    SIGNALS_TO_ELASTIC,
    cause_of,
    environment_of_ranks,
    forwarded_signals,
    if_known,
    is_saved,
    results_of,
    signal_cause,
)
from vissl_like.launch.watch import POLL_S, Round, RoundOver, Watch


def run_together(session: Session, plan: Plan) -> dict[str, Any]:
    """Run the engine on all machines; the results of rank 0 on the first one, nothing on the others.

    Raises what ended the run on any machine: the same on every one.
    """
    logs.quieten_libraries()
    watch = Watch(session)
    with forwarded_signals() as received:
        while True:
            now = watch.gather()
            interface = interface_towards(now.peer)
            network = {"GLOO_SOCKET_IFNAME": interface} if interface else {}
            with environment_of_ranks(plan, TORCHELASTIC_SIGNALS_TO_HANDLE=SIGNALS_TO_ELASTIC, **network):
                ending = _run_round(watch, now, received)
            watch.tell_signal(received)
            final = watch.settle(now, ending)
            if final is not None and final.kind == DONE:
                return final.results
            if final is not None:
                if session.is_first:
                    logs.write_traceback(session.run_dir, final.traceback)
                raise final.exception


def _run_round(watch: Watch, now: Round, received: list[int]) -> Ending | None:
    """How this machine's processes ended; None if they were ended because others' did."""
    session = watch.session
    with tempfile.TemporaryDirectory(prefix="vissl_like_", ignore_cleanup_errors=True) as words_dir:
        spec = WorkerSpec(
            role="rank",
            local_world_size=session.processes_per_node,
            entrypoint=run_rank,
            args=(str(session.run_dir), words_dir),
            rdzv_handler=_Handler(watch, now, received),
            max_restarts=0,
            monitor_interval=POLL_S,
        )
        logs_specs = DefaultLogsSpecs(log_dir=words_dir)
        agent = LocalElasticAgent(spec, logs_specs, **if_known(LocalElasticAgent, shutdown_timeout=GRACE_S))
        try:
            result = agent.run()
            if result.is_failed():
                cause = cause_of(result.failures, left_words(Path(words_dir)), received)
                return Ending.of(cause)
            return Ending(DONE, results=results_of(result.return_values, received))
        except RoundOver:
            return None
        except SignalException as error:
            return Ending.of(signal_cause(left_words(Path(words_dir)), [int(error.sigval)]))
        except (UserError, Stopped) as error:  # also a verdict that came while the ranks ran
            return Ending.of(error)
        except KeyboardInterrupt:  # Ctrl-C for the second time: too late if the main rank has saved
            words = left_words(Path(words_dir))
            if not is_saved(words):
                raise
            return Ending.of(signal_cause(words, received))
        except Exception as error:  # after a signal: PyTorch cannot read what a process that was starting has left
            return Ending.of(signal_cause(left_words(Path(words_dir)), received) if received else error)


class _NoBarrier(PrefixStore):
    """The store by which the agents number their ranks. At the end they do not wait for each other: Watch.settle does."""

    def wait(self, *keys: Any) -> None:
        pass


class _Handler(RendezvousHandler):
    """What torch elastic's agent asks about other machines, answered for one round."""

    use_agent_store = True

    def __init__(self, watch: Watch, now: Round, received: list[int]) -> None:
        self._watch, self._round, self._received = watch, now, received

    def next_rendezvous(self) -> RendezvousInfo:
        now = self._round
        store = _NoBarrier("agents", TCPStore(now.host, now.port, wait_for_workers=False))
        where = RendezvousStoreInfo(now.host, now.port)
        return RendezvousInfo(store, now.machine, now.num_machines, where)

    def num_nodes_waiting(self) -> int:
        """Asked every moment while the ranks run."""
        self._watch.poll(self._round, self._received)
        return 0

    def get_backend(self) -> str:
        return "vissl_like"

    def get_run_id(self) -> str:
        return f"round{self._round.number}"

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """Nothing is kept open."""

    def shutdown(self) -> bool:
        return True
