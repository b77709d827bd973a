from pathlib import Path

import pytest

from dq_plugins.cli import main
from dq_plugins.demo import Demo, DemoSettings
from dq_plugins.report.demo_page import summary_table


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Demo:
    out = tmp_path_factory.mktemp("demo")
    settings = DemoSettings(name="emoji", steps=2, calibration_images=2, images=2, groups=2, compile=False, rounds=2)
    demo = Demo(settings, out)
    list(demo.steps())
    return demo


def test_measures_everything_it_reports(demo: Demo) -> None:
    result = demo.result
    assert set(result.sqnr) == set(result.plan.schedule.timesteps)
    assert min(result.sqnr.values()) > 15
    assert min(result.psnr) > 25
    assert result.bytes["int8"] < result.bytes["fp32"]
    assert set(result.latency) == {"fp32, eager", "int8, eager"}
    assert set(result.executions) == set(result.plan.layers)
    assert "integer" in {e.state for e in result.executions.values()}
    assert len(result.ranges) == 4


def test_a_second_run_uses_what_is_recorded(demo: Demo, capsys) -> None:
    again = Demo(demo.settings, demo.out)
    list(again.steps())
    assert again.result.plan == demo.result.plan
    assert "image PSNR" in str(summary_table(again.result))


def test_command_writes_a_page_and_a_picture(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(DemoSettings, "steps", 2)
    settings = DemoSettings.__init__
    monkeypatch.setattr(
        DemoSettings,
        "__init__",
        lambda self, **given: settings(
            self, **{**given, "steps": 2, "calibration_images": 2, "images": 2, "rounds": 2}
        ),
    )
    assert main(["demo", "--model", "digits", "--recipe", "fast", "--no-compile", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "images.png").stat().st_size > 1000
    page = (tmp_path / "report.html").read_text()
    for heading in ("Images", "Error per timestep", "How the layers run", "Timestep groups"):
        assert f"<h2>{heading}</h2>" in page
    assert "layers" in capsys.readouterr().out
