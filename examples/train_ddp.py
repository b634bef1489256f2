"""Trains a small classifier with aSGD in one process, on many processes, or on many hosts.

    python examples/train_ddp.py
    torchrun --nproc-per-node 2 examples/train_ddp.py
    torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint HOST:29400 \
        examples/train_ddp.py --shard

The last line on each of two hosts, with HOST the name of one of them.
"""

import argparse
import gc
import os

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import truestep


def data() -> TensorDataset:
    """600 samples of 40 rarely active features; the ten with the largest sum are the class."""
    inputs = functional.dropout(torch.rand(600, 40), 0.8)
    targets = inputs.reshape(600, 4, 10).sum(-1).argmax(-1)
    return TensorDataset(inputs, targets)


def train(arguments: argparse.Namespace, ranks: int, rank: int, device: str) -> None:
    torch.manual_seed(0)  # the same data and weights in each process
    examples = data()
    model = nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 4)).to(device)
    if ranks > 1 and arguments.shard:
        mesh = init_device_mesh(device, (ranks,))
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif ranks > 1:
        model = DistributedDataParallel(model)

    # The counter finds the ranks by itself.
    counter = truestep.SampleCounter(model)
    optimizer = truestep.AdaptiveBatchSGD(model.parameters(), lr=arguments.lr, counter=counter)

    sampler = DistributedSampler(examples, num_replicas=ranks, rank=rank)
    loader = DataLoader(examples, batch_size=arguments.batch_size // ranks, sampler=sampler)
    for epoch in range(arguments.epochs):
        sampler.set_epoch(epoch)
        total = torch.zeros(2, device=device)
        for inputs, targets in loader:
            optimizer.zero_grad()
            output = model(inputs.to(device))
            loss = functional.cross_entropy(output, targets.to(device))
            loss.backward()
            optimizer.step()
            total += torch.stack([loss.detach() * len(targets), loss.new_tensor(len(targets))])
        if ranks > 1:
            dist.all_reduce(total)
        if rank == 0:
            print(f"epoch {epoch + 1}: loss {(total[0] / total[1]).item():.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64, help="of all processes together")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--shard", action="store_true", help="fully_shard instead of DDP")
    arguments = parser.parse_args()

    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if ranks > 1:
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    train(arguments, ranks, dist.get_rank() if ranks > 1 else 0, device)
    if ranks > 1:
        gc.collect()  # a sharded model that lives on keeps its process group's threads running
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
