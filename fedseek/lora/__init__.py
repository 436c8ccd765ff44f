"""LoRA: the base model and the adapter that is trained on it (Hu et al. 2022; FFA: Sun et al. 2024)."""
