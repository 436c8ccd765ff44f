"""What benchmarks/private_utility.py found: means and ranges over seeds, as a table and as a picture."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from utility_tasks import CENTRALISED, FEDERATED, LOCAL_ONLY, PROBE, SETTINGS, WAYS

from simulations.charts import COLOURS

Found = Mapping[str, Any]
NAMES = {
    FEDERATED: "federated DP-LoRA",
    CENTRALISED: "centralised DP-LoRA",
    PROBE: "federated DP linear probe",
    LOCAL_ONLY: "local only, DP-LoRA",
}
_COLOUR_OF = {FEDERATED: "federated", CENTRALISED: "centralised", PROBE: "epsilon", LOCAL_ONLY: "local"}
Cells = dict[tuple[str, str, str, float], dict[int, float]]  # data, split, way, epsilon -> seed -> utility


def summarise(found: Iterable[Found]) -> list[dict[str, Any]]:
    """One entry for each data set, split, way and epsilon: mean, lowest, highest and seeds; and against centralised."""
    cells = _cells(found)
    lines = []
    for (data, split, way, epsilon), by_seed in cells.items():
        against = cells.get((data, SETTINGS[data].splits[0], CENTRALISED, epsilon), {})
        ratios = [value / against[seed] for seed, value in by_seed.items() if against.get(seed)]
        values = list(by_seed.values())
        line = {"data": data, "split": split, "way": way, "epsilon": epsilon, "seeds": sorted(by_seed)}
        line |= {"mean": fmean(values), "low": min(values), "high": max(values)}
        line |= {"of_centralised": fmean(ratios), "of_centralised_low": min(ratios)} if ratios else {}
        lines.append(line)
    return lines


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """The figures as Markdown: a row for each way, a column for each epsilon, a table for each data set and split."""
    parts = []
    for data, split in dict.fromkeys((line["data"], line["split"]) for line in lines):
        if split == SETTINGS[data].splits[0]:
            shown = [line for line in lines if (line["data"], line["split"]) == (data, split)]
        else:  # whoever holds all rows does not see a split
            shown = [line for line in lines if line["data"] == data and line["split"] == split]
            shown += [line for line in lines if line["data"] == data and line["way"] == CENTRALISED]
        parts.append("\n".join(_rows(data, split, shown)))
    return "\n\n".join(parts)


def draw(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Save a picture: a panel for each data set and split, utility over epsilon, a bar from lowest to highest seed."""
    panels = list(dict.fromkeys((line["data"], line["split"]) for line in lines))
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "private utility", "font.size": 10.0}
    with rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(3.6 * len(panels), 3.4), layout="constrained")
        for number, (data, split) in enumerate(panels, start=1):
            axes = figure.add_subplot(1, len(panels), number)
            epsilons = SETTINGS[data].epsilons
            for offset, way in enumerate(WAYS):
                mine = _of_way(lines, data, split, way)
                where = [epsilons.index(line["epsilon"]) + 0.05 * (offset - 1.5) for line in mine]
                means = [line["mean"] for line in mine]
                spans = [[line["mean"] - line["low"] for line in mine], [line["high"] - line["mean"] for line in mine]]
                colour = COLOURS[_COLOUR_OF[way]]
                axes.errorbar(where, means, yerr=spans, label=NAMES[way], color=colour, marker="o", capsize=3)
            axes.set_xticks(range(len(epsilons)), [f"ε = {each:g}" for each in epsilons])
            axes.set_title(f"{data}, {split}", fontsize=10)
            axes.set_ylabel("AUC" if SETTINGS[data].metric == "auc" else "accuracy")
            axes.set_ylim(0.5 if SETTINGS[data].metric == "auc" else 0, 1)
            axes.grid(axis="y", color=COLOURS["grid"])
            axes.spines[["top", "right"]].set_visible(False)
        figure.axes[0].legend(loc="lower left", frameon=False, fontsize=8)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _cells(found: Iterable[Found]) -> Cells:
    cells: Cells = defaultdict(dict)
    for each in found:
        cells[each["data"], each["split"], each["way"], each["epsilon"]][each["seed"]] = each["utility"]
    order = {way: number for number, way in enumerate(WAYS)}
    return dict(
        sorted(cells.items(), key=lambda item: (item[0][0], item[0][1] != "iid", order[item[0][2]], -item[0][3]))
    )


def _of_way(lines: Sequence[Mapping[str, Any]], data: str, split: str, way: str) -> list[Mapping[str, Any]]:
    """The lines of a way on a split; a party that holds all rows has one figure for all splits."""
    wanted = SETTINGS[data].splits[0] if way == CENTRALISED else split
    return [line for line in lines if (line["data"], line["split"], line["way"]) == (data, wanted, way)]


def _rows(data: str, split: str, lines: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    epsilons = [each for each in SETTINGS[data].epsilons if any(line["epsilon"] == each for line in lines)]
    yield f"| {data}, {split} | " + " | ".join(f"ε = {each:g}" for each in epsilons) + " |"
    yield "|---" * (len(epsilons) + 1) + "|"
    for way in WAYS:
        by_epsilon = {line["epsilon"]: line for line in lines if line["way"] == way}
        if by_epsilon:
            cells = " | ".join(_cell(by_epsilon.get(each)) for each in epsilons)
            yield f"| {NAMES[way]} | {cells} |"
    shares = {line["epsilon"]: line for line in lines if line["way"] == FEDERATED and "of_centralised" in line}
    if shares:
        cells = " | ".join(
            f"{shares[each]['of_centralised']:.3f} (lowest {shares[each]['of_centralised_low']:.3f})"
            if each in shares
            else "-"
            for each in epsilons
        )
        yield f"| federated over centralised | {cells} |"


def _cell(line: Mapping[str, Any] | None) -> str:
    if line is None:
        return "-"
    few = "" if len(line["seeds"]) >= 3 else f", {len(line['seeds'])} seed{'s' if len(line['seeds']) > 1 else ''}"
    return f"{line['mean']:.3f} ({line['low']:.3f} to {line['high']:.3f}{few})"
