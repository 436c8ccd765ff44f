"""A daemon's configuration file: TOML, strict, every problem told at once."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from fedseek.errors import InvalidConfig
from fedseek.plan import describe_problems

MAX_SETTINGS_BYTES = 1 << 20


class Settings(BaseModel):
    """One table of a configuration file: unknown keys, wrong types and non-finite numbers are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


SettingsT = TypeVar("SettingsT", bound=BaseModel)


def load_settings(path: Path, model: type[SettingsT]) -> SettingsT:
    """Read and check a configuration file.

    Raises:
        InvalidConfig: it is missing, too long, no TOML, or has wrong entries: all of them at once.
    """
    try:
        data = path.read_bytes()
        if len(data) > MAX_SETTINGS_BYTES:
            raise InvalidConfig([f"got {len(data)} bytes, wanted at most {MAX_SETTINGS_BYTES}"], source=str(path))
        document = json.dumps(tomllib.loads(data.decode("utf-8")), default=str)
    except OSError as error:
        raise InvalidConfig([f"cannot be read: {error.strerror}"], source=str(path)) from error
    except UnicodeDecodeError as error:
        raise InvalidConfig([f"not UTF-8 at byte {error.start}"], source=str(path)) from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits and brackets without end, too
        raise InvalidConfig([f"not TOML: {error}"], source=str(path)) from None
    try:
        return model.model_validate_json(document)
    except ValidationError as error:
        raise InvalidConfig(describe_problems(error), source=str(path)) from None
