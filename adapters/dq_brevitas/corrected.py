"""The bias correction of a plan, in the place that Brevitas has for the quantizer of a layer's output.

A row of the table is added to the output. It takes away an error that quantization makes, so it is left out while
Brevitas has the quantizers of activations disabled.
"""

from __future__ import annotations

from typing import Any

from dq_brevitas import host  # isort: skip
import torch
from brevitas.proxy.runtime_quant import ActQuantProxyFromInjector
from brevitas.quant.none import NoneActQuant
from brevitas.quant_tensor import QuantTensor
from torch import nn

from dq_brevitas.proxy import TimestepActQuantProxyFromInjector, timestep_proxies
from dq_plugins.errors import TimestepError
from dq_plugins.layer_kinds import kind_of
from dq_plugins.plan import BiasCorrection
from dq_plugins.quantized.output_correction import OutputCorrection
from dq_plugins.timesteps import TimestepContext


class CorrectionProxy(ActQuantProxyFromInjector):
    """Adds the row of the running timestep's group; quantizes nothing.

    It holds its context as the proxies of inputs do, see `dq_brevitas.proxy`.
    """

    dq_quantizer_state = True

    def init_tensor_quant(self) -> None:
        """Build the table from the injector, once."""
        super().init_tensor_quant()
        if not hasattr(self, "correction"):
            injector, layer = self.quant_injector, self.tracked_module_list[0]
            self.timestep_context: TimestepContext | None = injector.timestep_context
            kind, device = kind_of(layer), layer.weight.device
            assert kind is not None
            self.correction = OutputCorrection(
                injector.bias_correction,
                self.timestep_context or TimestepContext({}),
                kind,
                torch.device("cpu") if device.type == "meta" else device,  # where Brevitas builds layers
                injector.timestep_rows,
            )
            self.correction.register_load_state_dict_pre_hook(host.keep_what_is_missing)

    @property
    def groups(self) -> str | None:
        """Name of the timestep groups of its rows; None: one row for every timestep."""
        return self.correction.groups

    def bind(self, context: TimestepContext) -> None:
        """Use ``context`` from now on.

        Raises:
            TimestepError: it has no groups of this name, or not as many as the table has rows.
        """
        rows = len(self.correction.values)
        if self.groups is not None and len(context.groups.get(self.groups, ())) != rows:
            raise TimestepError(
                f"a bias correction has {rows} rows for timestep groups {self.groups!r}; the context has: "
                + (", ".join(f"{name!r} ({len(groups)})" for name, groups in context.groups.items()) or "none")
            )
        self.timestep_context = self.correction.context = context

    def forward(self, x: Any) -> Any:
        """The corrected output of the layer."""
        if self.disable_quant:
            return x
        if self.timestep_context is None and self.groups is not None:
            raise TimestepError(
                "a bias correction depends on the timestep, and nothing tells it the timestep. Call "
                "dq_brevitas.attach_timesteps(denoiser, groups) once after quantizing."
            )
        x = x.value if isinstance(x, QuantTensor) else x
        if self.correction.values.device != x.device:
            self.correction.to(x.device)
        return self.correction(x)

    def table(self) -> BiasCorrection:
        """What it adds, as a plan says it."""
        return BiasCorrection(self.correction.values.detach().float().cpu().clone(), self.groups)


class PlanCorrection(NoneActQuant):
    """Injector of a `CorrectionProxy`; for ``output_quant``, with ``bias_correction`` and ``timestep_context``."""

    proxy_class = CorrectionProxy
    timestep_context = None
    timestep_rows = None


def timestep_parts(model: nn.Module) -> dict[str, TimestepActQuantProxyFromInjector | CorrectionProxy]:
    """Everything in a model that depends on the timestep, by name."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, CorrectionProxy)}
    return {**timestep_proxies(model), **{name: proxy for name, proxy in found.items() if proxy.groups is not None}}
