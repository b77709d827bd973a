from __future__ import annotations

import io
import json
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import train_digits
import train_emoji
from dq_diffusers.recording import load_pipeline
from PIL import Image
from safetensors.torch import load_file

NAMES = ["red fox", "t-rex", "Owl"]


@pytest.fixture
def emoji_file(tmp_path) -> Path:
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    category = np.array([train_emoji.CATEGORY] * 3 + ["Flags"])
    np.savez(tmp_path / "emoji.npz", images=images, names=np.array([*NAMES, "flag"]), category=category)
    return tmp_path / "emoji.npz"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*/*.safetensors"))
    return {f"{file.parent.name}.{name}": tensor for file in files for name, tensor in load_file(file).items()}


def test_the_emoji_script_writes_a_pipeline_and_a_rerun_with_resume_the_same(emoji_file, tmp_path, monkeypatch):
    common = ["--data", str(emoji_file), "--batch-size", "2", "--checkpoint-every", "1"]
    train_emoji.main([*common, "--out", str(tmp_path / "pipe"), "--steps", "2"])
    pipe = load_pipeline(tmp_path / "pipe")
    assert pipe.tokenizer("OWL").input_ids[1] == pipe.tokenizer("owl").input_ids[1] != pipe.tokenizer.unk_token_id
    assert {p.dtype for m in (pipe.unet, pipe.text_encoder) for p in m.parameters()} == {torch.float32}
    assert Image.open(tmp_path / "pipe" / "samples.png").size[0] > 32
    assert (tmp_path / "pipe" / "prompts.txt").read_text().split("\n")[:3] == ["red fox", "t-rex", "owl"]
    monkeypatch.setattr(train_emoji, "write_samples", lambda *_: None)
    before = weights(tmp_path / "pipe")
    train_emoji.main([*common, "--out", str(tmp_path / "pipe"), "--steps", "2", "--resume"])
    after = weights(tmp_path / "pipe")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_digit_script_writes_a_pipeline(tmp_path, monkeypatch):
    monkeypatch.setattr(train_digits, "write_samples", lambda folder: None)
    train_digits.main(["--out", str(tmp_path), "--steps", "2", "--batch-size", "2"])
    pipe = load_pipeline(tmp_path)
    assert pipe.transformer.config.num_embeds_ada_norm == train_digits.CLASSES
    assert {p.dtype for p in pipe.transformer.parameters()} == {torch.float32}


def test_digits_are_in_range_and_keep_their_shape():
    images, classes = train_digits.load_digits()
    assert images.shape == (1797, 1, 16, 16)
    assert (images.min().item(), images.max().item()) == (-1.0, 1.0)
    assert classes.bincount().min() > 150


def test_the_first_token_is_the_same_for_every_prompt(emoji_file):
    _, names = train_emoji.load_emoji(emoji_file)
    tokenizer = train_emoji.build_tokenizer(names)
    encoder = train_emoji.build_text_encoder(tokenizer).eval()
    ids = tokenizer([*names, ""], padding="max_length", return_tensors="pt").input_ids
    assert ids.shape == (4, train_emoji.LENGTH)
    with torch.no_grad():
        states = encoder(ids).last_hidden_state
    assert torch.allclose(states[:, 0], states[:1, 0].expand(4, -1), atol=1e-6)
    assert not torch.allclose(states[0, 1], states[2, 1], atol=1e-2)


def test_images_come_from_the_npm_package_and_are_kept(tmp_path, monkeypatch):
    package = tmp_path / "package.tgz"
    write_package(package, {"a.png": ("RED FOX", train_emoji.CATEGORY), "b.png": ("FLAG", "Flags")})

    def pack(command, cwd, **_):
        assert command == ["npm", "pack", "emoji-datasource-google@16.0.0"]
        (Path(cwd) / "package.tgz").write_bytes(package.read_bytes())
        return subprocess.CompletedProcess(command, 0, stdout="package.tgz\n")

    monkeypatch.setattr(subprocess, "run", pack)
    images, names = train_emoji.load_emoji(tmp_path / "kept.npz")
    assert names == ["red fox"]
    # half of the picture is red, half is transparent, which becomes white
    assert images[0, :, 0, 0].tolist() == [1.0, -1.0, -1.0]
    assert images[0, :, 31, 31].tolist() == [1.0, 1.0, 1.0]
    monkeypatch.setattr(subprocess, "run", None)  # the second time, the kept file is enough
    again, _ = train_emoji.load_emoji(tmp_path / "kept.npz")
    assert torch.equal(images, again)


def write_package(path: Path, pictures: dict[str, tuple[str, str]]) -> None:
    records = [
        {"name": name, "category": category, "image": image, "has_img_google": True}
        for image, (name, category) in pictures.items()
    ]
    picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    picture.paste((255, 0, 0, 255), (0, 0, 64, 32))
    png = io.BytesIO()
    picture.save(png, "PNG")
    files = {"emoji.json": json.dumps(records).encode()}
    files |= {f"img/google/64/{image}": png.getvalue() for image in pictures}
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
