"""What torchao's ``config_from_dict`` may build by name: our configs, and nothing else.

``config_from_dict`` calls whatever a listed module has under the name that the data gives. A module of its own keeps
that to classes that only hold data.
"""

from dq_torchao.checkpoint_config import CheckpointConfig
from dq_torchao.plan_config import PlanConfig
from dq_torchao.timestep_config import TimestepInt8Config

__all__ = ["CheckpointConfig", "PlanConfig", "TimestepInt8Config"]
