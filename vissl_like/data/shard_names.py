"""Which shards an entry of DATA_PATHS names, and what the file shards.json beside them says. Free of torch."""

from __future__ import annotations

import difflib
import glob
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from vissl_like.errors import ConfigError, DataError

#: Written by `data shrink --format webdataset`: names of the classes and images in each shard.
ABOUT_FILE = "shards.json"
#: The user himself must allow commands: a configuration, which travels with checkpoints, may not.
PIPE_VARIABLE = "VISSL_LIKE_PIPES"
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+:", re.IGNORECASE)
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.([1-9]\d*))?")
_MAX_SHARDS = 1_000_000


def is_url(place: str) -> bool:
    """Whether this names something to fetch: scheme:..., with at least two letters; file: is no such thing."""
    return bool(_SCHEME.match(place)) and not place.lower().startswith("file:")


def shown(place: str) -> str:
    """A URL without passwords and tokens, for messages and names; other places as they are."""
    if not is_url(place) or place.startswith("pipe:"):
        return place
    parts = urlsplit(place)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def short_names(places: list[str]) -> list[str]:
    """The places without the folder that they share, with forward slashes: what tells them apart."""
    split = [shown(place).replace(os.sep, "/").split("/") for place in places]
    shared = 0
    while len({tuple(parts[: shared + 1]) for parts in split}) == 1 and all(len(parts) > shared + 1 for parts in split):
        shared += 1
    return ["/".join(parts[shared:]) for parts in split]


# ------------------------------------------------------------------------------------------------ names
def expand_braces(text: str) -> Iterator[str]:
    """a{00..12}b and a{x,y}b, several and nested ones, in the order of a shell; other braces stay."""
    for start in (place for place, letter in enumerate(text) if letter == "{"):
        commas, end = _group(text, start)
        choices = _choices(text, [start, *commas, end]) if end > 0 else []
        if choices:
            for choice in choices:
                yield from (text[:start] + choice + rest for rest in expand_braces(text[end + 1 :]))
            return
    yield text


def _group(text: str, start: int) -> tuple[list[int], int]:
    """Where the commas of the brace at `start` are, and where it ends (-1: nowhere)."""
    depth = 0
    commas: list[int] = []
    for place in range(start, len(text)):
        depth += (text[place] == "{") - (text[place] == "}")
        if depth == 0:
            return commas, place
        if depth == 1 and text[place] == ",":
            commas.append(place)
    return [], -1


def _choices(text: str, bounds: list[int]) -> list[str]:
    """What a brace stands for; [] if it is none of these."""
    parts = [text[left + 1 : right] for left, right in itertools.pairwise(bounds)]
    if len(parts) > 1:
        return [choice for part in parts for choice in expand_braces(part)]
    numbers = _RANGE.fullmatch(parts[0])
    if numbers is None:
        return []
    texts = numbers.group(1), numbers.group(2)
    first, last = map(int, texts)
    step = int(numbers.group(3) or 1) * (1 if first <= last else -1)
    if abs(last - first) >= _MAX_SHARDS:
        raise ConfigError(f"{{{parts[0]}}}: names more than {_MAX_SHARDS} shards.")
    is_padded = any(number.lstrip("-").startswith("0") and len(number.lstrip("-")) > 1 for number in texts)
    width = max(map(len, texts)) if is_padded else 0
    return [f"{number:0{width}d}" for number in range(first, last + (1 if step > 0 else -1), step)]


def shards_of(path: str, *, key: str) -> list[str]:
    """Absolute files and URLs that one entry of DATA_PATHS names, in order.

    A folder (its *.tar, sorted), a file, a pattern (shard-{000000..000123}.tar, train-*.tar), a URL, with braces or not;
    several of them with :: between. Raises DataError if a file is missing, and ConfigError for a URL nobody can open.
    """
    where = f"{key}={path!r}"
    if not path:
        raise ConfigError(f"{key}: give the folder, files or URLs of the shards, for example [shards/].")
    parts = [path] if path.startswith("pipe:") else path.split("::")
    found = list(itertools.chain.from_iterable(_shards_of_part(part, where) for part in parts))
    missing = [place for place in found if not is_url(place) and not os.path.isfile(place)]
    if missing:
        more = f" ({len(missing)} of {len(found)} are missing)" if len(found) > 1 else ""
        raise DataError(f"{where}: no such shard: {missing[0]}{more}{_near(missing[0])}")
    if len(set(found)) < len(found):
        twice = next(place for place in found if found.count(place) > 1)
        raise ConfigError(f"{where}: names {shown(twice)} more than once.")
    return found


