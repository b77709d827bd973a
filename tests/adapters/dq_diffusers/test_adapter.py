from __future__ import annotations

import json

from tiny_configs import config_of

from dq_plugins import partition, registry


def test_the_core_reaches_diffusers_through_the_registry(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_of("dit")))
    adapter = registry.get("adapter", "diffusers")()
    model = adapter.build_from_config(tmp_path)
    part = partition(model, adapter.example_inputs(model, batch=2))
    assert part.sample_argument == "hidden_states"
    assert part.layers["proj_out_2"].input_shape[0] == 2
