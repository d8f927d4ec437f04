"""The base of every configuration model."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """A frozen set of choices; an unknown key is an error, never ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid")
