"""More of the zoo: `LAYERS[name]()`, models made for the sake of one kind of layer or option.

Biases stand where no later layer takes them out again: a constant added to all keys of an attention, or to
a channel before its normalisation, changes nothing, so its exact gradient is 0 while its count is not.
"""

import torch
from torch import nn
from torch.nn import functional

from zoo import classify, sparse_inputs


class Interaction(nn.Module):
    """Two views of a sample meet in a bilinear form, at two positions."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 5)
        self.bilinear = nn.Bilinear(3, 5, 3)

    def forward(self, x):
        left, right = torch.relu(self.first(x)), torch.relu(self.second(x))
        return self.bilinear(left, right).sum(1)


class Slopes(nn.Module):
    """One slope per channel and one for all."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv1d(2, 4, 3)
        self.each, self.all = nn.PReLU(4), nn.PReLU()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.all(self.each(self.body(x)).amax(-1)))


class CrossAttention(nn.Module):
    """Queries, keys and values of different tensors and widths, some keys masked."""

    def __init__(self):
        super().__init__()
        self.queries, self.keys = nn.Embedding(9, 8), nn.Embedding(9, 6)
        self.attention = nn.MultiheadAttention(
            8, 2, kdim=6, vdim=5, bias=False, batch_first=True, add_zero_attn=True
        )
        self.values = nn.Linear(6, 5)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        keys = self.keys(x)
        values = torch.relu(self.values(keys))
        queries = self.queries(x[:, :2])
        found, _ = self.attention(queries, keys, values, key_padding_mask=x == 0)
        return self.head(torch.relu(found)).mean(1)


class Decoder(nn.Module):
    """Attends to itself causally and to a memory."""

    def __init__(self):
        super().__init__()
        self.embedding, self.memory = nn.Embedding(9, 4), nn.Linear(4, 4)
        self.layer = nn.TransformerDecoderLayer(
            4, 2, 8, dropout=0.0, batch_first=True, norm_first=True, bias=False
        )
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        hidden = self.embedding(x)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=hidden.dtype)
        memory = torch.tanh(self.memory(hidden.flip(1)))
        return self.head(self.layer(hidden, memory, tgt_mask=mask, tgt_is_causal=True)).mean(1)


class GatedMLP(nn.Module):
    """SwiGLU, a product of two linear maps."""

    def __init__(self, width, hidden):
        super().__init__()
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """A pre-norm block whose attention is one functional call."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.RMSNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.mlp = GatedMLP(width, 2 * width)

    def forward(self, x):
        split = self.qkv(self.before(x)).unflatten(-1, (3, self.heads, -1))
        queries, keys, values = split.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.between(x))


class GPT(nn.Module):
    """A language model: learned positions, two blocks, a head tied to the embedding."""

    def __init__(self, tokens=11, length=5, width=8):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(tokens, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(Block(width, 2), Block(width, 4))
        self.head = nn.Linear(width, tokens, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x):
        places = torch.arange(x.shape[1]).unsqueeze(0)
        return self.head(self.blocks(self.tokens(x) + self.positions(places)))


def next_token_loss(logits, targets):
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


class SharedDepth(nn.Module):
    """One transformer layer run three times, as ALBERT does."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True, bias=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        hidden = self.embedding(x)
        for _ in range(3):
            hidden = self.layer(hidden)
        return self.head(hidden).mean(1)


class Deep(nn.Module):
    """A recurrent layer between an embedding and a head."""

    def __init__(self, layer, width):
        super().__init__()
        self.embedding, self.layer = nn.Embedding(9, 4), layer
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        output, _ = self.layer(self.embedding(x))
        return self.head(output.mean(1))


