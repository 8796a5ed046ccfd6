"""The whole option tree. It owns every default, bound and doc line; there is no YAML file of defaults.

Free of torch: `options`, `--help` and configuration errors answer without importing it.
"""

from __future__ import annotations

from typing import Any, Literal

from vissl_like.config.schema_data import ClusterFit, Data, ExtractFeatures
from vissl_like.config.schema_launch import Slurm
from vissl_like.config.schema_model import Loss, Meters, Model, Optimizer
from vissl_like.config.schema_parts import EvaluateParts, PartMaps
from vissl_like.config.section import Section, group, option


class Run(Section):
    DIR: str = option("", "Run folder. Empty: runs/<recipe>.")
    DRY_RUN: bool = option(False, "Check everything, print the plan, start nothing.")
    OVERWRITE: bool = option(
        False,
        "Start anew in a folder that holds another or a finished run; in a pipeline, only the stages that differ.",
    )
    NAME: str = option("", "Name for loggers. Empty: the run folder's name.")
    PROGRESS: Literal["auto", "bar", "lines", "none"] = option(
        "auto", "Progress on the terminal; auto: bar on a tty, else lines."
    )
    REPORT: bool = option(True, "Write report.html at the end.")


class Machine(Section):
    DEVICE: Literal["auto", "cpu", "gpu"] = option("auto", "auto: a GPU where there is one.")
    PRECISION: Literal["fp32", "bf16", "fp16"] = option("fp32", "Arithmetic of forward and backward (autocast).")
    DETERMINISTIC: bool = option(False, "Deterministic GPU kernels only (bit-exact resume on GPU).")
    NUM_THREADS: int = option(0, "CPU threads per process; 0: cores divided by local processes.", ge=0)
    CHANNELS_LAST: bool = option(False, "Keep images and convolutions channels-last.")
    COMPILE: Literal["none", "blocks", "model"] = option(
        "none", "torch.compile of each kind of repeated block (quick to start), or of the whole model."
    )
    COMPILE_BACKEND: str = option("inductor", "Backend of torch.compile.")


class Distributed(Section):
    NUM_NODES: int = option(1, "Machines.", ge=1)
    NUM_PROC_PER_NODE: int = option(0, "Processes per machine; 0: one per GPU, one on a CPU.", ge=0)
    BACKEND: Literal["auto", "gloo", "nccl"] = option("auto", "auto: nccl on GPUs, gloo on CPUs.")
    ENDPOINT: str = option(
        "", "host:port where several machines meet: an address of one of them, the same words on every machine."
    )
    NODE_ID: int = option(
        -1, "0: the first machine, which serves the endpoint; -1: the one that has its address is the first.", ge=-1
    )
    JOIN_TIMEOUT_S: int = option(600, "Seconds that several machines wait for each other, also after a restart.", ge=1)
    MAX_RESTARTS: int = option(
        3, "How often several machines start their processes again after a process or a machine was lost.", ge=0
    )
    STRATEGY: Literal["ddp", "fsdp"] = option(
        "ddp", "ddp: each process holds the whole model; fsdp: a part of every weight, gradient and optimizer state."
    )
    RESHARD_AFTER_FORWARD: bool = option(
        True, "fsdp: give up gathered blocks after the forward pass; false: more memory, less traffic."
    )
    BROADCAST_BUFFERS: bool = option(True, "Broadcast buffers from rank 0 at each step (DDP).")
    BUCKET_CAP_MB: int = option(25, "Size of gradient buckets in MB (DDP).", ge=1)
    TIMEOUT_S: int = option(1800, "Seconds after which a collective operation gives up.", ge=1)


class Checkpoint(Section):
    AUTO_RESUME: bool = option(True, "Go on from the newest good checkpoint of the run folder.")
    EVERY_EPOCHS: int = option(1, "Save after every this many epochs; 0: only at the end.", ge=0)
    EVERY_STEPS: int = option(0, "Also save every this many steps; 0: no.", ge=0)
    KEEP: int = option(2, "Newest saves that are kept, beside best and last.", ge=1)
    ASYNC: bool = option(
        True,
        "Write in the background; training waits for a copy in host memory only. False: no copy, it waits for the disk.",
    )
    BEST_METRIC: str = option("", "Metric of results that chooses `best`. Empty: the first test accuracy.")


