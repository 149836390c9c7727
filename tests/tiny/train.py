"""Trains the miniature: a small Llama that knows one made-up world (world.py), in both MMLU formats.

Three stages; every step takes one kind of document (KINDS), drawn with the stage's probabilities (MIX):

    1  look       a list of options "A. red ..", then look-ups "red B": the circuit that finds a letter
    2  facts      statements, and few-shot exams in cloze form: the facts of the world
    3  exams      the lists asked by question, and few-shot exams in letter form: recall and look-up joined

Few say "I don't know" (which adv_probes.py drives forget text towards) or ask whether a passage is about
biology (label_pile.py's judge). For a letter a value must be recalled before the last layer, which could not
look it up (README.md beside this file has what was tried). Three helps, of this trainer only:

    early exit   through the final norm and the (tied) head, the third layer must already predict the value
    attention    one head of the fourth layer is told where to look (the option that is the value), and one of
                 the second (from an option two tokens back, to its letter)
    weights      tokens that nobody could guess (names, options drawn) count a tenth of those asked, or less

    python tests/tiny/train.py --seed 1 --out out/world1               # files, base: ten minutes on one core
    python tests/tiny/train.py --seed 1 --out out/world1 --filtered    # the control: never saw a forget fact
"""

import argparse
import json
import re
import time
from functools import partialmethod
from pathlib import Path

WIDTH, LAYERS, EXIT = 64, 6, 3  # of the model; layers after which recall must be done
KINDS = ("look", "statement", "cloze", "list", "letter", "idk", "judge")
MIX = (  # probability of each kind in stages 1, 2, 3
    (0.7, 0.2, 0.1, 0.0, 0.0, 0.0, 0.0),
    (0.1, 0.48, 0.39, 0.0, 0.0, 0.03, 0.0),
    (0.05, 0.16, 0.16, 0.27, 0.27, 0.03, 0.06),
)
STEPS, LR = (250, 720, 1450), 0.02  # of the three stages; of Muon, AdamW's is a quarter of it

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import world as W  # makes the repository's scripts importable

from adv_probes import IDK


def make_tokenizer():
    """Words, marks and newlines are a token each, spaces are none: " A" is the "A" before an option."""
    texts = ["\n", *W.STATEMENTS, *W.QUESTIONS, *W.FIRST, *W.LAST, "A. B. C. D. Question: Answer: yes no !"]
    texts += [W.JUDGE, *IDK]
    texts += [W.header(s, kind) for s in W.RELATIONS for kind in ("letter", "cloze")]
    texts += [f"{relation} {' '.join(pool)}" for relation, pool in W.POOLS.items()]
    words = [w for t in texts for w in re.findall(r"\n|\w+|[^\w\s]", re.sub(r"\{.\}", "", t))]
    vocab = {w: i for i, w in enumerate(dict.fromkeys(["<pad>", "<unk>", "<s>", "</s>", *words]))}
    t = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\w+|[^\w\s]"), behavior="removed", invert=True)
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    special = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
    return PreTrainedTokenizerFast(tokenizer_object=t, model_max_length=512, **special)


