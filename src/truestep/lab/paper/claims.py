"""The papers' claims, with the rule for each verdict."""

from truestep.lab.paper.verdict import Claim

__all__ = ["CLAIMS", "TABLE_1", "TABLE_2", "TUNED", "Row"]

# Learning rate: mean and standard deviation of train accuracy, train loss, test accuracy, test loss.
Row = tuple[tuple[float, float], tuple[float, float], tuple[float, float], tuple[float, float]]
TABLE_1: dict[tuple[str, float], Row] = {
    ("asgd", 0.001): ((0.9464, 0.0055), (0.1774, 0.0194), (0.9372, 0.0044), (0.2253, 0.0172)),
    ("sgd", 0.001): ((0.8137, 0.0438), (0.5859, 0.1174), (0.8186, 0.0430), (0.5783, 0.1189)),
    ("asgd", 0.003): ((0.9645, 0.0033), (0.1189, 0.0117), (0.9488, 0.0027), (0.1965, 0.0126)),
    ("sgd", 0.003): ((0.8874, 0.0234), (0.3787, 0.0774), (0.8876, 0.0231), (0.3834, 0.0778)),
    ("asgd", 0.01): ((0.9652, 0.0039), (0.1168, 0.0135), (0.9498, 0.0034), (0.1922, 0.0164)),
    ("sgd", 0.01): ((0.9376, 0.0063), (0.2131, 0.0252), (0.9317, 0.0062), (0.2423, 0.0257)),
}
TABLE_2: dict[tuple[str, float], Row] = {
    ("asgd", 0.001): ((0.9464, 0.0055), (0.1774, 0.0194), (0.9372, 0.0044), (0.2253, 0.0172)),
    ("asgd", 0.003): ((0.9645, 0.0033), (0.1189, 0.0117), (0.9488, 0.0027), (0.1965, 0.0126)),
    ("asgd", 0.005): ((0.9652, 0.0039), (0.1168, 0.0135), (0.9498, 0.0034), (0.1922, 0.0164)),
    ("asgd", 0.01): ((0.9662, 0.0032), (0.1135, 0.0102), (0.9493, 0.0029), (0.1937, 0.0112)),
    ("sgd", 0.01): ((0.9376, 0.0063), (0.2131, 0.0252), (0.9317, 0.0062), (0.2423, 0.0257)),
    ("sgd", 0.03): ((0.9615, 0.0036), (0.1311, 0.0129), (0.9484, 0.0034), (0.1984, 0.0176)),
    ("sgd", 0.05): ((0.9625, 0.0033), (0.1276, 0.0111), (0.9484, 0.0026), (0.2023, 0.0141)),
    ("sgd", 0.07): ((0.9611, 0.0043), (0.1326, 0.0145), (0.9474, 0.0036), (0.2074, 0.0164)),
    ("sgd", 0.1): ((0.9599, 0.0039), (0.1374, 0.0137), (0.9465, 0.0029), (0.2099, 0.0126)),
}
# The learning rates that the paper calls suitable.
TUNED = {"asgd": 0.005, "sgd": 0.03}

