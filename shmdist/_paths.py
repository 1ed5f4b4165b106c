"""Where this package lies. No other file depends on how deep it is in the package."""

from __future__ import annotations

import os


def _here() -> None:
    pass


#: How the file names of this package's frames begin. Where the source came by a connection, no paths.
PACKAGE = os.path.dirname(_here.__code__.co_filename) + os.sep
#: The folder that the package is in: on ``sys.path`` it makes the package importable.
PACKAGE_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

__all__ = ["PACKAGE", "PACKAGE_ROOT"]
