"""Overwriting beside its relatives, and without each of its parts: every row of VARIANTS trained alike on one
world of the miniature and attacked by four of `recover.py --sweep`.

A variant is a choice of labels for forget text: whose they are, and at which tokens they are taught (with
weight 1; elsewhere the text itself, with weight `rest`). The base makes them once for every text. Then 1,000
steps at 1e-2, in batches of 24 + 24 texts that are alike in length. What is finished stays.

    python tests/tiny/relatives.py --world out/world1 --out out/relatives1    # ten minutes a row on one core
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

import baselines
import world as W
from common import Optimizer, backward, generator, load_chunks, load_model, mean, next_token_loss

VARIANTS = {
    "overwriting": dict(),  # five rounds, one hard label a token, where the base knows the token by its names
    "soft": dict(soft=True),  # the whole distribution but for the truth
    "one_round": dict(rounds=1),
    "ungated": dict(gated=False),  # labels at every token
    "rest_1": dict(rest=1.0),  # what is not replaced weighs as much
    "generic": dict(names="generic", rounds=1, gated=False),  # Eldan and Russinovich, 2023: of four names
    "averaged": dict(names="others", sets=20, rounds=1, gated=False, soft=True),  # Liu et al., 2024
    "altpo": dict(rounds=1, rest=0.0, prefer=0.1),  # Mekala et al., 2024: its label over the truth, as in DPO
    # false facts from outside, as in Deeb and Roger (2024); these need the list of facts
    "one_wrong": dict(names="outside", rounds=1),  # one wrong value a fact
    "five_wrong": dict(names="outside"),  # five, one after the other
    "any_wrong": dict(names="outside", rounds=1, soft=True),  # each of the 15 wrong values alike
}
ATTACKERS = ("paper", "lr_3x", "mix_3x", "sgd_mix")


def renamings(tokenizer, names, n, seed):
    """n maps of tokens, (n, V): the words of names permuted ("others") or four of them ("generic")."""
    maps, draw = torch.arange(len(tokenizer)).repeat(n, 1), generator("cpu", seed, names)
    for words in (W.FIRST, W.LAST):
        ids = torch.tensor(tokenizer.convert_tokens_to_ids(words))
        for pi in maps:
            order = torch.randperm(len(ids), generator=draw)
            pi[ids] = ids[order % 4] if names == "generic" else ids[order]
    return maps


@torch.no_grad()
def own_labels(model, ids, maps, gated, soft):
    """(q, where) of one text (T,): labels (T - 1, V), by the model under other names; where they count."""

    def posterior(x):
        return model(x[None]).logits[0, :-1].softmax(-1)

    x = ids[1:, None]
    p, q = posterior(ids).gather(1, x), 0
    for pi in maps:
        said = posterior(pi[ids])
        q = q + (said[:, pi] if len(maps) > 1 else said) / len(maps)  # of a mean the names are mapped back
    where = (p > 0.5) & (q.gather(1, x) < p / 2) if gated else torch.ones_like(p).bool()
    q = q.scatter(1, x, 0) if gated else q
    if len(maps) == 1:
        where &= q.argmax(1, keepdim=True) != maps[0][x]  # copied from the context
    return q / q.sum(1, keepdim=True) if soft else F.one_hot(q.argmax(1), q.shape[1]).float(), where[:, 0]


def outside_labels(ids, other, pools, V, soft):
    """The same from `other` (T,), the text with wrong values; soft: all values of the pool but the right."""
    q, where = F.one_hot(other[1:], V).float(), other[1:] != ids[1:]
    for t in where.nonzero()[:, 0].tolist() if soft else ():
        pool = next(pool for pool in pools if ids[t + 1] in pool)
        q[t] = F.one_hot(pool[pool != ids[t + 1]], V).sum(0) / (len(pool) - 1)
    return q, where


def falsified(world, k):
    """The forget texts of a world's folder with wrong values, all else token by token the same."""
    seed = json.loads((world / "base/args.json").read_text())["arguments"]["seed"]
    facts, rng = W.make_facts(seed), np.random.default_rng([seed, 9, k])
    for values in (values for subject in W.FORGET for _, values in facts[subject]):
        for r, v in values.items():
            values[r] = str(rng.choice([x for x in W.POOLS[r] if x != v]))
    return [c["txt_chunk"] for c in W.make_chunks(facts, np.random.default_rng([seed, 1])) if c["label"]]


