"""Running any diffusers pipeline the way recording needs it: same inputs, same noise, same calls every time."""

from __future__ import annotations

import copy
import inspect
import json
import math
import re
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dq_diffusers.denoisers import denoiser_of, denoisers_of, placed
from dq_plugins.calibration.prompts import PROMPTS
from dq_plugins.errors import DQError

if TYPE_CHECKING:
    from collections.abc import Iterator

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
NON_FINITE = "non_finite"
"""Key of what stands for an infinite number of a scheduler's config in a recording: JSON has none."""
_COUNTS = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")
_PER_IMAGE = re.compile(r"(negative_)?(pooled_)?prompt(_\d)?(_embeds)?(_attention)?(_mask)?(_\d)?")
"""Arguments that say something of each image: texts, and what stands for them."""


def load_pipeline(path: str | Path) -> Any:
    """Load a pipeline, quantized or not, by the class its index names: of `dq_diffusers.pipelines`, or of diffusers'.

    ``DiffusionPipeline.from_pretrained`` looks only inside diffusers, so it cannot find the classes of that module.

    Args:
        path: folder that a pipeline was saved to, or its name on the Hugging Face hub (``"owner/name"``).

    Raises:
        DQError: there is no pipeline.
    """
    from dq_diffusers import pipelines
    from dq_diffusers.building import read_config

    index = Path(path) / "model_index.json"
    if index.is_file():
        name = str(read_config(index).get("_class_name"))
        own = (pipelines.PixelTextToImagePipeline, pipelines.PixelClassConditionalPipeline)
        return {each.__name__: each for each in own}.get(name, pipelines.DiffusionPipeline).from_pretrained(path)
    if Path(path).exists() or not _HUB_NAME.fullmatch(str(path)):
        raise DQError(
            f"{str(path)!r} holds no pipeline: model_index.json is missing. Give a folder that a diffusers pipeline "
            "wrote with save_pretrained."
        )
    try:
        return pipelines.DiffusionPipeline.from_pretrained(str(path))
    except OSError as error:
        raise DQError(
            f"{str(path)!r} is neither a folder here nor a pipeline that the hub hands out: {error}"
        ) from error


