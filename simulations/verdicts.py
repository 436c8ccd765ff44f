"""What a run was wanted to reach, and whether it did: claims, each with the figure it rests on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from simulations.summary import Summary, Verdict

# What a run must reach to be called a success; each is named in a verdict beside the figure it is held against.
WANTED_CENTRALISED_RATIO = 0.9
WANTED_SATURATED_FRACTION = 0.01


def with_verdicts(summary: Summary) -> Summary:
    """Return the summary with its verdicts computed from its figures."""
    return summary.model_copy(update={"verdicts": verdicts(summary)})


def verdicts(summary: Summary) -> tuple[Verdict, ...]:
    """Hold the run's figures against what was wanted; a claim whose figures are missing is left out.

    Utility is compared after the last round, site by site, on the same held-back records; higher is better. Sites that
    write are compared by their perplexity, where lower is better.
    """
    found = (
        _beats_local(summary),
        _below_local(summary),
        _near_centralised(summary),
        _within_budget(summary),
        _smaller_than_plain(summary),
        _rarely_saturated(summary),
    )
    return tuple(verdict for verdict in found if verdict is not None)


def final_utility(summary: Summary) -> dict[str, float]:
    """Return the federated utility after the last round, for each site that measured one."""
    return {entry.site: entry.utility for entry in summary.final.sites if entry.utility is not None}


def writing_sites(summary: Summary) -> frozenset[str]:
    """Return the sites whose task is of words: they are compared by perplexity, where lower is better."""
    return frozenset(site.name for site in summary.sites if site.task != "classify")


def final_perplexity(summary: Summary) -> dict[str, float]:
    """Return the federated perplexity after the last round, for each site that writes and measured one."""
    return {entry.site: entry.perplexity for entry in summary.final.sites if entry.perplexity is not None}


def comparable(summary: Summary) -> tuple[dict[str, float], dict[str, float]]:
    """Return what federated and local-only come to at each site, as figures of which the higher is the better one."""
    lines, writing = summary.baselines, writing_sites(summary)
    federated = _utility_of_labels(summary)
    local = {site: value for site, value in final_baseline(lines.local_only).items() if site not in writing}
    federated |= {site: -value for site, value in final_perplexity(summary).items()}
    local |= {site: -value for site, value in baseline_perplexity(lines.local_only_loss).items() if site in writing}
    return federated, local


def perplexities(losses: Iterable[float]) -> tuple[float, ...]:
    """Return the exponential of each mean loss of a token, bounded as a site bounds it."""
    return tuple(math.exp(min(loss, 700.0)) for loss in losses)


def baseline_perplexity(losses: Mapping[str, tuple[float, ...]] | None) -> dict[str, float]:
    """Return the last perplexity of each site's baseline; empty if the baseline was not run."""
    return {site: perplexities(values)[-1] for site, values in (losses or {}).items() if values}


def final_baseline(lines: Mapping[str, tuple[float, ...]] | None) -> dict[str, float]:
    """Return the last value of each site's baseline; empty if the baseline was not run."""
    return {site: values[-1] for site, values in (lines or {}).items() if values}


def highest_epsilon(summary: Summary) -> float | None:
    """Return the largest epsilon any site has spent by the end, or None if no site trained privately."""
    spent = [entry.epsilon for entry in summary.final.sites if entry.epsilon is not None]
    return max(spent, default=None)


def _utility_of_labels(summary: Summary) -> dict[str, float]:
    """Final utility of the sites that classify."""
    writing = writing_sites(summary)
    return {site: value for site, value in final_utility(summary).items() if site not in writing}


def _beats_local(summary: Summary) -> Verdict | None:
    local = final_baseline(summary.baselines.local_only)
    gains = [value - local[site] for site, value in _utility_of_labels(summary).items() if site in local]
    if not gains:
        return None
    claim = "Federated above local-only at every site: smallest gain"
    return Verdict(claim=claim, figure=min(gains), wanted="more than 0", met=min(gains) > 0)


def _below_local(summary: Summary) -> Verdict | None:
    local = baseline_perplexity(summary.baselines.local_only_loss)
    ratios = [value / local[site] for site, value in final_perplexity(summary).items() if site in local]
    if not ratios:
        return None
    claim = "Federated perplexity below local-only at every site: largest ratio"
    return Verdict(claim=claim, figure=max(ratios), wanted="below 1", met=max(ratios) < 1)


def _near_centralised(summary: Summary) -> Verdict | None:
    pooled = final_baseline(summary.baselines.centralised)
    pairs = [(value, pooled[site]) for site, value in _utility_of_labels(summary).items() if pooled.get(site)]
    if not pairs:
        return None
    ratio = sum(federated for federated, _ in pairs) / sum(centralised for _, centralised in pairs)
    claim = "Federated utility as a share of centralised, mean over sites"
    wanted = f"at least {WANTED_CENTRALISED_RATIO:g}"
    return Verdict(claim=claim, figure=ratio, wanted=wanted, met=ratio >= WANTED_CENTRALISED_RATIO)


def _within_budget(summary: Summary) -> Verdict | None:
    spent = highest_epsilon(summary)
    if summary.privacy is None or spent is None:
        return None
    target = summary.privacy.epsilon_target
    return Verdict(claim="Highest epsilon at any site", figure=spent, wanted=f"at most {target:g}", met=spent <= target)


def _smaller_than_plain(summary: Summary) -> Verdict | None:
    if not summary.totals.plain_float32_bytes:
        return None
    ratio = summary.totals.bytes_up / summary.totals.plain_float32_bytes
    return Verdict(claim="Encrypted bytes up / plain float32", figure=ratio, wanted="at most 1", met=ratio <= 1)


def _rarely_saturated(summary: Summary) -> Verdict | None:
    found = [s.saturated_fraction for r in summary.rounds for s in r.sites if s.saturated_fraction is not None]
    if not found:
        return None
    wanted = f"at most {WANTED_SATURATED_FRACTION:g}"
    claim = "Largest share of values cut off by the quantiser"
    return Verdict(claim=claim, figure=max(found), wanted=wanted, met=max(found) <= WANTED_SATURATED_FRACTION)
