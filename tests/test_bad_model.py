"""Models and flags that cannot be used get one line, fault and remedy, and nothing is written; and the kinds
of models that can be used are used as they themselves compute."""

import json
import shutil

import pytest
import torch
from conftest import WORLD, toy_model
from safetensors.torch import load_file, save_file
from test_scripts import refused

import common


def edit_json(name, **changes):
    def change(folder):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def edit_weights(change):
    def damage(folder):
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def write(name, text):
    return lambda folder: (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def foreign_tokenizer(folder):
    path = folder / "tokenizer.json"
    facts = json.loads(path.read_text())
    facts["model"]["vocab"] |= {f"new{i}": len(facts["model"]["vocab"]) + i for i in range(5)}
    path.write_text(json.dumps(facts))


def small_tokenizer(folder):
    path = folder / "tokenizer.json"
    facts = json.loads(path.read_text())
    facts["model"]["vocab"] = dict(sorted(facts["model"]["vocab"].items(), key=lambda item: item[1])[:20])
    path.write_text(json.dumps(facts | {"added_tokens": facts["added_tokens"][:1]}))


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def remote_code(folder):
    """A checkpoint that brings its own code, which would write a file when it is run."""
    (folder / "modeling_own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Own: pass\n")
    auto = {"AutoConfig": "modeling_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    edit_json("config.json", model_type="own", auto_map=auto)(folder)


CHECKPOINTS = [  # what is done to a checkpoint, what the line says
    (shutil.rmtree, "no such directory"),
    (truncated, "cannot be loaded"),
    (foreign_tokenizer, "tokenizer has"),
    (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    (write("config.json", "{"), "cannot be loaded"),
    (edit_weights(lambda w: w.update({k: v.to(torch.int8) for k, v in w.items()})), "in I8"),
    (edit_weights(lambda w: w["model.norm.weight"].__setitem__(3, float("inf"))), "NaN or infinity"),
    (edit_weights(lambda w: w.pop("model.layers.0.mlp.up_proj.weight")), "1 weights missing"),
    (edit_json("config.json", num_hidden_layers=1), "config.json says 1 layers"),
    (edit_json("config.json", num_hidden_layers=99), "weights missing"),
    (edit_json("config.json", hidden_size=32), "cannot be loaded"),
    (edit_json("config.json", model_type="hope"), "cannot be loaded"),
    (edit_json("config.json", quantization_config={"quant_method": "gptq"}), "quantized"),
    (edit_json("config.json", max_position_embeddings=32), "context is 32 tokens"),
    (edit_json("config.json", model_type="bert", architectures=["BertLMHeadModel"]), "weights missing"),
    (edit_json("config.json", model_type="t5", architectures=["T5ForConditionalGeneration"]), "cannot be"),
    (write("config.json", "[]"), "cannot be loaded"),
    (write("config.json", b"\xff\xfe\x00"), "cannot be loaded"),
    (write("tokenizer.json", "{"), "cannot be loaded"),
    (write("model.safetensors", b""), "cannot be loaded"),
    (write("args.json", "{"), "args.json cannot be read"),
    (write("args.json", ""), "args.json cannot be read"),
    (write("args.json", b"\x80\x81"), "args.json cannot be read"),
    (write("args.json", "[1]"), "args.json cannot be read"),
    (write("adapter_config.json", "{}"), "LoRA adapter"),
    (small_tokenizer, "tokenizer has"),
    (pickled, "pickles"),
    (remote_code, "cannot be loaded"),
]


@pytest.mark.parametrize("damage, says", CHECKPOINTS)
def test_a_checkpoint_that_cannot_be_used(tmp_path, damage, says, capsys):
    folder = tmp_path / "ckpt"
    shutil.copytree(WORLD / "base", folder)
    damage(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    flags = ("--tiny", "--model", folder, "--out", tmp_path / "out")
    refused(capsys, "random_mapping", *flags, says=says, out=tmp_path / "out")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


FLAGS = [
    ("rmat", ("--alpha", "nan"), "nan or inf"),
    ("rmat", ("--alpha", "inf"), "nan or inf"),
    ("rmat", ("--seed", -1), "--seed"),
    ("rmat", ("--save-every", -1), "--save-every"),
    ("rmat", ("--save-every", "nan"), "nan or inf"),
    ("rmat", ("--vary", "weather"), "--vary"),
    ("mlac_ar", ("--hold", "nan"), "nan or inf"),
    ("random_mapping", ("--lr", "nan"), "nan or inf"),
    ("baselines", ("--steer", "inf"), "nan or inf"),
    ("baselines", ("--method", "rmu", "--layer", 70), "--layer 70"),
    ("adv_probes", ("--probe-width", 10**9), "--probe-width"),
    ("random_mapping", ("--tokens", 100000), "context is"),
    ("random_mapping", ("--forget", "a.txt"), "--forget goes with --retain"),
    *[
        ("random_mapping", ("--device", name), "auto, cuda, cuda:N or cpu")
        for name in ("gpu", "mps", "meta", "", "tpu", "gpu0", "cuda:x")
    ],
    ("random_mapping", ("--model", ""), "no such directory"),
    ("random_mapping", ("--model", "/nowhere"), "no such directory"),
    ("random_mapping", ("--model", WORLD / "chunks.jsonl"), "no such directory"),
    ("recover", ("--ckpt", WORLD / "base", "--base", "/nowhere"), "--base /nowhere: no such directory"),
    ("recover", ("--ckpt", WORLD / "base", "--lora", 4, "--steps", 0), "--steps"),
]


@pytest.mark.parametrize("script, flags, says", FLAGS)
def test_flags_that_cannot_be_used(tmp_path, script, flags, says, capsys):
    refused(capsys, script, "--tiny", *flags, "--out", tmp_path / "out", says=says, out=tmp_path / "out")


def test_what_a_file_says_cannot_control_the_terminal(capsys):
    with pytest.raises(SystemExit):
        common.fail("a \x1b[2Jname \x07from\x9b a\n file")
    error = capsys.readouterr().err
    assert error.rstrip("\n").isprintable() and r"\x1b[2Jname \x07from\x9b a file" in error


def test_log_probabilities_that_are_nan_are_no_answers(capsys):
    """Always answering A would look like successful unlearning. The weights themselves are finite here."""
    model = toy_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(3e38)
    with pytest.raises(SystemExit):
        list(common.score_rows(model, [common.Row(0, [1, 2, 3], 1, [[4, 5]])]))
    assert "log-probabilities are NaN or infinite" in capsys.readouterr().err


USABLE = {
    "llama": {}, "mistral": dict(num_key_value_heads=1), "qwen2": dict(num_key_value_heads=1), "gpt_neox": {},
    "gemma2": {}, "qwen3": dict(num_key_value_heads=1, head_dim=8), "gemma": dict(head_dim=8), "phi3": {},
    "olmo2": {}, "granite": dict(logits_scaling=8.0), "cohere": dict(logit_scale=0.0625),
}  # fmt: skip


@pytest.mark.parametrize("kind", USABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_the_models_own(kind, dtype):
    more = {} if kind in ("llama", "gpt_neox") else {"num_key_value_heads": 1}
    model = toy_model(kind, dtype=dtype, **more | USABLE[kind])
    ids = torch.arange(1, 21).view(2, 10)
    with torch.inference_mode():
        hidden = model.base_model(ids, use_cache=False).last_hidden_state
        ours, own = common.logits(model, hidden), model(ids, use_cache=False).logits.float()
    assert torch.allclose(ours, own, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-2)
    common.check_forward(model, "--model x")


OTHERS = {
    "bert": {}, "mamba": {}, "bloom": dict(n_head=2), "opt": dict(ffn_dim=32, word_embed_proj_dim=16),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_kinds_that_are_computed_otherwise_are_refused_by_name(kind, capsys):
    with pytest.raises(SystemExit):
        common.check_forward(toy_model(kind, **OTHERS[kind]), "--model x")
    error = capsys.readouterr().err.strip()
    assert kind in error.lower() and "is not supported" in error and "\n" not in error
