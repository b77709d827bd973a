from __future__ import annotations

import torch
from odd_denoisers import TwoLayers
from torch import nn

from dq_plugins.graph.owners import Owners


def test_tied_weights_go_to_the_module_that_runs():
    model = TwoLayers()
    model.time.weight = model.body.weight
    owners = Owners(model)
    assert owners.layer(("body.weight",), "body") == "body"
    assert owners.layer(("body.weight",), "time") == "time"
    assert owners.layer(("body.weight",), "") in ("time", "body")
    assert owners.total() == 16 + 4 + 4


def test_parametrized_weights_go_to_the_module_they_change():
    model = TwoLayers()
    nn.utils.parametrizations.weight_norm(model.body)
    owners = Owners(model)
    assert owners.layer(("body.parametrizations.weight.original1",), "") == "body"
    assert owners.params("body") == 16 + 4 + 4
    assert owners.weight_shape("body") == (4, 4)
    assert owners.type_name("body") == "Linear"


def test_submodules_compiled_on_their_own_keep_their_names():
    model = TwoLayers()
    model.body = torch.compile(model.body)
    owners = Owners(model)
    assert owners.layer(("body.weight",), "") == "body"
    assert owners.type_name("body") == "Linear"
