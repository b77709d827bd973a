"""The plan: every quantization decision, per layer, as framework-neutral data."""

from dq_plugins.plan.decisions import (
    BinaryTraining,
    CalibrationCalls,
    EstimateCheck,
    MeasuredSensitivity,
    OutlierRows,
    RangeMethods,
    TabulatedBlock,
    TabulatedOutput,
    Targets,
)
from dq_plugins.plan.encoding import decode_plan, encode_plan
from dq_plugins.plan.files import load_plan, save_plan
from dq_plugins.plan.layers import ActivationQuant, BiasCorrection, LayerPlan, Reason, WeightQuant
from dq_plugins.plan.plan import PassRecord, QuantPlan
from dq_plugins.plan.section import Section

__all__ = [
    "ActivationQuant",
    "BiasCorrection",
    "BinaryTraining",
    "CalibrationCalls",
    "EstimateCheck",
    "LayerPlan",
    "MeasuredSensitivity",
    "OutlierRows",
    "PassRecord",
    "QuantPlan",
    "RangeMethods",
    "Reason",
    "Section",
    "TabulatedBlock",
    "TabulatedOutput",
    "Targets",
    "WeightQuant",
    "decode_plan",
    "encode_plan",
    "load_plan",
    "save_plan",
]
