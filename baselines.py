"""The baselines of Table 1 (Section 3.3 of *Toward Robust Unlearning for LLMs*, Tamirisa et al., 2024), five
methods of the field, and Overwriting, which is ours.

Threat model: a defender releases the weights of an LLM that must not know the forget set F (biology) and
must still know the retain set R. An adversary has the weights and fine-tunes them to get F back (recover.py).

    min_posterior   loss = - mean log(1 - p(x_t | x_<t)) on x_f  +  L(θ; x_r)
    max_entropy     loss = - mean entropy of p(. | x_<t) on x_f  +  L(θ; x_r)
    high_low_lr     the first fifth of the steps: Random Mapping (3.4) at 10 lr; then, with a fresh optimizer,
                    loss = L(θ; x_f)  +  L(θ; x_r)
    grad_diff       loss = - L(θ; x_f)  +  L(θ; x_r)                                     Liu et al., 2022
    npo             loss = - 2/β mean log σ(- β log [p/p_0](x_f))  +  L(θ; x_r)          Zhang et al., 2024
    simnpo          loss = - 2/β mean log σ(- (β/|x_f|) log p(x_f) - γ)  +  L(θ; x_r)    Fan et al., 2024
    rmu             loss = mean |h - c u|² / D on x_f  +  α mean |h - h_0|² / D on x_r   Li et al., 2024
    undo            from an unlearned model (--model): noise on its weights, then
                    loss = KL(p_0 || p) on x_f  +  KL(p_0 || p) on x_r                   Lee et al., 2025
    overwriting     loss = L(θ; x̃_f)  +  L(θ; x_r), x̃_f: x_f with other names, all but its facts at 0.05

    each step       θ ← AdamW(θ, ∇loss, lr)

θ: weights; x_f, x_r: batches of text of F and R; L: next-token cross-entropy; p_0, h_0: of the model before
training; h: the residual stream of one layer.

Overwriting. What fine-tuning brings back was never gone: a method that only blocks access to a fact is undone
by restoring access. Here another fact takes its place in the weights, so that little is left to restore:

    π ← a random permutation of the rare words of F, each within its kind; a new one each round
    x̃ ← x with other names: a rare word that the model does not expect where x has it first, p_0 <= 1/2,
        is π(word) from there on
    a fact is a token of a rare word that the model knew by the names: p_0(x_t | x_<t) > 1/2, and
        p_0(x̃_t | x̃_<t) is less than half of that; it has weight 1, all other tokens 0.05

So what the model knows of one name it is taught of another, of the same one in all texts of a round. A rare
word with a capital and one right after it are one name; a kind is names of as many tokens, with capitals or
of the same ending (Names). A run first prints some lines of its first batch.

Eldan and Russinovich (2023) and Liu et al. (2024) put other names, too, and take what the model says of these
as labels; here the text itself is the label. It is made before training, from the batches to come, so no
second model is held. Max Entropy after it leaves a model that is not sure of false facts either.

Where the papers are silent, our choices:

1) Min Posterior: -log(1 - p), in nats; tokens with log p below -15 are forgotten and contribute nothing.
2) High/Low LR: 100 steps at 1e-4 and 400 (3.3), these at a tenth of that; each rate falls linearly to 0.
3) The two losses have equal weight (rmu: α; high_low_lr's first phase: see random_mapping.py): both are in
   nats. Pads are masked out; 500 steps; AdamW without weight decay, its learning rate falls linearly to 0.
4) NPO and SimNPO: β = 0.1, and β = 2.5 with γ = 0; a text is a chunk; its first token is not predicted.
   The reference's log-probabilities are computed before training, on the batches to come.
5) RMU: the defaults are its authors' for Zephyr 7B: layer 7 (from 0), c = 6.5, α = 1200; it trains the last
   matrix of the MLP in that layer and the two before, at a constant rate. Theirs: 150 steps, 5e-5, batch 4.
6) UNDO: the noise has the standard deviation of the weights it goes on, the matrices of the decoder layers.

Memory: weights, gradient and two moments in the weights' dtype (bf16 on a GPU), checkpointed activations;
rmu: moments of three matrices only; undo: a second model, the teacher.

Metrics: `forget`, the loss on x_f (nats per token; max_entropy: minus the entropy, at least -log V;
grad_diff: falls without bound; npo, simnpo: at least 0; rmu: mean square; undo: KL; phase random_mapping:
0 to 2); `retain`, L(θ; x_r) in nats per token (undo: as `forget`; rmu: `held`, as `forget`); `balance`, the
ratio of their gradients' norms. Healthy: forget falls, retain stays near its first value. Sick: retain rises
(lr too large), or balance is under 0.05 (the forget loss has no say).

    python baselines.py --method max_entropy --tiny   # the miniature, 45 s on a laptop   -> out/max_entropy
    python baselines.py --method overwriting --tiny   # the same, 10 min                  -> out/overwriting
    python baselines.py --method max_entropy --tiny --model out/overwriting --out out/abstain
    python baselines.py --method high_low_lr          # Llama-2-7b-chat, one 80 GB GPU    -> out/high_low_lr

Each method works in place; forget and retain are Streams of B texts, log and steps_left are Run's. A further
method with a loss on tokens of F is one function, logits (n, V) and targets (n,) to (n,), and its line in
LOSSES; one with a loss on whole texts, a function of log p(x_f), and its line in TEXT_LOSSES.
"""

