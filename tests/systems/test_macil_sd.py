"""MACIL-SD against the authors' own numbers, and the identities of its card."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import counterpoint.functional as fn
from counterpoint.data import load
from counterpoint.encoders.bags import MacilSDNet, VisualNet
from counterpoint.errors import CounterpointError, DataError, RunError
from counterpoint.lab.protocol import of_system
from counterpoint.systems.alignment.macil_sd import (
    MacilSD,
    MacilSDConfig,
    semi_bag_contrast,
)

PARITY = np.load(Path(__file__).parents[1] / "parity" / "macil-sd.npz")
TERMS = ("a2v_a2b", "a2v_a2n", "v2a_a2b", "v2a_a2n")


def case(number, kind, dtype=torch.float64, grad=False, file=PARITY):
    prefix = f"case{number}/{kind}/"
    found = {}
    for key in file.files:
        if key.startswith(prefix):
            value = torch.from_numpy(np.asarray(file[key]))
            value = value.to(dtype) if value.is_floating_point() else value
            found[key.removeprefix(prefix)] = value.requires_grad_(grad) if value.is_floating_point() else value
    return found


def tolerance(dtype):
    return {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_info_nce_equals_the_authors(dtype):
    inputs = case(0, "in", dtype, grad=True)
    loss = fn.info_nce(inputs["query"], inputs["positive_key"], inputs["negative_keys"], 0.1)
    loss.backward()
    torch.testing.assert_close(loss.detach(), case(0, "out", dtype)["loss"], **tolerance(dtype))
    for name, grad in case(0, "grad", dtype).items():
        torch.testing.assert_close(inputs[name].grad, grad, **tolerance(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_semi_bag_contrast_equals_the_authors(dtype):
    inputs = case(1, "in", dtype)
    reps = [inputs[name].requires_grad_() for name in ("audio_rep", "visual_rep")]
    terms = fn.semi_bag_contrast(
        inputs["mmil_prob"], inputs["audio_prob"], inputs["visual_prob"], inputs["seq_len"], *reps, 0.1
    )
    sum(terms).backward()
    expected = case(1, "out", dtype)
    for name, term in zip(TERMS, terms, strict=True):
        torch.testing.assert_close(term.detach(), expected[name], **tolerance(dtype))
    grads = case(1, "grad", dtype)
    torch.testing.assert_close(reps[0].grad, grads["audio_rep"], **tolerance(dtype))
    torch.testing.assert_close(reps[1].grad, grads["visual_rep"], **tolerance(dtype))


@pytest.fixture
def case2_networks():
    weights = case(2, "weight")
    av = MacilSDNet.load({k[3:]: v for k, v in weights.items() if k.startswith("av.")}, heads=2)
    visual = VisualNet(1024, hidden=8, heads=2, ffn=8).double().eval()
    visual.load_state_dict({k[2:]: v for k, v in weights.items() if k.startswith("v.")})
    return av, visual


def test_networks_and_training_loss_equal_the_authors(case2_networks):
    av, visual_net = case2_networks
    inputs, expected, grads = case(2, "in"), case(2, "out"), case(2, "grad")
    from counterpoint.core.mil import sequence_lengths

    seq_len = sequence_lengths(inputs["visual_feat"])
    assert seq_len.tolist() == expected["seq_len"].tolist()
    out = av(inputs["audio_feat"], inputs["visual_feat"], seq_len)
    for name in ("mmil_prob", "audio_prob", "visual_prob", "av_logit", "visual_out", "audio_out"):
        torch.testing.assert_close(getattr(out, name).detach(), expected[name], **tolerance(torch.float64))
    # The released order: audio probabilities select visual features and the other way round.
    terms = semi_bag_contrast(
        out.mmil_prob, out.audio_prob, out.visual_prob, seq_len, out.visual_out, out.audio_out, 0.1
    )
    mil = F.binary_cross_entropy(out.mmil_prob, inputs["label"])
    total = mil + 0.7 * (terms[0] + terms[2]) + 0.7 * (terms[1] + terms[3])
    total.backward()
    for name, value in zip(("mil_loss", *TERMS, "total_loss"), (mil, *terms, total), strict=True):
        torch.testing.assert_close(value.detach(), expected[name], **tolerance(torch.float64))
    v = visual_net(inputs["visual_feat"], seq_len)
    torch.testing.assert_close(v.mil_prob.detach(), expected["visual_net_mil_prob"], **tolerance(torch.float64))
    torch.testing.assert_close(v.logit.detach(), expected["visual_net_logit"], **tolerance(torch.float64))
    v_loss = F.binary_cross_entropy(v.mil_prob, inputs["label"])
    v_loss.backward()
    torch.testing.assert_close(v_loss.detach(), expected["visual_net_loss"], **tolerance(torch.float64))
    parameters = {f"av.{k}": p for k, p in av.named_parameters()} | {
        f"v.{k}": p for k, p in visual_net.named_parameters()
    }
    assert len(grads) > 30
    for name, grad in grads.items():
        torch.testing.assert_close(parameters[name].grad, grad, rtol=1e-9, atol=1e-12)


def test_learner_computes_the_released_training_loss(case2_networks):
    """The learner's own step, not a re-assembly of it: swapped order, weight 0.7, the published losses."""
    inputs, expected = case(2, "in"), case(2, "out")
    config = MacilSDConfig(
        hidden=8, heads=2, ffn=8, dropout=0.0, feature_order="released", contrast_step=0.7, contrast_max=0.7
    )
    data = type("Data", (), {"visual_dim": 1024, "audio_dim": 128})()
    learner = MacilSD(config, data).double()
    learner.av.load_state_dict(case2_networks[0].state_dict())
    learner.visual.load_state_dict(case2_networks[1].state_dict())
    learner.position.epoch = 3
    batch = {
        "visual": inputs["visual_feat"],
        "audio": inputs["audio_feat"],
        "label": inputs["label"],
        "name": list("abc"),
    }
    batch = learner.prepare(batch, torch.Generator())
    losses = learner.loss(batch) | learner.visual_loss(batch)
    names = {"loss": "total_loss", "mil": "mil_loss", "visual_loss": "visual_net_loss", **{t: t for t in TERMS}}
    assert set(losses) == set(names)
    for ours, theirs in names.items():
        torch.testing.assert_close(losses[ours].detach(), expected[theirs], **tolerance(torch.float64))
    learner.position.epoch = 0  # the ramp starts from nothing
    torch.testing.assert_close(learner.loss(batch)["loss"].detach(), expected["mil_loss"], **tolerance(torch.float64))


