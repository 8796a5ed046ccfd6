"""What one process sees, and what two see: the latter in one subprocess each, over gloo."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from vissl_like.core import distributed
from vissl_like.errors import ConfigError

ROOT = Path(__file__).parents[2]
SHARDING = "torch.distributed.fsdp, torch._dynamo"  # PyTorch imports both where a model is sharded


def test_alone_everything_is_the_identity() -> None:
    world = distributed.start(device="cpu")
    assert (world.rank, world.size, world.local_rank, world.local_size) == (0, 1, 0, 1)
    assert world.device == torch.device("cpu") and world == distributed.current()
    assert distributed.is_main()
    tensor = torch.tensor([1, 2])
    assert distributed.all_reduce_sum(tensor) is tensor
    assert distributed.all_gather_object("x") == ["x"]
    assert distributed.broadcast_object({"a": 1}) == {"a": 1}
    assert distributed.start_any(True)() and not distributed.start_any(False)()
    distributed.barrier()
    distributed.shutdown()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_asking_for_a_gpu_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="shows no GPU"):
        distributed.start(device="gpu")


def run_ranks(code: str, *, size: int, folder: Path, imports: str = "torch") -> list[str]:
    """Run the code on `size` processes with the environment that torchrun would set; returns their output.

    They are forks of one new process, which has imported PyTorch and what else takes long (`imports`).
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = folder / "ranks.py"
    script.write_text(
        f"""
import os, sys
import torch, {imports}
from vissl_like.core import distributed, parallel
forks = {{}}
for rank in range({size}):
    pid = os.fork()
    if pid == 0:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        sys.stdout = open(f"{folder}/{{rank}}.out", "w")
        break
    forks[pid] = rank
else:
    while forks:
        pid, status = os.wait()
        if status:
            for other in forks:
                os.kill(other, 9)
            sys.exit(f"rank {{forks[pid]}}: {{os.waitstatus_to_exitcode(status)}}")
        del forks[pid]
    sys.exit()
"""
        + textwrap.dedent(code)
    )
    environment = os.environ | {
        "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    subprocess.run([sys.executable, str(script)], env=environment, check=True, timeout=240)
    return [(folder / f"{rank}.out").read_text() for rank in range(size)]


def test_two_processes(tmp_path: Path) -> None:
    outputs = run_ranks(
        """
        world = distributed.start(device="cpu")
        mine = torch.tensor([world.rank + 1, 2**53 + 1])
        total = distributed.all_reduce_sum(mine)
        assert total.tolist() == [3, 2**54 + 2] and mine.tolist() == [world.rank + 1, 2**53 + 1]
        assert distributed.all_gather_object({"rank": world.rank}) == [{"rank": 0}, {"rank": 1}]
        assert distributed.broadcast_object("zero" if world.rank == 0 else None) == "zero"
        answers = [distributed.start_any(world.rank == 1 and step == 2) for step in range(4)]
        assert [answer() for answer in answers] == [False, False, True, False]
        norm = torch.nn.BatchNorm1d(2)
        norm.running_mean.fill_(world.rank + 5.0)
        parallel.share_buffers(norm)
        assert norm.running_mean.tolist() == [5.0, 5.0]
        distributed.barrier()
        print(world.rank, distributed.is_main())
        distributed.shutdown()
        assert distributed.current().size == 1
        """,
        size=2,
        folder=tmp_path,
    )
    assert outputs == ["0 True\n", "1 False\n"]
