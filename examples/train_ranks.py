"""Train on several ranks: each reads its share through the pool, and all save into one checkpoint.

    torchrun --nproc-per-node 2 -m examples.train_ranks s3://bucket/digits s3://bucket/run

`TORCHCACHE_POOL` names the pool; without it the ranks of a machine share an embedded one. Start it again, on as many
ranks, and it goes on from the last checkpoint.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

import torchcache as tc
from examples.train_digits import Events, LabelledDigits, make_model, weights_digest


def train(source: str, root: str, *, epochs: int, save_every: int, width: int, events: Events) -> None:
    """Rank 0 tells of every step, save and epoch."""
    images = LabelledDigits(source)
    sampler = StatefulDistributedSampler(images, dist.get_world_size(), dist.get_rank(), seed=0)
    loader = StatefulDataLoader(images, batch_size=32, sampler=sampler, num_workers=1)
    torch.manual_seed(0)
    model = make_model(width)
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    place = {"step": 0, "epoch": 0}
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "loader": loader, "place": place}
    manager = tc.CheckpointManager(root, keep_last=2)
    if manager.latest() is not None:
        events("resume", step=manager.load(state))
    for epoch in range(place["epoch"], epochs):
        place["epoch"] = epoch
        sampler.set_epoch(epoch)
        loss = torch.zeros(())
        for pixels, labels in loader:
            loss = nn.functional.cross_entropy(parallel(pixels), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            place["step"] += 1
            events("step", step=place["step"])
            if place["step"] % save_every == 0:
                manager.save(place["step"], state)
                events("save", step=place["step"])
        events("epoch", epoch=epoch + 1, loss=loss.item())
    manager.wait_durable()
    events("done", step=place["step"], weights=weights_digest(model))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="folder of images, <label>/<number>.png")
    parser.add_argument("run", help="folder for checkpoints")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--save-every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--width", type=int, default=512, help="of the two hidden layers")
    parser.add_argument("--events", action="store_true", help="print JSON lines")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        quiet = dist.get_rank() != 0
        train(
            args.data,
            args.run,
            epochs=args.epochs,
            save_every=args.save_every,
            width=args.width,
            events=Events(args.events, quiet=quiet),
        )
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
