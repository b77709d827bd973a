"""Files as an attacker, a failing disk or a careless hand leaves them: bytes, records and tensors that were changed.

Changes of records and tensors are signed again, so that what is left to find them is the schema and not the hash.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from dq_plugins.artifact.format import METADATA_KEY
from dq_plugins.hashing import hash_json, hash_tensors

HUGE = (2**31 - 1, 2**31, 2**63, 10**30)
NUMBERS = (0, -1, 1, 2, 3, 8, 16, 17, 255, *HUGE, -0.0, 0.5, 1e-44, 1e-38, 1e38, 1e308, -1e308)
TEXTS = ("", "x", "../../etc/passwd", "/dev/zero", "\0", "\ud800", "float32", "os:system", "a" * 5000, "shard-0.st")
DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int16, torch.int32,
    torch.int64, torch.bool, torch.float8_e4m3fn,
)  # fmt: skip
SHAPES = ((), (0,), (1,), (2,), (3, 3), (1, 1, 1), (0, 7), (1000,))


def nested(depth: int) -> Any:
    found: Any = 0
    for level in range(depth):
        found = [found] if level % 2 else {"dict": found}
    return found


def any_value(rng: Random, whole: Any) -> Any:
    """A JSON value that has no business where it is put."""
    kind = rng.randrange(6)
    if kind == 0:
        return rng.choice(NUMBERS)
    if kind == 1:
        return rng.choice(TEXTS)
    if kind == 2:
        return rng.choice([None, True, False, [], {}, [[]], {"": None}, [0] * 300])
    if kind == 3:
        return nested(rng.choice([3, 50, 70, 300]))
    return deepcopy(rng.choice(list(_parts(whole)))[0])  # something of this very record, in another place


def _parts(data: Any) -> Any:
    """Every value of a record, with its container and its key."""
    todo: list[tuple[Any, Any, Any]] = [(data, None, None)]
    while todo:
        value, owner, key = todo.pop()
        yield value, owner, key
        if isinstance(value, dict | list):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            todo += [(each, value, name) for name, each in items]


def change_record(rng: Random, record: Any) -> Any:
    """Change a record at a place or two."""
    for _ in range(rng.choice([1, 1, 1, 2, 2])):  # few: each may put a deep part into another
        value, owner, key = rng.choice(list(_parts(record)))
        if owner is None:
            if rng.randrange(20) == 0:
                return any_value(rng, record)
            continue
        kind = rng.randrange(6)
        if kind == 0:
            del owner[key]
        elif kind == 1 and isinstance(owner, dict):
            owner[str(any_value(rng, ""))[:50]] = owner.pop(key)
        elif kind == 2 and isinstance(owner, list):
            owner.insert(rng.randrange(len(owner) + 1), value)
        elif kind == 3 and isinstance(value, int | float) and not isinstance(value, bool):
            owner[key] = rng.choice([value + 1, value - 1, -value, value * 2, value / 2, str(value)])
        else:
            owner[key] = any_value(rng, record)
    return record


def change_tensors(rng: Random, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Change a tensor: its name, dtype, shape or values."""
    if not tensors:
        return tensors
    name = rng.choice(sorted(tensors))
    old = tensors[name]
    kind = rng.randrange(7)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[rng.choice(["x", name + "x", *sorted(tensors)])] = tensors.pop(name)
    elif kind == 2:
        tensors[name] = old.float().to(rng.choice(DTYPES))
    elif kind == 3:
        tensors[name] = torch.ones(rng.choice(SHAPES)).to(old.dtype)
    elif kind == 4 and old.numel() and old.dtype not in (torch.bool, torch.float8_e4m3fn):
        flat = old.clone().flatten()
        limits = torch.iinfo(old.dtype) if not old.is_floating_point() else torch.finfo(old.dtype)
        values = [0, 1, limits.min, limits.max]
        values += [float("nan"), float("inf"), -1.0, 1e-44, -0.0] if old.is_floating_point() else []
        flat[rng.randrange(flat.numel())] = rng.choice(values)
        tensors[name] = flat.reshape(old.shape)
    elif kind == 5:
        tensors[name] = tensors[rng.choice(sorted(tensors))].clone()
    else:
        tensors[name] = old.repeat(2, *[1] * (old.dim() - 1)) if old.dim() else old.reshape(1)
    return tensors


