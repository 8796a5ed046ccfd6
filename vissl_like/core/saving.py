"""Writing checkpoints, in the background: training waits only until its state is copied to host memory.

A save is written beside its final name, forced to the disk and published by one rename. `last` and `best` are relative
symbolic links, each replaced in one step. What is killed in between leaves nothing under a checkpoint's name.

With a sharded model each process writes the rows it holds, and rank 0 joins those of the weights to model.safetensors
when all have been written. Only the threads that write exchange messages then, in a group of their own.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from vissl_like.core import checkpoint, distributed, parallel, state_format
from vissl_like.core.checkpoint import (
    EMA,
    MANIFEST,
    MODEL,
    PARTS,
    STRUCTURE,
    TENSORS,
    rank_file,
    saved_steps,
    step_name,
)
from vissl_like.core.state_format import Stored
from vissl_like.errors import DataError, UserError

_FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
#: Beginnings of names that stand for work in progress; `.saving-<step>-<host>-<pid>`.
_SAVING, _REMOVING = ".saving-", ".removing-"
_STALE_S = 3600.0

log = logging.getLogger(__name__)


@dataclass
class Content:
    """What this process writes of a checkpoint: files with tensors, and JSON files.

    joined: {file: tensors} whose rows lie in all processes; rank 0 joins them when all have written theirs.
    """

    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    plain: dict[str, Any] = field(default_factory=dict)
    joined: dict[str, list[str]] = field(default_factory=dict)


class Saver:
    """Saves of one run, one after the other. save(), mark_best() and finish() are collective: to be called on every rank.

    What goes wrong in the background (a full disk) is raised by the next of these calls, the same DataError on every
    rank. Older saves are intact then.
    """

    def __init__(self, run_dir: Path, *, keep: int, in_background: bool = True) -> None:
        """`keep`: how many of the newest saves stay, beside `best` and `last`. in_background=False: save() finishes it."""
        self._folder = run_dir / checkpoint.FOLDER
        self._keep, self._in_background = keep, in_background
        self._copies = HostCopies()
        self._worker: ThreadPoolExecutor | None = None
        self._jobs: list[Future[None]] = []
        self._is_open = False
        self._group: Any = None

    def save(
        self,
        *,
        step: int,
        model_state: Mapping[str, Tensor],
        training_state: Mapping[str, Any],
        ema_state: Mapping[str, Tensor] | None = None,
    ) -> Path:
        """Save, publish as `last`, and remove all but the newest saves. First waits for the save before this one."""
        self.finish()
        weights = {MODEL: model_state} | ({} if ema_state is None else {EMA: ema_state})
        content, is_shared = _content(weights, training_state)
        if self._in_background:
            content.tensors = self._copies.take(content.tensors)
        beside = self._make_folder(step)
        group = self._own_group() if is_shared else None
        if distributed.is_main() or is_shared:
            self._do(partial(_save, beside, step=step, content=content, group=group, keep=self._keep))
        self._is_open = True
        if not self._in_background:
            self.finish()
        return self._folder / step_name(step)

    def mark_best(self, step: int) -> None:
        """Let `best` point at the save of this step, as soon as that is published."""
        if distributed.is_main():
            self._do(partial(_mark, self._folder, step))
        self._is_open = True

    def is_finished(self) -> bool:
        """Whether this process has nothing left to write."""
        return all(job.done() for job in self._jobs)

    def finish(self) -> None:
        """Wait until everything is on the disk. Raises what went wrong."""
        if not self._is_open:
            return
        failure = self._wait()
        if failure is not None and not isinstance(failure, UserError):
            raise failure
        self._is_open = False
        failures = [found for found in distributed.all_gather_object(failure) if found is not None]
        if failures:
            raise failures[0]

    def close(self) -> None:
        """Wait for what is being written, without asking the other ranks: for the end, whatever the reason is."""
        failure = self._wait()
        if failure is not None:
            log.error("%s", failure)
        if self._worker is not None:
            self._worker.shutdown()
            self._worker = None

    def _wait(self) -> BaseException | None:
        """The first failure of this rank's jobs, which are finished then."""
        jobs, self._jobs = self._jobs, []
        return next((failure for failure in [job.exception() for job in jobs] if failure is not None), None)

    def _do(self, job: Callable[[], None]) -> None:
        """One thread does the jobs in their order; after one that failed, those that build on it are left out."""
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        before = self._jobs[-1] if self._jobs else None

        def run() -> None:
            if before is None or before.exception() is None:
                job()

        self._jobs.append(self._worker.submit(run))

    def _make_folder(self, step: int) -> Path:
        """The folder in which the save is made; what writers have left behind that died is removed."""
        beside = self._folder / f"{_SAVING}{step}-{socket.gethostname()}-{os.getpid()}"
        failure: DataError | None = None
        if distributed.is_main():
            try:
                with _full_disk_explained(self._folder):
                    self._folder.mkdir(parents=True, exist_ok=True)
                    _clean(self._folder)
                    beside.mkdir()
            except DataError as error:
                failure = error
        beside, failure = distributed.broadcast_object((beside, failure))
        if failure is not None:
            raise failure
        return beside

    def _own_group(self) -> Any:
        """The processes once more, for the threads that write: messages of two threads must not meet in one group."""
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))
        return self._group


