"""How layers are shared out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from videojob_worker import topology
from videojob_worker.errors import InvalidSpecError


@given(st.integers(1, 60), st.integers(1, 60))
def test_every_layer_has_one_stage_and_the_ends_hold_no_more_than_the_middle(layers, stages):
    if stages > layers:
        return
    shares = topology.shares(layers, stages)
    assert [layer for share in shares for layer in share] == list(range(layers))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    assert sizes[0] == min(sizes)
    assert stages < 3 or sizes[-1] <= max(sizes[1:-1])


def test_uneven_layers_spare_the_first_stage():
    assert [len(share) for share in topology.shares(8, 3)] == [2, 3, 3]
    assert [len(share) for share in topology.shares(30, 8)] == [3, 4, 4, 4, 4, 4, 4, 3]


def test_more_ranks_than_layers_name_the_fields_to_lower():
    with pytest.raises(InvalidSpecError, match=r"8 layers.*9 ranks.*spec\.ranksPerNode to at most 8"):
        topology.shares(8, 9)


@given(st.integers(2, 9), st.integers(1, 9))
def test_each_node_has_one_link_to_the_next_and_one_from_the_one_before(nodes, ranks):
    size = nodes * ranks
    node_of = {rank: rank // ranks for rank in range(size)}  # as torchrun numbers them
    hops = [(node_of[rank], node_of[(rank + 1) % size]) for rank in range(size)]
    assert sorted(hop for hop in hops if hop[0] != hop[1]) == sorted((n, (n + 1) % nodes) for n in range(nodes))
