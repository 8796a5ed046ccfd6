"""One rank of some engine runs for tests beside it: engine_process.py jobs.json [a signal, or a function below]

jobs.json: [[job, run folder], ...]; RANK, WORLD_SIZE, ... come from the environment. With a signal the process sends it to
itself before the third block of features that it writes. Of the functions each lets ranks see different states of a file.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    from vissl_like.config.schema import Job
    from vissl_like.core import distributed
    from vissl_like.registry import resolve

    how = "".join(sys.argv[2:])
    if how.startswith("SIG"):
        signal_while_writing(signal.Signals[how])
    elif how:
        named = (write_late, write_slowly, stop_last, read_newer, list_more, find_more)
        next(change for change in named if change.__name__ == how)()
    distributed.start(device="cpu")
    for job, run_dir in json.loads(Path(sys.argv[1]).read_text()):
        run = resolve("engine", job["engine_name"], key="engine_name")
        results = run(Job.model_validate(job), Path(run_dir))
        if distributed.is_main():
            (Path(run_dir) / "results.json").write_text(json.dumps(results))
    distributed.shutdown()


def signal_while_writing(number: signal.Signals) -> None:
    from vissl_like.analysis import features

    write, count = features.FeatureWriter.write, [0]

    def counted(writer: features.FeatureWriter, *args: object, **options: object) -> None:
        count[0] += 1
        if count[0] == 3:
            writer.flush()
            os.kill(os.getpid(), number)
        write(writer, *args, **options)  # type: ignore[arg-type]

    features.FeatureWriter.write = counted  # type: ignore[method-assign, assignment]


def write_late() -> None:
    """Ranks but the first begin to write features when the first has marked its own as done."""
    import numpy as np

    from vissl_like.analysis import features

    start = features.FeatureWriter.__init__

    def wait_and_start(writer: features.FeatureWriter, folder: Path) -> None:
        while os.environ["RANK"] != "0" and not np.load(folder / features._DONE).any():
            time.sleep(0.01)
        start(writer, folder)

    features.FeatureWriter.__init__ = wait_and_start  # type: ignore[method-assign]


def write_slowly() -> None:
    """Ranks but the first take longer for a block than a collective operation may take."""
    import datetime

    import torch.distributed as dist

    from vissl_like.analysis import features
    from vissl_like.core import on_main

    write, on_main.PULSE_S = features.FeatureWriter.write, 0.1

    def wait_and_write(writer: features.FeatureWriter, block: int, *args: object, **options: object) -> None:
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=2))
        if block == len(writer.blocks) - 1:
            time.sleep(4.0)
        write(writer, block, *args, **options)  # type: ignore[arg-type]

    features.FeatureWriter.write = wait_and_write  # type: ignore[method-assign, assignment]


def stop_last() -> None:
    """The last rank alone gets a signal."""
    if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        signal_while_writing(signal.SIGTERM)


def read_newer() -> None:
    """While the first rank reads weights of the training `weights`, that goes on: the others begin when it has saved again."""
    from vissl_like.core import weights

    read, later = weights.open_weights, Path("weights/checkpoints/step_00000002")

    def wait_and_read(*args: object, **options: object) -> object:
        if os.environ["RANK"] != "0":
            time.sleep(1.0)
            later.with_name("later").rename(later)
        return read(*args, **options)  # type: ignore[arg-type]

    weights.open_weights = wait_and_read  # type: ignore[assignment]


def list_more() -> None:
    """Ranks but the first list a folder of images when the first is through with it and one more has come."""
    from vissl_like.data import folder

    look = folder.list_folder

    def wait_and_look(root: str) -> object:
        image, is_listed = Path(root) / "ant" / "late.png", Path("listed")
        while os.environ["RANK"] != "0" and not is_listed.exists():
            time.sleep(0.01)
        if os.environ["RANK"] != "0":
            image.write_bytes(next(Path(root).rglob("*.png")).read_bytes())
        found = look(root)
        is_listed.touch()
        return found

    folder.list_folder = wait_and_look  # type: ignore[assignment]


def find_more() -> None:
    """The features of TEST come after the first rank has looked for them."""
    from vissl_like.analysis import features

    read, later = features.FeatureStore.open.__func__, Path("features/later")  # type: ignore[attr-defined]

    def read_and_wait(kind: type, folder: Path, split: str, layer: str = "") -> object:
        found = read(kind, folder, split, layer)
        if split == "TRAIN" and os.environ["RANK"] != "0":
            time.sleep(1.0)
            later.rename(later.with_name("TEST"))
        return found

    features.FeatureStore.open = classmethod(read_and_wait)  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    main()
