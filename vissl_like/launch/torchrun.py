"""How the first process tells the others, which torchrun started beside it, what to run: by the store they meet at."""

from __future__ import annotations

import datetime
import json
import os
from typing import Any

_KEY = "vissl_like/launch"
#: The first process composes and checks before it speaks; a large image folder is not read before that.
_PATIENCE = datetime.timedelta(minutes=30)
_stores: list[Any] = []
_told: list[bool] = []


def is_first() -> bool:
    """Whether this process is the one that composes and writes."""
    return os.environ["RANK"] == "0"


def tell(message: dict[str, Any]) -> None:
    """Say to all others what to run, or that nothing is to be run."""
    _store().set(_key(), json.dumps(message))
    _told.append(True)


def has_told() -> bool:
    """Whether the others know what to do."""
    return bool(_told)


def hear() -> dict[str, Any]:
    """Wait for what the first process says."""
    return json.loads(_store().get(_key()).decode())


def _key() -> str:
    return f"{_KEY}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _store() -> Any:
    """The store of MASTER_ADDR:MASTER_PORT; torchrun's agent serves it, or else the first process does."""
    from torch.distributed import TCPStore

    if not _stores:
        agent_serves = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=is_first() and not agent_serves,
            timeout=_PATIENCE,
            wait_for_workers=False,
            multi_tenant=True,
        )
        _stores.append(store)
    return _stores[0]
