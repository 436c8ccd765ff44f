"""Shared by all tests: a base model of a few kilobytes, plans and records that fit it, and a whole cohort to play with.

The model is random and tiny but real: config, safetensors and a tokenizer that knows Chinese characters, loaded by the
same code as any other. The cohort is real sites and the real coordinator; only the network between them is a loop.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# how long an example takes says something of the machine, which others share; what must be fast is measured in benchmarks/
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

BANK_WORDS = {"欺诈": ("汇款", "transfer now"), "正常": ("余额", "balance please")}
HOSPITAL_WORDS = {"急诊": ("胸痛", "chest pain"), "普通": ("复查", "follow-up"), "自理": ("感冒", "a cold")}
WORDS = {"bank": BANK_WORDS, "hospital": HOSPITAL_WORDS}
SITES = (("北岸银行", "bank"), ("harbour-bank", "bank"), ("仁济医院", "hospital"), ("st-anna", "hospital"))
RUN = "试运行-1"

Alter = Callable[[str, int, str, bytes], bytes]  # phase, round, site, message -> message


@pytest.fixture
def tmp_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As pytest's own, without the name of the test in it: a Unix socket's whole path must fit into 107 bytes."""
    return tmp_path_factory.mktemp("t")


def write_tiny_model(folder: Path, *, seed: int = 0) -> Path:
    """A BERT of two layers and 16 dimensions with random weights, in the files a real one comes in."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    texts = "".join(word for kind in WORDS.values() for words in kind.values() for word in words)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({*texts, *"0123456789客患号者"} - {" "})]
    vocabulary += [f"##{token}" for token in vocabulary[5:]]
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        BertModel(config).save_pretrained(folder)
    BertTokenizer(vocab={token: number for number, token in enumerate(vocabulary)}).save_pretrained(folder)
    return folder


def tiny_rows(kind: str, count: int, *, unit: str = "unit") -> list[dict[str, str]]:
    """Rows with Chinese and English text; two rows a unit."""
    labels = list(WORDS[kind])
    rows = []
    for number in range(count):
        label = labels[number % len(labels)]
        rows.append({"text": f"{' '.join(WORDS[kind][label])} {number}", "label": label, unit: f"客{number // 2}"})
    return rows


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the base model."""
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny-bert")


