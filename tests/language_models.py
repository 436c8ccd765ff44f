"""Tiny causal language models with random weights, in the files that real ones come in: each family's real architecture,
and a byte-level tokenizer trained on the spot, with a chat template.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

FAMILIES = ("qwen2", "qwen3", "llama", "deepseek_v2", "deepseek_v3")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_TEXTS = ("What is the balance of the account?", "胸痛三天，伴出汗。", "The answer is 42.", "余额为一千元。")


def tiny_tokenizer() -> Any:
    """A byte-level BPE of at most 300 tokens that writes every text; ``<|im_end|>`` ends an answer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXTS * 4, trainer)
    special = {"eos_token": SPECIAL[2], "pad_token": SPECIAL[0]}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_config(family: str = "qwen2", **changes: Any) -> Any:
    """Two layers of 32 dimensions; DeepSeek's first layer is dense, its second has routed and shared experts."""
    from transformers import AutoConfig

    fields: dict[str, Any] = {
        "vocab_size": 304,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": family == "qwen2",
        "initializer_range": 0.2,  # large enough for the layers to say something
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if family == "qwen3":
        fields["head_dim"] = 8
    if family.startswith("deepseek"):
        fields |= {
            "num_key_value_heads": 4,
            "q_lora_rank": 16 if family == "deepseek_v3" else None,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 1,
        }
    return AutoConfig.for_model(family, **fields | changes)


def save_tiny_causal(folder: Path, family: str = "qwen2", *, seed: int = 0, **changes: Any) -> Path:
    """Write config.json, model.safetensors and the tokenizer; ``changes`` replace fields of the config."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(tiny_config(family, **changes)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
