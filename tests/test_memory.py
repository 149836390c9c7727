"""What a step holds: bytes of live tensors against what mlac_ar.py promises, and the dry run against the
step."""

import re

import pytest
import torch
from conftest import WORLD, Batches, toy_model
from test_methods import literal_outer_step

import adv_probes
import baselines
import mlac_ar
import random_mapping
import recover
import rmat
from common import LiveBytes, configure_libraries, memory_limit, next_token_loss

configure_libraries()  # as the scripts do: transformers' packed-sequence check would hold more


def tensors(model):
    return [*model.parameters(), *model.buffers()]


def size(model):
    return sum(p.numel() * p.element_size() for p in model.parameters())


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


def test_slices_keep_a_large_vocabulary_small():
    V, peaks = 20000, {}
    for at_once in (20 * V, 1 << 25):
        model, stream = toy_model(vocab=V), Batches(8, 64, V, full=True)
        with LiveBytes(tensors(model)) as live:
            next_token_loss(model, *stream[0], at_once=at_once).backward()
        peaks[at_once] = live.peak - 2 * size(model)
    whole = 8 * 63 * V * 4
    assert peaks[20 * V] < whole / 4 and peaks[1 << 25] > whole  # control: in one slice they are all there


# ---- the outer step


def wide_model():
    return toy_model(vocab=600, hidden_size=64, intermediate_size=128, num_hidden_layers=4).train()


def outer_step(K, optimizer="adamw"):
    """Peak bytes on the device of two outer steps; of one plain pass, beside weights and gradient; and the
    model."""
    model = wide_model()
    forget, retain = (
        Batches(B, 6, 600, full=True) for B in (2 * (K + 1), 2)
    )  # few texts: activations would hide
    for p in model.parameters():  # a gradient that stays
        p.grad = torch.zeros_like(p)
    with LiveBytes([*tensors(model), *(p.grad for p in model.parameters())]) as live:
        next_token_loss(model, *retain[0]).backward()
    plain = live.peak - 2 * size(model)
    for p in model.parameters():
        p.grad = None
    with LiveBytes(tensors(model)) as live:
        mlac_ar.mlac_ar(model, forget, retain, K=K, N=2, lr=1e-3, alpha=1, optimizer=optimizer)
    host = (3 if optimizer == "adamw" else 1) * size(model)
    return live.peak - host, plain, model


@pytest.mark.parametrize("optimizer, copies", [("adamw", 4), ("sgd", 2)])
def test_an_outer_step_holds_weights_phi_two_moments_and_one_gradient(optimizer, copies):
    peaks = {}
    for K in (2, 8):
        peaks[K], plain, model = outer_step(K, optimizer)
        one = max(p.numel() * p.element_size() for p in model.parameters())
        batch = 2 * (K + 1) * 6 * 9  # the ids of all K + 1 forget batches, and their masks
        assert peaks[K] <= copies * size(model) + plain + 2 * one + batch
    assert abs(peaks[8] - peaks[2]) < 2 * 6 * 6 * 9 + 100  # does not depend on K, but for the ids


def test_a_deep_copy_would_break_the_bound():
    model = wide_model()
    with LiveBytes(tensors(model)) as live:
        forget, retain = (Batches(B, 6, 600, full=True)[0] for B in (6, 2))
        outer = literal_outer_step(model, forget, retain, 2, 1e-3, 1, "adamw")  # noqa: F841
    peak, plain, _ = outer_step(2)
    assert live.peak > peak + size(model)


# ---- the dry run


def predicted(module, capsys, *flags):
    """{"weights", "between steps", "peak", "copies"} in GB, as --dry-run prints them."""
    with pytest.raises(SystemExit) as stop:
        module.main(
            module.parse_args([*flags, "--dry-run", "--device", "cpu", "--batch", "6", "--tokens", "48"])
        )
    printed = capsys.readouterr().out
    assert stop.value.code == 0 and "it fits" in printed, printed
    return {
        name.strip(): float(gb)
        for name, gb in re.findall(r"^(?:cpu|host) +(\D+?) +([\d.]+) GB$", printed, re.M)
    }


def measured(step, host=0):
    """(peak, bytes between steps) in GB of the same step on the CPU."""
    between = []
    model = toy_model(vocab=30000, hidden_size=128, intermediate_size=256, num_hidden_layers=4).train()
    with LiveBytes(tensors(model)) as live:
        step(model, Batches(6, 48, 30000, full=True), lambda *_, **__: between.append(live.now))
    return (live.peak - host * size(model)) / 1e9, (max(between) - host * size(model)) / 1e9


