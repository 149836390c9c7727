"""Random Mapping, MLAC-AR and Recovery against references and theorems, each with a positive control."""

import copy
import math

import pytest
import torch
from conftest import KINDS, Batches, bpe, flat, toy_model

from common import SGD, Stream, decoder_layers, next_token_loss, residual_streams, token_mean
from mlac_ar import draw_attacker, held_streams, mlac_ar
from random_mapping import mapping_loss, random_mapping, random_targets
from recover import finetune

TEXTS = [f"text number {i} says {i * i % 17} and {'more ' * (i % 5)}" for i in range(40)]


# ---- residual streams and losses


@pytest.mark.parametrize("kind", KINDS)
def test_streams_are_the_decoder_layers_outputs_before_the_final_norm(kind):
    model, ids = toy_model(kind), torch.randint(1, 60, (2, 7))
    with torch.no_grad():
        last = model.base_model(ids, output_hidden_states=True, use_cache=False).hidden_states[-1]
        before = [len(layer._forward_hooks) for layer in decoder_layers(model)]
        H = residual_streams(model, ids)
    assert len(H) == len(decoder_layers(model)) == 2 and H[0].shape == (2, 7, 16)
    norm = next(m for n, m in model.base_model.named_children() if "norm" in n)
    torch.testing.assert_close(norm(H[-1]), last)
    assert not torch.allclose(H[-1], last)  # control: hidden_states[-1] is not the stream
    assert [len(layer._forward_hooks) for layer in decoder_layers(model)] == before


def test_checkpointing_does_not_change_the_streams_gradient():
    grads, (ids, mask) = [], Batches(3)[0]
    for checkpointing in (False, True):
        model = toy_model().train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        mapping_loss(model, random_targets(model, 0), ids, mask).backward()
        grads.append([p.grad for p in model.parameters()])
    assert sum(g is not None for g in grads[0]) > 10
    assert all((a is None) == (b is None) and (a is None or torch.equal(a, b)) for a, b in zip(*grads))


def test_mapping_loss_in_closed_form(monkeypatch):
    r, ids = torch.randn(10, 8), torch.arange(10).view(2, 5)
    mask = torch.ones(2, 5, dtype=torch.bool)

    def loss(h):
        monkeypatch.setattr("random_mapping.layer_outputs", lambda model, ids: [h[ids], h[ids]])
        return mapping_loss(None, r, ids, mask)

    turned = torch.stack([-r[..., 1::2], r[..., ::2]], -1).flatten(-2)  # at right angles
    for h, value in ((3 * r, 0), (-r, 2), (turned, 1)):
        torch.testing.assert_close(loss(h), torch.tensor(float(value)), atol=1e-6, rtol=0)
    h = 3 * r
    h[[0, 5, 9]] = 1e3  # BOS and a pad point elsewhere ...
    mask[1, 4] = False
    torch.testing.assert_close(loss(h), torch.tensor(0.0), atol=1e-6, rtol=0)
    mask[1, 4] = True  # ... which counts once the pad is unmasked
    assert loss(h) > 0.05


def test_targets_are_a_gaussian_row_per_token_from_their_own_seed():
    model = toy_model(vocab=4000)
    r = random_targets(model, 5)
    assert r.shape == (4000, 16) and torch.equal(r, random_targets(model, 5))
    assert abs(r.mean()) < 0.02 and abs(r.std() - 1) < 0.02 and not torch.equal(r, random_targets(model, 6))


@pytest.mark.parametrize("kind", KINDS)
def test_next_token_loss_is_cross_entropy_without_pads_in_any_slices(kind):
    ids, mask = Batches(4)[0]
    whole = toy_model(kind)
    logits = whole(ids).logits[:, :-1][mask[:, 1:]]
    expected = torch.nn.functional.cross_entropy(logits, ids[:, 1:][mask[:, 1:]])
    expected.backward()
    for at_once in (60 * 7, 1 << 25):
        model = toy_model(kind)
        loss = next_token_loss(model, ids.masked_fill(~mask, 7), mask, at_once=at_once)
        loss.backward()
        torch.testing.assert_close(loss, expected)
        for p, q in zip(model.parameters(), whole.parameters()):
            torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-4)
    assert (
        abs(next_token_loss(toy_model(kind), ids, torch.ones_like(mask)) - expected) > 1e-5
    )  # control: pads count


