"""MiT: a diffusion transformer on pixels with long skips, conditioned on perturbation, experiment and cell type.

Jones et al. 2026 (arXiv 2603.26790), after DiT (Peebles & Xie 2023). Tensor names follow the checkpoints of
microscopy-flow-matching: `dit.*` the transformer, `adaptor.*` what makes the condition vector. Normalisation is
RMS over channels without weights wherever DiT has LayerNorm.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from generators.adm import AdmNet, sinusoid

EPS = 1e-6
DROPOUT = 0.1


def rms_norm(x: Tensor) -> Tensor:
    """x / sqrt(mean of x^2 over the last axis + 1e-6)."""
    return F.rms_norm(x, x.shape[-1:], None, EPS)


def position_code(side: int, width: int) -> Tensor:
    """Sine-cosine code of a square grid: (1, side^2, width), first half from the column, second from the row."""
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    place = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat([place.sin(), place.cos()], 1)
    columns, rows = line[None].expand(side, -1, -1), line[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], 2).flatten(0, 1)[None].float()


class ScalarEmbedder(nn.Module):
    """Times (or doses) (B,) in [0, 1] -> (B, width): cosines then sines of `frequencies` / 2 frequencies, an MLP."""

    def __init__(self, width: int, frequencies: int) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def sinusoid(self, t: Tensor) -> Tensor:
        """(B,) -> (B, frequencies)."""
        return sinusoid(t.float(), self.frequencies)

    def forward(self, t: Tensor) -> Tensor:
        out: Tensor = self.mlp(self.sinusoid(t))
        return out


class LabelEmbedder(nn.Module):
    """A table of label vectors; its last row means "no label"."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(rows, width)

    @property
    def labels(self) -> int:
        """How many labels there are; the same number is the label for "none"."""
        return self.embedding_table.num_embeddings - 1

    @property
    def null(self) -> int:
        """The label that means "none"."""
        return self.labels

    def forward(self, labels: Tensor) -> Tensor:
        out: Tensor = self.embedding_table(labels)
        return out


class Attention(nn.Module):
    """Multi-head self-attention (B, N, D) -> (B, N, D); the joint projection is ordered [q | k | v][head][channel]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        return F.dropout(self.proj(h), DROPOUT, self.training)


class MLP(nn.Module):
    """Linear, GELU in its tanh form, Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


def modulation(width: int, parts: int) -> nn.Sequential:
    """SiLU and the linear layer that makes shifts, scales and gates of the condition."""
    return nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))


class Block(nn.Module):
    """A transformer block whose shifts, scales and gates come from the condition: (B, N, D), (B, D) -> (B, N, D)."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.mlp = MLP(width, hidden)
        self.adaLN_modulation = modulation(width, 6)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition)[:, None].chunk(6, 2)
        x = x + gate1 * self.attn(rms_norm(x) * (1 + scale1) + shift1)
        out: Tensor = x + gate2 * self.mlp(rms_norm(x) * (1 + scale2) + shift2)
        return out


class FingerprintEmbedder(nn.Module):
    """The label table's successor for unseen compounds: a vector per label from its stored fingerprint and dose.

    Buffers: embs_array (labels, D) fingerprints, dose_array (labels,) scaled to [0, 1]. There is no row "no label".
    """

    embs_array: Tensor
    dose_array: Tensor

    def __init__(self, rows: int, inputs: int, width: int, hidden: int, depth: int, frequencies: int) -> None:
        super().__init__()
        self.register_buffer("embs_array", torch.zeros(rows, inputs))
        self.register_buffer("dose_array", torch.zeros(rows))
        self.in_proj = nn.Linear(inputs, width)
        # A fingerprint is one token, which attends to itself alone: the number of heads changes nothing.
        self.blocks = nn.ModuleList(Block(width, 1, hidden) for _ in range(depth))
        self.dose_embedder = ScalarEmbedder(width, frequencies)

    @property
    def labels(self) -> int:
        """How many labels there are."""
        return self.embs_array.shape[0]

    @property
    def null(self) -> None:
        """There is no label that means "none"."""
        return None

    def embed(self, fingerprints: Tensor, doses: Tensor) -> Tensor:
        """Fingerprints (B, D) and scaled doses (B,) -> (B, width)."""
        x = self.in_proj(fingerprints)[:, None]
        condition = self.dose_embedder(doses)
        for block in self.blocks:
            x = block(x, condition)
        out: Tensor = x[:, 0]
        return out

    def forward(self, labels: Tensor) -> Tensor:
        return self.embed(self.embs_array[labels], self.dose_array[labels])


class Adaptor(nn.Module):
    """The condition vector: time + perturbation + experiment + cell type, each (B, width)."""

    def __init__(
        self, width: int, frequencies: int, y_embedder: LabelEmbedder | FingerprintEmbedder, rows_e: int, rows_c: int
    ) -> None:
        super().__init__()
        self.t_embedder = ScalarEmbedder(width, frequencies)
        self.y_embedder = y_embedder
        self.e_embedder = LabelEmbedder(rows_e, width)
        self.c_embedder = LabelEmbedder(rows_c, width)

    def forward(self, t: Tensor, y: Tensor, e: Tensor, c: Tensor) -> Tensor:
        """Times (B,) and labels e, c (B,) int64 -> (B, width). y: rows of `y_embedder` (B, width).

        In float32 also under autocast: in bfloat16 times near 1 would be one.
        """
        with torch.autocast(t.device.type, enabled=False):
            out: Tensor = self.t_embedder(t) + y + self.e_embedder(e) + self.c_embedder(c)
            return out


class PatchEmbed(nn.Module):
    """Non-overlapping patches as tokens, row major: (B, C, S, S) -> (B, (S / patch)^2, width)."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return out


