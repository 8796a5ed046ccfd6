"""What this machine has: devices and how many processes a job takes on it, and environment.json. Needs torch."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vissl_like import __version__
from vissl_like.config.plan import usable_cores
from vissl_like.config.schema import Config
from vissl_like.errors import ConfigError
from vissl_like.files import write_json

ENVIRONMENT_FILE = "environment.json"
_PACKAGES = (
    *("torch", "torchvision", "timm", "transformers", "hydra-core", "omegaconf", "pydantic", "safetensors", "numpy"),
    *("pillow", "simplejpeg", "scikit-learn", "faiss-cpu", "faiss-gpu", "wandb", "tensorboard", "mlxtend"),
)
_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Processes:
    """Where a job runs: `device` is cpu or gpu, `local` the processes of this machine, `world` those of all."""

    device: str
    local: int
    world: int


def started_by_torchrun() -> bool:
    """Whether this process is one of those that torchrun (or a scheduler that speaks like it) has started."""
    return all(name in os.environ for name in _TORCHRUN)


def processes_for(config: Config) -> Processes:
    """The device and the number of processes. Raises ConfigError if this machine cannot offer them."""
    import torch

    from vissl_like.core.distributed import ONE_GPU_PER_TASK

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = config.MACHINE.DEVICE
    if device == "auto":
        device = "gpu" if gpus else "cpu"
    if device == "gpu" and not gpus:
        raise ConfigError(
            "config.MACHINE.DEVICE='gpu': PyTorch finds no GPU on this machine. Use config.MACHINE.DEVICE=cpu, or mend "
            "the driver (`python -c 'import torch; print(torch.cuda.is_available())'` says whether it works)."
        )
    if started_by_torchrun():
        local, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    else:
        local = config.DISTRIBUTED.NUM_PROC_PER_NODE or (gpus if device == "gpu" else 1)
        world = local * config.DISTRIBUTED.NUM_NODES
    if device == "gpu" and local > gpus and ONE_GPU_PER_TASK not in os.environ:
        raise ConfigError(
            f"config.DISTRIBUTED.NUM_PROC_PER_NODE={local}: this machine has {gpus} GPU{'s' * (gpus > 1)}, and a process "
            f"needs one of its own. Use config.DISTRIBUTED.NUM_PROC_PER_NODE={gpus}, or config.MACHINE.DEVICE=cpu."
        )
    return Processes(device, local, world)


def write_environment(run_dir: Path) -> None:
    """Write environment.json: versions and hardware. Environment variables are never written."""
    write_json(run_dir / ENVIRONMENT_FILE, environment())


def environment() -> dict[str, Any]:
    """Versions and hardware of this process."""
    import torch

    packages = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return {
        "vissl_like": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cores": usable_cores(),
        "memory_gb": _memory_gb(),
        "gpus": [torch.cuda.get_device_name(number) for number in gpus],
        "cuda": torch.version.cuda if gpus else None,
        "packages": packages,
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    return None
