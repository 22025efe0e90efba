"""The supervised jobs of ``maml-cuda train``: their tasks, models and metrics."""

from collections import OrderedDict
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor, nn

from maml_cuda.data import GlyphTasks, ImageTasks, SinusoidTasks, glyphs, images, splits
from maml_cuda.data.pictures import Pictures
from maml_cuda.data.splits import SPLITS
from maml_cuda.fused_maml import FusedMAML
from maml_cuda.rl.settings import RLSettings
from maml_cuda.train.devices import CPU
from maml_cuda.train.fixed_statistics import NORMS
from maml_cuda.train.models import conv4, conv4_max_pool, image_mlp, sinusoid_mlp
from maml_cuda.train.settings import CHARACTERS, SHIPPED, Settings, is_classification, named_settings


def new_settings(job: str = "glyphs", preset: str = "maml", **given: Any) -> Settings:
    """The settings of a new run. Opens the job's data set, and converts it if needed (``data.images``).

    Args:
        job: the name of a job.
        preset: the name of a preset.
        given: settings that override those of the job and of the preset.

    Raises:
        ValueError: a setting is invalid, the job needs a data set and ``data`` is empty, or ``data_sha256`` is given
            and the data set is another one.
        FileNotFoundError: a file of the data set is missing.
    """
    settings = named_settings(job, preset, **given)
    if job in SHIPPED:
        return settings
    if not settings.data:
        raise ValueError(f"data must name the folder that holds {job}: --data PATH")
    opened = open_images(settings)
    if settings.data_sha256 not in ("", opened.sha256):
        raise ValueError(
            f"{settings.data} must hold the images of data_sha256, {settings.data_sha256}, got {opened.sha256}; "
            "leave data_sha256 out to train on other images"
        )
    return replace(settings, data_sha256=opened.sha256, image_shape=" x ".join(map(str, opened.shape)))


def open_images(settings: Settings) -> images.Images:
    """Opens the data set of ``settings``."""
    cache = settings.cache or None
    if settings.job == "omniglot":
        return images.omniglot(settings.data, split=settings.split or "authors", cache=cache)
    if settings.job != "folder":
        return images.OPEN[settings.job](settings.data, cache=cache)
    return images.folder(
        settings.data,
        size=settings.image_size or None,
        background=settings.background,
        split=splits.parse_split(settings.split) if settings.split else None,
        cache=cache,
    )


def images_of_run(settings: Settings) -> images.Images:
    """Opens the data set of a run.

    Raises:
        ValueError: its folder now holds other images.
    """
    opened = open_images(settings)
    if opened.sha256 != settings.data_sha256:
        raise ValueError(
            f"{settings.data} must hold the images of this run, of sha256 {settings.data_sha256}, got {opened.sha256}"
        )
    return opened


def image_shape(settings: Settings) -> tuple[int, int, int]:
    """Channels, height and width of the images that the network takes."""
    if settings.job == "glyphs":
        return 1, glyphs.SIDE, glyphs.SIDE
    if not settings.image_shape:  # written by an earlier version
        return images_of_run(settings).shape
    channels, height, width = map(int, settings.image_shape.split(" x "))
    return channels, height, width


def pictures_of(settings: Settings | RLSettings) -> Pictures:
    """How the net of a run takes pictures.

    Raises:
        ValueError: it is not a run on pictures.
    """
    if not isinstance(settings, Settings) or not is_classification(settings.job):
        raise ValueError(f"run must be one on pictures, got one of {settings.job}")
    channels, height, width = image_shape(settings)
    return Pictures(channels, height, width, settings.background, light_ink=settings.job in CHARACTERS)


def make_maml(settings: Settings, kind: type[FusedMAML] = FusedMAML) -> FusedMAML:
    """A new FusedMAML, initialised from the seed of ``settings``. torch's global generator does not change."""
    model = make_model(settings)
    adapted = _adapted(settings, model)
    return kind(
        model,
        _inner_rates(settings, {name: p for name, p in model.named_parameters() if name in adapted}),
        settings.inner_steps,
        loss="cross_entropy" if is_classification(settings.job) else "mse",
        first_order=settings.first_order,
        adapt_params=adapted,
        backend=settings.backend,
        batch_norm=settings.batch_norm,
    )