CLAIMS = {
    claim.name: claim
    for claim in (
        Claim(
            "A1",
            ("asgd-mnist",),
            "At equal learning rate aSGD is better on every column of Table 1.",
            "12 of 12 cells of Table 1",
            "MNIST, 784-30-20-10, batch 64; each training at its lowest test loss, as in the paper",
            "all 12 paired differences favour aSGD",
        ),
        Claim(
            "A2",
            ("asgd-mnist",),
            "Tuned, aSGD reaches a lower test loss and a higher accuracy than SGD.",
            "test loss 0.1922 ± 0.0164 against 0.1984 ± 0.0176, accuracy 0.9498 against 0.9484",
            "as A1; for each optimizer the learning rate with the lowest mean of the lowest test "
            "loss, as in the paper",
            "test loss lower and accuracy higher in pairs, and both means of the test loss within "
            "one standard deviation of the paper's",
        ),
        Claim(
            "A3",
            ("asgd-mnist",),
            "aSGD reaches its lowest loss at about 100 epochs, SGD at 500.",
            "100 against 500 epochs",
            "as A1, aSGD at 0.005 and SGD at 0.03",
            "SGD takes at least twice as many epochs as aSGD (half of the paper's factor and less)",
        ),
        Claim(
            "A4",
            ("asgd-synthetic",),
            "On circles both converge within 1000 steps, on spirals aSGD about 1500 steps sooner.",
            "under 1000 steps; 1500 steps sooner",
            "2-10-10-10-10-10-1, 128 samples, full batches; steps to the end of training",
            "mean steps of both under 1000 on circles, a training that did not converge counted as "
            "10,000; on spirals aSGD sooner by 750 steps or more (half of the paper's)",
        ),
        Claim(
            "A5",
            ("asgd-synthetic",),
            "On the synthetic data aSGD has better accuracy and lower loss.",
            "box plots of Figure 6",
            "as A4, at the end of training",
            "all 8 differences (2 data sets, train and test, accuracy and loss) favour aSGD",
        ),
        Claim(
            "A6",
            ("asgd-synthetic",),
            "aSGD makes about 5 more true dummy nodes on circles and 3 on spirals, more nearer the "
            "output, equally many within a layer.",
            "+5 and +3; probability 0.2 and 0.12 in the last hidden layer",
            "as A4, at the end of training; nodes with z <= 0 for all 128 training samples",
            "at least half as many more as in the paper; more of them the nearer a hidden layer is to "
            "the output, by the slope over the five; each node within 0.05 of its layer's mean "
            "probability",
        ),
        Claim(
            "A7",
            ("asgd-synthetic", "asgd-mnist"),
            "No increase in training time.",
            "O(2m) is O(m)",
            "processor time of a step of aSGD over that of SGD, measurements included",
            "the whole interval of the ratio under 1.05",
        ),
        Claim(
            "A8",
            ("asgd-trajectories",),
            "Parameters move further and faster under aSGD; some that SGD keeps moving stop, and "
            "their gradient goes to another node.",
            "Figure 4, one training",
            "2-3-2-1 on circles, same starts; distances averaged over the 20 parameters",
            "range and early distance larger; more parameters stop under aSGD only than under SGD "
            "only; where a node of layer 3 stops, the other node's parameters move further than "
            "under SGD",
        ),
        Claim(
            "D1",
            ("dasgd-batch",),
            "DA-SGD is better than SGD at batch 32 and above on all three data sets.",
            "Figure 4",
            "784-128-128-10, listed learning rates; test error at the last epoch",
            "all 12 paired differences (3 data sets, 4 batch sizes) favour DA-SGD",
        ),
        Claim(
            "D2",
            ("dasgd-batch",),
            "SGD is better at small batches: below 8 on Fashion-MNIST and KMNIST.",
            "Figure 4",
            "as D1",
            "all 6 paired differences (2 data sets; batch 1, 2, 4) favour SGD",
        ),
        Claim(
            "D3",
            ("dasgd-batch",),
            "The gap grows with the batch.",
            "Figure 4",
            "as D1; slope of the gap in accuracy per doubling of the batch, over batch 8 to 256",
            "the slope is above 0 on all three data sets",
        ),
        Claim(
            "D4",
            ("dasgd-lr",),
            "At batch 8, learning rate 0.002 beats 0.001 at epoch 200.",
            "Figure 3",
            "SGD on Fashion-MNIST; test accuracy at the last epoch",
            "the paired difference favours 0.002",
        ),
        Claim(
            "D5",
            ("dasgd-batch",),
            "DA-SGD learns faster as well.",
            "Figure 5",
            "as D1; test accuracy averaged over the epochs, at batch 32 and above",
            "all 12 paired differences favour DA-SGD",
        ),
    )
}
