"""Adversarial Probes (Section 3.4, A.2 of *Toward Robust Unlearning for LLMs*, Tamirisa et al., 2024).

Threat model: a defender releases the weights of an LLM that must not know the forget set F (biology) and
must still know the retain set R. An adversary has the weights and fine-tunes them to get F back (recover.py).
Here the residual stream on text of F is made to look to probes like that on match text M ("I don't know").

    D_l, a probe per decoder layer: width -> 1024 -> 256 -> 1, one score per token
    for i = 1 .. steps:
        H(F), H(M) ← residual streams on x_f and x_m, one pass each
        probe_steps times:  D ← D + RMSprop ∇(E[D(H(M))] - E[D(H(F))]);  linear weights clipped to ±0.1
        loss = mean over layers of E[D_l(H_l(M))] - E[D_l(H_l(F))]  +  L(θ; x_r)
        θ ← AdamW(θ, ∇loss, lr)

θ: weights; x_f, x_m, x_r: batches of text; L: next-token cross-entropy. The probes' ascent estimates the
Wasserstein distance of H(F) and H(M) (Arjovsky et al., 2017); the model descends it. `--swd` without probes
descends the sliced Wasserstein distance of H(F) to N(0, I), which in the paper also destroys retain accuracy.
The paper's best variant is the default: 5 probe steps, IDK, frozen. Where the paper is silent, our choices:

1) Probes: LayerNorm without gain (it would undo the clipping) before each linear layer, leaky ReLU, RMSprop;
   widths as in the authors' exploration code; matrices clipped to ±0.1 (Arjovsky et al.: all, to ±0.01).
2) All probe steps of a model step use one batch; Arjovsky et al. draw new ones. H(M) has no gradient.
3) M: phrasings of "I don't know" one after the other, or random printable strings, as long as F's rows.
4) SWD: raw streams (at RMS 1 little is unlearned), 128 directions per step. BOS and pads are masked out.
5) The distance has weight 1; 1000 steps; AdamW without weight decay at a linearly decaying rate. The probes'
   gradient goes with 1/|h|, SWD's with |h|; |h| differs a thousandfold between models: watch `balance`.

Memory: weights, gradient and two moments in the weights' dtype, two batches' streams, checkpointed
activations (micro-batches: of x_r only); probes, 4.5 M parameters per layer of width 4096, in float32.

Metrics: `forget`, the probes' E[D(M)] - E[D(F)] after their steps, with --swd the squared distance; `retain`,
L(θ; x_r) in nats per token; `balance`, the ratio of their gradients' norms, forget over retain. Healthy:
forget rises while the probes learn, then falls; retain stays; balance is between 0.1 and 10.

    python adv_probes.py --tiny   # the miniature on a laptop, 3 min         -> out/adv_probes
    python adv_probes.py          # Llama-2-7b-chat on one 80 GB GPU, bf16   -> out/adv_probes
    python adv_probes.py --no-freeze --probe-steps 3 --match rand --out out/probes_3_rand    # of Table 2
"""

import argparse
import random
import string
import sys
from functools import partial
from itertools import product
from pathlib import Path

WORLD = Path(__file__).parent / "tests/tiny/world0"
# fmt: off
TINY = dict(  # what --tiny swaps in; how it was chosen: tests/tiny/README.md
    model=f"{WORLD}/base", data=f"{WORLD}/chunks.jsonl",
    lr=3e-3, steps=300, batch=24, tokens=208, probe_lr=1e-3, probe_width=64, log_every=50,
)
OPENINGS = ("", "Sorry, ", "Honestly, ", "To be honest, ", "I am afraid ", "Well, ", "Hmm, ",
            "To tell the truth, ", "As far as I can tell, ", "If you ask me, ")
CLAIMS = ("I don't know.", "I do not know the answer to that.", "I have no idea.",
          "I am not sure about this.", "I cannot say.", "I have no information on this.",
          "this is beyond what I know.", "I could not tell you.", "I never learned that.",
          "the answer is unknown to me.")
IDK = [(opening + claim)[0].upper() + (opening + claim)[1:] for opening, claim in product(OPENINGS, CLAIMS)]


