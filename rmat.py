"""RMAT (Sections 3.4 and 3.5 of *Toward Robust Unlearning for LLMs*, Tamirisa et al., 2024).

Threat model: a defender releases the weights of an LLM that must not know the forget set F (biology) and
must still know the retain set R. An adversary has the weights and fine-tunes them to get F back (recover.py).
RMAT (Random Mapping Adversarial Training) destroys what the model represents of F, then trains it to resist.

    θ ← random_mapping(θ)      # rm_steps steps: residual stream on text of F to noise, next-token loss on R
    θ ← mlac_ar(θ)             # N outer steps (Algorithm 1): K adversary steps on F; down ∇L(θ; x_r), up φ

θ, ω: weights, and the adversary's; x_r: a batch of text of R; L: next-token loss; φ: the sum, over the
adversary's K steps, of the gradient of its loss on other text of F. Both functions are word for word those of
random_mapping.py and mlac_ar.py: see there. The second reads the same texts again, without the mapping loss.

The result of the first phase is saved as a checkpoint of its own, OUT/random_mapping: nothing that goes wrong
later loses it, and `--model OUT/random_mapping --rm-steps 0` starts from it.

Memory: the peak is the same in both, 57 GB for 7B; mlac_ar keeps another 40 GB in pinned host memory.

Metrics: phase random_mapping: `forget` (mapping loss, 0 to 2), `retain`; mlac_ar: `retain`, `adversary`,
`heldout`, `phi` (‖α/K φ‖); both: `balance`, norm of the gradient on F over that on R. Losses: nats per token.

    python rmat.py --tiny               # the miniature on a laptop, 2.5 min       -> out/rmat
    python rmat.py --lr 2e-5 --K 4      # Llama-2-7b-chat on one 80 GB GPU, bf16   -> out/rmat
    python recover.py --ckpt out/rmat   # attacks it; prints its row of Table 1    -> out/rmat/recovered
"""

import argparse
import sys
from functools import partial
from pathlib import Path