def test_paper_and_released_order_differ(case2_networks):
    av = case2_networks[0]
    inputs = case(2, "in")
    out = av(inputs["audio_feat"], inputs["visual_feat"], torch.tensor([18, 16, 5]))
    args = (out.mmil_prob, out.audio_prob, out.visual_prob, torch.tensor([18, 16, 5]))
    paper = semi_bag_contrast(*args, out.audio_out, out.visual_out)
    released = semi_bag_contrast(*args, out.visual_out, out.audio_out)
    assert abs(float(paper[0] - released[0])) > 1e-3


def test_distillation_equals_the_authors():
    av = {k[3:]: v for k, v in case(3, "in").items() if k.startswith("av.")}
    visual = {k[2:]: v for k, v in case(3, "in").items() if k.startswith("v.")}
    expected = case(3, "out")
    momentum = fn.distillation_momentum(7, 50, 0.91)
    assert momentum == pytest.approx(float(expected["momentum"]), rel=1e-12)
    after = fn.parameter_distillation(av, visual, momentum)
    for name, value in after.items():
        torch.testing.assert_close(value, expected[f"av.{name}"], **tolerance(torch.float64))
    assert torch.equal(after["fc_a.bias"], av["fc_a.bias"])
    schedule = [fn.distillation_momentum(e, 50) for e in range(50)]
    np.testing.assert_allclose(schedule, expected["momentum_all_epochs"], rtol=1e-12)


