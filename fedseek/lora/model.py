r"""The model a site trains: a frozen base, an adapter in it, and what reads it.

    input_ids (B, T) -> encoder with adapter -> (B, T, H) -> mean over real tokens (B, H) -> head -> logits (B, L)
                                                         \-> head of words, frozen, at the n counted tokens -> (n, V)

LoRA (Hu et al. 2022, arXiv:2106.09685): a linear layer W0 becomes x -> W0 x + (alpha / r) B A x, with B zero at the
start. With ``method = "ffa"`` (Sun et al. 2024, arXiv:2403.12313) A stays at a value every site derives from the plan
and only B is trained, so the average of the sites' B is exactly the average of their products.

Dropout is off: under DP-SGD the noise regularises, and a forward pass that does not depend on a hidden generator lets
two sites, or an encrypted and a plaintext run, be compared number by number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from fedseek.lora.adapting import LoraParams, hidden_states, put_adapter, writing_with
from fedseek.lora.initial import first_values
from fedseek.lora.methods import parts_of_round, parts_trained

__all__ = ["AdapterModel", "LoraParams", "build_model", "set_trainable"]

Tensors = dict[str, npt.NDArray[np.float32]]
Shapes = tuple[tuple[str, tuple[int, ...]], ...]

_ADAPTER, _HEAD, _LM_HEAD = "encoder.", "head.", "lm_head."


class AdapterModel(nn.Module):
    """Encoder with adapter, and what reads it: a head of labels that is trained, a head of words that is not, or both.

    Attributes:
        encoder: the inner model with the adapter; its tensors are named alike whatever the task.
        head: of labels, or None.
        lm_head: of words, or None.
        trained: names of the tensors that are trained in some round.
    """

    def __init__(
        self,
        encoder: PeftModel | PreTrainedModel,
        head: nn.Linear | None,
        causal: PreTrainedModel | PeftModel | None = None,
        *,
        method: str = "ffa",
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.lm_head = None if causal is None else causal.get_output_embeddings()
        # The whole causal model around the same encoder, for `generate`; in a tuple, so that its tensors count once.
        self._causal = (causal,)
        self._caches = hasattr(encoder.config, "use_cache")
        self.trained = frozenset(name for name, _ in self.named_parameters() if _belongs(name, parts_trained(method)))

    @property
    def causal(self) -> PreTrainedModel | PeftModel | None:
        """The base model as one that writes, with the adapter in it; None for an encoder alone."""
        return self._causal[0]

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, counted: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Map token ids (B, T) and mask (B, T) to logits (B, num_labels), float32.

        With ``counted`` (B, T), to logits (n, vocabulary) for the n tokens that are true in it, record after record: each
        is predicted from the tokens before it.
        """
        options = {"use_cache": False} if self._caches else {}
        hidden = hidden_states(self.encoder, input_ids, attention_mask, **options)  # (B, T, H)
        if counted is not None:
            return self._word_logits(hidden, counted)
        if self.head is None:
            raise ValueError("the model has no head of labels")
        mask = attention_mask.unsqueeze(-1).float()
        logits: torch.Tensor = self.head((hidden.float() * mask).sum(1) / mask.sum(1))
        return logits

    def _word_logits(self, hidden: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
        if self.lm_head is None:
            raise ValueError("the model has no head of words")
        # the logits of a token stand at the token before it; only what counts goes through the vocabulary
        logits: torch.Tensor = self.lm_head(hidden[:, :-1][counted[:, 1:]])
        return logits


def build_model(base: PreTrainedModel, params: LoraParams, *, num_labels: int | None, head_seed: int) -> AdapterModel:
    """Put the adapter on ``base``, and a head of ``num_labels`` labels where there are labels to learn.

    ``base`` is an encoder or decoder alone, or a causal language model, whose head of words is then used as it is. It is
    on its device already: what is added goes to the same one, in float32 whatever the base has. What is trained in the
    first round of the kind's own task requires a gradient.

    Raises:
        WrongModel: the adapter cannot be put on this base as asked; says why, and what there is.
    """
    causal = base if base.get_output_embeddings() is not None else None
    encoder = put_adapter(base if causal is None else causal.base_model, params)
    writer = None if causal is None else writing_with(encoder, causal, params)
    head = None
    if num_labels is not None:
        head = nn.Linear(base.config.hidden_size, num_labels, device=base.device, dtype=torch.float32)
        with torch.no_grad():
            head.weight.copy_(torch.from_numpy(first_values(head.weight.shape, seed=head_seed, name="head.weight")))
            head.bias.zero_()
    model = AdapterModel(encoder, head, writer, method=params.method)
    set_trainable(model, method=params.method, task="continue" if head is None else "classify", number=1)
    return model


def set_trainable(model: AdapterModel, *, method: str, task: str, number: int) -> None:
    """Choose what is trained in a round: of the adapter what the method trains, and the head where labels are learned.

    Args:
        model: its other tensors are frozen.
        method: ``plan.spec.lora.method``.
        task: ``plan.task_in(kind, number)``.
        number: of the round, from 1.
    """
    parts = parts_of_round(method, number)
    for name, parameter in model.named_parameters():
        here = name in model.trained and _belongs(name, parts) and (task == "classify" or not name.startswith(_HEAD))
        if parameter.requires_grad != here:  # a quantised weight may not even be told again that it is frozen
            parameter.requires_grad_(here)


def _belongs(name: str, parts: tuple[str, ...]) -> bool:
    """Whether a tensor is of the head of labels, or of a part of the adapter."""
    return name.startswith(_HEAD) or any(part in name for part in parts)


def adapter_tensors(model: AdapterModel) -> Tensors:
    """Tensors of the adapter that are trained in some round (scope ``global``), float32, sorted by name."""
    return _tensors(model, _ADAPTER)


def head_tensors(model: AdapterModel) -> Tensors:
    """Tensors of the head (scope of the site's kind), float32, sorted by name; none for a language kind."""
    return _tensors(model, _HEAD)


def adapter_shapes(model: AdapterModel) -> Shapes:
    """Name and shape of each of ``adapter_tensors``; also of a model that was built without weights."""
    return tuple((name, tuple(parameter.shape)) for name, parameter in _trained(model, _ADAPTER))


def adapted_layers(model: AdapterModel) -> tuple[str, ...]:
    """Names of the linear layers with an adapter, each once, sorted; none where nothing is put beside them."""
    return tuple(
        sorted({name.split(".lora_")[0].rpartition(".")[2] for name, _ in adapter_shapes(model) if ".lora_" in name})
    )


def head_shapes(model: AdapterModel) -> Shapes:
    """Name and shape of each of ``head_tensors``; also of a model that was built without weights."""
    return tuple((name, tuple(parameter.shape)) for name, parameter in _trained(model, _HEAD))


def _tensors(model: AdapterModel, scope: str) -> Tensors:
    return {
        name: parameter.detach().float().cpu().numpy().astype(np.float32, copy=True)
        for name, parameter in _trained(model, scope)
    }


def _trained(model: AdapterModel, scope: str) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in sorted(model.named_parameters()):
        if name in model.trained and name.startswith(scope):
            yield name, parameter


def load_tensors(model: AdapterModel, tensors: Mapping[str, npt.NDArray[np.float32]]) -> None:
    """Copy ``tensors`` into the model's parameters of the same names, in place."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in tensors.items():
            parameters[name].copy_(torch.from_numpy(np.ascontiguousarray(value)))
