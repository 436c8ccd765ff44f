"""``report.html``: one self-contained page that says how a run went, made from its :class:`Summary`.

No script, no external resource, no figure that is not in the summary. Every chart has its numbers as a table below it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fedseek.statement import NOT_COVERED
from simulations.charts import COORDINATOR_PHASES, PHASES, lines_by_round, plain_bars, stacked_bars
from simulations.language_report import answers_table, perplexity_chart, perplexity_table, perplexity_tile, says_stages
from simulations.report_parts import Chart, Table, by_round, number_words, round_table
from simulations.summary import (
    Encryption,
    Privacy,
    SiteFacts,
    StagePrivacy,
    Summary,
    write_whole,
)
from simulations.verdicts import comparable, final_baseline, final_utility, highest_epsilon, writing_sites

FIGURES_HERE = "the figures on this page: utility, loss, record counts, sizes and times carry no noise"
MAX_LABEL = 18  # characters of a site's name beside a line


def write_report(summary: Summary, path: Path) -> None:
    """Write the report of a run to ``path``, whole or not at all. The same summary gives the same bytes."""
    write_whole(path, render_report(summary))


def render_report(summary: Summary) -> str:
    """Return the page as HTML text."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("report_template.html")
    return template.render(
        summary=summary,
        headline=headline(summary),
        tiles=_tiles(summary),
        outcome=_outcome_table(summary),
        perplexity=perplexity_table(summary),
        answers=answers_table(summary),
        stages=says_stages(summary),
        probe_missing=_probe_missing(summary),
        utility_charts=_utility_charts(summary),
        epsilon_chart=_epsilon_chart(summary),
        time_chart=_time_chart(summary),
        phases=[phase for phase in PHASES if getattr(summary.totals.phase_seconds, phase) > 0],
        bytes_chart=_bytes_chart(summary),
        sites=_sites_table(summary),
        facts=_facts(summary),
        not_covered=[f"{line[0].upper()}{line[1:]}." for line in (*NOT_COVERED, FIGURES_HERE)],
        figure=number_words,
        duration=_duration,
        metric=_metric(summary),
        charted=_charted(summary),
    )


def headline(summary: Summary) -> str:
    """Say in one sentence how the shared adapter compares with training alone."""
    federated, local = comparable(summary)
    shared = [site for site in federated if site in local]
    if not shared:
        return f"One adapter, trained by {len(summary.sites)} sites in {len(summary.rounds) - 1} rounds."
    better = sum(federated[site] > local[site] for site in shared)
    if better == len(shared):
        return f"At {'all ' if better > 1 else ''}{_sites(better)}, the shared adapter beats training alone."
    if better == 0:
        return f"The shared adapter beats training alone at none of {_sites(len(shared))}."
    return f"The shared adapter beats training alone at {better} of {_sites(len(shared))}."


def _tiles(summary: Summary) -> list[tuple[str, str, str]]:
    """The four figures at the top: name, figure, what to read it against."""
    rounds = len(summary.rounds) - 1
    beside = f"{rounds} round{'s' if rounds != 1 else ''}, {_sites(len(summary.sites))}"
    time = ("Time", _duration(summary.totals.seconds), beside)
    return [_utility_tile(summary), _privacy_tile(summary), _size_tile(summary), time]


def _utility_tile(summary: Summary) -> tuple[str, str, str]:
    if len(writing_sites(summary)) == len(summary.sites):
        return perplexity_tile(summary)
    federated, lines = final_utility(summary), summary.baselines
    baselines = {"local only": final_baseline(lines.local_only), "centralised": final_baseline(lines.centralised)}
    beside = [f"{_mean(found.get(site) for site in federated)} {name}" for name, found in baselines.items() if found]
    return (f"Mean {_metric(summary)}", _mean(federated.values()), " · ".join(beside) or "no baseline was run")


def _privacy_tile(summary: Summary) -> tuple[str, str, str]:
    privacy, spent = summary.privacy, highest_epsilon(summary)
    if privacy is None or spent is None:
        return ("Privacy", "not private", "no noise was added: the adapter may remember records")
    beside = f"δ = {_exponent(privacy.delta)} · {privacy.mechanism} · the highest of all sites"
    return (f"Privacy of one {privacy.unit}", f"ε = {spent:.3g}", beside)


def _size_tile(summary: Summary) -> tuple[str, str, str]:
    up, plain = summary.totals.bytes_up, summary.totals.plain_float32_bytes
    beside = f"{up / plain:.2f} × plain float32 ({_size(plain)})" if plain else "nothing to compare with"
    return ("Sent up, encrypted", _size(up), beside)


