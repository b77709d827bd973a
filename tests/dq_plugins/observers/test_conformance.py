from __future__ import annotations

from dq_plugins.testing import ObserverConformance


class TestMinMax(ObserverConformance):
    name = "minmax"


class TestPercentile(ObserverConformance):
    name = "percentile"


class TestMSE(ObserverConformance):
    name = "mse"
