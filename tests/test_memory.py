"""What a step holds: bytes of live tensors against what mlac_ar.py promises, and against the dry run."""

import re
from functools import partial

import pytest
from conftest import Batches, toy_model
from test_methods import RUNS, literal_outer_step
from test_scripts import call
from transformers import LlamaConfig

from common import LiveBytes, load_model
from mlac_ar import mlac_ar


def size(model):
    return sum(p.nbytes for p in model.parameters())


def peak(model, step):
    """The most bytes that are live while step(model) runs, copies in host memory included."""
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        step(model)
    return live.peak


@pytest.mark.parametrize("optimizer, copies", [("adamw", 4), ("sgd", 2)])
def test_an_outer_step_holds_weights_phi_and_two_moments_whatever_K_is(optimizer, copies):
    """And less than one gradient more. The paper's lines, written down, hold copies (control)."""
    toy = partial(toy_model, hidden_size=128, intermediate_size=256, num_hidden_layers=6)
    one, found, more = size(toy()), {}, dict(lr=1e-3, alpha=1, optimizer=optimizer)
    for K in (2, 5):
        x = Batches(K + 1, 6, full=True), Batches(1, 6, full=True)  # few tokens: activations would hide it
        found[K] = peak(toy(), lambda model: mlac_ar(model, *x, K=K, N=2, **more))
        found[K] -= (copies - 1) * one  # those in host memory
        assert copies * one < found[K] < (copies + 0.5) * one
    assert found[5] - found[2] < 1000  # the ids of three batches more
    assert peak(toy(), lambda model: literal_outer_step(model, x[0][0], x[1][0], K, **more)) > found[5] + one


def dry_run(capsys, command, *flags):
    """Exit status of a dry run, and what it printed."""
    with pytest.raises(SystemExit) as stop:
        call(*command.split(), *flags, "--dry-run")
    return stop.value.code, capsys.readouterr().out


COMMANDS = {  # of what RUNS does
    "random_mapping": "random_mapping",
    "mlac_ar": "mlac_ar --K 2",
    "finetune": "recover --optimizer sgd --retain-mix 0.5",
    "adv_probes": "adv_probes --probe-width 8",
    "max_entropy": "baselines --method max_entropy",
    "undo": "baselines --method undo",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_dry_run_predicts_the_peak_of_a_step(name, tmp_path, capsys):
    B, T, V = 6, 48, 30000
    toy = toy_model(vocab=V, hidden_size=128, intermediate_size=256, num_hidden_layers=3)
    toy.config.save_pretrained(tmp_path)
    flags = ("--ckpt" if name == "finetune" else "--model", tmp_path, "--batch", B, "--tokens", T)
    status, printed = dry_run(capsys, COMMANDS[name], *flags, "--device", "cpu")
    told = {what: float(gb) for what, gb in re.findall(r"^(\D+?) +([\d.]+) GB$", printed, re.M)}
    B_f, B_r = {"mlac_ar": (3 * B, B), "finetune": (B // 2, B // 2)}.get(name, (B, B))
    x = Batches(B_f, T, V, full=True), Batches(B_r, T, V, full=True)
    found = peak(toy, lambda model: RUNS[name](model, *x, steps=1, lr=1e-3)) / 1e9
    found -= 3 * size(toy) / 1e9 * (name == "mlac_ar")
    assert status == 0 and "it fits" in printed and abs(told["weights"] - size(toy) / 1e9) < 1e-3
    assert abs(told["peak"] / found - 1) < 0.03, (told, found)


def test_layers_that_are_not_recomputed_keep_their_activations(tmp_path, capsys):
    """By a dry run as on a GPU, which is that of a model of over 2 G parameters; it has four layers. With
    --device cpu it is as on the CPU, in float32 and without recomputation."""
    width = dict(hidden_size=8192, intermediate_size=64, num_hidden_layers=4, vocab_size=150000)
    LlamaConfig(architectures=["LlamaForCausalLM"], **width).save_pretrained(tmp_path)

    def predicted(flags):
        printed = dry_run(capsys, f"baselines --model {tmp_path} --batch 2 --tokens 512 {flags}")[1]
        return float(re.search(r"^peak +([\d.]+) GB$", printed, re.M)[1])

    every, half, none = (predicted(f"--dtype bfloat16 --recompute-every {n}") for n in (1, 2, 0))
    assert none > every + 0.1 and abs((half - every) / (none - every) - 0.5) < 0.02
    assert not load_model(str(tmp_path), meta=True)[0].training  # no dropout, as in a run
    assert predicted("--device cpu") == predicted("--device cpu --recompute-every 0") > 1.5 * none


def test_a_dry_run_writes_nothing_and_says_if_it_does_not_fit(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 10**5}.get)
    status, printed = dry_run(capsys, "rmat --tiny --device cpu")
    assert status == 1 and "it does not fit" in printed and not [*tmp_path.iterdir()]
