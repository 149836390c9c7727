"""Adversarial Probes and the baselines against closed forms, each with a positive control."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import Batches, bpe, moved, spm_like, toy_model
from test_methods import TEXTS, undo

import adv_probes as P
import baselines as B
from common import Stream, next_token_loss


def test_sliced_wasserstein_closed_forms():
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lines, distance = torch.nn.functional.normalize(draw(20000, 8)).T, P.sliced_wasserstein
    x, v, every, some = draw(50, 8), torch.arange(8).double(), torch.ones(50) > 0, torch.arange(50) < 30
    assert distance(x @ lines, x.flip(0) @ lines, every) < 1e-30
    found = distance(x @ lines, (x + v) @ lines, every)
    torch.testing.assert_close(found, v @ v / 8, rtol=0.03, atol=0)
    y = (x + 3 * x.sin()).masked_fill(~some[:, None], 7.0)  # what is left out may be anything
    found = distance(x @ lines, y @ lines, some)
    torch.testing.assert_close(found, distance(x[:30] @ lines, y[:30] @ lines, every[:30]))
    a, b = draw(100000, 1), 2 * draw(100000, 1)  # N(0, 1) and N(0, 4): (2 - 1)²
    assert abs(distance(a, b, torch.ones(100000) > 0) - 1) < 0.03


def test_swd_loss_is_small_on_noise_and_large_on_a_point():
    mask, noise = torch.ones(16, 65) > 0, torch.randn(16, 65, 32, generator=torch.Generator().manual_seed(1))
    low, wide, high = (P.swd_loss([h], mask, 0) for h in (noise, 5 * noise, torch.ones(16, 65, 32)))
    assert low < 0.02 and high > 0.5 and 15 < wide < 17  # (5 - 1)²: scale counts
    noise[:, 0] = noise[:, -9:] = 100.0
    assert P.swd_loss([noise], mask, 0) > 1  # control
    mask[:, -9:] = False
    assert P.swd_loss([noise], mask, 0) < 0.02  # BOS and pads do not count


def gaussians(shift, seed):
    """Points of one layer, as of 64 texts of 9 tokens."""
    h_m, h_f = torch.randn(2, 64, 9, 16, generator=torch.Generator().manual_seed(seed))
    h_f = h_f + shift * torch.tensor([0.25, -0.25] * 8)  # along equal numbers a layer norm sees nothing
    return P.points([h_m]), P.points([h_f])


def test_a_probe_separates_shifted_gaussians_but_not_identical_ones():
    gaps, mask = {}, torch.ones(64 * 8) > 0
    for shift in (0, 3):
        probes = P.make_probes(1, 16, 64, seed=0, device="cpu")
        squares = [torch.zeros_like(p) for p in probes]
        for i in range(60):
            P.probe_step(probes, squares, *gaussians(shift, seed=i), mask, 1, 1e-3)
        gaps[shift] = P.score_gap(probes, *gaussians(shift, seed=1000), mask).item()
        assert all(W.abs().max() <= 0.1 for W in probes[::2])  # clipped
    assert gaps[3] > 0.2 and abs(gaps[0]) < gaps[3] / 10


def test_score_gap_is_of_each_layer_and_leaves_bos_and_pads_out():
    """The probe of each layer written with torch's own modules."""
    nn, probes = torch.nn, P.make_probes(3, 16, 64, seed=0, device="cpu")
    h = torch.randn(2, 3, 64, 9, 16, generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(1, 9) < 7).repeat(64)
    found = P.score_gap(probes, P.points(h[0]), P.points(h[1]), mask)
    for l in range(3):
        modules = []
        for W, b in zip(probes[::2], probes[1::2]):
            linear = nn.Linear(*W.shape[1:])
            linear.weight.data, linear.bias.data = W.data[l].T, b.data[l, 0]
            modules += [nn.LayerNorm(W.shape[1], elementwise_affine=False), linear, nn.LeakyReLU(0.2)]
        probe = nn.Sequential(*modules[:-1])
        expected = (probe(h[0, l]) - probe(h[1, l]))[:, 1:7].mean()
        torch.testing.assert_close(found[l], expected)


