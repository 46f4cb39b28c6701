"""``python -m tests.fuzz``."""

import sys

from tests.fuzz.run import main

if __name__ == "__main__":  # not in processes that a command starts
    sys.exit(main())
