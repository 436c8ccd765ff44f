"""What the same rounds give without the federation: alone, all together, and with a frozen encoder.

Same plan, same sampler, same guards; no encryption. ``local_only`` is what each site gets by itself; ``centralised`` is
what one could get if the law allowed pooling (under DP-SGD: a trusted party with everybody's records). The linear
probe trains heads alone on frozen features, averaged over the sites of a kind each round: a DP linear probe is hard
to beat on easy tasks, so it stands beside every figure.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedseek.dp.accounting import PrivacySpend
from fedseek.evaluate import evaluate
from fedseek.lora.load import load_base
from fedseek.lora.model import AdapterModel
from fedseek.lora.source import locate_model
from fedseek.plan import Plan
from fedseek.prepare import prepare_model, prepare_settings
from fedseek.records import TokenisedRecords, tokenise
from fedseek.train import train_round
from fedseek_site.admission import units_for
from simulations.run_folder import open_scenario, synthetic_folder
from simulations.scenario import Scenario, read_site_data

Utilities = list[float]


@dataclass(frozen=True, slots=True)
class Bench:
    """A site's tokenised records, ready to train on."""

    name: str
    kind: str
    train: TokenisedRecords
    held_back: TokenisedRecords


def local_only(run_folder: Path, site: str) -> dict[str, Utilities]:
    """Utility by round (round 0 first) of a site that trains alone, as ``{site: utilities}``."""
    scenario, benches = _open(run_folder)
    bench = next(one for one in benches if one.name == site)
    model = _fresh_model(scenario.plan, bench.kind)
    metric = scenario.plan.spec.kinds[bench.kind].metric
    utilities = [evaluate(model, bench.held_back, metric=metric).utility]
    for _ in train_rounds(scenario.plan, model, bench.train):
        utilities.append(evaluate(model, bench.held_back, metric=metric).utility)
    return {site: utilities}


def centralised(run_folder: Path) -> dict[str, Utilities]:
    """Utility by round at every site of one model trained on everybody's records.

    One head holds the labels of all kinds; a record is only asked about the labels of its own kind.
    """
    scenario, benches = _open(run_folder)
    plan = scenario.plan
    offsets = label_offsets(plan)
    model = prepare_union_model(plan)
    pooled, allowed = pool(plan, benches, offsets)
    utilities: dict[str, Utilities] = {bench.name: [] for bench in benches}

    def measure() -> None:
        for bench in benches:
            view = HeadView(model, offsets[bench.kind], len(plan.spec.kinds[bench.kind].labels))
            metric = plan.spec.kinds[bench.kind].metric
            utilities[bench.name].append(evaluate(view, bench.held_back, metric=metric).utility)

    measure()
    for _ in train_rounds(plan, model, pooled, allowed=allowed):
        measure()
    return utilities


def linear_probe(run_folder: Path) -> dict[str, float]:
    """Final utility at every site of heads trained on frozen features and averaged over each kind, round by round."""
    scenario, benches = _open(run_folder)
    plan = scenario.plan
    base = load_base(locate_model(plan.spec.model.source))
    utilities = {}
    for kind in sorted({bench.kind for bench in benches}):
        of_kind = [bench for bench in benches if bench.kind == kind]
        probes = [Probe(prepare_model(plan, kind, copy.deepcopy(base)), bench) for bench in of_kind]
        spends = [PrivacySpend(plan.privacy) if plan.privacy else None for _ in probes]
        for done in range(plan.spec.training.rounds):
            for index, probe in enumerate(probes):
                spends[index] = train_round(
                    probe,
                    probe.train_records,
                    settings=prepare_settings(plan),
                    privacy=plan.privacy,
                    spend=spends[index],
                    steps_before=done * plan.spec.training.steps_per_round,
                ).spend
            _average_heads(probes)
        for probe, bench in zip(probes, of_kind, strict=True):
            metric = plan.spec.kinds[kind].metric
            utilities[bench.name] = evaluate(probe, probe.held_back, metric=metric).utility
    return utilities


