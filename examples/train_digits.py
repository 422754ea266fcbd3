"""Train a small CNN on images in object storage, save as you go, and go on where you were killed.

    python -m examples.train_digits s3://bucket/digits s3://bucket/run

Nothing but the two URIs is needed: no pool address is given, so an embedded pool starts on this machine by itself.
Run it again after a crash and it resumes from the last committed checkpoint, at the very next batch.

With `--events` every step, epoch and save is printed as one line of JSON, for the demo and the tests.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import time
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from PIL import Image
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

import torchcache as tc


def decode(png: memoryview) -> torch.Tensor:
    """A grey 8 x 8 PNG as a float tensor of shape (1, 8, 8) in [0, 1]."""
    pixels = np.asarray(Image.open(io.BytesIO(png)), dtype=np.float32) / 255
    return torch.from_numpy(pixels)[None]


class LabelledDigits(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """Digits named `<label>/<number>.png` under one folder, as (image, label)."""

    def __init__(self, uri: str) -> None:
        self.images = tc.CachedDataset.from_files(uri, pattern="*.png", decode=decode)
        self.labels = [int(key.split("/")[-2]) for key in self.images.keys()]  # noqa: SIM118 - a method, not a dict

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> list[tuple[torch.Tensor, int]]:
        return list(zip(self.images.__getitems__(indices), (self.labels[i] for i in indices), strict=True))


def make_model(width: int) -> nn.Module:
    """About width * width + 523 * width parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 16, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, 10),
    )


class Trainer:
    """The model, its optimizer, its data, and where it stands: all that a checkpoint has to hold."""

    def __init__(self, data_uri: str, *, batch_size: int, width: int, workers: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = make_model(width)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.dataset = LabelledDigits(data_uri)
        # An order that is a function of (seed, epoch) alone: a resumed run draws the same one.
        self.sampler = StatefulDistributedSampler(
            self.dataset, num_replicas=1, rank=0, shuffle=True, seed=seed
        )
        self.loader = StatefulDataLoader(
            self.dataset, batch_size=batch_size, sampler=self.sampler, num_workers=workers
        )
        self.step = 0
        self.epoch = 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds. `position` is one leaf of bytes, so that its shape needn't be known to load it."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        position = io.BytesIO()
        torch.save(
            {
                "step": self.step,
                "epoch": self.epoch,
                "rng": torch.get_rng_state(),
                "loader": self.loader.state_dict(),
            },
            position,
        )
        return {"model": model, "optimizer": optimizer, "position": position.getvalue()}

    def load(self, state: dict[str, Any]) -> None:
        set_state_dict(
            self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        position = torch.load(io.BytesIO(state["position"]), weights_only=True)
        self.step, self.epoch = position["step"], position["epoch"]
        self.loader.load_state_dict(position["loader"])
        torch.set_rng_state(position["rng"])

    def train_step(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(images), labels)
        loss.backward()
        self.optimizer.step()
        self.step += 1
        return loss.item()


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of all parameters and buffers: equal only for models that are equal bit for bit."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


class Events:
    """Prints what happens: for people, or as JSON lines; `quiet` prints nothing, as of all ranks but one."""

    def __init__(self, as_json: bool, *, quiet: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet

    def __call__(self, event: str, **fields: Any) -> None:
        if self.quiet:
            return
        if self.as_json:
            print(json.dumps({"event": event, **fields}), flush=True)
        elif event != "step":
            print(event, *(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in fields.items()))


def fetched(pool: tc.Pool) -> tuple[int, int]:
    """(requests, bytes) of data that the pool has fetched from S3 for readers so far."""
    servers = pool.status()
    return sum(s.filled_chunks for s in servers), sum(s.filled_bytes for s in servers)


def save(trainer: Trainer, uri: str, events: Events) -> None:
    started = time.perf_counter()
    dcp.save(trainer.state(), storage_writer=tc.CacheStorageWriter(uri), no_dist=True)
    events("save", step=trainer.step, uri=uri, seconds=time.perf_counter() - started)


def resume(trainer: Trainer, run_uri: str, events: Events) -> None:
    """Loads the newest committed checkpoint under `run_uri`, if there is one."""
    saves = tc.connect().list_saves(run_uri)
    steps = [int(s.path.rpartition("step-")[2]) for s in saves if s.state in ("committed", "durable")]
    if not steps:
        return
    uri = f"{run_uri}/step-{max(steps)}"
    started = time.perf_counter()
    state = trainer.state()
    dcp.load(state, storage_reader=tc.CacheStorageReader(uri), no_dist=True)
    trainer.load(state)
    events("resume", step=trainer.step, epoch=trainer.epoch, uri=uri, seconds=time.perf_counter() - started)


def train(trainer: Trainer, run_uri: str, *, epochs: int, save_every: int, events: Events) -> None:
    pool = tc.connect()
    resume(trainer, run_uri, events)
    while trainer.epoch < epochs:
        trainer.sampler.set_epoch(trainer.epoch)
        started, (requests, read) = time.perf_counter(), fetched(pool)
        loss = float("nan")
        for images, labels in trainer.loader:
            loss = trainer.train_step(images, labels)
            events("step", step=trainer.step, loss=loss)
            if trainer.step % save_every == 0:
                save(trainer, f"{run_uri}/step-{trainer.step}", events)
        now_requests, now_read = fetched(pool)
        events(
            "epoch",
            epoch=trainer.epoch + 1,
            seconds=time.perf_counter() - started,
            s3_requests=now_requests - requests,
            s3_bytes=now_read - read,
            loss=loss,
        )
        trainer.epoch += 1
    events("done", step=trainer.step, weights=weights_digest(trainer.model))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="folder of images, <label>/<number>.png")
    parser.add_argument("run", help="folder for checkpoints; each goes to step-N below it")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--save-every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--width", type=int, default=512, help="of the two hidden layers")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--events", action="store_true", help="print JSON lines")
    args = parser.parse_args()
    torch.set_num_threads(1)  # one core for the step, one for the workers
    trainer = Trainer(
        args.data, batch_size=args.batch_size, width=args.width, workers=args.workers, seed=args.seed
    )
    train(trainer, args.run, epochs=args.epochs, save_every=args.save_every, events=Events(args.events))


if __name__ == "__main__":
    main()
