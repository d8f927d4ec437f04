"""What an ingest keeps in its plate's own metadata: what each well was made of, and which failed and why.

It is written together with the list of wells, so that the two always agree.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationError

from storage_schemas.base import Config
from storage_schemas.errors import SchemaError
from storage_schemas.plate import read_notes


class WellRecord(Config):
    """One well that was written."""

    fingerprint: str = Field(description="of its files and of how they were read; another one is another well")
    planes: int = Field(description="image files that it was made of")


class IngestRecord(Config):
    """What was written into a plate from image files, and what failed."""

    version: Literal[1] = Field(1, description="of this form")
    wells: dict[str, WellRecord] = Field({}, description="by canonical name")
    failed: dict[str, str] = Field({}, description="what went wrong with each well that could not be written")


def read_record(plate_url: str) -> IngestRecord:
    """The record of a plate; an empty one for a plate that others wrote.

    Raises:
        SchemaError: if there is no plate, or its record is of another form.
    """
    try:
        return IngestRecord.model_validate(read_notes(plate_url))
    except ValidationError as error:
        raise SchemaError(plate_url, f"its ingest record is not usable ({error.error_count()} problems)") from error