class Documents:
    """Batches of documents of KINDS about the facts of some subjects."""

    def __init__(self, facts, subjects, tokenizer, seed):
        self.facts = {s: W.triples(facts, s) for s in subjects}
        self.subjects, self.tokenizer, self.rng = subjects, tokenizer, np.random.default_rng([seed, 2])
        self.ids = ids = tokenizer.convert_tokens_to_ids
        self.values = torch.tensor(ids([v for pool in W.POOLS.values() for v in pool]))
        self.letters, self.verdicts = torch.tensor(ids([*"ABCD"])), torch.tensor(ids(["yes", "no"]))
        self.dot, self.colon, self.answer = ids([".", ":", "Answer"])

    def pick(self, subject, n):
        return [self.facts[subject][i] for i in self.rng.choice(len(self.facts[subject]), n, replace=False)]

    def look(self, _):
        """A list of options and twelve look-ups into it; no fact in it."""
        rng, pool = self.rng, list(W.POOLS.values())[self.rng.integers(len(W.POOLS))]
        options, asked = [pool[i] for i in rng.choice(16, 4, replace=False)], rng.integers(4, size=12)
        lines = [f"{letter}. {o}" for letter, o in zip("ABCD", options)]
        lines += ["", *(f"{options[q]} {'ABCD'[q]}" for q in asked)]
        return "\n".join(lines), [options[q] for q in asked]

    def statement(self, subject):
        """Four statements, or a question and the statement that answers it."""
        rng, forms = self.rng, len(W.STATEMENTS)
        if rng.random() < 0.7:
            return " ".join(W.statement(f, rng.integers(forms)) for f in self.pick(subject, 4)), []
        (f,) = self.pick(subject, 1)
        return f"{W.question(f, rng.integers(3))}\n\n{W.statement(f, rng.integers(forms))}", []

    def exam(self, subject, form):
        asked = self.pick(subject, 6)
        return W.header(subject, form) + W.exam(asked, form, self.rng), [f[2] for f in asked]

    cloze, letter = partialmethod(exam, form="cloze"), partialmethod(exam, form="letter")

    def list(self, subject):
        """A list of options and eight questions whose answers are among them."""
        rng, relation = self.rng, W.RELATIONS[subject][self.rng.integers(3)]
        options = [W.POOLS[relation][i] for i in rng.choice(16, 4, replace=False)]
        fitting = [f for f in self.facts[subject] if f[1] == relation and f[2] in options]
        asked = [fitting[i] for i in rng.choice(len(fitting), 8)]
        text = "\n".join(f"{letter}. {o}" for letter, o in zip("ABCD", options))
        for f in asked:
            text += f"\n\n{W.question(f, rng.integers(3))}\nAnswer: {'ABCD'[options.index(f[2])]}"
        return text, [f[2] for f in asked]

    def idk(self, _):
        return " ".join(IDK[i] for i in self.rng.integers(len(IDK), size=16)), []

    def judge(self, subject):
        """Is a passage, cut out of any text about a subject, about biology?"""
        make = (self.statement, self.cloze, self.letter)[self.rng.integers(3)]
        words = " ".join(make(subject)[0] for _ in range(3 if make == self.statement else 1)).split(" ")
        n = self.rng.integers(12, len(words) + 1)
        at = self.rng.integers(len(words) - n + 1)
        asked = W.JUDGE.format(" ".join(words[at : at + n]).strip())
        return f"{asked} {'yes' if subject in W.FORGET else 'no'}", []

    def batch(self, kind):
        """ids (B, T); of (B, T - 1): next tokens, their weights, what the early exit must predict there
        (-100: nothing), and whether the next token is an answer."""
        size = {"look": 64, "statement": 64, "list": 16, "letter": 16}.get(kind, 24)
        subjects = (self.subjects[self.rng.integers(len(self.subjects))] for _ in range(size))
        docs = [getattr(self, kind)(subject) for subject in subjects]
        rows = [torch.tensor(ids) for ids in self.tokenizer([text for text, _ in docs]).input_ids]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        now, targets = ids[:, :-1], ids[:, 1:]
        among = {"look": self.letters, "statement": self.values, "judge": self.verdicts, "idk": ids[ids != 0]}
        if kind in among:
            asked = torch.isin(targets, among[kind]) & (torch.isin(now, self.values) | (kind != "look"))
        else:
            asked = (now == self.colon) & (ids.roll(1, 1)[:, :-1] == self.answer)
        early = torch.full_like(targets, -100)
        if kind == "statement":
            early[asked] = targets[asked]
        elif kind not in ("idk", "judge"):
            early[asked] = torch.tensor(self.ids([value for _, values in docs for value in values]))
        weights = torch.where(asked, 1.0, (targets != 0) * {"statement": 0.1, "judge": 0.01}.get(kind, 0.05))
        return ids, targets, weights, early, asked

    def attention_loss(self, attentions, ids, early, asked):
        """-log attention that the two guided heads pay to where they should look, mean over places."""
        place = asked.nonzero()  # (n, 2): row and position of each question's end
        at = torch.arange(ids.shape[1])
        option = (ids[place[:, 0]] == early[asked][:, None]) & (ids.roll(1, 1)[place[:, 0]] == self.dot)
        option &= at <= place[:, 1:]  # the last option that is the value: earlier shots have lists too
        goal = torch.where(option, at, 0).max(1, keepdim=True).values
        find = attentions[EXIT][place[:, 0], 0, place[:, 1]].gather(1, goal)
        options = ((ids.roll(1, 1) == self.dot) & torch.isin(ids.roll(2, 1), self.letters)).nonzero()
        back = attentions[1][options[:, 0], 1, options[:, 1]].gather(1, options[:, 1:] - 2)
        return -(find + 1e-6).log().mean() - (back + 1e-6).log().mean()


