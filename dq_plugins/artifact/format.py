"""One kind of file: a JSON record and named tensors under one hash.

On disk an artifact is one safetensors file, whose metadata hold the record. Where people shall read the record, the
path ends in ``.json``: then the record is that text, and the tensors, if there are any, lie beside it in a file that is
named by their hash, ``plan-0123456789abcdef.safetensors``. Either way one rename makes the new artifact take the place
of the old, and an interruption at any moment leaves one of the two, whole. Same value, same bytes; mappings come back
in the order of their keys.

The record says which format it is in, which release wrote it, and for which settings. The hash covers all of it and the
tensors: it finds what changed by accident, a half copied folder, an edit by hand. It is not a signature. Nothing that
is read can run code, and what is read is bounded.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from dq_plugins.artifact.codec import adapter, decode, encode
from dq_plugins.artifact.envelope import Envelope
from dq_plugins.artifact.files import Mapped, check_length, read_bounded, read_tensors
from dq_plugins.artifact.strict_json import parse_json
from dq_plugins.atomic import replacing, write_atomically
from dq_plugins.errors import ArtifactError, DQError
from dq_plugins.exclusive import exclusive
from dq_plugins.hashing import hash_json, hash_tensors
from dq_plugins.version import __version__

T = TypeVar("T")

METADATA_KEY = "dq_plugins"
SHOWN_DIGITS = 16  # of the tensors' hash, in the name of their file
PATIENCE_S = 600.0  # while another process writes the same artifact


@dataclass(frozen=True)
class Format(Generic[T]):
    """One kind of artifact.

    Args:
        name: of the format, as files spell it.
        version: of the format; files of another version are refused.
        schema: type of the values, see `dq_plugins.artifact.codec`.
        error: what is raised where a file is not as it should be.
        what: what a value is, for messages: "a plan".
        remedy: what to do about a damaged one: "Make the plan again."
        record_mb: the most that a record may take; a plan of 1000 layers takes one.
        accept: the command that accepts what a person has changed in the record, see `sign`; empty: there is none.
    """

    name: str
    version: int
    schema: type[T] | Any
    error: type[DQError] = ArtifactError
    what: str = "an artifact"
    remedy: str = "Delete it, and run again what wrote it."
    record_mb: int = 256
    accept: str = ""

    # In memory

    def seal(self, value: T, settings: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """A value as JSON data and named tensors, under one hash.

        Args:
            value: of the schema's type.
            settings: what it depends on.
        """
        tensors: dict[str, Tensor] = {}
        fields = {
            "format": self.name,
            "format_version": self.version,
            "library_version": __version__,
            "record": encode(value, "", tensors),
        }
        if settings is not None:
            fields["settings"] = encode(settings, "", {})
        if tensors:
            fields["tensors_hash"] = hash_tensors(tensors)
        return {**fields, "hash": hash_json(fields)}, tensors

    def open(self, data: Any, tensors: Mapping[str, Tensor], where: str) -> T:
        """The value that `seal` took apart.

        Args:
            data: the JSON data.
            tensors: by name.
            where: what it was read from, for messages.

        Raises:
            DQError: of the class `error`: anything is not as `seal` left it, or is refused by the schema.
        """
        return self._value(self.envelope(data, where), tensors, where)

    def envelope(self, data: Any, where: str, accept: str = "") -> Envelope:
        """What stands around the record, checked; the tensors are not.

        Args:
            data: the JSON data.
            where: what it was read from, for messages.
            accept: what to do where the hash alone is wrong; the remedy by default.

        Raises:
            DQError: see `open`.
        """
        found = data if isinstance(data, dict) else {}
        if found.get("format") != self.name or type(version := found.get("format_version")) is not int:
            raise self.error(f"{where} is not {self.what}: it lacks the mark of format {self.name!r}. {self.remedy}")
        if version != self.version:
            way_out = "Upgrade dq-plugins." if version > self.version else self.remedy
            raise self.error(
                f"{where} is {self.what} in format {version}; this dq-plugins reads format {self.version}. {way_out}"
            )
        if found.get("hash") != self._hashed({k: v for k, v in found.items() if k != "hash"}):
            raise self.error(f"{where} was altered or is damaged: its hash differs. {accept or self.remedy}")
        try:
            return decode(Envelope, found, {})
        except ValueError as error:
            raise self.error(f"{where} is not {self.what}: {error}. {self.remedy}") from error

    def _hashed(self, fields: dict[str, Any]) -> str:
        try:
            return hash_json(fields)
        except DQError:  # data that did not come through `parse_json`
            return ""

    def _value(self, envelope: Envelope, tensors: Mapping[str, Tensor], where: str) -> T:
        if (hash_tensors(tensors) if tensors else None) != envelope.tensors_hash:
            raise self.error(
                f"{where}: the tensors are not those that belong to the record, or were altered: their hash differs. "
                f"{self.remedy}"
            )
        return self.decode(envelope.record, tensors, where)

    def decode(self, record: Any, tensors: Mapping[str, Tensor], where: str) -> T:
        """The value of a record and its tensors, whatever their hash."""
        try:
            return decode(self.schema, record, tensors)
        except ValueError as error:
            raise self.error(f"{where} is not {self.what}: {error}. {self.remedy}") from error

    def json_schema(self) -> dict[str, Any]:
        """JSON schema of the record, for other programs."""
        return adapter(self.schema).json_schema()

    # As text

    def to_text(self, value: T, settings: Mapping[str, Any] | None = None) -> bytes:
        """A value without tensors as one line of JSON."""
        data, tensors = self.seal(value, settings)
        if tensors:
            raise TypeError(f"{self.what} has tensors, which do not go into a text")
        return json.dumps(data, sort_keys=True, allow_nan=False).encode()

    def of_text(self, text: bytes, where: str) -> T:
        """The value that `to_text` wrote.

        Raises:
            DQError: see `open`.
        """
        return self.open(self._parsed(text, where), {}, where)

    def _parsed(self, text: bytes, where: str) -> Any:
        try:
            return parse_json(text)
        except ValueError as error:
            raise self.error(f"{where} cannot be read as JSON: {error}. {self.remedy}") from error

    # On disk

    def write(self, path: str | Path, value: T, settings: Mapping[str, Any] | None = None) -> Path:
        """Write a value; folders that lack are made.

        Args:
            path: ends in ``.safetensors``, or in ``.json`` where people shall read it.
            value: of the schema's type.
            settings: what it depends on, as JSON data, see `find`.

        Returns:
            The path.

        Raises:
            DQError: of the class `error`: the disk is full, the folder is a file, or may not be written.
        """
        path = Path(path)
        data, tensors = self.seal(value, settings)
        try:
            if path.suffix == ".json":
                self._write_text(path, data, tensors)
            else:
                text = json.dumps(data, sort_keys=True, allow_nan=False)
                # One entry of metadata: safetensors writes several in any order, and same values make same bytes.
                with replacing(path) as temporary:
                    safetensors.torch.save_file(tensors, temporary, {METADATA_KEY: text})
        except (OSError, SafetensorError) as error:
            raise self.error(f"{path} cannot be written: {error}. What was there before is unchanged.") from error
        return path

    def _write_text(self, path: Path, data: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        new = _beside(path, data["tensors_hash"]) if tensors else None
        with exclusive(path.parent, name=lock_name(path.name), patience=PATIENCE_S, error=self.error):
            if new is not None:
                with replacing(new) as temporary:
                    safetensors.torch.save_file(tensors, temporary)
            write_atomically(path, (json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())
            tensors_of_any = re.compile(rf"{re.escape(path.stem)}-[0-9a-f]{{{SHOWN_DIGITS}}}\.safetensors")
            for other in list(path.parent.iterdir()):
                if other != new and tensors_of_any.fullmatch(other.name):  # of the one before, or of an interrupted one
                    other.unlink(missing_ok=True)

    def read(self, path: str | Path) -> T:
        """Read what `write` wrote; tensors are in memory.

        Raises:
            DQError: see `open`; the file is missing, or a link that leads out of its folder.
        """
        return self._value(*self._load(Path(path)), str(path))

    def find(self, path: str | Path, settings: Mapping[str, Any], *, mapped: Mapped = False) -> T | None:
        """The value at a path, if it depends on these settings and was written by this release; None otherwise.

        Args:
            path: of the artifact; there may be none.
            settings: what `write` was given.
            mapped: see `Mapped`.

        Raises:
            DQError: something is there, and it is damaged.
        """
        if not os.path.lexists(path):
            return None
        envelope, tensors = self._load(Path(path), mapped=mapped)
        fits = envelope.library_version == __version__ and envelope.settings == encode(settings, "", {})
        return self._value(envelope, tensors, str(path)) if fits else None

    def sign(self, path: str | Path) -> T:
        """Accept a record that a person has changed: check all of it, and write it under its new hash.

        It no longer follows from the settings that it was written for, so these are dropped. Tensors are not for
        editing by hand: they must be those that belong to the record.

        Args:
            path: of an artifact whose record is text.

        Returns:
            The value.

        Raises:
            DQError: see `read`, for anything but the hash of the record.
        """
        path = Path(path)
        data = self._parsed(self._text(path), str(path))
        if not isinstance(data, dict):
            self.envelope(data, str(path))  # which says what it is not
        fields = {key: value for key, value in data.items() if key not in ("hash", "settings")}
        if data.get("hash") == self._hashed({key: value for key, value in data.items() if key != "hash"}):
            return self.read(path)  # nothing was changed
        envelope = self.envelope({**fields, "hash": self._hashed(fields)}, str(path))
        value = self._value(envelope, self._tensors_beside(path, envelope, mapped=False), str(path))
        self.write(path, value)
        return value

    def differing(self, path: str | Path, settings: Mapping[str, Any]) -> list[str]:
        """Names of the settings of the artifact at a path that are others than these.

        Raises:
            DQError: see `read`.
        """
        envelope, _ = self._load(Path(path), mapped=True)
        found, given = envelope.settings or {}, encode(settings, "", {})
        names = [name for name in sorted(found.keys() | given.keys()) if found.get(name) != given.get(name)]
        return names + (["dq-plugins"] if envelope.library_version != __version__ else [])

    def settings_of(self, path: str | Path) -> dict[str, Any]:
        """What `write` was given beside the value; empty if nothing.

        Raises:
            DQError: see `read`.
        """
        return self._load(Path(path), mapped=True)[0].settings or {}

    def _load(self, path: Path, *, mapped: Mapped = False) -> tuple[Envelope, dict[str, Tensor]]:
        if path.suffix == ".json":
            return self._load_text(path, mapped)
        with self._reading(path):
            return self._load_single(path, mapped)

    def _load_text(self, path: Path, mapped: Mapped) -> tuple[Envelope, dict[str, Tensor]]:
        while True:
            envelope = self._load_envelope(path)
            digest = envelope.tensors_hash
            whole = digest is None or _beside(path, digest).exists()
            if whole or self._load_envelope(path) == envelope:  # or another process has replaced it just now
                return envelope, self._tensors_beside(path, envelope, mapped)

    def _load_envelope(self, path: Path) -> Envelope:
        remedy = f"If you changed it on purpose, accept the change with `{self.accept} {path}`; if not, "
        accept = remedy + self.remedy[0].lower() + self.remedy[1:] if self.accept else ""
        return self.envelope(self._parsed(self._text(path), str(path)), str(path), accept)

    def _text(self, path: Path) -> bytes:
        with self._reading(path):
            return read_bounded(path, self.record_mb)

    def _tensors_beside(self, path: Path, envelope: Envelope, mapped: Mapped) -> dict[str, Tensor]:
        if envelope.tensors_hash is None:
            return {}
        with self._reading(path):
            return read_tensors(_beside(path, envelope.tensors_hash), mapped=mapped)[1]

    @contextmanager
    def _reading(self, path: Path) -> Iterator[None]:
        """Give what goes wrong the class and the words of this format."""
        try:
            if not os.path.lexists(path):
                raise self.error(f"{path} is missing: {self.what} was expected there")
            yield
        except (OSError, ValueError) as error:
            if isinstance(error, self.error):
                raise
            raise self.error(f"{error}. {self.remedy}") from error

    def _load_single(self, path: Path, mapped: Mapped) -> tuple[Envelope, dict[str, Tensor]]:
        metadata, tensors = read_tensors(path, mapped=mapped)
        text = metadata.get(METADATA_KEY)
        if text is None or len(metadata) > 1:
            raise ValueError(f"{path} is not {self.what}: it carries no record of dq-plugins")
        check_length(len(text), path, self.record_mb)
        return self.envelope(self._parsed(text.encode(), str(path)), str(path)), tensors


def lock_name(name: str) -> str:
    """Name of the lock that is held while the ``.json`` artifact of this name is written."""
    return f".dq-{name}.lock"


def _beside(path: Path, digest: str) -> Path:
    return path.with_name(f"{path.stem}-{digest[:SHOWN_DIGITS]}.safetensors")
