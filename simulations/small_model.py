"""A small language model built on the spot, for machines that have no other: real architecture, real files.

    public texts --train_tokenizer--> byte-level BPE --packed--> blocks --pretrain--> config.json, model.safetensors, ...

What comes out is a folder as any other model's, which the product loads as it loads any other. Pretraining is plain
AdamW over all weights, with texts packed one after another: they are public, no guarantee is given for them. The folder
is kept under a digest of everything it was made from, so a scenario builds its model once.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fedseek.errors import InvalidRecords
from fedseek.lora.source import model_digests
from fedseek.records import Row, read_rows
from simulations.scenario import Scenario, SmallModelSpec, TextSource, resolve_path, share_out

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

END_OF_TEXT, START_OF_TURN, END_OF_TURN = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORMAT = "fedseek/small-model/v1"
MADE_WITH = ("torch", "transformers", "tokenizers")
WARMUP_SHARE, MAX_GRADIENT_NORM, WEIGHT_DECAY = 0.05, 1.0, 0.01

Report = Callable[[int, int, float], None]  # step, steps, loss


def build_small_model(
    spec: SmallModelSpec,
    *,
    seed: int = 0,
    cache: Path | None = None,
    report: Report | None = None,
) -> Path:
    """The folder of the model that ``spec`` describes; made now unless it was made before.

    Args:
        spec: sizes, pretraining and texts.
        seed: by which the texts' files are shared out, the scenario's.
        cache: where models are kept; see ``cache_folder``.
        report: told of each step.

    Raises:
        InvalidRecords: a file of texts cannot be used, or has less than one block of tokens in it.

    Guarantees:
        The same settings, texts, libraries and kind of processor give the same weights. The folder is there whole or
        not at all.
    """
    cache = cache or cache_folder()
    folder = cache / model_key(spec, seed)
    if folder.is_dir():
        return folder
    texts = read_texts(spec.texts, seed=seed)
    cache.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".building-", dir=cache))
    try:
        tokenizer = train_tokenizer(texts, spec.vocabulary)
        model = pretrain(spec, pack(texts, tokenizer, spec.tokens), report)
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        move_into_place(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def build_with_progress(scenario: Scenario, console: Console) -> dict[str, str]:
    """Build the model of a scenario, saying how long it will take; returns what its plan is to name it by."""
    spec = scenario.spec.small_model
    if spec is None:
        raise ValueError(f"scenario {scenario.name!r} has no small model")
    shown = Progress(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn(), console=console
    )
    shown.disable = not console.is_terminal
    with shown:
        task = shown.add_task("pretrains a small model", total=spec.steps)

        def report(step: int, steps: int, loss: float) -> None:
            shown.update(task, completed=step, description=f"pretrains a small model, loss {loss:.2f}")
            if shown.disable and step % max(1, steps // 10) == 0:
                console.print(f"small model: step {step} of {steps}, loss {loss:.2f}", highlight=False)

        folder = build_small_model(spec, seed=scenario.spec.simulation.seed, report=report)
    return {"source": f"path:{folder}", **model_digests(folder)}


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/fedseek/models``, or the same under ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fedseek" / "models"


def model_key(spec: SmallModelSpec, seed: int) -> str:
    """Name of the model's folder: a digest over all that its weights follow from."""
    digests = []
    for source in spec.texts:
        path = resolve_path(source.file)
        if not path.is_file():
            raise InvalidRecords(f"{path}: no such file", hint="public data sets are found through FEDSEEK_DATA")
        digests.append(hashlib.sha256(path.read_bytes()).hexdigest())
    made_of = [FORMAT, spec.model_dump(mode="json"), seed, digests, [version(name) for name in MADE_WITH]]
    return f"{spec.family}-{hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:24]}"


def read_texts(sources: Sequence[TextSource], *, seed: int) -> list[str]:
    """All texts, source after source."""
    return [text for source in sources for text in _texts_of(source, seed)]


