#!/usr/bin/env python
"""Commands of other programs in our words: `python tools/translate.py ifam -- train_net.py --dataset cub ...`."""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file of a checkout: the package lies beside tools/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from vissl_like.compat.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