def parse_args(argv=None):
    form = type("Help", (argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter), {})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}; --help lists the flags\n")
    add = parser.add_argument
    add("--model", default="meta-llama/Llama-2-7b-chat-hf", help="start from: hub name or directory")
    add("--data", default="lapisrocks/pile-bio", help="labelled chunks: hub name, file or folder")
    add("--forget", default=None, help="with --retain, instead of --data: texts to forget, see README")
    add("--retain", default=None, help="texts to keep: jsonl, csv, parquet, txt, or a dataset on the hub")
    add("--out", default="out/adv_probes", help="checkpoint directory to write")
    add("--lr", type=float, default=1e-5, help="learning rate, falling linearly to 0 (paper: not stated)")
    add("--steps", type=int, default=1000, help="optimizer steps (paper: not stated)")
    add("--probe-steps", type=int, default=5, help="probe steps per model step (A.2: 3 or 5)")
    add("--match", default="idk", choices=("idk", "rand"), help="M: I don't know, or random strings (A.2)")
    add("--freeze", action=argparse.BooleanOptionalAction, default=True, help="embedding and head stay (A.2)")
    add("--swd", action="store_true", help="sliced Wasserstein to N(0, I), no probes, not frozen (3.4)")
    add("--weight", type=float, default=1.0, help="of the distance against L(θ; x_r), see choice 5")
    add("--probe-lr", type=float, default=5e-5, help="learning rate of the probes' RMSprop (Arjovsky et al.)")
    add("--probe-width", type=int, default=1024, help="first hidden width; the second is a quarter")
    add("--batch", type=int, default=16, help="texts per batch, of F, M and R (paper: not stated)")
    add("--micro-batch", type=int, default=0, help="texts in memory at a time, to save it; 0: all")
    add("--recompute-every", type=int, default=1, help="recompute each n-th layer in backward; 0: none")
    add("--tokens", type=int, default=256, help="tokens per text, BOS included (paper: not stated)")
    add("--seed", type=int, default=0, help="of the data, the probes, the match texts and the rounding")
    add("--dtype", default="auto", choices=("auto", "bfloat16", "float32"), help="bf16 on GPU, f32 on CPU")
    add("--device", default="auto", help="auto, cuda, cuda:N or cpu")
    add("--log-every", type=int, default=10, help="steps between log lines")
    add("--save-every", type=float, default=10.0, help="minutes between saves to go on from; 0: none")
    add("--dry-run", action="store_true", help="only print what the run holds in memory, and whether it fits")
    add("--tiny", action="store_true", help="the miniature, with settings that fit it")
    argv = sys.argv[1:] if argv is None else argv
    if "--swd" in argv:
        parser.set_defaults(freeze=False)
    if "--tiny" in argv:
        parser.set_defaults(**TINY | ({"lr": 1e-3, "steps": 100} if "--swd" in argv else {}))
    args = parser.parse_args(argv)
    if min(args.steps, args.batch, args.log_every, args.probe_steps) < 1 or args.tokens < 2:
        parser.error("--steps, --probe-steps, --batch, --log-every start at 1, --tokens at 2")
    if not 4 <= args.probe_width <= 1 << 16 or not (0 < args.lr < 1 and 0 < args.probe_lr < 1):
        parser.error("--probe-width goes from 4 to 65536; 0 < --lr, --probe-lr < 1")
    if args.swd and (given := [x for x in argv if x.startswith(("--probe", "--match"))]):
        parser.error(f"--swd has no probes and no match text; drop {', '.join(given)}")
    return args
# fmt: on


if __name__ == "__main__":
    args = parse_args()  # before torch is imported: --help and a mistyped flag answer at once

import torch
import torch.nn.functional as F
from torch.distributed.nn.functional import all_gather

from common import (
    Optimizer, Run, all_steps, backward, check_finite, decoder_layers, fail, generator, gradient_sample,
    next_token_loss, no_log, ranks, residual_streams, sample_norm, say, seed_of, sum_gradients, summed,
)  # fmt: skip


def points(H):
    """(L, n, D) of L streams (B, T, D): each position but the first, normalised; bf16 on a GPU."""
    dtype = torch.float32 if H[0].is_cpu else torch.bfloat16
    return torch.stack([F.layer_norm(h[:, 1:].float(), h.shape[-1:]).to(dtype).flatten(0, 1) for h in H])


