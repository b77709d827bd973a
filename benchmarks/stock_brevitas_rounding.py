"""Learned rounding by the trainer that Brevitas ships with its examples, with the settings of its language models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import brevitas.graph  # noqa: F401  the examples import parts of it in an order that fails alone
from brevitas_examples.common.learned_round.learned_round_args import (
    HandlerSpec,
    LossArgs,
    LRSchedulerArgs,
    OptimizerArgs,
    TrainerConfig,
    TrainingArgs,
)
from brevitas_examples.common.learned_round.learned_round_method import LearnedRoundArgs
from brevitas_examples.common.learned_round.learned_round_trainer import LearnedRoundTrainer
from brevitas_examples.common.learned_round.learned_round_utils import Cache
from torch import Tensor, nn

from dq_plugins.calibration.call import Call, first_tensor

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class BlockCalls(Cache[Arguments, Tensor]):
    """Calls of one block as they were made: an item is the whole batch of one call."""

    def __init__(self) -> None:
        self.reset_cache()

    def reset_cache(self) -> None:
        self.inputs: list[Arguments] = []
        self.outputs: list[Tensor] = []

    def store_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.inputs.append((args, kwargs))

    def store_output(self, output: Any) -> None:
        self.outputs.append(first_tensor(output))

    def collate_fn(self, batch: list[tuple[Arguments, Tensor]]) -> tuple[Arguments, Tensor]:
        return batch[0]

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Arguments, Tensor]:
        return self.inputs[index], self.outputs[index]


def learn_rounding(model: nn.Module, blocks: Sequence[str], recorded: Sequence[Call], iterations: int) -> None:
    """Learn the rounding of a Brevitas model block by block, in place.

    Args:
        model: calibrated.
        blocks: names of modules, in execution order; each sees the quantized blocks before it.
        recorded: calls of the denoiser.
        iterations: for each block, one recorded call each.
    """
    trainer = LearnedRoundTrainer(_settings(iterations))
    trainer.train(
        model,
        model_forward=lambda denoiser, call: call.run(denoiser),
        block_forward=lambda block, inputs: first_tensor(block(*inputs[0], **inputs[1])),
        data_loader=recorded,
        cache=BlockCalls(),
        get_blocks_fn=lambda denoiser: [denoiser.get_submodule(name) for name in blocks],
    )


def _settings(iterations: int) -> TrainerConfig:
    decay = LRSchedulerArgs("LinearLR", {"start_factor": 1.0, "end_factor": 0.0, "total_iters": iterations})
    training = TrainingArgs(
        optimizers_args=[OptimizerArgs("learned_round", "SignSGD", 5e-3, {}, decay)],
        batch_size=1,
        iters=iterations,
        losses_args=[LossArgs("mse")],
        loss_scaling_factor=1000.0,
        use_best_model=True,
        use_amp=False,
    )
    rounding = HandlerSpec("learned_round", LearnedRoundArgs("identity"))
    return TrainerConfig(training, [rounding])
