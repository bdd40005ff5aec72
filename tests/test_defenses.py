"""Defences as vector algebra: each is its formula, refuses nonsense, and leaves its inputs alone."""

import math
from functools import partial

import pytest
import torch
from small import bv, same, weights

from taskvec import BackdoorVector, TaskVector, load, merge, save
from taskvec._engine.lazy import Lazy
from taskvec.defenses import (
    bank_scores,
    choose_strength,
    clip_norms,
    consensus_subtraction,
    cosine_gate,
    disarm,
    equalise_norms,
    flagged,
    greedy_substitution,
    harden,
    injection_subtraction,
    mix,
    negate,
    project_out,
    prototype,
    purify,
    random_twin,
    screen,
    shrink,
    shuffled_twin,
    substitute,
    switch,
    weight_average,
)
from taskvec.errors import DegenerateError, MismatchError, MissingError, NonFiniteError, OptionError, RangeError
from taskvec.merges import mean, weighted
from taskvec.metrics import (
    by_layer,
    coefficients,
    cosine_matrix,
    projection,
    sign_agreement,
    spectrum,
    sweep,
    transfer_matrix,
)

# twins


def test_twins_have_the_norm_of_every_tensor_and_no_direction():
    vector = bv(0)
    for twin in (random_twin(vector, seed=1), shuffled_twin(vector, seed=1)):
        assert type(twin) is BackdoorVector
        assert all(torch.allclose(twin[n].norm(), vector[n].norm(), rtol=1e-4) for n in vector)
        assert abs(float(twin.cosine(vector))) < 0.1
    assert same(random_twin(vector, seed=1), random_twin(vector, seed=1))
    assert not same(random_twin(vector, seed=1), random_twin(vector, seed=2))
    shuffled = shuffled_twin(vector, seed=3)
    assert torch.equal(shuffled["a"].flatten().sort().values, vector["a"].flatten().sort().values)
    assert not torch.equal(shuffled["a"], vector["a"])
    zero = random_twin(vector * 0, seed=1)
    assert zero.norm() == 0


def test_random_twins_are_nearly_normal():
    x = random_twin(TaskVector({"w": torch.ones(200_000)}), seed=0)["w"].double()
    assert abs(float(x.mean())) < 0.01
    assert abs(float((x**4).mean() / (x**2).mean() ** 2) - 3) < 0.35  # kurtosis; 1.8 for uniform, 1 for signs
    neighbours = torch.stack([x[:-1], x[1:]])
    assert abs(float(torch.corrcoef(neighbours)[0, 1])) < 0.01


# subtraction and addition


def test_the_named_defences_are_their_formulas():
    model, base, probe = weights(0), weights(1), bv(2)
    ibvs = injection_subtraction(model, probe, 0.3)
    assert torch.allclose(ibvs["a"], model["a"] - 0.3 * probe["a"])
    assert torch.allclose(shrink(model, base, 0.25)["a"], base["a"] + 0.75 * (model["a"] - base["a"]), atol=1e-6)
    assert same(shrink(model, base, 0.0), model)
    assert torch.allclose(weight_average([model, base])["a"], (model["a"] + base["a"]) / 2)
    assert torch.allclose(weight_average([model, base], [3, 1])["a"], 0.75 * model["a"] + 0.25 * base["a"], atol=1e-6)
    assert torch.allclose(negate(model, base, 0.5)["a"], model["a"] - 0.5 * (base["a"] - model["a"]), atol=1e-6)
    hard = harden(model, base, weights(3), 0.5)
    assert torch.allclose(hard["a"], model["a"] + 0.5 * (weights(3)["a"] - base["a"]), atol=1e-6)
    with pytest.raises(RangeError, match="strength must be in"):
        shrink(model, base, 1.5)


def test_a_consensus_is_subtracted_where_the_probes_agree():
    model, probes = weights(0), [bv(seed) for seed in range(1, 4)]
    stack = torch.stack([p["a"] for p in probes])
    unanimous = stack.sign().sum(0).abs() == 3
    found = consensus_subtraction(model, probes, 0.5)
    assert torch.allclose(found["a"], model["a"] - 0.5 * torch.where(unanimous, stack.mean(0), 0.0), atol=1e-6)
    assert same(consensus_subtraction(model, probes[:1], 0.5), injection_subtraction(model, probes[0], 0.5))
    enough = (stack.sign() == stack.sum(0).sign()).sum(0) >= 2
    some = torch.where(enough, (stack * (stack.sign() == stack.sum(0).sign())).sum(0), 0.0) != 0
    two = consensus_subtraction(model, probes, 0.5, agree=0.6)["a"]
    assert torch.equal(two != model["a"], some)
    assert int((two != model["a"]).sum()) > int((found["a"] != model["a"]).sum())
    with pytest.raises(DegenerateError):
        consensus_subtraction(model, [])


