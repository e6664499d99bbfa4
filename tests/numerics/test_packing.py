import pytest
import torch

from lorakit.numerics.packing import Packing


def test_documents_of_like_length_are_one_group():
    packing = Packing.of([10, 11, 11, 40, 41, 3], 5)
    assert [(group.start, group.shared, group.lengths) for group in packing.groups] == [
        (0, 0, (5,)), (5, 5, (10, 11, 11)), (37, 5, (40, 41)), (118, 5, (3,)),
    ]  # fmt: skip
    assert packing.tokens == 121


def test_refuses_a_document_without_a_token():
    with pytest.raises(ValueError, match="no packing"):
        Packing.of([4, 0])


@pytest.mark.parametrize("block", [None, 4])
@pytest.mark.parametrize("shared", [0, 3])
def test_each_number_stands_where_its_document_is(shared, block):
    heads, lengths = 2, [9, 8, 2]
    packing = Packing.of(lengths, shared)
    laid = packing.laid(heads, block)
    assert laid is packing.laid(heads, block)
    assert laid.queries[laid.own_queries].tolist() == list(range(packing.tokens * heads))
    assert laid.keys[laid.own_keys].tolist() == list(range(packing.tokens * heads))
    assert (laid.shared_keys is None) == (not shared)
    for document in laid.shared_keys if shared else ():
        assert laid.keys[document].tolist() == list(range(shared * heads))
    asked, held = [], []
    for group, places in zip(packing.groups, laid.groups, strict=True):
        count, longest = len(group.lengths), max(group.lengths)
        keys = laid.keys[places.keys].view(count, heads, -1)
        for number, length in enumerate(group.lengths):
            start = group.start + sum(group.lengths[:number])
            for head in range(heads):
                own = [place * heads + head for place in (*range(group.shared), *range(start, start + length))]
                assert keys[number, head, : len(own)].tolist() == own
                blocks = [laid.queries[b.queries].view(count, heads, -1)[number, head] for b in places.blocks]
                assert torch.cat(blocks)[:length].tolist() == own[group.shared :]
                held += own[group.shared :]
        asked += [b.queries.stop - b.queries.start for b in places.blocks]
        assert [b.first for b in places.blocks] == [*range(group.shared, group.shared + longest, block or longest)]
        assert places.blocks[-1].seen == keys.shape[-1] >= group.shared + longest
    assert sum(asked) == len(laid.queries)
    assert sorted(held) == list(range(packing.tokens * heads))
    repeats = len(laid.queries) - packing.tokens * heads
    assert repeats == 0 if laid.once is None else int((~laid.once).sum()) == repeats
