"""Every method on toy models, and what scripts do in several processes: torchrun .. tests/ranks.py FOLDER
reads the models in FOLDER/*/ and writes FOLDER/found.pt."""

import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import WORLD, Batches
from test_methods import RUNS, undo

import baselines
import common
import random_mapping as R
import recover as A


class Rows(Batches):
    """Every rank has its rows of the same batches, as from a Stream."""

    def __getitem__(self, i):
        return tuple(x[common.rank() :: common.ranks()].contiguous() for x in super().__getitem__(i))


F, HELD, LOGGED = Rows(6, seed=1), Rows(6, seed=3), []  # LOGGED: of all ranks together


def log(i, steps, norms=(), **values):
    values = {k: float(common.summed(v)) for k, v in values.items()}
    LOGGED.append(values | {f"norm {n}": float(common.whole(norm)) for n, norm in enumerate(norms)})


BRIEF = dict(steps=2, lr=1e-5, log=log)


def case(name, **more):
    return lambda model: RUNS[name](model, F, HELD, **BRIEF, **more)


def lora(model):
    with A.adapters(model, 2, 0):
        A.finetune(model, F, clip=0.1, **BRIEF)


def rounded(model):
    A.round_weights(model, 4)
    A.prune(model, 0.3)


CASES = {name: case(name) for name in RUNS} | {
    "random_mapping": case("random_mapping", balance=0.3),
    "mlac_ar_sgd": case("mlac_ar", optimizer="sgd"),
    "undo": lambda model: undo(model, load(model.folder), F, HELD, noise=0.3, **BRIEF),
    "probes_free": case("adv_probes", freeze=False),
    "finetune": case("finetune", optimizer="adamw", clip=0.5, weight_decay=0.1),
    "sgd": case("finetune"),
    "rmu": case("rmu", weight=10.0),
    "lora": lora,
    "rounded": rounded,
}
FEW = ("random_mapping", "mlac_ar", "undo", "adv_probes", "finetune")


def load(folder):
    """A model; its folder's name says how it computes."""
    model, _ = common.load_model(str(folder), dtype="float32", device="cpu")
    if "checkpointing" in folder.name:
        common.recompute(model)
    assert not model.training  # dropout would be on
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


def false_texts():
    """Of two batches of the miniature."""
    model, tokenizer = common.load_model(str(WORLD / "base"), dtype="float32", device="cpu")
    model.micro_batch, texts = 0, common.load_chunks(str(WORLD / "chunks.jsonl"))[0]
    stream = common.Stream(texts, tokenizer, 6, 64, 0, "forget", "cpu")
    return baselines.false_texts(model, stream, steps=2, rounds=1, rare=0.0125)


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
    found["locked"] = status(R, *RUN, "--out", folder / "locked" / "out")
    common.Optimizer.step = blow
    for name in ("two_one", "nan"):
        found[name] = status(R, *RUN, "--out", folder / name / "out")
    found["reads"] = of_ranks(len(reads))
    found["false_texts"] = of_ranks(false_texts())
    if not common.rank():
        torch.save(found, folder / "found.pt")