def test_what_is_projected_out_is_gone_and_nothing_else():
    base, probes = weights(1), [bv(seed, 1 + seed) for seed in range(2, 5)]
    clean = TaskVector.between(base, weights(0))
    merged = (clean + probes[0] - 2 * probes[2]).apply(base)
    left = TaskVector.between(base, project_out(merged, base, probes))
    assert all(abs(float(left.cosine(probe))) < 1e-6 for probe in probes)
    assert left.allclose(TaskVector.between(base, project_out(clean.apply(base), base, probes)), atol=1e-5)
    turned = TaskVector.between(base, project_out(probes[0].apply(base), base, probes, strength=2.0))
    assert turned.allclose(-TaskVector(probes[0]), atol=1e-4)
    assert project_out(merged, base, probes)["n"] == 1
    with pytest.raises(DegenerateError, match="bank must not be empty"):
        project_out(merged, base, [])


# mixing, clipping, gating


def test_mixing_takes_each_weight_from_one_of_the_two():
    model, base = weights(0), weights(1)
    mixed = mix(model, base, 0.3, seed=3)
    own = mixed["a"] == model["a"]
    assert bool((own | torch.isclose(mixed["a"], base["a"], atol=1e-6)).all())
    assert float(own.float().mean()) == pytest.approx(0.7, abs=0.03)
    assert torch.allclose(mix(model, base, 1.0, seed=3)["a"], base["a"], atol=1e-6)
    assert same(mix(model, base, 0.0, seed=3), model)
    assert not torch.equal(mix(model, base, 0.3, seed=4)["a"], mixed["a"])
    with pytest.raises(RangeError):
        mix(model, base, 70, seed=0)


def test_norms_are_clipped_and_equalised():
    vectors = [bv(seed, size) for seed, size in enumerate((1.0, 2.0, 5.0))]
    norms = [float(v.norm()) for v in vectors]
    clipped = clip_norms(vectors)
    assert clipped[0] is vectors[0]
    assert [float(v.norm()) for v in clipped] == pytest.approx([norms[0], norms[1], norms[1]])
    assert float(clipped[2].cosine(vectors[2])) == pytest.approx(1)
    assert isinstance(clipped[2], BackdoorVector)
    assert [float(v.norm()) for v in clip_norms(vectors, 2.0)] == pytest.approx(
        [min(norm, norms[1] / 2) for norm in norms]
    )
    assert clip_norms(vectors, 0.0) == vectors
    assert [float(v.norm()) for v in equalise_norms(vectors)] == pytest.approx([norms[1]] * 3)
    assert [float(v.norm()) for v in equalise_norms(vectors, 0.5)] == pytest.approx(
        [(norms[1] * norm) ** 0.5 for norm in norms]
    )
    assert all(same(a, b) for a, b in zip(equalise_norms(vectors, 0.0), vectors, strict=True))
    for bad in (clip_norms, equalise_norms):
        with pytest.raises(DegenerateError, match="no vectors"):
            bad([])
        with pytest.raises(RangeError, match="strength must be a finite number, at least 0; got -1.0"):
            bad(vectors, -1.0)
    with pytest.raises(DegenerateError, match="median norm must be positive"):
        clip_norms([vectors[0], 0 * vectors[1], 0 * vectors[2]])
    with pytest.raises(DegenerateError, match="vector 1 is zero"):
        equalise_norms([vectors[0], vectors[1] * 0])


def test_the_gate_mixes_the_matrices_that_leave_the_column_space():
    g = torch.Generator().manual_seed(0)
    column, row = torch.randn(6, 1, generator=g), torch.randn(1, 5, generator=g)
    safe = TaskVector({"w": column @ row, "v": column @ row, "b": torch.ones(6)})
    apart = torch.randn(6, 5, generator=g)
    apart -= column @ (column.T @ apart) / column.square().sum()
    vector = TaskVector({"w": column @ torch.randn(1, 5, generator=g), "v": apart, "b": torch.zeros(6)})
    found = cosine_gate(vector, safe)
    assert torch.equal(found["w"], vector["w"])  # wholly inside
    assert torch.allclose(found["v"], 0.8 * vector["v"] + 0.2 * safe["v"])
    assert torch.equal(found["b"], vector["b"])
    rho = float(((c := safe["v"] @ safe["v"].T) @ (w := vector["v"] + 0.5 * safe["v"])).flatten() @ w.flatten())
    rho /= float((c @ w).norm() * w.norm())
    between = TaskVector({"v": w})
    for threshold, changed in ((rho - 0.01, False), (rho + 0.01, True)):
        assert torch.equal(cosine_gate(between, safe.select("v"), threshold=threshold)["v"], w) is not changed
    untouched = cosine_gate(0 * vector, safe)  # no direction: nothing to gate
    assert not any(bool(untouched[name].any()) for name in untouched)
    with pytest.raises(RangeError, match="cosine"):
        cosine_gate(vector, safe, threshold=35)
    with pytest.raises(RangeError, match="strength"):
        cosine_gate(vector, safe, 80)


# modules


def parts(value: float) -> dict[str, torch.Tensor]:
    names = [f"layer.{i}.{kind}.w" for i in range(2) for kind in ("attn", "mlp")]
    return {name: torch.tensor([value]) for name in names}


