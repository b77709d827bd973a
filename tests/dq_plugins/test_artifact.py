"""Artifacts: round trips, damage, hostile content, interruptions."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from artifacts import edit_file, edit_record, replace_text
from crashes import survives_kills
from safetensors.torch import save_file

from dq_plugins.artifact import STRICT, Format, StoredTensor, UnitResults, strict_json
from dq_plugins.artifact.format import METADATA_KEY
from dq_plugins.artifact.strict_json import parse_json
from dq_plugins.errors import ArtifactError, CheckpointError, PlanError
from dq_plugins.scratch import is_scratch


@dataclass
class Thing:
    """A value with tensors in it."""

    __pydantic_config__ = STRICT

    count: int
    scale: StoredTensor
    layers: dict[str, StoredTensor] = field(default_factory=dict)
    note: str | None = None

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"count is {self.count}")


THING: Format[Thing] = Format("thing", 3, Thing, what="a thing")
SETTINGS = {"seed": 3, "layers": ("a", "b"), "bits": {"w": 4}}


def thing(value: float = 1.0) -> Thing:
    shared = torch.arange(6.0)
    return Thing(3, torch.tensor([value, 0.5]), {"up": shared[:4].view(2, 2), "down": shared[::2]})


def same(a: Thing, b: Thing) -> bool:
    tensors = [(a.scale, b.scale), *((a.layers[name], b.layers[name]) for name in b.layers)]
    return (a.count, a.layers.keys()) == (b.count, b.layers.keys()) and all(torch.equal(x, y) for x, y in tensors)


@pytest.fixture(params=["thing.safetensors", "thing.json"])
def path(request, tmp_path) -> Path:
    return THING.write(tmp_path / "folder" / request.param, thing(), SETTINGS)


def files(path: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in path.parent.iterdir()}


def test_reads_what_was_written(path):
    assert same(THING.read(path), thing())
    assert THING.read(path).note is None
    assert len(files(path)) == (2 if path.suffix == ".json" else 1)


def test_same_value_same_bytes(path):
    before = files(path)
    THING.write(path, thing(), dict(reversed(SETTINGS.items())))
    assert files(path) == before


def test_only_the_same_settings_find_it_and_the_others_are_named(path):
    assert same(THING.find(path, SETTINGS), thing())
    assert THING.find(path, SETTINGS | {"seed": 4}) is None
    assert THING.differing(path, SETTINGS | {"seed": 4, "more": 1}) == ["more", "seed"]
    assert THING.differing(path, SETTINGS) == []
    assert THING.find(path.with_name("absent.json"), SETTINGS) is None


def test_another_release_does_not_find_it_but_reads_it(path, monkeypatch):
    monkeypatch.setattr("dq_plugins.artifact.format.__version__", "99.0")
    assert THING.find(path, SETTINGS) is None
    assert THING.differing(path, SETTINGS) == ["dq-plugins"]
    assert same(THING.read(path), thing())


def test_mapped_tensors_are_the_same(path):
    assert same(THING.find(path, SETTINGS, mapped=True), thing())


def test_every_flipped_bit_is_found(path):
    """Of the record, of the header and of the tensors: none gives another value, and none another exception."""
    for name, whole in files(path).items():
        file = path.with_name(name)
        step = max(len(whole) // 150, 1)
        for position in range(0, len(whole), step):
            file.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << position % 8]) + whole[position + 1 :])
            with pytest.raises(ArtifactError):
                THING.read(path)
        file.write_bytes(whole)
    assert same(THING.read(path), thing())


def test_every_truncation_is_found(path):
    for name, whole in files(path).items():
        file = path.with_name(name)
        for length in [*range(0, len(whole) - 1, max(len(whole) // 40, 1)), len(whole) - 2]:
            file.write_bytes(whole[:length])
            with pytest.raises(ArtifactError):
                THING.read(path)
        file.write_bytes(whole)


def huge(path: Path) -> None:
    """A header that claims a tensor of 2^40 values, and one of 2^60 bytes for itself."""
    header = b'{"scale":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: edit_file(p, format="plan"), "not a thing"),
        (lambda p: edit_file(p, format_version=True), "not a thing"),
        (lambda p: edit_file(p, format_version=4), "format 4.*Upgrade"),
        (lambda p: edit_file(p, format_version=2), "format 2.*run again"),
        (lambda p: edit_file(p, library_version="0"), "altered"),
        (lambda p: edit_file(p, settings={"seed": 4}), "altered"),
        (lambda p: edit_file(p, surprise=1), "altered"),
        (lambda p: edit_record(p, lambda r: r.update(count=4.5)), "at count"),
        (lambda p: edit_record(p, lambda r: r.update(count="3")), "at count"),
        (lambda p: edit_record(p, lambda r: r.update(count=-1)), "count is -1"),
        (lambda p: edit_record(p, lambda r: r.pop("count")), "at count"),
        (lambda p: edit_record(p, lambda r: r.update(surprise=1)), "surprise"),
        (lambda p: edit_record(p, lambda r: r.update(scale="nowhere")), "at scale: there is no tensor 'nowhere'"),
        (lambda p: edit_record(p, lambda r: r.update(scale=[1])), "at scale"),
        (lambda p: replace_text(p, "[" * 100_000), "nested"),
        (lambda p: replace_text(p, '{"a":' * 100_000), "nested"),
        (lambda p: replace_text(p, "[" * 80 + "]" * 80), "nested more than"),
        (lambda p: replace_text(p, '{"format": "thing", "format": "thing"}'), "'format' stands twice"),
        (lambda p: replace_text(p, '{"format": NaN}'), "finite"),
        (lambda p: replace_text(p, '{"format": 1e999}'), "finite"),
        (lambda p: replace_text(p, "[]"), "not a thing"),
        (lambda p: replace_text(p, "null"), "not a thing"),
        (lambda p: replace_text(p, '{"format": "thing", "format_version": 3, "hash": "\\ud800"}'), "altered"),
        (lambda p: p.write_bytes(b"\x80\x04\x95"), "cannot be read"),
        (lambda p: p.write_bytes(b""), "cannot be read"),
        (lambda p: p.write_bytes((1 << 60).to_bytes(8, "little") + b"{}"), "cannot be read"),
        (huge, "cannot be read"),
    ],
)
def test_hostile_content_is_refused_in_words(path, damage, message):
    damage(path)
    with pytest.raises(ArtifactError, match=message) as error:
        THING.read(path)
    assert path.stem in str(error.value)


def test_other_tensors_are_refused(path):
    other = THING.write(path.parent / "other" / path.name, thing(2.0))
    if path.suffix == ".json":
        beside = next(path.parent.glob("thing-*.safetensors"))
        next(other.parent.glob("thing-*.safetensors")).replace(beside)
    else:
        edit_record(path, lambda record: None, tensors={"scale": torch.ones(2)})
    with pytest.raises(ArtifactError, match="tensors are not those"):
        THING.read(path)


@pytest.mark.parametrize("digest", ["../../etc/passwd", "..", "/etc/passwd", "x" * 64, ""])
def test_a_record_cannot_lead_to_another_folder(tmp_path, digest):
    path = THING.write(tmp_path / "thing.json", thing())
    edit_file(path, tensors_hash=digest)
    edit_record(path, lambda record: None)
    with pytest.raises(ArtifactError, match="at tensors_hash"):
        THING.read(path)


def test_links_out_of_the_folder_are_not_followed(path, tmp_path):
    for name in files(path):
        file, secret = path.with_name(name), tmp_path / "secret"
        file.replace(secret)
        file.symlink_to(secret)
        with pytest.raises(ArtifactError, match="link that leads out of its folder"):
            THING.read(path)
        secret.replace(file)
    inside = path.with_name(f"link{path.suffix}")
    if path.suffix == ".safetensors":
        inside.symlink_to(path.name)
        assert same(THING.read(inside), thing())


def test_what_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "thing.json")
    (tmp_path / "thing.safetensors").mkdir()
    for name in ("thing.json", "thing.safetensors"):
        with pytest.raises(ArtifactError, match="not a file"):
            THING.read(tmp_path / name)
    with pytest.raises(ArtifactError, match="a thing was expected there"):
        THING.read(tmp_path / "absent.json")


def test_a_foreign_safetensors_file_is_refused(tmp_path):
    save_file({"weight": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ArtifactError, match="carries no record"):
        THING.read(tmp_path / "x.safetensors")


def test_a_second_entry_of_metadata_is_refused(tmp_path):
    data, tensors = THING.seal(thing())
    save_file(tensors, tmp_path / "x.safetensors", {METADATA_KEY: json.dumps(data), "more": "?"})
    with pytest.raises(ArtifactError, match="carries no record"):
        THING.read(tmp_path / "x.safetensors")


def test_records_are_bounded(path):
    with pytest.raises(ArtifactError, match="at most 0 MiB"):
        Format("thing", 3, Thing, record_mb=0).read(path)


@pytest.mark.parametrize("error", [PlanError, CheckpointError])
def test_errors_are_of_the_class_that_was_asked_for(path, error):
    with pytest.raises(error):
        Format("other", 3, Thing, error=error).read(path)


@pytest.mark.parametrize("name", ["thing.safetensors", "thing.json"])
def test_a_kill_at_any_moment_leaves_the_old_one_or_the_new_one_and_nothing_else(tmp_path, name):
    path = THING.write(tmp_path / "folder" / name, thing(1.0))

    def old_or_new():
        found = THING.read(path)
        assert same(found, thing(1.0)) or same(found, thing(2.0))

    states = survives_kills(
        lambda: THING.write(path, thing(2.0)), tmp_path / "folder", tmp_path / "store", finished=old_or_new
    )
    moments = " ".join(state.moment for state in states)
    assert f"in the middle of writing {name}" in moments
    assert f"after os.replace {name}" in moments


def test_one_that_another_process_replaces_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    path = THING.write(tmp_path / "thing.json", thing(1.0))
    original = Format._load_envelope

    def replaced(self, path):
        found = original(self, path)
        monkeypatch.undo()
        THING.write(path, thing(2.0))
        return found

    monkeypatch.setattr(Format, "_load_envelope", replaced)
    assert same(THING.read(path), thing(2.0))


def test_many_writers_of_one_place_leave_a_whole_artifact(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda value: THING.write(tmp_path / "thing.json", thing(value)), [1.0, 2.0, 3.0, 4.0] * 4))
    assert any(same(THING.read(tmp_path / "thing.json"), thing(value)) for value in (1.0, 2.0, 3.0, 4.0))
    assert len(list(tmp_path.iterdir())) == 2


def test_what_cannot_be_written_is_said_and_the_old_one_stays(path, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ArtifactError, match="cannot be written: No space left on device"):
            THING.write(path, thing(2.0))
    assert same(THING.read(path), thing(1.0))
    assert not any(is_scratch(each) for each in path.parent.iterdir())
    (tmp_path / "file").write_text("")
    (tmp_path / f"folder2/{path.name}").mkdir(parents=True)
    for place in (tmp_path / "file" / path.name, tmp_path / "folder2" / path.name):
        with pytest.raises(ArtifactError, match="cannot be written"):
            THING.write(place, thing())


def test_the_old_tensors_go_with_their_record(tmp_path):
    for value in (1.0, 2.0, 2.0):
        THING.write(tmp_path / "thing.json", thing(value))
    assert len(list(tmp_path.iterdir())) == 2


def test_finished_units_are_found_under_the_same_settings_only(tmp_path):
    units = UnitResults(THING, tmp_path / "units", {"seed": 1})
    assert units.find("down.0") is None
    for index, unit in enumerate(["down.0", "down/0", "down 0", "../../up"]):
        units.keep(unit, thing(float(index)))
    assert [float(units.find(unit).scale[0]) for unit in ("down.0", "down/0", "down 0", "../../up")] == [0, 1, 2, 3]
    assert len(list((tmp_path / "units").iterdir())) == 4
    assert UnitResults(THING, tmp_path / "units", {"seed": 2}).find("down.0") is None
    units.path("down.0").write_bytes(units.path("down/0").read_bytes())
    assert units.find("down.0") is None
    units.path("down.0").write_bytes(b"damaged")
    assert units.find("down.0") is None


def test_without_a_folder_nothing_is_kept():
    units = UnitResults(THING, None, {})
    units.keep("a", thing())
    assert units.find("a") is None


def test_text_round_trip_and_its_damage():
    number: Format[dict[str, float]] = Format("number", 1, dict[str, float], what="a number")
    line = number.to_text({"x": 0.1, "y": 1.0})
    assert number.of_text(line, "line 1") == {"x": 0.1, "y": 1.0}
    with pytest.raises(ArtifactError, match="line 1 was altered"):
        number.of_text(line.replace(b"0.1", b"0.2"), "line 1")
    with pytest.raises(TypeError, match="has tensors"):
        THING.to_text(thing())


def test_the_deepest_json_that_is_read(monkeypatch):
    depth = strict_json.MOST_DEPTH
    assert json.dumps(parse_json(b"[" * depth + b"]" * depth))
    with pytest.raises(ValueError, match="nested"):
        parse_json(b"[" * (depth + 1) + b"]" * (depth + 1))
