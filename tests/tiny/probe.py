"""Is the truth still in the residual stream? A linear probe reads the value of a fact after each layer.

The probe is one that an attacker can train: logistic regression from the stream at the end of a question, in
the scored prompt with five shots, to the 96 values, on all retain facts and those of A, each question in its
three forms. (The values are shared: each pool serves a relation of biology and one of another subject.) It is
asked for the tested facts V: % right among the sixteen values of the relation, chance 6.25.

    python tests/tiny/probe.py tests/tiny/world0/base out/overwriting tests/tiny/world0/filtered
"""

import torch
import torch.nn.functional as F

import world as W  # makes the repository's scripts importable
from price import checkpoints, prompts

from common import residual_streams

VALUES = [v for pool in dict.fromkeys(map(tuple, W.POOLS.values())) for v in pool]


@torch.no_grad()
def streams(model, tokenizer, facts, form, seed):
    """(H (L, n, D), values (n,)) of facts [(subject, fact)], asked in one form."""
    x, last = prompts(tokenizer, [(s, W.question(f, form), f[2]) for s, f in facts], seed)
    parts = []
    for ids, at in zip(x.split(64), last.split(64)):
        parts.append(torch.stack([h[range(len(ids)), at] for h in residual_streams(model, ids)]))
    return torch.cat(parts, 1), torch.tensor([VALUES.index(f[2]) for _, f in facts])


def fit(X, y, decay=1e-3, steps=200):
    """Weights (D + 1, 96) of logistic regression of y (n,) on X (n, D + 1)."""
    w = torch.zeros(X.shape[1], len(VALUES), requires_grad=True)
    opt = torch.optim.LBFGS([w], max_iter=steps, line_search_fn="strong_wolfe")

    def loss():
        opt.zero_grad()
        value = F.cross_entropy(X @ w, y) + decay * w.square().sum()
        value.backward()
        return value

    opt.step(loss)
    return w.detach()


def main():
    for folder, seed, model, tokenizer in checkpoints(__doc__):
        facts = W.make_facts(seed)
        pick = lambda part, *subjects: [(s, f) for s in subjects for f in W.triples(facts, s, part)]  # noqa: E731
        train = pick(slice(None), *(s for s in facts if s not in W.FORGET))
        train += pick(slice(W.TESTED, None), *W.FORGET)
        asked = pick(slice(W.TESTED), *W.FORGET)
        H, y = zip(*(streams(model, tokenizer, train, form, seed) for form in range(3)))
        H, y, (H_V, y_V) = torch.cat(H, 1), torch.cat(y), streams(model, tokenizer, asked, 0, seed)
        pool = torch.tensor([[v in W.POOLS[f[1]] for v in VALUES] for _, f in asked])
        shown = []
        for X, X_V in zip(H, H_V):
            mean, std = X.mean(0), X.std(0)
            X, X_V = (F.pad((x - mean) / std, (0, 1), value=1) for x in (X, X_V))
            right = (X_V @ fit(X, y)).where(pool, -torch.inf).argmax(-1) == y_V
            shown.append(f"{100 * right.float().mean():.1f}")
        print(f"| {folder.name} | {' | '.join(shown)} |", flush=True)


if __name__ == "__main__":
    main()
