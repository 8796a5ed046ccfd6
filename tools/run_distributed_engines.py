#!/usr/bin/env python
"""Run an engine on a recipe: `python tools/run_distributed_engines.py config=pretrain/rotnet/rotnet_mnist5k`.

The same as the command `vissl-like`. `--help` lists what else it does.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file of a checkout: the package lies beside tools/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from vissl_like.launch.main import main

if __name__ == "__main__":
    sys.exit(main())
