"""Models of a hub, by repository and commit: found in the local cache, or fetched into it when somebody here says so.

Never a plan: what a coordinator sends must not make a site download anything.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from fedseek.errors import Unreachable, WrongModel

_NAME: Final = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_SOURCE: Final = re.compile(rf"(?P<repository>{_NAME}/{_NAME})@(?P<commit>[0-9a-f]{{40}})")
BESIDE_WEIGHTS: Final = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
"""What is read of a model's folder beside the weights: how they are used, and how text becomes tokens."""
# Weights as safetensors, and what is read beside them; nothing pickled, no code, nothing from sub-folders.
_WANTED: Final = ["*.safetensors", "*.safetensors.index.json", *BESIDE_WEIGHTS]
_NOT_WANTED: Final = ["*/*"]


def cached_model(rest: str) -> Path:
    """Folder of ``<owner>/<name>@<commit>`` in this account's cache; nothing is downloaded.

    Raises:
        WrongModel: not of that form, or not there.
    """
    repository, commit = _parsed(rest)
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repository, "config.json", revision=commit)
    if not isinstance(config, str):
        raise WrongModel(f"no model 'hub:{rest}' in the local cache", hint=f"fedseek model fetch hub:{rest}")
    return Path(config).parent


def fetch_model(rest: str) -> Path:
    """Download weights, configuration and tokenizer of ``<owner>/<name>@<commit>`` into this account's cache.

    Raises:
        WrongModel: not of that form, or the hub has no such thing for this account.
        Unreachable: the hub does not answer.
    """
    repository, commit = _parsed(rest)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        folder = snapshot_download(repository, revision=commit, allow_patterns=_WANTED, ignore_patterns=_NOT_WANTED)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:  # a gated repository is of the first kind
        raise WrongModel(f"the hub has no 'hub:{rest}' for this account: {_first_line(error)}") from None
    except (HfHubHTTPError, OSError) as error:
        raise Unreachable(
            f"hub:{rest} cannot be fetched: {_first_line(error)}",
            hint="a machine with a way out may fetch it; carry the folder over and use path:<folder>, or its cache",
        ) from None
    return Path(folder)


def _parsed(rest: str) -> tuple[str, str]:
    found = _SOURCE.fullmatch(rest)
    if found is None or ".." in rest or "--" in rest:
        raise WrongModel(
            f"no model at 'hub:{rest}'",
            hint="wanted hub:<owner>/<name>@<commit>, all 40 digits of it: a branch or tag may move",
        )
    return found["repository"], found["commit"]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
