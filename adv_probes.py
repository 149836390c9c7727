"""Adversarial probes: make forget text's residual stream look like "I don't know", as critics see it (3.4, A.2).

    D_l, one critic a decoder layer: D -> 1024 -> 256 -> 1, a LayerNorm before and leaky ReLUs between; a score a token
    for i = 1 .. steps:
        H(F), H(M) ← residual streams on forget text and on match text, one pass each
        probe_steps times:  D ← ascend E[D(H(M))] - E[D(H(F))], linear weights clipped to [-0.1, 0.1]
        loss = mean over layers of E[D_l(H_l(M))] - E[D_l(H_l(F))], H(M) fixed  +  next-token loss on x_r
        θ ← AdamW(θ, ∇loss, lr)

    --swd  no critics: the sliced Wasserstein distance of H(F), at RMS 1 a token, to N(0, I) instead. In the paper it
           takes the retain set along (its Table 2); that is the result, not a fault.

The critics' ascent gives an estimate of the Wasserstein distance (Arjovsky et al., 2017), and pushing it down drives
H(F) towards H(M). θ does not move while the critics train, so the pass that the model's step needs anyway serves them
all. Where the paper is silent, our choices: the match texts are a hundred phrasings of "I don't know" or random
printable strings, cut to the lengths of F's rows, so that length is no cue; layer norms in a critic have no gain, or
they would undo the clipping; RMSprop for the critics; the first token (BOS) and pads are left out; the losses weigh 1
to 1; AdamW without weight decay for the model, its learning rate falls linearly to 0, 1000 steps, as in
random_mapping.py. Table 2's best row is the default: 5 critic steps, IDK, embedding and output head frozen.

Memory: weights, one gradient and two moments, all in the weights' dtype, two batches' streams, and activations; the
critics (4.5 M parameters a layer of width 4096) and their moments are float32.

Logged: `wasserstein`, the critics' estimate after their steps (with --swd the distance itself); `retain`, nats a token;
`critic_steps`, so far.

    python adv_probes.py --tiny                       # the miniature on a laptop -> out/adv_probes
    python adv_probes.py                              # Llama-2-7b-chat on one 80 GB GPU -> out/adv_probes
    python adv_probes.py --swd --out out/adv_probes_swd                         # the other rows of Table 2
    python adv_probes.py --no-freeze --probe-steps 3 --match rand --out out/adv_probes_3_rand
"""

import argparse
import random
import string
import sys
from contextlib import contextmanager
from functools import cache, partial
from itertools import product
from pathlib import Path

WORLD = Path(__file__).parent / "tests" / "tiny" / "world0"
TINY = {  # what --tiny swaps in: the miniature and the settings that fit it (tests/tiny/README.md)
    "model": str(WORLD / "base"),
    "data": str(WORLD / "chunks.jsonl"),
    "mmlu": str(WORLD / "mmlu"),
    "format": "cloze",
    "lr": 1e-3,
    "steps": 200,
    "batch": 24,
    "tokens": 208,
    "probe_lr": 1e-3,
    "probe_width": 64,
    "log_every": 50,
}

OPENINGS = ("", "Sorry, ", "Honestly, ", "To be honest, ", "I am afraid ", "Well, ", "Hmm, ", "To tell the truth, ",
            "As far as I can tell, ", "If you ask me, ")  # fmt: skip
CLAIMS = ("I don't know.", "I do not know the answer to that.", "I have no idea.", "I am not sure about this.",
          "I cannot say.", "I have no information on this.", "this is beyond what I know.", "I could not tell you.",
          "I never learned that.", "the answer is unknown to me.")  # fmt: skip
