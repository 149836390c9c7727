"""What the benchmarks share: a clock that waits for the device, works timed in turn, random models and random batches.

Importing this makes the repository's scripts importable, so it comes before them.
"""

import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common import next_token_loss

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def clock():
    """Seconds, read when the device has computed all that was queued."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(work, *args):
    """How long work(*args) takes, device included."""
    start = clock()
    work(*args)
    return clock() - start


def in_turn(rounds, *works):
    """Yields, per round, the seconds of each work. Interleaved, so that a slow minute of the machine hits all of them."""
    for _ in range(rounds):
        yield tuple(seconds(work) for work in works)


def median_ratio(times):
    """Median of a / b over pairs (a, b) that were timed in turn."""
    return statistics.median(a / b for a, b in times)


def random_llama(dtype=torch.float32, **sizes):
    """A Llama of random weights on the device; sizes are LlamaConfig's arguments."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(LlamaConfig(**sizes), dtype=dtype)


def plain_passes(model, batches, n):
    """n forward and backward passes of one batch each, and nothing else: what a method's step is compared with."""
    for i in range(n):
        next_token_loss(model, *batches[i]).backward()
        model.zero_grad()


class Batches:
    """Random batches without padding: [i] is (ids, mask) of step i, made on the host and sent over as a Stream does."""

    def __init__(self, batch, tokens, vocab):
        self.shape, self.vocab = (batch, tokens), vocab

    def __getitem__(self, i):
        ids = torch.randint(1, self.vocab, self.shape, generator=torch.Generator().manual_seed(i))
        ids = (ids.pin_memory() if CUDA else ids).to(DEVICE, non_blocking=True)
        return ids, torch.ones_like(ids, dtype=torch.bool)
