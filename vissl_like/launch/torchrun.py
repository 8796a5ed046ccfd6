"""How the first process tells the others, which torchrun started beside it, what to run: by the store they meet at."""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
from typing import Any

_KEY = "vissl_like/launch"
#: The first process composes and checks before it speaks; a large image folder is not read before that.
_PATIENCE = datetime.timedelta(minutes=30)
#: How long the first process, if it serves the store itself, waits for others to learn that there is nothing to run.
_FAREWELL_S = 30.0
#: When it says so.
_SAY_AFTER_S = 2.0
_stores: list[Any] = []
_told: list[bool] = []


def is_first() -> bool:
    """Whether this process is the one that composes and writes."""
    return os.environ["RANK"] == "0"


def tell(message: dict[str, Any]) -> None:
    """Say to all others what to run."""
    _store().set(_key(), json.dumps(message))
    _told.append(True)


def has_told() -> bool:
    """Whether the others know what to do."""
    return bool(_told)


def dismiss(exit_code: int, *, wait: bool = True) -> None:
    """Say to all others that nothing is to be run.

    A store that this process serves stays until they have heard it, for a while; without `wait` they may find it gone.
    """
    tell({"exit_code": exit_code})
    if _agent_serves() or not wait:
        return
    began, has_said = time.monotonic(), False
    while (missing := _not_heard()) and time.monotonic() < began + _FAREWELL_S:
        if not has_said and time.monotonic() > began + _SAY_AFTER_S:
            has_said = True
            print(
                f"waiting at most {_FAREWELL_S:.0f} s for {missing} of {os.environ['WORLD_SIZE']} processes, to tell them that "
                "nothing is to be run",
                file=sys.stderr,
            )
        time.sleep(0.05)


def _not_heard() -> int:
    return int(os.environ["WORLD_SIZE"]) - 1 - int(_store().add(f"{_key()}/heard", 0))


def hear() -> dict[str, Any]:
    """Wait for what the first process says."""
    message = json.loads(_store().get(_key()).decode())
    _store().add(f"{_key()}/heard", 1)
    return message


def _agent_serves() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _key() -> str:
    return f"{_KEY}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _store() -> Any:
    """The store of MASTER_ADDR:MASTER_PORT; torchrun's agent serves it, or else the first process does."""
    from torch.distributed import TCPStore

    if not _stores:
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=is_first() and not _agent_serves(),
            timeout=_PATIENCE,
            wait_for_workers=False,
            multi_tenant=True,
        )
        _stores.append(store)
    return _stores[0]