def _charted(summary: Summary) -> str:
    writing = len(writing_sites(summary))
    return "perplexity" if writing == len(summary.sites) else "perplexity or utility" if writing else _metric(summary)


def _outcome_table(summary: Summary) -> Table | None:
    """Final utility: a row for each site that classifies, a column for each way of training that was run."""
    writing = writing_sites(summary)
    lines = summary.baselines
    columns: list[tuple[str, Mapping[str, float]]] = [
        ("local only", final_baseline(lines.local_only)),
        ("federated", final_utility(summary)),
        ("centralised", final_baseline(lines.centralised)),
        ("linear probe", lines.linear_probe or {}),
        ("private linear probe", lines.dp_linear_probe or {}),
    ]
    run = [(name, values) for name, values in columns if values]
    rows = tuple(
        (site.display_name, *(number_words(values.get(site.name)) for _, values in run))
        for site in summary.sites
        if site.name not in writing
    )
    return Table(("site", *(name for name, _ in run)), rows) if rows else None


def _probe_missing(summary: Summary) -> str | None:
    """What to say under the outcome of a private run that has no DP linear probe beside it."""
    if (
        summary.privacy is None
        or summary.baselines.dp_linear_probe
        or len(writing_sites(summary)) == len(summary.sites)
    ):
        return None
    return (
        "No private linear probe was run. Under noise, a head alone on the frozen model is hard to beat; whether this "
        "adapter does is not known."
    )


def _utility_charts(summary: Summary) -> list[Chart]:
    """One a site: perplexity where it writes, else utility."""
    writing = writing_sites(summary)
    return [
        (perplexity_chart if site.name in writing else _utility_chart)(summary, site, number)
        for number, site in enumerate(summary.sites)
    ]


def _utility_chart(summary: Summary, site: SiteFacts, number: int) -> Chart:
    local, pooled = summary.baselines.local_only or {}, summary.baselines.centralised or {}
    series = {
        "local only": ("local", local.get(site.name, ())),
        "centralised": ("centralised", pooled.get(site.name, ())),
        "federated": ("federated", by_round(summary, site.name, "utility")),
    }
    lines = [(label, colour, values) for label, (colour, values) in series.items() if values]
    fractions = all(0 <= value <= 1 for _, _, values in lines for value in values if value is not None)
    title = f"{site.display_name}: {_metric(summary)} by round"
    drawing = lines_by_round(f"utility{number}", title, lines, top=1.0 if fractions else None)
    return Chart(site.display_name, drawing, round_table([(label, values) for label, _, values in lines]))


def _epsilon_chart(summary: Summary) -> Chart | None:
    if summary.privacy is None:
        return None
    spent = [(site.display_name, by_round(summary, site.name, "epsilon")) for site in summary.sites]
    target = summary.privacy.epsilon_target
    lines = [(_short(name), "epsilon", values) for name, values in spent]
    lines.append((f"target {target:g}", "quiet", [target] * len(summary.rounds)))
    caption = f"Epsilon spent by round, at δ = {_exponent(summary.privacy.delta)}, for one {summary.privacy.unit}"
    drawing = lines_by_round("epsilon", caption, lines, label_share=0.36)
    return Chart(caption, drawing, round_table(spent))


def _time_chart(summary: Summary) -> Chart:
    bars = [(site.display_name, _seconds_by_phase(summary, site.name)) for site in summary.sites]
    totals = summary.totals.phase_seconds
    bars.append(("coordinator", {"aggregate": totals.aggregate, "unmask": totals.unmask}))
    words = [(name, parts, _duration(sum(parts.values()))) for name, parts in bars]
    caption = "Seconds in each step, added over all rounds"
    header = ("party", *PHASES)
    rows = tuple((name, *(number_words(parts.get(phase)) for phase in PHASES)) for name, parts in bars)
    return Chart(caption, stacked_bars("time", caption, words), Table(header, rows))


def _bytes_chart(summary: Summary) -> Chart:
    totals = summary.totals
    bars = [
        ("up, encrypted", totals.bytes_up, "federated"),
        ("up, as plain FedAvg would send it (float32)", totals.plain_float32_bytes, "quiet"),
        ("down, encrypted sum", totals.bytes_down, "federated"),
    ]
    caption = "Bytes on the wire, all sites and rounds"
    drawing = plain_bars("bytes", caption, [(name, count, _size(count), colour) for name, count, colour in bars])
    rows = tuple((name, f"{count:,}") for name, count, _ in bars)
    return Chart(caption, drawing, Table(("direction", "bytes"), rows))