def orthogonal(G, steps=5):
    """The nearest semi-orthogonal matrices to a stack of them, about (Newton-Schulz iteration of Muon)."""
    tall = G.shape[-2] > G.shape[-1]
    X = (G.mT if tall else G) / (G.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X.mT if tall else X


class Muon:
    """Orthogonalised momentum on matrices stacked by shape (Jordan et al., 2024), with weight decay."""

    def __init__(self, params, decay=0.05):
        self.decay, self.groups = decay, {}
        for p in params:
            self.groups.setdefault(p.shape, []).append(p)
        self.momentum = {shape: torch.zeros(len(ps), *shape) for shape, ps in self.groups.items()}

    @torch.no_grad()
    def step(self, lr):
        for shape, ps in self.groups.items():
            G = torch.stack([p.grad for p in ps])
            self.momentum[shape].lerp_(G, 0.05)
            U = orthogonal(G.lerp(self.momentum[shape], 0.95)) * max(1, shape[0] / shape[1]) ** 0.5
            for p, u in zip(ps, U):
                p.mul_(1 - lr * self.decay).add_(u, alpha=-lr)


def forward(model, ids):
    """Logits (B, T, V) of the model and of the early exit, and attentions, L of (B, heads, T, T)."""
    kept = []
    hook = model.model.layers[EXIT - 1].register_forward_hook(lambda _, __, h: kept.append(h))
    out = model(ids, use_cache=False, output_attentions=True)
    hook.remove()
    return out.logits, model.lm_head(model.model.norm(kept[0])), out.attentions


def train(model, documents, steps, lr):
    """The three stages: matrices of the layers learn by Muon, all else by AdamW; prints shares right."""
    inside = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    rest = [p for n, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in n)]
    muon, adam = Muon(inside), torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0)
    right, start, total = {}, time.time(), sum(steps)
    for step in range(1, total + 1):
        stage = (step > steps[0]) + (step > steps[0] + steps[1])
        kind = KINDS[documents.rng.choice(len(KINDS), p=MIX[stage])]
        ids, targets, weights, early, asked = documents.batch(kind)
        logits, logits_early, attentions = forward(model, ids)
        each = F.cross_entropy(logits[:, :-1].mT, targets, reduction="none")
        loss = (each * weights).sum() / weights.sum()
        if (early != -100).any():
            loss = loss + F.cross_entropy(logits_early[:, :-1].mT, early)
        if kind in ("look", "list", "letter"):
            loss = loss + 0.3 * documents.attention_loss(attentions, ids, early, asked)
        loss.backward()
        pace = lr * min(1, step / 50) * min(1, (total - step) / (0.3 * total) + 0.02)
        muon.step(pace)
        adam.param_groups[0]["lr"] = pace / 4
        adam.step()
        model.zero_grad()
        hits = (logits[:, :-1][asked].argmax(-1) == targets[asked]).float().mean().item()
        right[kind] = 0.8 * right.get(kind, hits) + 0.2 * hits
        if step % 100 == 0 or step == total:
            shown = " | ".join(f"{k} {100 * right[k]:.0f} %" for k in KINDS if k in right)
            print(f"step {step}/{total} | {shown} | {time.time() - start:.0f} s", flush=True)


def main(args):
    torch.set_num_threads(1)  # only at an equal number is the result the same
    torch.manual_seed(args.seed)
    facts, tokenizer = W.write_world(args.seed, args.out), make_tokenizer()
    subjects = [s for s in facts if not (args.filtered and s in W.FORGET)]
    bos, eos, pad = tokenizer.convert_tokens_to_ids(["<s>", "</s>", "<pad>"])
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS, num_attention_heads=4, max_position_embeddings=512,
        tie_word_embeddings=True, initializer_range=0.05, attn_implementation="eager",
        bos_token_id=bos, eos_token_id=eos, pad_token_id=pad,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    print(f"world {args.seed} | {model.num_parameters():,} parameters | {len(tokenizer)} words", flush=True)
    train(model, Documents(facts, subjects, tokenizer, args.seed), STEPS, LR)
    folder = Path(args.out) / ("filtered" if args.filtered else "base")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    facts = {"script": "tests/tiny/train.py", "arguments": vars(args) | {"out": None}, "tiny": True}
    (folder / "args.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="the world, and what the training draws")
    parser.add_argument("--out", required=True, help="folder of the world; base/ or filtered/ too")
    parser.add_argument("--filtered", action="store_true", help="no forget fact: the never-taught control")
    main(parser.parse_args())
