"""Every window is read once per epoch, in an order that follows from the seed."""

import torch

from ara.models.training import batch_indices


def test_every_window_is_read_once_per_round():
    rounds = [batch_indices(10, 5, step, seed=3) for step in range(4)]
    assert sorted(torch.cat(rounds[:2]).tolist()) == list(range(10))
    assert sorted(torch.cat(rounds[2:]).tolist()) == list(range(10))
    assert rounds[0].tolist() != rounds[2].tolist()
    assert batch_indices(10, 5, 0, seed=4).tolist() != rounds[0].tolist()
    assert sorted(batch_indices(3, 7, 0, seed=0).tolist()).count(0) >= 2
