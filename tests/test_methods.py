"""The methods against references and theorems, each with a positive control; toy models in float64 where it matters."""

import copy
import math
import shutil

import pytest
import torch
from conftest import KINDS, bpe, toy_model

import mlac_ar as M
import random_mapping as R
import recover
from common import Stream, decoder_layers

TEXTS = [f"text number {i} says {i * i % 17} and {'more ' * (i % 5)}" for i in range(40)]


def batches(size, T=12, vocab=60, seed=0):
    """step -> (ids, mask): fixed random batches, the last two positions of odd rows padded."""

    class Fixed:
        def __getitem__(self, i):
            ids = torch.randint(1, vocab, (size, T), generator=torch.Generator().manual_seed(1000 * seed + i))
            mask = torch.ones(size, T, dtype=torch.bool)
            mask[1::2, -2:] = False
            return ids, mask

    return Fixed()


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# ---- residual streams and the mapping loss


@pytest.mark.parametrize("kind", KINDS)
def test_streams_are_the_decoder_layers_outputs_before_the_final_norm(kind):
    model = toy_model(kind)
    ids = torch.randint(1, 60, (2, 7))
    with torch.no_grad(), R.residual_streams(model) as H:
        last = model.base_model(ids, output_hidden_states=True, use_cache=False).hidden_states[-1]
    assert len(H) == len(decoder_layers(model)) == 2 and H[0].shape == (2, 7, 16)
    norm = next(m for n, m in model.base_model.named_children() if "norm" in n)
    torch.testing.assert_close(norm(H[-1]), last)
    assert not torch.allclose(H[-1], last)  # control: taking hidden_states[-1] for the stream would be wrong
    with torch.no_grad():
        model(ids)
    assert len(H) == 2  # hooks are gone


def test_checkpointing_leaves_the_streams_gradient_alone():
    grads = []
    for checkpointing in (False, True):
        model = toy_model().train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        ids, mask = batches(3)[0]
        with R.residual_streams(model) as H:
            model.base_model(ids, use_cache=False)
        R.mapping_loss(H, R.random_targets(model, 0)[ids], mask).backward()
        grads.append([p.grad for p in model.parameters()])
    assert sum(g is not None for g in grads[0]) > 10
    for a, b in zip(*grads):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))


def test_mapping_loss_closed_forms():
    r, mask = torch.randn(2, 5, 8), torch.ones(2, 5, dtype=torch.bool)
    turned = torch.stack(
        [-r[..., 1], r[..., 0], -r[..., 3], r[..., 2], -r[..., 5], r[..., 4], -r[..., 7], r[..., 6]], -1
    )
    for h, value in ((3 * r, 0), (-r, 2), (turned, 1)):
        torch.testing.assert_close(R.mapping_loss([h, h], r, mask), torch.tensor(float(value)), atol=1e-6, rtol=0)
    h = 3 * r
    h[:, 0], h[1, 4] = 1e3, 1e3  # BOS and a pad point elsewhere ...
    mask[1, 4] = False
    torch.testing.assert_close(R.mapping_loss([h], r, mask), torch.tensor(0.0), atol=1e-6, rtol=0)
    mask[1, 4] = True  # ... which counts once the pad is unmasked
    assert R.mapping_loss([h], r, mask) > 0.05


def test_targets_are_one_gaussian_row_a_token_from_their_own_seed():
    model = toy_model(vocab=4000)
    r = R.random_targets(model, 5)
    assert r.shape == (4000, 16) and torch.equal(r, R.random_targets(model, 5))
    assert abs(r.mean()) < 0.02 and abs(r.std() - 1) < 0.02 and not torch.equal(r, R.random_targets(model, 6))


def test_next_token_loss_is_cross_entropy_without_pads():
    model, (ids, mask) = toy_model(), batches(4)[0]
    logp = model(ids).logits.log_softmax(-1)
    terms = [-logp[b, t - 1, ids[b, t]] for b in range(4) for t in range(1, 12) if mask[b, t]]
    torch.testing.assert_close(R.next_token_loss(model, ids, mask), torch.stack(terms).mean())
    other = ids.clone()
    other[~mask] = 7
    torch.testing.assert_close(R.next_token_loss(model, other, mask), torch.stack(terms).mean())


def test_random_mapping_reaches_noise_on_forget_text_and_keeps_retain_text():
    model, forget, retain = toy_model(), batches(8, seed=1), batches(8, seed=2)

    class Same:
        def __init__(self, x):
            self.x = x[0]

        def __getitem__(self, i):
            return self.x

    seen = []
    R.random_mapping(
        model,
        Same(forget),
        Same(retain),
        steps=60,
        lr=1e-2,
        log=lambda i, n, **v: seen.append((v["forget"], v["retain"])),
    )
    assert seen[0][0] > 0.9 and seen[-1][0] < 0.5 and seen[-1][1] < seen[0][1]


