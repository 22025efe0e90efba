"""Transformers: of images, of tokens, and with shifted windows."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Patches(nn.Module):
    """[n, c, h p, w p] as [n, h w, p p c]: einops' "b c (h p1) (w p2) -> b (h w) (p1 p2 c)"."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        p = self.size
        x = x.reshape(n, c, height // p, p, width // p, p)
        return x.permute(0, 2, 4, 3, 5, 1).reshape(n, (height // p) * (width // p), p * p * c)


class FeedForward(nn.Sequential):
    def __init__(self, dim: int, hidden: int) -> None:
        layers = nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(0.0), nn.Linear(hidden, dim)
        super().__init__(*layers, nn.Dropout(0.0))


class Attention(nn.Module):
    """vit-pytorch's attention: one product gives queries, keys and values."""

    def __init__(self, dim: int, heads: int, head: int, project: bool = True) -> None:
        super().__init__()
        self.heads, self.scale = heads, head**-0.5
        self.norm = nn.LayerNorm(dim)
        self.attend = nn.Softmax(dim=-1)
        self.to_qkv = nn.Linear(dim, 3 * heads * head, bias=False)
        self.to_out = nn.Linear(heads * head, dim, bias=project)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        qkv = self.to_qkv(self.norm(x)).chunk(3, dim=-1)
        q, k, v = (t.reshape(n, length, self.heads, -1).permute(0, 2, 1, 3) for t in qkv)
        dots = torch.matmul(q, k.transpose(-1, -2)) * self.scale
        out = torch.matmul(self.attend(dots), v)
        return self.to_out(out.permute(0, 2, 1, 3).reshape(n, length, -1))


class Transformer(nn.Module):
    def __init__(self, dim: int, depth: int, heads: int, head: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        layers = [[Attention(dim, heads, head), FeedForward(dim, hidden)] for _ in range(depth)]
        self.layers = nn.ModuleList(nn.ModuleList(pair) for pair in layers)

    def forward(self, x: Tensor) -> Tensor:
        for attention, feed_forward in self.layers:
            x = attention(x) + x
            x = feed_forward(x) + x
        return self.norm(x)


class ViT(nn.Module):
    """vit-pytorch's ViT: a class token in front, learned positions, the class token's output."""

    def __init__(self, image: int, patch: int, dim: int, depth: int, heads: int, classes: int) -> None:
        super().__init__()
        patches, size = (image // patch) ** 2, 3 * patch**2
        layers = Patches(patch), nn.LayerNorm(size), nn.Linear(size, dim), nn.LayerNorm(dim)
        self.to_patch_embedding = nn.Sequential(*layers)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.pos_embedding = nn.Parameter(torch.randn(1, patches + 1, dim))
        self.dropout = nn.Dropout(0.0)
        self.transformer = Transformer(dim, depth, heads, dim // heads, dim)
        self.mlp_head = nn.Linear(dim, classes)

    def forward(self, img: Tensor) -> Tensor:
        x = self.to_patch_embedding(img)
        n, length, _ = x.shape
        x = torch.cat((self.cls_token.expand(n, -1, -1), x), dim=1)
        x += self.pos_embedding[:, : (length + 1)]
        x = self.transformer(self.dropout(x))
        return self.mlp_head(x[:, 0])


class SimpleViT(nn.Module):
    """vit-pytorch's SimpleViT: sines as positions, in a tensor that is no buffer; the mean over the tokens."""

    def __init__(self, image: int, patch: int, dim: int, depth: int, heads: int, classes: int) -> None:
        super().__init__()
        size = 3 * patch**2
        layers = Patches(patch), nn.LayerNorm(size), nn.Linear(size, dim), nn.LayerNorm(dim)
        self.to_patch_embedding = nn.Sequential(*layers)
        self.pos_embedding = self.sines(image // patch, dim)
        self.transformer = Transformer(dim, depth, heads, dim // heads, dim)
        self.to_latent = nn.Identity()
        self.linear_head = nn.Linear(dim, classes)

    @staticmethod
    def sines(side: int, dim: int) -> Tensor:
        y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        omega = 1.0 / 10000 ** (torch.arange(dim // 4) / (dim // 4 - 1))
        y, x = (t.flatten()[:, None] * omega[None, :] for t in (y, x))
        return torch.cat((x.sin(), x.cos(), y.sin(), y.cos()), dim=1)

    def forward(self, img: Tensor) -> Tensor:
        x = self.to_patch_embedding(img)
        x += self.pos_embedding.to(img.device, dtype=x.dtype)
        x = self.transformer(x).mean(dim=1)
        return self.linear_head(self.to_latent(x))


# -- Swin ------------------------------------------------------------------------------------------------------


def window_partition(x: Tensor, size: int) -> Tensor:
    """[n, h, w, c] as windows [n * windows, size, size, c]."""
    n, h, w, c = x.shape
    x = x.view(n, h // size, size, w // size, size, c)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, size, size, c)


def window_reverse(windows: Tensor, size: int, h: int, w: int) -> Tensor:
    n = int(windows.shape[0] / (h * w / size / size))
    x = windows.view(n, h // size, w // size, size, size, -1)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(n, h, w, -1)


class WindowAttention(nn.Module):
    """Attention in a window, with a table of relative positions that is indexed by a buffer, and an additive mask."""

    def __init__(self, dim: int, size: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale = heads, (dim // heads) ** -0.5
        self.table = nn.Parameter(0.1 * torch.randn((2 * size - 1) ** 2, heads))
        at = torch.flatten(torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")), 1)
        relative = (at[:, :, None] - at[:, None, :]).permute(1, 2, 0) + size - 1
        self.register_buffer("index", relative[..., 0] * (2 * size - 1) + relative[..., 1])
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0] * self.scale, qkv[1], qkv[2]
        attn = q @ k.transpose(-2, -1)
        bias = self.table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1).contiguous()
        attn = attn + bias.unsqueeze(0)
        if mask is not None:
            windows = mask.shape[0]
            attn = attn.view(b // windows, windows, self.num_heads, n, n) + mask.unsqueeze(1).unsqueeze(0)
            attn = attn.view(-1, self.num_heads, n, n)
        attn = self.softmax(attn)
        return self.proj((attn @ v).transpose(1, 2).reshape(b, n, c))


class SwinBlock(nn.Module):
    """Window attention on a rolled image, whose windows are masked at the seam."""

    def __init__(self, dim: int, side: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.side, self.window_size, self.shift_size = side, window, shift
        self.norm1, self.attn = nn.LayerNorm(dim), WindowAttention(dim, window, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        mask = None
        if shift > 0:
            regions = torch.zeros((1, side, side, 1))
            parts = slice(0, -window), slice(-window, -shift), slice(-shift, None)
            for i, rows in enumerate(parts):
                for j, columns in enumerate(parts):
                    regions[:, rows, columns, :] = 3 * i + j
            flat = window_partition(regions, window).view(-1, window * window)
            mask = flat.unsqueeze(1) - flat.unsqueeze(2)
            mask = mask.masked_fill(mask != 0, -100.0).masked_fill(mask == 0, 0.0)
        self.register_buffer("attn_mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        n, length, c = x.shape
        side, window, shift = self.side, self.window_size, self.shift_size
        shortcut = x
        x = self.norm1(x).view(n, side, side, c)
        if shift > 0:
            x = torch.roll(x, shifts=(-shift, -shift), dims=(1, 2))
        windows = window_partition(x, window).view(-1, window * window, c)
        windows = self.attn(windows, mask=self.attn_mask).view(-1, window, window, c)
        x = window_reverse(windows, window, side, side)
        if shift > 0:
            x = torch.roll(x, shifts=(shift, shift), dims=(1, 2))
        x = shortcut + x.view(n, length, c)
        return x + self.mlp(self.norm2(x))


class PatchMerging(nn.Module):
    """Every second row and column, concatenated."""

    def __init__(self, dim: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.norm, self.reduction = nn.LayerNorm(4 * dim), nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        n, _, c = x.shape
        x = x.view(n, self.side, self.side, c)
        parts = x[:, 0::2, 0::2, :], x[:, 1::2, 0::2, :], x[:, 0::2, 1::2, :], x[:, 1::2, 1::2, :]
        x = torch.cat(parts, -1).view(n, -1, 4 * c)
        return self.reduction(self.norm(x))


class Swin(nn.Module):
    """A convolution to patches, a block without and one with shift, a merge, a pool over the tokens and a head."""

    def __init__(self, dim: int, side: int, heads: int, window: int, classes: int) -> None:
        super().__init__()
        self.proj, self.norm = nn.Conv2d(3, dim, kernel_size=2, stride=2), nn.LayerNorm(dim)
        blocks = [SwinBlock(dim, side, heads, window, 0), SwinBlock(dim, side, heads, window, window // 2)]
        self.layers = nn.Sequential(*blocks, PatchMerging(dim, side))
        self.last, self.avgpool = nn.LayerNorm(2 * dim), nn.AdaptiveAvgPool1d(1)
        self.head = nn.Linear(2 * dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.proj(x).flatten(2).transpose(1, 2))
        x = self.last(self.layers(x))
        x = torch.flatten(self.avgpool(x.transpose(1, 2)), 1)
        return self.head(x)


# -- Tokens ----------------------------------------------------------------------------------------------------


class TokenMean(nn.Module):
    """A layer of tokens [n, length, dim], the mean over them and a linear layer."""

    def __init__(self, layer: nn.Module, dim: int, classes: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


class DotProductSelfAttention(nn.Module):
    """parallel-metalearn's attention of one head."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        self.scale = dim**0.5

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        q, k, v = self.query(x), self.key(x), self.value(x)
        scores = torch.matmul(q, k.transpose(-2, -1)) / self.scale
        return torch.matmul(F.softmax(scores, dim=-1), v)


class CausalSelfAttention(nn.Module):
    """minGPT's attention: the future is filled with -inf before the softmax."""

    def __init__(self, dim: int, heads: int, block: int) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.attn_dropout, self.resid_dropout = nn.Dropout(0.0), nn.Dropout(0.0)
        self.register_buffer("bias", torch.tril(torch.ones(block, block)).view(1, 1, block, block))
        self.n_head, self.n_embd = heads, dim

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        q, k, v = (a.view(b, t, self.n_head, c // self.n_head).transpose(1, 2) for a in (q, k, v))
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf"))
        att = self.attn_dropout(F.softmax(att, dim=-1))
        y = (att @ v).transpose(1, 2).contiguous().view(b, t, c)
        return self.resid_dropout(self.c_proj(y))


class NewGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


class GPTBlock(nn.Module):
    """minGPT's block, whose MLP is a ModuleDict."""

    def __init__(self, dim: int, heads: int, block: int) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(dim), CausalSelfAttention(dim, heads, block)
        self.ln_2 = nn.LayerNorm(dim)
        layers = {"c_fc": nn.Linear(dim, 4 * dim), "c_proj": nn.Linear(4 * dim, dim), "act": NewGELU()}
        self.mlp = nn.ModuleDict(layers)

    def mlpf(self, x: Tensor) -> Tensor:
        return self.mlp.c_proj(self.mlp.act(self.mlp.c_fc(x)))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlpf(self.ln_2(x))


class GPT(nn.Module):
    """minGPT: tokens [n, length] to (logits [n, length, vocabulary], None)."""

    def __init__(self, vocabulary: int, dim: int, heads: int, layers: int, block: int) -> None:
        super().__init__()
        parts = {
            "wte": nn.Embedding(vocabulary, dim),
            "wpe": nn.Embedding(block, dim),
            "drop": nn.Dropout(0.0),
            "h": nn.ModuleList(GPTBlock(dim, heads, block) for _ in range(layers)),
            "ln_f": nn.LayerNorm(dim),
        }
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = nn.Linear(dim, vocabulary, bias=False)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        _, t = idx.size()
        pos = torch.arange(0, t, dtype=torch.long, device=idx.device).unsqueeze(0)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))
        for block in self.transformer.h:
            x = block(x)
        logits = self.lm_head(self.transformer.ln_f(x))
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
        return logits, loss


class BertAttention(nn.Module):
    """BERT-pytorch's attention: a list of three linear layers, and a mask filled with -1e9."""

    def __init__(self, heads: int, dim: int) -> None:
        super().__init__()
        self.d_k, self.h = dim // heads, heads
        self.linear_layers = nn.ModuleList([nn.Linear(dim, dim) for _ in range(3)])
        self.output_linear = nn.Linear(dim, dim)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        n = query.size(0)
        pairs = zip(self.linear_layers, (query, key, value), strict=True)
        query, key, value = (layer(x).view(n, -1, self.h, self.d_k).transpose(1, 2) for layer, x in pairs)
        scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(query.size(-1))
        if mask is not None:
            scores = scores.masked_fill(mask == 0, -1e9)
        x = torch.matmul(F.softmax(scores, dim=-1), value)
        return self.output_linear(x.transpose(1, 2).contiguous().view(n, -1, self.h * self.d_k))


class BertNorm(nn.Module):
    """BERT-pytorch's LayerNorm: torch's unbiased `std`, and eps outside of the root."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.a_2, self.b_2, self.eps = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        std = x.std(-1, keepdim=True)
        return self.a_2 * (x - mean) / (std + self.eps) + self.b_2


class BertBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attention = BertAttention(heads, dim)
        self.w_1, self.w_2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.norm1, self.norm2 = BertNorm(dim), BertNorm(dim)
        self.dropout = nn.Dropout(p=0.0)

    @staticmethod
    def gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.norm1(x)
        x = x + self.dropout(self.attention(y, y, y, mask=mask))
        return self.dropout(x + self.w_2(self.gelu(self.w_1(self.norm2(x)))))


class Bert(nn.Module):
    """BERT-pytorch: tokens and segments, each [n, length]; token 0 is padding; the first token's output counts."""

    def __init__(self, vocabulary: int, length: int, dim: int, layers: int, heads: int, classes: int) -> None:
        super().__init__()
        self.token, self.segment = nn.Embedding(vocabulary, dim, padding_idx=0), nn.Embedding(3, dim, padding_idx=0)
        angle = torch.arange(length)[:, None] * torch.exp(torch.arange(0, dim, 2) * -(math.log(10000.0) / dim))
        self.register_buffer("pe", torch.stack([angle.sin(), angle.cos()], -1).flatten(1).unsqueeze(0))
        self.blocks = nn.ModuleList(BertBlock(dim, heads) for _ in range(layers))
        self.head = nn.Linear(dim, classes)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        x, segment_info = inputs
        mask = (x > 0).unsqueeze(1).repeat(1, x.size(1), 1).unsqueeze(1)
        x = self.token(x) + self.pe[:, : x.size(1)] + self.segment(segment_info)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x[:, 0])