def test_modules_come_from_where_they_are_assigned():
    models = [parts(float(i)) for i in range(3)]
    found = switch(models, {"layer.1.attn.*": 2, "layer.1.*": 1, "*": 0})
    assert [float(t) for t in found.values()] == [0, 0, 2, 1]
    assert [float(t) for t in substitute(models[0], models[1], "*.attn.*").values()] == [1, 0, 1, 0]
    assert [float(t) for t in substitute(models[0], models[1], "*").values()] == [1, 1, 1, 1]
    assert [float(t) for t in substitute(models[0], models[1], "*.0.*", "*").values()] == [1, 1, 1, 1]
    assert [float(t) for t in substitute(models[0], models[1]).values()] == [0, 0, 0, 0]
    with pytest.raises(MissingError, match=r"no model for 'layer.1"):
        switch(models, {"layer.0.*": 0})
    with pytest.raises(MissingError, match="matches no name"):
        substitute(models[0], models[1], "head.*")
    with pytest.raises(RangeError, match="model 3"):
        switch(models, {"*": 3})
    with pytest.raises(RangeError, match="model -1"):
        switch(models, {"*": -1})
    with pytest.raises(MismatchError, match="only in model 1"):
        switch([parts(0), {**parts(1), "head": torch.ones(1)}], {"*": 0})
    with pytest.raises(DegenerateError, match="no models"):
        switch([], {"*": 0})


def test_switching_checkpoints_reads_nothing_until_asked(tmp_path):
    for i in range(2):
        save(parts(float(i)), tmp_path / f"{i}.safetensors")
    found = switch([load(tmp_path / f"{i}.safetensors") for i in range(2)], {"layer.1.*": 1, "*": 0})
    assert isinstance(found, Lazy)
    assert [float(found[name]) for name in found] == [0, 0, 1, 1]


def test_the_greedy_search_gives_back_what_scores_best():
    model, proxy = parts(1.0), parts(0.0)
    worth = dict(zip(model, (3.0, -5.0, 1.0, 1.0), strict=True))
    asked = []

    def score(candidate):
        asked.append(candidate)
        return sum(float(candidate[name]) * worth[name] for name in worth)

    groups = {"attn": ["*.attn.*"], "mlp": ["*.mlp.*"], "0": ["layer.0.*"], "1": ["layer.1.*"]}
    found = greedy_substitution(model, proxy, groups, score)
    assert found.kept == ("attn", "1")  # attention is worth 4, the last MLP one more; the first MLP costs 5
    assert found.score == 5
    assert [float(found.model[name]) for name in model] == [1, 0, 1, 1]
    assert len(asked) == 1 + 4 + 3 + 2 + 1
    del asked[:]
    assert greedy_substitution(model, proxy, groups, score, patience=1).score == 5
    assert len(asked) == 1 + 4 + 3 + 2  # it stops after the first round without a better score
    nothing = greedy_substitution(model, proxy, groups, lambda m: -sum(float(t) for t in m.values()))
    assert (nothing.kept, nothing.score) == ((), 0)
    assert greedy_substitution(model, proxy, groups, lambda m: 1.0).kept == ()  # no better is not better
    with pytest.raises(DegenerateError, match="no groups"):
        greedy_substitution(model, proxy, {}, score)
    with pytest.raises(RangeError, match="patience"):
        greedy_substitution(model, proxy, groups, score, patience=0)
    with pytest.raises(MissingError, match="matches no name"):
        greedy_substitution(model, proxy, {"head": ["head.*"]}, score)


# prototypes


def test_the_prototype_is_the_candidate_most_like_the_vector():
    pool = [bv(seed) for seed in range(3)]
    assert prototype(2 * TaskVector(pool[1]), pool) is pool[1]
    between = prototype(TaskVector(pool[0] + pool[1] + pool[2]), pool)
    assert between.allclose(merge(pool, mean))
    assert prototype(bv(7), pool[:1]) is pool[0]
    with pytest.raises(DegenerateError, match="empty pool"):
        prototype(bv(0), [])


def test_purification_removes_the_directions_of_the_prototype_only():
    g = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(6, 6, generator=g)).Q for _ in range(2))
    sizes = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.5])
    base = {"w": torch.zeros(6, 6), "b": torch.zeros(6)}
    suspect = {"w": (u * sizes) @ v.T, "b": torch.ones(6)}
    pool = [BackdoorVector({"w": (u[:, [1, 3]] * torch.tensor([3.0, 1.0])) @ v[:, [1, 3]].T, "b": torch.ones(6)})]

    def left(**how):
        return (u.T @ purify(suspect, base, pool, **how)["w"] @ v).diagonal()

    assert torch.allclose(left(), sizes * torch.tensor([1, 0, 1, 1, 1, 1.0]), atol=1e-5)
    assert torch.allclose(left(energy=0.95), sizes * torch.tensor([1, 0, 1, 0, 1, 1.0]), atol=1e-5)
    assert torch.allclose(left(energy=0.85), left(), atol=1e-6)  # the shares are squares, 9 to 1
    assert torch.allclose(left(strength=0.5), sizes * torch.tensor([1, 0.5, 1, 1, 1, 1]), atol=1e-5)
    assert torch.allclose(left(alignment=0.99), sizes, atol=1e-5)  # no matrix is that much like it
    assert torch.equal(purify(suspect, base, pool)["b"], suspect["b"])
    for bad in ({"strength": -1.0}, {"energy": 0.0}, {"alignment": 2.0}):
        with pytest.raises(RangeError):
            purify(suspect, base, pool, **bad)
    with pytest.raises(DegenerateError, match="empty pool"):
        purify(suspect, base, [])
    with pytest.raises(DegenerateError, match="zero"):
        purify({n: t.clone() for n, t in base.items()}, base, pool)


