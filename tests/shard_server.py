"""An HTTP server of a folder that can be told to misbehave, in a process of its own: python shard_server.py FOLDER STATE.

STATE/orders.json: what to do (see Orders); STATE/log: a line for each request: method, path, range, status.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: break_after: bytes after which a connection is cut, break_times: how often; fail_times: answers of 503 before; status:
#: the answer to everything; silent_s: wait before answering; ranges: whether parts are served; head: whether HEAD is.
ORDERS: dict[str, Any] = {
    "break_after": -1,
    "break_times": 0,
    "fail_times": 0,
    "status": 200,
    "silent_s": 0,
    "ranges": True,
    "head": True,
}


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves files with validators and ranges, as far as the orders allow."""

    protocol_version = "HTTP/1.1"
    folder, state = Path("."), Path(".")
    counts = {"break_times": 0, "fail_times": 0}

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(with_content=False)

    def do_GET(self) -> None:
        self.answer(with_content=True)

    def answer(self, *, with_content: bool) -> None:
        orders = {**ORDERS, **json.loads((self.state / "orders.json").read_text())}
        time.sleep(orders["silent_s"])
        status = self.status(orders, with_content)
        file = self.folder / self.path.partition("?")[0].lstrip("/")
        if status == 200 and not file.is_file():
            status = 404
        data = file.read_bytes() if status == 200 else b""
        etag = f'"{file.stat().st_mtime_ns}-{len(data)}"' if data else ""
        given = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start, total = 0, len(data)
        if given and orders["ranges"] and self.headers.get("If-Range") == etag:
            start, status = int(given.group(1)), 206
        with (self.state / "log").open("a") as log:
            log.write(f"{self.command} {self.path} {start} {status}\n")
        self.send_response(status)
        self.send_header("Content-Length", str(total - start))
        if etag:
            self.send_header("ETag", etag)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        self.end_headers()
        if with_content:
            self.send(data[start:], orders)

    def status(self, orders: dict[str, Any], with_content: bool) -> int:
        if not with_content and not orders["head"]:
            return 405
        if self.is_shard() and self.counts["fail_times"] < orders["fail_times"]:
            self.counts["fail_times"] += 1
            return 503
        return orders["status"]

    def is_shard(self) -> bool:
        return self.path.partition("?")[0].endswith(".tar")

    def send(self, data: bytes, orders: dict[str, Any]) -> None:
        cut = orders["break_after"]
        if 0 <= cut < len(data) and self.counts["break_times"] < orders["break_times"] and self.is_shard():
            self.counts["break_times"] += 1
            self.wfile.write(data[:cut])
            self.close_connection = True
            return
        self.wfile.write(data)


class Server:
    """The process, its address, and what it was asked for."""

    def __init__(self, url: str, state: Path, process: subprocess.Popen[str]) -> None:
        self.url, self.state, self.process = url, state, process

    def order(self, **orders: Any) -> None:
        part = self.state / "orders.part"
        part.write_text(json.dumps(orders))
        os.replace(part, self.state / "orders.json")

    def log(self, method: str = "GET", suffix: str = ".tar") -> list[tuple[str, int, int]]:
        """(path, first byte, status) of each request."""
        file = self.state / "log"
        lines = [line.split(" ") for line in file.read_text().splitlines()] if file.exists() else []
        return [
            (path, int(start), int(status))
            for m, path, start, status in lines
            if m == method and path.partition("?")[0].endswith(suffix)
        ]

    def forget(self) -> None:
        (self.state / "log").unlink(missing_ok=True)


@contextlib.contextmanager
def serving(folder: Path, state: Path, **orders: Any) -> Iterator[Server]:
    """A server of the folder on a free port."""
    state.mkdir(parents=True, exist_ok=True)
    (state / "orders.json").write_text(json.dumps(orders))
    process = subprocess.Popen([sys.executable, __file__, str(folder), str(state)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield Server(f"http://127.0.0.1:{int(process.stdout.readline())}", state, process)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def main() -> None:
    Handler.folder, Handler.state = Path(sys.argv[1]), Path(sys.argv[2])
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
