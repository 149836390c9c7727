"""MLAC-AR: adversarial meta-learning against a fine-tuning adversary (Section 3.5, Algorithm 1).

    for i = 1 .. N:
        x_r ~ R;  φ ← 0;  ω_0 ← θ
        for k = 1 .. K:
            x_f ~ F
            ω_k ← ω_{k-1} - η ∇L(ω_{k-1}; x_f)              # the adversary fine-tunes on forget text
            φ ← φ + ∇L(ω_k; x_heldout)                      # and this is what it would gain on unseen forget text
        θ ← θ - η (∇L(θ; x_r) - α φ)                        # keep R, climb what the adversary descends

First order, as Algorithm 1 has it: no graph goes through the inner loop. φ is taken after each adversary step (ω_1 ..
ω_K, never θ), on one heldout batch an outer step, which is never one of that step's x_f. Signs are as printed.

Where the paper is silent, our choices: α is a ratio, α_paper = α η, so that `--optimizer sgd --no-bound` is Algorithm 1
to the letter; both loops default to AdamW, as the real adversary uses it and SGD at 2e-5 hardly moves a 7B model; the
adversary's moments start from 0 each outer step, the outer ones persist. Ascent on a cross-entropy has no ceiling, so
a heldout batch whose loss is above log V (chance) adds nothing to φ (`--no-bound` lifts this). Watch `bounded`: at 1
the adversary never gets below chance, φ is 0, and the run only fine-tunes on R; then raise K.

Memory, flat in K, in the weights' dtype: the weights (θ, or ω in the inner loop); φ, which *is* the parameters'
.grad, so backward on the heldout batch accumulates into it in place; two moments, the adversary's in the inner loop
and the outer ones after it; activations, checkpointed. θ and the outer moments wait in (pinned) host memory and move
while the device computes. The adversary's gradient never stands whole: backward hands over one parameter's at a time,
which is applied and freed. `--dry-run` prints the sum for a model from its config alone.

Logged: `retain`, `adversary`, `heldout` (nats a token; the last two are means over k), `bounded`, the share of heldout
batches above log V.

    python mlac_ar.py --tiny                            # the miniature on a laptop -> out/mlac_ar
    python mlac_ar.py --model out/random_mapping        # from Random Mapping's result; rmat.py runs both
"""

import argparse
import math
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
    "lr": 3e-3,
    "K": 16,
    "N": 20,
    "batch": 24,
    "tokens": 208,
    "log_every": 2,
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="MLAC-AR (Section 3.5, Algorithm 1): adversarial meta-learning against a fine-tuning adversary.",
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
    add("--out", default="out/mlac_ar", help="checkpoint directory to write")
    add("--lr", type=float, default=2e-5, help="η, learning rate of both loops")
    add("--K", type=int, default=4, help="K of Algorithm 1: adversary steps an outer step; too few leave bounded at 1")
    add("--N", type=int, default=100, help="N of Algorithm 1: outer steps (paper: not stated)")
    add(
        "--alpha",
        type=float,
        default=1.0,
        help="α, weight of φ (summed over K) beside ∇L(θ; x_r); paper's α: times η",
    )
    add("--optimizer", default="adamw", choices=("adamw", "sgd"), help="of both loops; Algorithm 1 is sgd")
    add(
        "--bound",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="a heldout loss above log V adds nothing to φ (ours; --no-bound: Algorithm 1)",
    )
    add("--batch", type=int, default=16, help="texts a batch; K + 1 forget batches and 1 retain batch an outer step")
    add("--tokens", type=int, default=256, help="tokens a text at most, BOS among them (A.1)")
    add("--seed", type=int, default=0, help="of the order of the data and the rounding")
    add("--dtype", default="auto", choices=("auto", "bfloat16", "float32"), help="auto: bf16 on a GPU, else float32")
    add("--device", default="auto", help="auto, cuda or cpu")
    add("--log-every", type=int, default=10, help="outer steps between log lines")
    add("--dry-run", action="store_true", help="only print what the run would hold in memory, and whether it fits")
    add("--tiny", action="store_true", help="swap in the miniature and the settings that fit it")
    if "--tiny" in (sys.argv[1:] if argv is None else argv):
        parser.set_defaults(**TINY)
    args = parser.parse_args(argv)
    if min(args.K, args.N, args.batch, args.log_every) < 1 or args.tokens < 2 or not 0 < args.lr < 1 or args.alpha < 0:
        parser.error("--K, --N, --batch, --log-every start at 1, --tokens at 2, --alpha at 0; 0 < --lr < 1")
    return args


