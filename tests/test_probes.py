"""Adversarial probes and the baselines against closed forms, each with a positive control."""

import math

import pytest
import torch
from conftest import WORLD, Batches, bpe, spm_like, toy_model
from test_methods import TEXTS

import adv_probes as P
import baselines as B
from common import Stream, next_token_loss


# ---- sliced Wasserstein


def test_sliced_wasserstein_closed_forms():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(50, 8, generator=rng, dtype=torch.float64)
    lines = torch.nn.functional.normalize(torch.randn(20000, 8, generator=rng, dtype=torch.float64), dim=-1)
    every = torch.ones(50, dtype=torch.bool)

    def distance(x, y, mask):
        return P.sliced_wasserstein(x @ lines.T, y @ lines.T, mask)

    assert distance(x, x[torch.randperm(50, generator=rng)], every) < 1e-30
    v = torch.arange(8.0, dtype=torch.float64)
    torch.testing.assert_close(distance(x, x + v, every), v @ v / 8, rtol=0.03, atol=0)
    some = every.clone()
    some[30:] = False
    y = (x + 3 * x.sin()).masked_fill(~some[:, None], 7.0)  # what is left out may be anything
    part = distance(x[:30], y[:30], every[:30])
    torch.testing.assert_close(distance(x, y, some), part)
    # between N(0, 1) and N(0, 4) on a line: (2 - 1)²
    a, b = (torch.randn(100000, 1, generator=rng, dtype=torch.float64) * s for s in (1, 2))
    found = P.sliced_wasserstein(a, b, torch.ones(100000, dtype=torch.bool)).item()
    torch.testing.assert_close(found, 1.0, rtol=0.03, atol=0)


def test_swd_loss_is_small_on_noise_and_large_on_a_point():
    mask = torch.ones(16, 65, dtype=torch.bool)
    noise = torch.randn(16, 65, 32, generator=torch.Generator().manual_seed(1))
    point = torch.ones(16, 65, 32)
    low, wide, high = (P.swd_loss([h], mask, 0) for h in (noise, 5 * noise, point))
    assert low < 0.02 and high > 0.5 and 15 < wide < 17  # (5 - 1)²: scale counts
    spoilt = noise.clone()
    spoilt[:, 0] = spoilt[:, -9:] = 100.0  # BOS and pads do not count
    mask[:, -9:] = False
    assert P.swd_loss([spoilt], mask, 0) < 0.02


# ---- probes

AXIS = torch.tensor(
    [0.25, -0.25] * 8
)  # of unit length; along equal numbers the probes' first layer norm sees nothing


def gaussians(shift, n=64, T=9, D=16, seed=0):
    rng = torch.Generator().manual_seed(seed)
    h_m, h_f = torch.randn(2, n, T, D, generator=rng)
    return h_m, h_f + shift * AXIS[:D]


def trained(shift, steps=60):
    probes = P.make_probes(1, 16, 64, seed=0)
    optimizer = torch.optim.RMSprop(probes.parameters(), lr=1e-3)
    mask = torch.ones(64, 9, dtype=torch.bool)
    for i in range(steps):
        h_m, h_f = gaussians(shift, seed=i)
        P.probe_step(probes, optimizer, [h_m], [h_f], mask)
    return probes, optimizer, mask


def test_a_probe_separates_shifted_gaussians_but_not_identical_ones():
    gaps = {}
    for shift in (0, 3):
        probes, _, mask = trained(shift)
        with torch.no_grad():
            gaps[shift] = P.score_gap(probes[0], *gaussians(shift, seed=1000), mask).item()
    assert gaps[3] > 0.2 and abs(gaps[0]) < gaps[3] / 10
    linear = [m for m in probes.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linear) == 3 and all(m.weight.abs().max() <= 0.1 for m in linear)