def score_gap(probes, x_m, x_f, mask):
    """E[D(M)] - E[D(F)] of each layer, (L,), means over tokens (3.4): the probes maximise it, the model
    minimises it.

    probes    W, b of each of their layers: (L, D, width), (L, 1, width), ...
    x_m, x_f  (L, n, D), points of match and forget text of the same lengths
    mask      (n,), true on tokens
    """
    W_1, b_1, W_2, b_2, W_3, b_3 = (p.to(x_f.dtype) for p in probes)

    def hidden(y):
        return F.layer_norm(F.leaky_relu(y, 0.2).float(), y.shape[-1:]).to(y.dtype)

    def scores(x):  # (L, n)
        y = hidden(torch.baddbmm(b_2, hidden(torch.baddbmm(b_1, x, W_1)), W_2))
        return torch.baddbmm(b_3, y, W_3).squeeze(-1).float()

    return ((scores(x_m) - scores(x_f)) * mask).sum(1) / mask.sum()


def sliced_wasserstein(x, y, mask):
    """Squared 2-Wasserstein distance of two samples along lines, mean over lines (3.4). A shift by v: |v|² /
    D.

    x, y  (n, P), two samples of the same size: where their points are on each of P lines, in D dimensions
    mask  (n,), true on points that count; others are moved far out in both samples, at no cost
    """
    a, b = (torch.sort(z.masked_fill(~mask[:, None], torch.finfo(z.dtype).max), 0).values for z in (x, y))
    return (a - b).square().sum() / (mask.sum() * x.shape[1])


def all_rows(x):
    """(B, ...), the rows of the whole batch in its order, from those of this rank. Differentiable."""
    return torch.stack(all_gather(x.contiguous()), 1).flatten(0, 1) if ranks() > 1 else x  # see Stream


def swd_loss(H, mask, *key, lines=128):
    """Sliced Wasserstein distance of the streams to N(0, I), mean over layers (3.4).

    H     L streams (B, T, D)
    mask  (B, T), true on tokens; the first position is left out
    key   of the noise and the directions, which the layers share
    """
    mask, D = all_rows(mask[:, 1:].int()).bool().flatten(), H[0].shape[-1]
    draw = partial(torch.randn, generator=generator(mask.device, *key), device=mask.device)
    directions, noise = F.normalize(draw(lines, D), dim=-1), draw(len(mask), D)
    projected = [all_rows(h[:, 1:].float() @ directions.T).flatten(0, 1) for h in H]  # (n, P)
    distances = [sliced_wasserstein(x, noise @ directions.T, mask) for x in projected]
    return torch.stack(distances).mean() / ranks()  # of several GPUs each computes the same


def probe_step(probes, squares, x_m, x_f, mask, share, lr, clip=0.1):
    """A step of RMSprop up the gaps, on points without gradient; then clipping, to keep the probes Lipschitz.

    squares  running means of squared gradients, tensors like probes
    share    of the batch's tokens, this GPU's
    """
    (share * score_gap(probes, x_m, x_f, mask).sum()).backward()
    sum_gradients(probes)
    with torch.no_grad():
        for p, square in zip(probes, squares):
            square.mul_(0.99).addcmul_(p.grad, p.grad, value=0.01)
            p.addcdiv_(p.grad, square.sqrt().add_(1e-8), value=lr)
            p.grad = None
        for W in probes[::2]:
            W.clamp_(-clip, clip)


