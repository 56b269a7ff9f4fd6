"""Every statement of the room is registered once, complete and readable."""

import pytest

from geomlib.lab import claims

PARTS = {
    "A": range(1, 8),
    "B": range(1, 9),
    "S": range(1, 5),
    "P": range(4),
    "R": range(1, 9),
    "C": range(1, 7),
}
LABELLED = [f"SGN-{part}{number}" for part, numbers in PARTS.items() for number in numbers]
ABSTRACT = [f"SGN-{letter}" for letter in "abcdefg"]
ROOM = {name: entry for name, entry in claims.registry().items() if entry.room == "stationary"}


def test_all_claims_of_the_room_are_registered():
    assert sorted(ROOM) == sorted(LABELLED + ABSTRACT)


@pytest.mark.parametrize("name", LABELLED + ABSTRACT)
def test_a_claim_is_one_sentence_with_its_source(name):
    entry = ROOM[name]
    assert entry.paper == "2507.20088"
    assert entry.statement[0].isupper()
    assert entry.statement.endswith(".")
    assert len(entry.statement.split()) >= 8
    assert entry.source


@pytest.mark.parametrize("name", ABSTRACT)
def test_a_sentence_of_the_abstract_names_claims_that_it_rests_on(name):
    statement = ROOM[name].statement
    rests = [label for label in LABELLED if f"{label}" in statement]
    assert "rests on" in statement
    assert rests


@pytest.mark.parametrize("name", LABELLED)
def test_only_the_cost_is_a_matter_of_measurement(name):
    assert ROOM[name].kind == ("empirical" if name == "SGN-C6" else "law")
