"""The jobs of ``maml-cuda train``: their tasks, model and metric."""

from collections import OrderedDict
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor, nn

from maml_cuda.data import GlyphTasks, ImageTasks, SinusoidTasks, glyphs, images, splits
from maml_cuda.data.splits import SPLITS
from maml_cuda.fused_maml import FusedMAML
from maml_cuda.rl.settings import RLSettings
from maml_cuda.train.models import conv4, conv4_max_pool, sinusoid_mlp
from maml_cuda.train.settings import SHIPPED, Settings, is_classification, named_settings


def new_settings(job: str = "glyphs", preset: str = "maml", **given: Any) -> Settings:
    """``named_settings`` with the data set that they are for: its folder, ``data``, is converted if it has not been yet
    (``data.images``)."""
    settings = named_settings(job, preset, **given)
    if job in SHIPPED:
        return settings
    if not settings.data:
        raise ValueError(f"data must name the folder that holds {job}: --data PATH")
    opened = open_images(settings)
    return replace(settings, data_sha256=opened.sha256, image_shape=" x ".join(map(str, opened.shape)))


def open_images(settings: Settings) -> images.Images:
    """What ``settings.data`` holds now."""
    cache = settings.cache or None
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
    """The images of a run. ValueError where its folder now holds other ones."""
    opened = open_images(settings)
    if opened.sha256 != settings.data_sha256:
        raise ValueError(
            f"{settings.data} must hold the images of this run, of sha256 {settings.data_sha256}, got {opened.sha256}"
        )
    return opened


def image_shape(settings: Settings) -> tuple[int, int, int]:
    """Channels, height and width of the images that the net of ``settings`` takes."""
    if settings.job == "glyphs":
        return 1, glyphs.SIDE, glyphs.SIDE
    if not settings.image_shape:  # a run of an earlier version
        return images_of_run(settings).shape
    channels, height, width = map(int, settings.image_shape.split(" x "))
    return channels, height, width


def make_maml(settings: Settings) -> FusedMAML:
    """A fresh model of ``settings``, initialized from its seed; torch's global generator stays as it was."""
    model = make_model(settings)
    adapted = _adapted(settings, model)
    return FusedMAML(
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
    """The net alone, whose last module is the linear layer that answers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        if settings.job == "sinusoid":
            return sinusoid_mlp(settings.width, 3 if settings.told else 1)
        channels, height, width = image_shape(settings)
        if settings.job in ("glyphs", "omniglot"):
            return conv4(settings.ways, settings.width, channels)
        return conv4_max_pool(settings.ways, settings.width, channels, height, width)


def without_head(model: nn.Sequential) -> nn.Sequential:
    """The features that the last layer reads."""
    return nn.Sequential(OrderedDict(list(model.named_children())[:-1]))


def _adapted(settings: Settings, model: nn.Sequential) -> list[str]:
    names = [name for name, _ in model.named_parameters()]
    if settings.adapted == "head":
        head = list(model._modules)[-1]
        return [name for name in names if name.startswith(f"{head}.")]
    if settings.adapted == "no-norm":
        norms = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
        return [name for name in names if name.rpartition(".")[0] not in norms]
    return names


def _inner_rates(settings: Settings, adapted: dict[str, nn.Parameter]) -> Any:
    """``FusedMAML``'s ``inner_lr``: the number, or what is learned from it on."""
    steps, rate = settings.inner_steps, settings.inner_lr
    if settings.learn_inner_lr == "step":
        return nn.Parameter(torch.full((steps,), rate))
    if not settings.learn_inner_lr:
        return rate
    shapes = {name: p.shape if settings.learn_inner_lr == "element" else (steps,) for name, p in adapted.items()}
    for name, p in adapted.items():
        if tuple(p.shape) == (steps,):  # as many elements as steps could be either: here one an element and step
            shapes[name] = (steps, *p.shape)
    return {name: nn.Parameter(torch.full(shape, rate)) for name, shape in shapes.items()}


def make_tasks(settings: Settings, split: str, opened: images.Images | None = None) -> ImageTasks | SinusoidTasks:
    """The sampler of one split, of the run's images or of those ``opened``. The sinusoid's splits are one distribution
    and differ in their draws."""
    ways, shots, queries, rotations = settings.ways, settings.test_shots, settings.test_queries, 1
    if split == "train":
        ways, shots, queries = settings.train_ways or settings.ways, settings.shots, settings.queries
        rotations = settings.rotations
    if settings.job == "sinusoid":
        return SinusoidTasks(shots, queries, settings.told)
    if opened is None and settings.job != "glyphs":
        opened = images_of_run(settings)
    try:
        if opened is None:
            return GlyphTasks(split, ways, shots, queries, rotations)
        return ImageTasks(opened.split(split), ways, shots, queries, rotations)
    except ValueError as error:  # in the words of the sampler
        options = ("ways", "test-shots", "test-queries")
        if split == "train":
            options = ("train-ways" if settings.train_ways else "ways", "shots", "queries")
        raise ValueError(f"{error}; n_way is --{options[0]}, k_shot --{options[1]}, n_query --{options[2]}") from None


def make_generator(settings: Settings | RLSettings, split: str) -> Generator:
    """A generator for one split alone, so that validation and test never disturb the draws of training."""
    return Generator().manual_seed(len(SPLITS) * settings.seed + SPLITS.index(split))


def score(job: str, prediction: Tensor, target: Tensor) -> Tensor:
    """The metric of each task, ``[tasks]``: accuracy in [0, 1] for images, MSE for the sinusoid."""
    if is_classification(job):
        return (prediction.argmax(-1) == target).float().mean(-1)
    return (prediction - target).square().flatten(1).mean(1)


def format_score(job: str, value: float) -> str:
    """A score for people."""
    return f"{100 * value:.1f} %" if is_classification(job) else f"{value:.3f}"
