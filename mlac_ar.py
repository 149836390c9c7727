"""MLAC-AR (Section 3.5, Algorithm 1 of *Toward Robust Unlearning for LLMs*, Tamirisa et al., 2024).

Threat model: a defender releases the weights of an LLM that must not know the forget set F (biology) and
must still know the retain set R. An adversary has the weights and fine-tunes them to get F back
(recover.py). MLAC-AR trains against that adversary: in each outer step it plays one, and then moves the
weights so that the loss which that adversary reached on other forget text would have been higher.

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

Cost: 2K + 1 forward and backward passes per outer step, activations recomputed. GPU memory does not depend
on K: weights (θ, or ω), φ, two moments, checkpointed activations. φ is the parameters' .grad, so backward
accumulates it in place. While the adversary's backward runs, φ is set aside and each parameter's gradient is
applied and freed as soon as it is complete. While the model is ω, θ and the outer loop's moments are in
pinned host memory: 6 bytes per parameter in bf16, 40 GB for 7B.

Metrics, nats per token: `retain`, L(θ; x_r); `adversary`, L(ω_{k-1}; x_f), and `heldout`, L(ω_k; x_heldout),
means over k; and `phi`, ‖α/K φ‖, to compare with other runs. Healthy: heldout rises over the outer steps, far
above log V (chance), and retain stays. Sick: retain rises (lr or α too large); phi is 0 (α is 0) or falls to
nothing, and the run only fine-tunes on R. Whether the model is robust, only recover.py tells.

Beyond the paper, off by default: `--vary` draws the adversary of each outer step anew: its rate, its number
of steps, whether its moments are fresh, whether half of its text is of R, as a patient attacker's is.
`--objective entropy` and `--hold` are TAR's losses (Tamirisa et al., 2024b): φ ascends the entropy of what ω
predicts on x_heldout, and the residual streams on x_r are held where they were before training; TAR is about
`--objective entropy --hold 1 --alpha 4 --vary rate --K 64`. `--heal` adds L(ω_K; x_r) to what θ descends, so
that an attack does not look robust because it destroys the model. `--hold` keeps two more copies of the
weights in host memory, 27 GB for 7B.

A loss of NaN or infinity stops the run before θ is updated, and the weights before that step are saved.

    python mlac_ar.py --tiny                       # the miniature on a laptop, 90 s       -> out/mlac_ar
    python mlac_ar.py --model out/random_mapping   # RMAT's second phase, see rmat.py      -> out/mlac_ar
"""

import argparse
import math
import signal
import sys
from contextlib import nullcontext
from functools import partial
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
    add("--N", type=int, default=100, help="outer steps (paper: not stated)")
    add("--alpha", type=float, default=1.0, help="weight of φ / K against ∇L(θ; x_r); α_paper = α · η")
    add("--optimizer", default="adamw", choices=("adamw", "sgd"), help="of both loops (Algorithm 1: sgd)")
    add("--vary", nargs="*", default=[], choices=("rate", "K", "state", "mix"), metavar="WHAT",
        help="rate K state mix: what each outer step draws anew of its adversary (Algorithm 1: nothing)")
    add("--objective", default="loss", choices=("loss", "entropy"), help="what φ ascends; TAR: entropy")
    add("--heal", type=float, default=0.0, help="weight of the retain loss after the attack, L(ω_K; x_r)")
    add("--hold", type=float, default=0.0, help="weight of TAR's retain loss: streams on R stay as they were")
    add("--batch", type=int, default=16, help="texts per batch; K + 1 batches of F and 1 of R per outer step")
    add("--micro-batch", type=int, default=0, help="texts in memory at a time, to save it; 0: all")
    add("--tokens", type=int, default=256, help="tokens per text, BOS included (paper: not stated)")
    add("--seed", type=int, default=0, help="of data order, drawn adversaries and rounding")
    add("--dtype", default="auto", choices=("auto", "bfloat16", "float32"), help="bf16 on GPU, f32 on CPU")
    add("--device", default="auto", help="auto, cuda, cuda:N or cpu")
    add("--log-every", type=int, default=10, help="outer steps between log lines")
    add("--save-every", type=float, default=10.0, help="minutes between saves to go on from; 0: none")
    add("--dry-run", action="store_true", help="only print what the run holds in memory, and whether it fits")
    add("--tiny", action="store_true", help="the miniature, with settings that fit it")
    if "--tiny" in (sys.argv[1:] if argv is None else argv):
        parser.set_defaults(**TINY)
    args = parser.parse_args(argv)
    if not all(math.isfinite(x) for x in vars(args).values() if isinstance(x, float)):
        parser.error("a number is nan or inf")
    if min(args.seed, args.save_every, args.micro_batch) < 0:
        parser.error("--seed, --save-every and --micro-batch start at 0")
    if min(args.K, args.N, args.batch, args.log_every) < 1 or args.tokens < 2:
        parser.error("--K, --N, --batch, --log-every start at 1, --tokens at 2")
    if args.alpha < 0 or not 0 < args.lr < 1:
        parser.error("--alpha starts at 0; 0 < --lr < 1")
    if min(args.heal, args.hold) < 0 or (args.heal and not args.alpha):
        parser.error("--heal and --hold start at 0; --heal needs --alpha above 0")
    if bool(args.forget) != bool(args.retain):
        parser.error("--forget goes with --retain")
    if args.dry_run:
        args.N, args.K = 8 if args.vary else 1, min(args.K, 2)  # more steps hold no more
    return args