# ---- the update


def test_adamw_is_torchs():
    p = torch.randn(7, 5, dtype=torch.float64)
    q = torch.nn.Parameter(p.clone())
    reference = torch.optim.AdamW([q], lr=1e-3, weight_decay=0)
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t in range(1, 6):
        q.grad = torch.randn(7, 5, dtype=torch.float64)
        R.adamw_(p, q.grad, m, v, t, 1e-3)
        reference.step()
        torch.testing.assert_close(p, q.detach(), atol=1e-12, rtol=0)


def test_bf16_rounds_stochastically_and_nearest_would_lose_the_update():
    w = torch.full((200_000,), 0.02).bfloat16()
    target = w.float() - 2e-5
    assert torch.equal(target.bfloat16(), w)  # control: to the nearest, nothing moves
    p = R.rounded(target, torch.bfloat16, 17)
    steps = (p != w).float().mean()  # a step of bf16 at 0.02 is 1.22e-4: a sixth of the weights take one
    assert 0.14 < steps < 0.19
    se = p.float().std() / math.sqrt(p.numel())
    assert abs(p.float().mean() - target[0]) < 4 * se
    assert torch.equal(p, R.rounded(target, torch.bfloat16, 17))  # a function of its seed
    for seed in (18, 2**31 - 1):
        both = (p != w) & (R.rounded(target, torch.bfloat16, seed) != w)
        assert abs(both.float().mean() - steps**2) < 0.005  # another seed, independent noise
    for x in (0.0, -0.02, 3.0e38, 1e-30, math.inf):  # what bf16 holds exactly stays
        exact = torch.tensor([x]).bfloat16()
        assert torch.equal(R.rounded(exact.float(), torch.bfloat16, 0), exact)


def test_the_noise_of_rounding_is_even_and_its_neighbours_are_independent():
    x = torch.full((1 << 20,), 1.0) + 2**-8  # half-way between two numbers of bf16
    for seed in (0, 1, 1 << 30):
        up = (R.rounded(x, torch.bfloat16, seed) > 1).double()
        centred = up - 0.5
        assert abs(centred.mean()) < 0.003
        for lag in (1, 2, 64, 4096):
            assert abs((centred[lag:] * centred[:-lag]).mean()) < 0.0015


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on the CPU")
def test_the_compiled_rule_is_the_same_rule_compiled_twice(monkeypatch):
    from torch._dynamo.utils import counters

    counters.clear()
    rule, rng = R.compiled(R.adamw_rule), torch.Generator().manual_seed(0)
    for t, shape in enumerate(((64,), (48, 32), (128,), (700, 96)), 1):
        p, g, m, v = (torch.randn(shape, generator=rng).mul(0.02).bfloat16() for _ in range(4))
        a, b = [p, g, m, v.abs()], [p.clone(), g, m.clone(), v.abs()]
        R.adamw_(*a, t, 1e-3 * t, "key", t)
        with monkeypatch.context() as patch:
            patch.setattr(R, "adamw_rule", rule)
            R.adamw_(*b, t, 1e-3 * t, "key", t)
        assert all((x != y).float().mean() < 1e-3 for x, y in zip(a, b))
    assert counters["stats"]["unique_graphs"] == 2  # of vectors and matrices; no length and no step compiles it again


def test_weights_move_in_bf16_at_the_papers_learning_rate():
    model = toy_model(dtype=torch.bfloat16, initializer_range=0.02)
    before = flat(model).float()
    recover.finetune(model, batches(4), steps=20, lr=2e-5)
    moved = flat(model).float() - before
    exact = toy_model(initializer_range=0.02)
    start = flat(exact)
    recover.finetune(exact, batches(4), steps=20, lr=2e-5)
    reference = flat(exact) - start
    assert torch.dot(moved, reference) / reference.norm() ** 2 > 0.5  # goes where float32 goes, about as far


# ---- MLAC-AR


