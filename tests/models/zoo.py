"""The list of the models: where each was published, its data and loss, and what is expected to run it.

The structure of each model is the published one, its sizes are small. The expectations were written before the kinds of
layers that they need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.models import (
    adapters,
    attention,
    convolutional,
    fields,
    graphs,
    mixers,
    mobile,
    policies,
    recurrent,
    residual,
)
from tests.models.published import (
    Published,
    acted,
    both,
    labels,
    negative_log_likelihood,
    next_token,
    normal,
    pixels,
    ratings,
    reinforce,
    reinforce_each,
)

CLASSES = 3
IMAGE, CHARACTER, POINT = (3, 8, 8), (1, 28, 28), (2,)
COUNTERS = tuple(f"layers.{i}.num_batches_tracked" for i in range(4))


def convolutional_models() -> Iterable[Published]:
    base, config = convolutional.ConvBase, dragen_config()
    yield Published(
        "omniglot_cnn", "Vinyals et al. 2016; learn2learn OmniglotCNN",
        lambda: base(1, 4, 4, 4, CLASSES, pool=False), CHARACTER, CLASSES, "today",
    )  # fmt: skip
    yield Published(
        "cnn4", "Ravi and Larochelle 2017; learn2learn CNN4", lambda: base(3, 4, 3, 4, CLASSES), IMAGE, CLASSES, "today"
    )
    yield Published(
        "higher_omniglot", "Finn et al. 2017; higher and functorch, maml_omniglot",
        lambda: convolutional.omniglot_in_place(CLASSES, 4), CHARACTER, CLASSES, "today",
    )  # fmt: skip
    yield Published(
        "torchmeta", "Finn et al. 2017; torchmeta, examples/maml", lambda: convolutional.OfDictionary(1, 4, CLASSES),
        (1, 16, 16), CLASSES, "today",
    )  # fmt: skip
    yield Published(
        "maml_plus_plus", "Antoniou et al. 2019; HowToTrainYourMAMLPytorch VGGReLUNormNetwork",
        lambda: convolutional.VggReluNorm(1, 4, CLASSES, 4), (1, 16, 16), CLASSES, "today",
    )  # fmt: skip
    yield Published(
        "dragen_learner", "Finn et al. 2017; dragen1860/MAML-Pytorch Learner", lambda: convolutional.Learner(config),
        (3, 14, 14), CLASSES, "today",
    )  # fmt: skip
    yield Published(
        "r2d2", "Bertinetto et al. 2019; MetaOptNet R2D2Embedding",
        lambda: nn.Sequential(convolutional.R2D2(3, (4, 4, 5, 6)), nn.Linear(26, CLASSES)), (3, 16, 16), CLASSES, "a",
    )  # fmt: skip
    yield Published(
        "conv4s", "Chen et al. 2019; CloserLookFewShot Conv4S",
        lambda: nn.Sequential(convolutional.OneChannel(4), nn.Linear(4, CLASSES)), (3, 16, 16), CLASSES, "a",
    )  # fmt: skip
    yield Published(
        "baseline_plus_plus", "Chen et al. 2019; CloserLookFewShot Conv4 and distLinear",
        lambda: nn.Sequential(
            *[convolutional.ConvBlock(3 if i == 0 else 4, 4) for i in range(3)], nn.Flatten(),
            convolutional.CosineClassifier(4, CLASSES),
        ),
        IMAGE, CLASSES, "a",
    )  # fmt: skip
    for name, bilinear in (("unet", False), ("unet_bilinear", True)):
        yield Published(
            name, f"Ronneberger et al. 2015; Pytorch-UNet{', bilinear' * bilinear}",
            lambda bilinear=bilinear: convolutional.UNet(3, 2, 2, 2, bilinear), (3, 10, 9), labels(2, 10, 9), "b",
            pixels,
        )  # fmt: skip


def dragen_config() -> list[tuple[str, list[int]]]:
    blocks = [
        [("conv2d", [4, channels, 3, 3, 1, 0]), ("relu", [1]), ("bn", [4]), ("max_pool2d", [2, 2, 0])]
        for channels in (3, 4)
    ]
    return [*blocks[0], *blocks[1], ("flatten", []), ("linear", [CLASSES, 16])]


def residual_models() -> Iterable[Published]:
    basic, bottleneck, squeeze = residual.BasicBlock, residual.Bottleneck, residual.PreActSqueezeBlock
    yield Published(
        "resnet12", "Lee et al. 2019; MetaOptNet, learn2learn, FEAT ResNet12",
        lambda: residual.ResNet12([4, 5, 6, 8], CLASSES), (3, 16, 16), CLASSES, "today", moves=COUNTERS,
    )  # fmt: skip
    yield Published(
        "resnet12_dropblock", "Tian et al. 2020; RFS resnet12, DropBlock in eval mode",
        lambda: residual.ResNet12([4, 5, 6, 8], CLASSES, 0.1), (3, 16, 16), CLASSES, "never",
        reason="its forward sets self.num_batches_tracked, and reads what an earlier call has left there",
        moves=COUNTERS,
    )  # fmt: skip
    yield Published(
        "seresnet12", "Hu et al. 2018; RFS seresnet12",
        lambda: residual.ResNet12([4, 4, 8, 8], CLASSES, squeeze=True), (3, 16, 16), CLASSES, "a", moves=COUNTERS,
    )  # fmt: skip
    yield Published(
        "resnet18", "He et al. 2016; pytorch-cifar ResNet18",
        lambda: residual.staged(residual.stem(4), [basic(4, 4), basic(4, 6, 2), basic(6, 8, 2)], 8, CLASSES, 2),
        IMAGE, CLASSES, "today",
    )  # fmt: skip
    yield Published(
        "resnet50", "He et al. 2016; CloserLookFewShot BottleneckBlock",
        lambda: residual.staged(residual.stem(4), [bottleneck(4, 8), bottleneck(8, 12, 2)], 12, CLASSES, 4),
        IMAGE, CLASSES, "today",
    )  # fmt: skip
    yield Published(
        "wrn", "Zagoruyko and Komodakis 2016; FEAT Wide_ResNet", lambda: residual.WideResNet([4, 4, 6, 8], CLASSES),
        IMAGE, CLASSES, "today",
    )  # fmt: skip
    yield Published(
        "senet", "Hu et al. 2018; pytorch-cifar SENet18",
        lambda: residual.staged(residual.stem(4), [squeeze(4, 4), squeeze(4, 6, 2)], 6, CLASSES, 4),
        IMAGE, CLASSES, "a",
    )  # fmt: skip
    yield Published(
        "resnext", "Xie et al. 2017; pytorch-cifar ResNeXt",
        lambda: residual.staged(
            residual.stem(4), [residual.GroupedBottleneck(4, 2, 2), residual.GroupedBottleneck(8, 2, 3, 2)], 12,
            CLASSES, 4,
        ),
        IMAGE, CLASSES, "a",
    )  # fmt: skip
    yield Published(
        "densenet", "Huang et al. 2017; pytorch-cifar DenseNet", lambda: residual.DenseNet(3, 3, CLASSES), IMAGE,
        CLASSES, "a",
    )  # fmt: skip
    yield Published(
        "convnext", "Liu et al. 2022; ConvNeXt", lambda: residual.ConvNeXt([4, 6], CLASSES), IMAGE, CLASSES, "a"
    )


def mobile_models() -> Iterable[Published]:
    yield Published(
        "mobilenetv2", "Sandler et al. 2018; pytorch-cifar MobileNetV2",
        lambda: mobile.MobileNetV2(4, [(1, 4, 1), (2, 6, 2), (2, 6, 1)], 8, CLASSES), IMAGE, CLASSES, "a",
    )  # fmt: skip
    yield Published(
        "efficientnet", "Tan and Le 2019; pytorch-cifar EfficientNet",
        lambda: mobile.EfficientNet(
            4, [mobile.MBConv(4, 4, 3, 1, 2), mobile.MBConv(4, 6, 5, 2, 2)], 6, CLASSES, dropout=0.0
        ),
        IMAGE, CLASSES, "a",
    )  # fmt: skip
    yield Published(
        "shufflenetv2", "Ma et al. 2018; pytorch-cifar ShuffleNetV2",
        lambda: mobile.ShuffleNetV2(4, [8, 8], 8, CLASSES), IMAGE, CLASSES, "a",
    )  # fmt: skip


def attention_models() -> Iterable[Published]:
    tokens = (4, 8)
    yield Published(
        "vit", "Dosovitskiy et al. 2021; vit-pytorch ViT", lambda: attention.ViT(8, 4, 8, 1, 2, CLASSES), IMAGE,
        CLASSES, "a",
    )  # fmt: skip
    yield Published(
        "simple_vit", "Beyer et al. 2022; vit-pytorch SimpleViT", lambda: attention.SimpleViT(8, 4, 8, 1, 2, CLASSES),
        IMAGE, CLASSES, "a",
    )  # fmt: skip
    yield Published(
        "swin", "Liu et al. 2021; Swin-Transformer", lambda: attention.Swin(4, 4, 2, 2, CLASSES), IMAGE, CLASSES, "c"
    )
    yield Published(
        "transformer_encoder", "Vaswani et al. 2017; torch nn.TransformerEncoderLayer",
        lambda: attention.TokenMean(
            nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True), 8, CLASSES
        ),
        tokens, CLASSES, "a",
    )  # fmt: skip
    yield Published(
        "self_attention", "Vaswani et al. 2017; parallel-metalearn DotProductSelfAttention",
        lambda: attention.TokenMean(attention.DotProductSelfAttention(8), 8, CLASSES), tokens, CLASSES, "a",
    )  # fmt: skip
    yield Published(
        "gpt_block", "Radford et al. 2019; minGPT Block", lambda: attention.GPTBlock(8, 2, 5), tokens, tokens, "a",
        "mse",
    )  # fmt: skip
    yield Published(
        "gpt", "Radford et al. 2019; minGPT GPT", lambda: attention.GPT(7, 8, 2, 1, 5), labels(7, 5), labels(7, 5),
        "c", next_token,
    )  # fmt: skip
    yield Published(
        "bert_block", "Devlin et al. 2019; BERT-pytorch TransformerBlock",
        lambda: attention.TokenMean(attention.BertBlock(8, 2), 8, CLASSES), tokens, CLASSES, "a",
    )  # fmt: skip
    yield Published(
        "bert", "Devlin et al. 2019; BERT-pytorch BERT", lambda: attention.Bert(11, 5, 8, 1, 2, CLASSES),
        both(labels(11, 5), labels(3, 5)), CLASSES, "b",
    )  # fmt: skip
    yield Published(
        "mlp_mixer", "Tolstikhin et al. 2021; mlp-mixer-pytorch", lambda: mixers.mlp_mixer(8, 4, 6, 2, CLASSES), IMAGE,
        CLASSES, "a",
    )  # fmt: skip
    yield Published(
        "ttt_swiglu", "Sun et al. 2024; ttt-lm-pytorch RMSNorm and SwiGluMLP", lambda: mixers.SwiGluBlock(6, 8), (6,),
        (6,), "a", "mse",
    )  # fmt: skip


def field_models() -> Iterable[Published]:
    def field(name: str, source: str, make: Callable[[], nn.Module], part: str, **more: Any) -> Published:
        given = {"n_support": 6, "n_query": 5, "inner_lr": 1e-3, **more}
        return Published(name, source, make, POINT, (1,), part, "mse", **given)

    latent = ("latent",)
    yield field(
        "siren_coral", "Sitzmann et al. 2020; coral Siren", lambda: fields.Siren(2, 8, 1, 3, 0), "today"
    )  # fmt: skip
    yield field("siren_coinpp", "Dupont et al. 2022; coinpp Siren", lambda: fields.Siren(2, 8, 1, 3, 0.5), "a")
    yield field(
        "siren_lucidrains", "Sitzmann et al. 2020; siren-pytorch SirenNet",
        lambda: fields.LucidrainsSiren(2, 8, 1, 2), "today",
    )  # fmt: skip
    yield Published(
        "siren_gradncp", "Kim et al. 2023; GradNCP MetaSiren", lambda: fields.MetaSiren(2, 8, 1, 3), (7, 2), (7, 1),
        "a", "mse", n_support=1, n_query=1, inner_lr=1e-3,
    )  # fmt: skip
    yield field(
        "siren_shifts", "Serrano et al. 2023; coral ModulatedSiren",
        lambda: fields.ModulatedSiren(2, 8, 1, 3, 4, scales=False), "a", adapted=latent,
    )  # fmt: skip
    yield field(
        "siren_film", "Dupont et al. 2022; coinpp ModulatedSiren",
        lambda: fields.ModulatedSiren(2, 8, 1, 3, 4, scales=True), "a", adapted=latent,
    )  # fmt: skip
    yield field(
        "fourier_mlp", "Tancik et al. 2020; learnit", lambda: fields.fourier_mlp(2, 4, 8, 1), "a", inner_lr=0.05
    )
    yield field(
        "fourier_film", "Serrano et al. 2023; coral ModulatedFourierFeatures",
        lambda: fields.FilmFourierFeatures(2, 4, 8, 1, 2, 4), "a", adapted=latent, inner_lr=0.05,
    )  # fmt: skip
    yield field(
        "fourier_net", "Fathony et al. 2021; multiplicative-filter-networks FourierNet",
        lambda: fields.MultiplicativeFilters(fields.FourierFilter, 2, 8, 1, 2, 4.0), "a", inner_lr=0.01,
    )  # fmt: skip
    yield field(
        "gabor_net", "Fathony et al. 2021; multiplicative-filter-networks GaborNet",
        lambda: fields.MultiplicativeFilters(fields.GaborFilter, 2, 8, 1, 2, 4.0), "a", inner_lr=0.01,
    )  # fmt: skip
    yield field(
        "pinn", "Raissi et al. 2019; jayroxis/PINNs DNN", lambda: fields.pinn([2, 8, 8, 1]), "today", inner_lr=0.05
    )
    yield Published(
        "pinn_burgers", "Raissi et al. 2019; jayroxis/PINNs PhysicsInformedNN", lambda: fields.Burgers([2, 8, 8, 1]),
        POINT, (2,), "a", "mse", n_support=6, n_query=5,
    )  # fmt: skip
    yield Published(
        "deeponet", "Lu et al. 2021; coral DeepONet", lambda: fields.DeepONet([3, 6, 8], [2, 6, 8]),
        both(normal(3), normal(5, 2)), (5, 1), "b", "mse",
    )  # fmt: skip
    yield Published(
        "deeponet_cartesian", "Lu et al. 2021; deepxde DeepONetCartesianProd",
        lambda: fields.DeepONetCartesian([3, 6, 8], [2, 6, 8], 5), (3,), (5,), "a", "mse",
    )  # fmt: skip
    yield Published(
        "fno2d", "Li et al. 2021; fourier_neural_operator FNO2d", lambda: fields.FNO2d(1, 3, 2, 2), (6, 6, 1),
        (6, 6, 1), "never", "mse", reason="fft",
    )  # fmt: skip


def recurrent_models() -> Iterable[Published]:
    series = (5, 3)
    yield Published(
        "lstm", "Hochreiter and Schmidhuber 1997; PyTorch-LSTM-for-RUL-Prediction",
        lambda: recurrent.LstmRegressor(3, 6, 2), series, (1,), "b", "mse",
    )  # fmt: skip
    yield Published(
        "gru", "Cho et al. 2014; rul-lstm-rul-prediction", lambda: recurrent.GruRegressor(3, 6), series, (1,), "b",
        "mse",
    )  # fmt: skip
    for name, layer, size in (
        ("unilstm", recurrent.UniLSTM, 4), ("unigru", recurrent.UniGRU, 4), ("bilstm", recurrent.ParallelBiLSTM, 8)
    ):  # fmt: skip
        yield Published(
            name, f"Hochreiter and Schmidhuber 1997; parallel-metalearn {layer.__name__}"
            if name != "unigru" else "Cho et al. 2014; parallel-metalearn UniGRU",
            lambda layer=layer, size=size: recurrent.Last(layer(3, 4), size, CLASSES), series, CLASSES, "a",
        )  # fmt: skip
    yield Published(
        "tcn_adding", "Bai et al. 2018; locuslab/TCN adding_problem",
        lambda: recurrent.TCN(2, [4, 5], 2, 1, log_softmax=False), (2, 6), (1,), "b", "mse",
    )  # fmt: skip
    yield Published(
        "tcn_mnist", "Bai et al. 2018; locuslab/TCN mnist_pixel",
        lambda: recurrent.TCN(1, [4, 5], 2, CLASSES, log_softmax=True), (1, 6), CLASSES, "b", negative_log_likelihood,
    )  # fmt: skip


def policy_models() -> Iterable[Published]:
    sizes = [3, 8, 8, 2]
    yield Published(
        "categorical_policy", "Finn et al. 2017; pytorch-maml-rl CategoricalMLPPolicy",
        lambda: policies.CategoricalPolicy(sizes, F.relu), (3,), acted(labels(2)), "today", reinforce,
    )  # fmt: skip
    yield Published(
        "normal_policy", "Finn et al. 2017; pytorch-maml-rl NormalMLPPolicy",
        lambda: policies.NormalPolicy(sizes, torch.tanh), (3,), acted(normal(2)), "today", reinforce,
    )  # fmt: skip
    yield Published(
        "garage_mlp", "Duan et al. 2016; garage MLPModule", lambda: policies.MLPModule(sizes, norm=True), (3,), (2,),
        "today", "mse",
    )  # fmt: skip
    yield Published(
        "garage_gaussian", "Duan et al. 2016; garage GaussianMLPModule", lambda: policies.GaussianMLPModule(sizes),
        (3,), acted(normal(2)), "never", reinforce, reason="what it computes depends on values of tensors",
    )  # fmt: skip
    yield Published(
        "cavia_policy", "Zintgraf et al. 2019; cavia CaviaMLPPolicy", lambda: policies.CaviaPolicy(3, 2, 8, 2), (3,),
        acted(normal(2)), "a", reinforce_each, adapted=("context_params",),
    )  # fmt: skip


def graph_models() -> Iterable[Published]:
    yield Published(
        "gcn", "Kipf and Welling 2017; pygcn GCN", lambda: graphs.GCN(5, 4, 6, CLASSES), (4,), CLASSES, "b",
        negative_log_likelihood, n_support=5, n_query=5,
    )  # fmt: skip
    yield Published(
        "gcn_of_graphs", "Kipf and Welling 2017; pygcn GCN, a graph as a sample",
        lambda: graphs.GCN(5, 4, 6, CLASSES), (5, 4), CLASSES, "a", negative_log_likelihood,
    )  # fmt: skip


def adapter_models() -> Iterable[Published]:
    context = ("context_params",)
    yield Published(
        "lora", "Hu et al. 2022; loralib Linear",
        lambda: nn.Sequential(adapters.LoRALinear(3, 8, 2), nn.ReLU(), adapters.LoRALinear(8, 1, 2)), (3,), (1,),
        "today", "mse",
    )  # fmt: skip
    yield Published(
        "lora_conv", "Hu et al. 2022; loralib Conv2d",
        lambda: nn.Sequential(adapters.LoRAConv2d(1, 4, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, CLASSES)),
        (1, 6, 6), CLASSES, "a",
    )  # fmt: skip
    yield Published(
        "hypernetwork", "Ha et al. 2017; g1910/HyperNetworks", lambda: adapters.HyperResNet(3, 4, CLASSES), IMAGE,
        CLASSES, "a", inner_lr=0.01,
    )  # fmt: skip
    yield Published(
        "hypernetwork_mlp", "von Oswald et al. 2020; hypercl", lambda: adapters.HyperMLP([3, 6, 1], 4, 8), (3,), (1,),
        "a", "mse",
    )  # fmt: skip
    yield Published(
        "weight_norm", "Salimans and Kingma 2016; torch weight_norm", lambda: adapters.weight_normed([3, 6, 6, 1]),
        (3,), (1,), "a", "mse",
    )  # fmt: skip
    vectors = tuple(f"{i}.parametrizations.weight.0.{v}" for i in (0, 2) for v in ("_u", "_v"))
    yield Published(
        "spectral_norm", "Miyato et al. 2018; torch spectral_norm", lambda: adapters.spectral_normed([3, 6, 2]),
        (3,), (2,), "b", "mse", moves=vectors,
    )  # fmt: skip
    yield Published(
        "cavia", "Zintgraf et al. 2019; cavia CaviaModel", lambda: adapters.CaviaModel(1, 1, 4, [8, 8]), (1,), (1,),
        "a", "mse", adapted=context, n_support=6, n_query=5, inner_lr=0.5,
    )  # fmt: skip
    for name, film in (("cavia_film", True), ("cavia_condconv", False)):
        yield Published(
            name, f"Zintgraf et al. 2019; cavia CondConvNet, context {'by FiLM' if film else 'at the last layer'}",
            lambda film=film: adapters.CondConvNet(4, 3, film, CLASSES), (3, 16, 16), CLASSES, "a", adapted=context,
        )  # fmt: skip
    yield Published(
        "melu", "Lee et al. 2019; MeLU", lambda: adapters.MeLU(2, 4, 3, 2, 4, 8), ratings, (1,), "c", "mse",
        adapted=tuple(f"{layer}.{p}" for layer in ("fc1", "fc2", "linear_out") for p in ("weight", "bias")),
    )  # fmt: skip


FAMILIES = {
    "Convolutional": convolutional_models,
    "Residual": residual_models,
    "Mobile": mobile_models,
    "Attention and mixers": attention_models,
    "Fields and operators": field_models,
    "Sequences": recurrent_models,
    "Policies": policy_models,
    "Graphs": graph_models,
    "Adapters, hypernetworks and contexts": adapter_models,
}
MODELS = {model.name: model for models in FAMILIES.values() for model in models()}