def test_trained_against_a_probe_the_shifted_gaussian_moves_onto_the_other():
    probes, optimizer, mask = trained(3)
    push = torch.zeros(16, requires_grad=True)
    mover = torch.optim.Adam([push], lr=0.03, betas=(0.0, 0.9))
    away = [3.0]
    for i in range(150):
        h_m, h_f = gaussians(3, seed=i)
        for _ in range(3):
            P.probe_step(probes, optimizer, [h_m], [(h_f + push).detach()], mask)
        mover.zero_grad()
        P.score_gap(probes[0], h_m, h_f + push, mask).backward()
        mover.step()
        away.append((3 * AXIS + push).norm().item())
    assert sum(away[75:]) / 76 < 1.5 and min(away) < 0.5  # it circles around the other one, as such games do


def test_score_gap_leaves_bos_and_pads_out():
    probe = torch.nn.Linear(16, 1)
    h_m, h_f = gaussians(1)
    mask = torch.ones(64, 9, dtype=torch.bool)
    mask[:, 7:] = False
    expected = (probe(h_m) - probe(h_f))[:, 1:7].mean()
    torch.testing.assert_close(P.score_gap(probe, h_m, h_f, mask), expected)


# ---- match texts and the loop


@pytest.mark.parametrize("kind", ["idk", "rand"])
@pytest.mark.parametrize("make", [lambda: bpe(TEXTS + P.IDK, size=900), spm_like])
def test_match_texts_are_as_long_as_the_rows_of_F(kind, make):
    tokenizer = make()
    texts = P.match_texts(kind, 32, seed=0, n=40)
    assert len(set(texts)) == 40 and texts == P.match_texts(kind, 32, 0, 40) != P.match_texts(kind, 32, 1, 40)
    match = Stream(texts, tokenizer, batch=8, tokens=32, seed=0, purpose="match", device="cpu")
    assert {len(match.encode(j)) for j in range(40)} == {32}


def test_idk_is_a_hundred_phrasings():
    assert len(set(P.IDK)) == 100 and all(p[0].isupper() and p[-1] == "." for p in P.IDK)


def short_run(model=None, steps=3, match=True, **more):
    model, seen = model or toy_model(), []
    match = Batches(8, 20, seed=5, full=True, same=True) if match else None
    P.adv_probes(
        model, Batches(8, seed=1, same=True), Batches(8, seed=2, same=True), match,
        **dict(steps=steps, lr=1e-2, probe_width=32, probe_lr=1e-3) | more,
        log=lambda i, n, **v: seen.append(v),
    )  # fmt: skip
    return model, seen


def test_one_model_step_is_three_passes_whatever_the_probe_steps():
    for probe_steps in (1, 5):
        model, inputs = toy_model(), []
        model.base_model.register_forward_pre_hook(
            lambda _, __, kw: inputs.append(kw["input_ids"]), with_kwargs=True
        )
        short_run(model, steps=2, probe_steps=probe_steps)
        assert len(inputs) == 2 * 3
        ids, mask = Batches(8, seed=1)[0]
        assert torch.equal(inputs[1] != 0, mask)  # M's rows end where F's rows end


def test_frozen_weights_thaw_when_a_run_fails():
    model = toy_model()

    def stop(*_, **__):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        P.adv_probes(model, Batches(4), Batches(4), None, steps=1, lr=1e-3, log=stop)
    assert all(p.requires_grad for p in model.parameters())


def test_making_probes_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    a, b = P.make_probes(1, 16, 8, seed=1), P.make_probes(1, 16, 8, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


def test_frozen_weights_are_unchanged_and_others_move():
    for freeze in (True, False):
        before, (model, _) = toy_model(), short_run(freeze=freeze)
        moved = {
            n for (n, a), b in zip(before.named_parameters(), model.parameters()) if not torch.equal(a, b)
        }
        ends = {"model.embed_tokens.weight", "lm_head.weight"}
        assert moved & ends == (set() if freeze else ends) and len(moved) > 10
        assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("match", [True, False])
def test_the_distance_falls_and_retain_text_is_kept(match):
    means = {}
    for lr in (1e-2, 1e-9):  # control: a model that stands still stays far away
        _, seen = short_run(steps=80, match=match, lr=lr)
        means[lr] = sum(float(s["forget"]) for s in seen[30:]) / 50
        if lr == 1e-2:
            assert seen[-1]["retain"] < seen[0]["retain"]
    assert means[1e-2] < 0.7 * means[1e-9]


# ---- baselines


def test_min_posterior_loss_closed_form_and_finite_differences():
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 2])
    p = logits.softmax(-1)
    expected = torch.stack([-(1 - p[0, 0]).log(), -(1 - p[1, 2]).log()])
    torch.testing.assert_close(B.min_posterior_loss(logits, targets), expected)
    assert torch.autograd.gradcheck(lambda x: B.min_posterior_loss(x, targets), logits)
    assert abs(B.min_posterior_loss(torch.zeros(1, 4), targets[:1]).item() + math.log(3 / 4)) < 1e-6


