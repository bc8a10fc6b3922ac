"""What a file of results says about all of them: the format's version, the request, the model, what failed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from google.protobuf import json_format

from layertap._results import Model, ModelLimits
from layertap.v1 import encoder_pb2 as pb

# The version of the format, which a reader compares with its own.
FORMAT = 1


class NotReadableError(ValueError):
    """A file that is whole, but that `layertap.load` does not read; the message is for the caller."""


@dataclasses.dataclass(frozen=True, slots=True)
class Note:
    """`request` is an EncodeRequest without inputs; None where it is not known. `failures` are the messages of
    the inputs that failed, by number."""

    request: Any = None
    model: Model | None = None
    failures: Mapping[int, str] = dataclasses.field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The note as JSON; what is not known is left out."""
        found: dict[str, Any] = {"format": FORMAT}
        if self.request is not None:
            found["request"] = json_format.MessageToDict(self.request, preserving_proto_field_name=True)
        if self.model is not None:
            found["model"] = dataclasses.asdict(self.model)
        if self.failures:
            found["failures"] = {str(index): message for index, message in self.failures.items()}
        return found


def parse_note(text: str | bytes) -> Note:
    """The note of this JSON.

    Raises:
        NotReadableError: a newer version of the format.
        Exception: of any kind, if this is no note.
    """
    return note_of(json.loads(text))


def note_of(found: Any) -> Note:
    """As `parse_note`, of what was parsed."""
    version = found["format"]
    if type(version) is not int or version < 1:
        raise ValueError(f"it has the format {version!r}")
    if version > FORMAT:
        raise NotReadableError(
            f"it has format {version} of a newer layertap, and this one reads format {FORMAT}: "
            "upgrade with `pip install --upgrade layertap`"
        )
    request = model = None
    if "request" in found:
        request = json_format.ParseDict(found["request"], pb.EncodeRequest())
    if "model" in found:
        model = _model(found["model"])
    failures = {int(index): str(message) for index, message in found.get("failures", {}).items()}
    return Note(request, model, failures)


def _model(found: Any) -> Model:
    return Model(**{**_fields(Model, found), "limits": ModelLimits(**_fields(ModelLimits, found["limits"]))})


def _fields(kind: type, found: Any) -> dict[str, Any]:
    """The values of the dataclass's fields, each of its type."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        if field.name not in found and field.default is not dataclasses.MISSING:
            continue
        value = found[field.name]
        match field.type:
            case "tuple[str, ...]":
                is_right = isinstance(value, list) and all(isinstance(one, str) for one in value)
                value = tuple(value) if is_right else None
            case "dict[str, str]":
                is_right = isinstance(value, dict) and all(isinstance(one, str) for one in value.values())
            case "ModelLimits":
                is_right = isinstance(value, dict)
            case name:
                is_right = type(value).__name__ == name
        if not is_right:
            raise ValueError(f"the model's {field.name} is {value!r}")
        values[field.name] = value
    return values
