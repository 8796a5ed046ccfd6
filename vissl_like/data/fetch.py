"""Fetching what lies behind a URL: http and https with bounded retries that go on where the connection broke.

Other schemes are left to the webdataset library, which runs the usual commands for them (gsutil, aws, curl, ...).
"""

from __future__ import annotations

import contextlib
import http.client
import importlib
import io
import logging
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

from vissl_like.data.shard_index import new_digest
from vissl_like.data.shard_names import shown
from vissl_like.errors import DataError

_log = logging.getLogger(__name__)
_PIECE = 1 << 20
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.25, 30.0
#: Answers after which trying again may help; any other 4xx is final.
_PASSING = (408, 425, 429)
#: Some stores answer 403 for what is not there.
_NOTHING = (401, 403, 404, 410)
#: Servers that refuse HEAD, or signed addresses that hold for GET only.
_NO_HEAD = (400, 403, 405, 501)
_EXTRA = 'Install it with: pip install "vissl_like[stream]".'


@dataclass(frozen=True)
class Patience:
    """How often a broken connection is tried again, and how long one may be silent."""

    retries: int = 5
    timeout_s: float = 60.0


class _Missing(Exception):
    """There is nothing behind the URL."""


def state_of(url: str, *, patience: Patience) -> dict[str, Any]:
    """What tells whether the content has changed: size and validators of the server. Empty for other schemes."""
    if not _is_http(url):
        return {}
    return _trying(lambda: _head(url, patience), url, patience, what="asked for")


def read_small(url: str, *, patience: Patience) -> bytes | None:
    """The whole content, or None if there is nothing that one may read (with other schemes: also on any other error)."""
    stream = io.BytesIO()
    try:
        download(url, stream, patience=Patience(0, patience.timeout_s) if not _is_http(url) else patience)
    except DataError as error:
        if isinstance(error.__cause__, _Missing) or not _is_http(url):
            return None
        raise
    return stream.getvalue()


def download(
    url: str, target: IO[bytes], *, patience: Patience, reserve: Callable[[int], None] = lambda size: None
) -> tuple[int, str]:
    """Write the content to `target`, a seekable file; returns its size and digest.

    reserve(size) is called before the first byte where the server tells the size. Raises DataError that names the URL
    when the connection breaks more often than allowed; OSError of the target passes through.
    """
    passing = _Passing(url, target, reserve, patience.timeout_s)
    _trying(passing.go_on if _is_http(url) else passing.from_command, url, patience, what="fetched")
    return passing.done, passing.digest.hexdigest()


def _is_http(url: str) -> bool:
    return url.lower().startswith(("http://", "https://"))


def _trying(attempt: Callable[[], Any], url: str, patience: Patience, *, what: str) -> Any:
    """The result of the attempt, made again after a wait while the fault may pass."""
    for number in range(patience.retries + 1):
        try:
            return attempt()
        except _TargetFailed as error:
            raise error.reason from error
        except (OSError, http.client.HTTPException, _Broken) as error:
            reason = _reason(error)
            if isinstance(error, urllib.error.HTTPError) and 400 <= error.code < 500 and error.code not in _PASSING:
                raise _final(url, reason) from (_Missing() if error.code in _NOTHING else error)
            if number == patience.retries:
                raise DataError(
                    f"{shown(url)}: cannot be {what}, tried {number + 1} times ({reason}). Check the network and the "
                    "address, then start the same command again; config.DATA.STREAM.RETRIES and TIMEOUT_S say how long "
                    "to go on trying."
                ) from error
            _log.info("%s: %s; trying again", shown(url), reason)
        time.sleep(min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2**number))
    raise AssertionError("unreachable")


def _final(url: str, reason: str) -> DataError:
    return DataError(f"{shown(url)}: cannot be fetched ({reason}). Check the address, and the rights it needs.")


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answers {error.code} {error.reason}"
    if isinstance(error, TimeoutError) or isinstance(getattr(error, "reason", None), TimeoutError):
        return "no answer in time"
    return " ".join(str(error).split())[:200] or type(error).__name__