# the strength


def test_the_rule_takes_the_largest_strength_that_keeps_the_accuracy():
    grid = {0.1: 0.80, 0.2: 0.75, 0.4: 0.79, 0.8: 0.5}
    assert choose_strength(grid, undefended=0.8) == 0.4
    assert choose_strength(grid, undefended=0.8, keep=0.9) == 0.4
    assert choose_strength(grid, undefended=0.8, keep=0.6) == 0.8
    assert choose_strength({0.5: 0.1}, undefended=0.8) == 0.0
    for bad, error in (({}, DegenerateError), ({0.1: 80.0}, RangeError), ({-0.1: 0.8}, RangeError)):
        with pytest.raises(error):
            choose_strength(bad, undefended=0.8)
    with pytest.raises(RangeError, match="keep"):
        choose_strength(grid, undefended=0.8, keep=98)


# the bank


def bank_of(classes: int, each: int = 2) -> dict[int, list[BackdoorVector]]:
    return {c: [bv(100 + 10 * c + i, 0.5 + i) for i in range(each)] for c in range(classes)}


def test_the_bank_finds_contributor_and_class_for_a_trigger_it_does_not_hold():
    bank = bank_of(8)
    clean = [TaskVector(bv(seed)) for seed in range(4)]
    like = 0.4 * bank[5][0] + 0.2 * bank[5][1] + 0.5 * bv(999)  # partly along two probes, partly its own
    vectors = [*clean[:2], clean[2] + like, clean[3]]
    scores = bank_scores(vectors, bank)
    assert scores[2][5] == pytest.approx(0.6, abs=0.1)
    assert flagged(scores)[0][:2] == (2, 5)
    assert flagged(bank_scores(clean, bank)) == []
    assert flagged(scores, threshold=1e6) == []


def test_scores_are_flagged_highest_first_and_only_high_ones():
    noise = [{c: 0.01 * ((3 * c + i) % 5 - 2) for c in range(10)} for i in range(3)]
    noise[0] |= {1: 0.3, 2: -0.9}
    noise[2] |= {7: 0.8}
    assert [flag[:2] for flag in flagged(noise)] == [(2, 7), (0, 1)]
    with pytest.raises(RangeError, match="deviations"):
        flagged(noise, threshold=0)
    for nothing in ([], [{0: 1.0}], [dict.fromkeys(range(9), 0.0)]):
        with pytest.raises(DegenerateError, match="stand out"):
            flagged(nothing)


def test_disarming_takes_what_agrees_and_never_more_than_there_is():
    vector, probes = TaskVector(bv(0)) + 0.5 * bv(1), [bv(1), bv(2)]
    matrix = torch.stack([torch.cat([p["a"].flatten(), p["b"]]).double() for p in probes], 1)
    flat = torch.cat([vector["a"].flatten(), vector["b"]]).double()
    image = (matrix @ torch.linalg.lstsq(matrix, flat).solution)[:2000].reshape(50, 40).float()
    found = disarm(vector, probes, strength=3.0)["a"]
    agrees = vector["a"] * image > 0
    assert torch.equal(found[~agrees], vector["a"][~agrees])
    assert bool((found * vector["a"] >= 0).all())
    short = agrees & (3 * image.abs() < vector["a"].abs())
    assert torch.allclose(found[short], (vector["a"] - 3 * image)[short], atol=1e-5)
    assert not bool(found[agrees & (3 * image.abs() > vector["a"].abs() * 1.0001)].any())
    everything = disarm(vector, probes)["a"]
    assert torch.equal(everything, torch.where(agrees, 0.0, vector["a"]))
    assert torch.equal(disarm(vector, probes, strength=0.0)["a"], vector["a"])


def test_a_second_pass_of_disarming_would_find_nothing():
    vector, probes = TaskVector(bv(0)) + 0.5 * bv(1), [bv(1), bv(2)]
    image = merge(probes, weighted, weights=coefficients([vector], probes)[0].tolist())
    assert float(vector.dot(image)) > 0 > float(disarm(vector, probes).dot(image))


def test_banks_without_use_are_refused():
    with pytest.raises(DegenerateError, match="no probes for 1"):
        bank_scores([bv(0)], {0: [bv(1)], 1: []})
    with pytest.raises(DegenerateError, match="bank must not be empty"):
        bank_scores([bv(0)], {})
    with pytest.raises(DegenerateError, match="bank vector 0 must have a direction"):
        disarm(bv(0), [bv(1) * 0])
    with pytest.raises(RangeError, match="strength"):
        disarm(bv(0), [bv(1)], strength=-1)
    with pytest.raises(MismatchError):
        disarm(bv(0), [bv(1).select("a")])


# screening


