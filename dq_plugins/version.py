"""The installed version of this library."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("dq-plugins")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"
