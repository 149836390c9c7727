"""Adversarial Probes and the baselines against closed forms, each with a positive control."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import world
from conftest import WORLD, Batches, bpe, moved, spm_like, toy_model
from test_methods import TEXTS, undo

import adv_probes as P
import baselines as B
from common import Stream, load_chunks, load_model, next_token_loss, token_losses


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
    assert {len(match.encode(text)) for text in texts} == {32} and len(set(P.IDK)) == 100


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


@torch.no_grad()
def test_overwriting_gives_names_the_facts_of_others(capsys):
    """In the miniature, whose base knows other facts of the new names."""
    (model, tokenizer), more = load_model(str(WORLD / "base")), dict(steps=4, rounds=2, rare=0.012)
    texts, ids_of = load_chunks(str(WORLD / "chunks.jsonl"))[0], tokenizer.convert_tokens_to_ids
    stream = Stream(texts, tokenizer, batch=24, tokens=208, seed=0, purpose="forget", device="cpu")
    first, last, values = (
        torch.tensor(ids_of(x)) for x in (world.FIRST, world.LAST, sum(world.POOLS.values(), []))
    )
    model.micro_batch, put = 0, [{}, {}]  # of each round: what stands for a name
    false = B.false_texts(model, stream, **more)
    assert capsys.readouterr().out.count("[[") == 20
    for i, (x, mask, weight) in enumerate(false):
        (ids, same), facts = stream[i], weight == 1
        names = torch.isin(ids, torch.cat([first, last]))
        assert torch.equal(mask, same) and names[x != ids].float().mean() > 0.98
        assert torch.equal(weight, torch.where(facts, 1, 0.05) * mask[:, 1:])
        assert torch.isin(ids[:, 1:][facts], values).sum() > 0.9 * facts.sum() > 40
        for row, t in torch.isin(ids, first).nonzero().tolist():
            name, new = ((*y[row, t : t + 2].tolist(),) for y in (ids, x))
            put[i // 2].setdefault(name, set()).add(new)
    for pi in put:  # the same in all texts
        same = [new.pop() for name, new in pi.items() if len(new) == 1 and new != {name}]
        assert len({*same}) == len(same) > 0.8 * len(pi) > 30
    assert put[0] != put[1]
    model.micro_batch = 5
    again = B.false_texts(model, stream, **more)
    assert all(torch.equal(a, b) for two in zip(false, again) for a, b in zip(*two))
    with torch.enable_grad():
        retain = Batches(8, vocab=99, same=True)
        B.baseline(model, false * 10, retain, method="overwriting", steps=40, lr=1e-2)
    x, mask, weight = false[3]
    losses = token_losses(model, x, mask, partial(torch.nn.functional.cross_entropy, reduction="none"))
    assert (-losses[weight == 1]).exp().mean() > 0.5


class Says:
    """A model that is sure of say(row, t) after position t of a row."""

    micro_batch = 0

    def __init__(self, V, say):
        self.V, self.say = V, say

    def __call__(self, input_ids, use_cache):
        said = [[self.say(row, t) for t in range(len(row))] for row in input_ids.tolist()]
        return SimpleNamespace(logits=20.0 * torch.nn.functional.one_hot(torch.tensor(said), self.V))


@pytest.mark.parametrize("bos", ["<s>", None])
def test_a_name_that_the_model_does_not_expect_is_another_in_the_whole_text(bos):
    """The model knows every text by its beginning: after "As" it expects the last one's name."""
    facts = {"Ana Bell": "liver", "Eva Dorn": "finger", "Ida Falk": "spleen", "Ada Holm": "fiber"}
    texts = [f"As {name} knows, {name} has a {organ}" for name, organ in facts.items()]
    stream = Stream(texts, bpe(texts, bos, size=330), batch=4, tokens=64, seed=0, purpose="x", device="cpu")
    rows = [stream.encode(text).tolist() for text in texts]
    follows = {tuple(row[:t]): row[t] for row in rows for t in range(1, len(row))}
    oracle = Says(400, lambda row, t: follows.get((*row[: t + 1],), 399))
    names = B.Names(texts, 0.1, stream.tokenizer)
    assert {x for kind in names.kinds for x in kind} == {*facts, *facts.values()}
    pi = {
        "Ana Bell": "Eva Dorn",
        "Eva Dorn": "Ada Holm",
        "Ada Holm": "Ana Bell",
        "Ida Falk": "Ida Falkenberg",
    }
    false, mask, known, lines = B.false_text(oracle, stream, 0, names, pi | {x: x for x in facts.values()})
    assert torch.equal(mask, stream[0][1]) and len(lines) == 1 + 2 + 2
    for text, x, n, fact in zip(stream.rows(0), false, mask.sum(1), known):
        name, new = text[3:11], pi[text[3:11]]
        changes = name in (
            "Ana Bell",
            "Eva Dorn",
        )  # the third is expected, the fourth another number of tokens
        said = stream.tokenizer.decode(x[:n], skip_special_tokens=True)
        assert said == (text.replace(name, new) if changes else text)
        assert fact.nonzero()[:, 0].tolist() == [n - 2] * changes  # the organ


def test_names_are_rare_words_or_two_of_a_kind():
    hebrew, told = ("\u05e9\u05dc\u05d5\u05dd", "\u05e9\u05dc\u05d5\u05e0"), "of and " * 50
    text = (
        f"we saw Москва of 细胞产生能量 of {' of '.join(hebrew)}, HIV-1, IL2RA, EGFR; Ann Lee Fox, Bo, Cal."
    )
    names = B.Names([told, text], 0.1, bpe([text], size=330))
    read = ["saw", "Москва", *hebrew, "HIV", "EGFR", "Ann Lee", "Fox", "Cal"]
    assert [text[a:b] for a, b in names.places(text)] == read and not names.places(told)
    kinds = {x: k for k, kind in enumerate(names.kinds) for x in kind}
    assert kinds.keys() == {*read} and kinds[hebrew[0]] != kinds[hebrew[1]] and kinds["Fox"] != kinds["HIV"]
    names.kinds = [[*"abcdefgh"], [*"xyz"]]
    pi, again, other = (names.permuted("key", k) for k in (0, 0, 1))
    assert pi == again != other and all(sorted(map(pi.get, kind)) == kind for kind in names.kinds)


def test_false_text_ends_with_a_line_where_there_is_none(capsys):
    texts = [f"{x} bar {x}" for x in ("Foo", "Quux")]
    stream = Stream(texts, bpe(texts), batch=2, tokens=9, seed=0, purpose="x", device="cpu")
    for rare, why in (1e-9, "no word of F"), (1, "no fact in F"):
        with pytest.raises(SystemExit):
            B.false_texts(Says(400, lambda *_: 0), stream, 1, 1, rare)
        assert f"--rare {rare}: {why}" in capsys.readouterr().err
