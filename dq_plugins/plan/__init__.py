"""The plan: every quantization decision, per layer, as framework-neutral data."""

from dq_plugins.plan.encoding import decode_plan, encode_plan
from dq_plugins.plan.files import load_plan, save_plan
from dq_plugins.plan.layers import ActivationQuant, BiasCorrection, LayerPlan, Reason, WeightQuant
from dq_plugins.plan.plan import PassRecord, QuantPlan, Section

__all__ = [
    "ActivationQuant",
    "BiasCorrection",
    "LayerPlan",
    "PassRecord",
    "QuantPlan",
    "Reason",
    "Section",
    "WeightQuant",
    "decode_plan",
    "encode_plan",
    "load_plan",
    "save_plan",
]
