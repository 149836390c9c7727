"""The optimizer for bf16 weights against torch's, and the copies in host memory against a simulated side
stream."""

import copy
import importlib.util
import math
from functools import partial
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from conftest import ROOT, Batches, flat, toy_model
from torch.utils._python_dispatch import TorchDispatchMode

import common
from common import SGD, AdamW, HostCopy, next_token_loss, rounded
from mlac_ar import mlac_ar

BF16 = torch.bfloat16


# ---- stochastic rounding


def test_bf16_rounds_stochastically_and_nearest_would_lose_the_update():
    w = torch.full((200_000,), 0.02).bfloat16()
    target = w.float() - 2e-5
    assert torch.equal(target.bfloat16(), w)  # control: to nearest, nothing moves
    p = rounded(target, BF16, 17)
    moved = (p != w).float().mean()  # a step of bf16 at 0.02 is 1.22e-4: a sixth of the weights take one
    assert 0.14 < moved < 0.19
    assert abs(p.float().mean() - target[0]) < 4 * p.float().std() / math.sqrt(p.numel())
    assert torch.equal(p, rounded(target, BF16, 17))  # a function of its seed
    for seed in (18, 2**31 - 1):
        both = (p != w) & (rounded(target, BF16, seed) != w)
        assert abs(both.float().mean() - moved**2) < 0.005  # another seed, independent noise


def test_the_noise_is_even_and_its_neighbours_are_independent():
    x = torch.full((1 << 20,), 1.0) + 2**-8  # half-way between two numbers of bf16
    for seed in (0, 1, 1 << 30):
        centred = (rounded(x, BF16, seed) > 1).double() - 0.5
        assert abs(centred.mean()) < 0.003
        for lag in (1, 2, 64, 4096):
            assert abs((centred[lag:] * centred[:-lag]).mean()) < 0.0015


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**31 - 1])
def test_nan_infinity_and_numbers_of_bf16_stay(seed):
    nans = torch.tensor([0x7FFFFFFF, 0x7FC00000, -0x400000, -1], dtype=torch.int64).to(torch.int32)
    assert nans[2].item() & 0xFFFFFFFF == 0xFFC00000  # a GPU's and a CPU's canonical NaN, and their negatives
    assert rounded(nans.repeat(50).view(torch.float32), BF16, seed).isnan().all()
    exact = torch.tensor([math.inf, -math.inf, 0.0, -0.0, -0.02, 3.0e38, 1e-30] * 50).bfloat16()
    assert torch.equal(rounded(exact.float(), BF16, seed).view(torch.int16), exact.view(torch.int16))


def test_a_nan_gradient_leaves_a_nan_weight():
    p = torch.nn.Parameter(torch.full((64,), 0.5, dtype=BF16))
    p.grad = torch.tensor([0x7FFF] * 64, dtype=torch.int16).view(BF16)
    SGD([p]).step(1, 0.1)
    assert p.isnan().all()  # and not -0.0, which nobody would notice


# ---- AdamW and SGD


@pytest.mark.parametrize("make, reference", [
    (AdamW, lambda ps: torch.optim.AdamW(ps, lr=1e-3, weight_decay=0)),
    (partial(AdamW, decay=0.1), lambda ps: torch.optim.AdamW(ps, lr=1e-3, weight_decay=0.1)),
    (SGD, lambda ps: torch.optim.SGD(ps, lr=1e-3)),
    (partial(SGD, momentum=0.9), lambda ps: torch.optim.SGD(ps, lr=1e-3, momentum=0.9)),
])  # fmt: skip
def test_the_optimizers_are_torchs(make, reference):
    p = torch.nn.Parameter(torch.randn(7, 5, dtype=torch.float64))
    q = torch.nn.Parameter(p.detach().clone())
    ours, theirs = make([p]), reference([q])
    for t in range(1, 6):
        p.grad = torch.randn(7, 5, dtype=torch.float64)
        q.grad = p.grad.clone()
        ours.step(t, 1e-3, "key", t)
        theirs.step()
        torch.testing.assert_close(p, q, atol=1e-12, rtol=0)
        assert p.grad is None