import argparse
import math
import random
import re
import sys
from bisect import bisect_right
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

WORLD = Path(__file__).parent / "tests/tiny/world0"
# fmt: off
TINY = dict(  # what --tiny swaps in; how it was chosen: tests/tiny/README.md
    model=f"{WORLD}/base", data=f"{WORLD}/chunks.jsonl",
    steps=100, balance=0, batch=24, tokens=208, log_every=50,
)
TINY_OF = dict(  # and of each method
    min_posterior=dict(lr=1e-2), max_entropy=dict(lr=3e-3), high_low_lr=dict(lr=1e-3),
    grad_diff=dict(lr=1e-3), npo=dict(lr=1e-2, steps=300), simnpo=dict(lr=1e-2, steps=300),
    rmu=dict(lr=1e-3, steps=300, layer=2, steer=600.0, weight=10.0), undo=dict(lr=3e-3, steps=1000),
    overwriting=dict(lr=1e-2, steps=1000, rare=0.0125),
)


def parse_args(argv=None):
    form = type("Help", (argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter), {})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}; --help lists the flags\n")
    add = parser.add_argument
    add("--method", default="min_posterior", choices=[*TINY_OF], help="which one, see above")
    add("--model", default="meta-llama/Llama-2-7b-chat-hf", help="start from: hub name or directory")
    add("--data", default="lapisrocks/pile-bio", help="labelled chunks: hub name, file or folder")
    add("--forget", default=None, help="with --retain, instead of --data: texts to forget, see README")
    add("--retain", default=None, help="texts to keep: jsonl, csv, parquet, txt, or a dataset on the hub")
    add("--out", default=None, help="checkpoint directory to write; None: out/METHOD")
    add("--lr", type=float, default=1e-5, help="decaying to 0 (rmu: constant); high_low_lr: first 10x")
    add("--steps", type=int, default=500, help="optimizer steps (3.3; others: not stated)")
    add("--balance", type=float, default=0.3, help="high_low_lr: as in random_mapping.py")
    add("--layer", type=int, default=7, help="rmu: layer whose stream is steered, from 0")
    add("--steer", type=float, default=6.5, help="rmu: length c of the random vector on forget text")
    add("--weight", type=float, default=1200.0, help="rmu: α, weight of the retain loss")
    add("--noise", type=float, default=0.6, help="undo: share of noise in the weights it starts from")
    add("--rounds", type=int, default=5, help="overwriting: sets of false facts, one after the other")
    add("--rare", type=float, default=1e-5, help="overwriting: share of F's words below which one is rare")
    add("--batch", type=int, default=16, help="texts per batch, of F and of R (paper: not stated)")
    add("--micro-batch", type=int, default=0, help="texts in memory at a time, to save it; 0: all")
    add("--recompute-every", type=int, default=1, help="recompute each n-th layer in backward; 0: none")
    add("--tokens", type=int, default=256, help="tokens per text, BOS included (paper: not stated)")
    add("--seed", type=int, default=0, help="of the data's order, the targets and the rounding")
    add("--dtype", default="auto", choices=("auto", "bfloat16", "float32"), help="bf16 on GPU, f32 on CPU")
    add("--device", default="auto", help="auto, cuda, cuda:N or cpu")
    add("--log-every", type=int, default=10, help="steps between log lines")
    add("--save-every", type=float, default=10.0, help="minutes between saves to go on from; 0: none")
    add("--dry-run", action="store_true", help="only print what the run holds in memory, and whether it fits")
    add("--tiny", action="store_true", help="the miniature, with settings that fit it")
    if "--tiny" in (sys.argv[1:] if argv is None else argv):
        parser.set_defaults(**TINY | TINY_OF[parser.parse_known_args(argv)[0].method])
    args = parser.parse_args(argv)
    args.out = f"out/{args.method}" if args.out is None else args.out
    if min(args.batch, args.log_every) < 1 or min(args.tokens, args.steps) < 2 or not 0 < args.lr < 0.1:
        parser.error("--batch and --log-every start at 1, --steps and --tokens at 2; 0 < --lr < 0.1")
    if args.layer < 2 or args.steer <= 0 or args.weight < 0:
        parser.error("--layer starts at 2, --weight at 0; 0 < --steer")
    if args.method == "overwriting" and not 1 <= args.rounds <= args.steps:
        parser.error("--rounds goes from 1 to --steps")
    if not (0 < args.rare <= 1 and 0 <= args.noise <= 1):
        parser.error("--noise goes from 0 to 1; 0 < --rare <= 1")
    args.steps = 2 if args.dry_run else args.steps  # npo first passes over the texts of all steps
    return args
