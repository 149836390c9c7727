"""Toy models and tokenizers for the tests: random weights, made here, no hub."""

import csv
import os
import sys
from pathlib import Path

# Before torch is imported, and for the scripts that the tests start: threads that wait sleep instead of
# spinning, which on shared cores makes the suite two to three times as fast.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "tiny")]
WORLD = ROOT / "tests" / "tiny" / "world0"
KINDS = ("llama", "mistral", "qwen2", "gemma2", "gpt_neox")


def pytest_configure(config):
    config.addinivalue_line(
        "filterwarnings", "error::FutureWarning"
    )  # what the libraries are about to take away


class Batches:
    """Random batches of ids (B, T); the last two positions of odd rows are pads unless `full`. same: of one
    step."""

    def __init__(self, B, T=12, vocab=60, seed=0, full=False, same=False):
        self.shape, self.vocab, self.seed, self.full, self.same = (B, T), vocab, seed, full, same

    def __getitem__(self, i):
        draw = torch.Generator().manual_seed(1000 * self.seed + (0 if self.same else i))
        ids = torch.randint(1, self.vocab, self.shape, generator=draw)
        mask = torch.ones(self.shape, dtype=torch.bool)
        if not self.full:
            mask[1::2, -2:] = False
        return ids, mask


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def toy_model(kind="llama", vocab=60, seed=0, dtype=torch.float32, **more):
    """A random two-layer model of one of KINDS, of width 16."""
    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=vocab, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    sizes |= dict(
        max_position_embeddings=2048, initializer_range=0.3, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    if kind != "gpt_neox":
        sizes |= dict(num_key_value_heads=1)
    if kind == "gemma2":
        sizes |= dict(head_dim=8, sliding_window=9, attn_implementation="eager")
    if kind == "mistral":
        sizes |= dict(sliding_window=9)
    config = AutoConfig.for_model(kind, **(sizes | more))
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def bpe(texts, bos="<s>", spaces=True, size=300):
    """A byte-level BPE tokenizer trained on texts; with bos it begins every text with it, as Llama's does."""
    from tokenizers import decoders, trainers

    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    t.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, special_tokens=["<s>"], initial_alphabet=alphabet)
    )
    if bos:
        t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=t, bos_token=bos, eos_token="<s>", pad_token="<s>")


def spm_like():
    """A tokenizer that, as Llama-2's, puts "▁" before a text, so that " A" alone is two tokens, "▁" and
    "▁A"."""
    letters = "".join(chr(c) for c in range(33, 127)) + "\n"
    vocab = {w: i for i, w in enumerate(["<s>", "<unk>", "▁", *letters, "▁A", "▁B", "▁C", "▁D"])}
    t = Tokenizer(models.BPE(vocab, [("▁", x) for x in "ABCD"], unk_token="<unk>"))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=t, bos_token="<s>", eos_token="<s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def mmlu():
    """Two forget and one retain subject, six questions each, made up; one option reads "None", one is
    long."""

    def ask(s, i):
        return (
            f" Which {s} is number {i}?" + " Think." * i,
            [f"one {i}", "None", f"a much longer third {s} {i}", "4"],
            i % 4,
        )

    names = ("high_school_biology", "college_biology", "astronomy")
    return {s: ([ask(s, i) for i in range(5)], [ask(s, i) for i in range(5, 11)]) for s in names}


def write_csvs(folder, mmlu):
    """MMLU as load_mmlu returns it, written as the original CSVs."""
    for subject, parts in mmlu.items():
        for kind, rows in zip(("dev", "test"), parts):
            path = folder / kind / f"{subject}_{kind}.csv"
            path.parent.mkdir(exist_ok=True, parents=True)
            with open(path, "w", newline="") as f:
                csv.writer(f).writerows([q, *choices, "ABCD"[answer]] for q, choices, answer in rows)


def real(path):
    """A file of ../shared/data; the test skips itself where it is absent."""
    if not (found := ROOT.parent / "shared" / "data" / path).exists():
        pytest.skip(f"the real files are not here ({path})")
    return found


def load_texts(source, column=None):
    """What recover.py trains on."""
    from common import texts_of
    from recover import FORMS, load_rows

    return texts_of(load_rows(source), source, "--recovery", column, FORMS)
