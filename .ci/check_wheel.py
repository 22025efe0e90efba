"""What an installed wheel must show, run by the Python of a fresh environment: python .ci/check_wheel.py

With a PATH that has no compiler: a first meta-gradient, equal to plain autograd's; one OpenMP runtime in the process,
that of torch, whose number of threads is thereby the core's; what was built; and a short training run.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPTS = Path(sys.executable).parent
os.environ["PATH"] = str(SCRIPTS)

start = time.perf_counter()
import maml_cuda  # noqa: E402

loaded = time.perf_counter()
import torch  # noqa: E402
from torch import nn  # noqa: E402

torch_loaded = time.perf_counter()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1)).double()
data = [torch.randn(5, 10, 1, dtype=torch.float64) for _ in range(4)]
maml = maml_cuda.FusedMAML(model, inner_lr=0.01, inner_steps=3, loss="mse", backend="fused")
maml(*data).loss.backward()
done = time.perf_counter()
_, expected = maml_cuda.reference.meta_gradient(model, "mse", *data, inner_lr=0.01, inner_steps=3)
for name, parameter in model.named_parameters():
    torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-12)
seconds = f"{done - start:.1f} s after the start, {torch_loaded - loaded:.1f} s of them to import torch"
print(f"meta-gradient of {maml.backend}: that of autograd; {seconds}")

maps = Path("/proc/self/maps")
if maps.exists():
    mapped = {line.split()[-1] for line in maps.read_text().splitlines() if "/" in line}
    runtimes = {path for path in mapped if Path(path).name.startswith(("libgomp", "libomp", "libiomp"))}
    assert len(runtimes) == 1, f"one OpenMP runtime must be loaded, got {sorted(runtimes)}"
    print(f"OpenMP: {runtimes.pop()}", flush=True)

with tempfile.TemporaryDirectory() as folder:
    for line in ("info", "train glyphs --iterations 30 --test-tasks 20 --out run"):
        subprocess.run([SCRIPTS / "maml-cuda", *line.split()], cwd=folder, check=True)