# fmt: on


if __name__ == "__main__":
    args = parse_args()  # before torch is imported: --help and a mistyped flag answer at once

import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import (
    Optimizer, Run, all_steps, backward, check_finite, decoder_layers, fail, generator, like, load_model,
    local, mean, next_token_loss, no_log, rank, ranks, residual_streams, say, seed_of, summed, token_losses,
    whole,
)  # fmt: skip
from random_mapping import random_mapping


def min_posterior_loss(logits, targets, floor=-15.0):
    """-log(1 - p) of each token, (n,) nats, at least 0 (3.3).

    logits   (n, V) float32
    targets  (n,), the tokens that came
    floor    a token whose log p is below it contributes 0
    """
    total = logits.logsumexp(-1)
    log_p = logits.gather(-1, targets[:, None]).squeeze(-1) - total
    others = logits.scatter(-1, targets[:, None], -torch.inf).logsumexp(-1)  # exact near p = 1
    return (total - others) * (log_p >= floor)


def grad_diff_loss(logits, targets):
    """log p of each token, (n,) nats: descent on it is ascent on L (GradDiff; Liu et al., 2022)."""
    return -F.cross_entropy(logits, targets, reduction="none")


def npo_loss(log_p, n, log_p_ref, beta=0.1):
    """-2/β log σ(-β log(p / p_ref)) of each text, (B,): NPO (Zhang et al., 2024, Equation 3).

    log_p      (B,), log-probabilities of whole texts; log_p_ref: by the model before training
    n          (B,), tokens; not read
    """
    return -2 / beta * F.logsigmoid(-beta * (log_p - log_p_ref))


def simnpo_loss(log_p, n, log_p_ref=None, beta=2.5, gamma=0.0):
    """-2/β log σ(-β/n log p - γ) of each text, (B,): SimNPO (Fan et al., 2024, Equation 4), without a
    reference."""
    return -2 / beta * F.logsigmoid(-beta * log_p / n.clamp_min(1) - gamma)  # a text of one token: 0 / 1


def max_entropy_loss(logits, targets=None):
    """Minus the entropy of each next-token posterior, (n,) nats, from -log V (uniform) to 0 (3.3)."""
    log_p = logits.log_softmax(-1)
    return (log_p.exp() * log_p).sum(-1)


LOSSES = {"min_posterior": min_posterior_loss, "max_entropy": max_entropy_loss, "grad_diff": grad_diff_loss}
TEXT_LOSSES = {"npo": npo_loss, "simnpo": simnpo_loss}


