"""A small vision transformer, trained by one process or several: the options that the tests of parallel training share."""

from __future__ import annotations

from pathlib import Path

from tests.integration.forks import Ended
from tests.integration.training_runs import launch

#: Three blocks of width 30 (which no two processes share evenly), stochastic depth, dropout, clipping, an average.
VIT = [
    "config.MODEL.TRUNK.NAME=timm/vit_tiny_patch16_224",
    "config.MODEL.TRUNK.OPTIONS={img_size:28,patch_size:7,depth:3,embed_dim:30,num_heads:2,drop_path_rate:0.1}",
    "config.MODEL.GRAD_CLIP.USE_GRAD_CLIP=true",
    "config.OPTIMIZER.NAME=adamw",
    "config.OPTIMIZER.NUM_EPOCHS=2",
    "config.OPTIMIZER.PARAM_SCHEDULERS.LR.START_VALUE=0.003",
    "config.CHECKPOINT.EVERY_STEPS=2",
]


def launch_vit(run_dir: Path, *overrides: str, ranks: int = 1, env: dict[str, str] | None = None) -> Ended:
    """48 images, 6 steps an epoch of 8 images over all processes."""
    batch = f"config.DATA.TRAIN.BATCHSIZE_PER_REPLICA={8 // ranks}"
    return launch(run_dir, *VIT, batch, *overrides, ranks=ranks, env=env)
