"""Pictures: what is drawn is what was given. They are looked at elsewhere."""

import builtins

import pytest
import torch

from taskvec import plot
from taskvec.errors import DegenerateError, MismatchError, OptionError


def test_heat_maps_show_every_number_in_its_place():
    matrix = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]], dtype=torch.float64)
    axes = plot.heat_map(matrix, ["a", "b"], ["x", "y", "z"], limits=(0, 1), digits=1)
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written == {(j, i): f"{matrix[i, j]:.1f}" for i in range(2) for j in range(3)}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    with pytest.raises(MismatchError, match=r"\(2, 3\)"):
        plot.heat_map(matrix, ["a", "b"])


def test_curves_have_the_mean_and_its_interval():
    axes = plot.curve({"several": {0.0: [0.1, 0.3], 0.5: [0.5, 0.5]}, "one": {0.0: 0.2, 0.5: 0.4}}, ylabel="y")
    lines = axes.get_lines()
    assert list(lines[0].get_ydata()) == [0.2, 0.5]
    assert list(lines[1].get_ydata()) == [0.2, 0.4]
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx(0.2 + 12.706 * 0.02**0.5 / 2**0.5, rel=1e-3)
    with pytest.raises(DegenerateError, match="no values at 0.5"):
        plot.curve({"a": {0.0: [1.0], 0.5: []}})
    with pytest.raises(DegenerateError, match="no lines"):
        plot.curve({})


def test_fronts_begin_undefended_and_mark_what_was_chosen():
    axes = plot.front({"a": [(0.8, 0.5), (0.7, 0.1)]}, undefended=(0.82, 0.9), limit=0.75, chosen={"a": (0.8, 0.5)})
    assert list(axes.get_lines()[0].get_xdata()) == [0.82, 0.8, 0.7]
    assert list(axes.get_lines()[1].get_xdata()) == [0.8]
    with pytest.raises(DegenerateError, match="no defenses"):
        plot.front({})


def test_strips_have_a_row_for_each_group_and_draw_where_they_are_told():
    first = plot.strip({"clean": [0.1, 0.2], "backdoored": [0.9]})
    again = plot.strip({"more": [0.3]}, axes=first)
    assert again is first
    assert [list(line.get_xdata()) for line in first.get_lines()] == [[0.1, 0.2], [0.9], [0.3]]
    with pytest.raises(DegenerateError, match="no groups"):
        plot.strip({})


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(OptionError, match=r"pip install 'taskvec\[plot\]'"):
        plot.strip({"a": [1.0]})
