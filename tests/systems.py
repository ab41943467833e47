"""Marks of tests that ask for what only some systems have (docs/platforms.md)."""

import os
import sys

import pytest

needs_posix = pytest.mark.skipif(os.name != "posix", reason="signals between processes, links, a shell, POSIX paths")
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="files that Linux maps, and /proc")
