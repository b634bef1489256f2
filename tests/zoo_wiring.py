"""More of the zoo: `WIRING[name]()`, models that are awkward for how their parts are joined.

`OPTIONS[name]` are the counter's, for those that need some. Inputs are what `truestep.oracle` takes: a
tensor, a tuple of arguments or a dict of keyword arguments.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import truestep
from truestep.activity import Outer
from truestep.bits import pack
from zoo import classify, mlp, sparse_inputs


class Nested(nn.Module):
    """Containers in containers, one module under two names, one that is never called."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleDict(
            {
                "stem": nn.ModuleList([nn.Linear(4, 5), nn.Sequential(nn.ReLU(), nn.Linear(5, 5))]),
                "heads": nn.ModuleDict({"used": nn.Linear(5, 3), "idle": nn.Linear(5, 2)}),
            }
        )
        self.alias = self.parts["stem"][0]

    def forward(self, x):
        hidden = self.alias(x)
        hidden = torch.relu(self.parts["stem"][1](hidden))
        return self.parts["heads"]["used"](hidden)


class Heads(nn.Module):
    """A dict of outputs of different shapes, one of them in a list."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.image, self.label = nn.Linear(6, 8), nn.Linear(6, 3)
        self.scores = nn.Linear(6, 1)

    def forward(self, x):
        hidden = torch.relu(self.body(x))
        image = torch.relu(self.image(hidden)).view(-1, 2, 2, 2)
        return {"label": self.label(hidden), "rest": [image, self.scores(hidden).squeeze(-1)]}


def heads_loss(output, labels):
    image, scores = output["rest"]
    # The third head is left out of the loss.
    return (
        functional.cross_entropy(output["label"], labels) + image.square().mean() + 0 * len(scores)
    )


class Keywords(nn.Module):
    """Takes a tensor, a nested dict and a mask by keyword."""

    def __init__(self):
        super().__init__()
        self.words, self.numbers = nn.Embedding(9, 4), nn.Linear(3, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, *, words, extra, scale=1.0):
        kept = extra["mask"].unsqueeze(-1)
        hidden = (kept * self.words(words)).sum(1) + torch.relu(self.numbers(extra["numbers"]))
        return self.head(torch.relu(scale * hidden))


class Siamese(nn.Module):
    """Two inputs through one encoder in one call."""

    def __init__(self):
        super().__init__()
        self.encoder = mlp()

    def forward(self, first, second):
        return (torch.relu(self.encoder(first)) * self.encoder(second)).sum(-1)


class TimeFirst(nn.Module):
    """Samples in the second dimension: ``[time, batch, features]``."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, bias=False)
        self.recurrent = nn.GRU(4, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        output, _ = self.recurrent(self.layer(self.embedding(x)))
        return self.head(torch.relu(output[-1]))


class Transposed(nn.Module):
    """The transpose of another layer's linear map."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, input):
        return functional.linear(input, self.weight.t())


def transposed(layout, module, input):
    """Weight (j, k) needs input j and output gradient k: the other way round than in `nn.Linear`."""
    inputs = pack(layout.arrange(input))

    def activity(delta):
        outputs = pack(layout.arrange(delta))
        return {"weight": Outer(module.weight.shape, inputs, outputs, transposed=True)}

    return activity


class TiedAutoencoder(nn.Module):
    """The decoder is the encoder's transpose."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(6, 4)
        self.decoder = Transposed(self.encoder.weight)

    def forward(self, x):
        return torch.relu(self.decoder(torch.relu(self.encoder(x))))


class MaskedExperts(nn.Module):
    """Each expert sees the whole batch, the other experts' samples as zeros; the gate keeps its own."""

    def __init__(self, count=3):
        super().__init__()
        self.router = nn.Linear(4, count)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(count))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        weight, choice = self.router(x).softmax(-1).max(-1, keepdim=True)
        mixed = sum(
            torch.where(choice == index, torch.relu(expert(x)), 0.0)
            for index, expert in enumerate(self.experts)
        )
        return self.head(weight * mixed)


class Routed(nn.Linear):
    """A linear map that is given some of the samples: those of `index`, of a batch of `samples`."""

    def forward(self, input, index, samples):
        return super().forward(input)


def routed(layout, module, input, index, samples):
    """The rule for `nn.Linear`, with zeros in the place of the samples that went elsewhere."""

    def spread(rows):
        return rows.new_zeros(samples, *rows.shape[1:]).index_copy(0, index, rows)

    activity = truestep.RULES[nn.Linear](layout, module, spread(input))
    return lambda delta: activity(spread(delta))


class RoutedExperts(nn.Module):
    """Each expert is given only the samples that are routed to it, as in a mixture of experts."""

    def __init__(self, count=3):
        super().__init__()
        self.router = nn.Linear(4, count)
        self.experts = nn.ModuleList(Routed(4, 4) for _ in range(count))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        weight, choice = self.router(x).softmax(-1).max(-1)
        mixed = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            index = (choice == number).nonzero().squeeze(-1)
            if len(index):
                mixed = mixed.index_copy(0, index, torch.relu(expert(x[index], index, len(x))))
        return self.head(weight.unsqueeze(-1) * mixed)


