"""Models of a hub: only those already here are found, by commit; only what is wanted is fetched, when told to."""

import httpx2 as httpx  # what huggingface_hub speaks
import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from fedseek.errors import Unreachable, WrongModel
from fedseek.lora import hub
from fedseek.lora.source import locate_model

COMMIT = "0123456789abcdef" * 2 + "01234567"
SOURCE = f"hub:some-owner/a.Model_7B@{COMMIT}"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub, and no way to reach the hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))

    def no_network(*arguments, **options):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub.file_download, "hf_hub_download", no_network)
    return tmp_path


def put(cache, source=SOURCE, *, revision=COMMIT):
    repository = source.removeprefix("hub:").partition("@")[0]
    folder = cache / f"models--{repository.replace('/', '--')}" / "snapshots" / revision
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_a_model_in_the_cache_is_found_by_its_commit(cache):
    folder = put(cache)
    assert locate_model(SOURCE) == folder


def test_a_model_that_is_not_in_the_cache_is_not_fetched(cache):
    put(cache, revision="f" * 40)
    with pytest.raises(WrongModel, match="in the local cache") as caught:
        locate_model(SOURCE)
    assert caught.value.hint == f"fedseek model fetch {SOURCE}"


@pytest.mark.parametrize(
    "rest",
    [
        "owner/name",
        "owner/name@main",
        f"owner/name@{COMMIT[:39]}",
        f"owner/name@{COMMIT}0",
        f"owner/name@{COMMIT.upper()}",
        f"name@{COMMIT}",
        f"a/b/c@{COMMIT}",
        f"../b@{COMMIT}",
        f"a/..@{COMMIT}",
        f"a/b..c@{COMMIT}",
        f"a--b/c@{COMMIT}",
        f"-a/c@{COMMIT}",
        f"模型/c@{COMMIT}",
        f"a/b@{COMMIT}\n",
        "",
    ],
)
@pytest.mark.parametrize("look", [hub.cached_model, hub.fetch_model])
def test_only_a_repository_at_a_whole_commit_is_a_model(cache, look, rest):
    with pytest.raises(WrongModel, match="no model at") as caught:
        look(rest)
    assert "all 40 digits" in caught.value.hint


def test_only_weights_configuration_and_tokenizer_of_the_top_folder_are_fetched(monkeypatch, tmp_path):
    asked = {}

    def download(repository, **options):
        asked.update(options, repository=repository)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.fetch_model(SOURCE.removeprefix("hub:")) == tmp_path
    assert (asked["repository"], asked["revision"]) == ("some-owner/a.Model_7B", COMMIT)
    there = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "pytorch_model.bin",
        "modeling_mine.py",
        "model.gguf",
        "training_args.bin",
        "onnx/model.safetensors",
        "sub/config.json",
        "README.md",
    ]
    filtered = huggingface_hub.utils.filter_repo_objects(
        there, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert list(filtered) == there[:6]


def refusal(status, kind=HfHubHTTPError):
    response = httpx.Response(status, request=httpx.Request("GET", "https://hub"))
    return kind("no", response=response)


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (refusal(404, RepositoryNotFoundError), WrongModel),
        (refusal(503), Unreachable),
        (ConnectionError("offline"), Unreachable),
        (TimeoutError(), Unreachable),
    ],
    ids=["not-there", "broken", "offline", "slow"],
)
def test_a_hub_that_says_no_is_told_apart_from_one_that_does_not_answer(monkeypatch, error, wanted):
    def download(*arguments, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(wanted, match="hub:some-owner"):
        hub.fetch_model(SOURCE.removeprefix("hub:"))
