from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dq_diffusers.recording import load_pipeline

FOLDER = Path(__file__).parents[3] / "examples" / "denoisers"


@pytest.fixture(scope="module", params=["emoji", "digits"])
def pipeline(request):
    loaded = load_pipeline(FOLDER / request.param)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def draw(pipeline, conditions, steps, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return pipeline(conditions, num_inference_steps=steps, generator=rng, output_type="pt").images


def test_both_denoisers_fit_in_ten_megabytes():
    assert sum(file.stat().st_size for file in FOLDER.rglob("*.safetensors")) <= 10e6


def test_weights_load_as_float32(pipeline):
    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    assert {p.dtype for module in modules for p in module.parameters()} == {torch.float32}


def test_each_folder_has_its_card_and_samples(pipeline):
    folder = Path(pipeline.config._name_or_path)
    card = (folder / "README.md").read_text()
    assert all(word in card for word in ("license:", "parameters", "training", "final loss"))
    assert (folder / "samples.png").is_file()


def test_samples_of_one_prompt_look_alike_and_differ_between_prompts():
    pipeline = load_pipeline(FOLDER / "emoji")
    pipeline.set_progress_bar_config(disable=True)
    prompts = ["koala", "sunflower", "shark", "tiger face", "turtle"]
    assert set(prompts) <= set((FOLDER / "emoji" / "prompts.txt").read_text().splitlines())
    one, two = (draw(pipeline, prompts, steps=10, seed=seed).flatten(1) for seed in (1, 2))
    assert torch.cdist(one, two).argmin(dim=1).tolist() == list(range(len(prompts)))


def test_a_classifier_of_real_digits_reads_the_samples():
    from sklearn.datasets import load_digits
    from sklearn.svm import SVC

    pipeline = load_pipeline(FOLDER / "digits")
    pipeline.set_progress_bar_config(disable=True)
    labels = list(range(10)) * 2
    samples = draw(pipeline, labels, steps=10)
    small = torch.nn.functional.avg_pool2d(samples, 2).flatten(1).numpy()
    data = load_digits()
    read = SVC(gamma=0.5).fit(data.data / 16, data.target).predict(small)
    assert (read == labels).mean() >= 0.8