class HeadView(nn.Module):
    """A model over the labels of all kinds, seen through the labels of one."""

    def __init__(self, model: AdapterModel, first: int, count: int) -> None:
        super().__init__()
        self.model = model
        self._labels = slice(first, first + count)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Logits (B, labels of the kind)."""
        logits: torch.Tensor = self.model(input_ids, attention_mask)[:, self._labels]
        return logits


class Probe(nn.Module):
    """A head on features computed once. A record's only "token" is its row in the feature table."""

    def __init__(self, model: AdapterModel, bench: Bench) -> None:
        super().__init__()
        self.head = nn.Linear(model.head.in_features, model.head.out_features)
        self.head.load_state_dict(model.head.state_dict())
        both = [*bench.train.input_ids, *bench.held_back.input_ids]
        self.register_buffer("features", pooled_features(model, both))
        split = len(bench.train)
        rows = [np.array([row], np.int32) for row in range(len(both))]
        self.train_records = TokenisedRecords(rows[:split], bench.train.labels, bench.train.units)
        self.held_back = TokenisedRecords(rows[split:], bench.held_back.labels, bench.held_back.units)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Logits (B, L) of the rows named in the first column of ``input_ids``."""
        logits: torch.Tensor = self.head(self.features[input_ids[:, 0]])
        return logits


def pooled_features(model: AdapterModel, input_ids: list[npt.NDArray[np.int32]], *, batch: int = 64) -> torch.Tensor:
    """Mean-pooled encoder output of each text, shape (num_texts, H); lora_B is still zero, so this is the base model."""
    features = torch.zeros(len(input_ids), model.head.in_features)
    order = np.argsort([len(ids) for ids in input_ids])
    head, model.head = model.head, nn.Identity()
    with torch.no_grad():
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            width = max(len(input_ids[row]) for row in rows)
            ids = torch.zeros(len(rows), width, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for line, row in enumerate(rows):
                ids[line, : len(input_ids[row])] = torch.from_numpy(input_ids[row].astype(np.int64))
                mask[line, : len(input_ids[row])] = 1
            features[torch.from_numpy(rows)] = model(ids, mask)
    model.head = head
    return features


def train_rounds(
    plan: Plan, model: nn.Module, records: TokenisedRecords, *, allowed: npt.NDArray[np.bool_] | None = None
) -> Iterator[int]:
    """Train ``model`` in place, yielding after each of the plan's rounds. One privacy spend goes through all of them."""
    spend = PrivacySpend(plan.privacy) if plan.privacy else None
    steps = plan.spec.training.steps_per_round
    for done in range(plan.spec.training.rounds):
        spend = train_round(
            model,
            records,
            settings=prepare_settings(plan),
            privacy=plan.privacy,
            spend=spend,
            steps_before=done * steps,
            allowed=allowed,
        ).spend
        yield done + 1


def label_offsets(plan: Plan) -> dict[str, int]:
    """Where each kind's labels start in the union of all labels."""
    counts = [len(task.labels) for task in plan.spec.kinds.values()]
    return dict(zip(plan.spec.kinds, np.cumsum([0, *counts[:-1]]).tolist(), strict=True))


def pool(plan: Plan, benches: list[Bench], offsets: dict[str, int]) -> tuple[TokenisedRecords, npt.NDArray[np.bool_]]:
    """Everybody's training records, labels renumbered into the union, and which labels each record may take."""
    total = sum(len(task.labels) for task in plan.spec.kinds.values())
    allowed = np.zeros((sum(len(bench.train) for bench in benches), total), bool)
    labels, units, row, unit = [], [], 0, 0
    for bench in benches:
        first = offsets[bench.kind]
        allowed[row : row + len(bench.train), first : first + len(plan.spec.kinds[bench.kind].labels)] = True
        labels.append(bench.train.labels + first)
        units.append(bench.train.units + unit)
        row, unit = row + len(bench.train), unit + bench.train.num_units
    input_ids = [ids for bench in benches for ids in bench.train.input_ids]
    return TokenisedRecords(input_ids, np.concatenate(labels), np.concatenate(units)), allowed


def prepare_union_model(plan: Plan) -> AdapterModel:
    """The plan's model with one head over the labels of all kinds; each kind's rows start as its own head would."""
    base = load_base(locate_model(plan.spec.model.source))
    heads = {kind: prepare_model(plan, kind, copy.deepcopy(base)).head for kind in plan.spec.kinds}
    model = prepare_model(plan, next(iter(plan.spec.kinds)), base)
    model.head = nn.Linear(model.head.in_features, sum(head.out_features for head in heads.values()))
    with torch.no_grad():
        model.head.weight.copy_(torch.cat([head.weight for head in heads.values()]))
        model.head.bias.zero_()
    return model


def _average_heads(probes: list[Probe]) -> None:
    with torch.no_grad():
        for name in ("weight", "bias"):
            mean = torch.stack([getattr(probe.head, name) for probe in probes]).mean(0)
            for probe in probes:
                getattr(probe.head, name).copy_(mean)


def _fresh_model(plan: Plan, kind: str) -> AdapterModel:
    return prepare_model(plan, kind, load_base(locate_model(plan.spec.model.source)))


def _open(run_folder: Path) -> tuple[Scenario, list[Bench]]:
    scenario = open_scenario(run_folder)
    plan, folder = scenario.plan, locate_model(scenario.plan.spec.model.source)
    benches = []
    for site in scenario.spec.sites:
        data = read_site_data(scenario, site, synthetic=synthetic_folder(run_folder))
        labels, cut = plan.spec.kinds[site.kind].labels, plan.spec.model.max_tokens
        train = tokenise(units_for(plan, site.kind, data.train), folder, labels=labels, max_tokens=cut)
        held_back = tokenise(data.held_back, folder, labels=labels, max_tokens=cut)
        benches.append(Bench(site.name, site.kind, train, held_back))
    return scenario, benches
