"""The baselines of Table 1 (Section 3.3 of *Toward Robust Unlearning for LLMs*, Tamirisa et al., 2024).

Threat model: a defender releases the weights of an LLM that must not know the forget set F (biology) and
must still know the retain set R. An adversary has the weights and fine-tunes them to get F back
(recover.py). The paper's baselines hide F, and it comes back.

    min_posterior   loss = - mean log(1 - p(x_t | x_<t)) on x_f  +  L(θ; x_r)
    max_entropy     loss = - mean entropy of p(. | x_<t) on x_f  +  L(θ; x_r)
    high_low_lr     the first fifth of the steps: Random Mapping (3.4) at 10 lr; then, with a fresh optimizer,
                    loss = L(θ; x_f)  +  L(θ; x_r)

    each step       θ ← AdamW(θ, ∇loss, lr)

θ: weights; x_f, x_r: batches of text of F and R; L: next-token cross-entropy. Where the paper is silent, our
choices:

1) Min Posterior: tokens with log p below -15 contribute nothing; they are forgotten, and their gradient is
   noise.
2) High/Low LR: 3.3's 100 steps at 1e-4, then its 400 at a tenth of that (3.3 does not say), each rate
   falling linearly to 0. It ends in fine-tuning on F, so a loss on such text would find nothing hidden.
3) The two losses have equal weight; pads are masked out; 500 steps at 1e-5 for the other two; AdamW without
   weight decay, its learning rate falls linearly to 0 (in random_mapping, which is word for word that of its
   file, too).

Memory: weights, gradient and two moments in the weights' dtype (bf16 on a GPU), checkpointed activations.

Metrics: `forget`, the loss on x_f (min_posterior and high_low_lr: nats per token; max_entropy: minus the
entropy, at least -log V; phase random_mapping: 0 to 2); `retain`, L(θ; x_r) in nats per token. Healthy:
forget falls, retain stays near its first value. Sick: retain rises (lr too large).

    python baselines.py --method max_entropy --tiny   # the miniature, 45 s on a laptop   -> out/max_entropy
    python baselines.py --method high_low_lr          # Llama-2-7b-chat, one 80 GB GPU    -> out/high_low_lr

A further method with a loss on tokens of F is one function, logits (n, V) and targets (n,) to (n,), and its
line in LOSSES.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

METHODS = ("min_posterior", "max_entropy", "high_low_lr")
WORLD = Path(__file__).parent / "tests/tiny/world0"
# fmt: off
TINY = dict(  # what --tiny swaps in; how it was chosen: tests/tiny/README.md
    model=f"{WORLD}/base", data=f"{WORLD}/chunks.jsonl",
    steps=100, batch=24, tokens=208, log_every=50,
)
TINY_LR = dict(min_posterior=1e-2, max_entropy=3e-3, high_low_lr=1e-3)


def parse_args(argv=None):
    form = type("Help", (argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter), {})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}; --help lists the flags\n")
    add = parser.add_argument
    add("--method", default="min_posterior", choices=METHODS, help="which baseline (3.3)")
    add("--model", default="meta-llama/Llama-2-7b-chat-hf", help="start from: hub name or directory")
    add("--data", default="lapisrocks/pile-bio", help="labelled chunks: hub name, file or folder")
    add("--forget", default=None, help="with --retain, instead of --data: texts to forget, see README")
    add("--retain", default=None, help="texts to keep: jsonl, csv, parquet, txt, or a dataset on the hub")
    add("--out", default=None, help="checkpoint directory to write; None: out/METHOD")
    add("--lr", type=float, default=1e-5, help="falling linearly to 0; high_low_lr starts at 10 times it")
    add("--steps", type=int, default=500, help="optimizer steps (3.3; others: not stated)")
    add("--batch", type=int, default=16, help="texts per batch, of F and of R (paper: not stated)")
    add("--tokens", type=int, default=256, help="tokens per text, BOS included (paper: not stated)")
    add("--seed", type=int, default=0, help="of the data's order, the targets and the rounding")
    add("--dtype", default="auto", choices=("auto", "bfloat16", "float32"), help="bf16 on GPU, f32 on CPU")
    add("--device", default="auto", help="auto, cuda, cuda:N or cpu")
    add("--log-every", type=int, default=10, help="steps between log lines")
    add("--dry-run", action="store_true", help="only print what the run holds in memory, and whether it fits")
    add("--tiny", action="store_true", help="the miniature, with settings that fit it")
    if "--tiny" in (sys.argv[1:] if argv is None else argv):
        parser.set_defaults(**TINY, lr=TINY_LR[parser.parse_known_args(argv)[0].method])
    args = parser.parse_args(argv)
    args.out = args.out or f"out/{args.method}"
    if min(args.batch, args.log_every) < 1 or min(args.tokens, args.steps) < 2 or not 0 < args.lr < 0.1:
        parser.error("--batch and --log-every start at 1, --steps and --tokens at 2; 0 < --lr < 0.1")
    if bool(args.forget) != bool(args.retain):
        parser.error("--forget goes with --retain")
    if args.dry_run:
        args.steps = 2  # high_low_lr: one of each phase; more steps hold no more
    return args
# fmt: on


if __name__ == "__main__":
    args = parse_args()  # before torch is imported: --help and a mistyped flag answer at once

import torch
import torch.nn.functional as F

from common import AdamW, Run, check_finite, generator, next_token_loss, residual_streams, token_mean


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


def max_entropy_loss(logits, targets=None):
    """Minus the entropy of each next-token posterior, (n,) nats, from -log V (uniform) to 0 (3.3).

    logits  (n, V) float32
    """
    log_p = logits.log_softmax(-1)
    return (log_p.exp() * log_p).sum(-1)


LOSSES = {"min_posterior": min_posterior_loss, "max_entropy": max_entropy_loss}


def baseline(model, forget, retain, *, method, steps, lr, seed=0, log=lambda *_, **__: None):
    """A baseline (3.3) of `model`, in place: a loss on F and the next-token loss on R.

    forget, retain  Streams of B texts: step i reads forget[i - 1] and retain[i - 1]
    method          a key of LOSSES; any other, "high_low_lr": the next-token loss, its second phase
    steps, lr       optimizer steps; learning rate of the first, falling linearly to 0
    seed, log       of the rounding; called as log(i, steps, forget=, retain=)
    Raises FloatingPointError if a loss is NaN or infinite, with the weights as they were before the step.
    """
    opt = AdamW(p for p in model.parameters() if p.requires_grad)
    forget_loss = partial(token_mean, loss=LOSSES[method]) if method in LOSSES else next_token_loss
    model.train()
    for i in range(1, steps + 1):
        loss_f = forget_loss(model, *forget[i - 1])
        loss_f.backward()

        loss_r = next_token_loss(model, *retain[i - 1])
        check_finite(i, loss_f, loss_r)
        loss_r.backward()  # .grad = ∇(forget loss + L(θ; x_r))
        opt.step(i, lr * (1 - (i - 1) / steps), seed, "baseline", i)  # θ ← AdamW(θ, .grad)
        log(i, steps, forget=loss_f.detach(), retain=loss_r.detach())


def random_targets(model, seed):
    """r: a Gaussian vector per token id, (V, D), drawn once from its own seed, for all layers (3.4)."""
    V, D = model.get_input_embeddings().weight.shape
    return torch.randn(V, D, generator=generator("cpu", seed, "targets")).to(model.device, model.dtype)


def mapping_loss(H, targets, mask):
    """1 - cos(H_l, r), mean over tokens, then over layers (3.4): from 0 (on target) to 2.

    H        L streams (B, T, D)
    targets  (B, T, D), r of each position's token
    mask     (B, T), true on tokens; the first position (BOS) is left out
    """
    mask = mask[:, 1:]
    losses = []
    for h in H:
        distance = 1 - F.cosine_similarity(h[:, 1:].float(), targets[:, 1:].float(), dim=-1)  # (B, T - 1)
        losses.append((distance * mask).sum() / mask.sum())
    return torch.stack(losses).mean()


def random_mapping(model, forget, retain, *, steps, lr, seed=0, log=lambda *_, **__: None):
    """Random Mapping (3.4) of `model`, in place.

    forget, retain  Streams of B texts: step i reads forget[i - 1] and retain[i - 1]
    steps, lr       optimizer steps; learning rate of the first, falling linearly to 0
    seed, log       of targets and rounding; called as log(i, steps, forget=, retain=)
    Raises FloatingPointError if a loss is NaN or infinite, with the weights as they were before the step.
    """
    opt = AdamW(p for p in model.parameters() if p.requires_grad)
    r = random_targets(model, seed)  # (V, D)
    model.train()
    for i in range(1, steps + 1):
        ids, mask = forget[i - 1]
        with residual_streams(model) as H:
            model.base_model(input_ids=ids, use_cache=False)
        loss_f = mapping_loss(H, r[ids], mask)
        loss_f.backward()
        del H

        loss_r = next_token_loss(model, *retain[i - 1])
        check_finite(i, loss_f, loss_r)
        loss_r.backward()  # .grad = ∇(mapping loss + L(θ; x_r))
        opt.step(i, lr * (1 - (i - 1) / steps), seed, "random_mapping", i)  # θ ← AdamW(θ, .grad)
        log(i, steps, forget=loss_f.detach(), retain=loss_r.detach())


def main(args):
    run = Run(args)
    model = run.load(args.model)
    forget, retain = run.streams(forget=args.batch, retain=args.batch)
    high = max(args.steps // 5, 1) if args.method == "high_low_lr" else 0
    with run.training(tokens=2 * args.batch * args.tokens):
        if high:
            log = partial(run.log, phase="random_mapping")
            random_mapping(model, forget, retain, steps=high, lr=10 * args.lr, seed=args.seed, log=log)
        baseline(
            model, forget, retain, method=args.method, steps=args.steps - high, lr=args.lr, seed=args.seed,
            log=partial(run.log, phase=args.method),
        )  # fmt: skip
    run.save(data=args.data)
    print(f"next: python recover.py --ckpt {args.out}")


if __name__ == "__main__":
    main(args)
