"""Where the time of a training step goes. The loop says which phase begins; here some steps are timed, then some traced.

The steps that are timed run without PyTorch's tracer, which slows each operation down; so the times are those of an
undisturbed step, and the phases of a step add up to it. The traced steps that follow give the slowest operations and a
file for a trace viewer. On a GPU the marks are events in its stream: time is where the GPU spends or loses it.
"""

from __future__ import annotations

import bisect
import itertools
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vissl_like.config.plan import usable_cores
from vissl_like.config.schema import Profile as ProfileOptions
from vissl_like.core import distributed
from vissl_like.errors import ConfigError, DataError
from vissl_like.files import write_json, write_text

FOLDER = "profile"
#: What a step is made of, in the order of the table.
PHASES = ("data wait", "transfer", "forward", "backward", "optimizer", "books", "other")
#: A share of the step above which waiting for images is worth a word.
MUCH = 0.2
NUM_OPERATIONS = 10

log = logging.getLogger(__name__)


class Unprofiled:
    """Stands in the loop where nothing is profiled."""

    def begin(self, phase: str) -> None:
        """A phase begins; the one before it ends."""

    def end_step(self, step: int, micro_batches: Sequence[Mapping[str, Any]]) -> None:
        """Step `step` (counted from 1) is over."""

    def close(self) -> None:
        """The training is over."""


class Profile(Unprofiled):
    """Waits for some steps, times some, traces some, and writes RUN.DIR/profile."""

    def __init__(self, options: ProfileOptions, run_dir: Path) -> None:
        self._options = options
        self._folder = run_dir / FOLDER
        self._on_gpu = distributed.current().device.type == "cuda"
        self._finished = 0
        self._marks: list[tuple[str, Any]] | None = None
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._timed: list[int] = []
        self._rows = 0
        self._tracer: Any = None
        self._region: Any = None
        self._traced: list[int] = []
        self._is_written = False
        self._advance()

    # ---------------------------------------------------------------------------------------------------- in the loop
    def begin(self, phase: str) -> None:
        if self._marks is not None:
            self._marks.append((phase, self._now()))
        elif self._tracer is not None:
            self._end_region()
            self._region = torch.profiler.record_function(_named(phase))
            self._region.__enter__()

    def end_step(self, step: int, micro_batches: Sequence[Mapping[str, Any]]) -> None:
        self._finished += 1
        if self._marks is not None:
            self._marks.append(("", self._now()))
            self._timed.append(step)
            self._rows += sum(len(batch["index"]) for batch in micro_batches)
        elif self._tracer is not None:
            self._end_region()
            if self._finished > self._options.WAIT + self._options.STEPS + self._options.WARMUP:
                self._traced.append(step)
            self._tracer.step()
        self._advance()

    def close(self) -> None:
        """Write what there is: a short training may end in the middle of its profile."""
        self._end_region()
        if self._finished <= self._options.WAIT:
            log.warning("no profile: the run ended before config.PROFILE.WAIT=%d steps were over", self._options.WAIT)
        try:
            self._stop_timing()
        except RuntimeError:  # the GPU has failed, which the training itself reports
            return
        self._write()

    def _advance(self) -> None:
        """Begin and end what begins and ends after this many steps."""
        timed = self._options.WAIT + self._options.STEPS
        if self._finished == self._options.WAIT:
            self._marks = []
        elif self._finished == timed:
            self._stop_timing()
            self._tracer = self._start_tracer()
        elif self._finished == timed + self._options.WARMUP + self._options.STEPS:
            self._write()

    # --------------------------------------------------------------------------------------------------------- timing
    def _now(self) -> Any:
        """A moment: seconds, or an event in the GPU's stream."""
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _stop_timing(self) -> None:
        """Turn the marks of whole steps into seconds of each phase."""
        if self._marks is None:
            return
        if self._on_gpu:
            torch.cuda.synchronize()
        ends = [number for number, (phase, _) in enumerate(self._marks) if not phase]
        whole = self._marks[: ends[-1] + 1] if ends else []
        self._marks = None
        for (phase, began), (_, ended) in itertools.pairwise(whole):
            if phase:
                self._seconds[phase] += began.elapsed_time(ended) / 1000 if self._on_gpu else ended - began

    # -------------------------------------------------------------------------------------------------------- tracing
    def _start_tracer(self) -> Any:
        wanted = {"CPU": self._options.CPU, "CUDA": self._options.GPU and self._on_gpu}
        activities = [getattr(torch.profiler.ProfilerActivity, name) for name, is_on in wanted.items() if is_on]
        if not activities:
            return None
        tracer = torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(wait=0, warmup=self._options.WARMUP, active=self._options.STEPS + 1),
            record_shapes=self._options.SHAPES,
            profile_memory=self._options.MEMORY,
            with_stack=self._options.STACKS,
        )
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it speaks of GPUs that are not there
        tracer.start()
        return tracer

    def _end_region(self) -> None:
        if self._region is not None:
            self._region.__exit__(None, None, None)
            self._region = None

    # -------------------------------------------------------------------------------------------------------- writing
    def _write(self) -> None:
        """Trace, numbers and text. A full disk is no reason to end the training."""
        if self._is_written or not self._timed:
            return
        self._is_written = True
        tracer, self._tracer = self._tracer, None
        found = {**self._numbers(), "operations": [], "trace": ""}
        try:
            self._folder.mkdir(exist_ok=True)
            if tracer is not None:
                tracer.stop()
            if self._traced:
                found["operations"] = self._operations(tracer)
                found["trace"] = self._file("trace", ".json.gz").name
                tracer.export_chrome_trace(str(self._file("trace", ".json.gz")))
            text = in_words(found)
            write_json(self._file("profile", ".json"), found)
            write_text(self._file("summary", ".txt"), text + "\n")
        except (DataError, OSError, RuntimeError) as error:
            log.warning("the profile could not be written to %s: %s", self._folder, error)
        else:
            log.info("%s", text)

    def _file(self, name: str, suffix: str) -> Path:
        rank = distributed.current().rank
        return self._folder / f"{name}{f'_rank_{rank}' if rank else ''}{suffix}"

    def _numbers(self) -> dict[str, Any]:
        """Milliseconds per step and images per second, over the timed steps."""
        world, count = distributed.current(), len(self._timed)
        whole = sum(self._seconds.values())
        return {
            "steps": [self._timed[0], self._timed[-1]],
            "rank": world.rank,
            "processes": world.size,
            "device": world.device.type,
            "step_ms": 1000 * whole / count,
            "images_per_s": world.size * self._rows / whole,
            "phases_ms": {phase: 1000 * seconds / count for phase, seconds in self._seconds.items()},
            "advice": advice(self._seconds),
        }

    def _operations(self, tracer: Any) -> list[dict[str, Any]]:
        """The operations that took longest by themselves, without what they call: calls and milliseconds per step."""
        key = "self_device_time_total" if self._on_gpu and self._options.GPU else "self_cpu_time_total"
        totals: dict[str, tuple[int, float]] = {}
        for event in _within_steps(tracer.events()):
            count, microseconds = totals.get(event.name, (0, 0.0))
            totals[event.name] = (count + 1, microseconds + getattr(event, key))
        steps = len(self._traced)
        slowest = sorted(totals.items(), key=lambda item: -item[1][1])[:NUM_OPERATIONS]
        return [{"name": name, "calls": count / steps, "ms": us / 1000 / steps} for name, (count, us) in slowest]