class Backbone(nn.Module):
    """A frozen encoder with a normalisation that mixes samples, a trained adapter and head."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU())
        self.body.requires_grad_(requires_grad=False).eval()
        self.adapter = nn.Conv2d(3, 2, 1)
        self.head = nn.Linear(2, 3)

    def forward(self, x):
        return self.head(torch.relu(self.adapter(self.body(x))).amax((-1, -2)))


class Sandwich(nn.Module):
    """Trained below and above a frozen layer, with a shortcut that stops gradients."""

    def __init__(self):
        super().__init__()
        self.below, self.frozen, self.above = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.frozen.requires_grad_(requires_grad=False)

    def forward(self, x):
        below = torch.relu(self.below(x))
        return self.above(torch.relu(self.frozen(below) + below.detach()))


class HyperNetwork(nn.Module):
    """A layer makes each sample's own weights for a product."""

    def __init__(self):
        super().__init__()
        self.maker, self.head = nn.Linear(4, 12), nn.Linear(3, 3)

    def forward(self, x):
        own = torch.relu(self.maker(x)).unflatten(-1, (3, 4))
        return self.head(torch.bmm(own, x.unsqueeze(-1)).squeeze(-1))


class Pieces(nn.Module):
    """One layer on each third of the features, and on their order reversed."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.head = nn.Linear(2, 4), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x):
        pieces = [*x.chunk(3, -1), x.flip(-1)[:, :2]]
        return self.head(torch.relu(sum(self.norm(self.layer(piece)) for piece in pieces)))


class UNet(nn.Module):
    """Down, up and a skip connection, pooling indices in between."""

    def __init__(self):
        super().__init__()
        self.down, self.middle = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.up = nn.ConvTranspose2d(3, 2, 2, stride=2)
        self.out = nn.Conv2d(5, 1, 1)

    def forward(self, x):
        skip = torch.relu(self.down(x))
        low = torch.relu(self.middle(functional.max_pool2d(skip, 2)))
        return self.out(torch.cat([skip, torch.relu(self.up(low))], 1))


class Edited(nn.Module):
    """A layer's output is changed in place, whole and in parts, before the next layer."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        hidden = self.body(x)
        hidden[:, 0] = 0
        hidden.mul_(x[:, :1] > 0)
        hidden[:, 1:].relu_()
        return self.head(hidden)


class Conditioned(nn.Module):
    """All samples share what one layer makes of a constant."""

    def __init__(self):
        super().__init__()
        self.register_buffer("constant", torch.tensor([[1.0, 0.0]]))
        self.shared, self.head = nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(x * torch.tanh(self.shared(self.constant)))


@dataclass
class Answer:
    """What some libraries' models return."""

    logits: torch.Tensor
    hidden: torch.Tensor


class Checkpointed(nn.Module):
    """A layer used twice under activation checkpointing; the output is a dataclass."""

    def __init__(self, *, reentrant=False):
        super().__init__()
        self.reentrant = reentrant
        self.body, self.block, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def run(self, hidden):
        return torch.relu(self.block(torch.relu(self.block(hidden))))

    def forward(self, x):
        hidden = checkpoint(self.run, torch.relu(self.body(x)), use_reentrant=self.reentrant)
        return Answer(self.head(hidden), hidden)


def keywords(samples=6):
    return {
        "words": torch.randint(0, 9, (samples, 4)),
        "extra": {"mask": torch.rand(samples, 4) < 0.6, "numbers": sparse_inputs(samples, 3)},
        "scale": 2.0,
    }


def label(model, inputs, samples=6):
    return model, functional.cross_entropy, inputs, torch.randint(0, 3, (samples,))


WIRING = {
    "nested containers": lambda: classify(Nested(), sparse_inputs(7, 4)),
    "several outputs": lambda: (
        Heads(),
        heads_loss,
        sparse_inputs(7, 4),
        torch.randint(0, 3, (7,)),
    ),
    "keywords and dicts": lambda: label(Keywords(), keywords()),
    "siamese": lambda: (
        Siamese(),
        functional.mse_loss,
        (sparse_inputs(6, 4), sparse_inputs(6, 4)),
        torch.rand(6),
    ),
    "time first": lambda: label(TimeFirst(), torch.randint(0, 9, (4, 6))),
    "tied autoencoder": lambda: (
        TiedAutoencoder(),
        functional.mse_loss,
        sparse_inputs(6, 6),
        torch.rand(6, 6),
    ),
    "masked experts": lambda: classify(MaskedExperts(), sparse_inputs(9, 4)),
    "routed experts": lambda: classify(RoutedExperts(), sparse_inputs(9, 4)),
    "frozen backbone": lambda: classify(Backbone(), sparse_inputs(6, 1, 5, 5)),
    "frozen in the middle": lambda: classify(Sandwich(), sparse_inputs(7, 4)),
    "hypernetwork": lambda: classify(HyperNetwork(), sparse_inputs(7, 4)),
    "pieces": lambda: classify(Pieces(), sparse_inputs(7, 6)),
    "edited in place": lambda: classify(Edited(), sparse_inputs(7, 4)),
    "shared by all samples": lambda: classify(Conditioned(), torch.randn(7, 4)),
    "checkpointed, a dataclass": lambda: (
        Checkpointed(),
        lambda output, labels: functional.cross_entropy(output.logits, labels),
        sparse_inputs(7, 4),
        torch.randint(0, 3, (7,)),
    ),
    "u-net": lambda: (
        UNet(),
        functional.l1_loss,
        sparse_inputs(5, 1, 4, 4),
        torch.rand(5, 1, 4, 4),
    ),
}
OPTIONS = {
    "shared by all samples": {"batch_dim": {"shared": None}},
    "time first": {"batch_dim": 1},
    "tied autoencoder": {"rules": truestep.RULES | {Transposed: transposed}},
    "routed experts": {"rules": truestep.RULES | {Routed: routed}},
}
