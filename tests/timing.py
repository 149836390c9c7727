"""What the benchmarks share; importing it makes the repository's scripts importable."""

import sys
import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import next_token_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def flags(doc):
    """A parser that is described by the first line of a docstring, and its add_argument."""
    parser = ArgumentParser(description=doc.split("\n")[0], formatter_class=ArgumentDefaultsHelpFormatter)
    return parser, parser.add_argument


def clock():
    """Seconds, read when the device has nothing left to do."""
    getattr(torch, DEVICE).synchronize()
    return time.perf_counter()


def seconds(work):
    start, _ = clock(), work()
    return clock() - start


def step_seconds(train, n=1):
    """Seconds of a step of train(steps, log), mean of n: not of the first, which allocates and compiles."""
    marks = []
    train(n + 1, lambda i, *_, **__: marks.append(clock()) if i in (1, n + 1) else None)
    return (marks[1] - marks[0]) / n


def random_model(config, dtype=torch.float32):
    """A model of random weights, made on the device."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.micro_batch = 0
    return model


def random_batches(n, batch, tokens, vocab):
    """n batches (ids, mask) without padding, on the device."""
    ids = torch.randint(1, vocab, (n, batch, tokens), generator=torch.Generator().manual_seed(0))
    return [(x, torch.ones_like(x, dtype=torch.bool)) for x in ids.to(DEVICE)]


def plain_passes(model, batches):
    """A forward and a backward pass of each batch and nothing else: what a step is compared with."""
    for batch in batches:
        next_token_loss(model, *batch).backward()
        model.zero_grad()
