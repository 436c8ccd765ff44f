import builtins
import inspect
import re

import pytest

from fedseek import errors
from fedseek.errors import FedseekError, GuardTripped, InvalidPlan, PlanRefused

CLASSES = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, FedseekError)]
LEAVES = [cls for cls in CLASSES if not cls.__subclasses__()]


def drawn_tree() -> dict[str, tuple[str, int]]:
    """Class name -> (parent, exit code), as the module's docstring draws them."""
    found, family, code = {}, "", 0
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^    (│   )?[├└]── (\w+)(?:\s+(\d))?", line)
        if match is None:
            continue
        inner, name, exit_code = match.groups()
        if not inner:
            family, code = name, int(exit_code)
        found[name] = (family if inner else "FedseekError", code)
    return found


def test_the_tree_in_the_docstring_is_the_tree_of_the_classes():
    real = {cls.__name__: (cls.__bases__[0].__name__, cls.exit_code) for cls in CLASSES if cls is not FedseekError}
    assert drawn_tree() == real
    assert FedseekError.exit_code == 1


def test_exit_codes_leave_click_and_signals_alone():
    assert {cls.exit_code for cls in CLASSES} == {1, 3, 4, 5, 6, 7, 8}


def test_the_code_told_to_others_is_the_class_name_and_no_text():
    error = errors.InvalidRecords("/data/账户.csv, line 3: 张三", hint="open it")
    assert error.code == "InvalidRecords"
    assert str(error) == "/data/账户.csv, line 3: 张三\n  hint: open it"
    assert str(errors.InvalidRecords("text")) == "text"


def test_an_invalid_plan_lists_every_problem_and_counts_them():
    assert InvalidPlan(["甲", "b"], source="计划.toml").message == "计划.toml: 2 problems\n  - 甲\n  - b"
    assert InvalidPlan(["a"]).message == "plan: 1 problem\n  - a"
    assert InvalidPlan(["a"]).problems == ("a",)


def test_refusal_and_guard_keep_the_rule_and_the_name():
    refused, tripped = PlanRefused("仁济医院", "delta"), GuardTripped("noise_added", "none", hint="add")
    assert (refused.site, refused.rule, refused.exit_code) == ("仁济医院", "delta", 3)
    assert "仁济医院" in refused.message
    assert (tripped.guard, tripped.exit_code, tripped.hint) == ("noise_added", 5, "add")
    assert "noise_added" in tripped.message


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: leaf.__name__)
def test_a_leaf_shadows_no_builtin_and_says_what_it_means(leaf):
    assert not hasattr(builtins, leaf.__name__)
    assert leaf.__doc__
