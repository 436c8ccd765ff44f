"""Answering: what a site's model writes to prompts of its own rows held back, before the first round and after the last.

The scores ride beside the kind's update and are seen as sums. The texts are made of the site's records: a few of them go
into the site's own report (``SiteRun.observe``), and nowhere else: not into a message, the audit record or the log.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from fedseek.encode import SummedUpdate
from fedseek.generate import Answers, base_model, choose_prompts, generate_answers
from fedseek.lora.source import locate_model
from fedseek.prepare import ANSWER_METRICS
from fedseek.tokenise import Prompt
from fedseek_site.run import SiteRun

SHOWN: Final = 3  # answers of base model and adapter side by side, in the site's own report


def answer_prompts(run: SiteRun, *, number: int) -> Answers | None:
    """Let the weights after round ``number``, which are in the model, answer; None in rounds in which nothing is answered.

    Answered is at round 0, by the base model, and after the last round. A site that enters later has no answers of the
    base model in the sums; neither has a kind whose first round was given up.
    """
    spec = run.plan.spec.kinds[run.identity.kind]
    prompts = choose_prompts(run.prompts, spec.generation.rows) if spec.task == "instruct" else ()
    if not prompts or number not in (0, run.plan.rounds):
        return None
    answers = _answers(run, prompts)
    sums = {"exact": answers.exact, "f1": answers.f1, "rouge_l": answers.rouge_l}
    run.observe({"event": "answers", "round": number, **_means(sums, answers.count)})
    if number:
        _report_samples(run, prompts[:SHOWN], answers.texts)
    return answers


def report_answers_of_kind(run: SiteRun, summed: Mapping[str, SummedUpdate], *, number: int) -> None:
    """Tell the site's report how good the answers of all sites of its kind were, where a sum holds any.

    Args:
        run: of this site.
        summed: the sums of one round.
        number: the round after which the weights were as they answered.
    """
    update = summed.get(run.head)
    count = update.metrics.get(ANSWER_METRICS[-1], 0.0) if update is not None else 0.0
    if update is not None and count > 0:
        sums = {name.removeprefix("answers_"): update.metrics[name] for name in ANSWER_METRICS[:-1]}
        run.observe({"event": "answers_of_kind", "round": number, **_means(sums, round(count))})


def _answers(run: SiteRun, prompts: tuple[Prompt, ...]) -> Answers:
    spec, folder = run.plan.spec, locate_model(run.plan.spec.model.source)
    most = spec.kinds[run.identity.kind].generation.max_new_tokens
    return generate_answers(run.model, prompts, folder, max_new_tokens=most)


def _means(sums: Mapping[str, float], count: int) -> dict[str, float]:
    """Over ``count`` answers, which is told beside them."""
    return {**{name: each / count for name, each in sums.items()}, "count": count}


def _report_samples(run: SiteRun, prompts: tuple[Prompt, ...], texts: tuple[str, ...]) -> None:
    with base_model(run.model):
        base = _answers(run, prompts).texts
    for prompt, before, after in zip(prompts, base, texts, strict=False):
        told = {"prompt": prompt.text, "reference": prompt.reference, "base": before, "adapter": after}
        run.observe({"event": "sample", **told})
