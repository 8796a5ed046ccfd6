"""`data index SHARDS`: write beside each tar shard the list of its samples, so that it need not be read to be listed.

    vissl-like data index shards/
    vissl-like data index 'shards/train-{000000..000123}.tar'

Put SHARD.tar.index where SHARD.tar is served: a run then begins without fetching every shard first. Also where shards are
made by `data shrink` these lists are written.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from vissl_like.data.shard_index import PUBLISHED, publish
from vissl_like.data.shard_names import is_url, shards_of
from vissl_like.data.shrink_files import writing
from vissl_like.errors import ConfigError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"data index: {message}. `data index --help` shows how it is called.")


def main(argv: Sequence[str]) -> int:
    """`data index ...`: the words after `index`. Returns the exit code; what the user can mend is raised as UserError."""
    parser = _Parser(
        prog="vissl-like data index",
        description="Write beside each tar shard the list of its samples; a run that fetches the shards begins sooner.",
    )
    parser.add_argument("shards", metavar="SHARDS", nargs="+", help="folder, file or pattern of local shards")
    for path in parser.parse_args(list(argv)).shards:
        print(index_shards(path))
    return 0


def index_shards(path: str) -> str:
    """Write the lists of the shards that a path names; returns what was done in a line."""
    shards = shards_of(path, key="SHARDS")
    if any(map(is_url, shards)):
        raise ConfigError(f"SHARDS={path!r}: lists are written beside local files; give those.")
    images = 0
    for shard in shards:
        with writing(shard + PUBLISHED):
            images += len(publish(shard))
    return f"{path}: {len(shards)} shards with {images} images; each has its list beside it ({PUBLISHED})."
