"""The optimizer for bf16 weights against torch's; copies in host memory on a simulated side stream."""

import math
import shutil
from functools import partial

import pytest
import torch
from conftest import Batches, flat, toy_model
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

import common
from common import HostCopy, Optimizer, backward, next_token_loss
from mlac_ar import mlac_ar

BF16 = torch.bfloat16


def rounded(x, seed):
    return common.rounded(x, BF16, torch.tensor(seed, dtype=torch.int32))


def test_bf16_rounds_stochastically_where_nearest_would_lose_the_update():
    w = torch.full((1 << 20,), 0.02).bfloat16()
    target = w.float() - 2e-5
    assert torch.equal(target.bfloat16(), w)  # control: to nearest, nothing moves
    share = 2e-5 / 2**-13  # a step of bf16 at 0.02 is 2^-13: a sixth of the weights take one
    moved = [(rounded(target, seed) != w).double() - share for seed in (0, 17, 17, 18, 2**31 - 1)]
    assert torch.equal(moved[1], moved[2])  # a function of its seed
    for a, b in zip(moved, [*moved[2:], moved[0]]):
        assert abs(a.mean()) < 0.002  # unbiased
        assert abs((a * b).mean()) < 0.001  # another seed, independent noise
        assert all(abs((a[n:] * a[:-n]).mean()) < 0.001 for n in (1, 2, 64, 4096))  # and of its neighbours


def test_nan_infinity_and_numbers_of_bf16_are_unchanged():
    nans = torch.tensor([0x7FFFFFFF, 0x7FC00000, -0x400000, -1], dtype=torch.int64).to(torch.int32)
    exact = torch.tensor([math.inf, -math.inf, 0.0, -0.0, -0.02, 3.0e38, 1e-30] * 50).bfloat16()
    for seed in (0, 1, 12345, 2**31 - 1):
        assert rounded(nans.repeat(50).view(torch.float32), seed).isnan().all()  # a GPU's and a CPU's, and -
        assert torch.equal(rounded(exact.float(), seed).view(torch.int16), exact.view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ours, reference", [
    (Optimizer, partial(torch.optim.AdamW, weight_decay=0)),
    (partial(Optimizer, decay=0.1), partial(torch.optim.AdamW, weight_decay=0.1)),
    (partial(Optimizer, kind="sgd", betas=(0, 0)), torch.optim.SGD),
    (partial(Optimizer, kind="sgd"), partial(torch.optim.SGD, momentum=0.9)),
])  # fmt: skip
def test_the_optimizer_is_torchs(ours, reference, dtype):
    p, unused = (torch.nn.Parameter(torch.randn(7, 5, dtype=dtype)) for _ in "ab")
    q, before = torch.nn.Parameter(p.detach().clone()), unused.detach().clone()
    ours, theirs = ours([p, unused]), reference([q], lr=1e-3)
    for moment in ours.moments:
        moment[0].fill_(math.nan)  # step 1 starts from zeros
    for t in range(1, 6):
        p.grad = torch.randn(7, 5, dtype=dtype)
        q.grad = p.grad.clone()
        ours.step(t, 1e-3, "key", t)
        theirs.step()
        torch.testing.assert_close(p, q, atol=1e-12 if dtype == torch.float64 else 1e-6, rtol=0)
        assert p.grad is None and torch.equal(unused, before)


