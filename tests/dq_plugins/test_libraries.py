from __future__ import annotations

from torch import nn

from dq_plugins import registry
from dq_plugins.libraries import library_adapter


class Known:
    """An adapter of the library that this module plays."""


def denoiser(module: str, base: type[nn.Module] = nn.Module) -> nn.Module:
    return type("Denoiser", (base,), {"__module__": module})()


def test_the_adapter_is_that_of_the_package_that_the_class_comes_from():
    with registry.temporary("adapter", "a_library", Known):
        assert isinstance(library_adapter(denoiser("a_library.models.unet")), Known)
        assert library_adapter(denoiser("a_library_of_another_name")) is None
        assert library_adapter(nn.Linear(1, 1)) is None


def test_a_class_of_the_users_belongs_to_the_library_of_its_base():
    with registry.temporary("adapter", "a_library", Known()) as adapter:
        base = type(denoiser("a_library.models"))
        assert library_adapter(denoiser("__main__", base)) is adapter