def _shards_of_part(part: str, where: str) -> list[str]:
    found: list[str] = []
    for text in itertools.islice(expand_braces(part), _MAX_SHARDS):
        if is_url(text):
            found.append(_checked_url(text, where))
            continue
        file = os.path.abspath(os.path.expanduser(re.sub(r"^file:(//)?", "", text)))
        if os.path.isdir(file):
            found += _shards_in(file, where)
        elif os.path.exists(file) or not glob.has_magic(file):
            found.append(file)
        else:
            found += sorted(glob.glob(file)) or _no_match(file, where)
    return found


def _shards_in(folder: str, where: str) -> list[str]:
    names = sorted(name for name in os.listdir(folder) if name.endswith(".tar") and not name.startswith("."))
    if not names:
        below = sorted({os.path.dirname(file) for file in glob.glob(os.path.join(glob.escape(folder), "*", "*.tar"))})
        hint = (
            f" There are some in {below[0]!r}." if below else " For a folder of images use DATA_SOURCES=[disk_folder]."
        )
        raise DataError(f"{where}: no .tar file in this folder.{hint}")
    return [os.path.join(folder, name) for name in names]


def _no_match(pattern: str, where: str) -> list[str]:
    raise DataError(f"{where}: no file matches {pattern}. Correct the pattern.")


def _checked_url(url: str, where: str) -> str:
    scheme = url.partition(":")[0].lower()
    known = ("http", "https", "s3", "gs", "hf", "ais", "sftp", "ftps", "scp", "pipe")
    if scheme not in known:
        raise ConfigError(f"{where}: {scheme}: is no scheme that shards are read by. Known: {', '.join(known)}.")
    if scheme == "pipe" and os.environ.get(PIPE_VARIABLE) != "1":
        raise ConfigError(
            f"{where}: pipe: runs a command, and a configuration may not do that by itself, since it travels with "
            f"checkpoints. If this command is yours, set the environment variable {PIPE_VARIABLE}=1."
        )
    return url


def _near(file: str) -> str:
    folder = os.path.dirname(file)
    if not os.path.isdir(folder):
        return f"; there is no folder {folder}."
    near = difflib.get_close_matches(os.path.basename(file), os.listdir(folder), n=1, cutoff=0.5)
    return f"; did you mean {os.path.join(folder, near[0])}?" if near else "."


# ----------------------------------------------------------------------------------------- shards.json
@dataclass(frozen=True)
class About:
    """What shards.json says. `images`: shard -> number of images."""

    class_names: list[str] | None = None
    images: dict[str, int] = field(default_factory=dict)


def parse_about(text: bytes, *, where: str) -> About:
    """The content of a shards.json. Raises DataError if it is damaged."""
    try:
        found: Any = json.loads(text)
        names = found["class_names"]
        images = {str(shard["file"]): int(shard["images"]) for shard in found["shards"]}
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ValueError("class_names is no list of texts")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{where}: not a readable {ABOUT_FILE} ({error!r}). Write it again, or take it away."
        ) from error
    return About(names, images)


def about_place(place: str) -> str:
    """Where the shards.json beside a shard would be; "" beside a command."""
    return _beside(place, lambda path: f"{path.rpartition('/')[0]}/{ABOUT_FILE}")


def index_place(place: str) -> str:
    """Where the published index of a shard would be; "" beside a command."""
    return _beside(place, lambda path: path + ".index")


def _beside(place: str, rename: Callable[[str], str]) -> str:
    if not is_url(place):
        return rename(place)
    if place.startswith("pipe:"):
        return ""
    parts = urlsplit(place)
    return parts._replace(path=rename(parts.path)).geturl()