# fmt: on


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C: no traceback, until there is something to save
    args = parse_args()  # before torch is imported: --help and a mistyped flag answer at once

import torch

from common import (
    SGD, AdamW, HostCopy, Run, all_steps, check_finite, generator, next_token_loss, no_log, residual_streams,
    say, summed, token_mean,
)  # fmt: skip


def entropy(logits, targets):
    """Entropy of each next-token posterior, (n,) nats, from 0 to log V; targets are not read.

    logits  (n, V) float32
    """
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def draw_attacker(vary, K, seed, i):
    """The adversary of outer step i: (rate, K_i, warm, mixed), each drawn anew if `vary` names it.

    rate   factor of η: log-uniform over the decade around 1; else 1
    K_i    adversary steps ("K"): uniform from 1 to K; else K
    warm   are its first moments those of the outer loop ("state")? with probability 1/2; else they are zeros
    mixed  does it train on B texts of R beside those of F ("mix")? with probability 1/2; else on F alone
    """
    u = torch.rand(4, generator=generator("cpu", seed, "attacker", i)).tolist()
    rate = 10 ** (u[0] - 0.5) if "rate" in vary else 1.0
    k = 1 + int(u[1] * K) if "K" in vary else K
    return rate, k, "state" in vary and u[2] < 0.5, "mix" in vary and u[3] < 0.5


def held_streams(model, weight):
    """TAR's retain loss, as `extra` of mlac_ar: weight · |h - h_0|² on x_r, mean over tokens and layers.

    h, h_0  residual streams (B, T, D) of θ, and of the model as it is now: its weights wait in host memory
    """
    params = [p for p in model.parameters() if p.requires_grad]
    first, theta = HostCopy(params), HostCopy(params)
    first.save()

    def load(copy):
        copy.load()
        for j in range(len(params)):
            copy.wait(j)

    def extra(i, x_r):
        ids, mask = x_r
        theta.save()
        load(first)
        with torch.no_grad():
            H_0 = residual_streams(model, ids)
        load(theta)
        pairs = zip(residual_streams(model, ids), H_0)
        far = [((h.float() - h_0.float()).square().sum(-1) * mask).sum() for h, h_0 in pairs]
        return weight * torch.stack(far).mean() / summed(mask.sum())

    return extra


