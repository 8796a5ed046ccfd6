"""`data shrink SRC DST`: a smaller copy of a folder of images, for training from large photos.

    vissl-like data shrink SRC DST --short-side 256 --quality 90 [--workers N] [--format folder|webdataset]

Images keep their relative paths, so labels and lists still fit them. Started again, it goes on where it was: an image
that has its source's time is done. Each file is written beside its final name and renamed, so none is ever torn.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from vissl_like.data.listing import Listing, digest_of, list_folder
from vissl_like.data.shard_index import PUBLISHED, publish
from vissl_like.data.shrink_files import PART, Outcome, Settings, shrink_files, shrink_shard, write_file, writing
from vissl_like.errors import ConfigError, DataError

SETTINGS_FILE = "shrink.json"
BAD_FILE = "bad_images.txt"
SHARDS_FILE = "shards.json"
_FILES_PER_TASK = 16


def _describe_shards(target: Path, listing: Listing) -> None:
    """Write shards.json: the images in each shard, and the names of the classes; and the list of each shard's samples."""
    counts: dict[str, int] = {}
    for file in sorted(target.glob("shard-*.tar")):
        with writing(str(file) + PUBLISHED):
            counts[file.name] = len(publish(str(file)))
    shards = [{"file": name, "images": count} for name, count in counts.items()]
    about = {"images": sum(counts.values()), "class_names": listing.class_names, "shards": shards}
    write_file(str(target / SHARDS_FILE), json.dumps(about, indent=1).encode())


