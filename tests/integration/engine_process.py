"""One rank of some engine runs, for test_engines.py: engine_process.py jobs.json [SIGKILL|SIGTERM|LATE]

jobs.json: [[job, run folder], ...]; RANK, WORLD_SIZE, ... come from the environment. With a signal the process sends it to
itself before the third block of features that it writes. LATE: ranks but the first begin to write features when the first
has marked its own as done.
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

    if sys.argv[2:] == ["LATE"]:
        write_late()
    elif sys.argv[2:]:
        signal_while_writing(signal.Signals[sys.argv[2]])
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
    import numpy as np

    from vissl_like.analysis import features

    start = features.FeatureWriter.__init__

    def wait_and_start(writer: features.FeatureWriter, folder: Path) -> None:
        while os.environ["RANK"] != "0" and not np.load(folder / features._DONE).any():
            time.sleep(0.01)
        start(writer, folder)

    features.FeatureWriter.__init__ = wait_and_start  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
