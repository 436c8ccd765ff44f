"""Parts of a plan that do not fit each other: each refused by name, with what is wanted."""

import pytest
from plan_documents import checked

from fedseek.errors import InvalidPlan

LANGUAGE = {"task": "instruct", "unit": "patient"}
DOMAIN = {"rounds": 2, "steps_per_round": 3, "sampling_probability": 0.5, "learning_rate": 1e-4}
NOT_PRIVATE = {"privacy": {"mechanism": "none"}}
SITE = {"epsilon": 8.0, "delta": 1e-5, "l2_clip_norm": 0.1}
COHORT = {"min_sites": 8, "max_sites": 8, "min_contributors": 4}


def problems(**changes: object) -> tuple[str, ...]:
    with pytest.raises(InvalidPlan) as caught:
        checked(**changes)
    return caught.value.problems


REFUSED = {
    "a domain stage of an encoder": (
        {"domain": DOMAIN, "model__family": "bert"},
        "domain: ",
        ["predicts no next token"],
    ),
    "instructions for an encoder": (
        {"kinds__hospital": LANGUAGE, "model__family": "bert"},
        "kinds.hospital: ",
        ["instruct", "wanted a causal model"],
    ),
    "labels of a task that has none": (
        {"kinds__bank": {"task": "continue", "labels": ["a", "b"]}},
        "kinds.bank.labels: ",
        ["continue has none"],
    ),
    "an auc of words": ({"kinds__bank": {"task": "instruct", "metric": "auc"}}, "kinds.bank: ", ["next token"]),
    "a classifier without labels": ({"kinds__bank__labels": []}, "kinds.bank.labels: ", ["at least 2 labels, got 0"]),
    "auto modules of a family that is not known": (
        {"lora__target_modules": "auto", "model__family": "mamba"},
        "lora.target_modules: ",
        ["qwen2", "'mamba'"],
    ),
    "auto modules of no family": ({"lora__target_modules": "auto"}, "lora.target_modules: ", ["model.family", "None"]),
    "dora": ({"lora__method": "dora"}, "lora.method: ", ["dora"]),
    "a second clip under dp-sgd": (
        {"training__max_gradient_norm": 1.0},
        "training.max_gradient_norm: ",
        ["clips the gradient of each unit"],
    ),
    "a warm-up longer than its stage": (
        {"training__warmup_steps": 9},
        "training.warmup_steps: ",
        ["9, wanted at most the stage's 8 steps"],
    ),
    "a warm-up longer than the first stage": (
        {"domain": {**DOMAIN, "warmup_steps": 7}},
        "domain.warmup_steps: ",
        ["7, wanted at most the stage's 6 steps"],
    ),
    "votes beside a guarantee for sites": (
        {"training__early_stopping": {"patience": 2}, "privacy__site": SITE, "cohort": COHORT},
        "training.early_stopping: ",
        ["without noise"],
    ),
    "too many steps in both stages": (
        {"domain": {**DOMAIN, "steps_per_round": 49_997}},
        "domain, training: ",
        ["rounds x steps_per_round is 100002, wanted at most 100000"],
    ),
    "too many rounds in both stages": (
        {"domain": {**DOMAIN, "rounds": 9_999, "steps_per_round": 1}},
        "domain, training: ",
        ["10001 rounds in all, wanted at most 10000"],
    ),
    "a first stage that asks for no noise": (
        {
            "domain": {**DOMAIN, "rounds": 1, "steps_per_round": 1, "sampling_probability": 0.001},
            "privacy__delta": 0.002,
        },
        "privacy.delta: ",
        ["0.002 is not below the chance 0.001", "in the steps of domain"],
    ),
    "a second stage that asks for no noise": (
        {
            "domain": DOMAIN,
            "training__rounds": 1,
            "training__steps_per_round": 1,
            "training__sampling_probability": 0.001,
            "privacy__delta": 0.002,
        },
        "privacy.delta: ",
        ["in the steps of training"],
    ),
}


@pytest.mark.parametrize(("changes", "where", "words"), REFUSED.values(), ids=list(REFUSED))
def test_parts_that_do_not_fit_are_refused_by_name_with_what_is_wanted(changes, where, words):
    (problem,) = problems(**changes)
    assert problem.startswith(where)
    for word in words:
        assert word in problem


@pytest.mark.parametrize(
    "changes",
    [
        {"domain": DOMAIN, "model__family": "qwen2", "lora__target_modules": "auto"},
        {"kinds__hospital": LANGUAGE},
        {"training__warmup_steps": 8, "training__max_gradient_norm": 1.0},
        {"training__early_stopping": {"patience": 2}},
        {"model__family": "bert"},
    ],
    ids=["domain", "instruct", "clip-and-warm-up", "early-stopping", "labels-alone"],
)
def test_parts_that_fit_are_a_plan(changes):
    checked(**changes, **NOT_PRIVATE)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5])
def test_a_stage_without_a_share_of_epsilon_is_refused(share):
    (problem,) = problems(domain={**DOMAIN, "budget_share": share})
    assert problem.startswith("domain.budget_share: ")
