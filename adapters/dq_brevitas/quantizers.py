"""Activation quantizers with one set of parameters per timestep group, as Brevitas injectors.

Use them like the stock ones, in a layer or in a layer map, and tell the model its timestep groups afterwards::

    QuantLinear(8, 8, bias=True, input_quant=Int8ActPerTimestepFloat, input_bit_width=4)
    attach_timesteps(denoiser, 8)

The names follow Brevitas: the stock quantizer's, with ``PerTensor`` replaced by ``PerTimestep``. With one group each
equals its stock namesake bit for bit. Attributes beyond the stock ones, all changeable with ``.let(...)``:

- ``timestep_groups``: name of the groups that index the tables (a model may use several sets);
- ``timestep_reduction``: how calls of one group are combined in calibration, ``"mean"`` (Brevitas) or ``"max"``;
- ``timestep_context``: the context, where it is known before the model is built.

Sources: ranges per timestep group, ADP-DM (arXiv 2305.18723); one range per timestep of the schedule for the finite set
of temporal features, TFMQ-DM (arXiv 2311.16503).
"""

from __future__ import annotations

from dq_brevitas import host  # noqa: F401  isort: skip
from brevitas.core.stats import NegativeMinOrZero
from brevitas.inject import ExtendedInjector
from brevitas.inject.enum import StatsOp
from brevitas.quant import (
    Int8ActPerTensorFloat,
    Int8ActPerTensorFloatMSE,
    ShiftedUint8ActPerTensorFloat,
    Uint8ActPerTensorFloat,
)

from dq_brevitas.binary import EvolvableBasisWeight as EvolvableBasisWeight
from dq_brevitas.binary import Int8ActLearnedStep as Int8ActLearnedStep
from dq_brevitas.binary import SignedBinaryWeightPerChannelFloat as SignedBinaryWeightPerChannelFloat
from dq_brevitas.dynamic import Int8DynamicActPerTokenFloat as Int8DynamicActPerTokenFloat
from dq_brevitas.dynamic import Int8DynamicAsymmetricActPerTokenFloat as Int8DynamicAsymmetricActPerTokenFloat
from dq_brevitas.integer import TimestepIntQuant
from dq_brevitas.proxy import TimestepActQuantProxyFromInjector
from dq_brevitas.scaling import TimestepScaling, TimestepZeroPoint

DEFAULT_GROUPS = "default"
FINITE_SET_GROUPS = "schedule"


class TimestepActMixin(ExtendedInjector):
    """Turns a per-tensor activation injector into one per timestep group; put it first among the bases."""

    proxy_class = TimestepActQuantProxyFromInjector
    scaling_impl = TimestepScaling
    int_quant = TimestepIntQuant
    timestep_context = None
    timestep_groups = DEFAULT_GROUPS
    timestep_reduction = "mean"
    timestep_rows = None


class ShiftedTimestepActMixin(TimestepActMixin):
    """The same for an injector with a zero point."""

    zero_point_impl = TimestepZeroPoint


class FiniteSetMixin(ExtendedInjector):
    """One group per timestep of the schedule, ranges by plain minimum and maximum.

    The inputs of the temporal block are a finite set, one per timestep, so their exact range is known and a percentile
    or an average over calls would only clip it.
    """

    timestep_groups = FINITE_SET_GROUPS
    timestep_reduction = "max"


class Int8ActPerTimestepFloat(TimestepActMixin, Int8ActPerTensorFloat):
    """8-bit signed activations, one learned scale per timestep group, initialised from percentiles."""


class Int8ActPerTimestepFloatMSE(TimestepActMixin, Int8ActPerTensorFloatMSE):
    """As `Int8ActPerTimestepFloat`, scales initialised by least squared error: the choice at 4 bits and below."""


class Uint8ActPerTimestepFloat(TimestepActMixin, Uint8ActPerTensorFloat):
    """8-bit unsigned activations (after a ReLU), one learned scale per timestep group."""


class ShiftedUint8ActPerTimestepFloat(ShiftedTimestepActMixin, ShiftedUint8ActPerTensorFloat):
    """8-bit asymmetric activations, a learned scale and an integer zero point per timestep group."""


class Int8ActFiniteSetFloat(FiniteSetMixin, Int8ActPerTimestepFloat):
    """8-bit signed activations of the temporal block, one exact range per timestep of the schedule."""

    scaling_stats_op = StatsOp.MAX


class ShiftedUint8ActFiniteSetFloat(FiniteSetMixin, ShiftedUint8ActPerTimestepFloat):
    """8-bit asymmetric activations of the temporal block, one exact range per timestep of the schedule."""

    scaling_stats_op = StatsOp.MIN_MAX
    zero_point_stats_impl = NegativeMinOrZero
