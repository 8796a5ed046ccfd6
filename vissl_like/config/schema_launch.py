"""Options of job submission: the section config.SLURM."""

from __future__ import annotations

from typing import Any, Literal

from vissl_like.config.section import Section, option


class Slurm(Section):
    USE_SLURM: bool = option(False, "Submit the run as a batch job and end. Inside a SLURM job the run just starts.")
    DRY_RUN: bool = option(False, "Check everything and print the text of the batch job; submit nothing.")
    CLUSTER: Literal["slurm", "local"] = option(
        "slurm", "local: the same job by submitit in the background of this machine, without SLURM, to try it."
    )
    NAME: str = option("", "Name of the job. Empty: RUN.NAME, or the run folder's name.")
    COMMENT: str = option("", "Comment of the job.")
    PARTITION: str = option("", "Partition; several are separated by commas. Empty: the cluster's default.")
    ACCOUNT: str = option("", "Account that pays. Empty: your default.")
    QOS: str = option("", "Quality of service. Empty: the default.")
    CONSTRAINT: str = option("", "Features that the nodes must have, e.g. a100 or a100|h100.")
    TIME_HOURS: int = option(72, "Time limit in hours; TIME_MINUTES is added.", ge=0)
    TIME_MINUTES: int = option(0, "Minutes that are added to TIME_HOURS.", ge=0)
    MEM_GB: int = option(0, "Memory per node in GB; 0: what the partition gives.", ge=0)
    NUM_CPU_PER_PROC: int = option(8, "CPU cores per process.", ge=1)
    SIGNAL_DELAY_S: int = option(
        120, "Seconds before the time limit in which the run saves and is queued again.", ge=30
    )
    MAX_REQUEUES: int = option(3, "How often the job goes on after its time limit; preemptions are not counted.", ge=0)
    PORT_ID: int = option(
        0, "Port on the first node at which the nodes meet; 0: one that follows from the job's number.", ge=0, le=65535
    )
    LOG_FOLDER: str = option("", "Where logs and batch text go; every node must see it. Empty: RUN.DIR/slurm.")
    ADDITIONAL_PARAMETERS: dict[str, Any] = option(
        {}, "Further options of sbatch, by their long names: {exclude: [node7, node9], mail-type: END}."
    )
