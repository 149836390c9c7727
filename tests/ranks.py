"""Every method on toy models, the same in one process as in several:

torchrun --nproc-per-node 2 tests/ranks.py FOLDER   # FOLDER/*/: models; writes FOLDER/weights.pt

The last of them also trains while its memory is counted.
"""

import sys
import weakref
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import torch
from conftest import Batches
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import adv_probes as P
import baselines as B
import common
import mlac_ar as M
import random_mapping as R
import recover as A


class Rows(Batches):
    """Every rank has its rows of the same batches, as from a Stream."""

    def __getitem__(self, i):
        return tuple(x[common.rank() :: common.ranks()].contiguous() for x in super().__getitem__(i))


F, F_K, HELD, HELD_K = Rows(4, seed=1), Rows(12, seed=2), Rows(4, seed=3), Rows(12, seed=4)
LOGGED = []  # of all ranks together, by step


def log(i, steps, **values):
    LOGGED.append({k: float(common.summed(v)) for k, v in values.items()})


TWO = dict(steps=2, lr=1e-5, log=log)
PROBES = dict(**TWO, probe_steps=2, probe_lr=1e-5, probe_width=8)


def mlac_ar(vary=(), hold=0.0, **more):
    def train(model):
        extra = M.held_streams(model, hold) if hold else None
        retain = HELD_K if "mix" in vary else HELD
        M.mlac_ar(model, F_K, retain, K=2, N=2, lr=1e-5, alpha=1.0, vary=vary, extra=extra, log=log, **more)

    return train


def baseline(method, **more):
    names = {"rmu": B.rmu, "undo": B.undo, "overwriting": B.overwriting}
    more = more if method in names else {"method": method}
    return lambda model: names.get(method, B.baseline)(model, F, HELD, **TWO, **more)


def probes(match=HELD, **more):
    return lambda model: P.adv_probes(model, F, HELD, match, **more)


def attack(retain=None, **more):
    return lambda model: A.finetune(model, F, retain, **TWO, **more)


def lora(model):
    with A.adapters(model, 2, 0):
        A.finetune(model, F, **TWO, clip=0.1)


def rounded(model):
    A.round_weights(model, 4)
    A.prune(model, 0.3)


CASES = {
    "random_mapping": lambda model: R.random_mapping(model, F, HELD, **TWO),
    "mlac_ar": mlac_ar(),
    "mlac_ar_sgd": mlac_ar(optimizer="sgd"),
    "mlac_ar_vary": mlac_ar(vary=("rate", "K", "state", "mix")),
    "mlac_ar_heal": mlac_ar(heal=0.5),
    "mlac_ar_entropy": mlac_ar(objective="entropy"),
    "mlac_ar_hold": mlac_ar(hold=0.5),
    "min_posterior": baseline("min_posterior"),
    "max_entropy": baseline("max_entropy"),
    "high_low_lr": baseline("high_low_lr"),
    "grad_diff": baseline("grad_diff"),
    "npo": baseline("npo"),
    "simnpo": baseline("simnpo"),
    "rmu": baseline("rmu", layer=2, steer=5.0, weight=10.0),
    "undo": baseline("undo", noise=0.3),
    "overwriting": baseline("overwriting", rounds=2, rare=0.05),
    "probes": probes(**PROBES),
    "probes_free": probes(**PROBES, freeze=False),
    "swd": probes(None, **TWO, freeze=False),
    "recover": attack(HELD, mix=0.5, clip=0.5, decay=0.1),
    "recover_sgd": attack(optimizer="sgd"),
    "lora": lora,
    "rounded": rounded,
}


FEW = ("random_mapping", "mlac_ar_vary", "undo", "probes", "recover")


def load(folder):
    """A model; its name says how it computes."""
    model, _ = common.load_model(str(folder), dtype="float32", device="cpu")
    if "checkpointing" in folder.name:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.micro_batch = int("micro" in folder.name)
    return model


def weights(folder):
    """{(case, model): (state dict, log)} of each method, on rank 0."""
    found = {}
    for path in sorted(path for path in Path(folder).iterdir() if (path / "config.json").exists()):
        model = load(path)
        first = [common.local(p).detach().clone() for p in model.parameters()]
        few = common.ranks() > 1 and model.micro_batch  # of several processes a part: a minute less
        for name, train in [(name, CASES[name]) for name in (FEW if few else CASES)]:
            with torch.no_grad():
                for p, x in zip(model.parameters(), first):
                    common.local(p).copy_(x)
                    p.grad = None
            LOGGED.clear()
            train(model)
            state = {k: x.clone() for k, x in common.gathered(model).items()}
            found[name, path.name] = state, [*LOGGED]
    return found


class Resized(TorchDispatchMode):
    """Inside, finds the most bytes that were live at a time, where storages are resized as FSDP2 does."""

    def __init__(self, tensors):
        super().__init__()
        self.storages, self.peak = {}, 0
        self.add(tensors)

    def add(self, tensors):
        for x in tree_leaves(tensors):
            if isinstance(x, torch.Tensor):
                storage = common.local(x).untyped_storage()
                self.storages[storage._cdata] = weakref.ref(storage)
        live = [storage for ref in self.storages.values() if (storage := ref()) is not None]
        self.storages = {storage._cdata: weakref.ref(storage) for storage in live}
        self.peak = max(self.peak, sum(storage.nbytes() for storage in live))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.add([args, result])
        return result


def peak(path):
    """Bytes on the device of an outer step of MLAC-AR, 2 texts of 32 tokens, on this rank."""
    model, _ = common.load_model(str(path), dtype="float32", device="cpu")
    common.HostCopy.reserved = 0
    with Resized([common.local(p) for p in model.parameters()]) as live:
        batches = (Rows(B, T=32, vocab=250, full=True) for B in (6, 2))
        M.mlac_ar(model, *batches, K=2, N=1, lr=1e-4, alpha=1.0)
    return live.peak - common.HostCopy.reserved


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    found = weights(folder)
    found["peak"] = peak(folder / "wide" / "model")
    if not common.rank():
        torch.save(found, folder / "weights.pt")
