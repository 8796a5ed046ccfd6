"""Shards behind URLs: fetched once, whole, in a bounded room, from servers that fail; and the order by shard."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.shard_server import Server, serving
from tests.unit.test_data_shards import png, samples, write_tar
from vissl_like.config.schema_data import Data, Split, Stream
from vissl_like.core import rng
from vissl_like.data.dataset import build_dataset
from vissl_like.data.folder import FolderSource
from vissl_like.data.loader import close_workers, eval_batches, train_batches
from vissl_like.data.shard_cache import Cache, Remote
from vissl_like.data.sharding import Sharding
from vissl_like.data.source import ConcatSource, SourceRequest, SubsetSource
from vissl_like.data.streams import ShardSource
from vissl_like.errors import ConfigError, DataError
from vissl_like.launch.main import main


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vissl_like" / "shards"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """Serves shards s-0.tar to s-5.tar of 7 to 12 samples each."""
    row = 0
    for number in range(6):
        write_tar(tmp_path / "www" / f"s-{number}.tar", samples(7 + number, start=row))
        row += 7 + number
    with serving(tmp_path / "www", tmp_path / "state") as running:
        yield running


ROWS = sum(range(7, 13))


def source(path: str, **options: Any) -> ShardSource:
    return ShardSource.build(SourceRequest("TRAIN", 0, "", path, Split(), stream=Stream(**options)))


def dataset(path: str, **options: Any) -> Any:
    split = {"DATA_SOURCES": ["webdataset"], "DATA_PATHS": [path], "TRANSFORMS": [{"name": "ToTensor"}]}
    return build_dataset(Data(TRAIN=split, STREAM=options), "TRAIN", seed=0, train=True)


# -------------------------------------------------------------------------------------------- fetching
def test_each_shard_is_fetched_once_and_read_like_a_file(server: Server, tmp_path: Path, cache: Path) -> None:
    url = f"{server.url}/s-{{0..5}}.tar"
    remote, local = source(url), source(str(tmp_path / "www"))
    assert len(remote) == ROWS and remote.paths.tolist() == local.paths.tolist()
    assert np.array_equal(remote.labels, local.labels) and np.array_equal(remote.stamps(), local.stamps())
    assert [remote.read(row) for row in range(ROWS)] == [png(row) for row in range(ROWS)]
    assert remote.file(8) == f"{server.url}/s-1.tar/0008.png"
    again = pickle.loads(pickle.dumps(source(url)))
    assert [again.read(row) for row in (0, ROWS - 1)] == [png(0), png(ROWS - 1)]
    assert sorted(path for path, _, _ in server.log()) == [f"/s-{number}.tar" for number in range(6)]
    assert not list(cache.glob("*.part"))


def test_a_shard_that_changed_on_the_server(server: Server, tmp_path: Path) -> None:
    url = f"{server.url}/s-0.tar"
    found = source(url)
    write_tar(tmp_path / "www" / "s-0.tar", samples(7, start=50))
    assert found.read(0) == png(0)  # this run keeps what it has
    assert source(url).read(0) == png(50)  # the next one notices
    for file in Path(os.environ["XDG_CACHE_HOME"]).rglob("*.tar"):
        file.unlink()
    with pytest.raises(DataError, match=r"s-0\.tar: is not what it was when its samples were listed"):
        pickle.loads(pickle.dumps(found)).read(0)


@pytest.mark.parametrize("ranges", [True, False])
def test_broken_connections_are_taken_up_again(server: Server, ranges: bool) -> None:
    """From where they broke if the server can; the content is checked in both cases."""
    server.order(break_after=3000, break_times=2, ranges=ranges)
    assert [source(f"{server.url}/s-0.tar").read(row) for row in range(7)] == [png(row) for row in range(7)]
    expected = [
        ("/s-0.tar", 0, 200),
        *(("/s-0.tar", k * 3000, 206) if ranges else ("/s-0.tar", 0, 200) for k in (1, 2)),
    ]
    assert server.log() == expected


def test_a_server_that_is_busy_for_a_while(server: Server) -> None:
    server.order(fail_times=2)
    assert len(source(f"{server.url}/s-0.tar")) == 7
    server.order(head=False)
    assert len(source(f"{server.url}/s-1.tar")) == 8


@pytest.mark.parametrize(
    ("orders", "text"),
    [
        ({"break_after": 100, "break_times": 99, "ranges": False}, r"tried 2 times \(.*lost after 100 of \d+ bytes\)"),
        ({"status": 500}, r"tried 2 times \(the server answers 500"),
        ({"status": 403}, r"cannot be fetched \(the server answers 403"),
        ({"silent_s": 5}, r"tried 2 times \(no answer in time\)"),
    ],
)
def test_a_server_that_stays_bad(server: Server, cache: Path, orders: dict[str, Any], text: str) -> None:
    server.order(**orders)
    with pytest.raises(DataError, match=text) as caught:
        source(f"{server.url}/s-0.tar?token=secret", RETRIES=1, TIMEOUT_S=1)
    assert f"{server.url}/s-0.tar" in str(caught.value) and "secret" not in str(caught.value)
    assert not list(cache.glob("*.part")) and not list(cache.glob("*.tar"))


def test_nobody_there(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"s-9\.tar: cannot be fetched \(the server answers 404"):
        source(f"{server.url}/s-{{4,9}}.tar")
    server.process.kill()
    server.process.wait()
    with pytest.raises(DataError, match=r"s-0\.tar: cannot be asked for, tried 2 times \(.*refused"):
        source(f"{server.url}/s-0.tar", RETRIES=1)


def test_a_page_instead_of_a_shard_and_a_truncated_one(server: Server, tmp_path: Path) -> None:
    (tmp_path / "www" / "page.tar").write_bytes(b"<html>please log in</html>" * 50)
    with pytest.raises(DataError, match=r"page\.tar: not a tar file"):
        source(f"{server.url}/page.tar")
    os.truncate(tmp_path / "www" / "s-3.tar", 2000)
    with pytest.raises(DataError, match=r"s-3\.tar: cut off"):
        source(f"{server.url}/s-{{0..5}}.tar")


def test_with_published_lists_shards_are_fetched_when_they_are_read(server: Server, tmp_path: Path) -> None:
    www = tmp_path / "www"
    assert main(["data", "index", f"{www}/s-{{0..4}}.tar"]) == 0
    before = {file.name: (file.stat().st_ino, file.read_bytes()) for file in www.glob("*.index")}
    assert main(["data", "index", f"{www}/s-{{0..4}}.tar"]) == 0  # a second time finds nothing to do
    assert before == {file.name: (file.stat().st_ino, file.read_bytes()) for file in www.glob("*.index")}
    found = source(f"{server.url}/s-{{0..5}}.tar")
    assert [path for path, _, _ in server.log()] == ["/s-5.tar"]  # it has none
    assert len(found) == ROWS and found.read(8) == png(8) and len(server.log()) == 2
    write_tar(www / "s-0.tar", samples(20, start=100))  # of another size than its list says
    assert source(f"{server.url}/s-0.tar").read(19) == png(119)
    (www / "s-3.tar").write_bytes((www / "s-3.tar").read_bytes().replace(b"\x89PNG", b"PNG\x89"))
    with pytest.raises(DataError, match="is not what it was when its samples were listed.*the .index beside the shard"):
        source(f"{server.url}/s-3.tar").read(0)
    (www / "s-2.tar.index").write_bytes(before["s-2.tar.index"][1][:-3])
    assert source(f"{server.url}/s-2.tar").read(0) == png(15)


def test_lists_are_written_beside_files_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "index", "http://host/a.tar"]) == 2 and main(["data", "index"]) == 2
    assert main(["data", "index", "nowhere.tar"]) == 3
    assert "written beside local files" in capsys.readouterr().err


def test_class_names_from_shards_json_beside(server: Server, tmp_path: Path) -> None:
    (tmp_path / "www" / "shards.json").write_text(
        '{"class_names": ["ant", "bee", "cat"], "shards": [{"file": "s-0.tar", "images": 7}]}'
    )
    assert source(f"{server.url}/s-{{0..1}}.tar").class_names == ["ant", "bee", "cat"]
    (tmp_path / "www" / "shards.json").write_text('{"class_names": null, "shards": [{"file": "s-0.tar", "images": 8}]}')
    with pytest.raises(DataError, match=r"s-0\.tar: holds 7 images, but shards.json beside it tells of 8"):
        source(f"{server.url}/s-{{0..1}}.tar")


def test_pipes_need_the_users_word_and_report_failure(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("webdataset")
    monkeypatch.setenv("VISSL_LIKE_PIPES", "1")
    found = source(f"pipe:cat {tmp_path}/www/s-{{0..1}}.tar")
    assert len(found) == 15 and found.read(14) == png(14)
    with pytest.raises(DataError, match=r"pipe:cat .*missing.* cannot be fetched, tried 1 times"):
        source(f"pipe:cat {tmp_path}/missing.tar", RETRIES=0)


def test_without_the_extra(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """http needs no library; what does says how to get it."""
    for name in [name for name in sys.modules if name.split(".")[0] == "webdataset"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "webdataset", None)
    assert len(source(f"{server.url}/s-0.tar")) == 7
    with pytest.raises(DataError, match=r'gs://bucket/a.tar: .*needs the package webdataset.*pip install "vissl_like'):
        source("gs://bucket/a.tar")


# ------------------------------------------------------------------------------------------- the cache
def test_the_room_is_bounded_and_what_was_evicted_comes_again(server: Server, cache: Path) -> None:
    size = len((server.state.parent / "www" / "s-5.tar").read_bytes())
    found = source(f"{server.url}/s-{{0..5}}.tar", CACHE_GB=2.5 * size / 1e9, SHUFFLE_SHARDS=1)
    for row in np.random.RandomState(0).permutation(ROWS):
        assert found.read(int(row)) == png(int(row))
        assert sum(file.stat().st_size for file in cache.glob("*.tar")) <= 2.5 * size
    assert len(server.log()) > 12


def test_too_little_room_is_refused_with_numbers(server: Server) -> None:
    with pytest.raises(ConfigError, match=r"CACHE_GB=1e-05: two times SHUFFLE_SHARDS=8 shards take \S+ GB.*lower"):
        source(f"{server.url}/s-{{0..5}}.tar", CACHE_GB=1e-5)
    with pytest.raises(ConfigError, match=r"all shards \(SHUFFLE=images\)"):
        source(f"{server.url}/s-{{0..5}}.tar", CACHE_GB=1e-5, SHUFFLE="images")


def test_several_processes_fetch_each_shard_once(server: Server) -> None:
    server.order(silent_s=0.05)
    exits = [run_beside(_read_all, f"{server.url}/s-{{0..5}}.tar") for _ in range(3)]
    assert [process.exitcode for process in exits if process.join() is None] == [0, 0, 0]
    assert len(server.log()) == 6


def run_beside(function: Any, *arguments: str) -> Any:
    """A process forked from this one, which has everything imported."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    return process