class SkipLayer(nn.Module):
    """Merges a token stream with that of an earlier block; no residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        out: Tensor = self.linear(rms_norm(torch.cat([x, skip], 2)))
        return out


class FinalLayer(nn.Module):
    """Tokens to the pixels of their patches: (B, N, D), (B, D) -> (B, N, patch * patch * C)."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = modulation(width, 2)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, 2)
        out: Tensor = self.linear(rms_norm(x) * (1 + scale) + shift)
        return out


class Transformer(nn.Module):
    """(B, C, S, S) and the condition (B, width) -> velocity (B, C, S, S). `side` is S; only square images."""

    def __init__(self, channels: int, side: int, patch: int, width: int, depth: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.channels, self.side, self.patch, self.heads = channels, side, patch, heads
        self.pos_embed = nn.Parameter(position_code(side // patch, width), requires_grad=False)
        self.x_embedder = PatchEmbed(channels, width, patch)
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch * patch * channels)
        self.skip_layers = nn.ModuleList(SkipLayer(width) for _ in range(depth // 2))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        half = len(self.skip_layers)
        skips: list[Tensor] = []
        h = self.x_embedder(x) + self.pos_embed
        for i, block in enumerate(self.blocks):
            if i >= half:
                h = self.skip_layers[i - half](h, skips.pop())
            h = block(h, condition)
            if i < half:
                skips.append(h)
        return self.image(self.final_layer(h, condition))

    def image(self, tokens: Tensor) -> Tensor:
        """Patches (B, N, patch * patch * C), ordered (row, column, channel), put together: (B, C, S, S)."""
        grid = self.side // self.patch
        parts = tokens.view(-1, grid, grid, self.patch, self.patch, self.channels)
        return parts.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.channels, self.side, self.side)


class MiTNet(nn.Module):
    """Transformer and adaptor, under the names of the official state dict."""

    def __init__(self, dit: Transformer, adaptor: Adaptor) -> None:
        super().__init__()
        self.dit = dit
        self.adaptor = adaptor

    def forward(self, x: Tensor, t: Tensor, y: Tensor, e: Tensor, c: Tensor) -> Tensor:
        """x (B, C, S, S), t (B,), y rows (B, width), e and c labels (B,) int64 -> velocity (B, C, S, S)."""
        out: Tensor = self.dit(x, self.adaptor(t, y, e, c))
        return out


class AdmMiTNet(nn.Module):
    """The same repository's U-Net variant: CellFlux's network, whose condition is the adaptor's sum at time 0."""

    def __init__(self, adm: AdmNet, adaptor: Adaptor) -> None:
        super().__init__()
        self.adm = adm
        self.adaptor = adaptor

    def forward(self, x: Tensor, t: Tensor, y: Tensor, e: Tensor, c: Tensor) -> Tensor:
        """x (B, C, H, W), t (B,), y rows (B, width), e and c labels (B,) int64 -> velocity (B, C, H, W)."""
        out: Tensor = self.adm(x, t, self.adaptor(torch.zeros_like(t), y, e, c))
        return out