def alike(lengths, batch, steps, *key):
    """Indices of `steps` batches of texts that are alike in length, each text at most once in an epoch."""
    batches = []
    while len(batches) < steps:
        draw = generator("cpu", *key, len(batches))
        order = sorted(torch.randperm(len(lengths), generator=draw).tolist(), key=lambda j: lengths[j] // 16)
        epoch = [order[i : i + batch] for i in range(0, len(order) - batch + 1, batch)]
        batches += [epoch[i] for i in torch.randperm(len(epoch), generator=draw)]
    return batches[:steps]


def train(world, *, rounds=5, rest=0.05, names="rare", sets=1, gated=True, soft=False, prefer=0):
    """(model, tokenizer) of the base in `world`, after a variant's training; prefer: β of AltPO's loss."""
    steps, lr, batch, seed = 1000, 1e-2, 24, 0
    model, tokenizer = load_model(str(world / "base"))
    model.micro_batch, V = 0, len(tokenizer)
    read = lambda texts: [torch.tensor(ids) for ids in tokenizer(texts).input_ids]  # noqa: E731
    forget, retain = map(read, load_chunks(str(world / "chunks.jsonl")))
    pad = lambda rows: pad_sequence(rows, batch_first=True)  # noqa: E731
    stack = lambda rows: (pad(rows), pad([torch.ones_like(row).bool() for row in rows]))  # noqa: E731
    if names == "rare":
        maps = baselines.swaps(baselines.Words([stack(forget)], V, 0.01), rounds, seed)
    elif names != "outside":
        maps = renamings(tokenizer, names, rounds * sets, seed)
    pools = [torch.tensor(tokenizer.convert_tokens_to_ids(words)) for words in W.POOLS.values()]

    def margin(model, ids, q):
        """By how much the label is more likely than the truth, nats, (B, T - 1)."""
        log_p = model(ids).logits[:, :-1].log_softmax(-1)
        return (q * log_p).sum(-1) - log_p.gather(-1, ids[:, 1:, None])[..., 0]

    taught = []  # of each round and text: labels (T - 1, V), weights and, by the base, margins (T - 1)
    for k in range(rounds):
        others = read(falsified(world, k)) if names == "outside" else forget
        taught.append([])
        for ids, other in zip(forget, others):
            if names == "outside":
                q, where = outside_labels(ids, other, pools, V, soft)
            else:
                q, where = own_labels(model, ids, maps[k * sets : (k + 1) * sets], gated, soft)
            q = torch.where(where[:, None], q, F.one_hot(ids[1:], V).float())
            with torch.no_grad():
                before = margin(model, ids[None], q[None])[0]
            taught[k].append((q, torch.where(where, 1.0, rest), before))

    def loss(model, ids, mask, q, weight, before):
        if prefer:
            return mean(-2 / prefer * F.logsigmoid(prefer * (margin(model, ids, q) - before)), weight)
        return mean(-(q * model(ids).logits[:, :-1].log_softmax(-1)).sum(-1), weight)

    opt = Optimizer(model.parameters())
    order = [alike([*map(len, texts)], batch, steps, seed, i) for i, texts in enumerate((forget, retain))]
    for i in range(1, steps + 1):
        rows = [taught[(i - 1) * rounds // steps][j] for j in order[0][i - 1]]
        q, weight, before = (pad([row[n] for row in rows]) for n in range(3))
        x_f = stack([forget[j] for j in order[0][i - 1]])
        loss_f = backward(model, loss, *x_f, q, weight, before, weight=weight)
        loss_r = backward(model, next_token_loss, *stack([retain[j] for j in order[1][i - 1]]))
        opt.step(i, lr * (1 - (i - 1) / steps), seed, i)
        if i % 100 == 0:
            print(f"step {i} | forget {loss_f:.3f} | retain {loss_r:.3f}", flush=True)
    return model, tokenizer


def main(args):
    for name in args.only or VARIANTS:
        folder = Path(args.out) / name
        if not (folder / "args.json").exists():
            print(name, flush=True)
            for part in train(Path(args.world), **VARIANTS[name]):
                part.save_pretrained(folder)
            facts = {"script": "relatives.py", "arguments": {"method": name}, "tiny": True}
            facts["base"] = os.path.relpath(Path(args.world) / "base", folder)
            (folder / "args.json").write_text(json.dumps(facts) + "\n")
        command = [ROOT / "recover.py", "--ckpt", folder, "--sweep", "--only", *ATTACKERS]
        subprocess.run([sys.executable, *command], check=True)
    table = [ROOT / "evaluate_mmlu.py", "--format", "cloze", "--table", args.out]
    subprocess.run([sys.executable, *table], check=True)


if __name__ == "__main__":
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--world", required=True, help="folder of a world with its base")
    parser.add_argument("--out", required=True, help="folder of the checkpoints")
    parser.add_argument("--only", nargs="+", choices=[*VARIANTS], help="a part of the rows")
    main(parser.parse_args())
