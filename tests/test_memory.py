"""What a step holds: bytes of live tensors against what mlac_ar.py promises, and the dry run against the step."""

import re

import pytest
import torch
from conftest import KINDS, toy_model
from test_methods import batches, reference_outer_step
from test_scripts import WORLD

import adv_probes
import baselines
import mlac_ar as M
import random_mapping as R
import recover
import rmat
from common import LiveBytes, never_packed

never_packed()


class Full:
    """Stream of full batches of `size` texts of `length` tokens."""

    def __init__(self, size, length, vocab):
        self.ids = torch.randint(1, vocab, (size, length), generator=torch.Generator().manual_seed(size))

    def __getitem__(self, i):
        return self.ids, torch.ones_like(self.ids, dtype=torch.bool)


def tensors(model):
    return [*model.parameters(), *model.buffers()]


def size(model):
    return sum(p.numel() * p.element_size() for p in model.parameters())


# ---- the counter


def test_live_bytes_counts_storages_once_and_drops_the_dead():
    before = torch.zeros(10)
    with LiveBytes([before]) as live:
        x = torch.zeros(1000)
        start = live.now
        assert start == live.peak == 4040
        y = x.view(10, 100).T  # noqa: F841 a view is no new memory
        assert live.now == start
        z = x + 1
        assert live.now == start + 4000
        del z
        assert live.now == start and live.peak == start + 4000


# ---- logits in slices


@pytest.mark.parametrize("kind", KINDS)
def test_slices_give_the_loss_and_gradient_of_whole_logits(kind):
    ids, mask = batches(4)[0]
    found = []
    for at_once in (60 * 7, 1 << 25):
        model = toy_model(kind)
        loss = R.next_token_loss(model, ids, mask, at_once=at_once)
        loss.backward()
        found.append((loss, [p.grad for p in model.parameters()]))
    whole = toy_model(kind)
    logits = whole(ids).logits[:, :-1][mask[:, 1:]]
    torch.nn.functional.cross_entropy(logits, ids[:, 1:][mask[:, 1:]]).backward()
    for loss, gradients in found:
        torch.testing.assert_close(loss, found[0][0])
        for g, p in zip(gradients, whole.parameters()):
            torch.testing.assert_close(g, p.grad, atol=1e-6, rtol=1e-4)


def test_slices_keep_a_large_vocabulary_small():
    V, peaks = 20000, {}
    for at_once in (20 * V, 1 << 25):
        model, stream = toy_model(vocab=V), Full(8, 64, V)
        with LiveBytes(tensors(model)) as live:
            R.next_token_loss(model, *stream[0], at_once=at_once).backward()
        peaks[at_once] = live.peak - 2 * size(model)
    whole = 8 * 63 * V * 4
    assert peaks[20 * V] < whole / 4 and peaks[1 << 25] > whole  # control: in one slice they do stand


# ---- the outer step


def outer_step(K, model=None, **more):
    """Peak bytes on the device of two outer steps; of one plain pass, beside weights and gradient; and the model."""
    model = model or toy_model(vocab=600, hidden_size=64, intermediate_size=128, num_hidden_layers=4).train()
    forget, retain = Full(2 * (K + 1), 6, 600), Full(2, 6, 600)  # few: activations would hide a gradient that stays
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with LiveBytes([*tensors(model), *(p.grad for p in model.parameters())]) as live:
        R.next_token_loss(model, *retain[0]).backward()
    plain = live.peak - 2 * size(model)
    for p in model.parameters():
        p.grad = None
    with LiveBytes(tensors(model)) as live:
        M.mlac_ar(model, forget, retain, K=K, N=2, lr=1e-3, alpha=1, **more)
    host = (3 if more.get("optimizer", "adamw") == "adamw" else 1) * size(model)
    return live.peak - host, plain, model


@pytest.mark.parametrize("optimizer, copies", [("adamw", 4), ("sgd", 2)])
def test_an_outer_step_holds_weights_phi_two_moments_and_one_gradient(optimizer, copies):
    peaks = {}
    for K in (2, 8):
        peaks[K], plain, model = outer_step(K, optimizer=optimizer)
        one = max(p.numel() * p.element_size() for p in model.parameters())
        batch = 2 * (K + 1) * 6 * 9  # the ids of all K + 1 forget batches, and their masks
        assert peaks[K] <= copies * size(model) + plain + 2 * one + batch
    assert abs(peaks[8] - peaks[2]) < 2 * 6 * 6 * 9 + 100  # flat in K, but for the ids


