"""RMAT (Sections 3.4 and 3.5 of *Toward Robust Unlearning for LLMs*, Tamirisa et al., 2024).

Threat model: a defender releases the weights of an LLM that must not know the forget set F (biology) and
must still know the retain set R. An adversary has the weights and fine-tunes them to get F back
(recover.py). RMAT, Random Mapping Adversarial Training, first destroys what the model represents of F
and then trains against the adversary.

    θ ← random_mapping(θ)      # rm_steps steps: residual stream on text of F to noise, next-token loss on R
    θ ← mlac_ar(θ)             # N outer steps (Algorithm 1): K adversary steps on F; down ∇L(θ; x_r), up φ

θ, ω: weights, and the adversary's; x_r: a batch of text of R; L: next-token cross-entropy; φ: the sum, over
the adversary's K steps, of the gradient of its loss on other text of F. The functions are word for word those
of random_mapping.py and mlac_ar.py, whose docstrings have the algorithms and our choices. Here one more: the
mapping loss is not kept in the second phase ("followed by"), unless `--mapping` gives it a weight.

Beyond the paper, off by default: `--vary`, `--objective`, `--heal` and `--hold`, see mlac_ar.py.

The result of the first phase is saved as a checkpoint of its own, OUT/random_mapping: nothing that goes wrong
later loses it, and `--model OUT/random_mapping --rm-steps 0` starts from it.

Memory: as in mlac_ar.py, whose peak is the larger one; it does not depend on K. θ and the outer loop's
moments are in pinned host memory during the inner loop, 40 GB for 7B.

Metrics: `forget` (mapping loss, 0 to 2) and `retain` (nats per token) in phase random_mapping; `retain`,
`adversary`, `heldout` (nats per token) and `phi` (‖α/K φ‖, with what --heal adds) in phase mlac_ar.

    python rmat.py --tiny               # the miniature on a laptop, 2.5 min       -> out/rmat
    python rmat.py --lr 2e-5 --K 4      # Llama-2-7b-chat on one 80 GB GPU, bf16   -> out/rmat
    python recover.py --ckpt out/rmat   # attacks it; prints its row of Table 1    -> out/rmat/recovered
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
    rm_lr=3e-3, rm_steps=300, lr=3e-3, K=4, N=20, batch=24, tokens=208, log_every=5,
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
    add("--rm-lr", type=float, default=1e-5, help="learning rate of Random Mapping, falling linearly to 0")
    add("--rm-steps", type=int, default=1000, help="steps of Random Mapping; 0 skips it (paper: not stated)")
    add("--lr", type=float, default=2e-5, help="η, of both loops of MLAC-AR (paper: not stated)")
    add("--K", type=int, default=4, help="adversary steps per outer step (paper: not stated)")
    add("--N", type=int, default=100, help="outer steps (paper: not stated)")
    add("--alpha", type=float, default=1.0, help="weight of φ / K against ∇L(θ; x_r); α_paper = α · η")
    add("--optimizer", default="adamw", choices=("adamw", "sgd"), help="of both loops (Algorithm 1: sgd)")
    add("--vary", nargs="*", default=[], choices=("rate", "K", "state", "mix"), metavar="WHAT",
        help="rate K state mix: what each outer step draws anew of its adversary (Algorithm 1: nothing)")
    add("--objective", default="loss", choices=("loss", "entropy"), help="what φ ascends; TAR: entropy")
    add("--heal", type=float, default=0.0, help="weight of the retain loss after the attack, L(ω_K; x_r)")
    add("--hold", type=float, default=0.0, help="weight of TAR's retain loss: streams on R stay as they were")
    add("--mapping", type=float, default=0.0, help="weight of Random Mapping's loss in the second phase")
    add("--batch", type=int, default=16, help="texts per batch; K + 1 batches of F and 1 of R per outer step")
    add("--micro-batch", type=int, default=0, help="texts in memory at a time, to save it; 0: all")
    add("--tokens", type=int, default=256, help="tokens per text, BOS included (paper: not stated)")
    add("--seed", type=int, default=0, help="of data order, targets, drawn adversaries and rounding")
    add("--dtype", default="auto", choices=("auto", "bfloat16", "float32"), help="bf16 on GPU, f32 on CPU")
    add("--device", default="auto", help="auto, cuda, cuda:N or cpu")
    add("--log-every", type=int, default=10, help="steps between log lines")
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
    if min(args.alpha, args.rm_steps) < 0 or not (0 < args.lr < 1 and 0 < args.rm_lr < 1):
        parser.error("--alpha and --rm-steps start at 0; 0 < --lr, --rm-lr < 1")
    if min(args.heal, args.hold, args.mapping) < 0 or (args.heal and not args.alpha):
        parser.error("--heal, --hold and --mapping start at 0; --heal needs --alpha above 0")
    if bool(args.forget) != bool(args.retain):
        parser.error("--forget goes with --retain")
    if args.dry_run:
        args.rm_steps, args.K = min(args.rm_steps, 1), min(args.K, 2)  # more steps hold no more
        args.N = 8 if args.vary else 1  # of eight adversaries one trains on both kinds of text
    return args
# fmt: on


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C: no traceback, until there is something to save
    args = parse_args()  # before torch is imported: --help and a mistyped flag answer at once

import torch
import torch.nn.functional as F

from common import (
    SGD, AdamW, HostCopy, Run, all_steps, batch_mean, check_finite, generator, in_parts, layer_outputs,
    next_token_loss, no_log, residual_streams, say, summed, token_mean,
)  # fmt: skip


def random_targets(model, seed):
    """r: a Gaussian vector per token id, (V, D), drawn once from its own seed, for all layers (3.4)."""
    V, D = model.get_input_embeddings().weight.shape
    return torch.randn(V, D, generator=generator("cpu", seed, "targets")).to(model.device, model.dtype)


def mapping_loss(model, r, ids, mask):
    """1 - cos(H_l, r), mean over tokens, then over layers (3.4): from 0 (on target) to 2.

    r          (V, D), the target of each token
    ids, mask  (B, T), a batch; the first position (BOS) is left out
    """

    def distances(ids):  # of the L layers, (B, T - 1) each
        H, targets = layer_outputs(model, ids), r[ids][:, 1:].float()
        return tuple(1 - F.cosine_similarity(h[:, 1:].float(), targets, dim=-1) for h in H)

    return torch.stack([batch_mean(d, mask[:, 1:]) for d in in_parts(model, distances, ids)]).mean()


def random_mapping(model, forget, retain, *, steps, lr, seed=0, log=no_log, steps_left=all_steps):
    """Random Mapping (3.4) of `model`, in place.

    forget, retain  Streams of B texts: step i reads forget[i - 1] and retain[i - 1]
    steps, lr       optimizer steps; learning rate of the first, falling linearly to 0
    seed, log       of targets and rounding; called as log(i, steps, forget=, retain=)
    steps_left      yields the steps to do, from 1, see Run.steps_left
    Raises FloatingPointError if a loss is NaN or infinite, with the weights as they were before the step.
    """
    opt = AdamW(p for p in model.parameters() if p.requires_grad)
    r = random_targets(model, seed)  # (V, D)
    model.train()
    for i in steps_left(steps, *opt.moments):
        loss_f = mapping_loss(model, r, *forget[i - 1])
        loss_f.backward()

        loss_r = next_token_loss(model, *retain[i - 1])
        check_finite(i, loss_f, loss_r)
        loss_r.backward()  # .grad = ∇(mapping loss + L(θ; x_r))
        opt.step(i, lr * (1 - (i - 1) / steps), seed, "random_mapping", i)  # θ ← AdamW(θ, .grad)
        log(i, steps, forget=loss_f.detach(), retain=loss_r.detach())


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
    forget, retain = run.streams(forget=args.batch, retain=args.batch)
    (forget_K,) = run.streams(forget=(args.K + 1) * args.batch)
    (retain_K,) = run.streams(retain=((args.K if "mix" in args.vary else 0) + 1) * args.batch)
    with run.training(tokens=(2 * args.K + 1) * args.batch * args.tokens, checkpoints=2):
        if args.rm_steps and not run.load_finished("random_mapping"):
            more = dict(steps=args.rm_steps, lr=args.rm_lr, seed=args.seed, **run.phase("random_mapping"))
            random_mapping(model, forget, retain, **more)
            run.save(phase="random_mapping", data=args.data)
        hold = held_streams(model, args.hold) if args.hold else None
        r = random_targets(model, args.seed) if args.mapping else None

        def extra(i, x_r):
            loss = hold(i, x_r) if hold else 0
            if args.mapping:
                loss = loss + args.mapping * mapping_loss(model, r, *forget[i - 1])
            return loss

        mlac_ar(
            model, forget_K, retain_K, K=args.K, N=args.N, lr=args.lr, alpha=args.alpha,
            optimizer=args.optimizer, vary=args.vary, objective=args.objective, heal=args.heal,
            extra=extra if args.hold or args.mapping else None, seed=args.seed,
            **run.phase("mlac_ar"),
        )  # fmt: skip
    run.save(data=args.data)
    say(f"next: python recover.py --ckpt {args.out}")


if __name__ == "__main__":
    main(args)
