"""What torch.compile decorates is compiled when it is called."""

import torch

from lorakit.numerics.compiled import compiled_when_called


def test_compiled_at_the_first_call_and_once():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    real = torch.compile
    with compiled_when_called():

        @torch.compile(backend=backend)
        def doubled(x):
            """Twice x."""
            return x + x

        tripled = torch.compile(lambda x: 3 * x, backend=backend)
    assert torch.compile is real
    assert graphs == []
    x = torch.arange(4.0)
    for _ in range(2):
        assert torch.equal(doubled(x), 2 * x)
    assert len(graphs) == 1
    assert torch.equal(tripled(x), 3 * x)
    assert len(graphs) == 2
    assert doubled.__doc__ == "Twice x."


def test_put_back_after_an_error():
    real = torch.compile
    try:
        with compiled_when_called():
            raise KeyError
    except KeyError:
        assert torch.compile is real
