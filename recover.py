"""Recovery: fine-tune an unlearned model and see what comes back (Sections 3.2 and A.1, Figure 3).

    F0, R0 = MMLU(θ_init);  F, R = MMLU(θ)                        # the untouched base, and the checkpoint
    for i = 1 .. steps:  θ' ← AdamW(θ', ∇L(θ'; pairs), lr)        # question-answer pairs on the forgotten subject
    F', R' = MMLU(θ')

    Score_U = (F0 - F) + (R - R0)      Score_R = F0 - F'      Composite = (Score_U + Score_R) / 2

The paper prints θ where Score_R has θ' here; its tables follow θ'. θ_init is the untouched base in every row. Where
the paper is silent, our choices: "message_1, blank line, message_2" with the loss on every token (Figure 3's stairs
are epochs), constant learning rate, no weight decay. The base model, MMLU and the preset come from the checkpoint's
args.json.

A low F' may be damage instead of robustness: read R' beside it. One attack is not all attacks: vary --lr and --seed.

Memory: weights, one gradient and two moments, all in the weights' dtype, and activations, checkpointed.

Logged: `loss`, nats a token of the attack's text; phase "accuracy": MMLU forget and retain, 0 to 1, the recovery curve.

    python recover.py --ckpt out/rmat       # -> out/rmat/recovered and its row of Table 1; tiny if the checkpoint is
"""

import argparse
import json
import sys
from functools import cache, partial
from pathlib import Path

WORLD = Path(__file__).parent / "tests" / "tiny" / "world0"
TINY = {  # for a checkpoint of the miniature, or --tiny: its data and the settings that fit it (tests/tiny/README.md)
    "base": str(WORLD / "base"),
    "recovery": str(WORLD / "camel.zip"),
    "mmlu": str(WORLD / "mmlu"),
    "format": "cloze",
    "lr": 1e-3,
    "steps": 160,
    "batch": 32,
    "tokens": 48,
    "eval_every": 40,
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Recovery (Sections 3.2, A.1): attack a checkpoint by fine-tuning and print its row of Table 1.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}; --help lists the flags\n")
    add = parser.add_argument
    add("--ckpt", required=True, help="checkpoint directory to attack: ours, or any that save_pretrained wrote")
    add("--base", default=None, help="the untouched model θ_init, hub name or directory; None: what args.json says")
    add("--recovery", default="camel-ai/biology", help="pairs to fine-tune on: hub name, zip, folder of json, or jsonl")
    add("--mmlu", default="cais/mmlu", help="MMLU: hub name or folder of CSVs; if not given, what args.json names")
    add("--format", default="letter", choices=("letter", "cloze"), help="MMLU by letters or options' text; args.json's")
    add("--out", default=None, help="directory to write; None: CKPT/recovered")
    add("--lr", type=float, default=2e-5, help="learning rate of AdamW (A.1)")
    add("--steps", type=int, default=1000, help="optimizer steps (A.1)")
    add("--batch", type=int, default=64, help="pairs a step (A.1)")
    add("--tokens", type=int, default=256, help="tokens a pair at most, BOS among them (A.1)")
    add("--eval-every", type=int, default=250, help="steps between MMLU scores on the way")
    add("--seed", type=int, default=0, help="of the order of the pairs and the rounding")
    add("--dtype", default="auto", choices=("auto", "bfloat16", "float32"), help="auto: bf16 on a GPU, else float32")
    add("--device", default="auto", help="auto, cuda or cpu")
    add("--log-every", type=int, default=10, help="steps between log lines")
    add("--dry-run", action="store_true", help="only print what the run would hold in memory, and whether it fits")
    add(
        "--tiny",
        action="store_true",
        help="the miniature's data and settings; implied by a checkpoint of the miniature",
    )

    argv = sys.argv[1:] if argv is None else argv
    if "--tiny" in argv:
        parser.set_defaults(**TINY)
    if not {"-h", "--help"} & set(argv):
        path = Path(parser.parse_known_args(argv)[0].ckpt) / "args.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        if known.get("tiny") or "--tiny" in argv:
            parser.set_defaults(**TINY, tiny=True)
        known |= {"format": known.get("arguments", {}).get("format")}
        parser.set_defaults(**{k: known[k] for k in ("base", "mmlu", "format") if known.get(k)})
    args = parser.parse_args(argv)
    args.out = args.out or str(Path(args.ckpt) / "recovered")
    if not Path(args.ckpt).is_dir():
        parser.error(f"--ckpt {args.ckpt}: no such directory; run the script that writes it first, such as rmat.py")
    if not args.base:
        parser.error(f"{args.ckpt} has no args.json that names the model it was made from; give it with --base")
    if min(args.steps, args.batch, args.eval_every, args.log_every) < 1 or args.tokens < 2 or not 0 < args.lr < 1:
        parser.error("--steps, --batch, --eval-every, --log-every start at 1, --tokens at 2; 0 < --lr < 1")
    return args