def reference_outer_step(model, forget, retain, K, lr, alpha, optimizer, outer=None):
    """Algorithm 1's outer step written out: a deep copy for ω, φ as a list of sums, torch's own optimizers."""
    make = torch.optim.SGD if optimizer == "sgd" else lambda ps, lr: torch.optim.AdamW(ps, lr=lr, weight_decay=0)
    omega = copy.deepcopy(model)
    inner = make(list(omega.parameters()), lr=lr)
    ids, mask = forget
    *steps, heldout = zip(ids.chunk(K + 1), mask.chunk(K + 1))
    phi = [torch.zeros_like(p) for p in model.parameters()]
    for x_f in steps:
        inner.zero_grad()
        R.next_token_loss(omega, *x_f).backward()
        inner.step()
        gradient = torch.autograd.grad(R.next_token_loss(omega, *heldout), list(omega.parameters()))
        phi = [f + g for f, g in zip(phi, gradient)]
    gradient = torch.autograd.grad(R.next_token_loss(model, *retain), list(model.parameters()))
    outer = outer or make(list(model.parameters()), lr=lr)
    for p, g, f in zip(model.parameters(), gradient, phi):
        p.grad = g - alpha * f
    outer.step()
    return outer


@pytest.fixture
def exact(monkeypatch):
    """float64 all through: the loss's own cast to float32 is lifted."""
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("K", [1, 4])
def test_two_outer_steps_are_algorithm_1(K, optimizer, exact):
    model = toy_model(dtype=torch.float64)
    reference = copy.deepcopy(model)
    forget, retain = batches((K + 1) * 3, seed=1), batches(3, seed=2)
    arguments = dict(K=K, lr=1e-2, alpha=0.7, optimizer=optimizer)
    M.mlac_ar(model, forget, retain, N=2, bound=False, **arguments)
    outer = None
    for i in range(2):
        outer = reference_outer_step(reference, forget[i], retain[i], outer=outer, **arguments)
    assert (flat(model) - flat(reference)).abs().max() < 1e-10
    assert (flat(model) - flat(toy_model(dtype=torch.float64))).abs().max() > 1e-3  # control: it did move
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_alpha_zero_is_finetuning_on_retain_text_to_the_bit(optimizer):
    a, b = toy_model(), toy_model()
    M.mlac_ar(a, batches(9, seed=1), batches(3, seed=2), K=2, N=3, lr=1e-2, alpha=0, optimizer=optimizer)
    if optimizer == "adamw":
        recover.finetune(b, batches(3, seed=2), steps=3, lr=1e-2)
    else:
        for i in range(3):
            R.next_token_loss(b, *batches(3, seed=2)[i]).backward()
            for p in b.parameters():
                M.sgd_(p, p.grad, 1e-2)
                p.grad = None
    assert torch.equal(flat(a), flat(b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_theta_is_restored_to_the_bit(dtype, monkeypatch):
    model = toy_model(dtype=dtype)
    before, omega = flat(model), []
    loop = M.inner_loop

    def spy(*rest, done, **more):
        def look(j, p):  # the last that is seen of ω
            omega.append(p.detach().clone())
            done(j, p)

        return loop(*rest, done=look, **more)

    def stop(*_):
        raise FloatingPointError("stop before the update")

    monkeypatch.setattr(M, "inner_loop", spy)
    monkeypatch.setattr(M, "check_finite", stop)
    with pytest.raises(FloatingPointError):
        M.mlac_ar(model, batches(9, seed=1), batches(3), K=2, N=1, lr=1e-2, alpha=1)
    moved = sum(not torch.equal(a, b) for a, b in zip(omega, reversed([*toy_model(dtype=dtype).parameters()])))
    assert len(omega) == len([*model.parameters()]) and moved > 10  # control: the adversary had moved it
    assert torch.equal(flat(model), before)


def test_phi_is_grad_in_place_and_the_adversarys_gradient_never_stands_whole(monkeypatch):
    model = toy_model()
    params = list(model.parameters())
    alive, places = [], []
    step = M.adamw_

    def spy(p, g, *rest):
        alive.append(sum(q.grad is not None for q in params))
        return step(p, g, *rest)

    monkeypatch.setattr(M, "adamw_", spy)
    ids, mask = batches(15)[0]
    *steps, heldout = zip(ids.chunk(5), mask.chunk(5))
    m, v = [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]
    for x_f in steps:
        M.inner_loop(model, [x_f], heldout, lambda k, j, p, g: M.adamw_(p, g, m[j], v[j], k, 1e-3), bound=False)
        places.append([p.grad.data_ptr() for p in params])
    assert max(alive) == 0  # inside backward no other gradient stands in .grad, and each is freed as it is applied
    assert len({tuple(p) for p in places}) == 1  # φ is accumulated in the same memory all along


def test_update_in_backward_equals_update_after_it():
    a, b = toy_model("gemma2"), toy_model("gemma2")  # Gemma ties embeddings and head: one gradient, one update
    params = list(a.parameters())
    with M.update_in_backward(params, lambda j, p, g: M.sgd_(p, g, 0.1)):
        R.next_token_loss(a, *batches(3)[0]).backward()
    R.next_token_loss(b, *batches(3)[0]).backward()
    for p in b.parameters():
        M.sgd_(p, p.grad, 0.1)
    assert torch.equal(flat(a), flat(b))


def test_a_heldout_loss_above_chance_adds_nothing():
    model = toy_model(initializer_range=1.0)  # far worse than chance
    ids, mask = batches(6)[0]
    *steps, heldout = zip(ids.chunk(2), mask.chunk(2))
    assert R.next_token_loss(model, *heldout) > math.log(60)
    for bound, expected in ((True, 0), (False, 1)):
        for p in model.parameters():
            p.grad = None
        _, _, above = M.inner_loop(model, steps, heldout, lambda *_: None, bound=bound)
        assert above == 1 and (sum(p.grad.abs().sum() for p in model.parameters()) > 0) == expected


def test_mlac_ar_slows_an_adversary():
    """Ascent on φ raises the heldout loss that an adversary reaches; α = 0 does not (control)."""
    reached = []
    for alpha in (0.0, 1.0):
        model = toy_model(initializer_range=0.1)
        M.mlac_ar(model, batches(12, T=6, vocab=8, seed=1), batches(3), K=3, N=15, lr=3e-3, alpha=alpha)
        recover.finetune(model, batches(4, T=6, vocab=8, seed=9), steps=5, lr=3e-3)
        reached.append(R.next_token_loss(model, *batches(16, T=6, vocab=8, seed=5)[0]).item())
    assert reached[1] > reached[0] + 0.1


@pytest.mark.parametrize("method", ["random_mapping", "mlac_ar", "finetune"])
def test_a_loss_that_is_no_number_stops_before_the_update(method):
    model = toy_model()
    with torch.no_grad():
        next(model.parameters())[5] = float("nan")

    class Bad:  # token 5 first stands in batch 2
        def __init__(self, size):
            self.size = size

        def __getitem__(self, i):
            ids = torch.full((self.size, 6), 7)
            ids[:, 2] = 5 if i == 2 else 8
            return ids, torch.ones_like(ids, dtype=torch.bool)

    good = copy.deepcopy(model)
    run = {
        "random_mapping": lambda m, log: R.random_mapping(m, Bad(2), Bad(2), steps=9, lr=1e-2, log=log),
        "mlac_ar": lambda m, log: M.mlac_ar(m, Bad(4), Bad(2), K=1, N=9, lr=1e-2, alpha=1, log=log),
        "finetune": lambda m, log: recover.finetune(m, Bad(2), steps=9, lr=1e-2, log=log),
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


def stream(size, seed=0, purpose="forget", length=64):
    return Stream(TEXTS, bpe(TEXTS), size=size, length=length, seed=seed, purpose=purpose, device="cpu")


def test_a_batch_is_a_function_of_seed_purpose_and_step():
    a, b = stream(6), stream(6)
    later = [a[i] for i in (9, 3, 17)]
    assert all(torch.equal(x[0], b[i][0]) for x, i in zip(later, (9, 3, 17)))
    assert not torch.equal(stream(6, seed=1)[3][0], later[1][0])
    assert not torch.equal(stream(6, purpose="retain")[3][0], later[1][0])


def test_an_epoch_takes_each_text_once_and_no_batch_holds_one_twice():
    s = stream(8)
    rows = [tuple(r.tolist()) for i in range(5) for r in s[i][0]]
    epoch = {tuple(ids[ids != 0].tolist()) for ids in map(torch.tensor, rows)}
    assert len(rows) == 40 == len(epoch)
    for i in range(40):
        assert len({tuple(r.tolist()) for r in s[i][0]}) == 8  # so x_heldout is never one of its step's x_f


def test_a_chunk_is_bos_and_tokens_cut_and_padded_on_the_right():
    s = stream(6, length=7)
    ids, mask = s[0]
    assert ids.shape[1] == 7 and (ids[:, 0] == s.tokenizer.bos_token_id).all() and mask.all()
    ids, mask = stream(40)[0]
    assert (mask.long().diff(dim=1) <= 0).all() and (~mask).any() and (ids[~mask] == 0).all()
    with pytest.raises(SystemExit):
        stream(41)


def test_losses_are_the_papers_in_closed_form():
    model = toy_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()  # uniform posterior
    torch.testing.assert_close(R.next_token_loss(model, *batches(3)[0]), torch.tensor(math.log(60)))