def test_screening_compares_each_with_the_others():
    vectors = [TaskVector({"w": bv(seed, size)["a"]}) for seed, size in enumerate((1.0, 1.0, 1.0, 3.0))]
    spike = torch.outer(bv(7)["a"][:, 0], bv(8)["a"][0])
    vectors[3] = vectors[3] + TaskVector({"w": 5 * spike})
    found = screen(vectors)
    norms = [float(v.norm()) for v in vectors]
    assert found[3].norm == pytest.approx(norms[3] / sorted(norms[:3])[1])
    assert found[0].cosine == pytest.approx(sum(float(vectors[0].cosine(v)) for v in vectors[1:]) / 3)
    agree = [float((vectors[0]["w"].sign() == v["w"].sign()).double().mean()) for v in vectors[1:]]
    assert found[0].signs == pytest.approx(sum(agree) / 3)
    squares = torch.linalg.svdvals(vectors[3]["w"].double()).square()
    shares = squares / squares.sum()
    assert found[3].leading == pytest.approx(float(shares[0]))
    assert found[3].entropy == pytest.approx(float(-(shares * shares.log()).sum()) / math.log(40))
    assert found[3].leading > 0.5 > found[0].leading
    assert found[3].kurtosis > found[0].kurtosis == pytest.approx(3, abs=0.3)
    assert found[0].spread == 0  # one matrix


def test_screening_needs_others_and_matrices():
    with pytest.raises(DegenerateError, match="1 in all"):
        screen([bv(0)])
    with pytest.raises(DegenerateError, match="no matrix"):
        screen([bv(0).select("b"), bv(1).select("b")])
    with pytest.raises(DegenerateError, match="vector 1 must have a direction"):
        screen([bv(0), bv(1) * 0])
    with pytest.raises(MismatchError):
        screen([bv(0), bv(1).select("a")])


def test_a_single_probe_is_not_a_list_of_probes():
    with pytest.raises(
        OptionError, match=r"bank\[0\] must be a list of TaskVector; got a BackdoorVector; use \[vector\]"
    ):
        bank_scores([bv(0)], {0: bv(1)})


def test_a_flag_says_how_far_its_score_stands_out():
    values = [0.01, -0.02, 0.0, 0.02, 0.6, -0.01]  # median 0.005, deviations .005 .005 .015 .015 .025 .595
    found = flagged([dict(enumerate(values[:3])), dict(enumerate(values[3:]))])
    assert [(flag.contributor, flag.label) for flag in found] == [(1, 1)]
    assert found[0].deviation == pytest.approx(0.595 / (1.4826 * 0.015))
    with pytest.raises(NonFiniteError, match="scores must be finite"):
        flagged([dict.fromkeys(range(9), math.nan)])


@pytest.mark.parametrize(("score", "count"), [(9.2, 1), (8.7, 0)])
def test_scores_are_flagged_at_six_robust_deviations(score, count):
    values = [-1.0, -1.0, -1.0, 0.0, 0.0, 1.0, 1.0, 1.0, score]  # median 0, median deviation 1: the limit is 8.8956
    assert len(flagged([dict(enumerate(values))])) == count


# wrong arguments


PLAIN = {"a": torch.ones(2, 2)}
MODULE = torch.nn.Linear(2, 2)
VECTOR = TaskVector(PLAIN)
TAKES_VECTORS = [
    *(cosine_matrix, sign_agreement, lambda vs: by_layer(cosine_matrix, vs), lambda vs: coefficients(vs, [VECTOR])),
    *(lambda vs: coefficients([VECTOR], vs), clip_norms, equalise_norms, screen, lambda vs: disarm(VECTOR, vs)),
    *(lambda vs: bank_scores(vs, {0: [VECTOR]}), lambda vs: bank_scores([VECTOR], {0: vs})),
    *(
        lambda vs: prototype(VECTOR, vs),
        lambda vs: purify(weights(0), weights(1), vs),
        lambda vs: project_out(PLAIN, PLAIN, vs),
    ),
    *(lambda vs: consensus_subtraction(PLAIN, vs), lambda vs: transfer_matrix(vs, [PLAIN], [len])),
]
TAKES_A_VECTOR = [
    *(spectrum, lambda v: projection(v, VECTOR), lambda v: projection(VECTOR, v), lambda v: cosine_gate(v, VECTOR)),
    *(lambda v: cosine_gate(VECTOR, v), lambda v: disarm(v, [VECTOR]), lambda v: prototype(v, [VECTOR])),
    *(lambda v: random_twin(v, seed=0), lambda v: shuffled_twin(v, seed=0)),
]
TAKES_MODELS = [
    *(lambda m: shrink(m, PLAIN, 0.5), lambda m: shrink(PLAIN, m, 0.5), lambda m: mix(m, PLAIN, 0.5, seed=0)),
    *(lambda m: mix(PLAIN, m, 0.5, seed=0), lambda m: project_out(m, PLAIN, [VECTOR]), lambda m: negate(m, PLAIN)),
    *(lambda m: project_out(PLAIN, m, [VECTOR]), lambda m: negate(PLAIN, m), lambda m: harden(PLAIN, PLAIN, m)),
    *(lambda m: purify(m, PLAIN, [VECTOR]), lambda m: purify(PLAIN, m, [VECTOR]), lambda m: harden(m, PLAIN, PLAIN)),
]


@pytest.mark.parametrize("call", TAKES_VECTORS)
@pytest.mark.parametrize("given", [VECTOR, PLAIN, [PLAIN], MODULE, [MODULE], "a.safetensors", ["a.safetensors"], 3])
def test_what_is_not_a_list_of_vectors_is_refused_by_name(call, given):
    with pytest.raises(OptionError, match=r"must be a .*; got .*; use "):
        call(given)