if __name__ == "__main__":
    args = parse_args()  # before torch is imported: --help and a mistyped flag answer at once

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from common import (
    Blank, Run, Stream, dry_run, load_chunks, load_mmlu, load_model, logits, read_args, score_mmlu, seed_of,
    show_scores, write_scores,
)  # fmt: skip


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


def sgd_rule(p, g, lr, seed):
    """sgd_ of flat tensors."""
    wide = torch.promote_types(p.dtype, torch.float32)
    p.copy_(rounded(p.to(wide).add_(g.to(wide), alpha=-lr), p.dtype, seed))


@torch.no_grad()
def sgd_(p, g, lr, *key):
    """p ← p - lr g, in place; computed in float32 or wider, stored as `rounded` has it."""
    rule = compiled(sgd_rule) if p.is_cuda else sgd_rule
    for n, part in enumerate(zip(p.view(-1).split(1 << 24), g.view(-1).split(1 << 24))):
        rule(*part, lr, seed_of(*key, n) >> 33)


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


@contextmanager
def as_differentiated(params, act):
    """Inside, backward calls act(j, p) as soon as parameter j's gradient is whole.

    Every operation that used the parameter has then been differentiated: act may change it as if backward were over.
    """
    hooks = [p.register_post_accumulate_grad_hook(partial(act, j)) for j, p in enumerate(params)]
    try:
        yield
    finally:
        for h in hooks:
            h.remove()


@contextmanager
def update_in_backward(params, update):
    """Inside, backward hands each parameter's gradient to update(j, p, g) as soon as it is whole, and frees it.

    What stood in .grad (φ) is set aside, so that nothing is added to it, and put back at the end.
    """

    def act(j, p):
        g, p.grad = p.grad, None
        update(j, p, g)

    phi = [p.grad for p in params]
    for p in params:
        p.grad = None
    try:
        with as_differentiated(params, act):
            yield
    finally:
        for p, f in zip(params, phi):
            p.grad = f


class Host:
    """A place in host memory for each of some tensors, which move there and back while the device computes.

    On a GPU the memory is pinned and a stream of its own moves: save(j) and load(j) begin when what was queued before
    them is done, and what is queued after wait(j) begins when tensor j has moved. On the CPU they are plain copies; on
    the meta device, where a dry run counts what the device holds, nothing moves.
    """

    def __init__(self, tensors):
        self.tensors, self.stream, self.moved = tensors, torch.cuda.Stream() if tensors[0].is_cuda else None, {}
        self.copies = tensors
        if not tensors[0].is_meta:
            self.copies = [torch.zeros_like(x, device="cpu", pin_memory=x.is_cuda) for x in tensors]

    def move(self, j, target, source):
        if self.stream is None:
            target.copy_(source)
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
        self.moved[j] = self.stream.record_event()

    def save(self, j):
        self.move(j, self.copies[j], self.tensors[j])

    def load(self, j):
        self.move(j, self.tensors[j], self.copies[j])

    def wait(self, j):
        if j in self.moved:
            torch.cuda.current_stream().wait_event(self.moved[j])


