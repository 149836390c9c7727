"""Every method on toy models, and what scripts do in several processes: torchrun .. tests/ranks.py FOLDER
reads the models in FOLDER/*/ and writes FOLDER/found.pt."""

import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import Batches

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


F, F_K, HELD, LOGGED = Rows(4, seed=1), Rows(12, seed=2), Rows(4, seed=3), []  # LOGGED: of all ranks together


def log(i, steps, norms=(), **values):
    values = {k: float(common.summed(v)) for k, v in values.items()}
    LOGGED.append(values | {f"norm {n}": float(common.whole(norm)) for n, norm in enumerate(norms)})


def case(train, /, *streams, **more):
    return lambda model: train(model, *streams, lr=1e-5, log=log, **more)


two = partial(case, steps=2)
probes = partial(two, P.adv_probes, F, HELD, probe_steps=2, probe_lr=1e-5, probe_width=8)
mlac_ar = partial(case, M.mlac_ar, F_K, HELD, K=2, N=2, alpha=1.0)


def undo(model):
    B.add_noise(model, 0.3, 0)
    two(B.baseline, F, HELD, method="undo", teacher=load(model.folder))(model)


def overwriting(model):
    false = B.false_texts(model, [F[0], F[1]], rounds=2, rare=0.05)
    two(B.baseline, false, HELD, method="overwriting")(model)


def lora(model):
    with A.adapters(model, 2, 0):
        two(A.finetune, F, clip=0.1)(model)


def rounded(model):
    A.round_weights(model, 4)
    A.prune(model, 0.3)


CASES = {
    "random_mapping": two(R.random_mapping, F, HELD, balance=0.3),
    "mlac_ar": mlac_ar(),
    "mlac_ar_sgd": mlac_ar(optimizer="sgd"),
    **{x: two(B.baseline, F, HELD, method=x) for x in (*B.LOSSES, *B.TEXT_LOSSES, "high_low_lr")},
    "rmu": two(B.rmu, F, HELD, layer=2, steer=5.0, weight=10.0),
    "undo": undo,
    "overwriting": overwriting,
    "probes": probes(HELD),
    "probes_free": probes(HELD, freeze=False),
    "swd": two(P.adv_probes, F, HELD, None, freeze=False),
    "recover": two(A.finetune, F, HELD, mix=0.5, clip=0.5, weight_decay=0.1),
    "recover_sgd": two(A.finetune, F, optimizer="sgd"),
    "lora": lora,
    "rounded": rounded,
}
FEW = ("random_mapping", "mlac_ar", "undo", "probes", "recover")


def load(folder):
    """A model; its folder's name says how it computes."""
    model, _ = common.load_model(str(folder), dtype="float32", device="cpu")
    if "checkpointing" in folder.name:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.micro_batch, model.folder = int("micro" in folder.name), folder
    return model


def weights(folder):
    """{(case, model): (weights, log)} of each method."""
    found = {}
    for path in sorted(path for path in Path(folder).iterdir() if (path / "config.json").exists()):
        model = load(path)
        first = [common.local(p).detach().clone() for p in model.parameters()]
        for name in FEW if common.ranks() > 1 and path.name != "own_head" else CASES:  # to save time
            for p, x in zip(model.parameters(), first):
                common.local(p.data).copy_(x)
                p.grad = None
            LOGGED.clear()
            CASES[name](model)
            state = {k: common.whole(p.data).clone() for k, p in model.named_parameters()}
            found[name, path.name] = state, [*LOGGED]
    return found


def of_ranks(x):
    found = [None] * common.ranks()
    dist.all_gather_object(found, x)
    return found


def status(script, *flags):
    """Exit status of a script on each rank."""
    sys.argv[1:] = map(str, flags)
    try:
        script.main(script.parse_args())
    except SystemExit as end:
        return of_ranks(end.code)
    return of_ranks(0)


def blow(self, t, *more, step=common.Optimizer.step):
    """A step; on the second of two processes what comes next in BLOWS follows the third."""
    step(self, t, *more)
    if t == 3 and common.rank() == 1:
        next(BLOWS)(common.local(self.params[0].data).view(-1))


def late(self, *x, save=common.Run.save, **more):
    time.sleep(common.rank())  # the first rank has written args.json when the second comes
    save(self, *x, **more)


BLOWS = iter([lambda p: signal.raise_signal(signal.SIGTERM), lambda p: p[:1].fill_(float("nan"))])
RUN = "--tiny --device cpu --batch 8 --tokens 64 --log-every 1 --lr 1e-5 --steps 8 --save-every 1e-9".split()
ATTACK = "--tiny --device cpu --steps 2 --batch 8 --lr 1e-5 --mmlu".split()

if __name__ == "__main__":
    folder, reads, read = Path(sys.argv[1]), [], common.AutoModelForCausalLM.from_pretrained
    common.AutoModelForCausalLM.from_pretrained = lambda *x, **more: reads.append(x) or read(*x, **more)
    found, attack = weights(folder), ("--ckpt", folder / "two" / "model", *ATTACK, folder / "mmlu")
    found["recover"], common.Run.save = status(A, *attack), late
    found["sweep"] = status(A, *attack, "--sweep", "--only", "8_bit", "4_bit")
    found["one_two"] = status(R, *RUN, "--out", folder / "one_two" / "out")
    common.Optimizer.step = blow
    for name in ("two_one", "nan"):
        found[name] = status(R, *RUN, "--out", folder / name / "out")
    found["reads"] = of_ranks(len(reads))
    if not common.rank():
        torch.save(found, folder / "found.pt")
