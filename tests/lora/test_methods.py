import subprocess
import sys

import pytest

from fedseek.lora.methods import method_problems, parts_of_round, parts_trained

METHODS = ("ffa", "both", "alternating", "prefix", "prompt")


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_what_can_be_trained_has_no_problem(method, private):
    assert list(method_problems(method, private=private)) == []


@pytest.mark.parametrize(
    ("method", "private", "reason"),
    [
        ("dora", True, "no record can be clipped"),
        ("dora", False, "all sites must sign the same adapter"),
        ("full", True, "no adapter file can hold"),
        ("full", False, "no adapter file can hold"),
        ("ia3", True, "unknown method 'ia3'"),
    ],
)
def test_what_cannot_is_refused_with_the_reason(method, private, reason):
    (problem,) = method_problems(method, private=private)
    assert reason in problem


@pytest.mark.parametrize("method", [*METHODS, "full"])
def test_a_round_trains_nothing_that_no_layout_has(method):
    rounds = {part for number in (1, 2, 3) for part in parts_of_round(method, number)}
    assert rounds == set(parts_trained(method))


def test_no_torch_is_needed():
    script = "import sys, fedseek.lora.methods, fedseek.lora.targets; print(*[n for n in ('torch', 'peft') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