def inner_loop(model, batches, heldout, update, *, bound, done=lambda j, p: None):
    """The K adversary steps of one outer step (Algorithm 1): model becomes ω_K, .grad becomes φ.

    batches  K batches x_f, each (ids, mask)
    heldout  x_heldout, (ids, mask)
    update   update(k, j, p, g): the adversary's step k on parameter j, in place
    bound    a heldout loss above log V adds nothing to φ
    done     done(j, p): called when parameter j of ω_K is needed no more
    Returns (3,), means over k: the adversary's loss, the heldout loss, the share above log V.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    chance = math.log(model.get_input_embeddings().weight.shape[0])
    totals = torch.zeros(3, device=model.device)
    for k, x_f in enumerate(batches, 1):
        with update_in_backward(params, partial(update, k)):
            loss_f = next_token_loss(model, *x_f)
            loss_f.backward()  # ω ← ω - η ∇L(ω; x_f)

        loss_h = next_token_loss(model, *heldout)
        below = (loss_h < chance) if bound else torch.ones_like(loss_h, dtype=torch.bool)
        with as_differentiated(params if k == len(batches) else [], done):
            (loss_h * below).backward()  # φ ← φ + ∇L(ω; x_heldout), in place: φ is .grad
        totals += torch.stack([loss_f.detach(), loss_h.detach(), (loss_h > chance).float()])
    return totals / len(batches)


def mlac_ar(
    model, forget, retain, *, K, N, lr, alpha, optimizer="adamw", bound=True, seed=0, log=lambda *_, **__: None
):  # fmt: skip
    """MLAC-AR (3.5, Algorithm 1) of `model`, in place.

    forget     Stream of (K + 1) B texts: outer step i reads forget[i - 1], K batches x_f and last x_heldout
    retain     Stream of B texts
    K, N       adversary steps an outer step; outer steps
    lr, alpha  η of both loops; weight of φ beside ∇L(θ; x_r). alpha = 0 is fine-tuning on R
    optimizer  "adamw" or "sgd", of both loops
    bound      a heldout loss above log V adds nothing to φ
    seed       of the rounding
    log        called as log(i, N, retain=, adversary=, heldout=, bounded=)
    Raises FloatingPointError at a loss that is no number; the weights are then θ of the step before.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    theta, moments = Host([p.detach() for p in params]), ()
    if adam := optimizer == "adamw":
        m, v = [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]  # of the loop at work
        moments = Host(m), Host(v)  # the outer loop's, at rest
    model.train()

    def adversary(i, k, j, p, g):
        for host in (theta, *moments) if k == 1 else ():
            host.wait(j)
        if adam:
            if k == 1:
                m[j].zero_(), v[j].zero_()  # the adversary starts fresh
            adamw_(p, g, m[j], v[j], k, lr, seed, "adversary", i, k, j)
        else:
            sgd_(p, g, lr, seed, "adversary", i, k, j)
        for host in moments if k == K else ():
            host.load(j)  # the outer loop's moments come while ω_K is differentiated

    for i in range(1, N + 1):
        ids, mask = forget[i - 1]
        *batches, heldout = zip(ids.chunk(K + 1), mask.chunk(K + 1))
        for j in reversed(range(len(params))):  # the order in which the adversary will change them
            theta.save(j)  # θ waits on the host while the model is ω

        loss_f, loss_h, above = inner_loop(
            model, batches, heldout, partial(adversary, i), bound=bound, done=lambda j, p: theta.load(j)
        )
        for j, p in enumerate(params):
            if p.grad is None:
                theta.load(j)
            theta.wait(j)  # ω is dropped, θ is back to the bit
            p.grad = p.grad.mul_(-alpha) if alpha and p.grad is not None else None  # -α φ
        loss_r = next_token_loss(model, *retain[i - 1])
        seen = peek(loss_r + loss_f + loss_h)
        loss_r.backward()  # .grad = ∇L(θ; x_r) - α φ
        check_finite(*seen, i)

        for j, p in reversed([*enumerate(params)]):  # θ ← θ - η (∇L(θ; x_r) - α φ)
            for host in moments:
                host.wait(j)
            if p.grad is not None and adam:
                adamw_(p, p.grad, m[j], v[j], i, lr, seed, "outer", i, j)
            elif p.grad is not None:
                sgd_(p, p.grad, lr, seed, "outer", i, j)
            for host in moments:
                host.save(j)
            p.grad = None
        log(i, N, retain=loss_r.detach(), adversary=loss_f, heldout=loss_h, bounded=above)


def main(args):
    if args.dry_run:
        K, batch = min(args.K, 2), partial(Blank, length=args.tokens)  # a third adversary step holds no more
        moments = 2 * (args.optimizer == "adamw")
        dry_run(
            args, args.model,
            lambda model: mlac_ar(
                model, batch((K + 1) * args.batch), batch(args.batch), K=K, N=1, lr=args.lr, alpha=args.alpha,
                optimizer=args.optimizer,
            ),
            copies={"φ (.grad)": 1, "two moments of the loop at work": moments},
            host={"θ": 1, "two moments of the outer loop": moments},
        )  # fmt: skip
    run = Run(args)
    mmlu = load_mmlu(args.mmlu) if args.mmlu else None
    texts_f, texts_r = load_chunks(args.data)
    model, tokenizer = load_model(args.model, args.dtype, args.device)
    stream = partial(Stream, tokenizer=tokenizer, length=args.tokens, seed=args.seed, device=model.device)
    forget = stream(texts_f, size=(args.K + 1) * args.batch, purpose="forget")
    retain = stream(texts_r, size=args.batch, purpose="retain")
    run.open(model, tokens=(2 * args.K + 1) * args.batch * args.tokens)
    if model.device.type == "cuda":
        model.activation_checkpointing_enable({"use_reentrant": False})

    try:
        mlac_ar(
            model, forget, retain, K=args.K, N=args.N, lr=args.lr, alpha=args.alpha, optimizer=args.optimizer,
            bound=args.bound, seed=args.seed, log=run.log,
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
