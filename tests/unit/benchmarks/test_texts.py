"""The texts that figures are measured on are long, real, different from each other and the same every time."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.texts import PASSWORD, RESTAURANT, documents, english_reference, reference_with_facts
from sale_prefill_server.models import DEFAULT_MODEL, resolve_model


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(resolve_model(DEFAULT_MODEL).path)


def test_there_are_three_different_documents_of_the_length_asked_for(tokenizer: Any) -> None:
    found = documents(7680, tokenizer)
    assert [len(ids) for ids in found.values()] == [7680] * 3
    assert len({tuple(ids[:64]) for ids in found.values()}) == 3
    assert documents(7680, tokenizer) == found


def test_a_shorter_piece_is_the_beginning_of_a_longer_one(tokenizer: Any) -> None:
    assert english_reference(3000, tokenizer)[:1000] == english_reference(1000, tokenizer)


def test_an_offset_starts_at_a_paragraph_elsewhere(tokenizer: Any) -> None:
    piece = tokenizer.decode(english_reference(500, tokenizer, offset=200_000))
    assert piece not in tokenizer.decode(english_reference(2000, tokenizer))
    assert not piece.startswith("\n")


def test_more_tokens_than_there_are_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="ask for fewer than 2000"):
        english_reference(2000, tokenizer, offset=750_000)


def test_facts_stand_between_paragraphs_in_order(tokenizer: Any) -> None:
    document = reference_with_facts(3000, tokenizer, [PASSWORD, RESTAURANT])
    paragraphs = document.split("\n\n")
    places = [paragraphs.index(fact.sentence) / len(paragraphs) for fact in (PASSWORD, RESTAURANT)]
    assert places == pytest.approx([1 / 3, 2 / 3], abs=0.05)