@pytest.mark.parametrize("call", TAKES_A_VECTOR)
@pytest.mark.parametrize("given", [PLAIN, [VECTOR], MODULE, "a.safetensors"])
def test_what_is_not_a_vector_is_refused_by_name(call, given):
    with pytest.raises(OptionError, match="must be a TaskVector; got .*; use "):
        call(given)


@pytest.mark.parametrize("call", TAKES_MODELS)
@pytest.mark.parametrize("given", [VECTOR, MODULE, "a.safetensors"])
def test_what_is_not_a_models_weights_is_refused_by_name(call, given):
    with pytest.raises(OptionError, match=r"must be a (model's weights|mapping).*; got .*; use "):
        call(given)


def test_the_way_out_depends_on_what_was_given():
    for given, way in ((PLAIN, "TaskVector.between"), (MODULE, r"load\(...\), and"), ("a", "got the text 'a'")):
        with pytest.raises(OptionError, match=way):
            spectrum(given)
    with pytest.raises(OptionError, match=r"use list\(d.values\(\)\)"):
        screen({"a": VECTOR})
    with pytest.raises(
        OptionError, match=r"probe must be a BackdoorVector; got a TaskVector; use BackdoorVector\(vector\)"
    ):
        injection_subtraction(PLAIN, VECTOR)
    for wrong in (MODULE, "a"):
        with pytest.raises(OptionError, match="merged must be a mapping"):
            injection_subtraction(wrong, bv(0))
        with pytest.raises(OptionError, match="merged must be a mapping"):
            consensus_subtraction(wrong, [bv(0)])
        with pytest.raises(OptionError, match=r"models\[1\] must be a mapping"):
            switch([PLAIN, wrong], {"*": 0})
        with pytest.raises(OptionError, match=r"models\[1\] must be a mapping"):
            weight_average([PLAIN, wrong])
        with pytest.raises(OptionError, match="model must be a mapping"):
            greedy_substitution(wrong, PLAIN, {"a": ["a"]}, len)
    with pytest.raises(OptionError, match="models must be a list"):
        weight_average(PLAIN)


# the number of threads, and extreme magnitudes


def test_bits_do_not_depend_on_the_number_of_threads():
    g = torch.Generator().manual_seed(0)
    base, suspect, *others = ({"w": torch.randn(700, 600, generator=g)} for _ in range(6))
    vectors, pool = [TaskVector(x) for x in others[:2]], [BackdoorVector(x) for x in others[2:]]
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            gated = cosine_gate(*vectors, threshold=1.0)["w"]
            found.append((purify(suspect, base, pool)["w"], spectrum(vectors[0])["w"], screen(vectors), gated))
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(1)  # as in conftest.py
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


def test_screening_and_gating_do_not_depend_on_the_scale():
    g = torch.Generator().manual_seed(0)
    vectors = [
        TaskVector({"w": torch.randn(9, 7, generator=g).double(), "b": torch.ones(5).double()}) for _ in range(3)
    ]
    for plain, tiny in zip(screen(vectors), screen(v * 1e-100 for v in vectors), strict=True):
        assert tiny == pytest.approx(plain)
    small = [v.to(dtype=torch.float32) * 1e-12 for v in vectors]  # products of three underflow in float32
    for threshold in (-1.0, 1.0):
        gated = cosine_gate(small[0], small[1], threshold=threshold) * 1e12
        assert gated.allclose(
            cosine_gate(vectors[0], vectors[1], threshold=threshold).to(dtype=torch.float32), rtol=1e-5
        )


# values and defaults


def test_defenses_have_the_strengths_that_are_written_unless_told():
    model, base, robust = weights(0), weights(1), weights(2)
    probes = [bv(3), bv(4)]
    alike = [
        BackdoorVector(TaskVector(probe.tensors) + 0.3 * TaskVector(TaskVector.between(base, model).tensors))
        for probe in probes
    ]
    assert 0.1 < float(TaskVector(alike[0].tensors).cosine(TaskVector(TaskVector.between(base, model).tensors))) < 0.5
    vectors = [bv(seed, size) for seed, size in enumerate((1.0, 2.0, 5.0))]
    trusted = TaskVector(bv(5))
    pairs = [
        (injection_subtraction(model, probes[0]), injection_subtraction(model, probes[0], 0.3)),
        (consensus_subtraction(model, probes), consensus_subtraction(model, probes, 0.3, agree=1.0)),
        (project_out(model, base, probes), project_out(model, base, probes, 1.0)),
        (negate(model, base), negate(model, base, 1.0)),
        (harden(model, base, robust), harden(model, base, robust, 0.3)),
        (purify(model, base, alike), purify(model, base, alike, 1.0, energy=0.5, alignment=0.0)),
        (cosine_gate(trusted, vectors[0]), cosine_gate(trusted, vectors[0], 0.2, threshold=0.35)),
        (disarm(trusted, probes), disarm(trusted, probes, math.inf)),
        *zip(clip_norms(vectors), clip_norms(vectors, 1.0), strict=True),
        *zip(equalise_norms(vectors), equalise_norms(vectors, 1.0), strict=True),
    ]
    for default, written in pairs:
        assert same(dict(default), dict(written))