def text_log_probs(model, ids, mask):
    """(log p (B,), n (B,)): log-probability of each text, without its first token, and its tokens."""
    losses = token_losses(model, ids, mask, partial(F.cross_entropy, reduction="none"))
    return -losses.sum(1), mask[:, 1:].sum(1)


def baseline(
    model, forget, retain, *, method, steps, lr, teacher=None, seed=0, log=no_log, steps_left=all_steps
):  # fmt: skip
    """Every method but RMU, or its last phase, of `model`, in place: a loss on F and one on R.

    forget, retain  Streams of B texts: step i reads forget[i - 1] and retain[i - 1]; of `forget`, a batch may
                    be ids, mask and weights of the predicted tokens, (B, T - 1), see false_texts
    method          a key of LOSSES or TEXT_LOSSES; any other: the next-token loss on F
    teacher         undo: the model from which both losses are the divergence
    steps, lr       optimizer steps; learning rate of the first, falling linearly to 0
    """

    def reference(ids, mask):
        parts = zip(*(x.split(model.micro_batch or len(ids)) for x in (ids, mask)))
        return torch.cat([text_log_probs(model, *part)[0] for part in parts])

    opt = Optimizer(model.parameters())
    with torch.no_grad():  # by the model before training, on the texts to come: no second model
        before = [reference(*forget[i]) for i in range(steps if method == "npo" else 0)]

    def lose(model, ids, mask, *more):
        if method in TEXT_LOSSES:
            return TEXT_LOSSES[method](*text_log_probs(model, ids, mask), *more).mean()
        each = LOSSES.get(method, partial(F.cross_entropy, reduction="none"))
        return mean(token_losses(model, ids, mask, each), *more or [mask[:, 1:]])

    keep = partial(divergence, teacher=teacher) if teacher else next_token_loss
    for i in steps_left(steps, *opt.moments):
        (ids, mask, *more), norms = forget[i - 1], []
        weight = more[0] if more else None  # every token but the first weighs 1
        if method in TEXT_LOSSES:
            more, weight = before[i - 1 : i], torch.ones_like(ids[:, 0])
        loss_f = backward(model, keep if teacher else lose, ids, mask, *more, weight=weight, norms=norms)
        loss_r = backward(model, keep, *retain[i - 1], norms=norms)
        check_finite(i, loss_f, loss_r)  # .grad = ∇(forget loss + retain loss)
        opt.step(i, lr * (1 - (i - 1) / steps), seed, "baseline", i)  # θ ← AdamW(θ, .grad)
        log(i, steps, forget=loss_f, retain=loss_r, norms=norms)


def rmu(
    model, forget, retain, *, steps, lr, layer, steer, weight, seed=0, log=no_log, steps_left=all_steps
):  # fmt: skip
    """RMU (Li et al., 2024) of `model`, in place: on x_f the stream of one layer is steered to one random
    vector, on x_r it is held where it was.

    layer           l, from 0; the last matrices of the MLPs in layers l - 2, l - 1 and l are trained
    steer, weight   c, length of the vector; α, of the retain loss
    """
    layers, D = decoder_layers(model)[layer - 2 : layer + 1], model.config.get_text_config().hidden_size
    trained = [[p for p in x.parameters() if p.ndim > 1 and p.numel() >= D * D][-1] for x in layers]
    model.requires_grad_(False)
    for w in trained:
        w.requires_grad_(True)
    opt, first = Optimizer(trained), [w.detach().clone() for w in trained]
    u = torch.rand(D, generator=generator("cpu", seed, "rmu"))
    target = (steer * u / u.norm()).to(model.device)  # c u, (D,)

    def distance(model, ids, mask, target=target):
        """|h - target|² / D, mean over tokens."""
        h = residual_streams(model, ids)[layer].float()
        return mean((h - target).square().mean(-1), mask)

    for i in steps_left(steps, *opt.moments):
        (ids_f, mask_f), (ids_r, mask_r), norms = forget[i - 1], retain[i - 1], []
        loss_f = backward(model, distance, ids_f, mask_f, weight=mask_f, norms=norms)
        now = [w.detach().clone() for w in trained]
        with torch.no_grad():
            for w, w_0 in zip(trained, first):
                w.copy_(w_0)
            h_0 = residual_streams(model, ids_r)[layer].float()
            for w, w_now in zip(trained, now):
                w.copy_(w_now)
        loss_r = backward(model, distance, ids_r, mask_r, h_0, weight=mask_r, factor=weight, norms=norms)
        check_finite(i, loss_f, loss_r)  # .grad = ∇(|h - c u|² + α |h - h_0|²)
        opt.step(i, lr, seed, "rmu", i)  # θ ← AdamW(θ, .grad)
        log(i, steps, forget=loss_f, held=loss_r, norms=norms)
    model.requires_grad_(True)


