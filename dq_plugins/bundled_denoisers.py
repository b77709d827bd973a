"""The small trained denoisers that ship with the package."""

from __future__ import annotations

from pathlib import Path

from dq_plugins.errors import DQError

NAMES = ("emoji", "digits")
_PACKAGE = Path(__file__).parent


def bundled(name: str) -> Path:
    """Folder of a bundled pipeline.

    Args:
        name: ``"emoji"`` (text-conditional U-Net) or ``"digits"`` (class-conditional transformer).

    Raises:
        DQError: unknown name, or the files are missing from this installation.
    """
    if name not in NAMES:
        raise DQError(f"there is no bundled denoiser {name!r}; there are: {', '.join(NAMES)}")
    # an installed wheel carries them inside the package, a checkout under examples/
    for folder in (_PACKAGE / "denoisers" / name, _PACKAGE.parent / "examples" / "denoisers" / name):
        if (folder / "model_index.json").is_file():
            return folder
    raise DQError(f"the bundled denoiser {name!r} is missing from this installation; reinstall dq-plugins")


def folder_or_bundled(path: str | Path) -> str | Path:
    """``path`` as it is, or the folder of the bundled denoiser of that name where no file here is called so."""
    return bundled(str(path)) if str(path) in NAMES and not Path(path).exists() else path