class HostCopies:
    """Host memory that a state is copied to, the same for each save; pinned where the state lies on a GPU."""

    def __init__(self) -> None:
        self._memory: dict[tuple[str, str], Tensor] = {}

    def take(self, files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Copies of all tensors. They are overwritten by the next call."""
        former, self._memory = self._memory, {}
        on_gpu = False
        for file, tensors in files.items():
            for name, tensor in tensors.items():
                source = tensor.detach()
                copy = former.pop((file, name), None)
                if copy is None or (copy.shape, copy.dtype, copy.stride()) != (
                    source.shape,
                    source.dtype,
                    source.stride(),
                ):
                    copy = torch.empty_like(source, device="cpu", pin_memory=source.is_cuda)
                self._memory[file, name] = copy.copy_(source, non_blocking=True)
                on_gpu |= source.is_cuda
        if on_gpu:
            torch.cuda.synchronize()
        return {file: {name: self._memory[file, name] for name in tensors} for file, tensors in files.items()}


# ---------------------------------------------------------------------------------------------- what each process writes
def _content(weights: Mapping[str, Mapping[str, Tensor]], training: Mapping[str, Any]) -> tuple[Content, bool]:
    """What this process writes, and whether all of them write."""
    structure, tensors = state_format.split_state(training)
    is_shared = any(parallel.is_part(tensor) for state in (*weights.values(), tensors) for tensor in state.values())
    states = {**weights, TENSORS: tensors}
    content = Content()
    if is_shared:
        rank = distributed.current().rank
        content.tensors[rank_file("training", rank)] = _rows_here(tensors)
        rows = {f"{file}/{name}": rows for file, state in weights.items() for name, rows in _rows_here(state).items()}
        content.tensors[rank_file("weights", rank)] = rows
        # A collective call for what is sharded in other ways than by rows.
        states = {file: {k: parallel.whole(v) for k, v in state.items() if not parallel.is_part(v)}
                  for file, state in states.items()}  # fmt: skip
    if distributed.is_main():
        content.tensors |= {file: dict(state) for file, state in states.items()}
        content.plain[STRUCTURE] = structure
    if distributed.is_main() and is_shared:
        parts = {name: len(tensor) for name, tensor in tensors.items() if parallel.is_part(tensor)}
        content.plain[PARTS] = {name: _parts(count) for name, count in parts.items()}
        content.joined = {file: [k for k, v in state.items() if parallel.is_part(v)] for file, state in weights.items()}
    return content, is_shared


def _rows_here(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The rows of sharded tensors that lie in this process."""
    found = {name: parallel.local(tensor) for name, tensor in state.items() if parallel.is_part(tensor)}
    for name, rows in found.items():
        start, stop = parallel.rows_of_ranks(len(state[name]))[distributed.current().rank]
        if len(rows) != stop - start:
            raise RuntimeError(f"{name}: {len(rows)} rows lie here where {start} to {stop} should")
    return found


def _parts(count: int) -> list[tuple[str, int, int]]:
    """Where the rows of a tensor of the training state lie: (file, first, the one after the last)."""
    return [
        (rank_file("training", rank), start, stop) for rank, (start, stop) in enumerate(parallel.rows_of_ranks(count))
    ]


# --------------------------------------------------------------------------------------------- in the thread that writes
def _save(beside: Path, *, step: int, content: Content, group: Any, keep: int) -> None:
    """Write this process's files; on rank 0 also make the checkpoint of all files, publish it and remove older ones."""
    folder, failure = beside.parent, None
    files: dict[str, Any] = {}
    try:
        try:
            with _full_disk_explained(folder):
                files = _write_files(beside, content)
        except DataError as error:
            failure = error
        files = _of_all_ranks(files, failure, group)
        if distributed.is_main():
            with _full_disk_explained(folder):
                _publish(beside, step, _join(beside, files, content))
                _point(folder, "last", step)
    except BaseException:
        if distributed.is_main():
            shutil.rmtree(beside, ignore_errors=True)
        raise
    if distributed.is_main():
        _prune(folder, keep)


def _write_files(beside: Path, content: Content) -> dict[str, Any]:
    """Write all but the joined files; their records for the manifest."""
    files = {
        name: state_format.write_tensors(beside / name, tensors)
        for name, tensors in content.tensors.items()
        if name not in content.joined
    }
    return files | {name: state_format.write_json(beside / name, value) for name, value in content.plain.items()}


def _of_all_ranks(files: dict[str, Any], failure: DataError | None, group: Any) -> dict[str, Any]:
    """The records of all processes, once all have written. Raises the first failure, on each of them."""
    found: list[Any] = [(files, failure)]
    if group is not None:
        found = [None] * dist.get_world_size(group)
        dist.all_gather_object(found, (files, failure), group=group)
    failures = [failure for _, failure in found if failure is not None]
    if failures:
        raise failures[0]
    return {name: record for files, _ in found for name, record in files.items()}


def _join(beside: Path, files: dict[str, Any], content: Content) -> dict[str, Any]:
    """Make the files of whole weights from the rows that the processes have written; the records of all files then."""
    if not content.joined:
        return files
    sources = [name for name in files if name.startswith("weights.rank_")]
    rows = [load_file(beside / name) for name in sorted(sources)]
    for file, names in content.joined.items():
        joined = {name: Stored(tuple(part[f"{file}/{name}"] for part in rows)) for name in names}
        files[file] = state_format.write_tensors(beside / file, {**content.tensors[file], **joined})
    del rows
    for name in sources:
        (beside / name).unlink()
    return {name: record for name, record in files.items() if name not in sources}


def _publish(beside: Path, step: int, files: Mapping[str, Any]) -> None:
    final = beside.parent / step_name(step)
    state_format.write_json(beside / MANIFEST, {"step": step, "files": files})
    state_format.sync_folder(beside)
    if final.exists():  # a damaged save of this step that was passed over
        _remove(final)
    os.rename(beside, final)
    state_format.sync_folder(beside.parent)


def _mark(folder: Path, step: int) -> None:
    with _full_disk_explained(folder):
        _point(folder, "best", step)


def _point(folder: Path, link: str, step: int) -> None:
    """Make `link` a relative symbolic link to the save of this step, in one step."""
    beside = folder / f".{link}-{os.getpid()}"
    beside.unlink(missing_ok=True)
    beside.symlink_to(step_name(step))
    os.replace(beside, folder / link)
    state_format.sync_folder(folder)


def _prune(folder: Path, keep: int) -> None:
    linked = {os.readlink(folder / link) for link in ("best", "last") if (folder / link).is_symlink()}
    for step in saved_steps(folder.parent)[:-keep]:
        if step_name(step) not in linked:
            _remove(folder / step_name(step))


def _remove(path: Path) -> None:
    """Remove a checkpoint; interrupted, it leaves no half of one under a checkpoint's name."""
    doomed = path.with_name(f"{_REMOVING}{path.name}-{os.getpid()}")
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _clean(folder: Path) -> None:
    """Remove what writers left behind that died while saving or removing."""
    for entry in folder.iterdir():
        if entry.name.startswith(_REMOVING) or (entry.name.startswith(_SAVING) and _is_abandoned(entry)):
            shutil.rmtree(entry, ignore_errors=True)


def _is_abandoned(entry: Path) -> bool:
    """Whether the process that was writing this folder is gone (elsewhere: whether nothing happened for an hour)."""
    host, _, pid = entry.name.removeprefix(_SAVING).partition("-")[2].rpartition("-")
    if host != socket.gethostname() or not pid.isdigit():
        with contextlib.suppress(FileNotFoundError):
            return time.time() - entry.stat().st_mtime > _STALE_S
        return False
    if int(pid) == os.getpid():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


@contextlib.contextmanager
def _full_disk_explained(folder: Path) -> Iterator[None]:
    """Turn the system's word for a full disk into an error that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL_DISK:
            raise
        free = shutil.disk_usage(folder).free / 1e6
        raise DataError(
            f"{folder}: no room to save a checkpoint ({error.strerror}; {free:.0f} MB free). The older ones are "
            "intact. Free some space, or lower config.CHECKPOINT.KEEP, and start the same command again."
        ) from error
