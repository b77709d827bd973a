from __future__ import annotations

import copy
import socket

import pytest
import torch
from binary_distributed import train_worker
from binary_models import tiny_denoiser, tiny_inputs
from safetensors.torch import load_file
from torch import nn

from dq_plugins.errors import DQError
from dq_plugins.passes.binarization import (
    BinaryDMCallback,
    EvolvableBasis,
    LayerChoice,
    evolution_penalty,
    evolvable_bases,
    evolve,
    fade,
    load_checkpoint,
    moving_average,
    save_checkpoint,
    second_scale_mean,
    train_quantized,
    trained_layers,
)

BLOCKS = ("down.0", "middle", "up.1")
CHOICES = {
    "first": LayerChoice("int8"),
    "down.0.conv1": LayerChoice("evolvable"),
    "middle.conv1": LayerChoice("binary", 4),
    "up.1.conv2": LayerChoice("evolvable", 4),
}


def run(steps, *, seed=0, start=0, model=None, optimizer=None, callback=None, **options):
    """A user's training loop with the two added lines."""
    if model is None:
        teacher = tiny_denoiser(seed)
        model = train_quantized(copy.deepcopy(teacher), CHOICES)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        callback = BinaryDMCallback(model, teacher, blocks=BLOCKS, **options)
    losses = []
    for i in range(start, steps):
        inputs = tiny_inputs(seed=i)
        loss = (model(**inputs) - inputs["sample"]).square().mean()
        loss = callback.step(loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        callback.on_step(i)
        losses.append(float(loss.detach()))
    return model, optimizer, callback, losses


def test_the_total_is_the_loss_the_penalty_and_lambda_times_the_mimicking():
    teacher = tiny_denoiser()
    model = train_quantized(copy.deepcopy(teacher), CHOICES)
    callback = BinaryDMCallback(model, teacher, blocks=BLOCKS, mimic=0.5)
    loss = model(**tiny_inputs()).square().mean()
    total = callback.step(loss)
    torch.testing.assert_close(total, loss + callback.parts["penalty"] + callback.parts["mimicking"])
    torch.testing.assert_close(callback.parts["penalty"], evolution_penalty(model))
    assert float(callback.parts["mimicking"].detach()) > 0


def test_transition_comes_after_the_given_iteration_and_once():
    _, _, callback, _ = run(2, evolve_at=2)
    assert not callback.evolved
    assert callback.on_step(2)
    assert callback.evolved
    assert not callback.on_step(3)


@pytest.mark.parametrize(("learning_rate", "length"), [(1e-3, 12), (1e-3, 60), (1e-4, 30)])
def test_the_decoupled_regulariser_leaves_under_five_percent_of_a_second_scale_that_the_loss_wants_larger(
    learning_rate, length
):
    """AdamW; the loss pulls the output, and with it both scales, up; in it the paper's weight does nothing here."""
    left = {}
    for tau in (9e-2, None):
        torch.manual_seed(0)
        model = train_quantized(nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4)), {"0": LayerChoice("evolvable")})
        start = second_scale_mean(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
        callback = BinaryDMCallback(model, evolve_at=length, tau=tau)
        for i in range(length + 1):
            inputs = torch.randn(32, 16)
            loss = (model[0](inputs) - 3 * model[0].bias - 4 * inputs @ model[0].weight.detach().T).square().mean()
            callback.step(loss).backward()
            optimizer.step()
            optimizer.zero_grad()
            left[tau] = second_scale_mean(model) / start
            assert callback.on_step(i) == (i == length)
    assert left[9e-2] > 0.9
    assert left[None] < 0.05


def test_a_regulariser_without_an_end_is_refused():
    with pytest.raises(DQError, match="needs evolve_at"):
        BinaryDMCallback(train_quantized(tiny_denoiser(), CHOICES), tau=None)


def test_second_bases_fade_linearly_until_they_are_dropped():
    teacher = tiny_denoiser()
    model = train_quantized(copy.deepcopy(teacher), CHOICES)
    callback = BinaryDMCallback(model, evolve_at=6, fade=4)
    stages = []
    for i in range(8):
        callback.on_step(i)
        stages.append([float(basis.stage_one) for basis in evolvable_bases(model)])
    assert stages == [[share] * 2 for share in (1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0)]


def test_a_second_basis_faded_to_nothing_is_dropped_without_a_jump():
    weight = torch.randn(8, 32)
    for share, jump in ((1.0, True), (0.01, False)):
        basis = EvolvableBasis(weight)
        fade(basis, share)
        before = basis(weight).detach()
        evolve(basis)
        assert ((basis(weight) - before).abs().max() > 0.1) == jump


@pytest.mark.parametrize("options", [{"fade": 3}, {"fade": 3, "evolve_at": 2}, {"fade": 0, "evolve_at": 2}])
def test_fading_needs_iterations_before_the_transition(options):
    with pytest.raises(DQError, match=r"fade=\d iterations end where the second bases are dropped"):
        BinaryDMCallback(tiny_denoiser(), **options)


def test_a_teacher_is_frozen_and_gets_no_gradients():
    _, _, callback, _ = run(1)
    assert all(p.grad is None and not p.requires_grad for p in callback.mimicking.teacher.parameters())


def test_sampling_between_forward_and_step_does_not_interfere():
    teacher = tiny_denoiser()
    results = []
    for sample_between in (False, True):
        model = train_quantized(copy.deepcopy(teacher), CHOICES)
        callback = BinaryDMCallback(model, teacher, blocks=BLOCKS)
        loss = model(**tiny_inputs()).square().mean()
        if sample_between:
            with torch.no_grad():
                model(**tiny_inputs(batch=2, seed=5))
        results.append(callback.step(loss).detach())
    assert torch.equal(*results)


def test_deep_copies_of_a_student_in_training_do_not_interfere():
    teacher = tiny_denoiser()
    model = train_quantized(copy.deepcopy(teacher), CHOICES)
    callback = BinaryDMCallback(model, teacher, blocks=BLOCKS)
    first = callback.step(model(**tiny_inputs()).square().mean())
    loss = model(**tiny_inputs()).square().mean()
    copy.deepcopy(model)(**tiny_inputs(batch=2, seed=5))
    assert torch.equal(callback.step(loss).detach(), first.detach())


def test_step_without_a_forward_is_an_error():
    _, _, callback, _ = run(1)
    with pytest.raises(DQError, match="after the student's forward"):
        callback.step(torch.zeros(()))


def test_blocks_without_a_teacher_are_an_error():
    with pytest.raises(DQError, match="teacher"):
        BinaryDMCallback(tiny_denoiser(), blocks=("middle",))


def test_a_model_without_second_bases_has_nothing_added():
    model = nn.Linear(2, 2)
    loss = model(torch.ones(1, 2)).sum()
    assert BinaryDMCallback(model).step(loss) is loss


def test_the_average_is_a_copy_in_the_students_stage():
    model, _, callback, _ = run(4, ema_decay=0.9, evolve_at=3)  # the last iteration makes the transition
    assert not torch.equal(callback.averaged.first.weight, model.first.weight)
    assert callback.evolved
    assert all(basis.evolved for basis in evolvable_bases(callback.averaged))


def test_without_a_decay_the_student_is_its_own_average():
    model, _, callback, _ = run(1)
    assert callback.averaged is model


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    options = {"evolve_at": 3, "ema_decay": 0.9}
    whole, _, whole_callback, losses = run(6, **options)
    first = run(2, **options)
    save_checkpoint(tmp_path / "a.safetensors", 2, *first[:3], notes={"lr": 0.1})
    fresh = run(0, seed=0, **options)
    step, notes = load_checkpoint(tmp_path / "a.safetensors", *fresh[:3])
    assert (step, notes) == (2, {"lr": 0.1})
    model, optimizer, callback, _ = fresh
    _, _, _, rest = run(6, start=step, model=model, optimizer=optimizer, callback=callback)
    assert first[3] + rest == losses
    for (name, a), b in zip(whole.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(whole_callback.averaged.first.weight, callback.averaged.first.weight)


def test_a_checkpoint_after_the_transition_restores_the_stage(tmp_path):
    saved = run(2, evolve_at=0)
    save_checkpoint(tmp_path / "a.safetensors", 2, *saved[:3])
    model, optimizer, callback, _ = run(0)
    load_checkpoint(tmp_path / "a.safetensors", model, optimizer, callback)
    assert callback.evolved


def test_a_damaged_checkpoint_is_an_error_of_ours(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(DQError, match="cannot be read as safetensors"):
        load_checkpoint(path, *run(0)[:3])


def test_remove_unhooks():
    model, _, callback, _ = run(1)
    callback.remove()
    assert not model._forward_pre_hooks
    assert not model.middle._forward_hooks


def test_two_processes_stay_equal_over_the_transition(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(train_worker, (port, str(tmp_path)), nprocs=2)
    a, b = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert any(key.startswith("directions/") for key in a)
    for key in a:
        assert torch.equal(a[key], b[key]), key


def test_bases_are_found_once_each():
    model = train_quantized(tiny_denoiser(), CHOICES)
    assert len(evolvable_bases(model)) == 2
    assert len(trained_layers(model)) == 4


def test_the_average_follows_the_formula_with_its_warm_up():
    model = nn.Linear(1, 1, bias=False)
    average, expected = moving_average(model, decay=0.5), 1.0  # the first value is copied
    for step, value in enumerate((1.0, 2.0, -3.0, 5.0, 7.0, 1.0, 2.0, 9.0, -4.0, 3.0), start=1):
        nn.init.constant_(model.weight, value)
        average.update_parameters(model)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    torch.testing.assert_close(average.module.weight.item(), expected)