def _sites_table(summary: Summary) -> Table:
    guards = summary.release.guards_passed if summary.release else {}
    unit = " or ".join(f"{name}s" for name in summary.privacy.unit.split(" or ")) if summary.privacy else "units"
    header = ("site", "kind", "records", unit, "held back", "ε spent", "guards passed")
    spent = {entry.site: entry.epsilon for entry in summary.final.sites}
    rows = tuple(
        (
            site.display_name,
            site.kind,
            f"{site.records:,}",
            f"{site.units:,}",
            f"{site.held_back_records:,}",
            number_words(spent.get(site.name)),
            str(len(guards[site.name])) if site.name in guards else "–",
        )
        for site in summary.sites
    )
    return Table(header, rows)


def _facts(summary: Summary) -> list[tuple[str, str]]:
    """What was run, as pairs of name and value."""
    memory, release = summary.peak_rss_mb, summary.release
    facts = [
        ("Run", summary.run),
        ("Scenario", summary.scenario),
        ("Started", f"{summary.started_at:%Y-%m-%d %H:%M:%S} UTC"),
        ("Plan digest", summary.plan_digest),
        ("Base model", f"{summary.model.name}, sha256 {summary.model.sha256}"),
        ("Encryption", _describe_encryption(summary.encryption)),
        ("Privacy", _describe_privacy(summary.privacy) if summary.privacy else "none"),
        ("Peak memory", f"coordinator {memory.coordinator:,.0f} MB, largest site host {memory.site_max:,.0f} MB"),
        ("Versions", ", ".join(f"{name} {version}" for name, version in summary.versions.items())),
    ]
    if release is not None:
        adapter = f"{release.path}, {release.trainable_values:,} trained values, sha256 {release.adapter_sha256}"
        facts.append(("Adapter", adapter))
    return facts


def _describe_encryption(used: Encryption) -> str:
    parts = (
        f"BFV, N = {used.poly_modulus_degree}",
        f"{used.value_bits}-bit values, {used.digits_per_slot} to a slot, up to {used.max_sites} sites",
        f"ciphertexts a round: {', '.join(f'{count} for {scope}' for scope, count in used.ciphertexts.items())}",
        f"noise budget left: {used.noise_budget_bits_left} bits",
    )
    return "; ".join(parts)


def _describe_privacy(used: Privacy) -> str:
    parts = (
        f"{used.mechanism}, target ε {used.epsilon_target:g} at δ {_exponent(used.delta)} for one {used.unit}",
        *(f"first {stage.rounds} rounds of {_describe_steps(stage)}, then" for stage in used.earlier_stages),
        f"clip norm {used.l2_clip_norm:g}, {_describe_steps(used)}",
    )
    return "; ".join(parts)


def _describe_steps(used: Privacy | StagePrivacy) -> str:
    return (
        f"noise multiplier {used.noise_multiplier:.4g}, sampling probability {used.sampling_probability:.4g}, "
        f"{used.steps_per_round} steps a round"
    )


def _seconds_by_phase(summary: Summary, site: str) -> dict[str, float]:
    entries = [entry for turn in summary.rounds for entry in turn.sites if entry.site == site]
    return {
        name: sum(getattr(entry.seconds, name) for entry in entries)
        for name in PHASES
        if name not in COORDINATOR_PHASES
    }


def _metric(summary: Summary) -> str:
    writing = writing_sites(summary)
    if len(writing) == len(summary.sites):
        return "token accuracy"
    names = {entry.metric for turn in summary.rounds for entry in turn.sites} | (
        {"token accuracy"} if writing else set()
    )
    return names.pop().replace("_", " ") if len(names) == 1 else "utility"


def _mean(values: Iterable[float | None]) -> str:
    found = [value for value in values if value is not None]
    return number_words(fmean(found) if found else None)


def _sites(count: int) -> str:
    return f"{count} site{'s' if count != 1 else ''}"


def _short(name: str) -> str:
    return name if len(name) <= MAX_LABEL else name[: MAX_LABEL - 1] + "…"


def _exponent(value: float) -> str:
    """A small probability without padding in its exponent.

    >>> _exponent(1e-5), _exponent(0.001)
    ('1e-5', '0.001')
    """
    return f"{value:g}".replace("e-0", "e-")


def _size(count: float) -> str:
    """Bytes in decimal units.

    >>> _size(999), _size(12_345_678)
    ('999 B', '12.3 MB')
    """
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} GB"


def _duration(seconds: float) -> str:
    """Seconds in the two largest units that matter.

    >>> _duration(0.042), _duration(75.2), _duration(7325)
    ('42 ms', '1 min 15 s', '2 h 2 min')
    """
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