def _read_all(url: str) -> None:
    found = source(url)
    assert [found.read(row) for row in range(len(found))] == [png(row) for row in range(ROWS)]


def test_threads_share_a_fetch_and_a_killed_one_leaves_nothing_wrong(server: Server, tmp_path: Path) -> None:
    url = f"{server.url}/s-5.tar"
    found = source(url)
    (remote,) = found.sharding.remotes
    assert isinstance(remote, Remote)
    os.unlink(remote.file)
    server.forget()
    server.order(silent_s=0.2)
    threads = [threading.Thread(target=remote.bring) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.log()) == 1
    os.truncate(remote.file, 1000)  # a crash of the machine
    assert found.read(3) == png(ROWS - 12 + 3)


def test_a_lock_holds_though_its_file_is_taken_away(tmp_path: Path) -> None:
    """Of a cache folder that somebody empties, also a run that begins: it removes what was not used for a month."""
    shared = Cache(str(tmp_path))
    entered: list[bool] = []

    def enter() -> None:
        with shared.lock("shard.tar") as is_mine:
            entered.append(is_mine)

    waiting = threading.Thread(target=enter)
    with shared.lock("shard.tar"):
        waiting.start()
        time.sleep(0.3)
        for file in tmp_path.iterdir():
            file.unlink()
    waiting.join()
    assert entered == [True]


