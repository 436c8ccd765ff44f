"""A scenario of two banks and two hospitals whose small model is built from files made on the spot."""

import json
from pathlib import Path

SITES = (("北岸银行", "bank", 0), ("harbour-bank", "bank", 1), ("仁济医院", "hospital", 0), ("st-anna", "hospital", 1))
SCENARIO = """
[simulation]
seed = 3
workers = 2
baselines = ["local_only"]

[small_model]
family = "qwen2"
layers = 2
hidden = 32
intermediate = 48
heads = 4
key_value_heads = 2
vocabulary = 320
steps = 6
batch = 4
tokens = 32

[[small_model.texts]]
file = "{folder}/bank.jsonl"
columns = ["question", "given", "answer"]
part = {{ index = 2, of = 3 }}

[[small_model.texts]]
file = "{folder}/public.jsonl"
max_rows = 20

[plan]
name = "tiny-instruct"

[plan.model]
source = "${{SMALL_MODEL}}"
family = "qwen2"
max_tokens = 48

[plan.kinds.bank]
task = "instruct"
generation = {{ rows = 2, max_new_tokens = 4 }}

[plan.kinds.hospital]
task = "instruct"
generation = {{ rows = 2, max_new_tokens = 4 }}

[plan.lora]
method = "ffa"
rank = 2
alpha = 4.0
target_modules = "auto"

[plan.domain]
rounds = 1
steps_per_round = 2
sampling_probability = 0.25
learning_rate = 0.01

[plan.training]
rounds = 2
steps_per_round = 2
sampling_probability = 0.25
learning_rate = 0.01

[plan.privacy]
mechanism = "none"

[plan.cohort]
min_sites = 3
min_contributors = 2
max_sites = 4
"""
SITE = """
[[sites]]
name = "{name}"
kind = "{kind}"
train = "{folder}/{kind}.jsonl"
held_back = "{folder}/{kind}-test.jsonl"
text = "given"
instruction = "question"
input = "given"
output = "answer"
part = {{ index = {part}, of = 3 }}
"""


def write_tiny_instruct(folder: Path) -> Path:
    """Write the files and the scenario ``问答.toml``; its path."""
    for kind, word in (("bank", "余额 balance"), ("hospital", "胸痛 chest pain")):
        for name, first, rows in ((kind, 0, 36), (f"{kind}-test", 100, 6)):
            lines = (
                {
                    "question": f"What of {word} {row}?",
                    "given": f"Note {row}: {word} was {row * 7}.",
                    "answer": f"{row * 7}",
                }
                for row in range(first, first + rows)
            )
            write_lines(folder / f"{name}.jsonl", lines)
    write_lines(
        folder / "public.jsonl", ({"text": f"A sentence that anybody may read, number {row}."} for row in range(40))
    )
    sites = (SITE.format(name=name, kind=kind, part=part, folder=folder) for name, kind, part in SITES)
    path = folder / "问答.toml"
    path.write_text(SCENARIO.format(folder=folder) + "".join(sites), "utf-8")
    return path


def write_lines(path, rows):
    """JSON Lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