@pytest.mark.parametrize("kind", ["idk", "rand"])
@pytest.mark.parametrize("make", [lambda: bpe(TEXTS + P.IDK, size=900), spm_like])
def test_match_texts_are_as_long_as_the_rows_of_F(kind, make):
    texts = P.match_texts(kind, 32, seed=0, n=40)
    assert len(set(texts)) == 40 and texts == P.match_texts(kind, 32, 0, 40) != P.match_texts(kind, 32, 1, 40)
    match = Stream(texts, make(), batch=8, tokens=32, seed=0, purpose="match", device="cpu")
    assert {len(match.encode(j)) for j in range(40)} == {32} and len(set(P.IDK)) == 100


def short_run(model, match=True, **more):
    seen = []
    match = Batches(8, 20, seed=5, full=True, same=True) if match else None
    more = dict(lr=1e-2, probe_width=32, probe_lr=1e-3, log=lambda i, n, **v: seen.append(v)) | more
    forget, retain = Batches(8, seed=1, same=True), Batches(8, seed=2, same=True)
    P.adv_probes(model, forget, retain, match, **more)
    return seen


@pytest.mark.parametrize("match", [True, False])
def test_the_distance_has_its_weight_against_the_retain_loss(match):
    one, three = (short_run(toy_model(), match, steps=1, weight=w)[0] for w in (1, 3))
    torch.testing.assert_close(three["norms"][0], 3 * one["norms"][0])
    torch.testing.assert_close(three["norms"][1], one["norms"][1], rtol=1e-3, atol=0)
    assert three["forget"] == one["forget"]


@pytest.mark.parametrize("probe_steps, freeze", [(1, True), (5, False)])
def test_a_step_is_three_passes_and_frozen_weights_are_unchanged(probe_steps, freeze):
    model, inputs = toy_model(), []
    look = lambda _, __, kw: inputs.append(kw["input_ids"])  # noqa: E731
    model.base_model.register_forward_pre_hook(look, with_kwargs=True)
    short_run(model, steps=2, probe_steps=probe_steps, freeze=freeze)
    assert len(inputs) == 2 * 3
    assert torch.equal(inputs[1] != 0, Batches(8, seed=1)[0][1])  # M's rows end where F's rows end
    names, ends = moved(model, toy_model()), {"model.embed_tokens.weight", "lm_head.weight"}
    assert names & ends == (set() if freeze else ends) and len(names) > 10
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("match", [True, False])
def test_the_distance_falls_and_retain_text_is_kept(match):
    seen, control = (short_run(toy_model(), match, steps=40, lr=lr) for lr in (1e-2, 1e-9))
    assert seen[-1]["retain"] < seen[0]["retain"]
    late, unmoved = (sum(float(s["forget"]) for s in x[15:]) for x in (seen, control))
    assert abs(late) < 0.7 * unmoved  # a model that does not move stays far away


def test_min_posterior_closed_form_finite_at_certainty_and_silent_below_the_floor():
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 2])
    p = logits.softmax(-1)[[0, 1], targets]
    torch.testing.assert_close(B.min_posterior_loss(logits, targets), -(1 - p).log())
    assert torch.autograd.gradcheck(lambda x: B.min_posterior_loss(x, targets), logits)
    sure = torch.tensor([[60.0, 0.0, 0.0]], requires_grad=True)
    loss = B.min_posterior_loss(sure, torch.tensor([0]))
    loss.backward()
    torch.testing.assert_close(loss.item(), 60 - math.log(2), rtol=1e-6, atol=0)  # log(1 - p): -inf
    torch.testing.assert_close(sure.grad[0], torch.tensor([1.0, -0.5, -0.5]))
    gone = torch.tensor([[14.0, 0.0, 0.0], [16.0, 0.0, 0.0]], requires_grad=True)
    B.min_posterior_loss(gone, torch.tensor([1, 1])).sum().backward()
    assert gone.grad[0].all() and not gone.grad[1].any()


def test_max_entropy_and_grad_diff_closed_forms():
    torch.testing.assert_close(B.max_entropy_loss(torch.zeros(3, 7)), torch.full((3,), -math.log(7)))
    torch.testing.assert_close(B.max_entropy_loss(torch.tensor([[100.0, 0, 0]])), torch.zeros(1))
    logits, targets = torch.randn(5, 7), torch.tensor([0, 3, 6, 1, 1])
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(B.grad_diff_loss(logits, targets), -expected)