def test_step_1_starts_from_zero_moments():
    a, b = (torch.nn.Parameter(torch.ones(9)) for _ in "ab")
    used, fresh = AdamW([a]), AdamW([b])
    used.moments[0][0].fill_(3.0), used.moments[1][0].fill_(math.nan)
    for p, opt in ((a, used), (b, fresh)):
        p.grad = torch.arange(9.0)
        opt.step(1, 1e-2)
    assert torch.equal(a, b)


@pytest.mark.parametrize("make", [AdamW, SGD])
@pytest.mark.parametrize(
    "kind", ["llama", "gemma2"]
)  # Gemma ties embeddings and head: one gradient, one update
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_in_backward_is_step_after_backward_and_sets_grad_aside(make, kind, dtype):
    a, b = toy_model(kind, dtype=dtype).train(), toy_model(kind, dtype=dtype).train()
    inside, after = make(a.parameters()), make(b.parameters())
    phi = [torch.full_like(p, 7.0) for p in a.parameters()]
    for p, f in zip(a.parameters(), phi):
        p.grad = f
    alive = []
    inside.wait_for = (
        type(
            "Spy", (), {"wait": lambda _, j: alive.append(sum(p.grad is not None for p in inside.params))}
        )(),
    )
    with inside.in_backward(1, 0.01, "key"):
        next_token_loss(a, *Batches(3)[0]).backward()
    assert (
        len(alive) == len(phi) and max(alive) == 0
    )  # each gradient is freed as it is applied: never all at once
    assert all(
        p.grad is f and (f == 7).all() for p, f in zip(a.parameters(), phi)
    )  # the same memory, untouched
    next_token_loss(b, *Batches(3)[0]).backward()
    after.step(1, 0.01, "key")
    assert torch.equal(flat(a), flat(b)) and not torch.equal(flat(a), flat(toy_model(kind, dtype=dtype)))


def test_weights_move_in_bf16_at_the_papers_learning_rate():
    moved = []
    for dtype in (BF16, torch.float32):
        model = toy_model(dtype=dtype, initializer_range=0.02)
        before, opt = flat(model).float(), AdamW(model.parameters())
        for i in range(20):
            next_token_loss(model, *Batches(4)[i]).backward()
            opt.step(i + 1, 2e-5, i)
        moved.append(flat(model).float() - before)
    assert torch.dot(*moved) / moved[1].norm() ** 2 > 0.5  # goes where float32 goes, about as far


# ---- the compiled rule


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on the CPU")
def test_the_compiled_rule_is_the_same_rule_in_two_graphs(monkeypatch):
    """Lengths divisible by 16, and all others; more than 2^24, where a tensor is updated in slices, as
    well."""
    from torch._dynamo.utils import counters

    counters.clear()
    rng = torch.Generator().manual_seed(0)
    for t, shape in enumerate(
        [(64,), (48, 32), (7, 9), (700, 96), (33,), ((1 << 24) + 17,), (4096, 4097)], 1
    ):
        found = []
        start = [torch.randn(shape, generator=rng).mul(0.02).bfloat16() for _ in range(4)]
        for rule in (common.adamw_rule, common.compiled(common.adamw_rule)):
            p, g, m, v = (x.clone() for x in start)
            p = torch.nn.Parameter(p)
            p.grad, opt = g, AdamW([p])
            opt.moments = [m], [v.abs_()]
            with monkeypatch.context() as patch:
                patch.setattr(common, "adamw_rule", rule)
                opt.step(t + 1, 1e-3 * t, "key", t)
            found.append((p.detach(), m, v))
        assert all((x != y).float().mean() < 1e-3 for x, y in zip(*found)), shape
        assert (found[0][0] != start[0]).float().mean() > 0.2
    assert counters["stats"]["unique_graphs"] == 2, counters["stats"]