def _within_steps(events: Sequence[Any]) -> Iterator[Any]:
    """The operations that the host began within a phase: what happens between epochs is no part of a step."""
    named = {_named(phase) for phase in PHASES}
    phases = sorted((event.time_range.start, event.time_range.end) for event in events if event.name in named)
    begins = [began for began, _ in phases]
    for event in events:
        place = bisect.bisect_right(begins, event.time_range.start) - 1
        is_host = event.device_type == torch.autograd.DeviceType.CPU
        if is_host and event.name not in named and place >= 0 and event.time_range.start <= phases[place][1]:
            yield event


def _named(phase: str) -> str:
    """What a phase is called in the trace."""
    return f"step: {phase}"


def make_profile(options: ProfileOptions, run_dir: Path) -> Unprofiled:
    """The profile that a configuration asks of this process."""
    world = distributed.current()
    if options.ENABLED and not set(options.RANKS) & set(range(world.size)):
        known = "0" if world.size == 1 else f"0 to {world.size - 1}"
        raise ConfigError(f"config.PROFILE.RANKS={options.RANKS}: no such process; here they are {known}.")
    return Profile(options, run_dir) if options.ENABLED and world.rank in options.RANKS else Unprofiled()


def in_words(found: Mapping[str, Any]) -> str:
    """The text of summary.txt."""
    first, last = found["steps"]
    whole, phases = found["step_ms"], found["phases_ms"]
    where = f"process {found['rank']} of {found['processes']}, {found['device']}"
    lines = [
        f"steps {first} to {last} ({where}): {whole:.2f} ms per step, {found['images_per_s']:.0f} images/s in all",
        *(f"  {phase:<12}{ms:10.3f} ms {100 * ms / whole:6.1f} %" for phase, ms in phases.items()),
        f"  {'sum':<12}{sum(phases.values()):10.3f} ms {100 * sum(phases.values()) / whole:6.1f} %",
    ]
    if found["operations"]:
        lines.append("slowest operations by themselves (while traced, which slows them down): calls and ms per step")
        lines += [f"  {one['name'][:60]:<60} {one['calls']:8.1f} {one['ms']:10.3f}" for one in found["operations"]]
        lines.append(f"the trace, for https://ui.perfetto.dev: {FOLDER}/{found['trace']}")
    else:
        lines.append("no operations were traced: the training ended before, or config.PROFILE.CPU and GPU are off")
    return "\n".join(lines + [f"advice: {line}" for line in found["advice"]])


def advice(seconds: Mapping[str, float]) -> list[str]:
    """What to do where images are what a step waits for; `seconds` of each phase."""
    share = seconds["data wait"] / sum(seconds.values())
    if share < MUCH:
        return []
    return [
        f"{100 * share:.0f} % of a step is waiting for images. Raise config.DATA.NUM_DATALOADER_WORKERS (this machine has "
        f"{usable_cores()} cores), shrink large images once (`vissl-like data shrink`), or, with a GPU, set "
        "config.DATA.AUGMENT_ON_DEVICE=true."
    ]