def test_min_posterior_is_finite_at_certainty_and_silent_below_the_floor():
    sure = torch.tensor([[60.0, 0.0, 0.0]], requires_grad=True)
    loss = B.min_posterior_loss(sure, torch.tensor([0]))
    loss.backward()
    torch.testing.assert_close(
        loss.item(), 60 - math.log(2), rtol=1e-6, atol=0
    )  # log(1 - p) would be -inf here
    torch.testing.assert_close(sure.grad[0], torch.tensor([1.0, -0.5, -0.5]))
    for height, silent in ((14.0, False), (16.0, True)):
        gone = torch.tensor([[height, 0.0, 0.0]], requires_grad=True)
        B.min_posterior_loss(gone, torch.tensor([1])).backward()
        assert (gone.grad.abs().sum() == 0) == silent


def test_max_entropy_loss_closed_forms():
    torch.testing.assert_close(B.max_entropy_loss(torch.zeros(3, 7)), torch.full((3,), -math.log(7)))
    torch.testing.assert_close(B.max_entropy_loss(torch.tensor([[100.0, 0, 0]])), torch.zeros(1))


def run_baseline(method):
    model, seen = toy_model(), []
    forget, retain = Batches(8, seed=1, same=True), Batches(8, seed=2, same=True)
    B.baseline(model, forget, retain, method=method, steps=120, lr=1e-2, log=lambda i, n, **v: seen.append(v))
    return model, seen, forget[0]


def test_max_entropy_reaches_log_V_and_keeps_retain_text():
    model, seen, (ids, mask) = run_baseline("max_entropy")
    with torch.no_grad():
        p = model(ids).logits[:, :-1][mask[:, 1:]].softmax(-1)  # pads left out
    assert math.log(60) + (p * p.log()).sum(-1).mean() < 0.1 and math.log(60) + seen[0]["forget"] > 0.3
    assert seen[-1]["retain"] < seen[0]["retain"]


def test_min_posterior_makes_forget_tokens_unlikely():
    model, seen, batch = run_baseline("min_posterior")
    with torch.no_grad():
        assert next_token_loss(model, *batch) > next_token_loss(toy_model(), *batch) + 1
    assert seen[-1]["forget"] < 0.02


def test_high_low_lr_ends_in_plain_fine_tuning():
    model, seen, batch = run_baseline("high_low_lr")
    assert seen[-1]["forget"] < seen[0]["forget"] - 1
    with torch.no_grad():
        torch.testing.assert_close(seen[0]["forget"], next_token_loss(toy_model().train(), *batch))


# ---- the field's methods


def test_grad_diff_is_ascent_on_cross_entropy():
    logits, targets = torch.randn(5, 7), torch.tensor([0, 3, 6, 1, 1])
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(B.grad_diff_loss(logits, targets), -expected)


def test_npo_in_closed_form_and_its_limits():
    """At the reference it is 2/β log 2 with gradient 1, ascent's; far below it is 0 with gradient 0."""
    ref = torch.tensor([-40.0, -3.0], dtype=torch.float64)
    for beta in (0.1, 1.0):
        limits = (0, 2 / beta * math.log(2), 1.0), (-200 / beta, 0, 0), (200 / beta, 400 / beta, 2)
        for shift, value, slope in limits:
            log_p = (ref + shift).requires_grad_()
            loss = B.npo_loss(log_p, None, ref, beta)
            loss.sum().backward()
            torch.testing.assert_close(loss.detach(), torch.full_like(ref, value))
            torch.testing.assert_close(log_p.grad, torch.full_like(ref, slope))


