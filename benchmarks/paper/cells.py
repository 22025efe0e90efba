"""The cells of the result tables: the settings of each run, the published score and its source."""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

from maml_cuda.train.settings import Settings, named_settings

# A run belongs to the cell with the same settings, except these, which describe where it ran.
IGNORED = ("data", "data_sha256", "image_shape", "cache", "backend", "log_interval")

# Settings that depend on the number of iterations.
OF_ITERATIONS = ("iterations", "multi_step_iterations", "first_order_iterations")
DEFAULTS = {field.name: field.default for field in fields(Settings) if field.default is not MISSING}

MAML = "Finn et al. 2017"


@dataclass(frozen=True)
class Cell:
    """One run: ``maml-cuda train JOB --preset PRESET``, with some settings changed.

    Attributes:
        row: name in the table.
        given: the changed settings.
        published: the published scores as printed by their authors, in the order of the table's score columns.
        source: publication of these scores.
    """

    job: str
    preset: str
    row: str
    given: dict[str, Any] = field(default_factory=dict)
    published: tuple[str, ...] = ()
    source: str = ""

    @property
    def name(self) -> str:
        s = self.settings()
        task = f"{s['test_shots']}shot" if self.job == "sinusoid" else f"{s['ways']}way-{s['test_shots']}shot"
        variant = [s["net"]] if s["net"] != "conv4" else []
        variant += [s["split"]] if s["split"] not in ("", "authors") else []
        variant += [f"seed{s['seed']}"] if s["seed"] else []
        return "-".join([self.job, task, self.preset, *variant])

    @property
    def command(self) -> list[str]:
        """The arguments of ``maml-cuda``, without --out."""
        options = [self.job, "--preset", self.preset]
        for name, value in self.given.items():
            options += [f"--{name.replace('_', '-')}", str(value)]
        return ["train", *options, *(["--data", "FOLDER"] if self.needs_data else [])]

    @property
    def needs_data(self) -> bool:
        """Whether the user must download the data set."""
        return self.job not in ("glyphs", "sinusoid")

    def settings(self) -> dict[str, Any]:
        return asdict(named_settings(self.job, self.preset, **self.given))

    @property
    def full_iterations(self) -> int:
        """The iterations of the preset, which this cell may cut."""
        given = {name: value for name, value in self.given.items() if name not in OF_ITERATIONS}
        return named_settings(self.job, self.preset, **given).iterations

    def is_of(self, settings: dict[str, Any]) -> bool:
        """Whether a run with these settings belongs to this cell. Runs of earlier versions lack some."""
        settings = DEFAULTS | settings
        if self.job == "omniglot":
            settings["split"] = settings["split"] or "authors"
        return all(settings.get(name) == value for name, value in self.settings().items() if name not in IGNORED)


@dataclass(frozen=True)
class Table:
    """Cells under one heading. ``steps``: adaptation steps, one score column each; (): only the reported score.
    ``protocols``: whether there are columns for the scores of ``protocols.py`` and for the iterations.
    """

    title: str
    published_heading: str  # heading of the published scores
    cells: tuple[Cell, ...]
    steps: tuple[int, ...] = ()
    note: str = ""
    protocols: bool = False


def _sinusoid(shots: int) -> Table:
    given = {"shots": shots, "test_shots": shots} if shots != 5 else {}
    published = {"maml": ("0.67", "0.38", "0.35"), "pretrained": ("2.41", "2.23", "2.19")} if shots == 5 else {}
    rows = {
        "maml": "MAML",
        "pretrained": "pretrained on all tasks",
        "oracle": "oracle, no adaptation",
        "random": "untrained",
    }
    cells = [
        Cell(
            "sinusoid", preset, row, given | SINUSOID.get(preset, {}), published.get(preset, ()),
            MAML if preset in published else "",
        )
        for preset, row in rows.items()
    ]  # fmt: skip
    note = "The paper shows curves of these and gives no numbers."
    if shots == 5:
        note = (
            "In every sinusoid table MAML takes 100 curves an iteration and a cosine schedule. The paper takes 25 and "
            "a constant rate. With these, two runs at two commits reached 0.602 / 0.386 / 0.334 and 0.617 / 0.661 / "
            "0.384; in the second the error of one of the 600 test curves grows at the fifth step."
        )
    return Table(f"Sinusoid, {shots}-shot: MSE after adaptation steps", "paper", tuple(cells), (1, 5, 10), note)


SINUSOID = {"maml": {"meta_batch": 100, "meta_schedule": "cosine"}}