def test_end_of_epoch_blends_the_visual_network_in():
    data = load("async-bags", train=4, test=1)
    learner = MacilSD(MacilSDConfig(hidden=8, heads=2, ffn=8, epochs=10), data, seed=3)
    before = {k: v.clone() for k, v in learner.av.state_dict().items()}
    visual = {k: v.clone() for k, v in learner.visual.state_dict().items()}
    learner.end_epoch(2)
    expected = fn.parameter_distillation(before, visual, fn.distillation_momentum(2, 10))
    for name, value in learner.av.state_dict().items():
        torch.testing.assert_close(value, expected[name])
    assert torch.equal(learner.av.fc_a.weight, before["fc_a.weight"])
    assert not torch.equal(learner.av.fc_v.weight, before["fc_v.weight"])
    assert all(torch.equal(v, visual[k]) for k, v in learner.visual.state_dict().items())


def checkpoint_file():
    folder = os.environ.get("COUNTERPOINT_DATA")
    path = Path(folder).resolve().parent / "parity" / "macil-sd-checkpoint.npz" if folder else None
    if path is None or not path.is_file():
        pytest.skip("the authors' trained weights are not in the repository; set COUNTERPOINT_DATA to ../shared/data")
    return np.load(path)


DEAD = (
    "cma.layer.multiheadattn.in_proj_weight",
    "cma.layer.feedforward.w_1.weight",
    "cma.layer.self_attn.layer_norm.weight",
)