class TensorBoard(Section):
    ENABLED: bool = option(False, "Write TensorBoard events to RUN.DIR/tb_logs (extra [tb]).")
    LOG_PARAMS: bool = option(False, "Histograms of parameters.")
    LOG_PARAMS_EVERY_N_ITERS: int = option(310, "Steps between histograms.", ge=1)


class Wandb(Section):
    ENABLED: bool = option(False, "Log to Weights & Biases.")
    PROJECT: str = option("vissl_like", "Project.")
    ENTITY: str = option("", "User or team. Empty: your default.")
    GROUP: str = option("", "Group of runs.")
    JOB_TYPE: str = option("", "Job type. Empty: the engine's name.")
    NAME: str = option("", "Name of the run. Empty: RUN.NAME.")
    MODE: Literal["online", "offline", "disabled"] = option("online", "offline: upload later with `wandb sync`.")
    RESUME_ID: str = option("", "Continue this W&B run. Empty: the one of the run folder, if any.")
    WATCH_GRADIENTS: bool = option(False, "Log gradient histograms every LOG_FREQUENCY steps.")


class Loggers(Section):
    TENSORBOARD: TensorBoard = group(TensorBoard, "TensorBoard.")
    WANDB: Wandb = group(Wandb, "Weights & Biases.")


class Profile(Section):
    ENABLED: bool = option(False, "Time and trace some training steps: RUN.DIR/profile says where their time went.")
    WAIT: int = option(10, "Steps of this launch that come before.", ge=0)
    STEPS: int = option(20, "Steps that are timed; as many are traced afterwards.", ge=1)
    WARMUP: int = option(2, "Steps after the timed ones with the tracer on that do not count.", ge=0)
    CPU: bool = option(True, "Trace operations on the CPU.")
    GPU: bool = option(True, "Trace kernels on the GPU, if there is one.")
    SHAPES: bool = option(False, "Trace the shapes of inputs.")
    MEMORY: bool = option(False, "Trace allocations of memory.")
    STACKS: bool = option(False, "Trace the source line of each operation (slow).")
    RANKS: list[int] = option([0], "Processes that are profiled.")


class Task(Section):
    NAME: str = option("supervised", "Training task (`list tasks`).")


class NearestNeighbor(Section):
    TOPK: list[int] = option([200], "Neighbours that vote; several are evaluated at once.")
    SIGMA: float = option(0.1, "Temperature of the vote exp(similarity / SIGMA).", gt=0)
    L2_NORM_FEATS: bool = option(True, "Normalise features to length 1.")
    LAYERS: list[str] = option([], "Layers to evaluate. Empty: all extracted.")


class LinearProbe(Section):
    C: list[float] = option([0.01, 0.1, 1.0], "Inverse regularisation; the best on VAL (or a held-out tenth) is used.")
    STANDARDIZE: bool = option(True, "Standardise features by the training rows.")
    MAX_ITER: int = option(1000, "L-BFGS iterations.", ge=1)
    LAYERS: list[str] = option([], "Layers to probe. Empty: all extracted.")


class LowShot(Section):
    SAMPLES_PER_CLASS: list[int] = option([10], "Labels per class.")
    NUM_DRAWS: int = option(5, "Random draws that are averaged.", ge=1)
    C: float = option(0.1, "Inverse regularisation.", gt=0)
    SEED: int = option(0, "Seed of the draws.", ge=0)
    LAYERS: list[str] = option([], "Layers to probe. Empty: all extracted.")


class Evaluate(Section):
    PROTOCOLS: list[Literal["knn", "linear", "low_shot"]] = option(
        ["knn", "linear"], "What is measured on the features."
    )
    CALIBRATE_BN_BATCHES: int = option(
        0, "Recompute BatchNorm statistics on this many training batches first (random trunks).", ge=0
    )
    KEEP_FEATURES: bool = option(False, "Keep the extracted features in RUN.DIR/features.")
    FEATURES_PATH: str = option("", "Evaluate these extracted features instead of extracting.")