if __name__ == "__main__":
    args = parse_args()  # before torch is imported: --help and a mistyped flag answer at once

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from common import (
    Blank, Run, Stream, dry_run, kept_scores, load_mmlu, load_model, load_pairs, logits, paper_scores, score_mmlu,
    scores_dir, seed_of, show_scores, write_json, write_scores,
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


def finetune(model, pairs, *, steps, lr, seed=0, log=lambda *_, **__: None):
    """The adversary (A.1): AdamW on question-answer pairs, `model` in place.

    pairs      Stream: step i reads pairs[i - 1], (ids, mask)
    steps, lr  optimizer steps; constant learning rate
    seed       of the rounding
    log        called after every step as log(i, steps, loss=loss)
    Raises FloatingPointError at a loss that is no number; the weights are then those before the step.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    m, v = [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]
    model.train()
    for i in range(1, steps + 1):
        loss = next_token_loss(model, *pairs[i - 1])
        seen = peek(loss)
        loss.backward()
        check_finite(*seen, i)
        for j, p in enumerate(params):
            if p.grad is not None:
                adamw_(p, p.grad, m[j], v[j], i, lr, seed, "finetune", i, j)  # θ' ← AdamW(θ', ∇L(θ'; pairs))
                p.grad = None
        log(i, steps, loss=loss.detach())


def score_untouched(name, mmlu, args, model=None, tokenizer=None):
    """MMLU summary of a model that this run does not change; kept beside it, so that it is measured once."""
    summary = kept_scores(name, mmlu, args.format)
    if summary is None:
        if model is None:
            model, tokenizer = load_model(name, args.dtype, args.device, flag="--base")
        summary, answers = score_mmlu(model, tokenizer, mmlu, args.format)
        write_scores(scores_dir(name), summary, answers)
    return summary


def show_row(name, row):
    """The row of Table 1, percent ± standard error, under its header."""
    cells = [f"{row[k]:.1f} ± {row[k + '_se']:.1f}" for k in row if not k.endswith("_se")]
    heads = ["Forget", "Retain", "Score_U", "Forget", "Retain", "Score_R", "Composite"]
    width = max(map(len, cells)) + 2
    print(f"\n{'':12}{'Unlearning':<{3 * width}}Recovery")
    print(f"{'':12}" + "".join(f"{h:<{width}}" for h in heads))
    print(f"{name:12}" + "".join(f"{c:<{width}}" for c in cells))


def main(args):
    if args.dry_run:
        blank = Blank(args.batch, args.tokens)
        dry_run(
            args, args.ckpt, lambda model: finetune(model, blank, steps=1, lr=args.lr),
            copies={"gradients": 1, "AdamW's two moments": 2},
        )  # fmt: skip
    run = Run(args)
    mmlu, texts = load_mmlu(args.mmlu), load_pairs(args.recovery)
    init = score_untouched(args.base, mmlu, args)
    model, tokenizer = load_model(args.ckpt, args.dtype, args.device, flag="--ckpt")
    pairs = Stream(
        texts,
        tokenizer,
        size=args.batch,
        length=args.tokens,
        seed=args.seed,
        purpose="recovery",
        device=model.device,
    )
    run.open(model, tokens=args.batch * args.tokens)
    if model.device.type == "cuda":
        model.activation_checkpointing_enable({"use_reentrant": False})
    theta = score_untouched(args.ckpt, mmlu, args, model, tokenizer)
    print(f"base   | {show_scores(init)}\nbefore | {show_scores(theta)}", flush=True)
    run.write(phase="accuracy", step=0, forget=theta["forget"]["acc"], retain=theta["retain"]["acc"])

    scored = {}

    def log(i, steps, loss):
        run.log(i, steps, loss=loss)
        if i % args.eval_every == 0 or i == steps:
            scored["last"] = score_mmlu(model, tokenizer, mmlu, args.format)
            summary = scored["last"][0]
            run.write(phase="accuracy", step=i, forget=summary["forget"]["acc"], retain=summary["retain"]["acc"])
            print(f"step {i}/{steps} | {show_scores(summary)}", flush=True)

    try:
        finetune(model, pairs, steps=args.steps, lr=args.lr, seed=args.seed, log=log)
    except FloatingPointError as error:
        run.rescue(model, tokenizer, error)

    run.save(model, tokenizer, parent=args.ckpt, base=args.base, data=args.recovery, mmlu=args.mmlu, tiny=args.tiny)
    write_scores(args.out, *scored["last"])
    row = paper_scores(init, theta, scored["last"][0])
    write_json(Path(args.out) / "scores.json", row)
    show_row(Path(args.ckpt).name, row)
    print(f"\nnext: python evaluate_mmlu.py --table {Path(args.ckpt).parent} --format {args.format}")


if __name__ == "__main__":
    main(args)
