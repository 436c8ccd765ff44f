"""The adapter's files, read without torch: the same tensors and digests as the model has, and nothing else is taken."""

import subprocess
import sys
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from fedseek.errors import Malformed
from fedseek.lora.adapter_file import largest_value, read_adapter, trained_tensors
from fedseek.lora.export import adapter_weights
from fedseek.lora.load import load_base
from fedseek.lora.model import LoraParams, adapter_tensors, build_model, load_tensors

A, B = "x.lora_A.weight", "x.lora_B.weight"


def matrices(**changes):
    found = {A: np.ones((2, 3), np.float32), B: np.zeros((3, 2), np.float32), **changes}
    return {name: value for name, value in found.items() if value is not None}


@pytest.mark.parametrize("words", [False, True])
@pytest.mark.parametrize("method", ["ffa", "both", "alternating"])
def test_the_trained_tensors_of_the_file_are_those_of_the_model(tiny_model, method, words):
    params = LoraParams(method, rank=2, alpha=4.0, target_modules=("query", "value"), layers=None, seed=11)
    model = build_model(load_base(tiny_model), params, num_labels=3, head_seed=5)
    wanted = {name: np.full(value.shape, 0.5, np.float32) for name, value in adapter_tensors(model).items()}
    load_tensors(model, wanted)
    tensors = read_adapter(adapter_weights(model, words=words))
    got = trained_tensors(tensors, method=method, words=words)
    assert got.keys() == wanted.keys()
    assert all(np.array_equal(got[name], wanted[name]) for name in wanted)
    assert largest_value(tensors, seed=11) == 0.5


def test_an_adapter_that_did_not_move_has_only_zeros_in_b():
    assert largest_value(matrices(), seed=1) == 0.0
    assert largest_value(matrices(**{B: np.full((3, 2), -2.0, np.float32)}), seed=1) == 2.0


@pytest.mark.parametrize("name", [A, B])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_seen_wherever_it_is(name, value):
    tensors = matrices(**{B: np.ones((3, 2), np.float32)})
    tensors[name][0, 0] = value
    assert not np.isfinite(largest_value(tensors, seed=11))


OTHER = {
    "another name": {"x.weight": np.ones((1, 1), np.float32)},
    "another type": {B: np.ones((3, 2), np.float64)},
    "a number": {B: np.ones((), np.float32)},
    "no lora_B": {B: None},
}


@pytest.mark.parametrize("changes", OTHER.values(), ids=list(OTHER))
def test_what_is_no_adapter_is_refused(changes):
    with pytest.raises(Malformed, match=r"adapter_model\.safetensors"):
        read_adapter(save(matrices(**changes)))


@given(data=st.binary(max_size=300))
def test_any_bytes_are_refused(data):
    with pytest.raises(Malformed):
        read_adapter(data)


@given(place=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_an_altered_file_is_read_or_refused(place, bit):
    data = bytearray(save(matrices()))
    data[place % len(data)] ^= 1 << bit
    with suppress(Malformed):
        read_adapter(bytes(data))


def test_no_torch_is_needed():
    heavy = ("torch", "peft", "transformers")
    script = f"import sys, fedseek.verification; print(*[name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
