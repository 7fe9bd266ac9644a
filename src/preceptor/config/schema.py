"""The JSON schema of the run file, from the fields of its sections: for editors and other programs."""

from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from preceptor.config.durations import Duration
from preceptor.config.run import Run


class _WithDurations(GenerateJsonSchema):
    """Defaults as they would stand in the file."""

    def encode_default(self, dft: Any) -> Any:
        return str(dft) if isinstance(dft, Duration) else super().encode_default(dft)


def json_schema() -> dict[str, Any]:
    """Keys, types, limits, defaults and the line of documentation of each key.

    What depends on several keys, and whether files exist, it does not say: `load` does.
    """
    found = Run.model_json_schema(schema_generator=_WithDurations)
    return {"$schema": GenerateJsonSchema.schema_dialect, **found, "title": "Preceptor run file"}