WORLD = Path(__file__).parent / "tests/tiny/world0"
# fmt: off
TINY = dict(  # what --tiny swaps in; how it was chosen: tests/tiny/README.md
    model=f"{WORLD}/base", data=f"{WORLD}/chunks.jsonl",
    rm_lr=3e-3, rm_steps=300, balance=0, warmup=1, lr=3e-3, K=4, N=20, batch=24, tokens=208, log_every=5,
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
    add("--out", default="out/rmat", help="checkpoint directory to write")
    add("--rm-lr", type=float, default=4e-5, help="learning rate of Random Mapping, falling linearly to 0")
    add("--rm-steps", type=int, default=36, help="steps of Random Mapping; 0 skips it (paper: not stated)")
    add("--balance", type=float, default=0.3, help="norm of ∇mapping over ∇L at the start; 0: w = 1")
    add("--warmup", type=int, default=4, help="steps of Random Mapping over which its rate rises from 0")
    add("--lr", type=float, default=2e-5, help="η, of both loops of MLAC-AR (paper: not stated)")
    add("--K", type=int, default=4, help="adversary steps per outer step (paper: not stated)")
    add("--N", type=int, default=20, help="outer steps (paper: not stated; chosen on a real model)")
    add("--alpha", type=float, default=1.0, help="weight of φ / K against ∇L(θ; x_r); α_paper = α · η")
    add("--optimizer", default="adamw", choices=("adamw", "sgd"), help="of both loops (Algorithm 1: sgd)")
    add("--batch", type=int, default=16, help="texts per batch; K + 1 batches of F and 1 of R per outer step")
    add("--micro-batch", type=int, default=0, help="texts in memory at a time, to save it; 0: all")
    add("--recompute-every", type=int, default=1, help="recompute each n-th layer in backward; 0: none")
    add("--tokens", type=int, default=256, help="tokens per text, BOS included (paper: not stated)")
    add("--seed", type=int, default=0, help="of data order, targets and rounding")
    add("--dtype", default="auto", choices=("auto", "bfloat16", "float32"), help="bf16 on GPU, f32 on CPU")
    add("--device", default="auto", help="auto, cuda, cuda:N or cpu")
    add("--log-every", type=int, default=10, help="steps between log lines")
    add("--save-every", type=float, default=10.0, help="minutes between saves to go on from; 0: none")
    add("--dry-run", action="store_true", help="only print what the run holds in memory, and whether it fits")
    add("--tiny", action="store_true", help="the miniature, with settings that fit it")
    if "--tiny" in (sys.argv[1:] if argv is None else argv):
        parser.set_defaults(**TINY)
    args = parser.parse_args(argv)
    if min(args.K, args.N, args.warmup, args.batch, args.log_every) < 1 or args.tokens < 2:
        parser.error("--K, --N, --warmup, --batch, --log-every start at 1, --tokens at 2")
    if args.rm_steps < 0 or not (0 <= args.alpha < 1e9 and 0 <= args.balance < 1e9):
        parser.error("--rm-steps, --alpha and --balance start at 0")
    if not (0 < args.lr < 1 and 0 < args.rm_lr < 1):
        parser.error("0 < --lr, --rm-lr < 1")
    return args
# fmt: on


if __name__ == "__main__":
    args = parse_args()  # before torch is imported: --help and a mistyped flag answer at once

import torch

from common import (
    HostCopy, Optimizer, Run, all_steps, backward, balancing_weight, check_finite, generator, mean,
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


def mlac_ar(
    model, forget, retain, *, K, N, lr, alpha, optimizer="adamw", seed=0, log=no_log, steps_left=all_steps
):
    """MLAC-AR (3.5, Algorithm 1) of `model`, in place.

    forget     Stream of (K + 1) B texts: outer step i reads forget[i - 1], K batches x_f and, last, x_heldout
    retain     Stream of B texts
    K, N       adversary steps per outer step; outer steps
    lr, alpha  η of both loops; weight of φ / K against ∇L(θ; x_r). alpha = 0 is fine-tuning on R
    optimizer  of both loops
    log, steps_left  called as log(i, N, retain=, adversary=, heldout=, phi=, norms=); yields the steps
    """
    params = [p for p in model.parameters() if p.requires_grad]
    opt = Optimizer(params, optimizer, betas=(0.9 if optimizer == "adamw" else 0, 0.999))  # of both loops
    theta, *moments = copies = [HostCopy(tensors) for tensors in (params, *opt.moments)]
    opt.wait_for = copies  # a parameter is updated when it and its moments have been copied

    def collect(p):  # φ ← φ + ∇L(ω; x_heldout)
        phi[p] = phi[p].add_(p.grad) if p in phi else p.grad
        p.grad = None
        if k == K:  # that was the last use of ω
            theta.load(p)

    for i in steps_left(N, *opt.moments):
        *x_f, x_heldout = zip(*(x.chunk(K + 1) for x in forget[i - 1]))
        phi, means = {}, torch.zeros(2, device=model.device)  # means over k, to be logged
        for copy in copies:
            copy.save()
        for k in range(1, K + 1):
            descend = opt.updates(k, lr, seed, "adversary", i, k)
            loss_f = backward(model, next_token_loss, *x_f[k - 1], then=descend)  # ω ← ω - η ∇L(ω; x_f)
            loss_h = backward(model, next_token_loss, *x_heldout, then=collect)  # φ ← φ + ∇L(ω; x_heldout)
            means += torch.stack([loss_f, loss_h]) / K
        for copy in moments:
            copy.load()
        theta.wait()  # the model is θ again

        for p in phi:
            p.grad = phi[p].mul_(-alpha / K)
        norms = [torch.stack([p.grad.norm() for p in phi]).norm()]
        loss_r = backward(model, next_token_loss, *retain[i - 1], norms=norms)  # .grad = ∇L(θ; x_r) - α/K φ
        check_finite(i, loss_r, means.sum())
        opt.step(i, lr, seed, "outer", i)  # θ ← θ - η .grad
        log(i, N, retain=loss_r, adversary=means[0], heldout=means[1], phi=norms[0], norms=norms)


def main(args):
    run = Run(args)
    model = run.load(args.model)
    forget, retain = (run.stream(side, args.batch) for side in ("forget", "retain"))
    forget_K = run.stream("forget", (args.K + 1) * args.batch)
    run.begin(tokens=(2 * args.K + 1) * args.batch * args.tokens)
    if args.rm_steps:
        chosen = dict(steps=args.rm_steps, lr=args.rm_lr, balance=args.balance, warmup=args.warmup)
        random_mapping(model, forget, retain, **chosen, seed=args.seed, **run.phase("random_mapping"))
        run.save("random_mapping")
    chosen = dict(K=args.K, N=args.N, lr=args.lr, alpha=args.alpha, optimizer=args.optimizer)
    mlac_ar(model, forget_K, retain, **chosen, seed=args.seed, **run.phase("mlac_ar"))
    run.save()
    say(f"next: python recover.py --ckpt {args.out}")


if __name__ == "__main__":
    main(args)