def change_bytes(rng: Random, data: bytes) -> bytes:
    """Flip, cut, repeat or replace bytes."""
    if not data:
        return b"\0"
    start, length = rng.randrange(len(data)), rng.choice([1, 1, 2, 8, 100])
    kind = rng.randrange(6)
    if kind == 0:
        return data[:start] + bytes([data[start] ^ 1 << rng.randrange(8)]) + data[start + 1 :]
    if kind == 1:
        return data[:start]
    if kind == 2:
        return data[:start] + data[start + length :]
    if kind == 3:
        return data[: start + length] + data[start:]
    if kind == 4:
        return data[:start] + bytes(rng.randrange(256) for _ in range(length)) + data[start + length :]
    return rng.choice([b"", b"{}", b"[" * 100_000, b"\x80\x04\x95", b'{"a":1,"a":2}', b"9" * 6000, b"NaN"])


def sign(data: Any, tensors: dict[str, Tensor]) -> Any:
    """The envelope with hashes that fit, where there still is one."""
    if not isinstance(data, dict):
        return data
    fields = {key: value for key, value in data.items() if key not in ("hash", "tensors_hash")}
    if tensors:
        fields["tensors_hash"] = hash_tensors(tensors)
    try:
        return {**fields, "hash": hash_json(fields)}
    except Exception:  # not finite, or too deep: no hash fits
        return data


class SealedFile:
    """An artifact whose record and tensors are changed and signed again; ``path`` as `Format.write` takes it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.whole = {each.name: each.read_bytes() for each in path.parent.iterdir() if each.is_file()}
        if path.suffix == ".json":
            self.text = path.read_text()
            stored = list(path.parent.glob(f"{path.stem}-*.safetensors"))
            self.tensors = safetensors.torch.load_file(stored[0]) if stored else {}
        else:
            with safe_open(path, "pt") as file:
                self.tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
                self.text = file.metadata()[METADATA_KEY]

    def restore(self) -> None:
        for each in self.path.parent.iterdir():
            if each.is_file() and each.name not in self.whole:
                each.unlink()
        for name, data in self.whole.items():
            (self.path.parent / name).write_bytes(data)

    def change(self, rng: Random) -> None:
        """Put a changed artifact in the place of the whole one."""
        self.restore()
        if rng.randrange(4) == 0:
            name = rng.choice(sorted(self.whole))
            (self.path.parent / name).write_bytes(change_bytes(rng, self.whole[name]))
            return
        data, tensors = json.loads(self.text), dict(self.tensors)
        if rng.randrange(3) and isinstance(data.get("record"), dict | list):
            data["record"] = change_record(rng, data["record"])
        elif rng.randrange(4):
            tensors = change_tensors(rng, tensors)
        else:
            data = change_record(rng, data)
        self.write(self.signed(data, tensors), tensors)

    def signed(self, data: Any, tensors: dict[str, Tensor]) -> Any:
        return sign(data, tensors)

    def write(self, data: Any, tensors: dict[str, Tensor]) -> None:
        text = json.dumps(data)
        if self.path.suffix != ".json":
            safetensors.torch.save_file(_apart(tensors), self.path, {METADATA_KEY: text})
            return
        self.path.write_text(text)
        digest = data.get("tensors_hash") if isinstance(data, dict) else None
        if tensors and isinstance(digest, str):
            for each in self.path.parent.glob(f"{self.path.stem}-*.safetensors"):
                each.unlink()
            beside = self.path.with_name(f"{self.path.stem}-{digest[:16]}.safetensors")
            safetensors.torch.save_file(_apart(tensors), beside)


class SealedCheckpoint(SealedFile):
    """A checkpoint of dq_torchao, whose record names hashes of its own."""

    def signed(self, data: Any, tensors: dict[str, Tensor]) -> Any:
        with contextlib.suppress(Exception):  # where there still is such a place
            plan = data["record"]["config"]["_data"]["plan"]
            plan["hash"] = hash_json({key: value for key, value in plan.items() if key != "hash"})
        with contextlib.suppress(Exception):
            data["record"].update(state_hash=hash_tensors(tensors), config_hash=hash_json(data["record"]["config"]))
        return sign(data, {})


class Recording(SealedFile):
    """A calibration set: the manifest is signed again, and names the shards as they are."""

    def change(self, rng: Random) -> None:
        if rng.randrange(4):
            return super().change(rng)
        self.restore()
        data = json.loads(self.text)
        shard = rng.choice(data["record"]["shards"])
        file = self.path.parent / shard["file"]
        tensors = change_tensors(rng, safetensors.torch.load(self.whole[shard["file"]]))
        content = safetensors.torch.save(_apart(tensors)) if rng.randrange(4) else change_bytes(rng, file.read_bytes())
        file.write_bytes(content)
        shard["size"], shard["sha256"] = len(content), hashlib.sha256(content).hexdigest()
        self.write(sign(data, {}), {})
        return None


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
