"""GOHSP: the Markov chain against its closed form, the similarity against its definition, and the soft stages."""

from __future__ import annotations

import pytest
import torch

from prunevit.errors import PruningError
from prunevit.pruning import Plan, groups_of, prune
from prunevit.pruning.gohsp import GOHSP, attention_maps, group_norms, similarity, stationary
from prunevit.pruning.method import watched_qkv
from tests.specs import SPECS, block, random_images, random_model, vit

SPEC = vit(block((8,) * 4, (8,) * 4, 24), block((8,) * 4, (8,) * 4, 24))


def random_similarity(heads: int) -> torch.Tensor:
    s = torch.rand(heads, heads, generator=torch.Generator().manual_seed(heads), dtype=torch.float64)
    return (s + s.T).fill_diagonal_(0)


@pytest.mark.parametrize("heads", [2, 3, 6, 12])
def test_undamped_and_symmetric_has_a_closed_form(heads: int) -> None:
    s = random_similarity(heads)
    torch.testing.assert_close(stationary(s, damping=1.0), s.sum(1) / s.sum(), rtol=1e-8, atol=1e-9)


def test_damped_is_the_eigenvector_of_the_damped_chain() -> None:
    s = random_similarity(5)
    p = s / s.sum(1, keepdim=True)
    chain = 0.85 * p + 0.15 / 5
    values, vectors = torch.linalg.eig(chain.T)
    lead = vectors[:, values.real.argmax()].real
    torch.testing.assert_close(stationary(s, 0.85), lead / lead.sum(), rtol=1e-8, atol=1e-9)


def test_one_head_is_all_there_is() -> None:
    assert stationary(torch.zeros(1, 1, dtype=torch.float64), 0.85).tolist() == [1.0]
    spec = SPECS["one_head_13_by_12"]
    group = groups_of(spec, ("head",))[0]
    for method in (GOHSP(), GOHSP(keep="peripheral")):
        scores = method.score(random_model(spec), [group], [random_images(spec)], 0)
        assert scores[group].tolist() == [1.0]


def test_similarity_is_one_less_the_jensen_shannon_divergence_in_bits() -> None:
    maps = torch.rand(2, 3, 5, 5, dtype=torch.float64).softmax(-1)
    got = similarity(maps)
    for b in range(2):
        for i in range(3):
            for j in range(3):
                total = 0.0
                for p, q in zip(maps[b, i], maps[b, j]):
                    m = (p + q) / 2
                    total += float((p * (p / m).log2()).sum() + (q * (q / m).log2()).sum()) / 2
                want = 0.0 if i == j else 1 - total / 5
                assert float(got[b, i, j]) == pytest.approx(want, abs=1e-12)
    apart = torch.eye(4, dtype=torch.float64)[None, None].repeat(1, 2, 1, 1)
    apart[0, 1] = apart[0, 1].flip(0)
    assert float(similarity(apart)[0, 0, 1]) == pytest.approx(0)


def test_attention_maps_are_what_the_model_attends_with() -> None:
    model = random_model(SPECS["every_head_its_own_width"]).double()
    images = random_images(model.spec).double()
    with watched_qkv(model) as seen:
        model(images)
    qkv, shape = seen[0], model.spec.blocks[0]
    maps = attention_maps(qkv, model, 0)
    v = qkv[..., 2 * sum(shape.qk_dims) :].split(list(shape.v_dims), -1)
    out = torch.cat([maps[:, h] @ v[h] for h in range(3)], -1)
    want = model.blocks[0].attn(model.blocks[0].norm1(model._embed(images)))
    torch.testing.assert_close(model.blocks[0].attn.proj(out), want)


def test_permuting_heads_permutes_scores_and_twins_are_central() -> None:
    model = random_model(SPEC).double()
    images = [random_images(SPEC, 4).double()]
    group = groups_of(SPEC, ("head",))[0]
    before = GOHSP().score(model, [group], images, 0)[group]
    order = [2, 0, 3, 1]
    qkv = model.blocks[0].attn.qkv
    rows = torch.cat([torch.arange(8) + 32 * part + 8 * h for part in range(3) for h in order])
    with torch.no_grad():
        qkv.weight.copy_(qkv.weight[rows])
        qkv.bias.copy_(qkv.bias[rows])
        model.blocks[0].attn.proj.weight.copy_(model.blocks[0].attn.proj.weight[:, rows[64:] - 64])
    after = GOHSP().score(model, [group], images, 0)[group]
    torch.testing.assert_close(after, before[order])
    with torch.no_grad():  # head 3 attends as head 0 does
        for part in (0, 1):
            qkv.weight[32 * part + 24 : 32 * part + 32] = qkv.weight[32 * part : 32 * part + 8]
            qkv.bias[32 * part + 24 : 32 * part + 32] = qkv.bias[32 * part : 32 * part + 8]
    twins = GOHSP().score(model, [group], images, 0)[group]
    assert set(twins.argsort(descending=True)[:2].tolist()) == {0, 3}
    peripheral = GOHSP(keep="peripheral").score(model, [group], images, 0)[group]
    assert peripheral.argsort().tolist() == twins.argsort(descending=True).tolist()


