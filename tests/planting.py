"""Networks with redundant units planted in them, and plain ways to see what a network's units do."""

import torch


def plant(layer, kinds):
    """Makes some units of a layer redundant, in place.

    Args:
        layer: a linear map or a convolution, with a bias, whose inputs are not larger than 10.
        kinds: by unit, "true", "constant", "pseudo" or ("duplicate", of which unit, factor).
    """
    with torch.no_grad():
        for unit, kind in kinds.items():
            weight, bias = layer.weight, layer.bias
            if kind == "true":
                bias[unit] = -1 - 10 * weight[unit].abs().sum()
            elif kind == "pseudo":
                bias[unit] = 1 + 10 * weight[unit].abs().sum()
            elif kind == "constant":
                weight[unit] = 0
                bias[unit] = 0.75
            else:
                _, of, factor = kind
                weight[unit], bias[unit] = factor * weight[of], factor * bias[of]
    return layer


def brute_force(z, y, tolerance=1e-12):
    """Kinds of units by their definitions, over all rows at once.

    Args:
        z: pre-activations ``[rows, units]``.
        y: outputs ``[rows, units]``.
        tolerance: relative.

    Returns:
        Sets of units: true, pseudo, constant, and, of each class of proportional ones that are not
        constant, all members.
    """
    true = {k for k in range(z.shape[1]) if bool((z[:, k] <= 0).all())}
    pseudo = {k for k in range(z.shape[1]) if bool((z[:, k] > 0).all())}
    constant = {
        k
        for k in range(z.shape[1])
        if float(y[:, k].max() - y[:, k].min()) <= tolerance * float(y[:, k].abs().max())
    }
    classes = []
    size = torch.minimum(z.abs().amax(0), y.abs().amax(0))
    for k in range(z.shape[1]):
        if k in constant:
            continue
        for members in classes:
            first = members[0]
            ratio = (y[:, k] @ y[:, first]) / (y[:, first] @ y[:, first])
            gap = (y[:, k] - ratio * y[:, first]).abs().max()
            if gap <= tolerance * (size[k] + ratio.abs() * size[first]):
                members.append(k)
                break
        else:
            classes.append([k])
    return true, pseudo, constant, [set(members) for members in classes if len(members) > 1]


def straighten(layer, chosen, low, high):
    """Keeps pre-activations of some units of a layer between two ends, for inputs up to 3.

    Args:
        layer: a linear map or a convolution, with a bias.
        chosen: units.
        low: the lower end.
        high: the upper end.
    """
    with torch.no_grad():
        for unit in chosen:
            weight = layer.weight[unit]
            weight *= 0.45 * (high - low) / (3 * weight.abs().sum())
            layer.bias[unit] = (low + high) / 2
    return layer
