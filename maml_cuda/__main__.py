"""``python -m maml_cuda`` is the command ``maml-cuda``."""

import sys

from maml_cuda.cli import main

if __name__ == "__main__":
    sys.exit(main())