# Published accuracy on Omniglot by (ways, shots). First-order MAML is from the paper on Reptile.
OMNIGLOT = {
    "maml": (MAML, {(5, 1): "98.7 ± 0.4", (5, 5): "99.9 ± 0.1", (20, 1): "95.8 ± 0.3", (20, 5): "98.9 ± 0.2"}),
    "fomaml": (
        "Nichol et al. 2018, transductive",
        {(5, 1): "98.3 ± 0.5", (5, 5): "99.2 ± 0.2", (20, 1): "89.4 ± 0.5", (20, 5): "97.9 ± 0.1"},
    ),
    "reptile": (
        "Nichol et al. 2018, transductive",
        {(5, 1): "97.68", (5, 5): "99.48", (20, 1): "89.43", (20, 5): "97.12"},
    ),
    "maml++": ("Antoniou et al. 2019", {(5, 1): "99.47", (5, 5): "99.85", (20, 1): "97.65", (20, 5): "99.33"}),
    "meta-sgd": ("Li et al. 2017", {(5, 1): "99.53 ± 0.26"}),
    "protonet": ("Snell et al. 2017", {(5, 1): "98.8"}),
}  # fmt: skip
ROWS = {
    "maml": "MAML", "fomaml": "first-order MAML", "anil": "ANIL", "meta-sgd": "Meta-SGD", "maml++": "MAML++",
    "reptile": "Reptile", "protonet": "prototypical networks", "matching": "matching networks",
    "pretrained": "fine-tuning a pretrained network", "nearest-pixel": "nearest pixel",
    "random": "untrained network, adapted",
}  # fmt: skip


