"""What the scripts share, in sections: runs and checkpoints, several GPUs, data, losses, optimizer for bf16,
log-probabilities. No method is here, no hyperparameter, no flag. 3.2, A.1 and so on are sections of *Toward
Robust Unlearning for LLMs* (Tamirisa et al., 2024). Everything random is a function of (seed, purpose, step),
not of earlier draws."""

import atexit
import csv
import fcntl
import hashlib
import io
import json
import math
import os
import platform
import re
import resource
import shutil
import signal
import sys
import time
import warnings
import weakref
from collections import defaultdict, namedtuple
from datetime import timedelta
from functools import cache, partial
from itertools import chain
from pathlib import Path

import datasets
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import transformers
import zstandard
from pyarrow import parquet
from torch.distributed.checkpoint import state_dict as full_state
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, masking_utils


def say(line):
    """Prints a line at once; under torchrun only the first process does."""
    if not int(os.environ.get("RANK", 0)):
        print(line, flush=True)


class NotFinite(SystemExit):
    """The end of a program whose weights or losses became NaN or infinite."""


def fail(message, kind=SystemExit):
    """Ends the program with exit status 2 and one line: the fault and its remedy."""
    if not int(os.environ.get("RANK", 0)):
        print(f"{Path(sys.argv[0]).name}: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    raise kind(2) from ValueError(message)


def seed_of(*key):
    """A 63-bit seed from a key such as (seed, purpose, step), the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


def generator(device, *key):
    """A torch.Generator on `device`, seeded by `key`; None on meta, where nothing is drawn."""
    meta = torch.device(device).type == "meta"
    return None if meta else torch.Generator(device).manual_seed(seed_of(*key))


def read_json(path):
    """The object in a JSON file; {} if there is no file."""
    return json.loads(Path(path).read_text()) if Path(path).is_file() else {}


def write_json(path, value):
    """Writes `value` completely or not at all; of several ranks the first does."""
    if not rank():
        draft = Path(f"{path}.{os.getpid()}.draft")
        draft.write_text(json.dumps(value, indent=1) + "\n")
        draft.replace(path)


def resolved(path, folder):
    """A path out of the args.json in `folder`, which is relative to it; a hub name unchanged."""
    full = os.path.realpath(os.path.join(folder, path or ""))
    return full if path and os.path.exists(full) else path


# ---- runs and checkpoints ------------------------------------------------------------------------------


def load_model(name, dtype="auto", device="auto", flag="--model", meta=False):
    """A causal language model, in eval mode, and its tokenizer; one that cannot be used ends the program.

    name   checkpoint directory (ours or any that save_pretrained wrote) or hub name
    dtype  "auto": bfloat16 on a GPU, float32 on the CPU; or a torch dtype's name
    meta   on the meta device, from the config alone, no tokenizer; above 2 G parameters as if on a GPU,
           unless device is "cpu"
    """
    folder, cuda, asked = Path(name), torch.cuda.is_available(), device
    if not folder.is_dir() and (name.count("/") != 1 or name[0] in "./~" or Path(folder.parts[0]).exists()):
        fail(f"{flag} {name}: no such directory; give a checkpoint directory or a hub name (owner/model)")
    if (folder / "state").is_dir() and not (folder / "args.json").exists():
        fail(f"{flag} {name}: this run was cut off; rerun its command first")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device) or "cuda" in device and not (cuda or meta):
        fail(f"--device {device}: give auto, cpu, cuda or cuda:N, and that where torch sees a GPU")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="torch.distributed.checkpoint")  # that there is one process
    masking_utils.find_packed_sequence_indices = lambda position_ids: None  # it makes the host wait for a GPU
    try:
        device = torch.device(("cuda" if cuda else "cpu") if device == "auto" else device)
        connect(device)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name))
        gpu = device.type == "cuda" or meta and asked != "cpu" and model.num_parameters() > 2e9
        dtype = getattr(torch, dtype if dtype != "auto" else "bfloat16" if gpu else "float32")
        if meta:
            return model.to(dtype).eval(), None
        tokenizer, options = AutoTokenizer.from_pretrained(name), dict(dtype=dtype, use_safetensors=True)
        info = {"missing_keys": (), "unexpected_keys": ()}
        if rank() == 0:  # the others get their shares of the weights from it
            model, info = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **options)
        model = shard(model, dtype, device) if ranks() > 1 else model.to(device)
    except Exception as error:  # transformers, safetensors and the hub raise some twenty kinds
        licence = "" if folder.is_dir() else "; gated? accept the licence on its page and run `hf auth login`"
        fail(f"{flag} {name}: cannot be loaded ({type(error).__name__}: {str(error):.300}){licence}")
    layers = next(key for key, module in model.named_modules() if module is decoder_layers(model))
    unused = [key for key in info["unexpected_keys"] if f"{layers.rpartition('.')[2]}." in key]
    unused = [key for key in unused if not re.search(r"vision|audio|inv_freq|masked_bias|att\w+\.bias", key)]
    if lacking := [*info["missing_keys"], *unused]:
        what = f"config.json and weights differ in {len(lacking)} tensors ({min(lacking)}, ...)"
        fail(f"{flag} {name}: {what}; complete the download, or correct config.json")
    return model.eval(), tokenizer  # and so it trains: dropout is not a function of (seed, step)


def decoder_layers(model):
    """The L decoder layers of the text model, a ModuleList (model.layers, gpt_neox.layers, transformer.h)."""
    depth = model.config.get_text_config().num_hidden_layers
    for module in model.get_decoder().modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == depth:
            return module
    fail(f"{type(model).__name__}: no list of {depth} decoder layers; use a decoder-only language model")


def recompute(model, every=1):
    """From now on backward passes compute each `every`-th decoder layer again, and hold only its input."""
    for layer in decoder_layers(model)[::every]:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


# flags that do not change the result
FREE = {"out", "device", "log_every", "save_every", "only", "shard", "search", "recompute_every"}


def all_steps(steps, *state):
    """1 .. steps: what a method does by itself, see Run.steps_left."""
    return range(1, steps + 1)


def no_log(*_, **__):
    """Logs nothing: what a method does by itself, see Run.log."""


def peak_bytes():
    """Peak bytes so far: GPU memory allocated if there is a GPU, else resident memory of this process."""
    resident = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident


class Run:
    """One run of a script: loads model and data, logs, saves, and writes the checkpoint directory args.out.

    OUT/args.json  written last: a directory that has one is finished
    OUT/state/     until then: run.json, the arguments, and the last save, PHASE-STEP/, from which the same
                   command continues; the result is bit-identical to that of an uninterrupted run

    With args.dry_run the same calls run the script on the meta device (tensors with shapes and no data) while
    its memory is counted; `save` prints that and ends the program.
    """

    def __init__(self, args):
        self.args, self.out, self.state = args, Path(args.out), Path(args.out) / "state"
        self.start = self.last_saved = time.time()
        self.chunks, self.saved, self.stop, self.clock = None, None, 0, {}
        self.live, self.between = None, 0  # of a dry run: LiveBytes; bytes held between steps
        for flag, x in vars(args).items():
            if isinstance(x, (int, float)) and x < 0 and flag != "seed":
                fail(f"--{flag.replace('_', '-')} {x}: starts at 0")
        if args.dry_run:
            return
        if (self.out / "args.json").exists():
            fail(f"--out {self.out} is a finished run; choose another --out, or delete that directory first")
        begun, now = read_json(self.state / "run.json"), json.loads(json.dumps(vars(args)))
        if other := [k for k in now if begun and begun.get(k) != now[k] and k not in FREE]:
            flag = other[0].replace("_", "-")
            fail(f"--out {self.out} was begun with another --{flag}; choose another --out, or delete it")
        if not begun and self.out.exists() and (self.out.is_file() or {*os.listdir(self.out)} - {"state"}):
            fail(f"--out {self.out}: not empty, and no run was cut off there; choose another --out")

    def load(self, name, flag="--model"):
        """The model of a checkpoint directory or hub name, with activation checkpointing on a GPU
        (of every layer, or as --recompute-every says)."""
        args, self.name = self.args, name
        self.base = resolved(read_json(Path(name) / "args.json").get("base"), name) or name
        self.model, self.tokenizer = load_model(name, args.dtype, args.device, flag, meta=args.dry_run)
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if args.tokens > (context or math.inf):
            fail(f"--tokens {args.tokens}: {flag} {name} reads {context}; lower --tokens")
        as_on_gpu = args.dry_run and args.device != "cpu" and self.model.num_parameters() > 2e9
        self.gpu = self.model.device.type == "cuda" or as_on_gpu
        if self.gpu and args.recompute_every:
            recompute(self.model, args.recompute_every)
        self.model.micro_batch = args.micro_batch
        self.size = sum(p.numel() * p.element_size() for p in self.model.parameters())
        return self.model

    def stream(self, purpose, batch, texts=None):
        """A Stream in batches of `batch` texts: of `texts`, or of the side of args.data that `purpose` names
        (or args.forget, args.retain). In a dry run the same meta tensors at every step."""
        args = self.args
        if batch % ranks():
            fail(f"--batch: {batch} texts of the {purpose} set for {ranks()} processes; give a multiple")
        if args.dry_run:
            ids = torch.empty(batch // ranks(), args.tokens, dtype=torch.int64, device="meta")
            return defaultdict(lambda: (ids, ids.bool()))  # [i] is the same for every i
        if own := texts is None and getattr(args, purpose, None):
            forget = getattr(args, "forget", None)
            if forget and os.path.realpath(forget) == os.path.realpath(args.retain or ""):
                fail("--forget and --retain are the same texts; give others to keep")
            texts = texts_of(read_table(own, f"--{purpose}"), own, f"--{purpose}")
        elif texts is None:
            if hasattr(args, "forget") and (args.forget or args.retain):
                fail("--forget goes with --retain; give both, or --data")
            self.chunks = self.chunks or load_chunks(args.data)
            texts = self.chunks[purpose == "retain"]
        return Stream(texts, self.tokenizer, batch, args.tokens, args.seed, purpose, self.model.device)

    def begin(self, tokens):
        """Before the training: makes the directory, prints what runs where (tokens: per step), finds the last
        save. In a dry run memory is counted from here on."""
        if self.args.dry_run:
            self.live = LiveBytes([*self.model.parameters(), *self.model.buffers()]).__enter__()
            return
        try:
            self.state.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fail(f"--out {self.out}: cannot be made ({error}); choose another --out")
        lost = not rank() and (not lock(self.state / "lock") or (self.out / "args.json").exists())
        if summed(torch.tensor(float(lost))):  # on all ranks
            fail(f"--out {self.out}: another process is writing there, or has finished; choose another --out")
        marks = self.state.glob("*/.metadata")  # which is written last; half-deleted saves may have it
        last = max(marks, key=lambda file: file.stat().st_mtime, default=None)
        self.saved = last and last.parent
        barrier()
        if not rank():
            write_json(self.state / "run.json", vars(self.args))
            log = self.out / "metrics.jsonl"
            shutil.copy(self.saved / log.name, log) if self.saved else log.write_text("")
            if lines := log.read_text().splitlines():  # seconds go on from there
                self.start -= json.loads(lines[-1])["seconds"]
        n, where = self.model.num_parameters() / 1e6, f"{ranks()} x {self.model.device}"
        say(f"{self.name} | {n:.2f} M parameters | {self.model.dtype} | {where} | {tokens} tokens per step")

    def steps_left(self, steps, *state, phase="step"):
        """Yields the steps to do: 1 .. steps, or those left where the run was cut off before.

        state  lists of tensors that, beside the weights that train, the next step depends on
        phase  of the run, as for `log`

        Saves every --save-every minutes, at the end of the phase, and on SIGINT or SIGTERM, then exits.
        """
        lists = [[p for p in self.model.parameters() if p.requires_grad], *state]
        tensors = {f"{n}.{j}": x.detach() for n, xs in enumerate(lists) for j, x in enumerate(xs)}
        every, done = 60 * self.args.save_every, 0
        if self.args.dry_run:  # a second step may hold what is left of the first; more steps hold no more
            yield from range(1, min(steps, 2) + 1)
            return
        need = self.size + bool(every) * 2 * ranks() * sum(local(x).nbytes for x in tensors.values())
        if shutil.disk_usage(self.out).free < need:
            fail(f"--out {self.out}: needs {need / 1e9:.1f} GB of disk (less with --save-every 0); free some")
        if self.saved:
            saved_phase, _, step = self.saved.name.rpartition("-")
            if saved_phase != phase:  # a later one: this phase is over
                return
            dcp.load(tensors, checkpoint_id=self.saved)
            done, self.saved = int(step), None
            say(f"continues after {phase} {done} of {steps}")
        signals = (signal.SIGINT, signal.SIGTERM) if every else ()
        before = [signal.signal(n, lambda n, _: setattr(self, "stop", n)) for n in signals]
        try:
            for i in range(done + 1, steps + 1):
                yield i
                wishes = torch.tensor([self.stop, i == steps or 0 < every < time.time() - self.last_saved])
                if ranks() > 1:
                    dist.all_reduce(wishes, dist.ReduceOp.MAX)
                stop, save = wishes.tolist()
                if stop or save:
                    check_finite(f"{i} (weights)", *(local(p).detach().sum() for p in lists[0]))
                if every and (stop or save):
                    self.save_state(tensors, self.state / f"{phase}-{i}")
                if stop and i < steps:
                    say(f"stopped after {phase} {i} of {steps}; rerun the same command to continue")
                    raise SystemExit(128 + stop)
        finally:
            for n, handler in zip(signals, before):
                signal.signal(n, handler)

    def save_state(self, tensors, folder):
        """Saves the tensors, and the log so far, completely or not at all; then drops the save before."""
        if not rank():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            shutil.copy(self.out / "metrics.jsonl", folder)
        barrier()
        self.last_saved = time.time()
        try:
            dcp.save(tensors, checkpoint_id=folder)
        except (OSError, dcp.api.CheckpointException) as error:  # a full disk costs this save, not the run
            return say(f"{folder} could not be written ({str(error):.100}); the save before is kept")
        for old in {*self.state.glob("*-*")} - {folder} if not rank() else ():
            shutil.rmtree(old)

    def phase(self, phase="step"):
        """Arguments `log` and `steps_left` of a method that is this phase of the run."""
        return {"log": partial(self.log, phase=phase), "steps_left": partial(self.steps_left, phase=phase)}

    def log(self, step, steps, phase="step", norms=(), **values):
        """Every --log-every steps and at the last one: an object in metrics.jsonl and a line on the screen.

        norms   of the gradients of forget and retain loss; logged is `balance`, their ratio
        values  numbers or 0-d tensors; copied from the device here and only here
        """
        if self.live:
            self.between = max(self.between, self.live.now)
            return
        first, start = self.clock.setdefault(phase, (step, time.time()))
        if step % self.args.log_every and step != steps:
            return
        values = {k: float(summed(v) if isinstance(v, torch.Tensor) else v) for k, v in values.items()}
        if norms:
            values["balance"] = float(whole(norms[0])) / max(float(norms[1]), 1e-9)
        self.write(phase=phase, step=step, **values)
        shown = " | ".join(f"{k} {v:.3f}" for k, v in values.items())
        pace = (time.time() - start) / max(step - first, 1)
        more = f"{pace:.2f} s/step | {peak_bytes() / 1e9:.1f} GB | eta {pace * (steps - step) / 60:.1f} min"
        say(f"{phase} {step}/{steps} | {shown} | {more}")
        if step == steps and norms and not rank():
            logged = map(json.loads, (self.out / "metrics.jsonl").read_text().splitlines())
            if max(x["balance"] for x in logged if x["phase"] == phase) < 0.05:
                say(f"{phase}: balance stayed under 0.05: this only fine-tunes; give the forget loss weight")

    def write(self, **values):
        """Appends one object, with the seconds since the start, to metrics.jsonl."""
        if not rank():
            with open(self.out / "metrics.jsonl", "a") as f:
                f.write(json.dumps({**values, "seconds": round(time.time() - self.start, 2)}) + "\n")

    def save(self, phase="", weights=True, **facts):
        """Writes weights and tokenizer as save_pretrained does, config.json last, and then args.json: it says
        that the checkpoint is complete. A dry run ends here.

        phase  name of a part of the run that is over: a checkpoint of its own, OUT/PHASE
        facts  what later stages need to know, beside what is listed below
        """
        args, folder, draft, state_dict = self.args, self.out / phase, self.state / "draft", None
        if args.dry_run and not phase:
            self.live.__exit__(None, None, None)
            raise SystemExit(self.report())
        if args.dry_run or phase and self.saved or (folder / "args.json").exists():  # it was over before
            return
        if weights and ranks() > 1:
            options = full_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
            state_dict = full_state.get_model_state_dict(self.model, options=options)
            state_dict = {k: x for k, x in state_dict.items() if k not in self.model.all_tied_weights_keys}
        if weights and not rank():
            shutil.rmtree(draft, ignore_errors=True)
            self.model.save_pretrained(draft, state_dict=state_dict)
            self.tokenizer.save_pretrained(draft)
            folder.mkdir(exist_ok=True)
            for file in sorted(draft.iterdir(), key=lambda file: file.name == "config.json"):
                file.replace(folder / file.name)
            os.sync()
        own = {k: getattr(args, k) for k in ("base", "data", "retain", "recovery", "mmlu") if k in args}
        names = {"parent": self.name, "base": self.base} | own
        here = os.path.realpath(folder)  # a link may have led to it
        names = {k: os.path.relpath(x, here) if x and os.path.exists(x) else x for k, x in names.items()}
        device = torch.cuda.get_device_name() if self.gpu else platform.machine()
        barrier()  # every rank has looked for args.json
        write_json(folder / "args.json", {
            "script": Path(sys.argv[0]).name, "phase": phase, "arguments": vars(args), **names, **facts,
            "tiny": args.tiny, "device": f"{ranks()} x {device}", "dtype": str(self.model.dtype)[6:],
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "seconds": round(time.time() - self.start, 1), "peak_bytes": peak_bytes(),
        })  # fmt: skip
        if not phase and not rank():
            shutil.rmtree(self.state)
        barrier()

    def report(self):
        """Prints what a dry run counted, under torchrun for one of its GPUs; returns 1 if it does not fit."""
        n, peak, layers = ranks(), self.live.peak, decoder_layers(self.model)
        if n > 1:  # weights, moments, a gradient are sharded; two layers and what is outside are gathered
            others = sum(p.nbytes for layer in layers[2:] for p in layer.parameters())
            peak += 2 * (self.size - others) - (self.between + self.size) * (1 - 1 / n)
        sizes = self.size / n, self.between / n, peak, HostCopy.reserved / n
        for what, size in zip(("weights", "between steps", "peak", "host copies"), sizes):
            say(f"{what:15}{size / 1e9:9.3f} GB")
        host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") - 1e9  # Python and torch
        gpu = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else math.inf
        needs = [("host", HostCopy.reserved + self.size, host), ("GPU", peak + 1.5e9, gpu)]
        needs = needs if self.gpu else [("host", peak, host)]
        short = [f"{x / 1e9:.1f} GB of {what} memory, has {y / 1e9:.1f}" for what, x, y in needs if x > y]
        unknown = ", as far as host memory goes; there is no GPU here" if self.gpu and gpu == math.inf else ""
        how = f"{str(self.model.dtype)[6:]}, as on a {'GPU' if self.gpu else 'CPU'}"
        say(f"{how}: it does not fit here: needs {', '.join(short)}" if short else f"{how}: it fits{unknown}")
        return int(bool(short))


class LiveBytes(TorchDispatchMode):
    """Inside, counts the bytes of live tensors on any device: `now` and, the most so far, `peak`."""

    def __init__(self, tensors):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, set()
        self.add(tensors)

    def add(self, tensors):
        for x in tree_leaves(tensors):
            storage = x.untyped_storage() if isinstance(x, torch.Tensor) else None
            if storage and storage._cdata not in self.known:  # once, however many tensors are views of it
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.drop, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)

    def drop(self, key, size):
        self.now -= size
        self.known.discard(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.add(result := function(*args, **(kwargs or {})))
        return result


def lock(path, files=[]):  # noqa: B006
    """Takes the lock file `path` for as long as this process lives; False if another process has it."""
    files.append(open(path, "a"))
    try:
        return fcntl.flock(files[-1], fcntl.LOCK_EX | fcntl.LOCK_NB) is None
    except BlockingIOError:
        return False


# ---- several GPUs --------------------------------------------------------------------------------------
#
# torchrun starts a process, called a rank, per GPU. FSDP2 shards weights, gradients and moments over them by
# rows, as DTensors. Each rank computes its rows of every batch, and its share of every loss: the shares add
# up, and so do their gradients. Rank 0 alone prints and writes.


def connect(device):
    """Makes `device` the current one and joins the processes that torchrun started, if it did."""
    if device.type == "cuda" and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", device.index or 0)))
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group(timeout=timedelta(hours=1))
        atexit.register(dist.destroy_process_group)
        atexit.register(time.sleep, 0.1)  # gloo's threads take the GIL to free tensors: too late, they abort


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def ranks():
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    return dist.barrier() if ranks() > 1 else None


def local(x):
    """The rows of a tensor that this rank has, an alias; all of them if it is no DTensor."""
    return x.to_local() if hasattr(x, "to_local") else x


def whole(x):
    """A DTensor's rows of all ranks; another tensor unchanged."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def like(full, x):
    """`full`, which every rank has, sharded as x is."""
    return distribute_tensor(full, x.device_mesh, x.placements, src_data_rank=None) if ranks() > 1 else full


def shard(source, dtype, device):
    """A model like `source`, sharded layer by layer, with the weights that `source` has on rank 0."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(source.config, dtype=dtype)
    mesh = dist.init_device_mesh(device.type, (ranks(),))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.promote_types(dtype, torch.float32))
    for module in (*decoder_layers(model), model):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        module.set_gradient_divide_factor(1.0)  # shares of a loss: their gradients are summed
        module.set_force_sum_reduction_for_comms(True)
    model.to_empty(device=device)
    model.tie_weights()
    model.generation_config = source.generation_config
    options = full_state.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    full_state.set_model_state_dict(model, {} if rank() else source.state_dict(), options=options)
    for buffer, x in zip(model.buffers(), source.buffers()):  # some are not in the state dict
        dist.broadcast(x := torch.empty_like(buffer) if x.is_meta else x.to(device), 0)
        buffer.copy_(x)
    return model


def summed(x):
    """The sum of a tensor over the ranks, without gradient; a DTensor is one over all ranks already."""
    x = x.detach()
    if ranks() > 1 and not hasattr(x, "full_tensor"):
        dist.all_reduce(x := x.clone())
    return whole(x)


def sum_gradients(params):
    """Sums up the gradients of parameters that every rank has whole; FSDP2 does it for the others."""
    for p in params if ranks() > 1 else ():
        if p.grad is not None and not hasattr(p, "to_local"):
            dist.all_reduce(p.grad)


# ---- data ----------------------------------------------------------------------------------------------


KINDS = (".parquet", ".csv", ".jsonl", ".zst", ".json", ".txt")


def read_file(path):
    """Yields the rows of a file as dicts; of a .txt its paragraphs, as `text`. Unlike `datasets` it takes the
    path literally, and numbers or dates in strings stay strings."""
    if path.suffix == ".parquet":
        return (yield from named(datasets.Dataset(parquet.ParquetFile(path).read())))
    with open(path, "rb") as f:
        if path.suffix == ".zst":
            f = zstandard.ZstdDecompressor().stream_reader(f, read_across_frames=True)
        f = io.TextIOWrapper(f, "utf-8-sig", newline="" if path.suffix == ".csv" else None)
        if path.suffix == ".csv":
            csv.field_size_limit(1 << 30)
            for row in csv.DictReader(f):
                if None in row:
                    fail(f"{path}: more cells than columns; quote texts with commas: {row[None][0]:.60}")
                yield row
        elif path.suffix == ".txt":
            yield from ({"text": x} for x in re.split(r"\n\s*\n", f.read()) if x.strip())
        elif path.suffix == ".json":  # a list of objects, or one or more objects
            text = re.sub(r"}\s*\n\s*{", "},{", f.read().strip())
            yield from json.loads(text if text[:1] == "[" else f"[{text}]")
        else:
            yield from (json.loads(line) for line in f if line.strip())


def named(rows):
    """Rows of a datasets.Dataset, as dicts, with the names of classes in place of their numbers."""
    names = {k: f.names for k, f in (rows.features or {}).items() if hasattr(f, "names")}
    for row in rows:
        yield row | {k: names[k][row[k]] for k in names if row[k] is not None}


def read_table(source, flag, columns=(), config=None, split="train", streaming=False):
    """Rows, as dicts, one by one: of a local file or folder of parquet, csv, txt, jsonl, jsonl.zst or json,
    of a folder that save_to_disk wrote, or else of a dataset on the hub.

    columns    that must be there
    config     of a hub's dataset, or the subfolder of its local clone
    split      of a dataset; in a folder: of the files SPLIT-* if there are any
    streaming  a hub's dataset is not downloaded first
    """
    datasets.disable_progress_bars()
    path = Path(source)
    a_path = path.suffix in (*KINDS, ".zip") or source[:1] in "./~" or Path(path.parts[0]).exists()
    if not source or not path.exists() and a_path:
        fail(f"{flag} {source}: no such file or folder; give another")
    try:
        if not path.exists():
            rows = named(datasets.load_dataset(source, config, split=split, streaming=streaming))
        elif (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            found = datasets.load_from_disk(path)
            rows = named(found[split] if isinstance(found, dict) else found)
        else:
            files = [path] if path.is_file() else sorted(x for x in path.glob("**/[!.]*") if x.is_file())
            kind = next((kind for kind in KINDS if any(x.suffix == kind for x in files)), None)
            if not kind:
                fail(f"{flag} {source}: none of {', '.join(KINDS)}; convert it")
            if len(kinds := {*KINDS[:4]} & {x.suffix for x in files}) > 1:  # others may be beside the data
                fail(f"{flag} {source}: several kinds of files ({', '.join(sorted(kinds))}); give one")
            files = [x for x in files if x.suffix == kind and config in (None, x.parent.name)]
            if len(folders := {os.path.relpath(x.parent, path) for x in files}) > 1:
                fail(f"{flag} {source}: several data sets ({', '.join(sorted(folders))}); give one of them")
            found = [x for x in files if re.match(f"{split}[-.]", x.name)]
            others = [x for x in files if re.match("(train|dev|validation|test)[-.]", x.name)]
            if others and not found and path.is_dir():
                fail(f"{flag} {source}: has no {split}-* files; complete it, or give one of its files")
            rows = chain.from_iterable(map(read_file, found or files))
        first = next(rows, {})
    except Exception as error:  # pyarrow's, the hub's, datasets', json's
        why = error.__cause__ or error
        fail(f"{flag} {source}: cannot be read ({type(why).__name__}: {str(why):.200})")
    if not isinstance(first, dict):
        fail(f'{flag} {source}: its rows have no names; write {{"text": "..."}} for each')
    if missing := [c for c in columns if c not in first]:
        fail(f"{flag} {source}: no column {', '.join(missing)}; it has {', '.join(first) or 'no rows'}")
    return chain([first] if first else [], rows)


def cleaned(text, where):
    """A text without "<s>" or "</s>" spelled out at its ends: by removeprefix, as strip eats letters."""
    text = text.removeprefix("<s>").removesuffix("</s>").strip() if isinstance(text, str) else ""
    return text or fail(f"{where}: no text; correct or drop it")


def texts_of(rows, source, flag):
    """[str], column txt_chunk or else text of rows that read_table read."""
    rows = [*rows]
    have = [*rows[0]] if rows else ["text"]
    if {"txt_chunk", "label"} <= {*have}:
        fail(f"{flag} {source}: these chunks have labels; give them as --data")
    column = next((x for x in ("txt_chunk", "text") if x in have), None)
    column or fail(f"{flag} {source}: no column text or txt_chunk; it has {', '.join(have)}")
    say(f"{len(rows):,} texts from {source}, column {column}")
    return [cleaned(row.get(column), f"{flag} {source}: row {i}: {column}") for i, row in enumerate(rows)]


LABELS = {"forget": True, "true": True, "1": True, "retain": False, "false": False, "0": False}


def load_chunks(source):
    """(forget, retain), lists of str, from rows `txt_chunk` (str) and `label`, see LABELS (A.1)."""
    sides = {True: [], False: []}
    for i, row in enumerate(read_table(source, "--data", ("txt_chunk", "label"))):
        label, where = str(row.get("label")).lower(), f"--data {source}: row {i}"
        if label not in LABELS:
            fail(f"{where}: label is {label:.40}; needs true or false, 1 or 0, forget or retain")
        sides[LABELS[label]].append(cleaned(row.get("txt_chunk"), f"{where}: txt_chunk"))
    say(f"{len(sides[True]):,} forget, {len(sides[False]):,} retain texts from {source}")
    return sides[True], sides[False]


def bos(tokenizer):
    """[BOS id] if this tokenizer starts a text with one, else []."""
    return tokenizer("a").input_ids[:1] if tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id] else []


class Stream:
    """Batches of `batch` texts: stream[i] is the batch of step i (from 0), a function of (seed, purpose, i);
    on several GPUs every n-th row of it. Texts are cut to `tokens` tokens, BOS included.

    Every epoch has a fresh order and drops its last, incomplete batch, so no text occurs twice in a batch.
    Texts are tokenised when first needed: on a GPU that is while the device computes.
    """

    def __init__(self, texts, tokenizer, batch, tokens, seed, purpose, device):
        if len(texts) < batch:
            fail(f"the {purpose} set has {len(texts)} texts and a step needs {batch}; lower --batch (or K)")
        self.texts, self.tokenizer, self.batch, self.tokens = texts, tokenizer, batch, tokens
        self.key, self.device, self.bos = (seed, "order", purpose), device, bos(tokenizer)
        self.encode, self.order = cache(self.encode), cache(self.order)

    def encode(self, j):
        ids = self.tokenizer(self.texts[j], add_special_tokens=False).input_ids
        return torch.tensor((self.bos + ids)[: self.tokens])

    def order(self, epoch):
        return torch.randperm(len(self.texts), generator=generator("cpu", *self.key, epoch)).tolist()

    def __getitem__(self, i):
        """ids (B, T), right-padded with 0 (a causal model needs no attention mask); mask (B, T), true on
        tokens."""
        epoch, place = divmod(i, len(self.texts) // self.batch)
        rows = [self.encode(j) for j in self.order(epoch)[place * self.batch : (place + 1) * self.batch]]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
        both = (x[rank() :: ranks()].contiguous() for x in (ids, mask))  # padded alike on all ranks
        pinned = (x.pin_memory() if torch.device(self.device).type == "cuda" else x for x in both)
        return tuple(x.to(self.device, non_blocking=True) for x in pinned)


# ---- losses --------------------------------------------------------------------------------------------


def mean(x, weight):
    """Mean of x, (x * weight).sum() / weight.sum(), 0-d. weight: of x's shape, or a mask."""
    return (x * weight).sum() / weight.sum().clamp_min(1e-9)  # a text of one token has none to predict


def residual_streams(model, ids):
    """The outputs (B, T, D) of the L decoder layers on ids (B, T): the residual stream before the final norm
    (3.4); the last of `hidden_states` is after it."""
    H = []

    def collect(_, __, out):
        H.append(out[0] if type(out) is tuple else out)

    hooks = [layer.register_forward_hook(collect) for layer in decoder_layers(model)]
    model(input_ids=ids, use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return tuple(H)


def token_losses(model, ids, mask, loss):
    """loss(logits (n, V) float32, targets (n,)) -> (n,) on each next token, (B, T - 1), 0 on pads.

    ids, mask  (B, T) int64, right-padded; (B, T), true on tokens
    """
    logits, targets = model(input_ids=ids, use_cache=False).logits[:, :-1].float(), ids[:, 1:]
    return loss(logits.flatten(0, 1), targets.flatten()).view(targets.shape).masked_fill(~mask[:, 1:], 0)


def next_token_loss(model, ids, mask):
    """L(θ; x): cross-entropy of the next token, nats, mean over unmasked tokens."""
    return mean(token_losses(model, ids, mask, partial(F.cross_entropy, reduction="none")), mask[:, 1:])


def backward(model, loss, *batch, weight=None, factor=1.0, norms=None, then=None):
    """Adds the gradient of factor · loss(model, *batch) to .grad; returns the loss, detached.

    loss    of tensors (B, ...) to a mean in which each row weighs the sum of its `weight`
    batch   goes to `loss` in parts of model.micro_batch rows (0: at once), activations of one in memory
    weight  (B, ...); None: batch is ids and mask, every token but the first weighs 1
    norms   a list, to which the norm of the added gradient is appended (estimated, see gradient_sample)
    then    takes each parameter's gradient as soon as it is complete (by then every operation that used the
            parameter has been differentiated; on several GPUs: at the end) and leaves None in .grad

    On several GPUs the loss is this one's share: the sum of the shares is the mean over the whole batch.
    """
    weight = batch[1][:, 1:] if weight is None else weight
    parts = [*zip(*(x.split(model.micro_batch or len(weight)) for x in (weight, *batch)))]
    params, hooks = [p for p in model.parameters() if p.requires_grad and then], []
    total, value = summed(weight.sum()).clamp_min(1e-9), 0
    before = None if norms is None else gradient_sample(model)
    for n, (w, *part) in enumerate(parts, 1):
        if n == len(parts) and ranks() == 1:
            hooks = [p.register_post_accumulate_grad_hook(then) for p in params]
        share = loss(model, *part) * (w.sum() / total)
        (factor * share).backward()
        value = value + share.detach()
    for hook in hooks:
        hook.remove()
    for p in params:
        then(p) if p.grad is not None else None
    if norms is not None:
        norms.append(sample_norm(gradient_sample(model) - before))
    return value


def gradient_sample(model):
    """Every 61st element of .grad (prime: no column is left out), the same ones on any number of ranks."""
    parts = []
    for p in (p for p in model.parameters() if p.requires_grad):
        start = rank() and rank() * -(-len(p) // ranks()) * (p.numel() // len(p))  # of this rank's rows
        x = local(p.detach() if p.grad is None else p.grad).flatten()[-start % 61 :: 61]
        parts.append(torch.zeros_like(x) if p.grad is None else x)
    return torch.cat(parts)


def sample_norm(x):
    """The norm, 0-d, of a gradient whose gradient_sample is x."""
    return (61 * summed(x.float().square().sum())).sqrt()


def balancing_weight(model, balance, forget, retain):
    """The factor of a forget loss at which the norm of its gradient is `balance` times that of the retain
    loss, now, 0-d; 1 if balance is 0. forget, retain: (loss, *batch), as for `backward`."""
    norms = []
    for loss, *batch in (forget, retain) if balance else ():
        backward(model, loss, *batch, norms=norms)
    model.zero_grad()
    return balance * norms[1] / norms[0] if balance else 1.0


def check_finite(step, *values):
    """Ends the program if one of these 0-d tensors is NaN or infinite. To be called before the update."""
    total = sum(x.detach().float() for x in values)
    if not total.is_meta and not torch.isfinite(summed(total)):
        fail(f"NaN or infinity at step {step}; try a smaller --lr, with another --out", NotFinite)


# ---- optimizer for bf16 --------------------------------------------------------------------------------


def rounded(x, dtype, seed):
    """x (float32) in `dtype`, stochastically rounded if that is bfloat16, so that the mean over seeds is x.

    Half a step of bf16 at 0.02 is 6e-5: rounded to nearest, most updates of 2e-5 would be lost. The noise is
    a hash of (seed, position): lowbias32 (Wellons, 2018). NaN and infinity are unchanged. seed: 0-d, int32
    """
    if dtype != torch.bfloat16:
        return x.to(dtype)
    h = torch.arange(x.numel(), dtype=torch.int32, device=x.device).view(x.shape) + seed
    h = (h ^ ((h >> 16) & 0xFFFF)) * 0x7FEB352D
    h = (h ^ ((h >> 15) & 0x1FFFF)) * -0x7B935975
    noise = (h ^ (h >> 16)) & 0xFFFF  # bf16 is float32's upper half: add noise to the lower, then clear it
    found = ((x.view(torch.int32) + noise) & -0x10000).view(torch.float32)
    return torch.where(x.isnan(), x, found).to(dtype)  # a NaN of all ones would wrap around to -0.0


def update(p, g, m, v, numbers, seeds, betas, eps):
    """A step of AdamW (Loshchilov & Hutter, 2019) on a tensor, in place; without v, of SGD with momentum β1;
    without m, of SGD.

    numbers  (3,), in whose dtype it is computed: lr / (1 - β1^t), of SGD lr; 1 - β2^t; 1 - lr · decay
    seeds    (3,) int32, of the rounding of p, m and v
    """
    if p.numel() % 16 == 0:
        torch._check(p.numel() % 16 == 0)  # for torch.compile: a kernel of its own, with vectorized loads
    rate, bias, keep = numbers.unbind()
    g, new = g.to(numbers.dtype), p.to(numbers.dtype).mul_(keep)
    if v is not None:
        m_new = m.to(g.dtype).lerp_(g, 1 - betas[0])
        v_new = v.to(g.dtype).mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
        new.addcdiv_(m_new, (v_new / bias).sqrt_().add_(eps).div_(rate), value=-1)
        v.copy_(rounded(v_new, v.dtype, seeds[2]))
    else:
        m_new = g if m is None else m.to(g.dtype).mul_(betas[0]).add_(g)
        new.addcmul_(m_new, rate, value=-1)
    p.copy_(rounded(new, p.dtype, seeds[0]))
    if m is not None:
        m.copy_(rounded(m_new, m.dtype, seeds[1]))


fused = cache(partial(torch.compile, dynamic=True))  # one kernel: one pass over memory instead of twenty


class Optimizer:
    """AdamW, or SGD (without momentum if betas[0] is 0), with decoupled weight decay. Updates are computed in
    float32 or wider and stored as `rounded` does.

    moments   lists of tensors like params: the state; step t = 1 starts from zeros
    wait_for  HostCopy objects: a parameter is updated after their transfers of its row
    t, lr     in calls: the step, from 1; the learning rate. What follows is the key of the rounding
    """

    def __init__(self, params, kind="adamw", betas=(0.9, 0.999), eps=1e-8, decay=0.0):
        self.params, self.adamw = [*params], kind == "adamw"
        self.betas, self.eps, self.decay = betas, eps, decay
        count = 2 if self.adamw else int(betas[0] > 0)
        self.moments = [[torch.zeros_like(p) for p in self.params] for _ in range(count)]
        self.row, self.wait_for = {p: j for j, p in enumerate(self.params)}, ()

    def updates(self, t, lr, *key):
        """A function that updates a parameter which has a gradient, and frees that."""
        first = local(self.params[0])
        rate, dtype = lr / (1 - self.betas[0] ** t if self.adamw else 1), first.dtype
        numbers = [rate, 1 - self.betas[1] ** t, 1 - lr * self.decay]
        numbers = torch.tensor(numbers, dtype=torch.promote_types(dtype, torch.float32))
        mine = (rank(),) if rank() else ()  # shares are rounded independently of each other
        keys = [(*key, j, *mine, 0) for j in range(len(self.params))]
        seeds = torch.tensor([[seed_of(*k, x) >> 33 for x in "pmv"] for k in keys], dtype=torch.int32)
        if first.is_cuda:  # once per step, and nothing waits for it
            numbers, seeds = (x.pin_memory().to(first.device, non_blocking=True) for x in (numbers, seeds))
        compiles = first.is_cuda or dtype == torch.bfloat16 and shutil.which(os.environ.get("CXX", "g++"))
        rule = fused(update) if compiles else update

        @torch.no_grad()
        def apply(p):
            j, g, p.grad = self.row.get(p), p.grad, None
            if g is None or p.is_meta:
                return
            for copy in self.wait_for:
                copy.wait(j)
            for moment in self.moments if t == 1 else ():
                local(moment[j]).zero_()
            flat = [local(x.detach()).view(-1) for x in (p, g, *(moment[j] for moment in self.moments))]
            rule(*(flat + [None, None])[:4], numbers, seeds[j], self.betas, self.eps)

        return apply

    def step(self, t, lr, *key):
        """Updates each parameter that has a gradient, the last layers first, as backward and HostCopy go."""
        apply = self.updates(t, lr, *key)
        for p in reversed(self.params):
            apply(p)


class HostCopy:
    """A copy of tensors in pinned host memory, transferred there (save) and back (load) while the device
    computes: on a stream of its own, each transfer after what was queued before it; what is queued after
    wait(j) starts when tensor j has arrived. On the CPU it is a plain copy; on meta nothing moves."""

    reserved = 0  # bytes of all copies made so far, for the dry run

    def __init__(self, tensors):
        self.tensors, self.arrived = [local(x.detach()) for x in tensors], {}
        self.row, self.copies = {x: j for j, x in enumerate(tensors)}, self.tensors
        cuda, meta = self.tensors[0].is_cuda, self.tensors[0].is_meta
        HostCopy.reserved += sum(x.nbytes for x in self.tensors)
        if not meta:
            self.copies = [torch.zeros_like(x, device="cpu", pin_memory=cuda) for x in self.tensors]
        self.stream = torch.cuda.Stream() if cuda else None

    @torch.no_grad()
    def transfer(self, j, to, source):
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):  # of None: does nothing
            to[j].copy_(source[j], non_blocking=True)
        if self.stream:
            self.arrived[j] = self.stream.record_event()

    def save(self):
        """Copies every tensor to the host, the last first: backward changes those first."""
        for j in reversed(range(len(self.tensors))):
            self.transfer(j, self.copies, self.tensors)

    def load(self, x=None):
        """Copies every tensor back; or the one that was given as x."""
        for j in reversed(range(len(self.tensors))) if x is None else [self.row[x]]:
            self.transfer(j, self.tensors, self.copies)

    def wait(self, j=None):
        """What the device computes from here on starts after the last transfer of tensor j, or of all."""
        for event in [event for k, event in self.arrived.items() if j in (None, k)]:
            torch.cuda.current_stream().wait_event(event)


# ---- log-probabilities ---------------------------------------------------------------------------------


# A text to score: the model at `start` and on predicts n positions of c ids each (c is equal in all rows);
# the key is the caller's, and comes back with the scores.
Row = namedtuple("Row", ("key", "ids", "start", "targets"))


def in_float32(head, inputs, _):
    """A forward hook for an output head: bf16 logits tie."""
    return F.linear(inputs[0].float(), head.weight.float(), None if head.bias is None else head.bias.float())


def score_rows(model, rows, budget=None):
    """Yields (key, log-probabilities (c,) summed over the n positions) of each Row, whatever the other rows.

    The longest token prefix that all rows share is computed once; the rest follows in right-padded batches on
    copies of its cache (pads come after all that is read). budget: tokens per batch, prefix included; None:
    32768 on a GPU, 2048 on the CPU.
    """
    device, rows = model.device, sorted(rows, key=lambda row: len(row.ids))
    budget = (budget or (32768 if device.type == "cuda" else 2048)) * ranks()
    rope, switch = getattr(model.config.get_text_config(), "rope_parameters", None) or {}, math.inf
    if rope.get("rope_type") == "longrope":  # one token past the switch changes the rotation of a whole pass
        switch = rope["original_max_position_embeddings"]
    contexts = [row.ids[: row.start + 1] for row in rows]
    P, past = min(len(os.path.commonprefix(contexts)), min(map(len, contexts)) - 1), []
    if P and len(rows[-1].ids) <= switch:
        cache = DynamicCache()
        model(torch.tensor([contexts[0][:P]], device=device), cache=cache, use_cache=True, logits_to_keep=1)
        past = [(layer.keys, layer.values) for layer in cache.layers if hasattr(layer, "keys")]
    P = P if len(past) == len(decoder_layers(model)) else 0  # 0: a recurrent state is not keys and values
    while rows:
        lengths = [len(row.ids) for row in rows]
        B = max(b for b, n in enumerate(lengths, 1) if b == 1 or b * n <= budget)
        B = sum((n > switch) == (lengths[0] > switch) for n in lengths[:B])  # on one side of the switch
        batch, rows = rows[:B], rows[B:]
        mine = batch[rank() :: ranks()] or batch[:1]  # every rank takes part in every forward pass
        ids = [torch.tensor(row.ids[P:]) for row in mine]
        ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(device)
        cache = DynamicCache([[x.expand(len(mine), -1, -1, -1) for x in pair] for pair in past[: P and None]])
        read = sorted({row.start - P + n for row in mine for n in range(len(row.targets))})  # positions
        kept = torch.tensor(read, device=device)
        with model.get_output_embeddings().register_forward_hook(in_float32):
            passed = model(ids, cache=cache if P else None, use_cache=P > 0, logits_to_keep=kept)
        log_p, found = passed.logits.float().log_softmax(-1), []  # (B, len(read), V)
        for x, row in zip(log_p, mine):
            at = [read.index(row.start - P + n) for n in range(len(row.targets))]
            found.append(x[at].gather(-1, torch.tensor(row.targets, device=device)).sum(0))
        everyone = [torch.stack(found).tolist()] * ranks()
        if ranks() > 1:
            dist.all_gather_object(everyone, everyone[0])
        for n, row in enumerate(batch):
            scores = everyone[n % ranks()][n // ranks()]
            if not all(map(math.isfinite, scores)):  # argmax would answer
                fail("the model's log-probabilities are NaN or infinite: its weights are damaged", NotFinite)
            yield row.key, scores