def _texts_of(source: TextSource, seed: int) -> list[str]:
    path = resolve_path(source.file)
    rows: Sequence[Row] = read_rows(path)
    if missing := [column for column in source.columns if column not in rows[0]]:
        raise InvalidRecords(f"{path}: no column {', '.join(map(repr, missing))}; got {', '.join(map(repr, rows[0]))}")
    if source.part is not None:
        rows = share_out(rows, None, source.part, seed=seed)
    texts = ("\n".join(filter(None, (str(row.get(name) or "").strip() for name in source.columns))) for row in rows)
    return [text for text in texts if text][: source.max_rows]


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that can write any text, with ChatML turns; an answer ends with its end of turn."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, "system", "user", "assistant"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TURN, pad_token=END_OF_TEXT)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def pack(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, tokens: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Texts one after another, each with its end, cut into blocks: int64, shape (num_blocks, tokens).

    Raises:
        InvalidRecords: not one whole block.
    """
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    stream = np.array([token for ids in tokenizer(list(texts))["input_ids"] for token in (*ids, end)], np.int64)
    blocks = len(stream) // tokens
    if blocks == 0:
        raise InvalidRecords(f"the texts to pretrain on have {len(stream)} tokens, wanted at least {tokens}")
    return stream[: blocks * tokens].reshape(blocks, tokens)


def pretrain(
    spec: SmallModelSpec, blocks: np.ndarray[Any, np.dtype[np.int64]], report: Report | None = None
) -> PreTrainedModel:
    """A model of ``spec``'s sizes after ``spec.steps`` steps over the blocks, each epoch in another order."""
    import torch

    before = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        torch.set_num_threads(spec.threads)
        try:
            return _pretrain(spec, blocks, report)
        finally:
            torch.set_num_threads(before)


def _pretrain(
    spec: SmallModelSpec, blocks: np.ndarray[Any, np.dtype[np.int64]], report: Report | None
) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel = AutoModelForCausalLM.from_config(model_config(spec), dtype=torch.float32)
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=spec.learning_rate, weight_decay=WEIGHT_DECAY)
    rate = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate_at(step, spec.steps))
    order = np.random.default_rng(spec.seed)
    waiting: list[int] = []
    for step in range(spec.steps):
        while len(waiting) < spec.batch:
            waiting += order.permutation(len(blocks)).tolist()
        chosen, waiting = waiting[: spec.batch], waiting[spec.batch :]
        ids = torch.from_numpy(blocks[chosen])
        logits = model(input_ids=ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        rate.step()
        if report is not None:
            report(step + 1, spec.steps, float(loss.detach()))
    return model.eval()


def _rate_at(step: int, steps: int) -> float:
    """Share of the learning rate: a short rise in a line, then half a cosine down to a tenth."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    if step < warmup:
        return (step + 1) / warmup
    return float(0.1 + 0.45 * (1 + np.cos(np.pi * (step - warmup) / max(1, steps - warmup))))


def model_config(spec: SmallModelSpec) -> Any:
    """The family's config at the sizes asked for; what the family adds of its own is scaled along."""
    from transformers import AutoConfig

    fields: dict[str, Any] = {
        "vocab_size": spec.vocabulary,
        "hidden_size": spec.hidden,
        "intermediate_size": spec.intermediate,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.key_value_heads,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": spec.family != "deepseek_v3",
        "bos_token_id": None,
        "eos_token_id": SPECIAL_TOKENS.index(END_OF_TURN),
        "pad_token_id": SPECIAL_TOKENS.index(END_OF_TEXT),
    }
    if spec.family == "deepseek_v3":
        fields |= _deepseek_fields(spec)
    return AutoConfig.for_model(spec.family, **fields)


def _deepseek_fields(spec: SmallModelSpec) -> dict[str, Any]:
    """Latent attention, a dense first layer, and one shared and four routed experts in the others."""
    width = spec.hidden // spec.heads
    return {
        "num_key_value_heads": spec.heads,
        "q_lora_rank": spec.hidden // 2,
        "kv_lora_rank": spec.hidden // 4,
        "qk_nope_head_dim": width,
        "qk_rope_head_dim": 2 * max(1, width // 4),
        "v_head_dim": width,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": max(16, spec.intermediate // 4),
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
    }


def move_into_place(scratch: Path, folder: Path) -> None:
    """Give a finished folder its name; where another process was faster, its folder stays."""
    scratch.chmod(0o755)
    try:
        scratch.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