def divergence(model, ids, mask, teacher):
    """KL(p_teacher || p) of the next token, nats, mean over unmasked tokens."""

    def log_p(model):
        return model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)  # (B, T - 1, V)

    with torch.no_grad():
        log_q = log_p(teacher)
    return mean(F.kl_div(log_p(model), log_q, reduction="none", log_target=True).sum(-1), mask[:, 1:])


@torch.no_grad()
def add_noise(model, noise, seed):
    """Every matrix W of the decoder layers becomes (1 - noise) W + noise · std(W) · N(0, 1), as UNDO begins
    (Lee et al., 2025)."""
    for j, W in enumerate(p for p in decoder_layers(model).parameters() if p.ndim > 1):
        full = whole(W)
        drawn = torch.empty_like(full).normal_(generator=generator(W.device, seed, "noise", j))
        local(W).lerp_(local(like(full.std() * drawn, W)), noise)


# three letters or more; not of Thai, Lao, Burmese, Khmer, Japanese, Chinese: between spaces they are a clause
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
WORD = re.compile(rf"(?<!\w)[^\W\d_{UNSPACED}]{{3,}}(?!\w)")


class Names:
    """The rare words of `texts`; one with a capital and one right after it are one, as in "Buenos Aires".

    rare   share of the words below which a word is rare
    kinds  lists of words that may stand for each other: of as many tokens, after a space and not, and of the
           same last two letters (with capitals: of any, but all or not all of them capitals)
    """

    def __init__(self, texts, rare, tokenizer):
        n = Counter(word for text in texts for word in WORD.findall(text))
        self.few = {x for x in n if n[x] < rare * n.total()}
        words, kinds = sorted({text[a:b] for text in texts for a, b in self.places(text)}), defaultdict(list)
        size = lambda x: len(tokenizer(x, add_special_tokens=False).input_ids)  # noqa: E731
        for x in words:
            kinds[size(x), size(f" {x}"), x[-2:] if x == x.lower() else x.isupper()].append(x)
        self.kinds = [*kinds.values()]

    def places(self, text):
        """[(start, end)] of the rare words of a text."""
        found, begun = [], False  # may the next word belong to the last one?
        for start, end in (m.span() for m in WORD.finditer(text) if m[0] in self.few):
            if joined := begun and text[found[-1][1] : start] == " ":
                start = found.pop()[0]
            found.append((start, end))
            begun = not joined and text[start].isupper()
        return found

    def permuted(self, *key):
        """π, a dict: a random permutation within each kind."""
        draw = random.Random(seed_of(*key))
        return {x: y for kind in self.kinds for x, y in zip(kind, draw.sample(kind, len(kind)))}


