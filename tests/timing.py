"""What the benchmarks share: flags, a clock that waits for the device, random models and batches.

Importing it makes the repository's scripts importable, so it is imported before them.
"""

import argparse
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


def flags(doc):
    """A parser that is described by the first line of a docstring, and its add_argument."""
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=doc.split("\n")[0], formatter_class=form)
    return parser, parser.add_argument


def clock():
    """Seconds, read when the device has computed all that was queued."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(work, *args):
    """(work(*args), its seconds, device included)."""
    start = clock()
    return work(*args), clock() - start


def ratio(rounds, above, below, scale=1):
    """Seconds of above() / seconds of below() times scale: median over rounds that time both in turn."""
    found = []
    for _ in range(rounds):
        a, b = timed(above)[1], timed(below)[1] * scale
        print(f"{a:.3f} s / {b:.3f} s = {a / b:.3f}", flush=True)
        found.append(a / b)
    return statistics.median(found)


def llama(vocab, width, inner, layers, heads, **more):
    """A LlamaConfig of these sizes."""
    more |= {"vocab_size": vocab, "num_attention_heads": heads, "architectures": ["LlamaForCausalLM"]}
    return LlamaConfig(hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, **more)


def random_model(config, dtype=torch.float32):
    """A model of random weights, made on the device."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


class Batches:
    """Random batches without padding: [i] is (ids, mask), made on the host and sent over as a Stream does."""

    def __init__(self, batch, tokens, vocab):
        self.shape, self.vocab = (batch, tokens), vocab

    def __getitem__(self, i):
        ids = torch.randint(1, self.vocab, self.shape, generator=torch.Generator().manual_seed(i))
        ids = (ids.pin_memory() if CUDA else ids).to(DEVICE, non_blocking=True)
        return ids, torch.ones_like(ids, dtype=torch.bool)


def plain_passes(model, batches, n):
    """n forward and backward passes of one batch each and nothing else: what a step is compared with."""
    for i in range(n):
        next_token_loss(model, *batches[i]).backward()
        model.zero_grad()