def test_a_deep_copy_would_break_the_bound():
    model = toy_model(vocab=600, hidden_size=64, intermediate_size=128, num_hidden_layers=4).train()
    with LiveBytes(tensors(model)) as live:
        outer = reference_outer_step(model, Full(6, 6, 600)[0], Full(2, 6, 600)[0], 2, 1e-3, 1, "adamw")  # noqa: F841
    peak, plain, _ = outer_step(2)
    assert live.peak > peak + size(model)


# ---- the dry run


def predicted(module, capsys, *flags, row="peak"):
    with pytest.raises(SystemExit) as stop:
        module.main(module.parse_args([*flags, "--dry-run", "--device", "cpu", "--batch", "6", "--tokens", "48"]))
    printed = capsys.readouterr().out
    assert stop.value.code == 0 and "fits" in printed, printed
    return float(re.search(rf"CPU +{row} +([\d.]+) GB", printed)[1])


def measured(step, host=0):
    model = toy_model(vocab=30000, hidden_size=128, intermediate_size=256, num_hidden_layers=4).train()
    with LiveBytes(tensors(model)) as live:
        step(model, Full(6, 48, 30000))
    return (live.peak - host * size(model)) / 1e9


def test_the_dry_run_foretells_the_peak(tmp_path, capsys):
    toy = toy_model(vocab=30000, hidden_size=128, intermediate_size=256, num_hidden_layers=4)
    toy.config.save_pretrained(tmp_path)
    from_toy = ("--model", str(tmp_path))
    cases = {
        "random_mapping": (R, from_toy, lambda m, x: R.random_mapping(m, x, x, steps=2, lr=1e-3), 0),
        "max_entropy": (
            baselines,
            (*from_toy, "--method", "max_entropy"),
            lambda m, x: baselines.baseline(m, x, x, method="max_entropy", steps=2, lr=1e-3),
            0,
        ),
        "adv_probes": (
            adv_probes,
            (*from_toy, "--probe-width", "64"),
            lambda m, x: adv_probes.adv_probes(m, x, x, x, steps=2, lr=1e-3, probe_width=64),
            0,
        ),
        "swd": (
            adv_probes,
            (*from_toy, "--swd"),
            lambda m, x: adv_probes.adv_probes(m, x, x, None, steps=2, lr=1e-3),
            0,
        ),
        "recover": (
            recover,
            ("--ckpt", str(tmp_path), "--base", "x"),
            lambda m, x: recover.finetune(m, x, steps=2, lr=1e-3),
            0,
        ),
        "mlac_ar": (
            M,
            from_toy,
            lambda m, x: M.mlac_ar(m, Full(30, 48, 30000), x, K=4, N=2, lr=1e-3, alpha=1),
            3,
        ),
        "rmat_sgd": (  # Random Mapping's moments are the peak: MLAC-AR with SGD has none
            rmat,
            (*from_toy, "--optimizer", "sgd"),
            lambda m, x: (
                R.random_mapping(m, x, x, steps=2, lr=1e-3),
                M.mlac_ar(m, Full(30, 48, 30000), x, K=4, N=2, lr=1e-3, alpha=1, optimizer="sgd"),
            ),
            0,
        ),
    }
    for name, (module, flags, step, host) in cases.items():
        foretold, found = predicted(module, capsys, *flags), measured(step, host)
        assert abs(foretold / found - 1) < 0.1, (name, foretold, found)
    assert predicted(rmat, capsys, *from_toy) >= predicted(M, capsys, *from_toy)
    kept = [predicted(rmat, capsys, *from_toy, "--optimizer", o, row="activations") for o in ("adamw", "sgd")]
    assert abs(kept[0] - kept[1]) < 0.01  # what has a name of its own is not among the activations


def test_a_dry_run_writes_nothing_and_says_what_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        rmat.main(rmat.parse_args(["--dry-run", "--model", "nowhere/"]))
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "config.json" in error and "\n" not in error
    with pytest.raises(SystemExit):
        rmat.main(rmat.parse_args(["--tiny", "--dry-run"]))
    assert re.search(r"peak +\d+\.\d+ GB", capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == [] and (WORLD / "base").exists()
