"""Every statement that the room checks is registered once, complete and readable."""

import pytest

from geomlib.lab import claims

EXPECTED = [f"INCRT-{number}" for number in range(1, 21)]
EMPIRICAL = {f"INCRT-{number}" for number in (6, 13, 14, 17, 18, 19, 20)}
INCRT = {name: entry for name, entry in claims.registry().items() if entry.room == "incrt"}


def test_all_claims_are_registered():
    assert sorted(INCRT) == sorted(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_claim_is_one_sentence_with_its_source(name):
    entry = INCRT[name]
    assert entry.paper in {"2604.01880", "2604.01740", "2604.10703"}
    assert entry.statement[0].isupper()
    assert entry.statement.endswith(".")
    assert len(entry.statement.split()) >= 8
    assert entry.source


@pytest.mark.parametrize("name", EXPECTED)
def test_what_is_proved_is_a_law_and_what_is_measured_is_not(name):
    assert INCRT[name].kind == ("empirical" if name in EMPIRICAL else "law")