@pytest.mark.parametrize("suffix", [".pkl", ".safetensors"])
def test_published_checkpoint_gives_its_outputs(tmp_path, suffix):
    file = checkpoint_file()
    state = case(0, "weight", torch.float32, file=file) | {name: torch.zeros(3) for name in DEAD}
    path = tmp_path / f"published{suffix}"
    if suffix == ".pkl":
        torch.save(state, path)
    else:
        from safetensors.torch import save_file

        save_file(state, path)
    net = MacilSDNet.load(path)
    assert sum(p.numel() for p in net.parameters()) == 247_425
    inputs, expected = case(0, "in", file=file), case(0, "out", file=file)
    net = net.double()
    for pool, seq_len in (("eval_pool", None), ("train_pool", inputs["seq_len"])):
        out = net(inputs["audio_feat"], inputs["visual_feat"], seq_len)
        for name in ("mmil_prob", "audio_prob", "visual_prob", "av_logit"):
            torch.testing.assert_close(getattr(out, name), expected[f"{pool}/{name}"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(out.visual_out, expected["visual_out"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.sigmoid(out.av_logit).mean(0), expected["snippet_score"], rtol=1e-9, atol=1e-12)


def test_other_checkpoints_raise_an_error(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/ran",))

    import pickle

    (tmp_path / "evil.pkl").write_bytes(pickle.dumps({"fc_v.weight": Evil()}))
    torch.save({"fc_v.weight": Evil()}, tmp_path / "evil2.pkl")
    (tmp_path / "noise.pkl").write_bytes(os.urandom(300))
    (tmp_path / "noise.safetensors").write_bytes(os.urandom(300))
    (tmp_path / "empty.pkl").write_bytes(b"")
    for name in ("evil.pkl", "evil2.pkl", "noise.pkl", "noise.safetensors", "empty.pkl", "absent.pkl"):
        with pytest.raises(RunError, match=name.replace(".", r"\.")):
            MacilSDNet.load(tmp_path / name)
    assert not (tmp_path / "ran").exists()
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "other.pkl")
    with pytest.raises(RunError, match="not a MACIL-SD"):
        MacilSDNet.load(tmp_path / "other.pkl")
    state = MacilSDNet(hidden=8, heads=2, ffn=8).state_dict()
    del state["cma.layer.self_attn.linears.2.bias"]
    with pytest.raises(RunError, match=r"linears\.2\.bias"):
        MacilSDNet.load(state, heads=2)


# ------------------------------------------------------------------------------------------------------------ identities


def loop_contrast(bag_prob, audio_prob, visual_prob, seq_len, audio_rep, visual_rep, t):
    """Compute the card's text, bag by bag and row by row."""

    def mine(prob, rep):
        abn, bgd, nor = [], [], []
        for i, n in enumerate(seq_len.tolist()):
            k = n // 16 + 1
            order = prob[i, :n].argsort()
            bgd += [rep[i, j] for j in order[:k]]
            top = [rep[i, j] for j in order[n - k :]]
            if bag_prob[i] > 0.5:
                abn += [torch.stack(top).mean(0)] * k
            else:
                nor += top
        return abn, bgd, nor

    def nce(q, p, n):
        q, p, n = (F.normalize(torch.stack(x), dim=1) for x in (q, p, n))
        logits = torch.cat([(q * p).sum(1, keepdim=True), q @ n.T], 1) / t
        return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))

    a, v = mine(audio_prob, audio_rep), mine(visual_prob, visual_rep)
    if not a[0] or not a[2]:
        return [torch.zeros(())] * 4
    return nce(a[0], v[0], v[1]), nce(a[0], v[0], v[2]), nce(v[0], a[0], a[1]), nce(v[0], a[0], a[2])


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), bags=st.integers(1, 9), time=st.integers(1, 70))
def test_vectorised_contrast_equals_the_loop(seed, bags, time):
    g = torch.Generator().manual_seed(seed)
    probs = [torch.rand(bags, time, generator=g, dtype=torch.float64) for _ in range(2)]
    reps = [torch.randn(bags, time, 6, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    bag_prob = torch.rand(bags, generator=g, dtype=torch.float64)
    seq_len = torch.randint(1, time + 1, (bags,), generator=g)
    ours = semi_bag_contrast(bag_prob, *probs, seq_len, *reps, 0.1)
    loop = loop_contrast(bag_prob, *probs, seq_len, *reps, 0.1)
    for a, b in zip(ours, loop, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-9, atol=1e-12)
    if sum(loop).requires_grad:
        for a, b in zip(torch.autograd.grad(sum(ours), reps), torch.autograd.grad(sum(loop), reps), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def contrast_inputs(bags=4, time=20, dim=8):
    g = torch.Generator().manual_seed(0)
    prob = torch.rand(2, bags, time, generator=g)
    rep = torch.randn(2, bags, time, dim, generator=g)
    return torch.tensor([0.9, 0.1, 0.8, 0.2][:bags]), prob[0], prob[1], torch.full((bags,), time), rep[0], rep[1]


@pytest.mark.parametrize("bag_prob", [[0.5, 0.5, 0.1, 0.2], [0.9, 0.8, 0.7, 0.6]])
def test_one_sided_batches_give_zero(bag_prob):
    inputs = list(contrast_inputs())
    inputs[0] = torch.tensor(bag_prob)
    inputs[4].requires_grad_()
    assert [float(term) for term in semi_bag_contrast(*inputs)] == [0.0] * 4


def test_padding_is_never_mined():
    inputs = list(contrast_inputs())
    inputs[3] = torch.tensor([20, 7, 12, 3])
    spoiled = [x.clone() for x in inputs]
    for i, n in enumerate(inputs[3].tolist()):
        for prob, extreme in ((1, 0.0), (2, 1.0)):
            spoiled[prob][i, n:] = extreme
        for rep in (4, 5):
            spoiled[rep][i, n:] = 1e3
    for a, b in zip(semi_bag_contrast(*inputs), semi_bag_contrast(*spoiled), strict=True):
        torch.testing.assert_close(a, b)


def test_equal_embeddings_give_log_one_plus_negatives():
    inputs = list(contrast_inputs())
    inputs[4] = inputs[5] = torch.ones(4, 20, 8)
    l1, l2, l3, l4 = semi_bag_contrast(*inputs)
    k = 20 // 16 + 1
    assert float(l1) == pytest.approx(math.log(1 + 4 * k)) == float(l3)
    assert float(l2) == pytest.approx(math.log(1 + 2 * k)) == float(l4)


@pytest.mark.parametrize(
    ("position", "name"), [(0, "bag_prob"), (1, "audio_prob"), (2, "visual_prob"), (4, "audio_rep")]
)
def test_nan_is_named(position, name):
    inputs = list(contrast_inputs())
    inputs[position] = torch.full_like(inputs[position], torch.nan)
    with pytest.raises(ValueError, match=name):
        semi_bag_contrast(*inputs)


def test_shapes_and_lengths_are_checked():
    inputs = list(contrast_inputs())
    with pytest.raises(ValueError, match="same shapes"):
        semi_bag_contrast(*inputs[:4], inputs[4][:, :-1], inputs[5])
    with pytest.raises(ValueError, match="seq_len"):
        semi_bag_contrast(*inputs[:3], torch.tensor([20, 0, 20, 20]), *inputs[4:])
    with pytest.raises(ValueError, match="temperature"):
        semi_bag_contrast(*inputs, 0.0)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), time=st.integers(1, 80))
def test_mil_pool_is_the_mean_of_the_top(seed, time):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, time, generator=g, dtype=torch.float64)
    lengths = torch.randint(1, time + 1, (3,), generator=g)
    pooled = fn.topk_mil_pool(logits, lengths)
    for row, n, p in zip(logits, lengths.tolist(), pooled, strict=True):
        k = n // 16 + 1
        assert float(p) == pytest.approx(float(torch.sigmoid(row[:n].topk(k).values.mean())))


