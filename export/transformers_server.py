"""transformers' server with ARA checkpoints: ``python -m export.transformers_server FOLDER --port 8000``.

It is ``transformers serve`` in a process that has imported ara. So the checkpoint's format is known, and the code that
lies in its folder is not run.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run ``transformers serve`` with the arguments of this process."""
    from transformers.cli.transformers import app  # its main() would first ask PyPI for a newer version

    import ara  # noqa: F401 – registers the format of the checkpoints

    sys.argv[:1] = ["transformers", "serve"]
    app()


if __name__ == "__main__":
    main()
