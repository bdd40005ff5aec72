"""Memory that is used again must never be seen by two."""

import torch

from taskvec._engine.buffers import MOST, give_back, take


def test_a_buffer_is_used_again_where_it_fits():
    first = take(1000)
    place = first.data_ptr()
    give_back([first.view(torch.float32)])
    assert take(900).data_ptr() == place
    assert take(900).data_ptr() != place  # it is taken
    give_back([take(5000)])
    assert len(take(100)) == 100


def test_no_more_are_kept_than_a_thread_needs():
    held = [take(10 + i) for i in range(MOST + 5)]
    give_back(held)
    found = {take(10 + i).data_ptr() for i in range(MOST + 5)}
    assert len(found) == MOST + 5
