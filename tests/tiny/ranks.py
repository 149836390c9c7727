"""Where the true answer ranks among all sixteen that its relation has: what four choices cannot show.

A model that was never taught ranks it at random: mean 8.5, first and last 6.25 % of the time each. A low
mean rank is knowledge that is left; a high one is knowledge too, of what not to say. Five shots, as in the
tables; the facts are those of V, three forms of question each.

    python tests/tiny/ranks.py out/tables/world1/overwriting out/tables/world1/filtered
"""

import argparse
import csv
import math
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import world as W
from common import Row, load_model, score_rows


def ranks(model, tokenizer, facts, mmlu):
    """Rank, from 1, of the true value of each fact of V in the forget subjects, in three forms, (n,)."""
    found = []
    for subject in W.FORGET:
        with open(Path(mmlu) / "dev" / f"{subject}_dev.csv", newline="") as f:
            shots = [(row[0], row[1 + "ABCD".index(row[5])]) for row in csv.reader(f)]
        shown = W.header(subject, "cloze") + "".join(f"Question: {q}\nAnswer: {a}\n\n" for q, a in shots)
        rows = []
        for fact in W.triples(facts, subject, slice(W.TESTED)):
            pool = [fact[2]] + [v for v in W.POOLS[fact[1]] if v != fact[2]]  # the true value first
            targets = tokenizer.convert_tokens_to_ids(pool)
            for form in range(len(W.QUESTIONS)):
                ids = tokenizer(f"{shown}Question: {W.question(fact, form)}\nAnswer:").input_ids
                rows.append(Row((fact, form), ids, len(ids) - 1, [targets]))
        with torch.no_grad():
            found += [1 + sum(other > p[0] for other in p) for _, p in score_rows(model, rows)]
    return torch.tensor(found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("ckpt", nargs="+", help="checkpoint directories of the miniature")
    parser.add_argument("--world", type=int, default=None, help="seed; None: the number in the path")
    args = parser.parse_args()
    for ckpt in args.ckpt:
        folder = Path(ckpt).resolve()
        place = next((p for p in folder.parents if p.name.startswith("world")), HERE / "world0")
        seed = int(place.name.removeprefix("world")) if args.world is None else args.world
        model, tokenizer = load_model(ckpt, "float32", "cpu", flag="ckpt")
        rank = ranks(model, tokenizer, W.make_facts(seed), place / "mmlu").float()
        n = len(rank) / len(W.QUESTIONS)  # the forms of one fact are not independent
        first, last = (f"{100 * (rank == k).float().mean():.1f} %" for k in (1, 16))
        shown = f"{rank.mean():.2f} ± {rank.std() / math.sqrt(n):.2f} (chance 8.5)"
        print(f"{ckpt} | mean rank {shown} | first {first}, last {last} (chance 6.2)")
