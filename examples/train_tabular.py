"""Train on tables in Parquet, of which only the columns that are used are read, and go on where you were stopped.

    python -m examples.train_tabular s3://bucket/table s3://bucket/run

The table is scikit-learn's of breast cancer; it is put there if there is none. Stop the run whenever you like and start
it again: it goes on at the very next batch.
"""

from __future__ import annotations

import argparse
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from sklearn.datasets import load_breast_cancer
from torch import nn
from torchdata.stateful_dataloader import StatefulDataLoader

import torchcache as tc
from examples.weights import digest
from torchcache.data.formats import Parquet

FILES = 4
FEATURES = ["mean radius", "mean texture", "mean smoothness", "worst area", "worst concavity"]
LABEL = "benign"


def put_table(uri: str) -> None:
    """Writes the table, all 30 columns and the label, as `FILES` files, unless something is there."""
    pool = tc.connect()
    if any(True for _ in pool.list(uri)):
        return
    found = load_breast_cancer()
    columns = {str(name): found.data[:, i] for i, name in enumerate(found.feature_names)}
    table = pa.table({**columns, LABEL: found.target})
    rows = -(-table.num_rows // FILES)
    for number in range(FILES):
        sink = pa.BufferOutputStream()
        pq.write_table(table.slice(number * rows, rows), sink, row_group_size=64)
        pool.publish(f"{uri}/part-{number}.parquet", [memoryview(sink.getvalue())])


def example(row: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """A row as (features of shape (5,), label of shape ()), both float32; features in rough units of one."""
    features = torch.tensor([row[name] for name in FEATURES], dtype=torch.float32)
    return features.log1p(), torch.tensor(row[LABEL], dtype=torch.float32)


def train(source: str, root: str, *, epochs: int, workers: int, stop_after: int | None) -> None:
    """Up to `epochs`, saving every 5 steps. Stops without a save after `stop_after` steps."""
    dataset = tc.CachedIterableDataset(
        f"{source}/*.parquet",
        format=Parquet(columns=[*FEATURES, LABEL]),
        shuffle=True,
        seed=1,
        transform=example,
        batch_size=32,
    )
    loader = StatefulDataLoader(dataset, batch_size=32, num_workers=workers)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(len(FEATURES), 32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    place = {"step": 0, "epoch": 0}
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "loader": loader, "place": place}
    manager = tc.CheckpointManager(root, keep_last=2)
    if manager.latest() is not None:
        manager.load(state)
        print(f"resumed behind step {place['step']} of epoch {place['epoch']}")
    for epoch in range(place["epoch"], epochs):
        place["epoch"] = epoch
        dataset.set_epoch(epoch)
        for features, labels in loader:
            logits = model(features).squeeze(1)
            loss = nn.functional.binary_cross_entropy_with_logits(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            place["step"] += 1
            if place["step"] % 5 == 0:
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
    parser.add_argument("table", help="folder of Parquet files")
    parser.add_argument("run", help="folder for checkpoints")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--stop-after", type=int, help="steps")
    args = parser.parse_args()
    torch.set_num_threads(1)
    put_table(args.table)
    train(args.table, args.run, epochs=args.epochs, workers=args.workers, stop_after=args.stop_after)


if __name__ == "__main__":
    main()
