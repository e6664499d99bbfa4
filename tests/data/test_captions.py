"""Captions: what is read, what is refused, and what a caption becomes in a step."""

import pytest
import torch

from lorakit.data import captions
from lorakit.errors import DataError


def test_decoding() -> None:
    assert captions.decoded("\ufeff a cat,\r\n  with a  é\n".encode(), "a.txt") == "a cat, with a é"
    assert captions.decoded(b"", "a.txt") == ""


@pytest.mark.parametrize(("data", "reason"), [(b"a \xff cat", "not UTF-8"), (b"x" * (2**20 + 1), "1 MiB")])
def test_bad_captions(data: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=reason) as caught:
        captions.decoded(data, "a.txt")
    assert caught.value.where == "a.txt"


@pytest.mark.parametrize("value", [None, 3, ["a"], {"a": 1}])
def test_only_texts_are_captions(value: object) -> None:
    with pytest.raises(DataError, match="not a text"):
        captions.clean(value, "m.jsonl:3")


def test_trigger() -> None:
    assert captions.with_trigger("a cat", "zwx") == "zwx, a cat"
    assert captions.with_trigger("a cat", "") == "a cat"
    assert captions.with_trigger("", "zwx") == "zwx"
    assert captions.with_trigger("zwx , a cat", "zwx") == "zwx , a cat"
    assert captions.with_trigger("zwxy, a cat", "zwx") == "zwx, zwxy, a cat"
    assert (
        captions.with_trigger("sks dog, studio photo, grass", "sks dog, studio photo") == "sks dog, studio photo, grass"
    )
    assert captions.with_trigger("sks dog, grass", "sks dog, photo") == "sks dog, photo, sks dog, grass"


def test_shuffling_keeps_the_first_tags_and_loses_none() -> None:
    tags = [f"tag{i}" for i in range(6)]
    seen = set()
    for seed in range(200):
        shuffled = captions.shuffle_tags(",  ".join(tags), 2, torch.Generator().manual_seed(seed)).split(", ")
        assert shuffled[:2] == tags[:2]
        assert sorted(shuffled) == tags
        seen.add(tuple(shuffled[2:]))
    assert len(seen) == 24
    assert captions.shuffle_tags("one", 3, torch.Generator()) == "one"