IDK = [(opening + claim)[0].upper() + (opening + claim)[1:] for opening, claim in product(OPENINGS, CLAIMS)]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Adversarial probes (Section 3.4, A.2): forget text looks like match text to a critic a layer.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}; --help lists the flags\n")
    add = parser.add_argument
    add("--model", default="meta-llama/Llama-2-7b-chat-hf", help="start from: hub name or checkpoint directory")
    add(
        "--data",
        default="lapisrocks/pile-bio",
        help="rows txt_chunk, label: hub name; jsonl(.zst), parquet, a folder",
    )
    add("--mmlu", default=None, help="MMLU to score the result on: hub name or folder of CSVs; None: do not")
    add("--format", default="letter", choices=("letter", "cloze"), help="MMLU compares letters, or options' text")
    add("--out", default="out/adv_probes", help="checkpoint directory to write")
    add("--lr", type=float, default=1e-5, help="learning rate of AdamW, falling linearly to 0 (paper: not stated)")
    add("--steps", type=int, default=1000, help="optimizer steps (paper: not stated)")
    add("--probe-steps", type=int, default=5, help="critic steps a model step (Table 2: 3 or 5)")
    add("--match", default="idk", choices=("idk", "rand"), help="M: phrasings of I don't know, or random strings")
    add("--freeze", action=argparse.BooleanOptionalAction, default=True, help="keep embedding and output head fixed")
    add("--swd", action="store_true", help="sliced Wasserstein distance to N(0, I); no critics, no match text")
    add("--probe-lr", type=float, default=5e-5, help="learning rate of the critics' RMSprop (Arjovsky et al.)")
    add("--probe-width", type=int, default=1024, help="first hidden width of a critic; the second is a quarter of it")
    add("--batch", type=int, default=16, help="texts a step of each set (paper: not stated)")
    add("--tokens", type=int, default=256, help="tokens a text at most, BOS among them (A.1)")
    add("--seed", type=int, default=0, help="of the order of the data, the critics, the match texts and the rounding")
    add("--dtype", default="auto", choices=("auto", "bfloat16", "float32"), help="auto: bf16 on a GPU, else float32")
    add("--device", default="auto", help="auto, cuda or cpu")
    add("--log-every", type=int, default=10, help="steps between log lines")
    add("--dry-run", action="store_true", help="only print what the run would hold in memory, and whether it fits")
    add("--tiny", action="store_true", help="swap in the miniature and the settings that fit it")
    argv = sys.argv[1:] if argv is None else argv
    if "--tiny" in argv:
        parser.set_defaults(**TINY | ({"lr": 1e-2} if "--swd" in argv else {}))
    args = parser.parse_args(argv)
    if min(args.steps, args.batch, args.log_every, args.probe_steps) < 1 or args.tokens < 2 or args.probe_width < 4:
        parser.error("--steps, --probe-steps, --batch, --log-every start at 1, --tokens at 2, --probe-width at 4")
    if not (0 < args.lr < 1 and 0 < args.probe_lr < 1):
        parser.error("--lr and --probe-lr lie between 0 and 1")
    return args


if __name__ == "__main__":
    args = parse_args()  # before torch is imported: --help and a mistyped flag answer at once

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from common import (
    Blank, Run, Stream, decoder_layers, dry_run, fail, generator, load_chunks, load_mmlu, load_model, logits, read_args,
    score_mmlu, seed_of, show_scores, write_scores,
)  # fmt: skip


@contextmanager
def residual_streams(model):
    """Inside, every forward pass appends the outputs (B, T, D) of its decoder layers to the list H (3.4).

    Hooks come off at the end: left on, they would keep every later pass's streams in memory.
    """
    H = []
    hooks = [
        layer.register_forward_hook(lambda _, __, out: H.append(out[0] if isinstance(out, tuple) else out))
        for layer in decoder_layers(model)
    ]
    try:
        yield H
    finally:
        for hook in hooks:
            hook.remove()


