"""The part of a run's report on sites that write: perplexity by site and round, and how good their answers are.

Figures only. What a site's model wrote is in that site's own report and in no other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import fmean

from simulations.charts import lines_by_round
from simulations.report_parts import Chart, Table, by_round, number_words, round_table
from simulations.summary import AnswerScores, SiteFacts, Summary
from simulations.verdicts import baseline_perplexity, final_perplexity, final_utility, perplexities, writing_sites

WORDS = {"continue": "texts", "instruct": "answers", "classify": "labels"}


def perplexity_tile(summary: Summary) -> tuple[str, str, str]:
    """Name, figure, what to read it against."""
    ways = {name: values for name, values in _ways(summary).items() if values}
    federated = ways.pop("federated", {})
    beside = [f"{_mean(values.get(site) for site in federated)} {name}" for name, values in ways.items()]
    return ("Mean perplexity", _mean(federated.values()), " · ".join(beside) or "no baseline was run")


def perplexity_table(summary: Summary) -> Table | None:
    """Perplexity after the last round: a row for each site that writes, a column for each way; None if none writes."""
    writing = writing_sites(summary)
    if not writing:
        return None
    ways = [(name, values) for name, values in _ways(summary).items() if values]
    accuracy = final_utility(summary)
    rows = tuple(
        (
            site.display_name,
            *(number_words(values.get(site.name)) for _, values in ways),
            number_words(accuracy.get(site.name)),
        )
        for site in summary.sites
        if site.name in writing
    )
    return Table(("site", *(name for name, _ in ways), "token accuracy"), rows)


def _ways(summary: Summary) -> dict[str, Mapping[str, float]]:
    """Final perplexity by site for each way of training, the base model first."""
    lines, writing = summary.baselines, writing_sites(summary)
    ways = {
        "base model": {site: perplexities([loss])[0] for site, loss in (lines.base_loss or {}).items()},
        "local only": baseline_perplexity(lines.local_only_loss),
        "federated": final_perplexity(summary),
        "centralised": baseline_perplexity(lines.centralised_loss),
    }
    return {name: {site: value for site, value in found.items() if site in writing} for name, found in ways.items()}


def perplexity_chart(summary: Summary, site: SiteFacts, number: int) -> Chart:
    """A site's perplexity by round: alone, pooled and federated; broken where another stage measures something else."""
    lines = summary.baselines
    series = {
        "local only": ("local", perplexities((lines.local_only_loss or {}).get(site.name, ()))),
        "centralised": ("centralised", perplexities((lines.centralised_loss or {}).get(site.name, ()))),
        "federated": ("federated", by_round(summary, site.name, "perplexity")),
    }
    drawn = [(label, colour, values) for label, (colour, values) in series.items() if values]
    title = f"{site.display_name}: perplexity by round"
    drawing = lines_by_round(f"perplexity{number}", title, drawn, stages=_stages(summary, site))
    return Chart(site.display_name, drawing, round_table([(label, values) for label, _, values in drawn]))


def _stages(summary: Summary, site: SiteFacts) -> list[tuple[int, str]]:
    """First value and name of each stage; a value is measured for the task of the round to come."""
    if len(summary.stages) < 2:
        return []
    return [(stage.first_round - 1, WORDS.get(stage.task or site.task, "")) for stage in summary.stages]


def says_stages(summary: Summary) -> str | None:
    """What to say of the stages below the charts; None where there is one."""
    if len(summary.stages) < 2:
        return None
    first, second = summary.stages[0], summary.stages[-1]
    return (
        f"Rounds 1 to {first.rounds} learn the next token of the sites' own texts, rounds {second.first_round} to "
        f"{second.first_round + second.rounds - 1} each kind's own task. Each value is of the task of the round to come."
    )


def answers_table(summary: Summary) -> Table | None:
    """Mean exact match, F1 and ROUGE-L of greedy answers to some held-back rows, base model and adapter; None of none."""
    if not summary.answers:
        return None
    names = {site.name: site.display_name for site in summary.sites}
    header = ("site", "answers", "exact", "with adapter", "F1", "with adapter", "ROUGE-L", "with adapter")
    return Table(header, tuple((names[each.site], *_scores(each.base, each.adapter)) for each in summary.answers))


def _scores(base: AnswerScores | None, adapter: AnswerScores | None) -> Iterable[str]:
    yield str(max(each.count for each in (base, adapter) if each is not None))
    for field in ("exact", "f1", "rouge_l"):
        for each in (base, adapter):
            yield number_words(None if each is None else getattr(each, field))


def _mean(values: Iterable[float | None]) -> str:
    found = [value for value in values if value is not None]
    return number_words(fmean(found) if found else None)
