"""Which module a parameter belongs to, tied weights and parametrized weights included."""

from __future__ import annotations

from collections import defaultdict

from torch import nn

from dq_plugins.compiled import unwrap


class Owners:
    """Parameters of a denoiser by name, and the modules that hold each.

    Args:
        denoiser: the original denoiser; only names, shapes and dtypes are read.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        self._denoiser = unwrap(denoiser)
        self._parameters: dict[str, nn.Parameter] = {}
        self._holders: dict[int, list[str]] = defaultdict(list)
        self._held: dict[str, list[str]] = defaultdict(list)
        self._names = _first_names(self._denoiser)
        for name, parameter in self._denoiser.named_parameters(remove_duplicate=False):
            name = name.replace("_orig_mod.", "")  # submodules compiled on their own
            module = _module_of(name)
            self._parameters[name] = parameter
            self._holders[id(parameter)].append(module)
            self._held[module].append(name)

    def layer(self, weights: tuple[str, ...], module: str) -> str:
        """Fully qualified name of the layer whose op uses ``weights``.

        Args:
            weights: names of the parameters that the weight is computed from.
            module: innermost module whose code runs the op. It is the layer where it holds the weight itself: a tied
                weight is held by several modules, and only the op tells which of them runs.
        """
        holders = self._holders[id(self._parameters[weights[0]])]
        return self._names[module if module in holders else holders[0]]

    def numel(self, name: str) -> int:
        """Number of elements of a parameter."""
        return self._parameters[name].numel()

    def total(self) -> int:
        """Elements of all parameters, tied ones counted once."""
        return sum(parameter.numel() for parameter in self._denoiser.parameters())

    def params(self, layer: str) -> int:
        """Elements of all parameters that a module holds itself."""
        return sum(self.numel(name) for name in self._held[layer])

    def weight_shape(self, layer: str) -> tuple[int, ...]:
        """Shape of the largest parameter that a module holds itself."""
        return tuple(self._parameters[max(self._held[layer], key=self.numel)].shape)

    def type_name(self, layer: str) -> str:
        """Class name of a module; of the class that was parametrized, where it was."""
        module = self._denoiser.get_submodule(layer)
        return type(getattr(module, "_orig_mod", module)).__name__.removeprefix("Parametrized")


def _first_names(denoiser: nn.Module) -> dict[str, str]:
    # a module that is held twice has two names; named_modules gives the first
    first: dict[int, str] = {}
    named = [(n.replace("_orig_mod.", ""), m) for n, m in denoiser.named_modules(remove_duplicate=False)]
    return {name: first.setdefault(id(module), name) for name, module in named}


def _module_of(parameter: str) -> str:
    # parametrizations are part of the module that they change
    module, parametrization, _ = parameter.partition(".parametrizations.")
    return module if parametrization else parameter.rpartition(".")[0]