def mlac_ar(
    model, forget, retain, *, K, N, lr, alpha, optimizer="adamw", vary=(), objective="loss", heal=0.0,
    extra=None, seed=0, log=no_log, steps_left=all_steps,
):  # fmt: skip
    """MLAC-AR (3.5, Algorithm 1) of `model`, in place.

    forget     Stream of (K + 1) B texts: outer step i reads forget[i - 1], K batches x_f and, last, x_heldout
    retain     Stream of B texts; if vary has "mix", of (K + 1) B: K batches for the adversary and, last, x_r
    K, N       adversary steps per outer step; outer steps
    lr, alpha  η of both loops; weight of φ / K against ∇L(θ; x_r). alpha = 0 is fine-tuning on R
    optimizer  "adamw" or "sgd", of both loops
    vary       what each outer step draws anew of its adversary, see draw_attacker. (): Algorithm 1
    objective  what φ ascends on x_heldout: "loss", the cross-entropy (Algorithm 1), or "entropy" (TAR)
    heal       weight of L(ω_K; x_r), which θ descends too. 0: Algorithm 1
    extra      a further loss at θ, called as extra(i, x_r), or None
    seed       of the adversaries and the stochastic rounding to bfloat16
    log        called as log(i, N, retain=, adversary=, heldout=, phi=)
    steps_left yields the outer steps to do, from 1, see Run.steps_left
    Raises FloatingPointError if a loss is NaN or infinite, with the weights as they were before the step.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    opt = {"adamw": AdamW, "sgd": SGD}[optimizer](params)  # of both loops, in turn
    theta, moments = HostCopy(params), HostCopy(*opt.moments)  # what waits while the model is ω
    opt.wait_for = theta, moments  # before it overwrites a parameter, its copy must be complete
    heldout_loss = next_token_loss if objective == "loss" else partial(token_mean, loss=entropy)
    model.train()
    for i in steps_left(N, *opt.moments):
        rate, K_i, warm, mixed = draw_attacker(vary, K, seed, i)
        *x_f, x_heldout = zip(*(x.chunk(K + 1) for x in forget[i - 1]))
        *x_a, x_r = zip(*(x.chunk(K + 1 if "mix" in vary else 1) for x in retain[i - 1]))
        theta.save()  # from here on the model is ω
        moments.save()
        means = torch.zeros(2, device=model.device)  # over k, to be logged
        for k in range(1, K_i + 1):
            loss_f = next_token_loss(model, *x_f[k - 1])
            if mixed:
                loss_f = (loss_f + next_token_loss(model, *x_a[k - 1])) / 2
            with opt.in_backward(k + warm * (i - 1), rate * lr, seed, "adversary", i, k):  # φ is set aside
                loss_f.backward()  # ω ← ω - η ∇L(ω; x_f)

            loss_h = heldout_loss(model, *x_heldout)
            means += torch.stack([loss_f.detach(), loss_h.detach()]) / K_i
            if heal and k == K_i:
                loss_h = loss_h - heal * K_i / alpha * next_token_loss(model, *x_r)
            with theta.load_in_backward(params) if k == K_i else nullcontext():  # after this ω, θ is back
                loss_h.backward()  # φ ← φ + ∇L(ω; x_heldout), in .grad
        moments.load()

        for p in params:  # .grad = -α/K φ (+ heal ∇L(ω_K; x_r)); None where nothing depends on p
            p.grad = p.grad.mul_(-alpha / K_i) if alpha and p.grad is not None else None
        phi = torch.stack([p.grad.norm() for p in params if p.grad is not None] or [0 * means[0]]).norm()
        more = extra(i, x_r) if extra else 0
        loss_r = next_token_loss(model, *x_r)
        total = loss_r + more
        check_finite(i, total, means.sum(), loss_h)
        total.backward()  # .grad = ∇L(θ; x_r) - α/K φ
        opt.step(i, lr, seed, "outer", i)  # θ ← θ - η .grad; then φ ← 0: .grad is None
        log(i, N, retain=loss_r.detach(), adversary=means[0], heldout=means[1], phi=phi)


def main(args):
    run = Run(args)
    model = run.load(args.model)
    (forget,) = run.streams(forget=(args.K + 1) * args.batch)
    (retain,) = run.streams(retain=((args.K if "mix" in args.vary else 0) + 1) * args.batch)
    with run.training(tokens=(2 * args.K + 1) * args.batch * args.tokens):
        mlac_ar(
            model, forget, retain, K=args.K, N=args.N, lr=args.lr, alpha=args.alpha, optimizer=args.optimizer,
            vary=args.vary, objective=args.objective, heal=args.heal,
            extra=held_streams(model, args.hold) if args.hold else None, seed=args.seed, **run.phase(),
        )  # fmt: skip
    run.save(data=args.data)
    say(f"next: python recover.py --ckpt {args.out}")


if __name__ == "__main__":
    main(args)
