"""The claims of the room are registered, readable, and honest about their source."""

from geomlib.lab.claims import registry


def of_the_room():
    return {name: claim for name, claim in registry().items() if claim.room == "weightspace"}


def test_sixteen_claims_are_registered_for_the_paper():
    claims = of_the_room()
    assert list(claims) == [f"WS-{number}" for number in range(1, 17)]
    assert {claim.paper for claim in claims.values()} == {"2503.14298"}


def test_every_statement_is_a_sentence_and_says_where_it_comes_from():
    for claim in of_the_room().values():
        assert claim.statement[0].isupper(), claim.id
        assert claim.statement.endswith("."), claim.id
        assert len(claim.statement.split()) >= 10, claim.id
        assert any(word in claim.source for word in ("abstract", "digest", "reconstructed")), claim.id


def test_only_what_measurement_alone_can_decide_is_empirical():
    empirical = [claim.id for claim in of_the_room().values() if claim.kind == "empirical"]
    assert empirical == ["WS-10", "WS-16"]