def test_neurons_are_ranked_by_the_norm_of_their_rows_and_columns() -> None:
    model = random_model(SPEC)
    groups = groups_of(SPEC, ("v", "mlp", "qk"))
    scores = group_norms(dict(model.named_parameters()), groups, model)
    fc1, fc2 = model.blocks[1].mlp.fc1.weight, model.blocks[1].mlp.fc2.weight
    mlp = next(g for g in groups if g.kind == "mlp" and g.block == 1)
    want = (fc1.square().sum(1) + fc2.square().sum(0)).sqrt()
    torch.testing.assert_close(scores[mlp].float(), want)
    v = next(g for g in groups if g.kind == "v" and g.block == 1 and g.head == 2)
    torch.testing.assert_close(scores[v].float(), model.blocks[1].attn.proj.weight[:, 16:24].norm(dim=0))


@pytest.mark.parametrize("options", [{}, {"global_pruning": True}, {"stages": 1, "recipe": {"max_steps": 1}}], ids=str)
def test_the_result_is_heterogeneous_and_within_budget(options: dict[str, object]) -> None:
    spec = vit(*[block((8,) * 6, (8,) * 6, 48) for _ in range(4)], embed_dim=48)
    images = random_images(spec, 4)
    data = [(images, torch.arange(4))]
    small = prune(random_model(spec), "gohsp", {"params": "50%"}, data, train=data, **options)
    assert 0.49 * spec.params() <= small.spec.params() <= 0.5 * spec.params()
    assert len({block.num_heads for block in small.spec.blocks}) > 1
    assert len({block.mlp_dim for block in small.spec.blocks}) > 1


def test_told_so_every_layer_gives_up_the_same_share() -> None:
    small = prune(random_model(SPEC), "gohsp", {"params": "60%"}, [random_images(SPEC)], isomorphic=False)
    first, second = small.spec.blocks
    assert first.num_heads == second.num_heads
    assert abs(first.mlp_dim - second.mlp_dim) <= 1


@pytest.mark.parametrize("stages", [1, 3])
def test_soft_stages_draw_to_nothing_what_the_cut_then_removes(stages: int) -> None:
    model = random_model(SPEC)
    images, labels = random_images(SPEC, 16), torch.arange(16) % 7
    data = [(images[i : i + 4], labels[i : i + 4]) for i in range(0, 16, 4)]
    before = {name: weight.clone() for name, weight in model.state_dict().items()}

    def lost(soft: bool) -> float:
        method = GOHSP(stages=stages if soft else 0, stage_epochs=6, rho=0.3, recipe={"lr": 5e-3, "alpha": 1.0})
        small = prune(model, method, {"macs": "60%"}, data, train=data)
        with torch.no_grad():
            p, q = (m(images).log_softmax(-1) for m in (small, model))
        assert small.spec.macs() <= 0.6 * SPEC.macs()
        return float(torch.nn.functional.kl_div(p, q, reduction="batchmean", log_target=True))

    assert lost(soft=True) < lost(soft=False)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_it_finetunes_after_the_cut() -> None:
    model = random_model(SPEC)
    data = [(random_images(SPEC, 8), torch.arange(8) % 7)]
    plain, tuned = (
        prune(model, "gohsp", {"macs": "60%"}, data, train=data, finetune_epochs=epochs) for epochs in (0, 2)
    )
    assert plain.plan == tuned.plan
    assert not torch.equal(plain.head.weight, tuned.head.weight)
    assert Plan.from_dict(tuned.plan).dense == SPEC


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"stages": 2}, "expected train="),
        ({"finetune_epochs": 2}, "expected train="),
        ({"keep": "central heads"}, "central, peripheral"),
        ({"damping": 0}, "damping"),
        ({"groups": ("channel",)}, "combine it"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, object], reason: str) -> None:
    with pytest.raises(PruningError, match=reason):
        prune(random_model(SPEC), "gohsp", {"macs": "60%"}, [random_images(SPEC)], **options)
