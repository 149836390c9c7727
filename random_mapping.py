"""Random Mapping: drive the residual stream on forget text to noise, keep the language on retain text (Section 3.4).

    r[v] ~ N(0, I), one row a token id v, drawn once                  # the targets, shared by all layers
    for i = 1 .. steps:
        H_1 .. H_L ← residual stream after each decoder layer on x_f
        loss = mean over layers and tokens of 1 - cos(H_l, r[x_f])  +  next-token loss on x_r
        θ ← AdamW(θ, ∇loss, lr)

Where the paper is silent, our choices: "hashing" a token is indexing the table by its id; the streams are the outputs
of the decoder layers (hooks), not the embeddings, which know the token alone and are the same in forget and retain
text; the cosine is signed ("maximizing cosine similarity"; the authors' later code has 1 - |cos|); the first token
(BOS) and pads are left out, since a causal model's BOS state is the same in any text; the losses weigh 1 to 1; 1000
steps; AdamW without weight decay; the learning rate falls linearly to 0 (a constant one leaves the retain set noisy).

Memory: weights, one gradient and two moments, all in the weights' dtype (bf16 on a GPU), and activations, checkpointed.
bf16 holds three digits, so an update of 1e-5 would round away: it is computed in float32 and rounded stochastically.

Logged: `forget`, the mapping loss, 0 (on target) to 2, 1 for unrelated directions; `retain`, nats a token.

    python random_mapping.py --tiny     # the miniature on a laptop -> out/random_mapping
    python random_mapping.py            # Llama-2-7b-chat on one 80 GB GPU -> out/random_mapping
"""

import argparse
import sys
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

WORLD = Path(__file__).parent / "tests" / "tiny" / "world0"
TINY = {  # what --tiny swaps in: the miniature and the settings that fit it (tests/tiny/README.md)
    "model": str(WORLD / "base"),
    "data": str(WORLD / "chunks.jsonl"),
    "mmlu": str(WORLD / "mmlu"),
    "format": "cloze",
    "lr": 1e-2,
    "steps": 200,
    "batch": 24,
    "tokens": 208,
    "log_every": 50,
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Random Mapping (Section 3.4): drive the residual stream on forget text to noise.",
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
    add("--out", default="out/random_mapping", help="checkpoint directory to write")
    add(
        "--lr",
        type=float,
        default=1e-5,
        help="learning rate of AdamW, falling linearly to 0 (3.3: 1e-4 is one order above the usual)",
    )
    add("--steps", type=int, default=1000, help="optimizer steps (paper: not stated)")
    add("--batch", type=int, default=16, help="texts a step of each set (paper: not stated)")
    add("--tokens", type=int, default=256, help="tokens a text at most, BOS among them (A.1)")
    add("--seed", type=int, default=0, help="of the order of the data, the targets and the rounding")
    add("--dtype", default="auto", choices=("auto", "bfloat16", "float32"), help="auto: bf16 on a GPU, else float32")
    add("--device", default="auto", help="auto, cuda or cpu")
    add("--log-every", type=int, default=10, help="steps between log lines")
    add("--dry-run", action="store_true", help="only print what the run would hold in memory, and whether it fits")
    add("--tiny", action="store_true", help="swap in the miniature and the settings that fit it")
    if "--tiny" in (sys.argv[1:] if argv is None else argv):
        parser.set_defaults(**TINY)
    args = parser.parse_args(argv)
    if min(args.steps, args.batch, args.log_every) < 1 or args.tokens < 2 or not 0 < args.lr < 1:
        parser.error("--steps, --batch and --log-every start at 1, --tokens at 2, and --lr lies between 0 and 1")
    return args


if __name__ == "__main__":
    args = parse_args()  # before torch is imported: --help and a mistyped flag answer at once

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from common import (
    Blank, Run, Stream, decoder_layers, dry_run, generator, load_chunks, load_mmlu, load_model, logits, read_args,
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


def random_targets(model, seed):
    """r: one Gaussian direction a token id, (V, D), drawn once from its own seed and shared by all layers (3.4)."""
    V, D = model.get_input_embeddings().weight.shape
    return torch.randn(V, D, generator=generator("cpu", seed, "targets")).to(model.device, model.dtype)


def mapping_loss(H, r, mask):
    """1 - cos(H_l, r), mean over tokens, then over layers (3.4). 0 on target, 1 unrelated, 2 opposite.

    H     L streams (B, T, D)
    r     (B, T, D), a target a position
    mask  (B, T), true on tokens; the first position (BOS) is left out: it is the same in every text
    """
    mask = mask[:, 1:]
    losses = []
    for h in H:
        distance = 1 - F.cosine_similarity(h[:, 1:].float(), r[:, 1:].float(), dim=-1)  # (B, T - 1)
        losses.append((distance * mask).sum() / mask.sum())
    return torch.stack(losses).mean()


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


def random_mapping(model, forget, retain, *, steps, lr, seed=0, log=lambda *_, **__: None):
    """Random Mapping (3.4) of `model`, in place.

    forget, retain  Streams: step i reads forget[i - 1] and retain[i - 1], each (ids, mask)
    steps, lr       optimizer steps; learning rate of AdamW at the first, falling linearly to 0
    seed            of targets and rounding
    log             called as log(i, steps, forget=loss, retain=loss)
    Raises FloatingPointError at a loss that is no number; the weights are then those before the step.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    m, v = [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]
    targets = random_targets(model, seed)
    model.train()
    for i in range(1, steps + 1):
        ids, mask = forget[i - 1]
        with residual_streams(model) as H:
            model.base_model(input_ids=ids, use_cache=False)
        loss_f = mapping_loss(H, targets[ids], mask)
        loss_f.backward()
        del H

        loss_r = next_token_loss(model, *retain[i - 1])
        seen = peek(loss_f + loss_r)
        loss_r.backward()  # .grad = ∇(mapping loss + retain loss)

        check_finite(*seen, i)
        now = lr * (1 - (i - 1) / steps)
        for j, p in enumerate(params):
            if p.grad is not None:  # the output head has none of a mapping loss, but has one of the retain loss
                adamw_(p, p.grad, m[j], v[j], i, now, seed, "random_mapping", i, j)  # θ ← AdamW(θ, ∇loss)
                p.grad = None
        log(i, steps, forget=loss_f.detach(), retain=loss_r.detach())


def main(args):
    if args.dry_run:
        blank = Blank(args.batch, args.tokens)
        dry_run(
            args, args.model, lambda model: random_mapping(model, blank, blank, steps=1, lr=args.lr),
            copies={"gradients": 1, "AdamW's two moments": 2}, rest="streams, targets and activations",
        )  # fmt: skip
    run = Run(args)
    mmlu = load_mmlu(args.mmlu) if args.mmlu else None
    texts_f, texts_r = load_chunks(args.data)
    model, tokenizer = load_model(args.model, args.dtype, args.device)
    stream = partial(
        Stream, tokenizer=tokenizer, size=args.batch, length=args.tokens, seed=args.seed, device=model.device
    )
    forget, retain = stream(texts_f, purpose="forget"), stream(texts_r, purpose="retain")
    run.open(model, tokens=2 * args.batch * args.tokens)
    if model.device.type == "cuda":
        model.activation_checkpointing_enable({"use_reentrant": False})

    try:
        random_mapping(model, forget, retain, steps=args.steps, lr=args.lr, seed=args.seed, log=run.log)
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
