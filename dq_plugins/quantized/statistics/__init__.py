"""What is known about the inputs of every layer at every timestep, whatever runs the denoiser.

For each (layer, timestep) the exact count, minimum, maximum and mean square are kept, and a histogram of at most a few
thousand bins, from which the error of any candidate range at any width follows with the quantizer that executes.
"""

from dq_plugins.quantized.statistics.by_timestep import Statistics
from dq_plugins.quantized.statistics.collector import Collector, collect
from dq_plugins.quantized.statistics.input_statistics import TIMESTEP, InputStatistics

__all__ = ["TIMESTEP", "Collector", "InputStatistics", "Statistics", "collect"]