@pytest.mark.parametrize("time", [1, 2, 33])
@pytest.mark.parametrize("bags", [1, 3])
def test_networks_keep_their_shapes_for_one_bag_and_one_snippet(bags, time):
    av, v = MacilSDNet(10, 6, hidden=8, heads=2, ffn=8), VisualNet(10, hidden=8, heads=2, ffn=8)
    visual, audio = torch.randn(bags, time, 10), torch.randn(bags, time, 6)
    lengths = torch.full((bags,), time)
    for n in (None, lengths):
        out = av(audio, visual, n)
        assert out.av_logit.shape == out.audio_prob.shape == (bags, time)
        assert out.mmil_prob.shape == (bags,)
        assert v(visual, n).logit.shape == (bags, time)


def test_audio_and_visual_must_be_cut_first():
    with pytest.raises(ValueError, match="cut both to the same length"):
        MacilSDNet(10, 6, hidden=8, heads=2, ffn=8)(torch.randn(1, 4, 6), torch.randn(1, 5, 10))


def test_mask_padding_makes_scores_independent_of_padding():
    for mask in (False, True):
        net = MacilSDNet(10, 6, hidden=8, heads=2, ffn=8, mask_padding=mask).eval()
        visual, audio = torch.randn(1, 9, 10), torch.randn(1, 9, 6)
        padded = net(F.pad(audio, (0, 0, 0, 5)), F.pad(visual, (0, 0, 0, 5)), torch.tensor([9]))
        alone = net(audio, visual, torch.tensor([9]))
        assert torch.allclose(padded.av_logit[:, :9], alone.av_logit, atol=1e-6) is mask


def test_contrast_weight_waits_then_ramps():
    data = load("async-bags", train=2, test=1)
    paper = MacilSD(MacilSDConfig(), data)
    assert [round(paper.contrast_weight(e), 6) for e in (0, 1, 5, 15, 40)] == [0, 0.1, 0.5, 1.5, 1.5]
    laptop = MacilSD(MacilSDConfig(**of_system("macil-sd").setting), data)
    assert [round(laptop.contrast_weight(e), 6) for e in (0, 7, 8, 9, 39)] == [0, 0, 0.02, 0.04, 0.3]


def test_settings_are_checked():
    with pytest.raises(CounterpointError, match="multiple of heads"):
        MacilSDConfig(hidden=10, heads=4)
    with pytest.raises(CounterpointError, match="temperature"):
        MacilSDConfig(temperature=0.0)
    for wrong in ({"heads": 0}, {"visual_lr": 0.0}, {"dropout": 2.0}, {"contrast_delay": -1}):
        with pytest.raises(CounterpointError, match=next(iter(wrong))):
            MacilSDConfig(**wrong)
    with pytest.raises(CounterpointError, match="batch_size"):
        MacilSDConfig(batch_size=0)


def test_a_bag_without_snippets_is_named():
    data = load("async-bags", train=2, test=1)
    learner = MacilSD(MacilSDConfig(), data)
    batch = {
        "visual": torch.zeros(2, 5, data.visual_dim),
        "audio": torch.zeros(2, 5, data.audio_dim),
        "label": torch.zeros(2),
        "name": ["fine", "empty"],
    }
    batch["visual"][0] = 1
    with pytest.raises(DataError, match="empty"):
        learner.prepare(batch, torch.Generator())