def _head(url: str, patience: Patience) -> dict[str, Any]:
    for method in ("HEAD", "GET"):
        try:
            with _open(url, timeout_s=patience.timeout_s, method=method) as response:
                return _validators(response)
        except urllib.error.HTTPError as error:
            if method == "GET" or error.code not in _NO_HEAD:
                raise
    raise AssertionError("unreachable")


def _open(url: str, *, timeout_s: float, method: str = "GET", headers: dict[str, str] | None = None) -> Any:
    request = urllib.request.Request(url, method=method, headers={"User-Agent": "vissl_like", **(headers or {})})
    return urllib.request.urlopen(request, timeout=timeout_s)


def _validators(response: Any) -> dict[str, Any]:
    size = response.headers.get("Content-Length", "")
    found: dict[str, Any] = {"size": int(size)} if size.isdigit() else {}
    for name in ("ETag", "Last-Modified"):
        value = response.headers.get(name)
        if value:
            found[name] = value
    return found


class _Broken(Exception):
    """The content ended too early, or a command failed."""


class _TargetFailed(Exception):
    """Writing failed (disk full): another attempt would not help."""

    def __init__(self, reason: OSError) -> None:
        super().__init__(str(reason))
        self.reason = reason


@contextlib.contextmanager
def _of_target() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _TargetFailed(error) from error


class _Passing:
    """A download that can be taken up again."""

    def __init__(self, url: str, target: IO[bytes], reserve: Callable[[int], None], timeout_s: float) -> None:
        self._url, self._target, self._reserve, self._timeout_s = url, target, reserve, timeout_s
        self._validator, self._total = "", -1
        self._begin()

    def _begin(self) -> None:
        self.done, self.digest = 0, new_digest()
        self._target.seek(0)
        self._target.truncate()

    def go_on(self) -> None:
        """Fetch by http what is missing."""
        headers: dict[str, str] = {}
        if self.done and self._validator:
            headers = {"Range": f"bytes={self.done}-", "If-Range": self._validator}
        with _open(self._url, timeout_s=self._timeout_s, headers=headers) as response:
            if not (headers and response.status == 206 and self._continues(response)):
                self._start(response)
            self._copy(response)
        if self._total >= 0 and self.done != self._total:
            raise _Broken(f"the connection was lost after {self.done} of {self._total} bytes")

    def _continues(self, response: Any) -> bool:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        return found is not None and int(found.group(1)) == self.done

    def _start(self, response: Any) -> None:
        if response.status == 206:
            raise _Broken("the server answers with another part than was asked for")
        known = _validators(response)
        etag = known.get("ETag", "")
        self._validator = etag if etag and not etag.startswith("W/") else known.get("Last-Modified", "")
        self._total = known.get("size", -1)
        self._begin()
        if self._total >= 0:
            with _of_target():
                self._reserve(self._total)

    def from_command(self) -> None:
        """Fetch by what the webdataset library opens."""
        self._begin()
        stream = _open_by_library(self._url)
        try:
            self._copy(stream)
        finally:
            stream.close()  # raises OSError if the command failed
        if self.done == 0:
            raise _Broken("nothing came")

    def _copy(self, stream: Any) -> None:
        while piece := stream.read(_PIECE):
            with _of_target():
                self._target.write(piece)
            self.digest.update(piece)
            self.done += len(piece)


def _open_by_library(url: str) -> Any:
    try:
        gopen = importlib.import_module("webdataset.gopen")
    except ImportError as error:
        raise DataError(f"{shown(url)}: this kind of address needs the package webdataset. {_EXTRA}") from error
    try:
        if url.lower().startswith("s3:"):
            return gopen.Pipe(["aws", "s3", "cp", url, "-"], mode="rb")
        return gopen.gopen(url, "rb")
    except FileNotFoundError as error:
        raise DataError(
            f"{shown(url)}: the command {error.filename!r}, by which it is read, is not installed."
        ) from error