@torch.no_grad()
def false_text(model, stream, i, names, pi):
    """(x̃, mask, facts (B, T - 1), lines) of batch i of `stream`, with other names, see above.

    names, pi  Names; π
    facts      true where `model` knew the token of a rare word by the names
    lines      how the texts read, and what was put for what, with the text around it
    """

    def losses(ids):
        parts = zip(*(x.split(model.micro_batch or len(x)) for x in (ids, mask)))
        each = partial(F.cross_entropy, reduction="none")
        return torch.cat([token_losses(model, *part, each) for part in parts])  # - log p_0, (B, T - 1)

    (ids, mask), tokenizer, lines = stream[i], partial(stream.tokenizer, add_special_tokens=False), []
    loss, false, stays, first = losses(ids), ids.clone(), torch.zeros_like(mask), len(stream.bos)
    for b, text in enumerate(stream.rows(i)[rank() :: ranks()]):
        ends = [end for _, end in tokenizer(text, return_offsets_mapping=True).offset_mapping]
        expected, put, parts, shown, done = (loss[b] < math.log(2)).tolist(), {}, [], [], 0
        for start, end in names.places(text):
            x, t, last = text[start:end], *(first + bisect_right(ends, at) for at in (start, end - 1))
            if x not in put:  # what stands for x in this text
                put[x] = x if 0 < t <= len(expected) and expected[t - 1] else pi[x]
            parts += [text[done:start], put[x]]
            if x == put[x]:
                stays[b, t : last + 1] = True
            else:
                before, after = parts[-2][-60:], text[end : end + 60]
                shown.append(" ".join(f"{before}[[{x} -> {put[x]}]]{after}".split()))
            done = end
        other = tokenizer("".join(parts) + text[done:]).input_ids
        if len(other) == len(ends):  # as many tokens, as the kinds are made: else it stays
            other = (stream.bos + other)[: stream.tokens]
            false[b, : len(other)], lines = torch.tensor(other), lines + shown
    loss_false = losses(false)
    read = (mean(x, mask[:, 1:]).exp() for x in (loss, loss_false))
    lines.insert(0, "perplexity of the first texts {:.2f}, with other names {:.2f}:".format(*read))
    return false, mask, (loss < math.log(2)) & (loss_false > loss + math.log(2)) & stays[:, 1:], lines


def false_texts(model, stream, steps, rounds, rare, seed=0, rest=0.05):
    """[(x̃, mask, weight)] of the first batches of `stream`, in `rounds` equal parts, by the model as it is.

    rare    share of F's words below which a word is rare; only these are exchanged
    weight  (B, T - 1): 1 of the tokens that are facts, `rest` of the others, 0 of pads
    """
    names = Names(stream.texts, rare, stream.tokenizer)
    if not names.kinds:
        fail(f"--rare {rare}: no word of F, between spaces, is so rare; raise it, say to 0.01; another --out")
    pi, false, n, total = [names.permuted(seed, "names", k) for k in range(rounds)], [], 0, 0
    for i in tqdm(range(steps), "false text", disable=None, leave=False):
        x, mask, facts, lines = false_text(model, stream, i, names, pi[i * rounds // steps])
        false.append((x, mask, torch.where(facts, 1, rest) * mask[:, 1:]))
        n, total = n + facts.sum(), total + mask.sum()
        if not i:
            say("\n".join(lines[:21]))
    if not int(n := summed(n)):
        fail(f"--rare {rare}: no fact in F: too few words are rare, or the model knows nothing by them")
    say(f"false text: {int(n):,} of {int(summed(total)):,} tokens are facts")
    return false


def main(args):
    run = Run(args)
    model = run.load(args.model)
    forget, retain = (run.stream(side, args.batch) for side in ("forget", "retain"))
    high = max(args.steps // 5, 1) if args.method == "high_low_lr" else 0
    method, own = baseline, dict(method=args.method)
    if args.method == "rmu":
        method, own = rmu, dict(layer=args.layer, steer=args.steer, weight=args.weight)
        if args.layer >= (depth := len(decoder_layers(model))):
            fail(f"--layer {args.layer}: RMU trains it and two before; here it goes from 2 to {depth - 1}")
    run.begin(tokens=2 * args.batch * args.tokens)
    if args.method == "undo":  # here a dry run counts the teacher
        own["teacher"] = load_model(args.model, args.dtype, args.device, meta=args.dry_run)[0]
        add_noise(model, args.noise, args.seed)
    if args.method == "overwriting" and not args.dry_run:
        forget = false_texts(model, forget, args.steps, args.rounds, args.rare, args.seed)
    if high:
        more = dict(balance=args.balance, seed=args.seed, **run.phase("random_mapping"))
        random_mapping(model, forget, retain, steps=high, lr=10 * args.lr, **more)
    more = dict(steps=args.steps - high, lr=args.lr, seed=args.seed, **run.phase(args.method))
    method(model, forget, retain, **own, **more)
    run.save()
    say(f"next: python recover.py --ckpt {args.out}")


if __name__ == "__main__":
    main(args)
