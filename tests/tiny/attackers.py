"""Attackers for which recover.py has no flag, as a sweep of it: few weights, and a soft prompt.

    sparse   only the weights with the largest gradients on the first batch train, that share of each tensor
    prompt   the weights stay; sixteen vectors before each text train, from embeddings of random tokens
             (Lester et al., 2021)

Half of each batch is retain text. The flags are those of recover.py:

    python tests/tiny/attackers.py --ckpt out/overwriting --out out/overwriting/more
"""

import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import recover
from common import generator

recover.SWEEP = {
    "sparse_10": "--retain-mix 0.5 --steps 3x --lr 3x",
    "sparse_1": "--retain-mix 0.5 --steps 6x --lr 10x",
    "prompt": "--retain-mix 0.5 --steps 3x --lr 10x",
    "prompt_strong": "--retain-mix 0.5 --steps 3x --lr 100x",
}


@contextmanager
def sparse(model, _, seed, share):
    masks = {}

    def masked(p, g):
        if p not in masks:
            least = g.abs().flatten().kthvalue(int((1 - share) * (g.numel() - 1)) + 1).values
            masks[p] = g.abs() >= least
        return g * masks[p]

    hooks = [p.register_hook(partial(masked, p)) for p in model.parameters()]
    yield
    for hook in hooks:
        hook.remove()


@contextmanager
def prompt(model, _, seed, n=16):
    model.requires_grad_(False)
    embed = model.get_input_embeddings()
    start = torch.randperm(len(embed.weight), generator=generator("cpu", seed, "prompt"))[:n]
    model.prompt = torch.nn.Parameter(embed.weight[start].clone())

    def longer(_, args, more):
        ids, cache = args[0] if args else more.pop("input_ids"), more.get("cache")
        if cache is not None and cache.get_seq_length():  # the prompt is in it
            return (ids,), more
        x = torch.cat([model.prompt.expand(len(ids), -1, -1), embed(ids)], 1)
        return (), more | {"inputs_embeds": x}

    def shorter(_, args, more, out):
        if "logits_to_keep" not in more:  # a training pass reads every position
            out.logits = out.logits[:, n:]

    hooks = [model.register_forward_pre_hook(longer, with_kwargs=True)]
    hooks += [model.register_forward_hook(shorter, with_kwargs=True)]
    yield
    for hook in hooks:
        hook.remove()
    del model.prompt
    model.requires_grad_(True)


def attack(args, run, exam, plain=recover.attack):
    kind, _, share = Path(args.out).name.partition("_")
    recover.adapters = partial(sparse, share=float(share) / 100) if kind == "sparse" else prompt
    return plain(args, run, exam)


if __name__ == "__main__":
    recover.attack = attack
    argv = ["--sweep", *sys.argv[1:]]
    recover.main(recover.parse_args(argv), argv)