def five(x):
    """The forget stream of MLAC-AR with K = 4."""
    return Batches(30, 48, 30000, full=True)


CASES = {
    "random_mapping": (random_mapping, (), lambda m, x, log: random_mapping.random_mapping(
        m, x, x, steps=2, lr=1e-3, log=log), 0),
    "max_entropy": (baselines, ("--method", "max_entropy"), lambda m, x, log: baselines.baseline(
        m, x, x, method="max_entropy", steps=2, lr=1e-3, log=log), 0),
    "npo": (baselines, ("--method", "npo"), lambda m, x, log: baselines.baseline(
        m, x, x, method="npo", steps=2, lr=1e-3, log=log), 0),
    "rmu": (baselines, ("--method", "rmu", "--layer", "2"), lambda m, x, log: baselines.rmu(
        m, x, x, steps=2, lr=1e-3, layer=2, steer=6.5, weight=1200, log=log), 0),
    "undo": (baselines, ("--method", "undo"), lambda m, x, log: baselines.undo(
        m, x, x, steps=2, lr=1e-3, noise=0.6, log=log), 0),
    "overwriting": (baselines, ("--method", "overwriting"), lambda m, x, log: baselines.overwriting(
        m, x, x, steps=2, lr=1e-3, rounds=1, rare=0.1, log=log), 0),
    "adv_probes": (adv_probes, ("--probe-width", "64"), lambda m, x, log: adv_probes.adv_probes(
        m, x, x, x, steps=2, lr=1e-3, probe_width=64, log=log), 0),
    "swd": (adv_probes, ("--swd",), lambda m, x, log: adv_probes.adv_probes(
        m, x, x, None, steps=2, lr=1e-3, freeze=False, log=log), 0),
    "recover": (recover, (), lambda m, x, log: recover.finetune(m, x, steps=2, lr=1e-3, log=log), 0),
    "mlac_ar": (mlac_ar, (), lambda m, x, log: mlac_ar.mlac_ar(
        m, five(x), x, K=4, N=2, lr=1e-3, alpha=1, log=log), 3),
    "rmat_sgd": (rmat, ("--optimizer", "sgd"), lambda m, x, log: (  # the peak is Random Mapping's
        random_mapping.random_mapping(m, x, x, steps=2, lr=1e-3, log=log),
        mlac_ar.mlac_ar(m, five(x), x, K=4, N=2, lr=1e-3, alpha=1, optimizer="sgd")), 0),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_dry_run_predicts_the_step(name, tmp_path, capsys):
    module, flags, step, host = CASES[name]
    toy = toy_model(vocab=30000, hidden_size=128, intermediate_size=256, num_hidden_layers=4)
    toy.config.save_pretrained(tmp_path)
    where = ("--ckpt", str(tmp_path), "--base", "x") if module is recover else ("--model", str(tmp_path))
    told, (peak, between) = predicted(module, capsys, *where, *flags), measured(step, host)
    assert abs(told["peak"] / peak - 1) < 0.02 and abs(told["between steps"] / between - 1) < 0.02, (
        told,
        peak,
        between,
    )
    one = size(toy) / 1e9
    assert (
        abs(told["weights"] - one) < 1e-3
        and abs(told["copies"] - one * (3 if host else "sgd" in name)) < 2e-3
    )


def test_a_dry_run_writes_nothing_and_says_what_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as stop:
        rmat.main(rmat.parse_args(["--dry-run", "--model", "empty"]))
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "config.json" in error and "\n" not in error
    (tmp_path / "empty").rmdir()
    with pytest.raises(SystemExit):
        rmat.main(rmat.parse_args(["--tiny", "--dry-run"]))
    assert re.search(r"peak +\d+\.\d+ GB", capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == [] and (WORLD / "base").exists()


def test_the_containers_limit_counts(tmp_path):
    machine = memory_limit(())
    assert machine > 1e9
    for text, expected in (("max\n", machine), ("1000000000\n", 10**9), (f"{10 * machine}\n", machine)):
        (tmp_path / "memory.max").write_text(text)
        assert memory_limit((tmp_path / "nowhere", tmp_path / "memory.max")) == expected


def test_a_run_that_does_not_fit_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("common.memory_limit", lambda: 10**8)
    with pytest.raises(SystemExit) as stop:
        rmat.main(rmat.parse_args(["--tiny", "--dry-run", "--device", "cpu"]))
    assert stop.value.code == 1 and "it does not fit" in capsys.readouterr().out
