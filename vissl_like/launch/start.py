"""Start one checked job and show how it ended: what a plain launch and each point of a sweep have in common."""

from __future__ import annotations

from pathlib import Path

from vissl_like.config.check import Loaded
from vissl_like.errors import EXIT_DONE


def start(loaded: Loaded, *, config_dirs: list[str], run_dir: str = "") -> int:
    """Start a checked job, submit it, or make its dry run; returns 0. Everything else is raised."""
    from vissl_like.launch import folder, logs, slurm
    from vissl_like.launch.contents import check_contents
    from vissl_like.launch.inputs import check_inputs

    job = loaded.job
    info = folder.LaunchInfo(
        loaded.recipe, list(loaded.presets), list(loaded.overrides), list(config_dirs), list(loaded.notes)
    )
    where = Path(run_dir) if run_dir else folder.default_dir(job, loaded.recipe)
    placed = folder.with_run_dir(job, where)
    check_inputs(placed)  # lost files are reported before torch is imported
    logs.to_console(verbose=job.config.VERBOSE)
    check_contents(placed, where)
    if job.config.RUN.DRY_RUN:
        from vissl_like.launch.dry_run import dry_run

        print(dry_run(job, where, info))
        return EXIT_DONE
    if job.config.SLURM.DRY_RUN:
        print(slurm.batch_text(job, where))
        return EXIT_DONE
    if slurm.is_wanted(job.config):
        print(slurm.describe(slurm.submit(job, where, info), where))
        return EXIT_DONE
    from vissl_like.launch.local import launch

    show_results(launch(job, where, info))
    return EXIT_DONE


def show_results(results: dict[str, object]) -> None:
    """The numbers of a run, a few per line."""
    numbers = [f"{key}={value:.4g}" for key, value in results.items() if isinstance(value, float)]
    numbers += [f"{key}={value}" for key, value in results.items() if isinstance(value, int)]
    if 0 < len(numbers) <= 20:
        print("results: " + ", ".join(numbers), flush=True)
