"""`python -m vissl_like ...`: the command line, where the console script is not on the PATH."""

import sys

from vissl_like.launch.main import main

if __name__ == "__main__":
    sys.exit(main())