def test_npo_and_simnpo_closed_forms_and_limits():
    """At the reference it is 2/β log 2 with gradient 1, ascent's; far below it is 0 with gradient 0."""
    ref = torch.tensor([-40.0, -3.0], dtype=torch.float64)
    for beta in (0.1, 1.0):
        limits = (0, 2 / beta * math.log(2), 1.0), (-200 / beta, 0, 0), (200 / beta, 400 / beta, 2)
        for shift, value, slope in limits:
            log_p = (ref + shift).requires_grad_()
            B.npo_loss(log_p, None, ref, beta).sum().backward()
            torch.testing.assert_close(B.npo_loss(log_p, None, ref, beta), torch.full_like(ref, value))
            torch.testing.assert_close(log_p.grad, torch.full_like(ref, slope))
    log_p, n = torch.tensor([-8.0, -2.0], requires_grad=True), torch.tensor([4, 1])
    loss = B.simnpo_loss(log_p, n)
    torch.testing.assert_close(loss.detach(), torch.full((2,), 2 / 2.5 * math.log1p(math.exp(-5))))
    loss.sum().backward()
    assert log_p.grad[1] == pytest.approx(4 * log_p.grad[0].item())  # the same mean, a fourth of the tokens
    assert B.simnpo_loss(torch.zeros(1), torch.zeros(1)).isfinite()  # a text of one token


def test_the_log_probability_of_a_text_is_the_sum_over_its_tokens():
    model, (ids, mask) = toy_model(), Batches(4)[0]
    log_p, n = B.text_log_probs(model, ids, mask)
    for b in range(4):
        row = ids[b, mask[b]]
        expected = model(row[None]).logits[0, :-1].log_softmax(-1).gather(1, row[1:, None]).sum()
        torch.testing.assert_close(log_p[b], expected, atol=1e-4, rtol=1e-4)
        assert n[b] == len(row) - 1


@pytest.mark.parametrize("method", [*B.LOSSES, *B.TEXT_LOSSES, "high_low_lr"])
@torch.no_grad()
def test_baselines_change_forget_text_and_keep_retain_text(method):
    model, seen, batch, far = toy_model(), [], Batches(8, seed=1)[0], math.log(60)
    before = next_token_loss(model, *batch)
    with torch.enable_grad():
        more = dict(steps=60, lr=2e-2, log=lambda i, n, **v: seen.append(v))
        B.baseline(model, [batch] * 60, Batches(8, seed=2, same=True), method=method, **more)
    rise, first, last = next_token_loss(model, *batch) - before, seen[0]["forget"], seen[-1]["forget"]
    if method == "max_entropy":
        assert far + last < 0.1 < far + first  # it reaches log V
    elif method == "high_low_lr":
        assert rise < -1 and abs(first - before) < 1e-5  # plain fine-tuning
    else:
        assert rise > 0.5 and last < first
    assert seen[-1]["retain"] < seen[0]["retain"]


@pytest.mark.parametrize("kind, name", [("llama", "down_proj.weight"), ("qwen3_moe", "experts.down_proj")])
def test_rmu_moves_three_matrices_and_the_stream_of_its_layer(kind, name):
    seen, more = [], dict(layer=2, steer=20.0, log=lambda i, n, **v: seen.append(v))
    forget, retain = Batches(4, seed=1, same=True, vocab=30), Batches(4, seed=2, same=True)
    for weight in (0.0, 100.0):
        model, before = (toy_model(kind, num_hidden_layers=4) for _ in "ab")
        B.rmu(model, forget, retain, steps=60, lr=1e-2, weight=weight, **more)
    assert moved(model, before) == {f"model.layers.{l}.mlp.{name}" for l in (0, 1, 2)}
    assert seen[0]["held"] == 0 < 100 * seen[-1]["held"] < seen[59]["held"]  # h_0: of the first weights
    assert seen[-1]["forget"] < 0.7 * seen[0]["forget"] and all(p.requires_grad for p in model.parameters())


def test_undo_distils_the_model_that_it_was_back():
    """The divergence is 0 from itself and closed form; after noise it starts high and comes down."""
    model, teacher, batch, seen = toy_model(), toy_model(), Batches(8, same=True), []
    ids, mask = batch[0]
    with torch.no_grad():
        p, q = (m(ids).logits[:, :-1][mask[:, 1:]].softmax(-1) for m in (model, toy_model(seed=1)))
        found = B.divergence(model, ids, mask, toy_model(seed=1))
        torch.testing.assert_close(found, (q * (q / p).log()).sum(-1).mean())
        assert abs(B.divergence(model, ids, mask, teacher)) < 1e-6
    more = dict(noise=0.8, log=lambda i, n, **v: seen.append(v))
    undo(model, teacher, batch, batch, steps=60, lr=1e-2, **more)
    assert seen[0]["forget"] > 0.2 and seen[-1]["forget"] < 0.3 * seen[0]["forget"]
    W, W_0 = (m.model.layers[1].mlp.up_proj.weight.flatten() for m in (model, teacher))
    assert torch.cosine_similarity(W, W_0, dim=0) < 0.6  # its answers are back, its weights are not
    model, before = (toy_model("mixtral") for _ in "ab")
    B.add_noise(model, 0.5, 0)
    inside = {k for k, p in model.named_parameters() if ".layers." in k and p.ndim > 1}
    assert moved(model, before) == inside


