"""Small models that cause trouble: `ZOO[name]()` gives a model, a loss, inputs and targets.

All treat samples independently, so that the oracle can judge them.
"""

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm


class Twice(nn.Module):
    """One layer used twice in a call."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.relu(self.layer(torch.relu(self.layer(x)))))


class Tied(nn.Module):
    """One parameter in two layers."""

    def __init__(self):
        super().__init__()
        self.down = nn.Linear(4, 4)
        self.up = nn.Linear(4, 4)
        self.up.weight = self.down.weight
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.relu(self.up(torch.relu(self.down(x)))))


class TiedEmbedding(nn.Module):
    """An output head that shares the embedding's weight."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(torch.relu(self.embedding(x)))


class TwoTables(nn.Module):
    """One embedding looked up twice in a call."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 4, padding_idx=0)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        hidden = self.embedding(x) + torch.relu(self.embedding(5 - x))
        return self.head(torch.relu(hidden).sum(1))


class Sequence(nn.Module):
    """Positions: linear maps, norms and an embedding on ``[batch, time, features]``."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.norm = nn.LayerNorm(6)
        self.hidden = nn.Linear(6, 5)
        self.root_norm = nn.RMSNorm(5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        hidden = torch.relu(self.hidden(self.norm(self.embedding(x))))
        return self.head(torch.relu(self.root_norm(hidden))).mean(1)


class Encoder(nn.Module):
    """A small transformer; without biases, since the key bias's exact gradient is 0."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True, bias=False)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.relu(self.encoder(self.embedding(x)))).mean(1)


class Recurrent(nn.Module):
    """Reads a sequence to its end."""

    def __init__(self, kind, **options):
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.layer = kind(4, 5, batch_first=True, **options)
        self.head = nn.LazyLinear(3)
        self(torch.zeros(1, 1, dtype=torch.long))

    def forward(self, x):
        output, _ = self.layer(self.embedding(x))
        return self.head(torch.relu(output[:, -1]))


class Branch(nn.Module):
    """A branch that depends on the sample, and a layer that no sample may reach."""

    def __init__(self):
        super().__init__()
        self.left = nn.Linear(4, 5)
        self.right = nn.Linear(4, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        chosen = (x[:, :1] > 0).to(x.dtype)
        return self.head(torch.relu(chosen * self.left(x) + (1 - chosen) * self.right(x)))


class Mixed(nn.Module):
    """No rule: an einsum over a parameter."""

    def __init__(self, inputs=4, outputs=4):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))

    def forward(self, x):
        return torch.einsum("...i,oi->...o", x, self.weight)


class Gated(nn.Module):
    """No rule: a gated unit."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.randn(4, 4))
        self.value = nn.Parameter(torch.randn(4, 4))
        self.shift = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return torch.sigmoid(x @ self.gate) * torch.relu(x @ self.value + self.shift)


class Polynomial(nn.Module):
    """No rule: a polynomial in x, whose coefficients meet in products."""

    def __init__(self):
        super().__init__()
        self.coefficients = nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        first, second, third = self.coefficients
        return first + second * x + second * third * x.square()


class Tokens(nn.Module):
    """A small vision transformer's parameters without a layer: token, positions, scales, a gate, a matrix."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.positions = nn.Parameter(torch.randn(1, 9, 4))
        self.before = nn.Parameter(torch.randn(4))
        self.after = nn.Parameter(torch.randn(4))
        self.gate = nn.Parameter(torch.randn(1))
        self.matrix = nn.Parameter(torch.randn(4, 5))
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x)], 1)
        x = torch.relu(x + self.positions[:, : x.shape[1]])
        x = x + torch.relu(x * self.before) * torch.sigmoid(self.gate) * self.after
        return self.head(torch.relu(x @ self.matrix)).mean(1)


class Averaged(nn.Sequential):
    """The mean over positions of what layers make of them."""

    def forward(self, x):
        return super().forward(x).mean(1)


class Root(nn.Linear):
    """The model is a layer itself."""


def mlp(activation=nn.ReLU, **options):
    return nn.Sequential(nn.Linear(4, 6, **options), activation(), nn.Linear(6, 3, **options))


def sparse_inputs(samples, *shape):
    return torch.randn(samples, *shape) * (torch.rand(samples, *shape) < 0.4)


def classify(model, inputs):
    return model, functional.cross_entropy, inputs, torch.randint(0, 3, (len(inputs),))


def frozen_first():
    model = mlp()
    model[0].requires_grad_(requires_grad=False)
    model[2].bias.requires_grad_(requires_grad=False)
    return model


ZOO = {
    "mlp": lambda: classify(mlp(), sparse_inputs(9, 4)),
    "mlp over one word of bits": lambda: classify(mlp(), sparse_inputs(67, 4)),
    "one sample": lambda: classify(mlp(), sparse_inputs(1, 4)),
    "zero inputs": lambda: classify(mlp(), torch.zeros(5, 4)),
    "no bias": lambda: classify(mlp(bias=False), sparse_inputs(6, 4)),
    "in-place relu": lambda: classify(
        nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)), sparse_inputs(8, 4)
    ),
    "in-place relu over positions": lambda: classify(
        Averaged(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)), sparse_inputs(5, 3, 4)
    ),
    "sigmoid": lambda: classify(mlp(nn.Sigmoid), sparse_inputs(7, 4)),
    "twice": lambda: classify(Twice(), sparse_inputs(8, 4)),
    "tied": lambda: classify(Tied(), sparse_inputs(8, 4)),
    "tied embedding": lambda: (
        TiedEmbedding(),
        functional.mse_loss,
        torch.randint(0, 7, (6,)),
        torch.randn(6, 7),
    ),
    "two tables": lambda: classify(TwoTables(), torch.randint(0, 6, (7, 3))),
    "sequence": lambda: classify(Sequence(), torch.randint(0, 9, (6, 4))),
    "encoder": lambda: classify(Encoder(), torch.randint(0, 9, (6, 4))),
    "lstm": lambda: classify(Recurrent(nn.LSTM, bidirectional=True), torch.randint(0, 9, (6, 4))),
    "gru": lambda: classify(Recurrent(nn.GRU, num_layers=2), torch.randint(0, 9, (6, 4))),
    "branch": lambda: classify(Branch(), sparse_inputs(9, 4)),
    "gated": lambda: classify(
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Gated(), nn.ReLU(), nn.Linear(4, 3)),
        sparse_inputs(7, 4),
    ),
    "einsum": lambda: classify(
        nn.Sequential(Mixed(4, 6), nn.ReLU(), Mixed(6, 3)), sparse_inputs(7, 4)
    ),
    "polynomial": lambda: classify(
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Polynomial(), nn.Linear(4, 3)),
        sparse_inputs(7, 4),
    ),
    "tokens": lambda: classify(Tokens(), sparse_inputs(6, 4, 3)),
    "weight norm": lambda: classify(
        nn.Sequential(weight_norm(nn.Linear(4, 6)), nn.ReLU(), nn.Linear(6, 3)), sparse_inputs(8, 4)
    ),
    "bag": lambda: classify(
        nn.Sequential(nn.EmbeddingBag(8, 5, mode="sum"), nn.ReLU(), nn.Linear(5, 3)),
        torch.randint(0, 8, (7, 4)),
    ),
    "cnn": lambda: classify(
        nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.GroupNorm(2, 4),
            nn.ReLU(),
            nn.Conv2d(4, 3, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(12, 3),
        ),
        sparse_inputs(5, 1, 6, 6),
    ),
}