def make_model(settings: Settings) -> nn.Sequential:
    """A new network, initialised from the seed of ``settings``. Its last module is the linear output layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        if settings.job == "sinusoid":
            return sinusoid_mlp(settings.width, 3 if settings.told else 1)
        channels, height, width = image_shape(settings)
        if settings.net == "mlp":
            return image_mlp(settings.ways, channels * height * width)
        if settings.job in ("glyphs", "omniglot"):
            return conv4(settings.ways, settings.width, channels)
        return conv4_max_pool(settings.ways, settings.width, channels, height, width)


def without_head(model: nn.Sequential) -> nn.Sequential:
    """The network without its output layer."""
    return nn.Sequential(OrderedDict(list(model.named_children())[:-1]))


def _adapted(settings: Settings, model: nn.Sequential) -> list[str]:
    names = [name for name, _ in model.named_parameters()]
    if settings.adapted == "head":
        head = list(model._modules)[-1]
        return [name for name in names if name.startswith(f"{head}.")]
    if settings.adapted == "no-norm":
        norms = [name for name, module in model.named_modules() if isinstance(module, NORMS)]
        return [name for name in names if name.rpartition(".")[0] not in norms]
    return names


def _inner_rates(settings: Settings, adapted: dict[str, nn.Parameter]) -> Any:
    """The argument ``inner_lr`` of FusedMAML: a number, or parameters to learn that start at that number."""
    steps, rate = settings.inner_steps, settings.inner_lr
    if settings.learn_inner_lr == "step":
        return nn.Parameter(torch.full((steps,), rate))
    if not settings.learn_inner_lr:
        return rate
    shapes = {name: p.shape if settings.learn_inner_lr == "element" else (steps,) for name, p in adapted.items()}
    for name, p in adapted.items():
        if tuple(p.shape) == (steps,):  # ambiguous: one rate per step or per element; use one per step and element
            shapes[name] = (steps, *p.shape)
    return {name: nn.Parameter(torch.full(shape, rate)) for name, shape in shapes.items()}


def make_tasks(
    settings: Settings, split: str, opened: images.Images | None = None, device: torch.device = CPU
) -> ImageTasks | SinusoidTasks:
    """The sampler of the tasks of one split.

    The splits of the sinusoid have the same distribution and differ only in the draws.

    Args:
        settings: the settings of the run.
        split: train, validation or test.
        opened: the images to draw from; None: those of the run.
        device: of the tasks.

    Raises:
        ValueError: the split has too few classes or images.
    """
    ways, shots, queries, rotations = settings.ways, settings.test_shots, settings.test_queries, 1
    if split == "train":
        ways, shots, queries = settings.train_ways or settings.ways, settings.shots, settings.queries
        rotations = settings.rotations
    if settings.job == "sinusoid":
        return SinusoidTasks(shots, queries, settings.told).to(device)
    if opened is None and settings.job != "glyphs":
        opened = images_of_run(settings)
    try:
        if opened is None:
            return GlyphTasks(split, ways, shots, queries, rotations).to(device)
        return ImageTasks(opened.split(split), ways, shots, queries, rotations).to(device)
    except ValueError as error:  # the error names the arguments of the sampler; add the names of the options
        options = ("ways", "test-shots", "test-queries")
        if split == "train":
            options = ("train-ways" if settings.train_ways else "ways", "shots", "queries")
        raise ValueError(f"{error}; n_way is --{options[0]}, k_shot --{options[1]}, n_query --{options[2]}") from None


def make_generator(settings: Settings | RLSettings, split: str) -> Generator:
    """A generator for one split, so that draws for validation and test do not change those for training."""
    return Generator().manual_seed(len(SPLITS) * settings.seed + SPLITS.index(split))


def score(job: str, prediction: Tensor, target: Tensor) -> Tensor:
    """The metric of each task, ``[tasks]``: accuracy in [0, 1] for images, mean squared error for the sinusoid."""
    if is_classification(job):
        return (prediction.argmax(-1) == target).float().mean(-1)
    return (prediction - target).square().flatten(1).mean(1)


def format_score(job: str, value: float) -> str:
    """A score as text."""
    return f"{100 * value:.1f} %" if is_classification(job) else f"{value:.3f}"
