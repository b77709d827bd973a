from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from dq_plugins import demo
from dq_plugins.cli import main
from dq_plugins.metrics.latency import Latency
from dq_plugins.report.demo_page import DemoResult, doubts, summary_table

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
    given = ["--model", "digits", "--recipe", "fast", "--no-compile", "--threads", "1", "--out", str(tmp_path)]
    assert main(["demo", *given]) == 0
    (folder,) = tmp_path.iterdir()
    assert folder.name == "digits-W8A8-fast-8-groups-seed-0"
    assert (folder / "images.png").stat().st_size > 1000
    page = (folder / "report.html").read_text()
    for heading in ("Pictures", "Error of one step", "What depends on what", "How the layers run", "Timestep groups"):
        assert f"<h2>{heading}</h2>" in page
    assert page.count("<img") == 3 * 2
    told = capsys.readouterr().out
    assert f"Open {folder / 'report.html'}" in told
    assert "dq-plugins quantize" in told.partition("Next:")[2]
    assert "pass activation-ranges took" in told  # nobody sees bars here


def test_a_compiled_denoiser_that_is_slower_is_a_doubt(result: DemoResult) -> None:
    slow, fast = Latency(3.0, 3.0, 3.0, 3.0), Latency(1.0, 1.0, 1.0, 1.0)
    assert doubts(result) == []
    (said,) = doubts(replace(result, latency={"int8, eager": fast, "int8, compiled": slow}))
    assert "int8" in said


def test_a_slower_denoiser_is_called_slower(result: DemoResult) -> None:
    slow, fast = Latency(3.0, 3.0, 3.0, 3.0), Latency(1.5, 1.5, 1.5, 1.5)
    assert "(2.00x slower)" in str(summary_table(replace(result, latency={"fp32, eager": fast, "int8, eager": slow})))
    assert "(2.00x faster)" in str(summary_table(replace(result, latency={"fp32, eager": slow, "int8, eager": fast})))


def test_one_thread_is_taken_where_more_are_slower(monkeypatch) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seconds = {1: 1.0, 2: 5.0}
        clock = iter(t for count in (1, 1, 2) for t in (0.0, seconds[count]))
        monkeypatch.setattr(demo.time, "perf_counter", lambda: next(clock))
        assert demo.best_threads("digits") == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
