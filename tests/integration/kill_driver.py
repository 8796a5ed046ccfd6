"""Runs one training again and again, killing it on the way, and prints how often: a program of its own for test_resume.

torch is imported once here; each run is a fork of this process, which itself never computes anything, so a start takes a
second instead of five.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys

from tests.integration.training_runs import SMALL


def child(argv: list[str], settings: dict[str, str]) -> None:
    os.setsid()
    os.environ.update(settings)
    from vissl_like.launch.main import main

    with open(settings["OUTPUT"], "a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        code = main(argv)
    os._exit(code)


def run(argv: list[str], settings: dict[str, str]) -> int:
    """The exit code of one run; -9 if it was killed."""
    process = multiprocessing.get_context("fork").Process(target=child, args=(argv, settings))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def main(reference: str, run_dir: str, output: str, kills: int, epochs: int) -> None:
    import torch  # noqa: F401
    import torchvision.transforms.v2  # noqa: F401

    import vissl_like.engines.train  # noqa: F401

    chance = random.Random(0)
    argv = [*SMALL, "config.CHECKPOINT.EVERY_STEPS=2", f"config.OPTIMIZER.NUM_EPOCHS={epochs}"]
    codes = [run([*argv, "config.DATA.NUM_DATALOADER_WORKERS=0", f"config.RUN.DIR={reference}"], {"OUTPUT": output})]
    ended = []
    for number in range(kills):
        settings = {
            "OUTPUT": output,
            "KILL_AFTER": str(chance.randint(1, 4)),
            "KILL_DELAY_S": str(chance.choice([0, 0, 0.005, 0.02])),
        }
        workers = f"config.DATA.NUM_DATALOADER_WORKERS={0 if number % 2 else 2}"
        codes.append(run([*argv, workers, f"config.RUN.DIR={run_dir}"], settings))
        ended.append(len(open(f"{run_dir}/metrics.jsonl").readlines()) if os.path.exists(run_dir) else 0)
    codes.append(run([*argv, "config.DATA.NUM_DATALOADER_WORKERS=2", f"config.RUN.DIR={run_dir}"], {"OUTPUT": output}))
    print(json.dumps({"killed": sum(code == -signal.SIGKILL for code in codes), "codes": codes, "lines": ended}))


if __name__ == "__main__":
    main(*sys.argv[1:4], kills=int(sys.argv[4]), epochs=int(sys.argv[5]))