# -------------------------------------------------------------------------------------------- the whole
def shrink(
    source: str,
    target: str,
    *,
    short_side: int = 256,
    quality: int = 90,
    workers: int = 0,
    format: str = "folder",
    shard_size: int = 1000,
    is_mixed: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Outcome:
    """Make the copy, or the rest of it. `progress`: images done and to do. `workers` 0: in this process.

    is_mixed: each shard holds a random sample of the images (always the same) instead of neighbours.
    """
    source, where = (os.path.abspath(os.path.expanduser(folder)) for folder in (source, target))
    _check_folders(source, where)
    listing = list_folder(source)
    total = len(listing.paths)
    if not total:
        raise DataError(f"SRC={source!r}: no image in this folder or below it. Give the folder that holds the images.")
    is_sharded = format == "webdataset"
    settings = Settings(source, short_side, quality, format)
    if is_sharded:
        settings = Settings(source, short_side, quality, format, shard_size, digest_of(listing.paths), is_mixed)
    folder = Path(where)
    _begin(folder, settings)
    calls = _shard_calls(listing, folder, settings) if is_sharded else _file_calls(listing, where, settings)
    found = Outcome()
    for outcome in _in_order(calls, workers=workers):
        found.add(outcome)
        progress(found.images, total)
    _list_bad(folder, found.bad)
    if is_sharded:
        _describe_shards(folder, listing)
    if len(found.bad) == total:
        raise DataError(f"SRC={source!r}: none of {total} images can be read; see {folder / BAD_FILE}.")
    return found


_Call = tuple[Callable[..., Outcome], tuple[Any, ...]]


def _file_calls(listing: Listing, target: str, settings: Settings) -> Iterator[_Call]:
    paths = iter(range(len(listing.paths)))
    while rows := list(itertools.islice(paths, _FILES_PER_TASK)):
        yield shrink_files, (settings.source, target, [listing.paths[row] for row in rows], settings)


def _shard_calls(listing: Listing, folder: Path, settings: Settings) -> Iterator[_Call]:
    size, numbers = settings.shard_size, listing.class_numbers
    order = np.arange(len(listing.paths))
    if settings.is_mixed:
        order = np.random.RandomState(0).permutation(
            order
        )  # its streams are frozen: a later start goes on with the same
    for number, start in enumerate(range(0, len(order), size)):
        rows = [
            (row, listing.paths[row], None if numbers is None else int(numbers[row]))
            for row in order[start : start + size].tolist()
        ]
        yield shrink_shard, (settings.source, str(folder / f"shard-{number:06d}.tar"), rows, settings)


def _in_order(calls: Iterable[_Call], *, workers: int) -> Iterator[Outcome]:
    """The outcomes of the calls, some of them at once in other processes."""
    if workers == 0:
        yield from (function(*arguments) for function, arguments in calls)
        return
    context = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
    remaining = iter(calls)
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_process) as pool:
        running = {pool.submit(call, *given) for call, given in itertools.islice(remaining, 3 * workers)}
        try:
            while running:
                done, running = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in done:
                    yield future.result()
                running |= {pool.submit(call, *given) for call, given in itertools.islice(remaining, len(done))}
        except concurrent.futures.process.BrokenProcessPool as error:
            raise DataError(
                "data shrink: a process ended by itself, most often because memory ran out. Start the same command again "
                "with fewer --workers."
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _begin_process() -> None:
    """A process that lives no longer than the one that started it, and leaves Ctrl-C to that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _check_folders(source: str, target: str) -> None:
    if not os.path.isdir(source):
        raise DataError(f"SRC={source!r}: no such folder. Give the folder that holds the images.")
    real_source, real_target = os.path.realpath(source), os.path.realpath(target)
    if os.path.commonpath([real_source, real_target]) == real_source:
        raise ConfigError(f"DST={target!r} lies in SRC={source!r}; give a folder outside of it.")


def _begin(folder: Path, settings: Settings) -> None:
    """Make DST, or see that it is one of ours, made in the same way; remove what a killed process left."""
    record = folder / SETTINGS_FILE
    if record.is_file():
        try:
            then = json.loads(record.read_text(encoding="utf-8"))
        except ValueError:
            then = {}
        then.setdefault("is_mixed", False)  # older folders know nothing else
        now = asdict(settings)
        differing = [
            f"{key} was {then.get(key)!r}, is {value!r}" for key, value in now.items() if then.get(key) != value
        ]
        if differing:
            raise ConfigError(
                f"DST={str(folder)!r} was made in another way: {'; '.join(differing)}. Give the same options to go on, or "
                "another DST."
            )
    elif folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"DST={str(folder)!r} is not empty and was not made by this command. Give another DST.")
    with writing(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        for above, _, names in os.walk(folder):
            for name in names:
                if name.endswith(PART):
                    os.unlink(os.path.join(above, name))
        write_file(str(record), json.dumps(asdict(settings), indent=1).encode())


def _list_bad(folder: Path, bad: dict[str, str]) -> None:
    file = folder / BAD_FILE
    if not bad:
        file.unlink(missing_ok=True)
        return
    text = "".join(f"{path}\t{reason}\n" for path, reason in sorted(bad.items()))
    with writing(str(file)):
        write_file(str(file), text.encode("utf-8", "surrogateescape"))


# ----------------------------------------------------------------------------------------- command line
class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"data shrink: {message}. `data shrink --help` shows how it is called.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="vissl-like data shrink",
        description="A smaller copy of a folder of images, or shards of them. Started again, it goes on where it was.",
    )
    parser.add_argument("source", metavar="SRC", help="folder of images, with sub-folders")
    parser.add_argument("target", metavar="DST", help="where the copy goes")
    parser.add_argument("--short-side", type=_at_least(1), default=256, metavar="PIXELS", help="default 256")
    parser.add_argument("--quality", type=_at_least(1, at_most=100), default=90, help="of JPEGs, default 90")
    parser.add_argument("--workers", type=_at_least(0), default=-1, metavar="N", help="processes; default one per core")
    parser.add_argument("--format", choices=["folder", "webdataset"], default="folder", help="default folder")
    parser.add_argument(
        "--shard-size", type=_at_least(1), default=1000, metavar="N", help="images per webdataset shard, default 1000"
    )
    parser.add_argument(
        "--mixed",
        action="store_true",
        help="shards hold random images instead of neighbours: for training from a server",
    )
    return parser


def _at_least(least: int, *, at_most: int | None = None) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text) if text.lstrip("-").isdigit() else least - 1
        if value < least or (at_most is not None and value > at_most):
            upto = "" if at_most is None else f" to {at_most}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least}{upto}{' up' * (not upto)}")
        return value

    return parse


def main(argv: Sequence[str]) -> int:
    """`data shrink ...`: the words after `shrink`. Returns the exit code; what the user can mend is raised as UserError."""
    from vissl_like.outputs import console

    given = _parser().parse_args(list(argv))
    shown: list[console.Progress] = []

    def show(done: int, total: int) -> None:
        if not shown:
            shown.append(console.progress("auto", total=total, title="shrink", unit="image", log_frequency=1))
        shown[0].update(done)

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        found = shrink(
            given.source,
            given.target,
            short_side=given.short_side,
            quality=given.quality,
            workers=cores if given.workers < 0 else given.workers,
            format=given.format,
            shard_size=given.shard_size,
            is_mixed=given.mixed,
            progress=show,
        )
    finally:
        for one in shown:
            one.close()
    print(in_words(found, given.target))
    return 0


def in_bytes(size: int) -> str:
    """A size with its unit: 512 bytes, 3.4 kB, 12.0 MB, 1.5 GB (10^9 bytes)."""
    if size < 1000:
        return f"{size} byte{'s' * (size != 1)}"
    unit, name = next((unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if size >= unit)
    return f"{size / unit:.1f} {name}"


def in_words(found: Outcome, target: str) -> str:
    """What was done, in one or two lines."""
    size = f", {in_bytes(found.bytes_before)} became {in_bytes(found.bytes_after)}" if found.bytes_after else ""
    lines = [
        f"{target}: {found.shrunk} images made smaller, {found.copied} small ones copied, {found.kept} there already{size}."
    ]
    if found.bad:
        lines.append(f"{len(found.bad)} cannot be read and are left out; they are listed in {Path(target) / BAD_FILE}.")
    return "\n".join(lines)
