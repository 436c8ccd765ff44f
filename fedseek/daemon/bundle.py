"""The Flower app bundle of every FedSeek run: a description and no code.

Flower wants a bundle with each run and sends it to every SuperNode. Ours names no code that exists: both sides run
what is installed. Its bytes are the same for every run, so a site allows this one digest and refuses any other
(docs/threat-model.md: a bundle that carries code must never run at a site).
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from typing import Final

# Flower reads these when it is imported, so they are set before its processes start: it reports nothing to its makers,
# looks for no newer release, and installs nothing at run time
FLOWER_ENVIRONMENT: Final = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_LOG_LEVEL": "WARNING",
}
_DESCRIPTION: Final = """\
[project]
name = "fedseek"
version = "1"
description = "Carries no code: coordinator and sites run what they have installed."
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedseek"

[tool.flwr.app.components]
serverapp = "fedseek_carries_no_code:none"
clientapp = "fedseek_carries_no_code:none"
"""


def code_free_bundle() -> bytes:
    """The bundle, the same bytes at every call and on every machine.

    >>> code_free_bundle() == code_free_bundle()
    True
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(zipfile.ZipInfo("pyproject.toml", date_time=(1980, 1, 1, 0, 0, 0)), _DESCRIPTION)
    return buffer.getvalue()


def bundle_digest(bundle: bytes) -> str:
    """Flower's name for a bundle: the SHA-256 of its bytes, in hexadecimal."""
    return hashlib.sha256(bundle).hexdigest()
