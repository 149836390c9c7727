"""Random Mapping (Section 3.4 of *Toward Robust Unlearning for LLMs*, Tamirisa et al., 2024).

Threat model: a defender releases the weights of an LLM that must not know the forget set F (biology) and
must still know the retain set R. An adversary has the weights and fine-tunes them to get F back (recover.py).
Random Mapping drives the residual stream on text of F to noise. RMAT goes on from there, see rmat.py.

    r[v] ~ N(0, I) for each token id v, drawn once                   # targets, the same for all layers
    for i = 1 .. steps:
        H_1 .. H_L ← residual stream after each decoder layer on x_f
        loss = w · mean over layers and tokens of 1 - cos(H_l, r[x_f])  +  L(θ; x_r)
        θ ← AdamW(θ, ∇loss, lr)

θ: weights; x_f, x_r: batches of text of F and R; L: next-token loss. Where the paper is silent, our choices:

1) "Hashing" a token is indexing the targets by its id; the streams are the decoder layers' outputs.
2) The cosine is signed ("maximizing"; the authors' later code has 1 - |cos|). BOS and pads are masked out.
3) w, measured before step 1, makes the mapping loss's gradient 0.3 times as long as L's (`--balance`). With
   w = 1 their ratio goes as 1/|h|: 1/159 on Qwen2.5-Coder-1.5B, and nothing is unlearned. Miniature: w = 1.
4) AdamW without weight decay; learning rate: lr times the smaller of i / warmup and 1 - (i - 1) / steps.

Memory: weights, gradient, two moments (bf16 on a GPU, stochastically rounded), (V, D) targets, activations.

Metrics: `forget`, the mapping loss: 0 on target, 1 for unrelated directions, 2 opposite; `retain`, L(θ; x_r)
in nats per token; `balance`, the ratio of their gradients' norms. Healthy: forget falls from 1, retain stays
near its first value. Sick: forget stays at 1 (lr or balance too small), or retain rises (too large).

    python random_mapping.py --tiny   # the miniature on a laptop, 2 min        -> out/random_mapping
    python random_mapping.py          # Llama-2-7b-chat on one 80 GB GPU, bf16  -> out/random_mapping
"""

import argparse
import sys
from functools import partial
from pathlib import Path

WORLD = Path(__file__).parent / "tests/tiny/world0"
# fmt: off
TINY = dict(  # what --tiny swaps in; how it was chosen: tests/tiny/README.md
    model=f"{WORLD}/base", data=f"{WORLD}/chunks.jsonl",
    lr=3e-3, steps=300, warmup=1, balance=0, batch=24, tokens=208, log_every=50,
)


def parse_args(argv=None):
    form = type("Help", (argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter), {})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}; --help lists the flags\n")
    add = parser.add_argument
    add("--model", default="meta-llama/Llama-2-7b-chat-hf", help="start from: hub name or directory")
    add("--data", default="lapisrocks/pile-bio", help="labelled chunks: hub name, file or folder")
    add("--forget", default=None, help="with --retain, instead of --data: texts to forget, see README")
    add("--retain", default=None, help="texts to keep: jsonl, csv, parquet, txt, or a dataset on the hub")
    add("--out", default="out/random_mapping", help="checkpoint directory to write")
    add("--lr", type=float, default=4e-5, help="learning rate, falling linearly to 0 (paper: not stated)")
    add("--steps", type=int, default=36, help="optimizer steps (paper: not stated; chosen on a real model)")
    add("--warmup", type=int, default=4, help="steps over which the learning rate rises from 0")
    add("--balance", type=float, default=0.3, help="norm of ∇mapping over ∇L at the start; 0: w = 1")
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
        parser.set_defaults(**TINY)
    args = parser.parse_args(argv)
    if min(args.steps, args.warmup, args.batch, args.log_every) < 1 or args.tokens < 2:
        parser.error("--steps, --warmup, --batch, --log-every start at 1, --tokens at 2")
    if not (0 <= args.balance < 1e9 and 0 < args.lr < 1):
        parser.error("--balance starts at 0; 0 < --lr < 1")
    return args
# fmt: on


if __name__ == "__main__":
    args = parse_args()  # before torch is imported: --help and a mistyped flag answer at once

import torch

from common import (
    Optimizer, Run, all_steps, backward, balancing_weight, check_finite, generator, mean,
    next_token_loss, no_log, residual_streams, say,
)  # fmt: skip


def random_targets(model, seed):
    """r: a Gaussian vector per token id, (V, D), drawn once from its own seed, for all layers (3.4)."""
    V, D = model.get_input_embeddings().weight.shape
    return torch.randn(V, D, generator=generator("cpu", seed, "targets")).to(model.device, model.dtype)


def mapping_loss(model, ids, mask, r):
    """1 - cos(H_l, r), mean over tokens, then over layers (3.4): from 0 (on target) to 2.

    ids, mask  (B, T), a batch; the first position (BOS, if there is one), an attention sink, is left out
    r          (V, D), the target of each token
    """
    H, targets = residual_streams(model, ids), r[ids][:, 1:].float()
    distances = [1 - torch.cosine_similarity(h[:, 1:].float(), targets, dim=-1) for h in H]  # (B, T - 1) each
    return torch.stack([mean(d, mask[:, 1:]) for d in distances]).mean()


def random_mapping(
    model, forget, retain, *, steps, lr, balance=0, warmup=1, seed=0, log=no_log, steps_left=all_steps
):
    """Random Mapping (3.4) of `model`, in place.

    forget, retain  Streams of B texts: step i reads forget[i - 1] and retain[i - 1]
    steps, lr       optimizer steps; learning rate, rising over `warmup` steps, falling linearly to 0
    balance         norm of the weighted mapping loss's gradient at step 1, over L's; 0: its weight is 1
    seed            of targets and rounding
    log, steps_left called as log(i, steps, forget=, retain=, norms=); yields the steps, see common.Run
    """
    opt = Optimizer(model.parameters())
    loss = partial(mapping_loss, r=random_targets(model, seed))
    w = balancing_weight(model, balance, (loss, *forget[0]), (next_token_loss, *retain[0]))
    for i in steps_left(steps, *opt.moments):
        norms = []
        loss_f = backward(model, loss, *forget[i - 1], factor=w, norms=norms)
        loss_r = backward(model, next_token_loss, *retain[i - 1], norms=norms)
        check_finite(i, loss_f, loss_r)  # .grad = ∇(w · mapping loss + L(θ; x_r))
        rate = lr * min(i / warmup, 1 - (i - 1) / steps)
        opt.step(i, rate, seed, "random_mapping", i)  # θ ← AdamW(θ, .grad)
        log(i, steps, forget=loss_f, retain=loss_r, norms=norms)


def main(args):
    run = Run(args)
    model = run.load(args.model)
    forget, retain = (run.stream(side, args.batch) for side in ("forget", "retain"))
    run.begin(tokens=2 * args.batch * args.tokens)
    chosen = dict(steps=args.steps, lr=args.lr, balance=args.balance, warmup=args.warmup, seed=args.seed)
    random_mapping(model, forget, retain, **chosen, **run.phase())
    run.save()
    say(f"next: python recover.py --ckpt {args.out}")


if __name__ == "__main__":
    main(args)
