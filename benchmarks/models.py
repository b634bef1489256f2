"""Models of many kinds, each small enough for one core: what `survey.py` trains."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from tasks import Task, classify, language_loss

Norm = Callable[[int], nn.Module]


class Residual(nn.Module):
    """Two convolutions with norms beside a shortcut."""

    def __init__(self, given: int, made: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.one = nn.Conv2d(given, made, 3, stride, 1, bias=False)
        self.two = nn.Conv2d(made, made, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([norm(made), norm(made)])
        same = given == made
        self.short = nn.Identity() if same else nn.Conv2d(given, made, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norms[0](self.one(x)).relu()
        return (self.norms[1](self.two(inner)) + self.short(x)).relu()


def in_groups(channels: int) -> nn.Module:
    return nn.GroupNorm(8, channels)


def resnet(norm: Norm, order: torch.memory_format = torch.contiguous_format) -> Task:
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, 1, 1, bias=False),
        norm(32),
        nn.ReLU(),
        Residual(32, 32, 1, norm),
        Residual(32, 64, 2, norm),
        Residual(64, 128, 2, norm),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )
    images = torch.rand(64, 3, 32, 32).to(memory_format=order)
    return classify(model.to(memory_format=order), images)


def vgg() -> Task:
    layers: list[nn.Module] = []
    for given, made, pooled in (
        (3, 64, False),
        (64, 64, True),
        (64, 128, False),
        (128, 128, True),
        (128, 256, True),
    ):
        layers += [nn.Conv2d(given, made, 3, padding=1), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if pooled else []
    layers += [nn.Flatten(), nn.Linear(4096, 256), nn.ReLU(), nn.Linear(256, 10)]
    return classify(nn.Sequential(*layers), torch.rand(32, 3, 32, 32))


def separable() -> Task:
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.ReLU()]
    for given, made, stride in ((32, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2)):
        depthwise = nn.Conv2d(given, given, 3, stride, 1, groups=given, bias=False)
        pointwise = nn.Conv2d(given, made, 1, bias=False)
        layers += [depthwise, in_groups(given), nn.ReLU(), pointwise, in_groups(made), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10)]
    return classify(nn.Sequential(*layers), torch.rand(32, 3, 64, 64))


def audio() -> Task:
    layers: list[nn.Module] = []
    for given, made, kernel, stride in ((1, 64, 80, 4), (64, 64, 3, 1), (64, 128, 3, 1)):
        layers += [nn.Conv1d(given, made, kernel, stride), nn.ReLU(), nn.MaxPool1d(4)]
    layers += [nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(128, 10)]
    return classify(nn.Sequential(*layers), torch.randn(32, 1, 8000))


def autoencoder() -> Task:
    model = nn.Sequential(
        nn.Conv2d(3, 32, 4, 2, 1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 4, 2, 1),
        nn.ReLU(),
        nn.ConvTranspose2d(64, 32, 4, 2, 1),
        nn.ReLU(),
        nn.ConvTranspose2d(32, 3, 4, 2, 1),
    )
    images = torch.rand(32, 3, 32, 32)
    return Task(model, nn.MSELoss(), images, images)


class Recurrent(nn.Module):
    """Words, a recurrent layer, a class from its last output."""

    def __init__(self, kind: Callable[..., nn.Module], layers: int) -> None:
        super().__init__()
        self.words = nn.Embedding(5000, 128)
        self.inner = kind(128, 256, layers, batch_first=True)
        self.head = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.words(x))[0][:, -1])


def recurrent(kind: Callable[..., nn.Module], layers: int = 1) -> Task:
    return classify(Recurrent(kind, layers), torch.randint(0, 5000, (64, 50)))


class Encoder(nn.Module):
    """torch's own transformer encoder over sequences of vectors."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(128, 4, 512, 0.0, batch_first=True)
        self.first, self.head = nn.Linear(48, 128), nn.Linear(128, 10)
        self.inner = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.first(x)).mean(1))


class Gated(nn.Module):
    """A transformer block as of Llama: RMSNorm, gated units, no biases."""

    def __init__(self, width: int = 256, heads: int = 4, inner: int = 768) -> None:
        super().__init__()
        self.heads, self.norms = heads, nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        sizes = (width, 3 * width), (width, width), (width, inner), (width, inner), (inner, width)
        self.maps = nn.ModuleList(nn.Linear(*size, bias=False) for size in sizes)

    def forward(self, x: Tensor) -> Tensor:
        qkv, out, gate, up, down = self.maps
        split = qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).transpose(-4, -2)
        mixed = functional.scaled_dot_product_attention(*split.unbind(-3), is_causal=True)
        x = x + out(mixed.transpose(-3, -2).flatten(-2))
        given = self.norms[1](x)
        return x + down(functional.silu(gate(given)) * up(given))


def llama() -> Task:
    blocks = [Gated() for _ in range(4)]
    model = nn.Sequential(nn.Embedding(256, 256), *blocks, nn.Linear(256, 256, bias=False))
    tokens, following = (torch.randint(0, 256, (8, 128)) for _ in range(2))
    return Task(model, language_loss, tokens, following)


class Columns(nn.Module):
    """A table's columns: each of eight categories has an embedding."""

    def __init__(
        self, kind: Callable[..., nn.Module] = nn.Embedding, rows: int = 10_000, **options: bool
    ) -> None:
        super().__init__()
        self.tables = nn.ModuleList(kind(rows, 16, **options) for _ in range(8))
        sizes = (128, 256), (256, 128), (128, 10)
        layers = [layer for size in sizes for layer in (nn.Linear(*size), nn.ReLU())]
        self.inner = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        found = [table(x[:, number]) for number, table in enumerate(self.tables)]
        return self.inner(torch.cat(found, 1))


class Bags(Columns):
    """Each of eight columns holds four categories."""

    def __init__(self) -> None:
        super().__init__(nn.EmbeddingBag)

    def forward(self, x: Tensor) -> Tensor:
        starts = torch.arange(len(x)) * x.shape[2]
        found = [table(x[:, number].flatten(), starts) for number, table in enumerate(self.tables)]
        return self.inner(torch.cat(found, 1))


MODELS: dict[str, Callable[[], Task]] = {
    "ResNet, GroupNorm": lambda: resnet(in_groups),
    "ResNet, BatchNorm": lambda: resnet(nn.BatchNorm2d),
    "ResNet, GroupNorm, channels last": lambda: resnet(in_groups, torch.channels_last),
    "convolutions and ReLU": vgg,
    "separable convolutions, GroupNorm": separable,
    "convolutions of sound": audio,
    "autoencoder, transposed convolutions": autoencoder,
    "LSTM": lambda: recurrent(nn.LSTM),
    "LSTM of two layers": lambda: recurrent(nn.LSTM, 2),
    "GRU": lambda: recurrent(nn.GRU),
    "nn.TransformerEncoder, ReLU": lambda: classify(Encoder(), torch.rand(32, 64, 48)),
    "Llama's blocks": llama,
    "eight embeddings and an MLP": lambda: classify(Columns(), torch.randint(0, 10_000, (1024, 8))),
    "eight sparse embeddings of 200,000 and an MLP": lambda: classify(
        Columns(rows=200_000, sparse=True), torch.randint(0, 200_000, (1024, 8))
    ),
    "eight bags and an MLP": lambda: classify(Bags(), torch.randint(0, 10_000, (1024, 8, 4))),
}