@pytest.fixture(scope="session")
def tiny_causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a causal language model with a chat template; ``language_models.save_tiny_causal`` writes others."""
    from language_models import save_tiny_causal

    return save_tiny_causal(tmp_path_factory.mktemp("model") / "tiny-qwen2")


@pytest.fixture(scope="session")
def make_tiny_model() -> Callable[..., Path]:
    """Write another such model: ``make_tiny_model(folder, seed=1)``."""
    return write_tiny_model


@pytest.fixture(scope="session")
def tiny_plan_document(tiny_model: Path) -> Callable[..., dict[str, Any]]:
    """The document of a plan; keyword arguments replace keys of its tables: ``make(training={"rounds": 3})``."""
    from fedseek.lora.source import model_digest

    def make(*, private: bool = False, **changes: Any) -> dict[str, Any]:
        document: dict[str, Any] = {
            "name": "tiny",
            "model": {"source": f"path:{tiny_model}", "sha256": model_digest(tiny_model), "max_tokens": 16},
            "kinds": {
                "bank": {"labels": list(BANK_WORDS)},
                "hospital": {"labels": list(HOSPITAL_WORDS), "unit": "patient"},
            },
            "lora": {"rank": 2, "alpha": 4.0, "target_modules": ["query", "value"]},
            "training": {
                "rounds": 2,
                "steps_per_round": 2,
                "sampling_probability": 0.5,
                "learning_rate": 0.01,
                "head_learning_rate": 0.05,
            },
            "privacy": {"mechanism": "dp-sgd", "epsilon": 8.0, "delta": 1e-3} if private else {"mechanism": "none"},
            "cohort": {"max_sites": 4, "min_contributors": 2},
        }
        for key, value in changes.items():
            document[key] = {**document[key], **value} if isinstance(value, dict) and key in document else value
        return document

    return make


@pytest.fixture(scope="session")
def tiny_plan(tiny_plan_document: Callable[..., dict[str, Any]]) -> Callable[..., Any]:
    """A checked ``Plan``; takes what ``tiny_plan_document`` takes."""
    from fedseek.plan import check_plan, parse_spec

    return lambda **changes: check_plan(parse_spec(tiny_plan_document(**changes)))


@pytest.fixture(scope="session")
def tiny_records() -> Callable[..., Any]:
    """``Records`` of a kind: ``make("bank", 12)``; ``unit=None`` leaves the unit column out."""
    from fedseek.records import Columns, to_records

    def make(kind: str, count: int, *, unit: str | None = "unit") -> Any:
        columns = Columns("text", "label", unit)
        return to_records(tiny_rows(kind, count), columns, labels=list(WORDS[kind]), source="made up")

    return make


@pytest.fixture(scope="session")
def tiny_data(tiny_records: Callable[..., Any]) -> Callable[..., Any]:
    """``SiteData`` of a kind; ``unit=None`` leaves the unit column out."""
    from fedseek_site.admission import SiteData

    return lambda kind, **options: SiteData(tiny_records(kind, 12, **options), tiny_records(kind, 6, **options))


def to_toml(document: dict[str, Any], prefix: str = "") -> str:
    """TOML of plain values, tables and lists of tables: JSON writes plain values as TOML does."""
    tables = {key: value for key, value in document.items() if isinstance(value, dict)}
    arrays = {
        key: value
        for key, value in document.items()
        if isinstance(value, list) and value and isinstance(value[0], dict)
    }
    plain = {key: value for key, value in document.items() if key not in tables and key not in arrays}
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in plain.items()]
    lines += [f"[{prefix}{key}]\n{to_toml(value, f'{prefix}{key}.')}" for key, value in tables.items()]
    lines += [f"[[{prefix}{key}]]\n{to_toml(value)}" for key, values in arrays.items() for value in values]
    return "".join(lines)


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """As JSONL, CSV or Parquet, by the extension."""
    import pyarrow
    import pyarrow.parquet

    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return
    with path.open("w", encoding="utf-8", newline="") as stream:
        if path.suffix == ".jsonl":
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


@pytest.fixture
def write_tiny_scenario(tiny_plan_document: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., Path]:
    """Write a scenario file and its data in three formats; takes what ``tiny_plan_document`` takes.

    ``rows`` replaces the training rows of a site, by name; ``simulation`` replaces keys of that table.
    """

    def write(
        *, rows: dict[str, list[dict[str, str]]] | None = None, simulation: dict[str, Any] | None = None, **changes: Any
    ) -> Path:
        folder = tmp_path / "数据"
        folder.mkdir(exist_ok=True)
        sites = []
        for (name, kind), extension in zip(SITES, ("jsonl", "csv", "parquet", "jsonl"), strict=True):
            train, held_back = folder / f"{name}.{extension}", folder / f"{name}-held-back.{extension}"
            write_rows(train, (rows or {}).get(name) or tiny_rows(kind, 24))
            write_rows(held_back, tiny_rows(kind, 12))
            sites.append({"name": name, "kind": kind, "train": str(train), "held_back": str(held_back), "unit": "unit"})
        document = {
            "simulation": {"workers": 2, "baselines": [], **(simulation or {})},
            "plan": tiny_plan_document(**changes),
            "sites": sites,
        }
        scenario = tmp_path / "两家银行.toml"
        scenario.write_text(to_toml(document), "utf-8")
        return scenario

    return write


@dataclass
class Cohort:
    """Two banks and two hospitals with the coordinator between them; ``seen`` is every message it sent or got."""

    coordinator: Any
    services: dict[int, Any]
    folder: Path
    events: dict[str, list[dict[str, Any]]]
    reopen: Callable[[Any], Any]
    seen: list[bytes] = field(default_factory=list)

    def site(self, name: str) -> Any:
        return next(service for service in self.services.values() if service.identity.name == name)

    def restart(self, name: str) -> None:
        """Forget everything that this site's process had in memory; its folder is all that is left."""
        node = next(node for node, service in self.services.items() if service.identity.name == name)
        self.services[node] = self.reopen(self.services[node])

    def play(
        self,
        *,
        request: Alter | None = None,
        reply: Alter | None = None,
        away: Callable[[str, int, str], bool] = lambda phase, number, site: False,
        until: tuple[str, int] | None = None,
    ):
        """Play the run, as the Flower driver does: a reply that is refused counts as none.

        ``request`` and ``reply`` may alter messages on their way; what ``reply`` turns into ``b""`` is lost. A site that
        is ``away`` in a phase is not reached. Stops before phase ``until`` and returns its exchange.
        """
        from fedseek.errors import CustodyError, MessageError

        for exchange in self.coordinator.play(lambda: list(self.services)):
            phase, number = exchange.phase, exchange.round
            if (phase, number) == until:
                return exchange
            for node, asked in exchange.requests.items():
                name = self.services[node].identity.name
                if away(phase, number, name):
                    continue
                sent = request(phase, number, name, asked) if request else asked
                answer = self.services[node].handle(sent)
                got = reply(phase, number, name, answer) if reply else answer
                self.seen += [asked, got]
                if got == b"":
                    continue
                try:
                    self.coordinator.receive(node, got)
                except (MessageError, CustodyError) as error:
                    self.coordinator.reject(node, error)
        return None


