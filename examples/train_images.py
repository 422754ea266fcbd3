"""Train an image classifier on one object an image, the class in its path, and go on where you were stopped.

    python -m examples.train_images s3://bucket/digits s3://bucket/run

The images are scikit-learn's digits; they are put there if there are none. Stop the run whenever you like and start it
again: it goes on at the very next batch. The second epoch, and the next job, read from the cache.
"""

from __future__ import annotations

import argparse
import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import StackDataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

import torchcache as tc
from examples.weights import digest

COUNT = 320


def put_images(uri: str) -> None:
    """Writes the images as `<label>/<number>.png`, unless something is there."""
    pool = tc.connect()
    if any(True for _ in pool.list(uri)):
        return
    digits = load_digits()

    def put(number: int) -> None:
        png = io.BytesIO()
        Image.fromarray((digits.images[number] * 15).astype(np.uint8)).save(png, format="PNG")
        pool.publish(f"{uri}/{digits.target[number]}/{number:04d}.png", [png.getvalue()])

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(put, range(COUNT)))


def decode(png: memoryview) -> torch.Tensor:
    """A grey 8 x 8 PNG as a float tensor of shape (1, 8, 8) in [0, 1]."""
    return torch.from_numpy(np.asarray(Image.open(io.BytesIO(png)), dtype=np.float32) / 255)[None]


def augment(image: torch.Tensor) -> torch.Tensor:
    """Behind the cache, so each time anew; here without chance, so that runs can be compared."""
    return image - image.mean()


def train(source: str, root: str, *, epochs: int, workers: int, stop_after: int | None) -> None:
    """Up to `epochs`, saving every 4 steps. Stops without a save after `stop_after` steps."""
    images = tc.CachedDataset.from_files(source, pattern="*.png", decode=decode, transform=augment)
    labels = [int(key.split("/")[0]) for key in images.keys()]  # noqa: SIM118 - no mapping
    sampler = StatefulDistributedSampler(images, num_replicas=1, rank=0, seed=1)
    loader = StatefulDataLoader(
        StackDataset(images, labels), batch_size=32, sampler=sampler, num_workers=workers
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    place = {"step": 0, "epoch": 0}
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "loader": loader, "place": place}
    manager = tc.CheckpointManager(root, keep_last=2)
    if manager.latest() is not None:
        manager.load(state)
        print(f"resumed behind step {place['step']} of epoch {place['epoch']}")
    for epoch in range(place["epoch"], epochs):
        place["epoch"] = epoch
        sampler.set_epoch(epoch)
        for x, y in loader:
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            place["step"] += 1
            if place["step"] % 4 == 0:
                manager.save(place["step"], state)
            if place["step"] == stop_after:
                print(f"stopped behind step {stop_after}: weights {digest(model)}")
                return
        print(f"epoch {epoch}: step {place['step']}, loss {loss:.3f}")
    print(f"done: weights {digest(model)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", help="folder of images, <label>/*.png")
    parser.add_argument("run", help="folder for checkpoints")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--stop-after", type=int, help="steps")
    args = parser.parse_args()
    torch.set_num_threads(1)
    put_images(args.images)
    train(args.images, args.run, epochs=args.epochs, workers=args.workers, stop_after=args.stop_after)


if __name__ == "__main__":
    main()