class CellLoop(nn.Module):
    """A cell called at each time step by hand, its state fed back into a second one."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.lower, self.upper = nn.LSTMCell(4, 3), nn.GRUCell(3, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        state, top = None, None
        for token in self.embedding(x).unbind(1):
            state = self.lower(token, state)
            top = self.upper(torch.relu(state[0]), top)
        return self.head(top)


class Bags(nn.Module):
    """Bags of unequal lengths through offsets; 0 in the input is filling."""

    def __init__(self, mode):
        super().__init__()
        self.bags = nn.EmbeddingBag(8, 5, mode=mode, padding_idx=7, include_last_offset=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        lengths = (x != 0).sum(1)
        return self.head(
            torch.tanh(self.bags(x[x != 0], functional.pad(lengths.cumsum(0), (1, 0))))
        )


class WeightedBags(nn.Module):
    """Per-sample weights that are learned, and zero for some entries."""

    def __init__(self):
        super().__init__()
        self.weights = nn.Embedding(8, 1)
        self.bags = nn.EmbeddingBag(8, 5, mode="sum")
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        weights = torch.relu(self.weights(x).squeeze(-1))
        return self.head(torch.relu(self.bags(x, per_sample_weights=weights)))


class Residual(nn.Module):
    """A convolution block with GroupNorm and a shortcut, 1x1 where the shape changes."""

    def __init__(self, channels, wider, stride):
        super().__init__()
        self.first = nn.Conv2d(channels, wider, 3, stride, padding=1, bias=False)
        self.second = nn.Conv2d(wider, wider, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.GroupNorm(2, wider) for _ in range(2))
        same = stride == 1 and channels == wider
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels, wider, 1, stride)

    def forward(self, x):
        hidden = functional.relu(self.norms[0](self.first(x)), inplace=True)
        return functional.relu(self.norms[1](self.second(hidden)) + self.shortcut(x))


def resnet():
    blocks = [Residual(4, 4, 1), Residual(4, 6, 2)]
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )


def flat_head(*layers, width):
    return nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(width, 3))


def reconstruct(model, inputs):
    return model, functional.mse_loss, inputs, inputs.clone()


def tokens(samples=6, length=4):
    return torch.randint(0, 9, (samples, length))


LAYERS = {
    "conv1d, dilated, strided, circular": lambda: classify(
        flat_head(
            nn.Conv1d(2, 4, 3, stride=2, dilation=2, padding=2, padding_mode="circular"), width=16
        ),
        sparse_inputs(6, 2, 8),
    ),
    "conv3d, grouped": lambda: classify(
        flat_head(nn.Conv3d(2, 4, (1, 3, 2), groups=2, padding=(0, 1, 0)), width=24),
        sparse_inputs(5, 2, 2, 3, 2),
    ),
    "depthwise and pointwise": lambda: classify(
        flat_head(
            nn.Conv2d(3, 6, 3, groups=3, padding=1, padding_mode="reflect"),
            nn.ReLU6(),
            nn.Conv2d(6, 2, 1),
            nn.MaxPool2d(2),
            width=8,
        ),
        sparse_inputs(5, 3, 4, 4),
    ),
    "convolutional autoencoder": lambda: reconstruct(
        nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2),
            nn.ReLU(),
            nn.ConvTranspose2d(4, 2, 3, stride=2, output_padding=1, groups=2),
            nn.Hardtanh(),
            nn.Conv2d(2, 1, 1),
        ),
        sparse_inputs(5, 1, 6, 6),
    ),
    "bilinear": lambda: classify(Interaction(), sparse_inputs(6, 2, 4)),
    "prelu": lambda: classify(Slopes(), sparse_inputs(6, 2, 5)),
    "instance norm": lambda: classify(
        flat_head(nn.Conv2d(1, 3, 3, bias=False), nn.InstanceNorm2d(3, affine=True), width=3 * 9),
        sparse_inputs(5, 1, 5, 5),
    ),
    "cross attention": lambda: classify(CrossAttention(), tokens()),
    "decoder": lambda: classify(Decoder(), tokens()),
    "gpt": lambda: (
        GPT(),
        next_token_loss,
        torch.randint(0, 11, (6, 5)),
        torch.randint(0, 11, (6, 5)),
    ),
    "gated mlp": lambda: classify(
        nn.Sequential(GatedMLP(4, 6), nn.ReLU(), nn.Linear(4, 3)), sparse_inputs(7, 4)
    ),
    "shared depth": lambda: classify(SharedDepth(), tokens()),
    "rnn of three layers": lambda: classify(
        Deep(nn.RNN(4, 5, 3, nonlinearity="relu", batch_first=True), 5), tokens()
    ),
    "lstm with projections": lambda: classify(
        Deep(nn.LSTM(4, 5, 2, batch_first=True, proj_size=3), 3), tokens()
    ),
    "loop over cells": lambda: classify(CellLoop(), tokens()),
    "bags by offsets, mean": lambda: classify(Bags("mean"), torch.randint(0, 8, (7, 4))),
    "bags by offsets, max": lambda: classify(Bags("max"), torch.randint(0, 8, (7, 4))),
    "weighted bags": lambda: classify(WeightedBags(), torch.randint(0, 8, (7, 4))),
    "resnet": lambda: classify(resnet(), sparse_inputs(5, 1, 6, 6)),
    "evaluation mode": lambda: classify(
        nn.Sequential(
            nn.Linear(4, 8),
            nn.ReLU6(),
            nn.Dropout(0.5),
            nn.Linear(8, 6),
            nn.Hardtanh(),
            nn.AlphaDropout(0.5),
            nn.Linear(6, 3),
        ).eval(),
        3 * sparse_inputs(8, 4),
    ),
}
