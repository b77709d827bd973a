from functools import partial
from pathlib import Path

import pytest

from dq_plugins import demo
from dq_plugins.cli import main
from dq_plugins.report.demo_page import DemoResult, summary_table

small = partial(demo.run_demo, steps=2, calibration_images=2, images=2, rounds=2)


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def result(out: Path) -> DemoResult:
    return small(out, "emoji", groups=2, compiled=False)


def test_measures_everything_it_reports(result: DemoResult) -> None:
    assert set(result.sqnr) == set(result.plan.schedule.timesteps)
    assert min(result.sqnr.values()) > 15
    assert min(result.psnr) > 25
    assert result.bytes["int8"] < result.bytes["fp32"]
    assert set(result.latency) == {"fp32, eager", "int8, eager"}
    assert set(result.executions) == set(result.plan.layers)
    assert "integer" in {e.state for e in result.executions.values()}
    assert len(result.ranges) == 4


def test_a_second_run_uses_what_is_recorded(out: Path, result: DemoResult) -> None:
    again = small(out, "emoji", groups=2, compiled=False)
    assert again.plan == result.plan
    assert "image PSNR" in str(summary_table(again))


def test_command_writes_a_page_and_a_picture(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(demo, "run_demo", small)
    assert main(["demo", "--model", "digits", "--recipe", "fast", "--no-compile", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "images.png").stat().st_size > 1000
    page = (tmp_path / "report.html").read_text()
    for heading in ("Images", "Error per timestep", "How the layers run", "Timestep groups"):
        assert f"<h2>{heading}</h2>" in page
    assert "layers" in capsys.readouterr().out
