"""The course's questions, answered: the table of data/results/answers.md is that of
data/toybench_results.json, and the directions hold."""

import json
import re

import pytest
from store_answers import ANSWERS, QUESTIONS, RATE, RESULTS, summary

import dbcore
from dbcore.models.base import recommended
from dbcore.toybench.bench import read_setting


@pytest.fixture(scope="module")
def answers():
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def test_the_table_has_the_answers_that_were_stored(answers):
    assert list(answers) == list(QUESTIONS)
    assert summary(answers) in ANSWERS.read_text(encoding="utf-8")


@pytest.mark.parametrize("question", QUESTIONS)
def test_every_way_to_train_is_one_that_toybench_takes_and_has_its_row(question, answers):
    for name, options in QUESTIONS[question].items():
        assert read_setting(f"{name}={options}")[0] == name
        assert f"--vary {name}=" in answers[question]["command"].replace("'", "").replace('"', "")
    assert all(f" {name} |" in answers[question]["table"] for name in QUESTIONS[question])


def test_the_shared_rate_is_the_one_that_the_unet_is_trained_at():
    assert float(RATE) == recommended(dbcore.TOY_BASE)["learning_rate"]


def test_prior_preservation_has_the_papers_direction(answers):
    """Ruiz et al. 2023, table 4: PRES falls by far. Their price in fidelity is not seen here."""
    mean, apart = answers["prior"]["mean"], answers["prior"]["differences"]["without"]
    assert (mean["with"]["PRES, subject encoder"][0] < mean["without"]["PRES, subject encoder"][0]
            - 0.2)
    assert apart["PRES, subject encoder"][1] > 0
    assert apart["subject, subject encoder"][1] < 0 < apart["subject, subject encoder"][2]


def test_every_interval_in_words_is_one_that_was_stored(answers):
    words = ANSWERS.read_text(encoding="utf-8").partition("## All of it")[0]
    told = set(re.findall(r"(\d\.\d\d)\s+\[(\d\.\d\d), (\d\.\d\d)\]", words))
    differences = [value for answer in answers.values() for way in answer["differences"].values()
                   for value in way.values()]
    found = {tuple(sorted(f"{abs(x):.2f}" for x in value)) for value in differences if value}
    assert len(told) >= 4
    assert not [each for each in told if tuple(sorted(each)) not in found]