def test_weights_move_in_bf16_at_the_papers_learning_rate():
    moved = []
    for dtype in (BF16, torch.float32):
        model = toy_model(dtype=dtype, initializer_range=0.02)
        before, opt = flat(model).float(), Optimizer(model.parameters())
        for i in range(20):
            backward(model, next_token_loss, *Batches(4)[i])
            opt.step(i + 1, 2e-5, i)
        moved.append(flat(model).float() - before)
    assert torch.dot(*moved) / moved[1].norm() ** 2 > 0.5  # goes where float32 goes, about as far


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on the CPU")
@pytest.mark.parametrize("kind, betas", [("adamw", (0.9, 0.999)), ("sgd", (0.9, 0))])
def test_the_compiled_update_is_the_eager_one_in_few_graphs(kind, betas, monkeypatch):
    """Not one per length: torch stops compiling after eight."""
    torch.compiler.reset()
    counters.clear()
    rng, compiled = torch.Generator().manual_seed(0), common.fused
    for t, n in enumerate([64, 48 * 32, 63, 67200, 33], 2):
        p, g, m, v = (torch.randn(n, generator=rng).mul(0.02).bfloat16() for _ in range(4))
        found = []
        for rule in (compiled, lambda update: update):
            monkeypatch.setattr(common, "fused", rule)
            q = torch.nn.Parameter(p.clone())
            q.grad, opt = g, Optimizer([q], kind, betas)
            opt.moments = [[m.clone()], [v.abs()]][: len(opt.moments)]
            opt.step(t, 1e-3 * t, "key", t)
            found.append([q.detach(), *sum(opt.moments, [])])
        assert all((x != y).float().mean() < 1e-3 for x, y in zip(*found)), n
        assert (found[0][0] != p).float().mean() > 0.2
    assert 0 < counters["stats"]["unique_graphs"] <= 2, counters["stats"]


def test_the_gpus_kernel_compiles_for_an_h100_and_agrees_in_the_interpreter():
    pytest.importorskip("triton")
    from triton_rule import on_a_gpu

    draw, found = torch.Generator().manual_seed(0), []
    p, g, m, v = (torch.randn(4097, generator=draw).mul(0.02).bfloat16() for _ in range(4))
    g[5] = math.nan
    numbers, seeds = torch.tensor([1e-3, 0.1, 1.0]), torch.tensor([11, 22, 33], dtype=torch.int32)
    for run in (lambda *x: common.update(*x), partial(on_a_gpu, common.fused(common.update))):
        tensors = [p.clone(), g, m.clone(), v.abs()]
        ptx = run(*tensors, numbers, seeds, (0.9, 0.999), 1e-8)
        found.append(torch.cat(tensors))
    assert len(ptx) == 1 and ".target sm_90" in ptx[0]
    torch.testing.assert_close(*found, atol=0, rtol=0, equal_nan=True)
    assert found[0].isnan().sum() == 4 and (found[1][:4097] != p).float().mean() > 0.2


class Delayed(TorchDispatchMode):
    """A side stream, on the CPU, that copies when somebody waits for one of its events, not before."""

    def __init__(self):
        super().__init__()
        self.queue, self.ready = [], False

    def wait_stream(self, main):
        self.ready = True  # the transfer that follows starts after what the main stream was told before

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is not torch.ops.aten.copy_.default:
            return function(*args, **(kwargs or {}))
        assert self.ready, "a transfer that does not wait may read what is not computed yet"
        self.ready = False
        self.queue.append(partial(function, *args, **(kwargs or {})))
        return args[0]

    def record_event(self):
        self.queue.append(event := lambda: None)
        return self, event

    @staticmethod
    def wait_event(event):
        while Delayed.waits and event[1] in event[0].queue:
            event[0].queue.pop(0)()

    @classmethod
    def use(cls, monkeypatch, waits=True):
        """From here on HostCopy objects use a Delayed stream each, whose events are waited for, or not."""
        make, cls.waits = HostCopy.__init__, waits

        def with_stream(self, tensors):
            make(self, tensors)
            self.stream = cls()

        monkeypatch.setattr(HostCopy, "__init__", with_stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: cls)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)


def test_transfers_wait_for_compute_and_compute_for_transfers(monkeypatch):
    def outer_steps():
        model = toy_model()
        mlac_ar(model, Batches(9, seed=1), Batches(3, seed=2), K=2, N=2, lr=1e-2, alpha=0.7)
        return flat(model)

    expected = outer_steps()
    Delayed.use(monkeypatch)
    assert torch.equal(outer_steps(), expected)
    Delayed.use(monkeypatch, waits=False)
    assert not torch.equal(outer_steps(), expected)  # control


def test_a_row_waits_for_its_own_transfer_only(monkeypatch):
    Delayed.use(monkeypatch)
    rows = [torch.full((3,), float(j)) for j in range(4)]
    copy = HostCopy(rows)
    copy.save()
    copy.wait(2)  # the last first
    assert [x[0].item() for x in copy.copies] == [0, 0, 2, 3]
    rows[3].fill_(9)
    copy.load(rows[3])
    copy.wait(3)
    assert rows[3][0] == 3