@dataclass(frozen=True, eq=False)
class PipelineSampler:
    """Runs a pipeline with a given denoiser; made by `sampler`.

    Image ``i`` starts from the noise of seed ``seed + i`` whatever the batch size, on the CPU, so a recording can be
    resumed and compared on any device. Latents are not decoded: the denoiser's calls are what counts.

    Attributes, beside the arguments of `sampler`:
        attribute: name of the pipeline's denoiser.
        conditions: by argument of the pipeline, one value (or row) for each image.
        arguments: the other arguments of every call of the pipeline.
    """

    pipe: Any
    attribute: str
    conditions: dict[str, Sequence[Any] | Tensor]
    steps: int
    images: int
    batch: int
    seed: int
    arguments: dict[str, Any]
    first: int = 0  # image to begin with

    @property
    def batches(self) -> int:
        """Runs of the pipeline that do not depend on each other: one, where they share a generator that was given."""
        return 1 if "generator" in self.arguments else self._runs

    @property
    def _runs(self) -> int:
        return -(-(self.images - self.first) // self.batch)

    def part(self, start: int, stop: int) -> PipelineSampler:
        """A sampler of the batches ``start`` to ``stop - 1`` alone: the same noise and prompts as in the whole."""
        end = min(self.first + stop * self.batch, self.images)
        return replace(self, first=self.first + start * self.batch, images=end)

    @property
    def total(self) -> int | None:
        """Number of calls, if the scheduler tells it and guidance runs as one batch; None with several denoisers."""
        if len(denoisers_of(self.pipe)) > 1:
            return None
        scheduler = copy.deepcopy(self.pipe.scheduler)
        try:
            scheduler.set_timesteps(self.steps)
        except (TypeError, ValueError):
            return None  # some schedulers need the size of the image first
        return len(scheduler.timesteps) * self._runs

    @property
    def description(self) -> dict[str, Any]:
        """What a recording keeps of the sampler: the scheduler's config and the weight of guidance."""
        default = inspect.signature(type(self.pipe).__call__).parameters.get("guidance_scale")
        guidance = self.arguments.get("guidance_scale", default.default if default is not None else None)
        config = json.loads(self.pipe.scheduler.to_json_string(), parse_constant=lambda name: {NON_FINITE: name})
        return {"adapter": "diffusers", "scheduler": config, "guidance": guidance}

    @property
    def settings(self) -> dict[str, Any]:
        """What was asked for, in text: a recording keeps it to say which of it differs when it is resumed."""
        asked = {"steps": self.steps, "images": self.images, "batch": self.batch, "seed": self.seed}
        return {name: repr(value) for name, value in {**asked, **self.conditions, **self.arguments}.items()}

    def __call__(self, denoiser: nn.Module) -> list[Any]:
        """Sample every image with ``denoiser`` in the pipeline's place for it.

        Returns:
            The pipeline's outputs, one for each batch.
        """
        with placed(self.pipe, self.attribute, denoiser), _quiet(self.pipe):
            starts = range(self.first, self.images, self.batch)
            given = self.arguments.get("generator")  # as it was given, every time
            fresh = [g.clone_state() for g in given] if isinstance(given, list) else given and given.clone_state()
            more = {} if given is None else {"generator": fresh}
            return [self._run(range(a, min(a + self.batch, self.images)), more) for a in starts]

    def _run(self, images: range, more: dict[str, Any]) -> Any:
        accepted = inspect.signature(type(self.pipe).__call__).parameters
        each = math.prod(self.arguments.get(name) or 1 for name in _COUNTS)
        seeds = range(self.seed + images.start * each, self.seed + images.stop * each)
        conditions = {name: values[images.start : images.stop] for name, values in self.conditions.items()}
        arguments = {"num_inference_steps": self.steps, **conditions, **self.arguments, **more}
        if "generator" in accepted:
            arguments.setdefault("generator", [torch.Generator().manual_seed(seed) for seed in seeds])
        if not conditions and "batch_size" in accepted:
            arguments.setdefault("batch_size", len(images))
        try:
            with torch.random.fork_rng(enabled="generator" not in accepted):
                if "generator" not in accepted:
                    torch.manual_seed(seeds[0])
                return self.pipe(**arguments)
        except DQError:
            raise
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise DQError(
                f"{type(self.pipe).__name__} cannot be sampled with the arguments {', '.join(arguments)}: {error}. It "
                f"takes: {', '.join(n for n in accepted if n != 'self')}. Give what it needs beside the prompts by the "
                "names of its own call (image=..., strength=...), or a function that samples"
            ) from error


@dataclass(frozen=True, eq=False)
class Drawn:
    """Runs a pipeline with a given denoiser, by a function that samples.

    Attributes:
        pipe: the pipeline.
        attribute: name of its denoiser.
        draw: samples, given the pipeline.
    """

    pipe: Any
    attribute: str
    draw: Callable[[Any], Any]

    def __call__(self, denoiser: nn.Module) -> Any:
        """Sample with ``denoiser`` in the pipeline's place for it."""
        with placed(self.pipe, self.attribute, denoiser), _quiet(self.pipe):
            return self.draw(self.pipe)


def sampler(
    pipe: Any,
    *,
    prompts: Sequence[str] | None = None,
    class_labels: Sequence[int] | None = None,
    steps: int = 20,
    seed: int = 0,
    images: int = 8,
    batch: int = 8,
    guidance_scale: float | None = None,
    component: str | None = None,
    **arguments: Any,
) -> PipelineSampler:
    """A sampler for `dq_plugins.record`, for any pipeline.

    Args:
        pipe: a diffusers pipeline.
        prompts: what to draw, repeated in turn up to ``images``; for pipelines that take a prompt. By default those of
            `dq_plugins.calibration.prompts`.
        class_labels: classes to draw, likewise; by default all classes in turn.
        steps: denoising steps.
        seed: seed of the first image; the next has the next seed.
        images: number of images.
        batch: images sampled at once.
        guidance_scale: weight of classifier-free guidance; the pipeline's default when None.
        component: attribute name of the denoiser to record, where there are several; see `denoisers_of`.
        arguments: anything else that the pipeline's call takes (``image``, ``strength``, ``num_frames``), the same for
            every batch. Texts and their embeddings (``negative_prompt``, ``prompt_embeds``) are those of all images,
            or a list or rows that are repeated in turn, as ``prompts`` are.

    Returns:
        A callable that takes the denoiser; its ``total`` is the number of denoiser calls, where known.

    Raises:
        DQError: arguments that the pipeline does not take, an empty list of them, or a number below 1.

    Example::

        name, denoiser = denoiser_of(pipe)
        calib = dq_plugins.record(denoiser, sampler(pipe, prompts=["a red fox"]), "calib/")
    """
    if min(steps, images, batch) < 1:
        raise DQError(f"steps, images and batch are at least 1, got {steps}, {images} and {batch}")
    accepted = inspect.signature(type(pipe).__call__).parameters
    embedded = arguments.get("prompt_embeds") is not None and prompts is None
    conditions = {} if embedded else _conditions(pipe, accepted, prompts, class_labels, images)
    if guidance_scale is not None:
        arguments["guidance_scale"] = guidance_scale
    if unknown := [name for name in arguments if name not in accepted]:
        raise DQError(
            f"{type(pipe).__name__} takes no {unknown[0]!r}; it takes: {', '.join(n for n in accepted if n != 'self')}"
        )
    if "output_type" in accepted and "output_type" not in arguments:
        latent = "prompt" in accepted and getattr(pipe, "vae", None) is not None
        arguments["output_type"] = "latent" if latent else "np"
    conditions |= {name: _of_each(arguments.pop(name), images) for name in _per_image(arguments)}
    attribute = denoiser_of(pipe)[0] if component is None else component
    return PipelineSampler(pipe, attribute, conditions, steps, images, batch, seed, arguments)


def _conditions(
    pipe: Any,
    accepted: Any,
    prompts: Sequence[str] | None,
    class_labels: Sequence[int] | None,
    images: int,
) -> dict[str, Sequence[Any] | Tensor]:
    given = {"prompt": prompts, "class_labels": class_labels}
    owner = type(pipe).__name__
    for name, values in given.items():
        if values is not None and (name not in accepted or not values):
            takes = [n for n in given if n in accepted]
            reason = f"takes no {name}" if name not in accepted else f"was given an empty list of {name}"
            raise DQError(f"{owner} {reason}; it takes: {', '.join(takes) or 'no condition'}")
    if "prompt" in accepted:
        return {"prompt": list(islice(cycle(PROMPTS if prompts is None else prompts), images))}
    if "class_labels" in accepted:
        needed = accepted["class_labels"].default is inspect.Parameter.empty
        labels = class_labels if class_labels is not None else range(_class_count(pipe, needed))
        return {"class_labels": list(islice(cycle(labels), images))} if labels else {}
    return {}


def _per_image(arguments: dict[str, Any]) -> list[str]:
    return [name for name, value in arguments.items() if value is not None and _PER_IMAGE.fullmatch(name)]


def _of_each(value: Any, images: int) -> Sequence[Any] | Tensor:
    """A value of an argument for each image: rows of a tensor, or entries of a list, in turn."""
    if isinstance(value, Tensor):
        return value[torch.arange(images, device=value.device) % len(value)]
    return list(islice(cycle(value if isinstance(value, list | tuple) else [value]), images))


def _class_count(pipe: Any, needed: bool) -> int:
    config = denoiser_of(pipe)[1].config
    count = config.get("num_embeds_ada_norm") or config.get("num_class_embeds")
    if not count and needed:
        raise DQError(
            f"the config of {type(pipe).__name__}'s denoiser does not say how many classes it knows; give them"
        )
    return int(count or 0)  # 0: the pipeline draws without


@contextmanager
def _quiet(pipe: Any) -> Iterator[None]:
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)