def _glyphs(ways: int, shots: int, presets: tuple[str, ...]) -> Table:
    cells = []
    for preset in presets:
        given: dict[str, Any] = {"ways": ways, "shots": shots}
        if preset not in ("random", "nearest-pixel"):
            iterations = GLYPHS_ITERATIONS[ways]
            given |= {"iterations": iterations}
            if preset not in ("reptile", "maml++"):  # their presets have a schedule
                given |= {"meta_schedule": "cosine"}
            if preset == "maml++":  # the first 10 % and the first 50 % of the iterations
                given |= {"multi_step_iterations": iterations // 10, "first_order_iterations": iterations // 2}
            if preset == "pretrained":  # as many images per iteration as MAML with 16 tasks of 5 ways
                given |= {"meta_batch": 480, "inner_lr": FINE_TUNING[ways]}
        if ways == 20:
            given |= GLYPHS_OF_20.get(preset, {})
            if shots == 5 and preset in GLYPHS_OF_20:
                given |= {"meta_batch": 2}
        source, published = OMNIGLOT.get(preset, ("", {}))
        figures = (published[ways, shots],) if (ways, shots) in published else ()
        cells.append(Cell("glyphs", preset, ROWS[preset], given, figures, source if figures else ""))
    note = (
        "The glyphs differ from Omniglot: 792 characters to train on in 17 to 20 typefaces (Omniglot: 1200 by 20 "
        f"hands), 32 filters (64), {GLYPHS_ITERATIONS[ways]} iterations (60,000), and test scripts that training "
        "has not seen."
    )
    if "pretrained" in presets:
        note += (
            " Inner rates were chosen by validation after 1000 iterations: 0.4 for Reptile (of 0.05, 0.15, 0.4 and 1, "
            f"with 5 ways and 1 shot), {FINE_TUNING[ways]} for fine-tuning (of {FINE_TUNED[ways]})."
        )
    if ways == 20:
        tasks = "4 tasks" if shots == 1 else "2 tasks"
        note += (
            f" To stay under half an hour, MAML and its variants take {tasks} of 2 queries a class an iteration (the "
            f"paper: 16 tasks){', and matching networks 4 tasks' if shots == 1 else ''}."
        )
    title = f"Characters, {ways}-way {shots}-shot: accuracy in %, on glyphs; published on Omniglot"
    return Table(title, "Omniglot", tuple(cells), note=note)


GLYPHS_ITERATIONS = {5: 8000, 20: 4000}
FINE_TUNING = {5: 0.1, 20: 0.4}  # inner rates by ways, best after 10 steps on 300 validation tasks
FINE_TUNED = {5: "0.05, 0.1, 0.2, 0.4, 1 and 2", 20: "0.1, 0.2, 0.4, 1, 2 and 4"}

# 20-way settings. The paper uses 5 inner steps and 16 tasks. On glyphs, 4 tasks (5-shot: 2) keep a run below 30 min.
OF_20 = {preset: {"inner_steps": 5, "test_steps": 5, "meta_batch": 16} for preset in ("maml", "fomaml")}
SMALL = {"meta_batch": 4, "queries": 2}
GLYPHS_OF_20 = {preset: {"inner_steps": 5, "test_steps": 5} | SMALL for preset in ("maml", "fomaml", "anil")}
GLYPHS_OF_20 |= {"meta-sgd": SMALL, "maml++": SMALL, "matching": {"meta_batch": 4}}


def _published_set(job: str, title: str, rows: dict[str, dict[tuple[int, int], tuple[str, str]]]) -> Table:
    """A table of published scores. rows: preset -> (ways, shots) -> (score, source)."""
    cells = []
    for preset, of in rows.items():
        for (ways, shots), (figure, source) in of.items():
            row = f"{ROWS[preset]}, {ways}-way {shots}-shot"
            cells.append(Cell(job, preset, row, {"shots": shots}, (figure,), source))
    return Table(title, "published", tuple(cells))


def _omniglot() -> Table:
    cells = []
    for preset, ways, shots, iterations, variant in OMNIGLOT_CELLS:
        given: dict[str, Any] = {"shots": shots}
        if ways == 20:
            given |= {"ways": 20} | OF_20.get(preset, {})
        if iterations:
            given |= {"iterations": iterations}
            if preset == "maml++":  # the first 10 % and the first 50 % of the iterations
                given |= {"multi_step_iterations": iterations // 10, "first_order_iterations": iterations // 2}
        source, published = OMNIGLOT.get(preset, ("", {}))
        figure = "" if "split" in variant else published.get((ways, shots), "")  # published ones: the authors' split
        if variant.get("net") == "mlp":
            figure = OMNIGLOT_MLP[ways, shots]
        words = [f"{ROWS[preset]}, {ways}-way {shots}-shot", *(VARIANTS[name] for name in variant)]
        words = [word.format(**variant) for word in words]
        row = ", ".join(words)
        cells.append(
            Cell("omniglot", preset, row, given | variant, (figure,) if figure else (), source if figure else "")
        )
    return Table("Omniglot: accuracy in %", "published", tuple(cells), note=OMNIGLOT_NOTE, protocols=True)


VARIANTS = {"net": "fully connected net", "split": "split by {split}", "seed": "seed {seed}"}
OMNIGLOT_MLP = {(5, 1): "89.7 ± 1.1", (5, 5): "97.5 ± 0.6"}
# preset, ways, shots, iterations (0: those of the preset), what else differs. 20-way 5-shot has what two hours of two
# cores allow.
OMNIGLOT_CELLS: tuple[tuple[str, int, int, int, dict[str, Any]], ...] = (
    ("maml", 5, 1, 0, {}),
    ("fomaml", 5, 1, 0, {}),
    ("maml", 5, 1, 0, {"net": "mlp"}),
    ("maml", 5, 1, 20_000, {"seed": 1}),
    ("maml", 5, 1, 20_000, {"seed": 2}),
    ("maml", 5, 1, 20_000, {"split": "alphabets"}),
    ("maml++", 5, 1, 15_000, {}),
    ("anil", 5, 1, 15_000, {}),
    ("meta-sgd", 5, 1, 15_000, {}),
    ("reptile", 5, 1, 15_000, {}),
    ("protonet", 5, 1, 15_000, {}),
    ("nearest-pixel", 5, 1, 0, {}),
    ("maml", 5, 5, 15_000, {}),
    ("fomaml", 5, 5, 15_000, {}),
    ("maml", 5, 5, 15_000, {"net": "mlp"}),
    ("maml", 20, 1, 10_000, {}),
    ("fomaml", 20, 1, 10_000, {}),
    ("maml", 20, 5, 2000, {}),
    ("fomaml", 20, 5, 2000, {}),
    *(("reptile", ways, shots, 0, {}) for ways, shots in ((5, 5), (20, 1), (20, 5))),
    *(("maml++", ways, shots, 0, {}) for ways, shots in ((5, 5), (20, 1), (20, 5))),
)
OMNIGLOT_NOTE = """\
Each net is tested in four ways, each on 600 tasks:

- **15 queries**: the protocol of this package, 15 query images of each class, normalised together;
- **authors' queries**: as many query images of each class as support images, which is what the authors of MAML test
  with: one for 1-shot, five for 5-shot;
- **support**: 15 query images of each class, and BatchNorm with the statistics of the support set, so that no query
  depends on the others;
- **running**: the same, but with running statistics of training tasks, in the inner loop too. The net was trained with
  the statistics of each batch there. Where all layers adapt, as in MAML, it takes other inner steps than in training,
  and may fall to chance.

The authors' evaluation, by [their code](https://github.com/cbfinn/maml) (`main.py`, `maml.py`, `data_generator.py`):
600 tasks of the 423 test characters, each class of a task turned by a random quarter turn (here test characters are
not turned); K query images a class for K shots; a score after each of 1 to 10 updates, of which the paper reports the
one after 3 (5-way) or 5 (20-way); BatchNorm with the statistics of the batch in training and in test, where the batch
is the whole query set, one image or K of every class. So their published accuracies are transductive, with balanced
queries.

First order, with the same settings, learns far more slowly here. Accuracy on validation tasks, in %, at equal numbers
of iterations, and at equal CPU time (54 minutes: 60,000 iterations of first order, some 33,500 exact ones):

| | 1000 | 3000 | 10,000 | 30,000 | 60,000 | 54 minutes |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
| exact | 92.1 | 95.4 | 97.6 | 98.4 | 98.7 | 98.6 |
| first order | 60.7 | 66.3 | 78.1 | 80.3 | 84.0 | 84.0 |

First order's gradient was compared with plain autograd after 3500 iterations; the cosine between it and the exact one
is 0.66 there. The long inner step is why: with `--inner-lr 0.5` for 2 (the authors' 0.4 on a sum over five images) it
has 86.2 % after 1000 iterations, with 0.1 it has 84.8 %. The preset stays the paper's. The first-order figures of
Nichol et al. are of other settings.

Runs with fewer iterations than the paper's are less accurate. MAML, 5-way 1-shot, has 97.9 % on validation tasks after
15,000 iterations and 98.7 % after 60,000. 5-way 5-shot stops at 15,000, with 99.1 % on validation tasks and 99.8 % on
training tasks (validation: 98.1 % after 3000, 98.7 % after 7500); whether it would reach the paper's 99.9 % after
60,000 was not tried. 20-way 1-shot stops at 10,000 of 60,000, with 95.4 % on training tasks. It is trained for the loss
after five steps alone: on test tasks it has 60.7, 71.8, 81.8 and 89.0 % after one to four.

The split is the one by name `authors` ([data sets](datasets.md#two-splits-of-omniglot)), except where the row names
another. "Iterations" are those of the run and of the preset, which has the authors'."""


TABLES = (
    _sinusoid(5),
    _sinusoid(10),
    _sinusoid(20),
    _glyphs(5, 1, tuple(ROWS)),
    _glyphs(5, 5, ("maml", "fomaml", "protonet")),
    _glyphs(20, 1, tuple(ROWS)),
    _glyphs(20, 5, ("maml", "fomaml", "protonet")),
    _omniglot(),
    _published_set(
        "mini-imagenet", "mini-ImageNet: accuracy in %",
        {
            "maml": {(5, 1): ("48.70 ± 1.84", MAML), (5, 5): ("63.11 ± 0.92", MAML)},
            "fomaml": {(5, 1): ("48.07 ± 1.75", MAML), (5, 5): ("63.15 ± 0.91", MAML)},
            "reptile": {
                (5, 1): ("49.97 ± 0.32", "Nichol et al. 2018, transductive"),
                (5, 5): ("65.99 ± 0.58", "Nichol et al. 2018, transductive"),
            },
            "meta-sgd": {(5, 1): ("50.47 ± 1.87", "Li et al. 2017"), (5, 5): ("64.03 ± 0.94", "Li et al. 2017")},
            "maml++": {
                (5, 1): ("52.15 ± 0.26", "Antoniou et al. 2019"), (5, 5): ("68.32 ± 0.44", "Antoniou et al. 2019"),
            },
        },
    ),
    _published_set(
        "cifar-fs", "CIFAR-FS: accuracy in %",
        {"maml": {(5, 1): ("58.9 ± 1.9", "Lee et al. 2019"), (5, 5): ("71.5 ± 1.0", "Lee et al. 2019")}},
    ),
    _published_set(
        "fc100", "FC100: accuracy in %",
        {"maml": {(5, 1): ("38.00 ± 1.95", "Meta-RKHS"), (5, 5): ("49.34 ± 0.97", "Meta-RKHS")}},
    ),
    _published_set(
        "tiered-imagenet", "tiered-ImageNet: accuracy in %",
        {"maml": {(5, 1): ("51.67 ± 1.81", "Lee et al. 2019"), (5, 5): ("70.30 ± 1.75", "Lee et al. 2019")}},
    ),
)  # fmt: skip
CELLS = {cell.name: cell for table in TABLES for cell in table.cells}
