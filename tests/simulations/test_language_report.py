"""What a report says of sites that write: perplexity against local-only, broken by stage, and scores of answers."""

import math

import pytest

from simulations.charts import lines_by_round
from simulations.report import headline, render_report
from simulations.summary import Summary
from simulations.verdicts import with_verdicts

HOSPITALS = ("st-anna-hospital", "renji-hospital")
BANKS = ("northern-bank", "harbour-bank")


@pytest.fixture
def written(made_up_figures):
    """A made-up run in which ``sites`` write, in two stages: texts in round 1, answers in rounds 2 and 3."""

    def make(sites=BANKS + HOSPITALS, *, federated=(5.0, 4.0, 3.0, 2.0), local=(5.0, 4.0, 3.5, 2.5), private=False):
        figures = made_up_figures(private=private)
        for site in figures["sites"]:
            site["task"] = "instruct" if site["name"] in sites else "classify"
        for entry, loss in zip(figures["rounds"], federated, strict=True):
            for site in entry["sites"]:
                if site["site"] in sites:
                    site |= {
                        "task": "instruct" if entry["round"] else "continue",
                        "loss": loss,
                        "perplexity": math.exp(loss),
                    }
        lines = figures["baselines"]
        for name in ("local_only", "centralised", "linear_probe", "dp_linear_probe"):
            lines[name] = {
                site: line for site, line in lines[name].items() if site not in sites or name == "local_only"
            }
        lines |= {"local_only_loss": dict.fromkeys(sites, local), "base_loss": dict.fromkeys(sites, 3.2)}
        figures["stages"] = [
            {"task": "continue", "first_round": 1, "rounds": 1, "steps_per_round": 4},
            {"task": None, "first_round": 2, "rounds": 2, "steps_per_round": 4},
        ]
        scores = {"exact": 0.25, "f1": 0.5, "rouge_l": 0.375, "count": 8}
        figures["answers"] = [{"site": sites[-1], "base": scores | {"exact": 0.0}, "adapter": scores}]
        return with_verdicts(Summary.model_validate(figures))

    return make


def claim(summary, start):
    return next(verdict for verdict in summary.verdicts if verdict.claim.startswith(start))


def test_lower_perplexity_is_the_better_one(written):
    better = written()
    verdict = claim(better, "Federated perplexity below local-only")
    assert verdict.met
    assert verdict.figure == pytest.approx(math.exp(-0.5))
    assert headline(better) == "At all 4 sites, the shared adapter beats training alone."
    worse = written(federated=(5.0, 4.0, 3.0, 2.6))
    assert not claim(worse, "Federated perplexity").met
    assert headline(worse) == "The shared adapter beats training alone at none of 4 sites."
    assert not [each for each in better.verdicts if "smallest gain" in each.claim], "token accuracy is not compared"


def test_the_report_shows_perplexity_of_every_way_and_the_scores_of_answers(written):
    page = render_report(written())
    assert "Perplexity by round" in page
    for loss in (3.2, 2.5, 2.0):  # base model, local only, federated
        assert f"<td>{math.exp(loss):.1f}</td>" in page or f"{math.exp(loss):.3f}" in page
    assert "Mean perplexity" in page
    assert "base model" in page
    assert "<td>0.250</td>" in page
    assert "Rounds 1 to 1 learn the next token of the sites' own texts, rounds 2 to 3" in page.replace("&#39;", "'")
    assert "linear probe" not in page


def test_kinds_of_both_sorts_stand_in_tables_of_their_own(written):
    page = render_report(written(HOSPITALS, private=True))
    assert "Perplexity or utility by round" in page
    assert "private linear probe" in page, "the banks classify"
    assert page.count('<table class="outcome">') > 2
    summary = written(HOSPITALS)
    assert claim(summary, "Federated above local-only").figure == pytest.approx(0.86 - 0.62)
    assert claim(summary, "Federated perplexity below local-only").met


def test_a_private_run_of_sites_that_write_misses_no_probe(written):
    assert "No private linear probe was run" not in render_report(written(private=True))


def test_lines_are_broken_where_a_stage_begins_and_its_name_is_written():
    values = [5.0, 4.0, 3.0, 2.0]
    whole = lines_by_round("c", "t", [("federated", "federated", values)])
    broken = lines_by_round("c", "t", [("federated", "federated", values)], stages=[(0, "texts"), (2, "answers")])
    assert "texts" in broken
    assert "answers" in broken
    assert broken.count("var(--federated)") == whole.count("var(--federated)") + 1
    assert lines_by_round("c", "t", [("federated", "federated", values)], stages=[]) == whole
