"""What the same rounds give without the federation: alone, all together, and with a frozen encoder.

Same plan, same sampler, same guards; no encryption. ``local_only`` is what each site gets by itself; ``centralised`` is
what one could get if the law allowed pooling (under DP-SGD: a trusted party with everybody's records). The linear
probe trains heads alone on frozen features, averaged over the sites of a kind each round: a DP linear probe is hard
to beat on easy tasks, so it stands beside every figure.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedseek.dp.accounting import PrivacySpend
from fedseek.evaluate import Evaluation, evaluate, token_budget, vocabulary_of
from fedseek.lora.load import load_base
from fedseek.lora.model import AdapterModel, set_trainable
from fedseek.lora.source import locate_model
from fedseek.plan import Plan
from fedseek.prepare import prepare_model, prepare_settings
from fedseek.records import TokenisedRecords
from fedseek.tokenise import tokenise
from fedseek.train import train_round
from fedseek_site.admission import units_for
from simulations.run_folder import open_scenario, synthetic_folder
from simulations.scenario import Scenario, read_site_data


@dataclass(frozen=True, slots=True)
class Line:
    """What a baseline gives at a site.

    Attributes:
        utilities: by round, round 0 first.
        losses: by round, nats a record or token.
        base_loss: for a language kind, of the base model for the kind's own task; a first stage has another at round 0.
    """

    utilities: tuple[float, ...]
    losses: tuple[float, ...]
    base_loss: float | None = None

    @classmethod
    def of(cls, found: Sequence[Evaluation], base_loss: float | None = None) -> Line:
        """From one evaluation a round."""
        return cls(tuple(each.utility for each in found), tuple(each.mean_loss for each in found), base_loss)


@dataclass(frozen=True, slots=True)
class Bench:
    """A site's tokenised records, ready to train on.

    Attributes:
        name, kind: as on the roster.
        train, held_back: for the task of its kind.
        domain: texts to train on and held back, for a first stage on them; None where the plan has none.
    """

    name: str
    kind: str
    train: TokenisedRecords
    held_back: TokenisedRecords
    domain: tuple[TokenisedRecords, TokenisedRecords] | None = None


def local_only(run_folder: Path, site: str) -> dict[str, Line]:
    """A site that trains alone, as ``{site: line}``."""
    scenario, benches = _open(run_folder)
    plan, bench = scenario.plan, next(one for one in benches if one.name == site)
    model = _fresh_model(plan, bench.kind)
    base = None if bench.held_back.counted is None else _evaluate(plan, model, bench, bench.held_back).mean_loss
    found = [_measure(plan, model, bench, number=0)]
    for number in train_rounds(plan, model, bench.train, domain=bench.domain and bench.domain[0]):
        found.append(_measure(plan, model, bench, number=number))
    return {site: Line.of(found, base)}


def _measure(plan: Plan, model: AdapterModel, bench: Bench, *, number: int) -> Evaluation:
    """Of the weights after round ``number``, for the task of the round to come, as a site evaluates them."""
    domain = bench.domain if plan.stage_of(number + 1).task is not None else None
    return _evaluate(plan, model, bench, bench.held_back if domain is None else domain[1])


def _evaluate(plan: Plan, model: AdapterModel, bench: Bench, records: TokenisedRecords) -> Evaluation:
    if records.counted is None:
        return evaluate(model, records, metric=plan.spec.kinds[bench.kind].metric)
    return evaluate(model, records, max_tokens=token_budget(plan.packing, vocabulary_of(model)))


def centralised(run_folder: Path) -> dict[str, Line]:
    """One model trained on everybody's records, at every site.

    One head holds the labels of all kinds; a record is only asked about the labels of its own kind. Kinds that write
    need no head: there the records are put together as they are.
    """
    scenario, benches = _open(run_folder)
    plan = scenario.plan
    found: dict[str, list[Evaluation]] = {bench.name: [] for bench in benches}
    if all(bench.train.counted is not None for bench in benches):
        model = _fresh_model(plan, benches[0].kind)
        bases = {bench.name: _evaluate(plan, model, bench, bench.held_back).mean_loss for bench in benches}
        texts = [bench.domain[0] for bench in benches if bench.domain is not None]
        domain = together(texts) if texts else None
        rounds = train_rounds(plan, model, together([bench.train for bench in benches]), domain=domain)
        for number in chain([0], rounds):
            for bench in benches:
                found[bench.name].append(_measure(plan, model, bench, number=number))
        return {name: Line.of(line, bases[name]) for name, line in found.items()}
    offsets = label_offsets(plan)
    model = prepare_union_model(plan)
    pooled, allowed = pool(plan, benches, offsets)
    for _ in chain([0], train_rounds(plan, model, pooled, allowed=allowed)):
        for bench in benches:
            view = HeadView(model, offsets[bench.kind], len(plan.spec.kinds[bench.kind].labels))
            found[bench.name].append(evaluate(view, bench.held_back, metric=plan.spec.kinds[bench.kind].metric))
    return {name: Line.of(line) for name, line in found.items()}


def together(parts: Sequence[TokenisedRecords]) -> TokenisedRecords:
    """Records of a language task of several sites; no unit of one is a unit of another."""
    firsts = np.cumsum([0, *(part.num_units for part in parts)])
    return TokenisedRecords(
        [ids for part in parts for ids in part.input_ids],
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.units + first for part, first in zip(parts, firsts, strict=False)]),
        [counted for part in parts for counted in part.counted or ()],
    )


def linear_probe(run_folder: Path) -> dict[str, float]:
    """Final utility at every site of heads trained on frozen features and averaged over each kind, round by round.

    Of kinds that classify: what writes has no head. A first stage on texts trains no head either, so it takes no part.
    """
    scenario, benches = _open(run_folder)
    plan, stage = scenario.plan, scenario.plan.stages[-1]
    benches = [bench for bench in benches if bench.held_back.counted is None]
    base = load_base(locate_model(plan.spec.model.source))
    utilities = {}
    for kind in sorted({bench.kind for bench in benches}):
        of_kind = [bench for bench in benches if bench.kind == kind]
        probes = [Probe(prepare_model(plan, kind, copy.deepcopy(base)), bench) for bench in of_kind]
        spends = [PrivacySpend(plan.privacy) if plan.privacy else None for _ in probes]
        for done in range(stage.rounds):
            for index, probe in enumerate(probes):
                spends[index] = train_round(
                    probe,
                    probe.train_records,
                    settings=prepare_settings(plan, stage.first_round + done),
                    privacy=plan.privacy,
                    spend=spends[index],
                    steps_before=done * stage.steps_per_round,
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
    plan: Plan,
    model: nn.Module,
    records: TokenisedRecords,
    *,
    domain: TokenisedRecords | None = None,
    allowed: npt.NDArray[np.bool_] | None = None,
) -> Iterator[int]:
    """Train ``model`` in place, yielding after each of the plan's rounds. One privacy spend goes through each stage.

    Rounds of a domain stage train on ``domain``, all others on ``records``.
    """
    for stage in plan.stages:
        spend = PrivacySpend(stage.privacy) if stage.privacy else None
        chosen = domain if stage.task is not None and domain is not None else records
        for done in range(stage.rounds):
            number = stage.first_round + done
            if isinstance(model, AdapterModel):
                task = "classify" if chosen.counted is None else "continue"
                set_trainable(model, method=plan.spec.lora.method, task=task, number=number)
            spend = train_round(
                model,
                chosen,
                settings=prepare_settings(plan, number),
                privacy=stage.privacy,
                spend=spend,
                steps_before=done * stage.steps_per_round,
                allowed=allowed,
            ).spend
            yield number


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
    return prepare_model(plan, kind, load_base(locate_model(plan.spec.model.source), words=plan.writes(kind)))


def _open(run_folder: Path) -> tuple[Scenario, list[Bench]]:
    scenario = open_scenario(run_folder)
    plan, folder = scenario.plan, locate_model(scenario.plan.spec.model.source)
    benches = []
    for site in scenario.spec.sites:
        data = read_site_data(scenario, site, synthetic=synthetic_folder(run_folder))
        task, cut = plan.spec.kinds[site.kind], plan.spec.model.max_tokens
        both = units_for(plan, site.kind, data.train), data.held_back
        train, held_back = (
            tokenise(records, folder, task=task.task, labels=task.labels, max_tokens=cut) for records in both
        )
        domain = None
        if plan.stages[0].task is not None:
            first, second = (tokenise(records, folder, task="continue", max_tokens=cut) for records in both)
            domain = first, second
        benches.append(Bench(site.name, site.kind, train, held_back, domain))
    return scenario, benches