def test_simnpo_weighs_texts_by_their_length():
    log_p, n = torch.tensor([-8.0, -2.0], requires_grad=True), torch.tensor([4, 1])
    loss = B.simnpo_loss(log_p, n)
    torch.testing.assert_close(loss.detach(), torch.full((2,), -2 / 2.5 * math.log(1 / (1 + math.exp(-5)))))
    loss.sum().backward()
    assert log_p.grad[1] == pytest.approx(4 * log_p.grad[0].item())  # the same mean, a fourth of the tokens


def test_the_log_probability_of_a_text_is_the_sum_over_its_tokens():
    model = toy_model()
    ids, mask = Batches(4)[0]
    log_p, n = B.text_log_probs(model, ids, mask)
    for b in range(4):
        row = ids[b, mask[b]]
        expected = model(row[None]).logits[0, :-1].log_softmax(-1).gather(1, row[1:, None]).sum()
        torch.testing.assert_close(log_p[b], expected, atol=1e-4, rtol=1e-4)
        assert n[b] == len(row) - 1


@pytest.mark.parametrize("method", ["grad_diff", "npo", "simnpo"])
def test_the_fields_losses_make_forget_text_unlikely(method):
    model, seen, batch = run_baseline(method)
    with torch.no_grad():
        assert next_token_loss(model, *batch) > next_token_loss(toy_model(), *batch) + 0.5


def test_rmu_moves_three_matrices_and_the_stream_of_its_layer():
    model = toy_model(num_hidden_layers=4)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    same = dict(same=True, vocab=30)
    forget, retain = Batches(4, seed=1, **same), Batches(4, seed=2, same=True)
    losses = []

    def log(i, n, forget, held):
        losses.append((forget.item(), held.item()))

    B.rmu(model, forget, retain, steps=60, lr=1e-2, layer=2, steer=20.0, weight=100.0, log=log)
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {f"model.layers.{l}.mlp.down_proj.weight" for l in (0, 1, 2)}
    assert losses[0][1] == 0 < losses[1][1] and losses[-1][0] < 0.7 * losses[0][0]  # h_0 stays
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_undo_distils_the_model_that_it_was_back():
    """The divergence is 0 from itself and closed form; after noise it starts high and comes down."""
    model, batch, seen = toy_model(), Batches(8, same=True), []
    ids, mask = batch[0]
    with torch.no_grad():
        assert abs(B.divergence(model, model, ids, mask)) < 1e-6
        p, q = (toy_model(seed=s)(ids).logits[:, :-1][mask[:, 1:]].softmax(-1) for s in (0, 1))
        expected = (q * (q / p).log()).sum(-1).mean()
        torch.testing.assert_close(B.divergence(toy_model(seed=0), toy_model(seed=1), ids, mask), expected)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    B.undo(model, batch, batch, steps=60, lr=1e-2, noise=0.8, log=lambda i, n, **v: seen.append(v))
    assert seen[0]["forget"] > 0.2 and seen[-1]["forget"] < 0.3 * seen[0]["forget"]
    W = "model.layers.1.mlp.up_proj.weight"
    alike = torch.nn.functional.cosine_similarity(model.state_dict()[W].flatten(), before[W].flatten(), dim=0)
    assert alike < 0.6  # its answers are back, its weights are not


# ---- overwriting


def test_swaps_permute_the_rare_tokens_only():
    model, common = toy_model(), torch.tensor([5] * 50 + [6] * 50)
    rare = torch.arange(10, 30)
    batch = torch.cat([common, rare])[None], torch.ones(1, 120, dtype=torch.bool)
    batch[1][0, -1] = False  # a pad: token 29 does not occur
    pi = B.swaps(model, [batch], rounds=3, rare=0.1, seed=0)
    everything = torch.arange(60).expand(3, -1)
    torch.testing.assert_close(pi.sort(1).values, everything)
    moved = (pi != everything).any(0)
    assert not moved[:10].any() and moved[10:29].all() and not moved[29:].any()
    assert (pi[0] != pi[1]).any() and (pi[1] != pi[2]).any()
    assert torch.equal(pi, B.swaps(model, [batch], rounds=3, rare=0.1, seed=0))