@pytest.mark.parametrize(
    "defend",
    [
        lambda model, base, probes: shrink(model, base, 0.0),
        lambda model, base, probes: mix(model, base, 0.0, seed=0),
        lambda model, base, probes: injection_subtraction(model, probes[0], 0.0),
        lambda model, base, probes: consensus_subtraction(model, probes, 0.0),
        lambda model, base, probes: project_out(model, base, probes, 0.0),
        lambda model, base, probes: negate(model, base, 0.0),
        lambda model, base, probes: harden(model, base, weights(9), 0.0),
        lambda model, base, probes: purify(model, base, probes, 0.0),
        lambda model, base, probes: disarm(TaskVector(probes[0]), probes[1:], 0.0),
        lambda model, base, probes: cosine_gate(probes[0], probes[1], 0.0, threshold=1.0),
        lambda model, base, probes: clip_norms([5 * probes[1], probes[0], probes[1]], 0.0)[1],
        lambda model, base, probes: equalise_norms([5 * probes[1], probes[0], probes[1]], 0.0)[1],
    ],
)
def test_a_strength_of_zero_leaves_everything_untouched(defend):
    model = {**weights(0), "norm.running_mean": torch.ones(3)}
    base = {**weights(1), "norm.running_mean": torch.zeros(3)}
    probes = [bv(3), bv(4)]
    found = defend(model, base, probes)
    assert same(dict(found), dict(probes[0])) if isinstance(found, TaskVector) else same(found, model)


def test_shrinking_and_negating_go_the_right_way():
    model, base = {"w": torch.tensor([5.0])}, {"w": torch.tensor([1.0])}
    assert float(shrink(model, base, 0.25)["w"]) == 4
    assert float(negate(model, base, 0.25)["w"]) == 6
    assert float(harden(model, base, {"w": torch.tensor([3.0])}, 0.25)["w"]) == 5.5
    assert float(injection_subtraction(model, BackdoorVector({"w": torch.tensor([2.0])}), 0.25)["w"]) == 4.5
    assert float(mix(model, base, 1.0, seed=0)["w"]) == 1


def test_projection_is_that_of_gram_and_schmidt():
    base, merged, probes = weights(1), weights(0), [bv(2), bv(3, 4.0)]
    flats = [torch.cat([v["a"].flatten(), v["b"]]).double() for v in (TaskVector.between(base, merged), *probes)]
    own, first = flats[0], flats[1] / flats[1].norm()
    second = flats[2] - (flats[2] @ first) * first
    second /= second.norm()
    expected = own - 0.6 * ((own @ first) * first + (own @ second) * second)
    left = TaskVector.between(base, project_out(merged, base, probes, 0.6))
    assert torch.allclose(torch.cat([left["a"].flatten(), left["b"]]).double(), expected, atol=1e-5)


def test_the_gate_takes_the_cosine_in_the_column_space_and_not_a_plain_one():
    g = torch.Generator().manual_seed(0)
    own, trusted = torch.randn(6, 5, generator=g), torch.randn(6, 5, generator=g)

    def cosine(x, y):
        return float((x * y).sum() / x.norm() / y.norm())

    rho, plain = cosine(trusted @ trusted.T @ own, own), cosine(trusted, own)
    assert rho > 0.35 > plain
    vector, reference = TaskVector({"w": own}), TaskVector({"w": trusted})
    mixed = 0.7 * own + 0.3 * trusted
    assert torch.equal(cosine_gate(vector, reference)["w"], own)
    assert torch.equal(cosine_gate(vector, reference, 0.3, threshold=rho - 1e-4)["w"], own)
    assert torch.allclose(cosine_gate(vector, reference, 0.3, threshold=rho + 1e-4)["w"], mixed)
    assert torch.allclose(cosine_gate(-vector, reference, 0.3, threshold=rho + 1e-4)["w"], -0.7 * own + 0.3 * trusted)
    leaves = torch.linalg.qr(trusted).Q  # the part of a vector outside the column space fails at the default
    apart = own - leaves @ (leaves.T @ own)
    gated = cosine_gate(TaskVector({"w": apart}), reference)["w"]
    assert torch.allclose(gated, 0.8 * apart + 0.2 * trusted, atol=1e-6)


def test_scores_are_the_sums_of_each_labels_coefficients():
    bank = bank_of(3)
    matrix = torch.stack(
        [torch.cat([p["a"].flatten(), p["b"]]).double() for probes in bank.values() for p in probes], 1
    )
    vector = TaskVector(bv(0)) + 0.5 * bank[1][0] - 2 * bank[2][1]
    found = torch.linalg.lstsq(matrix, torch.cat([vector["a"].flatten(), vector["b"]]).double()).solution
    expected = {c: float(found[2 * c] + found[2 * c + 1]) for c in range(3)}
    assert bank_scores([bv(0), vector], bank)[1] == pytest.approx(expected, abs=1e-6)


