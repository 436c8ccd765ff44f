"""What benchmarks/language_model.py found: means and ranges over seeds, as a table and as a picture."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from simulations.charts import COLOURS

WANTED_GAP, WANTED_SHARE = 0.92, 0.012
NAMES = {
    "base": "base model",
    "local_only": "local only",
    "local_lowest": "local only, after its best round",
    "federated": "federated",
}
WAYS = ("local_only", "federated")
Found = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over seeds."""

    mean: float
    low: float
    high: float
    seeds: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Mean, lowest, highest and how many."""
        given = list(values)
        return cls(fmean(given), min(given), max(given), len(given))


@dataclass(frozen=True, slots=True)
class Figures:
    """All that is reported.

    Attributes:
        perplexity: by epsilon (0: not private), way and site; base is the same for all.
        gap_closed: what LoRA gains in held-back loss over what full fine-tuning gains, mean over sites; None if not run.
        gain: by way ("lora", "full"): nats that the mean loss falls by.
        rates: the tuned learning rates.
        trained_share: values that LoRA trains, of the base model's.
        epsilon_paid: the highest of any private run.
    """

    perplexity: dict[str, dict[str, dict[str, Spread]]]
    below_local: bool
    gap_closed: Spread | None
    gain: dict[str, Spread]
    rates: dict[str, float]
    trained_share: float
    epsilon_paid: float

    @property
    def met(self) -> bool:
        """Whether the targets are: federated below local-only at every site and seed, the gap, the share."""
        gap = self.gap_closed is not None and self.gap_closed.mean >= WANTED_GAP
        return self.below_local and gap and self.trained_share <= WANTED_SHARE


def summarise(found: Sequence[Found]) -> Figures:
    """Means and ranges of what was measured."""
    perplexity: dict[str, dict[str, dict[str, Spread]]] = {}
    for epsilon in sorted({each["epsilon"] for each in found}):
        of = {way: [each for each in found if each["epsilon"] == epsilon and each["way"] == way] for way in WAYS}
        perplexity[f"{epsilon:g}"] = {
            "base": _by_site([*of["local_only"], *of["federated"]], "before"),
            "local_only": _by_site(of["local_only"], "after"),
            "local_lowest": _by_site(of["local_only"], "lowest"),
            "federated": _by_site(of["federated"], "after"),
        }
    tuned = {way: _tuned(found, way) for way in ("lora", "full")}
    gains = {way: {each["seed"]: _gain(each) for each in runs} for way, runs in tuned.items()}
    shared = sorted(set(gains["lora"]) & set(gains["full"]))
    return Figures(
        perplexity=perplexity,
        below_local=_below_local(found),
        gap_closed=Spread.of(gains["lora"][seed] / gains["full"][seed] for seed in shared) if shared else None,
        gain={way: Spread.of(by_seed.values()) for way, by_seed in gains.items() if by_seed},
        rates={way: runs[0]["rate"] for way, runs in tuned.items() if runs},
        trained_share=max((each["trained"] / each["values"] for each in found if each["way"] != "full"), default=0.0),
        epsilon_paid=max((each["epsilon_paid"] for each in found), default=0.0),
    )


def _by_site(runs: Sequence[Found], field: str) -> dict[str, Spread]:
    sites = runs[0][field] if runs else {}
    return {site: Spread.of(math.exp(run[field][site]) for run in runs) for site in sites}


def _below_local(found: Sequence[Found]) -> bool:
    """At every site, for every seed that has both, without privacy."""
    runs = {(each["way"], each["seed"]): each["after"] for each in found if not each["epsilon"]}
    seeds = {seed for way, seed in runs if way == "federated" and ("local_only", seed) in runs}
    return bool(seeds) and all(
        loss < runs["local_only", seed][site] for seed in seeds for site, loss in runs["federated", seed].items()
    )


def _tuned(found: Sequence[Found], way: str) -> list[Found]:
    """The runs at the best rate of the first seed."""
    first = [each for each in found if each["way"] == way and each["seed"] == 0]
    if not first:
        return []
    best = min(first, key=lambda each: sum(each["after"].values()))["rate"]
    return [each for each in found if each["way"] == way and each["rate"] == best]


def _gain(run: Found) -> float:
    return fmean(run["before"][site] - run["after"][site] for site in run["after"])


def table(figures: Figures) -> str:
    """Markdown."""
    lines: list[str] = []
    for epsilon, ways in figures.perplexity.items():
        sites = list(ways["base"])
        lines += [f"| {'not private' if epsilon == '0' else f'ε = {epsilon}'} | {' | '.join(sites)} |"]
        lines += ["|---" * (len(sites) + 1) + "|"]
        lines += [
            f"| {NAMES[way]} | {' | '.join(_cell(by_site[site]) for site in sites)} |"
            for way, by_site in ways.items()
            if by_site
        ]
        lines.append("")
    for way, gain in figures.gain.items():
        name = "LoRA" if way == "lora" else "full fine-tuning"
        lines.append(f"{name}, learning rate {figures.rates[way]:g}: held-out loss falls by {_cell(gain)} nats a token")
    if figures.gap_closed is not None:
        lines.append(f"LoRA closes {_cell(figures.gap_closed)} of that gap (wanted {WANTED_GAP:g})")
    lines.append(f"LoRA trains {figures.trained_share:.2%} of the parameters (wanted at most {WANTED_SHARE:.1%})")
    lines.append(f"federated below local-only at every site and seed: {'yes' if figures.below_local else 'no'}")
    if figures.epsilon_paid:
        lines.append(f"epsilon paid, the highest: {figures.epsilon_paid:.2f}")
    return "\n".join(lines)


def _cell(spread: Spread) -> str:
    seeds = "" if spread.seeds >= 3 else f", {spread.seeds} seed{'s' if spread.seeds > 1 else ''}"
    return f"{spread.mean:.3f} ({spread.low:.3f} to {spread.high:.3f}{seeds})"


def draw(figures: Figures, path: Path) -> None:
    """Perplexity at each site, a panel for each epsilon: bars with the range over seeds."""
    colours = {"base": COLOURS["quiet"], "local_only": COLOURS["local"], "federated": COLOURS["federated"]}
    picture = Figure(figsize=(4.6 * len(figures.perplexity), 3.4), layout="constrained")
    for number, (epsilon, ways) in enumerate(figures.perplexity.items(), start=1):
        axes = picture.add_subplot(1, len(figures.perplexity), number)
        for offset, way in enumerate(colours):
            for place, spread in enumerate(ways[way].values()):
                span = [[spread.mean - spread.low], [spread.high - spread.mean]]
                label = NAMES[way] if place == 0 else None
                axes.bar(
                    place + 0.27 * (offset - 1),
                    spread.mean,
                    0.25,
                    yerr=span,
                    color=colours[way],
                    label=label,
                    capsize=2,
                )
        axes.set_xticks(range(len(ways["base"])), ["\n".join(site.rsplit("-", 1)) for site in ways["base"]], fontsize=8)
        axes.set_title("not private" if epsilon == "0" else f"ε = {epsilon}", fontsize=10)
        axes.set_ylabel("held-out perplexity")
        axes.spines[["top", "right"]].set_visible(False)
    picture.axes[0].legend(frameon=False, fontsize=8)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        picture.savefig(path, dpi=150)
