"""The plan: every quantization decision, per layer, as framework-neutral data."""

from dq_plugins.plan.attention import AttentionPlan
from dq_plugins.plan.decisions import (
    BinaryTraining,
    CalibrationCalls,
    EstimateCheck,
    MeasuredImageError,
    MeasuredSensitivity,
    OutlierRows,
    RangeMethods,
    SamplerCorrection,
    TabulatedBlock,
    TabulatedOutput,
    Targets,
)
from dq_plugins.plan.dynamic_ranges import DynamicActivationQuant
from dq_plugins.plan.layers import ActivationQuant, BiasCorrection, InputQuant, LayerPlan, Reason, WeightQuant
from dq_plugins.plan.low_rank import LowRank
from dq_plugins.plan.quant_plan import PLAN, PassRecord, QuantPlan
from dq_plugins.plan.rotation import Rotation
from dq_plugins.plan.section import Section
from dq_plugins.plan.subspace import Subspace

__all__ = [
    "PLAN",
    "ActivationQuant",
    "AttentionPlan",
    "BiasCorrection",
    "BinaryTraining",
    "CalibrationCalls",
    "DynamicActivationQuant",
    "EstimateCheck",
    "InputQuant",
    "LayerPlan",
    "LowRank",
    "MeasuredImageError",
    "MeasuredSensitivity",
    "OutlierRows",
    "PassRecord",
    "QuantPlan",
    "RangeMethods",
    "Reason",
    "Rotation",
    "SamplerCorrection",
    "Section",
    "Subspace",
    "TabulatedBlock",
    "TabulatedOutput",
    "Targets",
    "WeightQuant",
]
