"""`python -m taskvec`."""

import pytest
import torch

from taskvec import TaskVector, load, save
from taskvec.__main__ import main

A = {"a.w": torch.tensor([[3.0, 4.0]]), "b": torch.ones(3, dtype=torch.bfloat16), "n": torch.tensor(1)}
B = {"a.w": torch.tensor([[3.0, 5.0]]), "b": torch.ones(3), "c": torch.ones(1)}


@pytest.fixture
def files(tmp_path):
    for name, model in (("a", A), ("b", B)):
        save(model, tmp_path / f"{name}.safetensors")
    return str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")


def table(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_a_model_is_shown_with_shapes_dtypes_and_norms(files, capsys):
    assert main(["inspect", files[0]]) == 0
    lines = table(capsys.readouterr().out)
    assert ["a.w", "1x2", "float32", "5"] in lines
    assert ["b", "3", "bfloat16", "1.732"] in lines
    assert ["n", "scalar", "int64"] in lines
    assert lines[-1][1:] == ["3", "tensors,", "6", "entries"]


def test_of_two_models_what_differs_is_shown(files, capsys):
    assert main(["inspect", *files]) == 0
    lines = table(capsys.readouterr().out)
    assert ["a.w", "1x2", "float32", "1x2", "float32", "norm", "1"] in lines
    assert ["b", "3", "bfloat16", "3", "float32", "norm", "0"] in lines
    assert ["n", "scalar", "int64", "-", "only", "in", "one"] in lines
    assert ["c", "-", "1", "float32", "only", "in", "one"] in lines
    assert main(["inspect", files[0], files[0]]) == 0
    assert capsys.readouterr().out.startswith("no differences")


def test_shapes_and_values_that_are_not_finite_are_shown(tmp_path, capsys):
    save({"w": torch.tensor([float("nan")]), "v": torch.ones(2)}, tmp_path / "a.safetensors")
    save({"w": torch.tensor([1.0]), "v": torch.ones(3)}, tmp_path / "b.safetensors")
    assert main(["inspect", str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]) == 0
    shown = capsys.readouterr().out
    assert "norm not finite" in shown
    assert "shape" in shown


def test_integers_and_float8_are_compared_by_their_values(tmp_path, capsys):
    narrow = torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn)
    same = {"n": torch.tensor(1), "m": torch.tensor([1, 2]), "f8": narrow, "flag": torch.tensor([True])}
    other = same | {"n": torch.tensor(2), "f8": torch.tensor([1.0, 3.0]).to(torch.float8_e4m3fn)}
    for name, model in (("a", same), ("b", other)):
        save(model, tmp_path / f"{name}.safetensors")
    assert main(["inspect", str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]) == 0
    lines = table(capsys.readouterr().out)
    assert ["n", "scalar", "int64", "scalar", "int64", "values"] in lines
    assert ["f8", "2", "float8_e4m3fn", "2", "float8_e4m3fn", "values"] in lines
    assert not any(line[0] in ("m", "flag") for line in lines)


def test_a_difference_is_written(files, tmp_path, capsys):
    out = str(tmp_path / "v.safetensors")
    assert main(["diff", *files, "-o", out, "--exclude", "c", "--exclude", "n"]) == 0
    vector = load(out)
    assert isinstance(vector, TaskVector)
    assert vector["a.w"].tolist() == [[0.0, 1.0]]
    assert set(vector) == {"a.w", "b"}
    assert main(["diff", *files, "-o", out, "--include", "a.*"]) == 1
    assert "use overwrite=True" in capsys.readouterr().err
    assert main(["diff", *files, "-o", out, "--include", "a.*", "--overwrite"]) == 0
    assert list(load(out)) == ["a.w"]


def test_an_error_is_one_line_and_a_status(files, tmp_path, capsys):
    assert main(["diff", *files, "-o", str(tmp_path / "v.safetensors")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("taskvec: cannot take the difference: 'c' is only in tuned")
    assert said.count("\n") == 1
    with pytest.raises(SystemExit):
        main(["inspect"])