@pytest.fixture
def make_cohort(tiny_plan: Callable[..., Any], tiny_data: Callable[..., Any], tmp_path: Path) -> Callable[..., Cohort]:
    """A fresh cohort; takes what ``tiny_plan`` takes, or ``plan=``, and ``data=`` to replace a site's data."""
    from fedseek.identity.keys import SiteIdentity
    from fedseek.identity.roster import Roster
    from fedseek.identity.vault import StorageKey
    from fedseek_server.coordinator import Coordinator
    from fedseek_site.ledger import Ledger
    from fedseek_site.service import SiteService

    def make(
        *,
        plan: Any = None,
        data: dict[str, Any] | None = None,
        run: str = RUN,
        sites: tuple[tuple[str, str], ...] = SITES,
        **changes: Any,
    ) -> Cohort:
        events: dict[str, list[dict[str, Any]]] = {name: [] for name, _ in sites}
        identities = {name: SiteIdentity.generate(name, kind) for name, kind in sites}
        roster = Roster.of(identity.public() for identity in identities.values())
        storage_key = StorageKey.generate()
        for name in identities:
            (tmp_path / name).mkdir()
        ledgers = {
            name: Ledger(tmp_path / name / "ledger.sqlite3", storage_key, dataset="records") for name in identities
        }

        def open_service(identity: Any) -> Any:
            name = identity.name
            return SiteService(
                identity,
                (data or {}).get(name) or tiny_data(identity.kind),
                roster=roster,
                state_folder=tmp_path / name / "state",
                storage_key=storage_key,
                ledger=ledgers[name],
                release_folder=tmp_path / name / "release",
                observe=events[name].append,
            )

        def reopen(service: Any) -> Any:
            service.close()
            return open_service(service.identity)

        services = {100 + number: open_service(identity) for number, identity in enumerate(identities.values())}
        told: list[dict[str, Any]] = []
        coordinator = Coordinator(plan or tiny_plan(**changes), roster, run=run, observe=told.append)
        return Cohort(coordinator, services, tmp_path, {**events, "coordinator": told}, reopen)

    return make
