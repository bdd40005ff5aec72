"""Memory that is used again must never be seen by two."""

import torch

from taskvec._engine import buffers
from taskvec._engine.buffers import MOST, give_back, take


def test_a_buffer_is_used_again_where_it_fits_and_by_one_at_a_time(monkeypatch):
    monkeypatch.setattr(buffers._KEPT, "buffers", [])
    first = take(1000)
    place = first.data_ptr()
    give_back([first.view(torch.float32)])
    again, other = take(900), take(900)
    assert (again.data_ptr(), len(again)) == (place, 900)
    assert other.data_ptr() != place
    large = take(5000)
    give_back([large])
    assert take(100).data_ptr() != large.data_ptr()  # much too large for it


def test_no_more_are_kept_than_a_thread_needs(monkeypatch):
    monkeypatch.setattr(buffers._KEPT, "buffers", [])
    give_back([take(10 + i) for i in range(MOST + 5)])
    assert len(buffers._KEPT.buffers) == MOST