def make_probes(L, D, width, seed, device):
    """W and b of the probes' three linear layers, see score_gap; all L probes in one tensor each."""
    sizes = (D, width), (width, width // 4), (width // 4, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "critics"))
        each = [[x.t() for size in sizes for x in torch.nn.Linear(*size).parameters()] for _ in range(L)]
    stacked = [torch.stack(xs).detach() for xs in zip(*each)]
    return [torch.nn.Parameter((x if x.ndim > 2 else x[:, None]).to(device)) for x in stacked]


def adv_probes(
    model, forget, retain, match, *, steps, lr, probe_steps=5, probe_lr=5e-5, probe_width=1024, freeze=True,
    weight=1.0, seed=0, log=no_log, steps_left=all_steps,
):  # fmt: skip
    """Adversarial Probes (3.4, A.2) on `model`, in place.

    forget, retain  Streams of B texts: step i reads forget[i - 1] and retain[i - 1]
    match           Stream of texts as long as F's or longer, cut to its rows' lengths; None: SWD, no probes
    steps, lr       optimizer steps; learning rate of the first, falling linearly to 0
    probe_*         probe steps per model step; their learning rate; their first hidden width
    freeze          keep embedding and output head as they are
    weight, seed    of the distance, against L's 1; of probes, noise and rounding
    log, steps_left called as log(i, steps, forget=, retain=, norms=); yields the steps, see common.Run
    """
    own = ()  # what the probes add to the state
    if match is not None:
        layers, D = len(decoder_layers(model)), model.get_input_embeddings().weight.shape[1]
        probes = make_probes(layers, D, probe_width, seed, model.device)
        own = probes, [torch.zeros_like(p) for p in probes]
    for end in (model.get_input_embeddings(), model.get_output_embeddings()):
        end.requires_grad_(not freeze)
    opt = Optimizer(p for p in model.parameters() if p.requires_grad)
    for i in steps_left(steps, *opt.moments, *own):
        ids, mask = forget[i - 1]
        H_f = residual_streams(model, ids)
        if match is not None:
            real = mask[:, 1:].flatten()
            share = real.sum() / summed(real.sum())
            with torch.no_grad():
                ids_m = match[i - 1][0][:, : ids.shape[1]].masked_fill(~mask, 0)
                x_m, x_f = points(residual_streams(model, ids_m)), points(H_f)
            for _ in range(probe_steps):
                probe_step(*own, x_m, x_f, real, share, probe_lr)  # D ← ascend
            x_f = None
            gaps = [  # one layer's activations at a time
                score_gap([p.detach()[l] for p in probes], x_m[l], points(H_f[l]), real)
                for l in (slice(l, l + 1) for l in range(layers))
            ]
            loss_f = share * torch.cat(gaps).mean()
        else:
            loss_f = swd_loss(H_f, mask, seed, "swd", i)
        (weight * loss_f).backward()
        H_f, x_m, gaps, norms = None, None, None, [sample_norm(gradient_sample(model))]
        loss_r = backward(model, next_token_loss, *retain[i - 1], norms=norms)
        check_finite(i, loss_f, loss_r)  # .grad = ∇(weight · distance + L(θ; x_r))
        opt.step(i, lr * (1 - (i - 1) / steps), seed, "adv_probes", i)  # θ ← AdamW(θ, .grad)
        log(i, steps, forget=loss_f.detach(), retain=loss_r, norms=norms)
    model.requires_grad_(True)


def match_texts(kind, tokens, seed, n=512):
    """M (A.2): n texts of at least `tokens` tokens each, of "idk" phrasings or of "rand" strings."""
    rng = random.Random(seed_of(seed, "match"))
    if kind == "idk":
        return [" ".join(rng.choices(IDK, k=tokens // 2)) for _ in range(n)]
    return ["".join(rng.choices(string.printable[:95], k=4 * tokens)) for _ in range(n)]


def main(args):
    run = Run(args)
    model = run.load(args.model)
    forget, retain = (run.stream(side, args.batch) for side in ("forget", "retain"))
    texts = match_texts(args.match, args.tokens, args.seed)
    match = None if args.swd else run.stream("match", args.batch, texts)
    if match and min(len(match.encode(text)) for text in texts) < args.tokens:
        fail(f"--match {args.match}: this tokenizer makes too few tokens of a text; lower --tokens")
    run.begin(tokens=(2 if args.swd else 3) * args.batch * args.tokens)
    names = ("steps", "lr", "probe_steps", "probe_lr", "probe_width", "freeze", "weight", "seed")
    adv_probes(model, forget, retain, match, **{x: getattr(args, x) for x in names}, **run.phase())
    run.save()
    say(f"next: python recover.py --ckpt {args.out}")


if __name__ == "__main__":
    main(args)
