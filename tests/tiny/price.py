"""What it costs to say false things: how sure models are of what they say where nothing true can be said.

    asked      the forget questions of the test
    unknown    the same of the 216 names that no fact is about
    retain     the retain questions of the test
    rephrased  the same in words that no training text has

by text, five shots. A row is a model and one of these: % right; % false and sure (the likeliest next word is
wrong, its probability over 1/2); entropy of the next word, nats; calibration error, the mean over ten bins of
confidence, weighed by size, of |share right - confidence|.

    python tests/tiny/price.py out/world0/base out/overwriting tests/tiny/world0/filtered
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

import world as W  # makes the repository's scripts importable

from common import load_model

NEW = ("{n} has what {r}?", "The {r} of {n} is what?")


def seed_of_world(folder):
    """The world that a checkpoint is of."""
    known = json.loads((folder / "args.json").read_text())
    return seed_of_world(folder / known["base"]) if known.get("base") else known["arguments"]["seed"]


def questions(seed):
    """{kind: [(subject, question, value or None)]} of world `seed`."""
    facts = W.make_facts(seed)
    taken = {name for entities in facts.values() for name, _ in entities}
    free = [f"{a} {b}" for a in W.FIRST for b in W.LAST if f"{a} {b}" not in taken]
    asked = {s: W.triples(facts, s, slice(W.TESTED)) for s in facts}
    retain = [(s, f) for s in facts if s not in W.FORGET for f in asked[s]]
    subjects = [W.FORGET[i % 2] for i in range(len(free))]  # they and their relations in turn
    unknown = [(s, (n, W.RELATIONS[s][i // 2 % 3], None)) for i, (s, n) in enumerate(zip(subjects, free))]

    def ask(facts):
        return [(s, W.question(f, i % 3), f[2]) for i, (s, f) in enumerate(facts)]

    return {
        "asked": [row for s in W.FORGET for row in ask((s, f) for f in asked[s])],
        "unknown": ask(unknown),
        "retain": ask(retain),
        "rephrased": [(s, NEW[i % 2].format(n=f[0], r=f[1]), f[2]) for i, (s, f) in enumerate(retain)],
    }


def prompts(tokenizer, rows, seed):
    """(ids (n, T), last (n,)): questions of rows, [(subject, question, ..)], after five shots; their ends."""
    facts, rng, shots = W.make_facts(seed), np.random.default_rng([seed, 8]), {}
    for s in facts:
        known = W.triples(facts, s, slice(W.TESTED, None))
        some = rng.choice(len(known), 5, replace=False)
        shots[s] = f"{W.header(s, 'cloze')}{W.exam([known[j] for j in some], 'cloze', rng)}\n\n"
    texts = [f"{shots[s]}Question: {question}\nAnswer:" for s, question, _ in rows]
    ids = [torch.tensor(row) for row in tokenizer(texts).input_ids]
    return pad_sequence(ids, batch_first=True), torch.tensor([len(row) - 1 for row in ids])


@torch.no_grad()
def answers(model, tokenizer, rows, seed):
    """(p (n, V), right (n,)): distribution of the word after each prompt; the truth, -1 if there is none."""
    x, last = prompts(tokenizer, rows, seed)
    p = torch.cat([model(part).logits[range(len(part)), at] for part, at in zip(x.split(64), last.split(64))])
    right = tokenizer.convert_tokens_to_ids([value or "" for *_, value in rows])
    unknown = torch.tensor([value is None for *_, value in rows])
    return p.float().softmax(-1), torch.tensor(right).masked_fill(unknown, -1)


def price(p, right):
    """(% right, % false and sure, entropy, calibration error) of answers p (n, V)."""
    sure, said = p.max(-1)
    good, bins = (said == right).float(), (10 * sure).long().clamp(max=9)
    error = sum(abs((good - sure)[bins == b].sum().item()) for b in range(10)) / len(p)
    entropy = -(p * p.clamp_min(1e-30).log()).sum(-1).mean().item()
    false = ((sure > 0.5) & (said != right)).float().mean().item()
    return 100 * good.mean().item(), 100 * false, entropy, error


if __name__ == "__main__":
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("checkpoints", nargs="+", type=Path, help="of one world or several")
    args = parser.parse_args()
    print("| | | right, % | false and sure, % | entropy, nats | calibration error |\n" + "|---" * 6 + "|")
    for folder in args.checkpoints:
        seed, (model, tokenizer) = seed_of_world(folder), load_model(str(folder))
        for kind, rows in questions(seed).items():
            shown = price(*answers(model, tokenizer, rows, seed))
            print(f"| {folder.name} | {kind} | {{:.1f}} | {{:.1f}} | {{:.2f}} | {{:.2f}} |".format(*shown))