def match_texts(kind, tokens, seed, n=512):
    """M: n texts of at least `tokens` tokens each, of "idk" phrasings or of "rand" printable strings."""
    rng = random.Random(seed_of(seed, "match"))
    if kind == "idk":
        return [" ".join(rng.choices(IDK, k=tokens // 2)) for _ in range(n)]
    return ["".join(rng.choices(string.printable[:95], k=4 * tokens)) for _ in range(n)]


def make_critics(L, D, width, seed):
    """L critics (B, T, D) -> (B, T, 1). Layer norms have no gain: it would grow where the weights are clipped."""
    nn, small = torch.nn, width // 4
    norm = partial(nn.LayerNorm, elementwise_affine=False)
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(seed, "critics"))
        return nn.ModuleList(
            nn.Sequential(
                norm(D), nn.Linear(D, width), nn.LeakyReLU(0.2),
                norm(width), nn.Linear(width, small), nn.LeakyReLU(0.2),
                norm(small), nn.Linear(small, 1),
            ) for _ in range(L)
        )  # fmt: skip


def clip_(critics, bound=0.1):
    """Linear weights into [-bound, bound], in place: what keeps the critics Lipschitz (Arjovsky et al., 2017)."""
    for module in critics.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data.clamp_(-bound, bound)


def score_gap(critic, h_m, h_f, mask):
    """E[D(M)] - E[D(F)] of one layer, masked means over tokens (3.4): what D maximises and the model minimises.

    h_m, h_f  (B, T, D), streams of match and forget text of the same lengths
    mask      (B, T), true on tokens; the first position (BOS) is left out: it is the same in every text
    """
    mask = mask[:, 1:]
    gap = (critic(h_m[:, 1:].float()) - critic(h_f[:, 1:].float())).squeeze(-1)  # (B, T - 1)
    return (gap * mask).sum() / mask.sum()


def critic_step(critics, optimizer, H_m, H_f, mask):
    """One ascent step of every critic on streams without gradient; one layer's activations at a time."""
    optimizer.zero_grad()
    for critic, h_m, h_f in zip(critics, H_m, H_f):
        (-score_gap(critic, h_m, h_f, mask)).backward()
    optimizer.step()
    clip_(critics)


def sliced_wasserstein(x, y, directions, mask):
    """Squared 2-Wasserstein distance of two samples on lines, mean over the lines (3.4). A shift by v: |v|² / D.

    x, y        (n, D), as many points in the one as in the other
    directions  (P, D), unit vectors
    mask        (n,), true on points that count; the others go far out in both samples, where they meet at no cost
    """
    a, b = (torch.sort((z @ directions.T).masked_fill(~mask[:, None], 1e4), 0).values for z in (x, y))  # (n, P)
    return (a - b).square().sum() / (mask.sum() * len(directions))


def swd_loss(H, mask, *key, lines=128):
    """Sliced Wasserstein distance of the streams, at RMS 1 a token, to N(0, I), mean over layers (3.4).

    H     L streams (B, T, D)
    mask  (B, T), true on tokens; the first position (BOS) is left out
    key   of the noise and the directions, which the layers share
    """
    mask, D = mask[:, 1:].flatten(), H[0].shape[-1]
    draw = partial(torch.randn, generator=generator(mask.device, *key), device=mask.device)
    directions, noise = F.normalize(draw(lines, D), dim=-1), draw(len(mask), D)
    points = [F.rms_norm(h[:, 1:].flatten(0, 1).float(), (D,)) for h in H]  # (n, D)
    return torch.stack([sliced_wasserstein(x, noise, directions, mask) for x in points]).mean()


def next_token_loss(model, ids, mask, loss=partial(F.cross_entropy, reduction="none"), at_once=1 << 25):
    """L(θ; x): cross-entropy of the next token, nats, mean over the unmasked tokens of the batch.

    ids      (B, T) int64
    mask     (B, T), true on tokens
    loss     loss(logits (n, V) float32, targets (n,)) -> (n,), what is averaged
    at_once  logits held at a time: made slice by slice, and again in backward. Whole, those of 16 x 256 tokens over a
             vocabulary of 128 k are 2 GB, several times over
    """
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, D)
    n = max(at_once // model.get_output_embeddings().weight.shape[0], 1)  # tokens a slice

    def part(h, targets, keep):
        return loss(logits(model, h), targets).masked_fill(~keep, 0).sum()

    slices = zip(*(x.flatten(0, 1).split(n) for x in (hidden[:, :-1], ids[:, 1:], mask[:, 1:])))
    sums = [checkpoint(part, *x, use_reentrant=False, preserve_rng_state=False) for x in slices]
    return torch.stack(sums).sum() / mask[:, 1:].sum()


def rounded(x, dtype, seed):
    """x, float32, in dtype. Into bf16 it rounds stochastically, E = x: half a step of bf16 at 0.02 is 6e-5, so an
    update of 2e-5 rounded to nearest would be lost for most weights. The noise is a hash of (seed, place): lowbias32
    (Wellons, 2018)."""
    if dtype != torch.bfloat16:
        return x.to(dtype)
    h = torch.arange(x.numel(), dtype=torch.int32, device=x.device).view(x.shape) + seed
    h = (h ^ (h >> 16 & 0xFFFF)) * 0x7FEB352D
    h = (h ^ (h >> 15 & 0x1FFFF)) * -0x7B935975
    noise = (h ^ h >> 16) & 0xFFFF  # bf16 is the upper half of float32: add noise below, cut the lower half off
    return ((x.view(torch.int32) + noise) & -0x10000).view(torch.float32).to(dtype)


def adamw_rule(p, g, m, v, size, correction, betas, eps, seeds):
    """adamw_ of flat tensors, computed in the dtype of the 0-d size and correction: lr / (1 - β1^t) and 1 - β2^t."""
    if p.numel() % 16:  # asked so that the compiler knows which lengths it may read in wide words
        pass
    g = g.to(size.dtype)
    m_ = m.to(g.dtype).lerp_(g, 1 - betas[0])
    v_ = v.to(g.dtype).mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
    p_ = p.to(g.dtype).addcdiv_(m_, (v_ / correction).sqrt_().add_(eps).div_(size), value=-1)
    for old, new, seed in zip((p, m, v), (p_, m_, v_), seeds):
        old.copy_(rounded(new, old.dtype, seed))


@cache
def compiled(rule):
    """An update rule as one kernel for flat tensors of any length: one pass over memory where torch takes twenty."""
    return torch.compile(rule, dynamic=True)


@torch.no_grad()
def adamw_(p, g, m, v, t, lr, *key, betas=(0.9, 0.999), eps=1e-8):
    """Step t (from 1) of AdamW without weight decay, in place (Loshchilov & Hutter, 2019).

    p, g, m, v  weight, gradient and moments, of one shape; computed in float32 or wider, stored as `rounded` has it
    key         of the rounding
    """
    rule = compiled(adamw_rule) if p.is_cuda else adamw_rule
    scalar = partial(torch.tensor, dtype=torch.promote_types(p.dtype, torch.float32))  # a float would be compiled in
    size, correction = scalar(lr / (1 - betas[0] ** t)), scalar(1 - betas[1] ** t)
    for n, part in enumerate(zip(*(x.view(-1).split(1 << 24) for x in (p, g, m, v)))):  # what stands wide is small
        rule(*part, size, correction, betas, eps, [seed_of(*key, n, name) >> 33 for name in "pmv"])


def peek(loss):
    """A loss on its way to the host, and the event of its arrival: who looks at it waits for nothing queued later."""
    if not loss.is_cuda:
        return loss.detach(), None
    seen, event = loss.detach().to("cpu", non_blocking=True), torch.cuda.Event()
    event.record()
    return seen, event


def check_finite(seen, event, step):
    """Raises FloatingPointError, before anything is updated, if the loss of this step, from peek, is no number."""
    if event:
        event.synchronize()
    if not seen.is_meta and not torch.isfinite(seen):
        raise FloatingPointError(f"the loss is {seen.item()} at step {step}")


def ends(model):
    """The weights of the embedding and of the output head, which --freeze keeps (Table 2)."""
    return [model.get_input_embeddings().weight, model.get_output_embeddings().weight]


def adv_probes(
    model, forget, retain, match, *, steps, lr, probe_steps=5, probe_lr=5e-5, probe_width=1024, freeze=True, seed=0,
    log=lambda *_, **__: None,
):  # fmt: skip
    """Adversarial probes (3.4, A.2) on `model`, in place.

    forget, retain  Streams: step i reads forget[i - 1] and retain[i - 1], each (ids, mask)
    match           Stream of texts as long as F's, cut to its rows' lengths; None: distance to N(0, I) instead (SWD)
    steps, lr       optimizer steps; learning rate of AdamW at the first, falling linearly to 0
    probe_*         critic steps a model step; their learning rate; their first hidden width
    freeze          keep embedding and output head as they are
    seed            of critics, noise and rounding
    log             called as log(i, steps, wasserstein=, retain=, critic_steps=)
    Raises FloatingPointError at a loss that is no number; the weights are then those before the step.
    """
    frozen = ends(model) if freeze else []
    for p in frozen:
        p.requires_grad_(False)
    params = [p for p in model.parameters() if p.requires_grad]
    m, v = [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]
    if match:
        D = model.get_input_embeddings().weight.shape[1]
        critics = make_critics(len(decoder_layers(model)), D, probe_width, seed).to(model.device)
        optimizer = torch.optim.RMSprop(critics.parameters(), lr=probe_lr)
    model.train()
    for i in range(1, steps + 1):
        ids, mask = forget[i - 1]
        with residual_streams(model) as H_f:
            model.base_model(input_ids=ids, use_cache=False)
        if match:
            ids_m = match[i - 1][0][:, : ids.shape[1]].masked_fill(~mask, 0)
            with residual_streams(model) as H_m, torch.no_grad():
                model.base_model(input_ids=ids_m, use_cache=False)
            critics.requires_grad_(True)
            for _ in range(probe_steps):  # θ stands still: its streams serve every critic step
                critic_step(critics, optimizer, H_m, [h.detach() for h in H_f], mask)
            critics.requires_grad_(False)
            loss_f = torch.stack([score_gap(*layer, mask) for layer in zip(critics, H_m, H_f)]).mean()
        else:
            loss_f = swd_loss(H_f, mask, seed, "swd", i)
        loss_f.backward()
        H_f = H_m = None

        loss_r = next_token_loss(model, *retain[i - 1])
        seen = peek(loss_f + loss_r)
        loss_r.backward()  # .grad = ∇(Wasserstein + retain loss)

        check_finite(*seen, i)
        now = lr * (1 - (i - 1) / steps)
        for j, p in enumerate(params):
            if p.grad is not None:  # the output head has none of a loss on streams, but has one of the retain loss
                adamw_(p, p.grad, m[j], v[j], i, now, seed, "adv_probes", i, j)  # θ ← AdamW(θ, ∇loss)
                p.grad = None
        log(i, steps, wasserstein=loss_f.detach(), retain=loss_r.detach(), critic_steps=i * probe_steps * bool(match))
    for p in frozen:
        p.requires_grad_(True)


def main(args):
    if args.dry_run:
        blank = Blank(args.batch, args.tokens)
        dry_run(
            args, args.model,
            lambda model: adv_probes(
                model, blank, blank, None if args.swd else blank, steps=1, lr=args.lr, probe_steps=1,
                probe_width=args.probe_width, freeze=args.freeze,
            ),
            trained=lambda model: set(model.parameters()) - set(ends(model) if args.freeze else ()),
            copies={"gradients": 1, "AdamW's two moments": 2}, rest="critics, streams and activations",
        )  # fmt: skip
    run = Run(args)
    mmlu = load_mmlu(args.mmlu) if args.mmlu else None
    texts_f, texts_r = load_chunks(args.data)
    model, tokenizer = load_model(args.model, args.dtype, args.device)
    stream = partial(
        Stream, tokenizer=tokenizer, size=args.batch, length=args.tokens, seed=args.seed, device=model.device
    )
    forget, retain = stream(texts_f, purpose="forget"), stream(texts_r, purpose="retain")
    match = None if args.swd else stream(match_texts(args.match, args.tokens, args.seed), purpose="match")
    if match and min(len(match.encode(j)) for j in range(len(match.texts))) < args.tokens:
        fail(f"--match {args.match}: this tokenizer makes too few tokens of a text; lower --tokens")
    run.open(model, tokens=(2 if args.swd else 3) * args.batch * args.tokens)
    if model.device.type == "cuda":
        model.activation_checkpointing_enable({"use_reentrant": False})

    try:
        adv_probes(
            model, forget, retain, match, steps=args.steps, lr=args.lr, probe_steps=args.probe_steps,
            probe_lr=args.probe_lr, probe_width=args.probe_width, freeze=args.freeze, seed=args.seed, log=run.log,
        )  # fmt: skip
    except FloatingPointError as error:
        run.rescue(model, tokenizer, error)

    base = read_args(args.model).get("base", args.model)
    run.save(model, tokenizer, parent=args.model, base=base, data=args.data, mmlu=args.mmlu, tiny=args.tiny)
    if mmlu:
        summary, answers = score_mmlu(model, tokenizer, mmlu, args.format)
        write_scores(args.out, summary, answers)
        print(show_scores(summary))
    print(f"next: python recover.py --ckpt {args.out}")


if __name__ == "__main__":
    main(args)
