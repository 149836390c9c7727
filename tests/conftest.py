"""Toy models and tokenizers for the tests: random weights, made here, no hub."""

import csv
import os
import sys
from pathlib import Path

# before torch is imported: threads that wait sleep, which on shared cores is two to three times as fast
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "tiny")]
WORLD = ROOT / "tests" / "tiny" / "world0"
KINDS = {  # of model: what its config needs beside the sizes of toy_model
    "llama": {}, "qwen2": {}, "gpt_neox": {}, "mistral": dict(sliding_window=9),
    "gemma2": dict(sliding_window=9, head_dim=8, attn_implementation="eager"), "gpt2": {},
    "gemma3_text": dict(head_dim=8, sliding_window=9, layer_types=["sliding_attention", "full_attention"]),
    "mixtral": dict(num_local_experts=4),
    "qwen3_moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, head_dim=8),
    "granite": dict(logits_scaling=2.0, attention_multiplier=0.3, embedding_multiplier=3.0),
    "cohere": dict(logit_scale=0.3), "phi3": {},
}  # fmt: skip


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "error::FutureWarning")  # what libraries are about to take away


class Batches:
    """Random batches (B, T); the last two positions of odd rows are pads unless `full`. same: of one step."""

    def __init__(self, B, T=12, vocab=60, seed=0, full=False, same=False):
        self.shape, self.vocab, self.seed, self.full, self.same = (B, T), vocab, seed, full, same

    def __getitem__(self, i):
        draw = torch.Generator().manual_seed(1000 * self.seed + (0 if self.same else i))
        ids = torch.randint(1, self.vocab, self.shape, generator=draw)
        mask = torch.ones(self.shape, dtype=torch.bool)
        mask[1::2, -2:] = self.full
        return ids, mask


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def moved(model, before):
    """Names of a model's weights that differ from those of another one."""
    return {k for k, p in model.named_parameters() if not torch.equal(p, before.get_parameter(k))}


def toy_model(kind="llama", vocab=60, seed=0, dtype=torch.float32, **more):
    """A random two-layer model of one of KINDS, of width 16, which trains on whole batches."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=vocab, hidden_size=16, intermediate_size=32, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=2, max_position_embeddings=2048, initializer_range=0.3)
    sizes |= dict(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    sizes |= dict(num_key_value_heads=1) if kind != "gpt_neox" else {}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(sizes | KINDS[kind] | more)))
    model.micro_batch = 0
    return model.to(dtype).eval()


def bpe(texts, bos="<s>", size=300):
    """A byte-level BPE tokenizer trained on texts; with bos it begins every text with it, as Llama's does."""
    t, level = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel
    t.pre_tokenizer, t.decoder = level(add_prefix_space=False), decoders.ByteLevel()
    options = dict(vocab_size=size, special_tokens=["<s>"], initial_alphabet=level.alphabet())
    t.train_from_iterator(texts, trainers.BpeTrainer(**options))
    if bos:
        t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=t, bos_token=bos, eos_token="<s>", pad_token="<s>")


def spm_like():
    """A tokenizer that, as Llama-2's, puts "▁" before a text: " A" alone is two tokens, "▁" and "▁A"."""
    letters = "".join(chr(c) for c in range(33, 127)) + "\n"
    vocab = {w: i for i, w in enumerate(["<s>", "<unk>", "▁", *letters, "▁A", "▁B", "▁C", "▁D"])}
    t = Tokenizer(models.BPE(vocab, [("▁", x) for x in "ABCD"], unk_token="<unk>"))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=t, bos_token="<s>", eos_token="<s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def mmlu():
    """Two forget and one retain subject, made-up questions; one option reads "None", one is long."""

    def ask(s, i):
        options = [f"one {i}", "None", f"a much longer third {s} {i}", "4"]
        return f" Which {s} is number {i}?" + " Think." * i, options, i % 4

    names = ("high_school_biology", "college_biology", "astronomy")
    return {s: ([ask(s, i) for i in range(5)], [ask(s, i) for i in range(5, 11)]) for s in names}


def write_csvs(folder, mmlu, split="test"):
    """MMLU as load_mmlu returns it, written as the original CSVs."""
    for subject, parts in mmlu.items():
        for kind, rows in zip(("dev", split), parts):
            path = folder / kind / f"{subject}_{kind}.csv"
            path.parent.mkdir(exist_ok=True, parents=True)
            with open(path, "w", newline="") as f:
                csv.writer(f).writerows([q, *choices, "ABCD"[answer]] for q, choices, answer in rows)
