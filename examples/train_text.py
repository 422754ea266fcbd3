"""Train a small language model on text in compressed JSON lines, and go on where you were stopped.

    python -m examples.train_text s3://bucket/corpus s3://bucket/run

The corpus is Python's own language reference, which every Python has; it is put there if there is none. Stop the run
whenever you like, with Ctrl-C or `--stop-after`, and start it again: it goes on at the very next batch.
"""

from __future__ import annotations

import argparse
import json
from pydoc_data.topics import topics
from typing import Any

import pyarrow as pa
import torch
from torch import nn
from torchdata.stateful_dataloader import StatefulDataLoader

import torchcache as tc
from examples.weights import digest

SHARDS = 8
LENGTH = 64


def put_corpus(uri: str) -> None:
    """Writes the corpus as `SHARDS` objects, a paragraph a line, unless something is there."""
    pool = tc.connect()
    if any(True for _ in pool.list(uri)):
        return
    lines = [
        json.dumps({"topic": name, "text": paragraph})
        for name, text in sorted(topics.items())
        for paragraph in text.split("\n\n")
        if len(paragraph) > LENGTH
    ]
    for shard in range(SHARDS):
        data = "\n".join(lines[shard::SHARDS]).encode()
        pool.publish(f"{uri}/part-{shard}.jsonl.zst", [pa.compress(data, codec="zstd", asbytes=True)])


def tokens(sample: dict[str, str]) -> torch.Tensor:
    """The first bytes of a paragraph, as int64 of shape (LENGTH + 1,)."""
    text = sample["text"].encode()[: LENGTH + 1]
    return torch.frombuffer(bytearray(text.ljust(LENGTH + 1)), dtype=torch.uint8).long()


class ByteModel(nn.Module):
    """Which byte comes next."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.rnn = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of shape (batch, LENGTH, 256) for bytes of shape (batch, LENGTH)."""
        logits: torch.Tensor = self.head(self.rnn(self.embed(x))[0])
        return logits


class Run:
    """The model, its data, and where it stands."""

    def __init__(self, corpus: str, root: str, workers: int) -> None:
        torch.manual_seed(0)
        self.model = ByteModel()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3)
        self.dataset = tc.CachedIterableDataset(
            f"{corpus}/*.jsonl.zst", shuffle=True, seed=1, transform=tokens, window=500, batch_size=32
        )
        self.loader = StatefulDataLoader(self.dataset, batch_size=32, num_workers=workers)
        self.place = {"step": 0, "epoch": 0}
        self.manager = tc.CheckpointManager(root, keep_last=2)

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "loader": self.loader,
            "place": self.place,
        }

    def train(self, epochs: int, stop_after: int | None) -> None:
        """Up to `epochs`, saving every 10 steps. Stops without a save after `stop_after` steps."""
        if self.manager.latest() is not None:
            self.manager.load(self.state())
            print(f"resumed behind step {self.place['step']} of epoch {self.place['epoch']}")
        for epoch in range(self.place["epoch"], epochs):
            self.place["epoch"] = epoch
            self.dataset.set_epoch(epoch)
            for batch in self.loader:
                loss = self.step(batch)
                self.place["step"] += 1
                if self.place["step"] % 10 == 0:
                    self.manager.save(self.place["step"], self.state())
                if self.place["step"] == stop_after:
                    print(f"stopped behind step {stop_after}: weights {digest(self.model)}")
                    return
            print(f"epoch {epoch}: step {self.place['step']}, loss {loss:.3f}")
        print(f"done: weights {digest(self.model)}")

    def step(self, batch: torch.Tensor) -> float:
        logits = self.model(batch[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus", help="folder of text, *.jsonl.zst")
    parser.add_argument("run", help="folder for checkpoints")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--stop-after", type=int, help="steps")
    args = parser.parse_args()
    torch.set_num_threads(1)
    put_corpus(args.corpus)
    Run(args.corpus, args.run, args.workers).train(args.epochs, args.stop_after)


if __name__ == "__main__":
    main()
