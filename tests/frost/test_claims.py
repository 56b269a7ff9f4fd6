"""Every statement of the paper is registered once, complete and readable."""

import pytest

from geomlib.lab import claims

EXPECTED = [f"FROST-{number}" for number in [*range(1, 19), "2b", "7b"]]
PROVED = {f"FROST-{number}" for number in [*range(1, 11), 12, "2b", "7b"]}
FROST = {name: entry for name, entry in claims.registry().items() if entry.room == "frost"}


def test_all_claims_of_the_paper_are_registered():
    assert sorted(FROST) == sorted(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_claim_is_one_sentence_with_its_source(name):
    entry = FROST[name]
    assert entry.paper == "2601.19551"
    assert entry.statement[0].isupper()
    assert entry.statement.endswith(".")
    assert len(entry.statement.split()) >= 8
    assert entry.source


@pytest.mark.parametrize("name", EXPECTED)
def test_what_is_proved_is_a_law_and_what_is_measured_is_not(name):
    assert FROST[name].kind == ("law" if name in PROVED else "empirical")
