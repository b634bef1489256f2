"""One training with torch: what each replica of an ensemble must equal."""

import numpy as np
import torch
from torch import nn

import truestep

ACTIVATIONS = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
}
RULES = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
}


def model_of(network, parameters):
    layers = []
    for weight, bias in network.split(np.asarray(parameters)):
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(weight.copy()))
            layer.bias.copy_(torch.from_numpy(bias.copy()))
        layers += [layer, ACTIVATIONS[network.activation]()]
    return nn.Sequential(*layers[:-1])


def loss_of(network):
    def loss(z, targets):
        if network.loss == "cross_entropy":
            return nn.functional.cross_entropy(z, targets)
        if not targets.is_floating_point():
            one_hot = (
                nn.functional.one_hot(targets, z.shape[1]) if z.shape[1] > 1 else targets[:, None]
            )
            targets = one_hot.float()
        if network.loss == "binary_cross_entropy":
            return nn.functional.binary_cross_entropy_with_logits(z, targets)
        output = {"linear": z, "sigmoid": z.sigmoid(), "softmax": z.softmax(1)}[network.output]
        scale = z.shape[1] if network.loss == "squared_error" else 1
        return scale * nn.functional.mse_loss(output, targets)

    return loss


def optimizer_of(settings, model):
    """The optimizer, and its counter if there is one."""
    counter = truestep.SampleCounter(model) if settings.asgd else None
    arguments = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    if settings.name == "sgd":
        arguments |= {"momentum": settings.momentum, "nesterov": settings.nesterov}
    else:
        arguments["eps"] = settings.eps
    if settings.name in {"adam", "adamw"}:
        arguments |= {"betas": settings.betas}
    if settings.name == "sgd" and settings.asgd and not settings.dasgd:
        optimizer = truestep.AdaptiveBatchSGD(
            model.parameters(),
            counter=counter,
            eps=settings.asgd_eps,
            factor_limit=settings.factor_limit,
            **arguments,
        )
        return optimizer, counter
    if settings.label == "dasgd":
        del arguments["momentum"], arguments["nesterov"]
        return truestep.DASGD(model.parameters(), **arguments), None
    optimizer = RULES[settings.name](model.parameters(), **arguments)
    transforms = []
    if counter is not None:
        transforms.append(
            truestep.mean_effective_gradient(
                counter, eps=settings.asgd_eps, factor_limit=settings.factor_limit
            )
        )
    if settings.dasgd:
        transforms.append(truestep.directional_boost())
    if transforms:
        truestep.attach(optimizer, *transforms)
    return optimizer, counter


def trained(network, split, settings, parameters, batches):
    """Parameters after each batch, and the batch's loss before, its counts and gradients.

    Args:
        network: as of an ensemble.
        split: its training split, of one data set.
        settings: the optimizer.
        parameters: to begin with.
        batches: indices of one batch after the other.
    """
    model, loss = model_of(network, parameters), loss_of(network)
    optimizer, counter = optimizer_of(settings, model)
    if settings.schedule == "cosine":
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    else:
        scheduler = None
    inputs, targets = torch.from_numpy(split.inputs[0]), torch.from_numpy(split.targets[0])
    steps = []
    for index in batches:
        optimizer.zero_grad()
        value = loss(model(inputs[index]), targets[index])
        value.backward()
        counts = (
            None if counter is None else torch.cat([c.flatten() for c in counter.counts().values()])
        )
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        flat = torch.cat([p.detach().flatten() for p in model.parameters()])
        steps.append((flat.numpy().copy(), value.item(), counts, gradient.numpy()))
    return steps
