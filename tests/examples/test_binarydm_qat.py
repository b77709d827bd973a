from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from crashes import survives_kills
from safetensors import safe_open

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")
EXAMPLES = Path(__file__).parents[2] / "examples"
QUICK = ["--pipeline", "tiny", "--images", "8", "--batch", "4", "--save-every", "2", "--sample-steps", "2"]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import binarydm_qat

    yield binarydm_qat
    for name in ("binarydm_qat", "training"):
        sys.modules.pop(name, None)


def integer_weights(folder):
    with safe_open(folder / "integer" / "model.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict


def test_an_interrupted_and_resumed_run_ends_like_a_whole_one(script, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    script.main([*QUICK, "--steps", "4", "--out", str(whole)])
    original, saved = script.save_checkpoint, []

    def interrupted(*arguments, **options):
        saved.append(original(*arguments, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "save_checkpoint", interrupted)
    with pytest.raises(KeyboardInterrupt):
        script.main([*QUICK, "--steps", "4", "--out", str(parts)])
    monkeypatch.setattr(script, "save_checkpoint", original)
    script.main([*QUICK, "--steps", "4", "--out", str(parts), "--resume"])
    a, b = integer_weights(whole), integer_weights(parts)
    assert a.keys() == b.keys()
    assert all(a[key].equal(b[key]) for key in a)
    report = json.loads((whole / "report.json").read_text())
    assert report["psnr_integer_to_simulated"] > 60
    assert report["binary_weights_smaller"] > 15
    assert report["layers_in_integers"] > 0
    assert (whole / "samples.png").stat().st_size > 0


def test_it_survives_kills(script, tmp_path, monkeypatch):
    out, steps = tmp_path / "out", []
    on_step = script.BinaryDMCallback.on_step
    monkeypatch.setattr(script.BinaryDMCallback, "on_step", lambda self, i: (on_step(self, i), steps.append(i))[0])

    def run() -> dict[str, bytes]:
        script.main([*QUICK, "--steps", "4", "--out", str(out), "--resume"])
        return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}

    survives_kills(run, out, tmp_path / "store", units=lambda: len(steps), lost=2, every=50)
