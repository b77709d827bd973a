"""One quantized denoiser in several threads and processes, copied and interrupted while it runs."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dq_torchao
import pytest
import torch
from torch import Tensor, nn
from torchao_models import Denoiser, build, denoiser_plan

import dq_plugins as dq
from dq_plugins.timesteps import context_of

BACKENDS = ("simulate", "torchao", "brevitas")
COPYABLE = ("simulate", "torchao")  # Brevitas models cannot be pickled, by Brevitas' own design
TIMESTEPS = (100.0, 500.0, 900.0)


def quantized(backend: str, **options: Any) -> nn.Module:
    model = build()
    return dq.apply(model, denoiser_plan(model), backend, **options)


def inputs(batch: int = 2) -> Tensor:
    return torch.randn(batch, 4, 6, 6, generator=torch.Generator().manual_seed(batch))


@torch.no_grad()
def run(model: Callable[..., Tensor], t: float, batch: int = 2) -> Tensor:
    return model(inputs(batch), torch.tensor([t]))


def outputs(model: Callable[..., Tensor]) -> list[Tensor]:
    return [run(model, t) for t in TIMESTEPS]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.fixture(autouse=True)
def switching_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def in_threads(work: Callable[[int], Any], count: int = 6) -> list[Any]:
    """What ``work`` gives in threads that start together; an exception in one of them is raised."""
    barrier = threading.Barrier(count)

    def start(i: int) -> Any:
        barrier.wait()
        return work(i)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(start, range(count)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("released", [False, True])
def test_threads_share_a_denoiser_from_its_first_call_on(backend, released):
    """Kernels lay weights out at the first call, so several threads may be first."""
    model = quantized(backend)
    expected = outputs(copy.deepcopy(model) if backend in COPYABLE else quantized(backend))
    if released:
        if backend != "torchao":
            pytest.skip("only torchao's kernels hold weights of their own")
        outputs(model)
        dq_torchao.release_weights(model)
    expected_of = dict(zip(TIMESTEPS, expected, strict=True))

    def work(i: int) -> bool:
        t = TIMESTEPS[i % 3]
        return all(torch.equal(run(model, t), expected_of[t]) for _ in range(6 if backend == "brevitas" else 15))

    assert all(in_threads(work))


def test_threads_with_batches_of_several_sizes_and_timesteps_per_sample():
    model = quantized("torchao")
    reference = copy.deepcopy(model)
    t = {1: [100.0], 2: [100.0, 900.0], 3: [900.0, 500.0, 100.0]}

    @torch.no_grad()
    def call(which: nn.Module, batch: int) -> Tensor:
        return which(inputs(batch), torch.tensor(t[batch]))

    expected = {batch: call(reference, batch) for batch in t}
    assert all(in_threads(lambda i: all(torch.equal(call(model, i % 3 + 1), expected[i % 3 + 1]) for _ in range(15))))


def test_threads_share_a_compiled_denoiser_of_any_batch():
    torch._dynamo.reset()
    model = quantized("torchao")
    graphs = []

    def count(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=count, fullgraph=True, dynamic=True)
    expected = {(t, batch): run(model, t, batch) for t in TIMESTEPS for batch in (2, 3, 5)}
    for batch in (2, 3, 5):
        assert torch.allclose(run(compiled, 500.0, batch), expected[500.0, batch], atol=1e-5)
    before = len(graphs)

    def work(i: int) -> bool:
        t, batch = TIMESTEPS[i % 3], (2, 3, 5)[i // 2]
        return all(torch.allclose(run(compiled, t, batch), expected[t, batch], atol=1e-5) for _ in range(4))

    assert all(in_threads(work))
    assert len(graphs) == before == 1


@pytest.mark.parametrize("backend", COPYABLE)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_made_while_it_runs_are_whole(backend, copied):
    model = quantized(backend)
    expected = outputs(copy.deepcopy(model))
    stop = threading.Event()
    wrong: list[float] = []

    def keep_running(t: float, right: Tensor) -> None:
        while not stop.is_set():
            if not torch.equal(run(model, t), right):
                wrong.append(t)

    threads = [threading.Thread(target=keep_running, args=each) for each in zip(TIMESTEPS, expected, strict=True)]
    for thread in threads:
        thread.start()
    try:
        assert all(same(outputs(copied(model)), expected) for _ in range(5))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong


@pytest.mark.parametrize("backend", COPYABLE)
def test_a_copy_made_within_a_call_has_no_call_running(backend):
    model, copies = quantized(backend), []
    expected = outputs(model)
    handle = model.down.register_forward_hook(lambda *_: copies.append(copy.deepcopy(model)))
    run(model, 900.0)
    handle.remove()
    with pytest.raises(dq.DQError, match="outside the denoiser's forward"):
        context_of(copies[0]).index("all")
    for hook in list(copies[0].down._forward_hooks)[1 if backend == "simulate" else 0 :]:
        del copies[0].down._forward_hooks[hook]
    assert same(outputs(copies[0]), expected)


class BrokenError(Exception):
    pass


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["", "time", "conv_in", "up", "down", "conv_out"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_exception_at_any_layer_leaves_nothing_behind(backend, name, when):
    model = quantized(backend)
    expected = outputs(model)
    layer = model.get_submodule(name)

    def fail(*_: Any) -> None:
        raise BrokenError

    handle = layer.register_forward_pre_hook(fail) if when == "before" else layer.register_forward_hook(fail)
    with pytest.raises(BrokenError):
        run(model, 900.0)
    handle.remove()
    with pytest.raises(dq.DQError, match="outside the denoiser's forward"):
        context_of(model).index("all")
    assert same(outputs(model), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_exception_in_one_thread_does_not_reach_the_others(backend):
    model = quantized(backend)
    expected = outputs(model)
    failing = threading.local()

    def fail(*_: Any) -> None:
        if getattr(failing, "now", False):
            raise BrokenError

    model.down.register_forward_pre_hook(fail)

    def work(i: int) -> bool:
        failing.now = i % 2 == 0
        for _ in range(10):
            if failing.now:
                with pytest.raises(BrokenError):
                    run(model, TIMESTEPS[i % 3])
            elif not torch.equal(run(model, TIMESTEPS[i % 3]), expected[i % 3]):
                return False
        return True

    assert all(in_threads(work))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_call_within_a_call_changes_neither(backend):
    model = quantized(backend)
    expected = outputs(model)
    inner: list[Tensor] = []

    def again(*_: Any) -> None:
        if not inner:
            inner.append(torch.empty(0))
            inner[0] = run(model, 100.0)

    handle = model.up.register_forward_pre_hook(again)
    assert torch.equal(run(model, 900.0), expected[2])
    assert torch.equal(inner[0], expected[0])
    handle.remove()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_call_in_inference_mode_leaves_serves_every_other_mode(backend):
    """What kernels and layers keep from their first call must not be bound to the mode of that call."""
    model = quantized(backend)
    expected = outputs(quantized(backend))
    with torch.inference_mode():
        assert same([model(inputs(), torch.tensor([t])) for t in TIMESTEPS], expected)
    assert same(outputs(model), expected)
    with torch.enable_grad():
        assert torch.equal(model(inputs(), torch.tensor([900.0])), expected[2])
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        assert model(inputs(), torch.tensor([900.0])).dtype == torch.bfloat16
    model.load_state_dict(model.state_dict())
    assert same(outputs(model), expected)
    if backend in COPYABLE:
        assert same(outputs(copy.deepcopy(model)), expected)
        with torch.inference_mode():
            inside = copy.deepcopy(model)
        assert same(outputs(inside), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_forked_process_computes_the_same(backend):
    model = quantized(backend)
    expected = outputs(model)
    pid = os.fork()
    if pid == 0:  # without pytest's ends of things
        signal.alarm(60)
        os._exit(0 if same(outputs(model), expected) else 1)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert same(outputs(model), expected)


def in_a_new_process(data: bytes) -> list[list[list[float]]]:
    models = pickle.loads(data)
    return [[output.flatten().tolist() for output in outputs(model)] for model in models]


def test_a_spawned_process_computes_the_same():
    models = [quantized(backend) for backend in COPYABLE]
    assert isinstance(models[0], Denoiser)
    outputs(models[1])  # its kernels hold weights, which do not travel
    expected = [[output.flatten().tolist() for output in outputs(model)] for model in models]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(in_a_new_process, (pickle.dumps(models),))
    assert found == expected
