"""The command line: ``python -m shmdist worker`` is a worker."""

from __future__ import annotations

import sys


def main(arguments: list[str]) -> None:
    """Run the command that `arguments` names."""
    if arguments[:1] == ["worker"]:
        import shmdist.owners  # noqa: F401 - what a worker answers besides calls
        from shmdist.runtime.worker import start_worker

        start_worker()
        return
    sys.exit("usage: python -m shmdist worker   (the cookie comes on standard input)")


if __name__ == "__main__":
    main(sys.argv[1:])