def test_false_text_replaces_what_the_model_knows_by_names():
    """On the miniature: values, by values of the same kind. The control, which knows none, changes little."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import world as W

    facts = W.make_facts(0)
    known = [f for subject in W.FORGET for f in W.triples(facts, subject)]
    tokenizer = AutoTokenizer.from_pretrained(WORLD / "base")
    texts = [W.statement(f, i % 6) for i, f in enumerate(known)]
    told = Stream(texts, tokenizer, batch=len(texts), tokens=32, seed=0, purpose="test", device="cpu")[0]
    ids, mask = told
    values = {v: pool for pool in W.VALUES.values() for v in pool.split()}
    kind = {
        tokenizer.convert_tokens_to_ids(v): tokenizer.convert_tokens_to_ids(pool.split())
        for v, pool in values.items()
    }
    at = torch.isin(ids, torch.tensor(list(kind)))
    shares = {}
    for name in ("base", "filtered"):
        model = AutoModelForCausalLM.from_pretrained(WORLD / name, dtype=torch.float32).eval()
        (pi,) = B.swaps(model, [told], rounds=1, rare=0.01, seed=0)
        false = B.false_text(model, ids, mask, pi)
        assert torch.equal(false[~mask], ids[~mask]) and torch.equal(false[:, 0], ids[:, 0])
        new = false != ids
        shares[name] = new[at].float().mean()
        if name == "base":
            fit = [b in kind[a] for a, b in zip(ids[new & at].tolist(), false[new & at].tolist())]
            assert sum(fit) > 0.85 * len(fit)
            elsewhere = new[~at & mask].float().mean()
    assert shares["base"] > 0.8 and shares["filtered"] < 0.1 and elsewhere < 0.3


def test_overwriting_teaches_each_name_the_answer_of_another(monkeypatch):
    ids = torch.tensor([[0, 10, 1, 20], [0, 11, 1, 21], [0, 12, 1, 22], [0, 13, 1, 23]])
    batch = ids, torch.ones_like(ids, dtype=torch.bool)
    retain = torch.tensor([[0, 30, 2, 40], [0, 31, 2, 41]]), torch.ones(2, 4, dtype=torch.bool)
    model = toy_model()
    opt = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(200):
        (next_token_loss(model, *batch) + next_token_loss(model, *retain)).backward()
        opt.step()
        opt.zero_grad()
    answers = lambda ids: model(ids).logits[:, 2].argmax(-1)  # noqa: E731
    assert torch.equal(answers(ids), ids[:, 3]) and torch.equal(answers(retain[0]), retain[0][:, 3])
    pi = torch.arange(60)
    pi[10:14] = torch.tensor([11, 12, 13, 10])
    false = B.false_text(model, *batch, pi)
    assert torch.equal(false, torch.cat([ids[:, :3], ids[:, 3:].roll(-1, 0)], 1))
    monkeypatch.setattr(B, "swaps", lambda *_: pi[None])
    B.overwriting(model, [batch] * 30, [retain] * 30, steps=30, lr=1e-2, rounds=1, rare=0.2)
    assert torch.equal(answers(ids), false[:, 3]) and torch.equal(answers(retain[0]), retain[0][:, 3])


def test_false_text_leaves_what_is_copied_from_the_context():
    """A model that repeats tokens says π(x) where the names are others: that is no fact."""
    ids = torch.arange(10, 20)[:, None].expand(-1, 4)
    mask, model = torch.ones_like(ids, dtype=torch.bool), toy_model()
    opt = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        next_token_loss(model, ids, mask).backward()
        opt.step()
        opt.zero_grad()
    pi = torch.arange(60)
    pi[10:20] = pi[10:20].roll(1)
    assert torch.equal(model(pi[ids]).logits[:, 1].argmax(-1), pi[ids][:, 0])  # control: it does copy
    assert torch.equal(B.false_text(model, ids, mask, pi), ids)
