"""Token ids: what is accepted, how they are read, and their digest."""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sale_prefill_client import parse_token_ids, token_digest
from sale_prefill_client.errors import InvalidTokenError
from sale_prefill_client.tokens import token_array

IDS = st.lists(st.integers(0, 2**32 - 1), max_size=50)


@given(IDS)
def test_the_digest_is_sha256_of_little_endian_uint32(ids: list[int]) -> None:
    assert token_digest(ids) == hashlib.sha256(struct.pack(f"<{len(ids)}I", *ids)).digest()


@given(IDS, st.sampled_from([" ", ",", ", ", "\n", "\t "]))
def test_ids_are_read_as_they_were_written(ids: list[int], separator: str) -> None:
    assert parse_token_ids(separator.join(map(str, ids))) == ids
    assert parse_token_ids(f" {ids} ") == ids


@pytest.mark.parametrize("ids", [[1, 2], (1, 2), range(1, 3), np.array([1, 2], np.int16), torch.tensor([1, 2])])
def test_any_flat_sequence_of_integers_will_do(ids: Any) -> None:
    assert token_array(ids).tolist() == [1, 2]
    assert token_array(ids).dtype == np.uint32


@pytest.mark.parametrize(
    ("ids", "index"), [([5, -1], 1), ([2**32], 0), ([1, 2.0], 1), (["7"], 0), ([True], 0), ([2**70], 0)]
)
def test_an_entry_that_is_no_token_id_is_named(ids: Any, index: int) -> None:
    with pytest.raises(InvalidTokenError, match=rf"token_ids\[{index}\] is") as caught:
        token_array(ids)
    assert caught.value.metadata["index"] == str(index)


@pytest.mark.parametrize("ids", [[[1, 2]], [[1], [2, 3]], 5])
def test_nested_sequences_are_refused(ids: Any) -> None:
    with pytest.raises(ValueError, match="one flat sequence"):
        token_array(ids)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 two", "entry 1 is 'two'"),
        ("-1", "'-1'"),
        ("[1, 2.5]", "entry 1 is 2.5"),
        ("[1,", "not valid JSON"),
        ("²", "'²'"),
        ("[true]", "True"),
    ],
)
def test_text_that_holds_no_ids_is_refused_by_its_first_bad_entry(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_token_ids(text)
