"""The AdamW kernel that a GPU would run, without a GPU: torch.compile's Triton source, compiled for an H100
(sm_90) or run in Triton's interpreter and compared with the plain rule. test_optimizer.py runs it in a
process of its own.

    python tests/triton_rule.py 4096                        # prints "ptx" and how many wide loads there are
    TRITON_INTERPRET=1 python tests/triton_rule.py 4096     # prints the largest difference in steps of bf16
"""

import os
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch._inductor.config
import triton
from torch._inductor.async_compile import AsyncCompile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from common import adamw_rule

TARGET, BLOCK = GPUTarget("cuda", 90, 32), 1024
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HEAD = "import triton\nimport triton.language as tl\n"
HEAD += (
    "from torch._inductor.runtime.triton_helpers import libdevice\n"
    if not INTERPRETED
    else (
        "class libdevice:\n    isnan = staticmethod(lambda x: x != x)\n"  # CUDA's own is not interpreted
    )
)


class Driver:
    """What torch asks of a GPU's driver before it writes the source."""

    def get_current_target(self):
        return TARGET


class Kernel:
    """In place of torch's own launcher: compiles a kernel's source, or runs it in the interpreter."""

    def __init__(self, source):
        self.source, folder = source, tempfile.mkdtemp()
        path = Path(folder) / "kernel.py"  # triton reads a function's source from its file
        path.write_text(HEAD + source[source.index("@triton.jit") :])
        scope = {"__name__": "kernel", "__file__": str(path)}
        exec(compile(path.read_text(), str(path), "exec"), scope)
        self.function = next(v for k, v in scope.items() if k.startswith("triton_poi"))

    def run(self, *args, stream=None):
        if INTERPRETED:
            self.function[(triton.cdiv(args[-1], BLOCK),)](*args, XBLOCK=BLOCK)
            return
        signature = eval(re.search(r"'signature': (\{.*?\})", self.source)[1])
        aligned = eval(re.search(r"'configs': \[(\{.*?\})\]", self.source)[1])
        pointers = [i for i, kind in enumerate(signature.values()) if kind[0] == "*"]
        aligned |= {(i,): [["tt.divisibility", 16]] for i in pointers}
        source = ASTSource(self.function, signature, {"XBLOCK": BLOCK}, aligned)
        ptx = triton.compile(source, target=TARGET, options={"num_warps": 4}).asm["ptx"]
        print("ptx", len(re.findall(r"ld\.global\.v\d\.b", ptx)), "wide loads")


def main(length):
    triton.runtime.driver.set_active(Driver())
    torch._inductor.config.cpu_backend, torch._inductor.config.compile_threads = "triton", 1
    AsyncCompile.triton = lambda self, name, source, *_, **__: Kernel(source)
    draw = torch.Generator().manual_seed(0)
    p, g, m, v = (torch.randn(length, generator=draw).mul(0.02).bfloat16() for _ in range(4))
    g[5] = float("nan")
    start, found = (p, g, m, v.abs()), []
    for rule in (adamw_rule, torch.compile(adamw_rule, dynamic=True)):
        tensors = [x.clone() for x in start]
        numbers = torch.tensor(1e-3), torch.tensor(0.1), torch.tensor(1.0)
        rule(*tensors, *numbers, (0.9, 0.999), 1e-8, [11, 22, 33])
        found.append(torch.cat([tensors[i] for i in (0, 2, 3)]))
    if INTERPRETED:
        a, b = (x.view(torch.int16).int() for x in found)
        nan = found[0].isnan()
        print("nan", int(nan.sum()), int(found[1].isnan().sum()))
        print("differ", (a != b)[~nan].float().mean().item(), "by", (a - b)[~nan].abs().max().item())


if __name__ == "__main__":
    main(int(sys.argv[1]))