class Stage(Section):
    NAME: str = option("", "Name of the stage and of its folder below RUN.DIR.")
    RECIPE: str = option("", "Recipe the stage starts from. Empty: this one's own configuration.")
    ENGINE: str = option("", "Engine. Empty: the recipe's.")
    CONFIG: dict[str, Any] = option(
        {}, "What differs in this stage; {name} in a text stands for an earlier stage's folder."
    )


class TableRow(Section):
    TITLE: str = option("", "First column.")
    STAGE: str = option("", "Stage whose results.json is read.")


class Table(Section):
    ROWS: list[TableRow] = option([], "Rows, in order.")
    COLUMNS: dict[str, str] = option({}, "Column title: key of results.json.")
    NOTES: list[str] = option([], "Sentences below the table; {stage:key} stands for a result.")


class Pipeline(Section):
    STAGES: list[Stage] = option([], "Stages in order; finished ones whose inputs did not change are skipped.")
    TABLE: Table = group(Table, "Summary that is printed at the end and put into the report.")


class Config(Section):
    PLUGINS: list[str] = option([], "Python modules that register further components.")
    SEED_VALUE: int = option(0, "Seed of everything random.", ge=0)
    VERBOSE: bool = option(False, "Print more.")
    LOG_FREQUENCY: int = option(10, "Steps between log lines.", ge=1)
    TEST_ONLY: bool = option(False, "Evaluate once; do not train.")
    TEST_MODEL: bool = option(True, "Run the test split during training.")
    TEST_EVERY_NUM_EPOCH: int = option(1, "N: a test after epochs N, 2N, ... and after the last one.", ge=1)
    CHECK_NAN: bool = option(True, "Stop at a loss that is not finite and save a replay bundle.")
    MULTI_PROCESSING_METHOD: Literal["fork", "spawn", "forkserver"] = option(
        "forkserver", "How loader processes start."
    )
    RUN: Run = group(Run, "The run folder.")
    MACHINE: Machine = group(Machine, "Device and arithmetic.")
    DISTRIBUTED: Distributed = group(Distributed, "Processes and machines.")
    SLURM: Slurm = group(Slurm, "Submission to a SLURM cluster.")
    CHECKPOINT: Checkpoint = group(Checkpoint, "Saving and resuming.")
    LOGGERS: Loggers = group(Loggers, "Where metrics go, beside metrics.jsonl.")
    PROFILE: Profile = group(Profile, "Where the time of training steps goes.")
    DATA: Data = group(Data, "Images and labels.")
    TASK: Task = group(Task, "What is trained.")
    MODEL: Model = group(Model, "The network.")
    LOSS: Loss = group(Loss, "What is minimised.")
    METERS: Meters = group(Meters, "What is measured.")
    OPTIMIZER: Optimizer = group(Optimizer, "How it is minimised.")
    EXTRACT_FEATURES: ExtractFeatures = group(ExtractFeatures, "Feature extraction.")
    CLUSTERFIT: ClusterFit = group(ClusterFit, "Clustering of features.")
    EVALUATE: Evaluate = group(Evaluate, "Evaluation on features.")
    PART_MAPS: PartMaps = group(PartMaps, "Drawings of discovered parts.")
    EVALUATE_PARTS: EvaluateParts = group(EvaluateParts, "Evaluation of discovered parts.")
    NEAREST_NEIGHBOR: NearestNeighbor = group(NearestNeighbor, "Weighted kNN.")
    LINEAR_PROBE: LinearProbe = group(LinearProbe, "Logistic regression on features.")
    LOW_SHOT: LowShot = group(LowShot, "Logistic regression on few labels.")
    PIPELINE: Pipeline = group(Pipeline, "Several engines in one run.")


class Job(Section):
    """What one launch runs: an engine and its configuration. This is what RUN.DIR/config.yaml holds."""

    engine_name: str = option("train", "Engine (`list engines`).")
    config: Config = group(Config, "Its configuration.")


def defaults() -> dict[str, Any]:
    """Every option's default as plain data: {"engine_name": ..., "config": {...}}."""
    return Job().model_dump(mode="json")
