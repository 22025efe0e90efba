"""docs/adding_a_layer.md: what it quotes stands in the files; its steps, for `atan`, give a fused arctangent."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "adding_a_layer.md").read_text(encoding="utf-8")
QUOTED = [
    "csrc/layers/functions.h", "maml_cuda/plan/layers.py", "maml_cuda/plan/elementary.py", "csrc/layers/scale.h",
    "csrc/cpu/scale.cpp", "csrc/layers/move.h", "csrc/cpu/move.cpp",
]  # fmt: skip

FUNCTIONS, LAYERS = "csrc/layers/functions.h", "maml_cuda/plan/layers.py"
# The exercise: behind a text of each file, what `atan` adds to it.
SOLUTION = [
    (FUNCTIONS, "  sin,\n", "  atan,\n"),
    (
        FUNCTIONS,
        "    return {s, cos(x), -s};\n  }\n};\n",
        """
/// atan(x)
template <>
struct FunctionDeclaration<Function::atan> {
  static constexpr const char* name = "atan";
  static constexpr bool bends = true;
  static constexpr bool in_megakernel = false;
  static bool ascends(const Constants&) { return true; }
  template <class T>
  MAML_HOST_DEVICE static Derivatives<T> at(const Constants&, T x) {
    const T d = 1 / (1 + x * x);
    return {atan(x), d, -2 * x * d * d};
  }
};
""",
    ),
    (
        LAYERS,
        '        return self._function(input, "sin")\n',
        '\n    def atan(self, input: Any) -> Value:\n        return self._function(input, "atan")\n',
    ),
]

# Meta-gradient of a network of arctangents, fused, against a plain loop with double backward.
CHECK = """
import torch
from torch import nn
import maml_cuda

class Atan(nn.Module):
    def forward(self, x):
        return torch.atan(x)

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(2, 9), Atan(), nn.Linear(9, 9), Atan(), nn.Linear(9, 1)).double()
x, y = torch.randn(3, 5, 2).double(), torch.randn(3, 5, 1).double()
maml = maml_cuda.FusedMAML(model, 0.1, 2, loss="mse", backend="fused")
maml(x, y, -x, y).loss.backward()

def loss(p, x, y):
    h = torch.atan(x @ p[0].T + p[1])
    h = torch.atan(h @ p[2].T + p[3])
    return ((h @ p[4].T + p[5] - y) ** 2).mean()

theta = list(model.parameters())
total = 0
for task in range(3):
    p = theta
    for _ in range(2):
        grads = torch.autograd.grad(loss(p, x[task], y[task]), p, create_graph=True)
        p = [q - 0.1 * g for q, g in zip(p, grads)]
    total = total + loss(p, -x[task], y[task]) / 3
for q, g in zip(theta, torch.autograd.grad(total, theta)):
    torch.testing.assert_close(q.grad, g, rtol=1e-10, atol=1e-13)
print(maml_cuda.__file__)
"""


def quotes() -> list[str]:
    found = re.findall(r"^( *)```(?:cpp|python)\n(.*?)^ *```$", PAGE, flags=re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(text) for _, text in found]


def without_indent(text: str) -> str:
    return "\n".join(line.strip() for line in text.splitlines())


def test_quotes_stand_in_the_files() -> None:
    files = [without_indent((ROOT / name).read_text(encoding="utf-8")) for name in QUOTED]
    assert len(quotes()) > 5
    for quote in quotes():
        assert any(without_indent(quote) in text for text in files), quote


def steps_for_atan(copy: Path) -> None:
    for name, behind, added in SOLUTION:
        path = copy / name
        text = path.read_text(encoding="utf-8")
        assert text.count(behind) == 1, (name, behind)
        path.write_text(text.replace(behind, behind + added), encoding="utf-8")


def copy_of_the_sources(folder: Path) -> Path:
    for name in ("csrc", "maml_cuda", "tests/cpu/portable"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.npz"))
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def test_the_steps_give_a_fused_arctangent(tmp_path: Path) -> None:
    copy = copy_of_the_sources(tmp_path)
    steps_for_atan(copy)
    # Not optimised, and one instruction set: it builds sooner.
    options = "-DMAML_CUDA_INSTRUCTION_SETS= -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG=-O0"
    env = {**os.environ, "MAML_CUDA_BUILD": "cpu", "CMAKE_ARGS": options}
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(build, cwd=copy, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    env = {**os.environ, "PYTHONPATH": str(copy), "MAML_CUDA_CPU_ISA": "baseline"}
    done = subprocess.run([sys.executable, "-c", CHECK], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert str(copy) in done.stdout


@pytest.mark.parametrize(
    ("name", "behind", "added", "words"),
    [
        ("csrc/layers/functions.h", "  sin,\n", "  atan,\n", "FunctionDeclaration<maml::Function::atan>"),
        ("csrc/layers/kinds.h", "  scale,\n", "  shift,\n", "every kind is declared"),
        ("csrc/layers/scale.h", "mixes_samples", "_of_a_batch", "every kind is declared"),
    ],
    ids=["a function without its declaration", "a kind without its declaration", "a declaration without a part"],
)
def test_what_is_not_declared_does_not_compile(tmp_path: Path, name: str, behind: str, added: str, words: str) -> None:
    copy = copy_of_the_sources(tmp_path)
    path = copy / name
    text = path.read_text(encoding="utf-8")
    assert behind in text
    path.write_text(text.replace(behind, behind + added, 1), encoding="utf-8")
    source = str(copy / "csrc" / "layers" / "registry.cpp")
    compiler = [os.environ.get("CXX", "c++"), "-std=c++20", "-fsyntax-only", f"-I{copy / 'csrc'}", source]
    done = subprocess.run(compiler, capture_output=True, text=True)
    assert done.returncode != 0
    assert words in done.stderr