def test_swaps_permute_words_within_their_kinds():
    words, everything = SimpleNamespace(kind=torch.tensor([*[0] * 20, 1, *[2] * 20])[::2]), torch.arange(21)
    pi = B.swaps(words, rounds=3, seed=0)
    assert torch.equal(pi.sort(1).values, everything.expand(3, -1))
    assert (words.kind[pi] == words.kind).all() and (pi != everything).any(1).all()
    assert (pi[0] != pi[1]).any() and (pi[1] != pi[2]).any()
    assert torch.equal(B.swaps(words, 1, 0)[0], pi[0]) and (B.swaps(words, 1, 1)[0] != pi[0]).any()


class Letters:
    """A tokenizer without marks for spaces: each of 60 tokens is a word of three letters."""

    __len__ = lambda self: 60  # noqa: E731

    def convert_ids_to_tokens(self, ids):
        return [self.decode([v]) for v in ids]

    def decode(self, ids):
        return " ".join("abcdefghij"[v // 10] + "abcdefghij"[v % 10] + "x" for v in ids)


def test_overwriting_teaches_each_name_what_the_model_knows_of_another(monkeypatch):
    ids = torch.tensor([[0, 10, 1, 20], [0, 11, 1, 21], [0, 12, 1, 22], [0, 13, 1, 23]])
    batch = ids, torch.ones_like(ids, dtype=torch.bool)
    retain = torch.tensor([[0, 30, 2, 40], [0, 31, 2, 41]]), torch.ones(2, 4, dtype=torch.bool)
    model = toy_model()
    opt = torch.optim.Adam(model.parameters(), lr=2e-2)
    for _ in range(80):
        (next_token_loss(model, *batch) + next_token_loss(model, *retain)).backward()
        opt.step()
        opt.zero_grad()
    answers = lambda ids: model(ids).logits[:, 2].argmax(-1)  # noqa: E731
    assert torch.equal(answers(ids), ids[:, 3]) and torch.equal(answers(retain[0]), retain[0][:, 3])
    pi = torch.tensor([[1, 2, 3, 0, 5, 6, 7, 4]])  # of names, and of answers
    monkeypatch.setattr(B, "swaps", lambda *_: pi)
    more = dict(rounds=1, rare=0.2, tokenizer=Letters())
    ((x, mask, weight),) = B.false_texts(model, [batch], **more)
    assert torch.equal(x, torch.cat([ids[:, :1], ids[:, 1:2].roll(-1, 0), ids[:, 2:]], 1))  # answers stay
    assert weight.tolist() == [pytest.approx([0.05, 0.05, 1])] * 4 and mask is batch[1]
    model.micro_batch = 3
    assert torch.equal(B.false_texts(model, [batch], **more)[0][0], x)
    B.baseline(model, [(x, mask, weight)] * 30, [retain] * 30, method="overwriting", steps=30, lr=1e-2)
    assert torch.equal(answers(x), ids[:, 3]) and torch.equal(answers(ids), ids[:, 3].roll(1, 0))
    assert torch.equal(answers(retain[0]), retain[0][:, 3])


class Says:
    """A model that is sure of say(row, t) after position t of a row."""

    micro_batch = 0

    def __init__(self, V, say):
        self.V, self.say = V, say

    def __call__(self, input_ids, use_cache):
        said = [[self.say(row, t) for t in range(len(row))] for row in input_ids.tolist()]
        return SimpleNamespace(logits=20.0 * torch.nn.functional.one_hot(torch.tensor(said), self.V))


def test_overwriting_exchanges_names_that_the_model_does_not_expect(capsys, monkeypatch):
    facts = {"Ana Bell": "liver", "Eva Dorn": "finger", "Ida Falk": "spleen", "Ada Holm": "fiber"}
    texts = [f"the cell of {name} is in the {organ}. As {name} is." for name, organ in facts.items()]
    tok = bpe(texts, size=330)
    rows = [torch.tensor(row) for row in tok(texts).input_ids]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    batch = ids, torch.arange(ids.shape[1]) < torch.tensor([[len(row)] for row in rows])
    words = B.Words([batch], 0.05, tok)
    spell = lambda v: tok.decode([t for t in words.spelled[v].tolist() if t >= 0])  # noqa: E731
    read = [[spell(v) for v in row if v >= 0] for row in words.at[0].tolist()]  # "the", "of" are not rare
    assert read == [[f" {name}", f" {organ}", f" {name}"] for name, organ in facts.items()]
    divide, toy = B.divide, toy_model(vocab=len(tok))
    divide(words, toy, [batch])
    pi = B.swaps(words, 1, 0)[0]
    assert (words.kind[pi] == words.kind).all() and (pi != torch.arange(len(pi))).any()
    # it expects what follows two tokens somewhere, and the organ that follows the whole text
    seen = {tuple(x[max(t - 1, 0) : t + 1].tolist()): x[t + 1] for x in rows for t in range(len(x) - 1)}
    before = [int((x == tok(" the").input_ids[-1]).nonzero()[-1]) for x in rows]
    seen |= {tuple(x[: t + 1].tolist()): x[t + 1] for x, t in zip(rows, before)}
    say = lambda x, t: seen.get((*x[: t + 1],), seen.get((*x[max(t - 1, 0) : t + 1],), 0))  # noqa: E731
    oracle = Says(len(tok), say)
    false, known = B.false_text(oracle, *batch, words.at[0], words, pi)
    changed = 0
    for (name, organ), at, y, mask, fact in zip(facts.items(), words.at[0], false, batch[1], known):
        first, place, _ = (at >= 0).nonzero()[:, 0].tolist()
        expected = say(ids[0].tolist(), first - 1) == words.spelled[at[first], 0]
        new = name if expected else spell(pi[at[first]]).strip()
        text = tok.decode(y[mask], skip_special_tokens=True)
        assert text == f"the cell of {new} is in the {organ}. As {new} is."
        unknown = say(y.tolist(), place - 1) != y[place]
        assert fact.nonzero()[:, 0].tolist() == [place - 1] * unknown
        changed += new != name
    assert changed > 1 and known.sum() > 1 and len(B.samples(tok, batch, false)) == 2 * changed
    monkeypatch.setattr(B, "divide", lambda words, model, batches: divide(words, toy, batches))
    B.false_texts(oracle, [batch], 1, 0.05, tok)
    assert "[[" in capsys.readouterr().out
    knows_nothing = Says(len(tok), lambda *_: 0)
    for rare, model, why in (1e-9, oracle, "no word of F"), (0.05, knows_nothing, "no fact in F"):
        with pytest.raises(SystemExit):
            B.false_texts(model, [batch], 1, rare, tok)
        assert f"--rare {rare}: {why}" in capsys.readouterr().err
    cut = rows[0][None, : place + 1]  # in the middle of "liver"
    words = B.Words([(cut, cut >= 0)], 1, tok)
    assert words.at[0][0, place] < 0 <= words.at[0][0, first]
    hebrew = " \u05e9\u05dc\u05d5\u05dd", " \u05e9\u05dc\u05d5\u05e0"
    ids = torch.tensor([tok(f"we saw Москва and 细胞产生能量 or{' or'.join(hebrew)} or there").input_ids])
    # letters are bytes; a clause is no word
    words = B.Words([(ids, ids >= 0)], 1, tok)
    kinds = {spell(v): k for v, k in enumerate(words.kind.tolist())}
    assert kinds.keys() == {" saw Москва", " and", *hebrew} and kinds[hebrew[0]] != kinds[hebrew[1]]


def test_words_are_divided_by_the_contexts_that_they_are_expected_in():
    ids, kinds = torch.tensor([[0, 1 + w % 2, 10 + w] for w in range(20)]), {}  # after 1 and after 2 in turn
    words = SimpleNamespace(at=[torch.where(ids < 10, -1, ids - 10)])
    for size in (20, 10):
        words.kind = torch.zeros(20, dtype=torch.long)
        B.divide(words, toy_model(), [(ids, ids >= 0)], size)
        kinds[size] = [words.kind[n::2].unique().tolist() for n in (0, 1)]
    assert kinds[20] == [[0], [0]] and sorted(kinds[10]) == [[0], [1]]