def test_screening_is_its_formulas_over_several_matrices():
    g = torch.Generator().manual_seed(0)

    def made(sizes):
        return {
            "steep": torch.randn(6, 4, generator=g) * torch.tensor([9.0, 1, 1, 1]) * sizes,
            "flat": torch.randn(5, 5, generator=g),
            "conv": torch.randn(3, 2, 2, 2, generator=g) / sizes,
            "row": torch.randn(1, 7, generator=g),  # one singular value: in the spread alone
            "bias": torch.randn(11, generator=g) * 5,  # in the norm, cosine, signs and kurtosis alone
        }

    models = [made(size) for size in (1.0, 2.0, 4.0, 3.0)]
    found = screen(TaskVector(m) for m in models)
    flats = [torch.cat([t.flatten() for t in m.values()]).double() for m in models]
    for i, (model, own) in enumerate(zip(models, flats, strict=True)):
        others = [x for j, x in enumerate(flats) if j != i]
        squares = [torch.linalg.svdvals(model[n].double().flatten(1)).square() for n in ("steep", "flat", "conv")]
        shares = [s / s.sum() for s in squares]
        sizes = torch.stack([model[n].double().norm() for n in ("steep", "flat", "conv", "row")])
        assert found[i].norm == pytest.approx(float(own.norm()) / sorted(float(x.norm()) for x in others)[1])
        assert found[i].cosine == pytest.approx(sum(float(own @ x / own.norm() / x.norm()) for x in others) / 3)
        assert found[i].signs == pytest.approx(sum(float((own * x > 0).double().mean()) for x in others) / 3)
        assert found[i].leading == pytest.approx(sum(float(s[0]) for s in shares) / 3)
        entropies = [float(-(s * s.log()).sum()) / math.log(len(s)) for s in shares]
        assert found[i].entropy == pytest.approx(sum(entropies) / 3)
        assert found[i].spread == pytest.approx(float(sizes.std(correction=0) / sizes.mean()))
        assert found[i].kurtosis == pytest.approx(float((own**4).mean() / (own**2).mean() ** 2))


def test_98_percent_of_the_accuracy_is_kept_unless_told():
    assert choose_strength({0.3: 0.7841, 0.5: 0.7839}, undefended=0.8) == 0.3


def test_the_greedy_search_is_patient_for_five_rounds_unless_told():
    names = {f"layer.{i}": torch.ones(1) for i in range(8)}
    asked = []

    def score(candidate):
        asked.append(candidate)
        return -sum(float(t) for t in candidate.values())

    found = greedy_substitution(names, {n: torch.zeros(1) for n in names}, {n: [n] for n in names}, score)
    assert found.kept == ()
    assert len(asked) == 1 + 8 + 7 + 6 + 5 + 4


def test_twins_match_norms_tensor_by_tensor_and_shuffles_stay_inside_each():
    vector = TaskVector({"a": torch.randn(300), "b": 100 * torch.randn(40)})
    random, shuffled = random_twin(vector, seed=0), shuffled_twin(vector, seed=0)
    for name in vector:
        assert float(random[name].double().norm()) == pytest.approx(float(vector[name].double().norm()), rel=1e-5)
        assert torch.equal(shuffled[name].sort().values, vector[name].sort().values)
        assert not torch.equal(shuffled[name], vector[name])
    assert not torch.equal(shuffled_twin(vector, seed=1)["a"], shuffled["a"])
    large = TaskVector({"w": torch.ones(20_000)})
    draws = [random_twin(large, seed=seed) for seed in range(3)]
    assert all(abs(float(x.cosine(y))) < 0.05 for i, x in enumerate(draws) for y in draws[:i])  # independent
    assert not torch.equal(random["a"][:40] / random["a"][:40].norm(), random["b"] / random["b"].norm())


def test_an_average_is_weighted_and_normalised():
    models = [{"w": torch.tensor([x])} for x in (1.0, 2.0, 6.0)]
    assert float(weight_average(models)["w"]) == 3
    assert float(weight_average(models, [1, 1, 2])["w"]) == 3.75


# one dial


MODEL, BASE, PROBES = weights(0), weights(1), [bv(2), bv(3)]
DIALS = {
    "shrink": partial(shrink, MODEL, BASE),
    "mix": partial(mix, MODEL, BASE, seed=0),
    "injection_subtraction": partial(injection_subtraction, MODEL, PROBES[0]),
    "consensus_subtraction": partial(consensus_subtraction, MODEL, PROBES),
    "project_out": partial(project_out, MODEL, BASE, PROBES),
    "harden": partial(harden, MODEL, BASE, weights(4)),
    "negate": partial(negate, MODEL, weights(4)),
    "purify": partial(purify, MODEL, BASE, PROBES),
    "cosine_gate": partial(cosine_gate, bv(0), bv(1), threshold=0.999),
    "disarm": partial(disarm, bv(0), PROBES),
    "clip_norms": lambda s: clip_norms([bv(0), bv(1, 5.0)], s)[1],
    "equalise_norms": lambda s: equalise_norms([bv(0), bv(1, 5.0)], s)[1],
}


@pytest.mark.parametrize("name", DIALS)
def test_every_defense_has_one_strength_and_0_leaves_its_input(name):
    untouched, weak, strong = (values["a"] for values in sweep([0.0, 0.8, 1.0], DIALS[name]).values())
    wanted = {"cosine_gate": bv(0), "disarm": bv(0), "clip_norms": bv(1, 5.0), "equalise_norms": bv(1, 5.0)}
    before = wanted.get(name, MODEL)["a"]
    torch.testing.assert_close(untouched, before, rtol=0, atol=1e-6)
    assert float((strong - before).norm()) > float((weak - before).norm()) > 0.01
