"""MLAC-AR (Section 3.5, Algorithm 1 of *Toward Robust Unlearning for LLMs*, Tamirisa et al., 2024).

Threat model: a defender releases the weights of an LLM that must not know the forget set F (biology) and
must still know the retain set R. An adversary has the weights and fine-tunes them to get F back (recover.py).
MLAC-AR trains against that adversary: in each outer step it plays one, and then moves the weights so that
the loss which that adversary reached on other forget text would have been higher.

    for i = 1 .. N:
        φ ← 0;  ω_0 ← θ;  x_heldout ~ F;  x_r ~ R
        for k = 1 .. K:
            x_f ~ F
            ω_k ← ω_{k-1} - η ∇L(ω_{k-1}; x_f)      # the adversary fine-tunes on forget text
            φ ← φ + ∇L(ω_k; x_heldout)              # the loss that it has left on forget text it did not see
        θ ← θ - η (∇L(θ; x_r) - α/K φ)              # keep R; go up the held-out loss

θ: weights; ω: the adversary's; φ: meta-gradient; x: batches of text; L: next-token cross-entropy; η: rate.
First order: each ∇ in φ is taken at ω_k (k = 1 .. K, never at θ) and applied to θ; no graph runs through the
inner loop. x_heldout is one batch per outer step and none of that step's x_f, so that φ measures what
transfers to text the adversary did not train on. Where the paper is silent, our choices:

1) α is dimensionless. The paper's last line is θ ← θ - η ∇L(θ; x_r) + (α_paper / K) φ: α_paper = α · η.
2) Both loops use AdamW, as the real adversary does (at 2e-5, SGD barely moves a 7B model); `--optimizer sgd`
   is the box above. The adversary's moments start from 0 in each outer step; the outer loop's persist.
3) The rate is constant, and nothing bounds φ.

Cost: 2K + 1 forward and backward passes per outer step, activations recomputed. GPU memory does not depend
on K: weights (θ, or ω), φ, two moments, checkpointed activations. No whole gradient is held beside φ: each
parameter's is used (added to φ in place, or applied to ω) and freed within backward, as soon as it is
complete; micro-batches would hold one. While the model is ω, θ and the outer loop's moments are in pinned
host memory: 6 bytes per parameter in bf16, 40 GB for 7B.

Metrics, nats per token: `retain`, L(θ; x_r); `adversary`, L(ω_{k-1}; x_f), and `heldout`, L(ω_k; x_heldout),
means over k; `phi`, ‖α/K φ‖, and `balance`, that over ‖∇L(θ; x_r)‖. Healthy: heldout rises over the outer
steps, towards log V (chance) or above; retain rises little. Sick: retain rises (lr or α too large); phi is 0
(α is 0) or falls to nothing, and the run only fine-tunes on R; balance is over 100 (in bf16 ∇L(θ; x_r), added
to φ, is then rounded away). Only recover.py tells if the model is robust.

    python mlac_ar.py --tiny                       # the miniature on a laptop, 90 s       -> out/mlac_ar
    python mlac_ar.py                              # Llama-2-7b-chat on one 80 GB GPU      -> out/mlac_ar
    python mlac_ar.py --model out/random_mapping   # RMAT's second phase, see rmat.py      -> out/mlac_ar
"""

import argparse
import sys
from pathlib import Path

WORLD = Path(__file__).parent / "tests/tiny/world0"
# fmt: off
TINY = dict(  # what --tiny swaps in; how it was chosen: tests/tiny/README.md
    model=f"{WORLD}/base", data=f"{WORLD}/chunks.jsonl",
    lr=1e-3, K=4, N=60, batch=24, tokens=208, log_every=2,
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
    add("--out", default="out/mlac_ar", help="checkpoint directory to write")
    add("--lr", type=float, default=2e-5, help="η, learning rate of both loops (paper: not stated)")
    add("--K", type=int, default=4, help="adversary steps per outer step (paper: not stated)")
    add("--N", type=int, default=20, help="outer steps (paper: not stated; chosen on a real model)")
    add("--alpha", type=float, default=1.0, help="weight of φ / K against ∇L(θ; x_r); α_paper = α · η")
    add("--optimizer", default="adamw", choices=("adamw", "sgd"), help="of both loops (Algorithm 1: sgd)")
    add("--batch", type=int, default=16, help="texts per batch; K + 1 batches of F and 1 of R per outer step")
    add("--micro-batch", type=int, default=0, help="texts in memory at a time, to save it; 0: all")
    add("--recompute-every", type=int, default=1, help="recompute each n-th layer in backward; 0: none")
    add("--tokens", type=int, default=256, help="tokens per text, BOS included (paper: not stated)")
    add("--seed", type=int, default=0, help="of data order and rounding")
    add("--dtype", default="auto", choices=("auto", "bfloat16", "float32"), help="bf16 on GPU, f32 on CPU")
    add("--device", default="auto", help="auto, cuda, cuda:N or cpu")
    add("--log-every", type=int, default=10, help="outer steps between log lines")
    add("--save-every", type=float, default=10.0, help="minutes between saves to go on from; 0: none")
    add("--dry-run", action="store_true", help="only print what the run holds in memory, and whether it fits")
    add("--tiny", action="store_true", help="the miniature, with settings that fit it")
    if "--tiny" in (sys.argv[1:] if argv is None else argv):
        parser.set_defaults(**TINY)
    args = parser.parse_args(argv)
    if min(args.K, args.N, args.batch, args.log_every) < 1 or args.tokens < 2:
        parser.error("--K, --N, --batch, --log-every start at 1, --tokens at 2")
    if not (0 <= args.alpha < 1e9 and 0 < args.lr < 1):
        parser.error("--alpha starts at 0; 0 < --lr < 1")
    return args
# fmt: on


if __name__ == "__main__":
    args = parse_args()  # before torch is imported: --help and a mistyped flag answer at once

import torch

from common import HostCopy, Optimizer, Run, all_steps, backward, check_finite, next_token_loss, no_log, say


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
    forget, retain = run.stream("forget", (args.K + 1) * args.batch), run.stream("retain", args.batch)
    run.begin(tokens=(2 * args.K + 1) * args.batch * args.tokens)
    chosen = dict(K=args.K, N=args.N, lr=args.lr, alpha=args.alpha, optimizer=args.optimizer)
    mlac_ar(model, forget, retain, **chosen, seed=args.seed, **run.phase())
    run.save()
    say(f"next: python recover.py --ckpt {args.out}")


if __name__ == "__main__":
    main(args)