@pytest.mark.skipif(
    not importlib.util.find_spec("triton"), reason="triton is not installed (a CPU build of torch)"
)
@pytest.mark.parametrize("length, wide", [(4096, 4), (4097, 0)])
def test_the_gpus_kernel_compiles_for_an_h100_and_agrees_in_the_interpreter(length, wide):
    printed = []
    for interpret in ("0", "1"):
        command = [sys.executable, ROOT / "tests" / "triton_rule.py", str(length)]
        env = os.environ | {"TRITON_INTERPRET": interpret, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
        printed.append(subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout)
    assert f"ptx {wide} wide loads" in printed[0]  # of p, g, m and v, where the length allows it
    assert "nan 3 3" in printed[1] and "differ 0.0 by 0" in printed[1]


# ---- copies in host memory


class Delayed:
    """A side stream that does what it is told at the last moment that its events allow, when somebody waits
    for them.

    In place of torch.cuda's stream and events, on the CPU: inside `with stream`, copies are queued instead
    of done.
    """

    def __init__(self):
        self.queue, self.recorded, self.ready = [], 0, False

    def wait_stream(self, _):
        self.ready = True  # the copies that follow start after what the main stream was told before

    def record_event(self):
        self.recorded += 1
        self.queue.append(self.recorded)
        return self.recorded

    def run_until(self, event):
        while event in self.queue:
            if not isinstance(work := self.queue.pop(0), int):
                work()

    @contextmanager
    def deferring(self):
        assert self.ready, "a copy that does not wait for the main stream may read what is not computed yet"
        self.ready, outer = False, self

        class Defer(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                if function is torch.ops.aten.copy_.default:
                    outer.queue.append(torch.no_grad()(lambda: function(*args, **(kwargs or {}))))
                    return args[0]
                return function(*args, **(kwargs or {}))

        with Defer():
            yield


def delayed_run(monkeypatch, waits):
    """Two outer steps of MLAC-AR whose HostCopy objects use a Delayed stream each; weights afterwards."""
    make = HostCopy.__init__

    def with_stream(self, *lists):
        make(self, *lists)
        self.stream = Delayed()

    main = type("Main", (), {"wait_event": lambda _, x: x[0].run_until(x[1]) if waits else None})()
    with monkeypatch.context() as patch:
        patch.setattr(HostCopy, "__init__", with_stream)
        patch.setattr(Delayed, "record_event", lambda self, do=Delayed.record_event: (self, do(self)))
        patch.setattr(torch.cuda, "current_stream", lambda: main)
        patch.setattr(torch.cuda, "stream", lambda stream: stream.deferring())
        model = toy_model()
        mlac_ar(model, Batches(9, seed=1), Batches(3, seed=2), K=2, N=2, lr=1e-2, alpha=0.7)
    return flat(model)


def test_transfers_wait_for_compute_and_compute_for_transfers(monkeypatch):
    model = toy_model()
    mlac_ar(model, Batches(9, seed=1), Batches(3, seed=2), K=2, N=2, lr=1e-2, alpha=0.7)
    assert torch.equal(delayed_run(monkeypatch, waits=True), flat(model))
    assert not torch.equal(
        delayed_run(monkeypatch, waits=False), flat(model)
    )  # control: without waits it is wrong


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_load_in_backward_restores_bit_exactly(dtype):
    model = toy_model(dtype=dtype).train()
    params, before = [*model.parameters()], flat(model)
    unused = torch.nn.Parameter(torch.ones(3))  # without a gradient: loaded at the end
    theta = HostCopy([*params, unused])
    theta.save()
    opt = SGD([*params, unused])
    with opt.in_backward(1, 0.1, "key"):
        next_token_loss(model, *Batches(3)[0]).backward()
    with torch.no_grad():
        unused.zero_()
    assert not torch.equal(flat(model), before)  # control: the adversary moved it
    reference = copy.deepcopy(model)
    next_token_loss(reference, *Batches(3)[1]).backward()
    with theta.load_in_backward([*params, unused]):
        next_token_loss(model, *Batches(3)[1]).backward()
    assert torch.equal(flat(model), before) and (unused == 1).all()
    assert all(
        torch.equal(p.grad, q.grad) for p, q in zip(params, reference.parameters())
    )  # taken at ω, not at θ


def test_pinned_blocks_get_their_exact_size():
    code = "import torch, common; print(torch._C._accelerator_getAllocatorSettings())"
    env = {k: v for k, v in os.environ.items() if k != "PYTORCH_ALLOC_CONF"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    )
    assert "pinned_max_cached_size_mb:16" in done.stdout


def test_the_device_that_is_named_is_the_current_one(monkeypatch, tmp_path):
    named = []
    toy_model().config.save_pretrained(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", named.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device in ("cuda:1", "cuda", "auto", "cpu"):
        common.load_model(str(tmp_path), device=device, meta=True)
    assert named == [torch.device("cuda:1")]
