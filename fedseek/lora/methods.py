"""What each method trains, in which round, and which methods a plan may not ask for, with the reason. Brings no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

LORA: Final = frozenset({"ffa", "both", "alternating"})
PROMPTS: Final = frozenset({"prefix", "prompt"})
"""Methods that train vectors in front of the text instead of matrices beside the linear layers."""

_A, _B, _VECTORS, _ALL = ".lora_A.", ".lora_B.", ".prompt_encoder.", "."
_TRAINED: Final[Mapping[str, tuple[str, ...]]] = {
    "ffa": (_B,),
    "both": (_A, _B),
    "alternating": (_A, _B),
    "prefix": (_VECTORS,),
    "prompt": (_VECTORS,),
    "full": (_ALL,),
}

_DORA_PRIVATE: Final = (
    "DoRA divides by the norm of the whole adapted weight, outside of any layer whose per-record gradient is known, so no "
    "record can be clipped"
)
_DORA_START: Final = (
    "DoRA's magnitudes start at norms of the base weights that each site's hardware rounds in its own way, and all sites "
    "must sign the same adapter"
)
_FULL: Final = (
    "full fine-tuning moves the base model itself, which no adapter file can hold: nothing could be released for others "
    "to load on their copy of the base"
)


def parts_trained(method: str) -> tuple[str, ...]:
    """Parts of the names of the tensors that ``method`` trains in any round; the layout of an update has all of them."""
    return _TRAINED[method]


def parts_of_round(method: str, number: int) -> tuple[str, ...]:
    """Parts of the names of the tensors that ``method`` trains in round ``number``, from 1.

    ``alternating``: B in odd rounds, A in even ones, so that what is averaged always meets a factor that all sites share,
    and the average is exact (RoLoRA, arXiv:2502.01755, section 3). B goes first: at B = 0, A has no gradient.

    >>> [parts_of_round("alternating", number) for number in (1, 2)]
    [('.lora_B.',), ('.lora_A.',)]
    """
    if method == "alternating":
        return (_B,) if number % 2 else (_A,)
    return _TRAINED[method]


def method_problems(method: str, *, private: bool) -> Iterator[str]:
    """What speaks against a plan with this method, where per-record gradients (with DP-SGD), exact agreement of the sites
    or the release do not allow it; nothing for the others.

    Args:
        method: ``lora.method`` of a plan.
        private: whether the plan's mechanism is DP-SGD.
    """
    if method == "dora":
        yield _DORA_PRIVATE if private else _DORA_START
    elif method == "full":
        yield _FULL
    elif method not in _TRAINED:
        yield f"unknown method {method!r}"