def test_losses_in_closed_form():
    model = toy_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()  # uniform posterior
    torch.testing.assert_close(next_token_loss(model, *Batches(3)[0]), torch.tensor(math.log(60)))
    ids, mask = Batches(3)[0]
    mean = token_mean(model, ids, mask, lambda logits, targets: targets.float())
    torch.testing.assert_close(mean, ids[:, 1:][mask[:, 1:]].float().mean())


def test_random_mapping_reaches_noise_on_forget_text_and_keeps_retain_text():
    model, seen = toy_model(), []
    forget, retain = Batches(8, seed=1, same=True), Batches(8, seed=2, same=True)
    random_mapping(model, forget, retain, steps=60, lr=1e-2, log=lambda i, n, **v: seen.append(v))
    assert seen[0]["forget"] > 0.9 and seen[-1]["forget"] < 0.5 and seen[-1]["retain"] < seen[0]["retain"]


# ---- MLAC-AR


def literal_outer_step(model, forget, retain, K, lr, alpha, optimizer, outer=None):
    """Algorithm 1's outer step, written from the paper's lines: a deep copy for ω, φ as a list of sums.

    Its last line is θ ← θ - η ∇L(θ; x_r) + (α_paper / K) φ, with α_paper = α η. torch's AdamW, in place of
    gradient descent, is given what η multiplies.
    """
    make = (
        torch.optim.SGD if optimizer == "sgd" else lambda ps, lr: torch.optim.AdamW(ps, lr=lr, weight_decay=0)
    )
    omega = copy.deepcopy(model)
    inner = make(list(omega.parameters()), lr=lr)
    *steps, heldout = zip(*(x.chunk(K + 1) for x in forget))
    phi = [torch.zeros_like(p) for p in model.parameters()]
    for x_f in steps:
        inner.zero_grad()
        next_token_loss(omega, *x_f).backward()
        inner.step()
        gradient = torch.autograd.grad(next_token_loss(omega, *heldout), list(omega.parameters()))
        phi = [f + g for f, g in zip(phi, gradient)]
    gradient = torch.autograd.grad(next_token_loss(model, *retain), list(model.parameters()))
    outer = outer or make(list(model.parameters()), lr=lr)
    alpha_paper = alpha * lr
    for p, g, f in zip(model.parameters(), gradient, phi):
        if optimizer == "sgd":
            p.data = p.data - lr * g + (alpha_paper / K) * f
        else:
            p.grad = g - (alpha_paper / K) * f / lr
    if optimizer == "adamw":
        outer.step()
    return outer


