"""A plan's document and how tests change it: shared by the tests of ``fedseek.plan``."""

import copy

from fedseek.plan import Plan, check_plan, parse_spec

DOCUMENT = {
    "name": "demo",
    "seed": 7,
    "model": {"source": "package:some-model", "sha256": "ab" * 32, "max_tokens": 32},
    "kinds": {
        "bank": {"labels": ["欺诈", "正常"], "metric": "auc", "unit": "customer"},
        "hospital": {"labels": ["急诊", "普通", "自理"], "unit": "patient"},
    },
    "lora": {"method": "ffa", "rank": 4, "alpha": 8.0, "target_modules": ["query", "value"], "layers": [1]},
    "training": {
        "rounds": 2,
        "steps_per_round": 4,
        "sampling_probability": 0.25,
        "learning_rate": 0.002,
        "head_learning_rate": 0.01,
    },
    "privacy": {"mechanism": "dp-sgd", "epsilon": 8.0, "delta": 1e-5, "l2_clip_norm": 1.0},
    "encryption": {"value_bits": 13},
    "cohort": {"min_sites": 3, "max_sites": 8},
}


class _Removed:
    def __repr__(self) -> str:  # the same in every test process, since it is part of a test's name
        return "removed"


REMOVED = _Removed()


def changed(**changes: object) -> dict:
    """The document with ``training__rounds=3`` changed, or ``privacy__delta=REMOVED`` taken out."""
    document = copy.deepcopy(DOCUMENT)
    for path, value in changes.items():
        *tables, key = path.split("__")
        table = document
        for name in tables:
            table = table[name]
        if value is REMOVED:
            del table[key]
        else:
            table[key] = value
    return document


def checked(**changes: object) -> Plan:
    return check_plan(parse_spec(changed(**changes)))


PLAN_TOML = """
name = "demo"
[model]
source = "package:some-model"
sha256 = "{sha}"
[kinds.bank]
labels = ["欺诈", "正常"]
[lora]
target_modules = ["query"]
[training]
rounds = 2
steps_per_round = 4
sampling_probability = 0.25
learning_rate = 2e-3
head_learning_rate = 0.01
[privacy]
mechanism = "none"
[cohort]
max_sites = 8
"""