def test_a_full_disk_names_folder_and_cure(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "full"
    folder.mkdir()
    process = run_beside(_read_with_small_files, f"{server.url}/s-0.tar", str(folder))
    process.join()
    assert process.exitcode == 0
    assert not list(folder.glob("*.part")) and not list(folder.glob("*.tar"))


def _read_with_small_files(url: str, folder: str) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
    with pytest.raises(DataError, match=rf"CACHE_DIR='{folder}': {url} cannot be kept there \(File too large\)"):
        source(url, CACHE_DIR=folder)


# ------------------------------------------------------------------------------------------- the order
@st.composite
def shardings(draw: st.DrawFn) -> Sharding:
    counts = draw(st.lists(st.integers(0, 6), min_size=1, max_size=9).filter(any))
    shard_of = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    cache = Cache("nowhere", limit=draw(st.integers(1, 100)))
    remotes = tuple(Remote(f"u{k}", draw(st.integers(1, 30)), "", cache) for k in range(len(counts)))
    return Sharding(shard_of, remotes, draw(st.integers(0, 4)))


@given(shardings(), st.integers(0, 3))
@settings(deadline=None)
def test_order_by_shard(sharding: Sharding, epoch: int) -> None:
    """A permutation; no row comes before all rows of earlier windows; within a window as in the order of all rows."""
    order = sharding.order(1, epoch)
    n = len(sharding.shard_of)
    assert sorted(order.tolist()) == list(range(n)) and np.array_equal(order, sharding.order(1, epoch))
    whole = rng.permutation(1, epoch, n)
    if sharding.window == 0:
        assert np.array_equal(order, whole)
        return
    place = {shard: k for k, shard in enumerate(rng.permutation(1, epoch, len(sharding.remotes)).tolist())}
    windows = [place[int(shard)] // sharding.window for shard in sharding.shard_of[order]]
    assert windows == sorted(windows)
    rank = np.argsort(whole)
    for window in set(windows):
        ranks = [rank[row] for row, of_window in zip(order, windows) if of_window == window]
        assert ranks == sorted(ranks)


@given(shardings(), st.integers(1, 5), st.sampled_from([1, 2, 5]))
@settings(deadline=None)
def test_what_is_fetched_ahead_fits_and_comes_in_time(sharding: Sharding, batch: int, lag: int) -> None:
    order = sharding.order(0, 0)
    batches = [order[start : start + batch] for start in range(0, len(order), batch)]
    hints = sharding.schedule(batches, lag=lag)
    limit = next(remote.cache.limit for remote in sharding.remotes if remote is not None)
    begun = {remote.url: number for number, hint in enumerate(hints) for remote in hint.fetch}
    uses = {
        shard: [k for k, rows in enumerate(batches) if shard in sharding.shard_of[rows]]
        for shard in range(len(sharding.remotes))
    }
    used = {shard: numbers for shard, numbers in uses.items() if numbers}
    assert sum(len(hint.fetch) for hint in hints) == len(used)
    for shard, numbers in used.items():
        assert begun[f"u{shard}"] <= numbers[0]
    sizes = {k: remote.size for k, remote in enumerate(sharding.remotes) if remote is not None}
    here: set[int] = set()
    for number, hint in enumerate(hints):
        here = here - {int(remote.url[1:]) for remote in hint.release} | {int(remote.url[1:]) for remote in hint.fetch}
        # A slower process may be at one of the last batches: what it has yet to open is not given up.
        assert all(used[int(remote.url[1:])][-1] + lag <= number for remote in hint.release)
        # What is done with is released before something has to make place: the oldest may be one that waits to be used.
        fits = sum(sizes[k] for k in here) <= limit
        assert fits or not hint.fetch or all(used[k][-1] + lag > number for k in here)
        ahead = [k for k, numbers in used.items() if begun[f"u{k}"] <= number <= numbers[-1]]
        needed_now = [k for k in ahead if used[k][0] <= number]
        # More than fits is begun only for what is in use already.
        assert sum(sizes[k] for k in ahead) <= limit or ahead == needed_now


def test_parts_of_sources_and_sources_of_several_kinds(server: Server, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / "images" / name).mkdir(parents=True)
        for k in range(10):
            (tmp_path / "images" / name / f"{k}.png").write_bytes(png(1000 + k))
    remote = source(f"{server.url}/s-{{0..5}}.tar", SHUFFLE_SHARDS=2)
    assert source(str(tmp_path / "www")).sharding.window == 0
    rows = np.array([0, 8, 9, ROWS - 1])
    part = SubsetSource(remote, rows).sharding
    assert part is not None and part.shard_of.tolist() == [0, 1, 1, 5]
    both = ConcatSource([remote, FolderSource(tmp_path / "images")]).sharding
    assert both is not None and both.window == 2 and len(both.remotes) == 6 + 3
    assert sorted(both.order(0, 0).tolist()) == list(range(ROWS + 20))
    # The folder's rows are dealt out: each of its three parts has images of both classes.
    assert [sorted({row // 10 for row in np.flatnonzero(both.shard_of == k) - ROWS}) for k in (6, 7, 8)] == [[0, 1]] * 3
    assert ConcatSource([FolderSource(tmp_path / "images")] * 2).sharding is None


# ------------------------------------------------------------------------------------------ the loader
@pytest.fixture
def narrow(server: Server) -> dict[str, Any]:
    """Two shards at a time, and room for hardly more than two such windows."""
    sizes = sorted(file.stat().st_size for file in (server.state.parent / "www").glob("*.tar"))
    return {"SHUFFLE_SHARDS": 2, "CACHE_GB": (sum(sizes[-4:]) + 100) / 1e9}


def test_batches_do_not_depend_on_workers_ranks_or_where_an_epoch_goes_on(
    server: Server, narrow: dict[str, Any]
) -> None:
    data = dataset(f"{server.url}/s-{{0..5}}.tar", **narrow)
    whole = list(train_batches(data, seed=3, epoch=1, batch_per_rank=6))
    in_order = torch.cat([batch["index"] for batch in whole])
    assert in_order.tolist() == data.order(3, 1).tolist() and not torch.equal(in_order, torch.arange(ROWS))
    with_workers = list(train_batches(data, seed=3, epoch=1, batch_per_rank=6, workers=2, method="fork", first_step=2))
    for ours, theirs in zip(whole[2:], with_workers, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    ranks = [list(train_batches(data, seed=3, epoch=1, batch_per_rank=3, rank=rank, size=2)) for rank in (0, 1)]
    for step, batch in enumerate(whole):
        together = torch.cat([ranks[rank][step]["data"] for rank in (0, 1)])
        assert torch.equal(together, batch["data"])
    close_workers(data)


def test_evaluation_counts_each_row_once(server: Server, narrow: dict[str, Any]) -> None:
    data = dataset(f"{server.url}/s-{{0..5}}.tar", **narrow)
    for size in (1, 2, 5):
        parts = [list(eval_batches(data, batch=4, rank=rank, size=size)) for rank in range(size)]
        rows = torch.cat([batch["index"] for part in parts for batch in part])
        assert rows.tolist() == list(range(ROWS))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_fetches_each_shard_once_ahead_of_use(
    server: Server, narrow: dict[str, Any], cache: Path, workers: int
) -> None:
    data = dataset(f"{server.url}/s-{{0..5}}.tar", **narrow)
    for file in cache.glob("*.tar"):
        file.unlink()
    server.forget()
    assert len(list(train_batches(data, seed=0, epoch=0, batch_per_rank=4, workers=workers, method="fork"))) == 15
    close_workers(data)
    assert sorted(path for path, _, _ in server.log()) == [f"/s-{number}.tar" for number in range(6)]


def test_a_server_that_dies_within_an_epoch(server: Server, narrow: dict[str, Any], cache: Path) -> None:
    """In loader processes too it is one line for the user."""
    data = dataset(f"{server.url}/s-{{0..5}}.tar", **narrow, RETRIES=1)
    for file in cache.glob("*.tar"):
        file.unlink()
    server.order(status=502)
    with pytest.raises(
        DataError, match=rf"{server.url}/s-\d.tar: cannot be fetched, tried 2 times \(the server answers 502"
    ):
        list(train_batches(data, seed=0, epoch=0, batch_per_rank=4, workers=2, method="fork"))
    close_workers(data)