@pytest.fixture
def exact(monkeypatch):
    """float64 throughout: the loss's own cast to float32 is lifted."""
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("K", [1, 4, 16])
@pytest.mark.parametrize(
    "kind, more", [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("gemma2", {})]
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_outer_steps_are_algorithm_1(K, optimizer, kind, more, checkpointing, exact):
    model = toy_model(kind, dtype=torch.float64, **more)
    assert kind == "llama" or model.config.tie_word_embeddings
    start, literal = flat(model), copy.deepcopy(model)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    forget, retain, outer = Batches((K + 1) * 3, seed=1), Batches(3, seed=2), None
    arguments = dict(K=K, lr=1e-2, alpha=0.7, optimizer=optimizer)
    mlac_ar(model, forget, retain, N=2, **arguments)
    for i in range(2):
        outer = literal_outer_step(literal, forget[i], retain[i], outer=outer, **arguments)
    assert (flat(model) - flat(literal)).abs().max() < 1e-10
    assert (flat(model) - start).abs().max() > 1e-3  # control: it did move
    assert all(p.grad is None for p in model.parameters())


def literal_varied_step(model, forget, retain, i, outer, *, K, lr, alpha, vary, objective, heal, hold):
    """One outer step against a drawn adversary, with entropy objective, healing and TAR's retain loss:
    deep copies and torch's AdamW. `hold` is (weight, the first model)."""
    rate, last, warm, mixed = draw_attacker(vary, K, 0, i)
    omega = copy.deepcopy(model)
    inner = torch.optim.AdamW(omega.parameters(), weight_decay=0)
    if warm:
        inner.load_state_dict(copy.deepcopy(outer.state_dict()))
    inner.param_groups[0]["lr"] = rate * lr
    *x_f, heldout = zip(*(x.chunk(K + 1) for x in forget))
    *x_a, x_r = zip(*(x.chunk(K + 1 if "mix" in vary else 1) for x in retain))
    phi = [torch.zeros_like(p) for p in model.parameters()]
    for k in range(last):
        inner.zero_grad()
        loss = next_token_loss(omega, *x_f[k])
        loss = 0.5 * loss + 0.5 * next_token_loss(omega, *x_a[k]) if mixed else loss
        loss.backward()
        inner.step()
        if objective == "entropy":
            p = omega(heldout[0]).logits[:, :-1][heldout[1][:, 1:]].softmax(-1)
            held = -(p * p.log()).sum(-1).mean()
        else:
            held = next_token_loss(omega, *heldout)
        phi = [f + g for f, g in zip(phi, torch.autograd.grad(held, list(omega.parameters())))]
    retained = next_token_loss(model, *x_r)
    if hold:
        H, H_0 = residual_streams(model, x_r[0]), residual_streams(hold[1], x_r[0])
        far = [(h - h_0.detach())[x_r[1]].square().sum(-1).mean() for h, h_0 in zip(H, H_0)]
        retained = retained + hold[0] * torch.stack(far).mean()
    gradient = torch.autograd.grad(retained, list(model.parameters()))
    healed = [0.0] * len(phi)
    if heal:
        healed = torch.autograd.grad(heal * next_token_loss(omega, *x_r), list(omega.parameters()))
    for p, g, f, h in zip(model.parameters(), gradient, phi, healed):
        p.grad = g - alpha / last * f + h
    outer.step()


@pytest.mark.parametrize(
    "vary, objective, heal, hold",
    [
        (("rate", "K", "state", "mix"), "loss", 0.0, 0.0),
        ((), "entropy", 0.0, 0.0),
        ((), "loss", 0.5, 0.0),
        ((), "loss", 0.0, 0.3),
        (("K", "mix"), "entropy", 0.5, 0.3),
    ],
)
def test_outer_steps_against_drawn_adversaries(vary, objective, heal, hold, exact):
    model = toy_model(dtype=torch.float64)
    start, literal = flat(model), copy.deepcopy(model)
    K, N = 3, 8  # of seed 0, steps 5 and 8 have warm moments, 4, 6 and 8 mixed text
    forget, retain = Batches((K + 1) * 3, seed=1), Batches(3 * (K + 1 if "mix" in vary else 1), seed=2)
    same = dict(K=K, lr=1e-2, alpha=0.7, vary=vary, objective=objective, heal=heal)
    mlac_ar(model, forget, retain, N=N, extra=held_streams(model, hold) if hold else None, **same)
    outer, first = torch.optim.AdamW(literal.parameters(), lr=1e-2, weight_decay=0), copy.deepcopy(literal)
    for i in range(N):
        literal_varied_step(literal, forget[i], retain[i], i + 1, outer, hold=hold and (hold, first), **same)
    # where gradients cancel, AdamW magnifies what rounding leaves of them
    assert (flat(model) - flat(literal)).abs().max() < 1e-5
    plain = toy_model(dtype=torch.float64)
    mlac_ar(plain, forget, retain, K=K, lr=1e-2, alpha=0.7, N=N)
    assert (flat(model) - flat(plain)).abs().max() > 1e-3  # control: the options do something
    assert (flat(model) - start).abs().max() > 1e-3


def test_adversaries_are_drawn_only_where_asked():
    everything = ("rate", "K", "state", "mix")
    drawn = [draw_attacker(everything, 8, 0, i) for i in range(400)]
    rates, steps, warm, mixed = map(torch.tensor, zip(*drawn))
    assert 0.31 < rates.min() < 0.4 and 2.6 < rates.max() < 3.17 and abs(rates.log().mean()) < 0.1
    assert set(steps.tolist()) == set(range(1, 9)) and abs(steps.float().mean() - 4.5) < 0.4
    assert abs(warm.float().mean() - 0.5) < 0.1 and abs(mixed.float().mean() - 0.5) < 0.1
    assert drawn == [draw_attacker(everything, 8, 0, i) for i in range(400)]
    assert {draw_attacker((), 8, 0, i) for i in range(9)} == {(1.0, 8, False, False)}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_alpha_zero_is_finetuning_on_retain_text_bit_exactly(optimizer):
    a, b = toy_model(), toy_model()
    mlac_ar(a, Batches(9, seed=1), Batches(3, seed=2), K=2, N=3, lr=1e-2, alpha=0, optimizer=optimizer)
    if optimizer == "adamw":
        finetune(b, Batches(3, seed=2), steps=3, lr=1e-2)
    else:
        opt = SGD(b.parameters())
        for i in range(3):
            next_token_loss(b, *Batches(3, seed=2)[i]).backward()
            opt.step(i + 1, 1e-2)
    assert torch.equal(flat(a), flat(b))


def test_phi_is_logged_and_no_loss_is_too_high_for_it():
    """Far above chance, too, the held-out batch moves the model; α = 0 logs 0 (control)."""
    norms = []
    for alpha in (1, 2, 0):
        model, seen = toy_model(initializer_range=1.0), []
        more = dict(K=2, N=1, lr=1e-4, optimizer="sgd", log=lambda i, n, **v: seen.append(v))
        mlac_ar(model, Batches(9), Batches(3), alpha=alpha, **more)
        assert seen[0]["heldout"] > math.log(60)
        norms.append(seen[0]["phi"].item())
    assert norms[0] > 0.1 and abs(norms[1] - 2 * norms[0]) < 1e-3 * norms[0] and norms[2] == 0


def test_mlac_ar_slows_an_adversary():
    """Ascent on φ raises the heldout loss that an adversary reaches; α = 0 does not (control)."""
    reached = []
    for alpha in (0.0, 1.0):
        model, words = toy_model(initializer_range=0.1), dict(T=6, vocab=8)
        mlac_ar(model, Batches(12, seed=1, **words), Batches(3), K=3, N=15, lr=3e-3, alpha=alpha)
        finetune(model, Batches(4, seed=9, **words), steps=5, lr=3e-3)
        reached.append(next_token_loss(model, *Batches(16, seed=5, **words)[0]).item())
    assert reached[1] > reached[0] + 0.1


@pytest.mark.parametrize("method", ["random_mapping", "mlac_ar", "finetune"])
def test_a_loss_of_nan_stops_before_the_update(method):
    model = toy_model()
    with torch.no_grad():
        next(model.parameters())[5] = float("nan")

    class Bad:  # token 5 first occurs in batch 2
        def __init__(self, size):
            self.size = size

        def __getitem__(self, i):
            ids = torch.full((self.size, 6), 7)
            ids[:, 2] = 5 if i == 2 else 8
            return ids, torch.ones_like(ids, dtype=torch.bool)

    good = copy.deepcopy(model)
    run = {
        "random_mapping": lambda m, log: random_mapping(m, Bad(2), Bad(2), steps=9, lr=1e-2, log=log),
        "mlac_ar": lambda m, log: mlac_ar(m, Bad(4), Bad(2), K=1, N=9, lr=1e-2, alpha=1, log=log),
        "finetune": lambda m, log: finetune(m, Bad(2), steps=9, lr=1e-2, log=log),
    }[method]

    def stop_after_two(i, *_, **__):
        if i == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run(good, stop_after_two)
    with pytest.raises(FloatingPointError, match="step 3"):
        run(model, lambda *_, **__: None)
    a, b = flat(model), flat(good)
    assert torch.equal(a[~a.isnan()], b[~b.isnan()]) and a.isnan().sum() == b.isnan().sum()


# ---- the order of the data


def stream(batch, seed=0, purpose="forget", tokens=64):
    return Stream(TEXTS, bpe(TEXTS), batch=batch, tokens=tokens, seed=seed, purpose=purpose, device="cpu")


def test_a_batch_is_a_function_of_seed_purpose_and_step():
    a, b = stream(6), stream(6)
    later = [a[i] for i in (9, 3, 17)]
    assert all(torch.equal(x[0], b[i][0]) for x, i in zip(later, (9, 3, 17)))
    assert not torch.equal(stream(6, seed=1)[3][0], later[1][0])
    assert not torch.equal(stream(6, purpose="retain")[3][0], later[1][0])


def test_an_epoch_reads_each_text_once_and_no_batch_has_one_twice():
    s = stream(8)
    rows = [tuple(r.tolist()) for i in range(5) for r in s[i][0]]
    epoch = {tuple(ids[ids != 0].tolist()) for ids in map(torch.tensor, rows)}
    assert len(rows) == 40 == len(epoch)
    for i in range(40):
        assert len({tuple(r.tolist()) for r in s[i][0]}) == 8  # so x_heldout is never one of its step's x_f


def test_a_text_is_bos_and_tokens_cut_and_padded_on_the_right():
    s = stream(6, tokens=7)
    ids, mask = s[0]
    assert ids.shape[1] == 7 and (ids[:, 0] == s.tokenizer.bos_token_id).all() and mask.all()
    ids, mask = stream(40)[0]
    assert (mask.long().diff(dim=1) <= 0).all() and (~mask).any() and (ids[~mask] == 0).all()
    with pytest.raises(SystemExit):
        stream(41)
