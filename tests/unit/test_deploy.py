"""The deployment files: manifests against schemas, flags against the command line."""

from __future__ import annotations

import copy
import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from cluster.cli import build_parser
from cluster.config import ServeConfig
from cluster.flags import flags_of, load_settings
from cluster.gateway.admin import OperatorApi

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "kuberay"
KUSTOMIZATION = FOLDER / "kustomization.yaml"
MANIFESTS = sorted(set(FOLDER.rglob("*.yaml")) - {KUSTOMIZATION})
CONTAINERFILE = ROOT / "deploy" / "Containerfile"
RAYCLUSTER = json.loads((ROOT / "tests/data/raycluster.schema.json").read_text(encoding="utf-8"))
KUBERNETES = "1.34"

Document = dict[str, Any]


def load(path: Path) -> list[Document]:
    return [one for one in yaml.safe_load_all(path.read_text(encoding="utf-8")) if one]


DOCUMENTS = {
    f"{path.stem}/{one['kind']}/{one['metadata']['name']}": one
    for path in MANIFESTS
    for one in load(path)
}


def validate(document: Document) -> None:
    """Raise jsonschema.ValidationError unless ``document`` is what its schema wants."""
    if document.get("apiVersion") != "ray.io/v1":
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
        return
    jsonschema.validate(document, RAYCLUSTER)
    spec = document["spec"]
    for group in (spec["headGroupSpec"], *spec.get("workerGroupSpecs", [])):
        template = {"apiVersion": "v1", "kind": "PodTemplate", "template": group["template"]}
        kubernetes_validate.validate(template, KUBERNETES, strict=True)


def of_kind(kind: str) -> Document:
    (found,) = [one for one in DOCUMENTS.values() if one["kind"] == kind]
    return found


def pod_templates(document: Document) -> list[Document]:
    spec = document["spec"]
    match document["kind"]:
        case "RayCluster":
            return [
                group["template"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])
            ]
        case "Deployment":
            return [spec["template"]]
    return []


def containers() -> Iterator[Document]:
    for document in DOCUMENTS.values():
        for template in pod_templates(document):
            yield from template["spec"].get("initContainers", [])
            yield from template["spec"]["containers"]


def launcher() -> Document:
    (container,) = of_kind("Deployment")["spec"]["template"]["spec"]["containers"]
    return dict(container)


def serve_arguments() -> list[str]:
    """The arguments of ``drover`` in the launcher's shell command."""
    words = shlex.split(launcher()["args"][0])
    return words[words.index("drover") + 1 :]


def launcher_config(environment: dict[str, str] | None = None) -> ServeConfig:
    given = build_parser().parse_args(serve_arguments())
    return load_settings(ServeConfig, vars(given), environment or {})


@pytest.mark.parametrize("name", sorted(DOCUMENTS))
def test_manifests_are_valid(name: str) -> None:
    validate(DOCUMENTS[name])


def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(RAYCLUSTER)


def rename(where: Document, old: str, new: str) -> None:
    where[new] = where.pop(old)


MISTAKES: dict[str, tuple[str, Callable[[Document], None]]] = {
    "top level": ("RayCluster", lambda d: rename(d, "spec", "specs")),
    "cluster field": (
        "RayCluster",
        lambda d: rename(d["spec"], "workerGroupSpecs", "workerGroupSpec"),
    ),
    "group field": (
        "RayCluster",
        lambda d: rename(d["spec"]["workerGroupSpecs"][0], "minReplicas", "minReplica"),
    ),
    "required field": (
        "RayCluster",
        lambda d: d["spec"]["workerGroupSpecs"][0].pop("groupName"),
    ),
    "number for a string": (
        "RayCluster",
        lambda d: d["spec"]["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
    ),
    "enumeration": ("RayCluster", lambda d: d["spec"]["authOptions"].update(mode="tokens")),
    "probe in a pod template": (
        "RayCluster",
        lambda d: rename(
            d["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0],
            "readinessProbe",
            "readynessProbe",
        ),
    ),
    "deployment": ("Deployment", lambda d: rename(d["spec"], "replicas", "replica")),
    "service": ("Service", lambda d: rename(d["spec"]["ports"][0], "targetPort", "targetport")),
}


@pytest.mark.parametrize("mistake", sorted(MISTAKES))
def test_a_mistake_is_found(mistake: str) -> None:
    kind, spoil = MISTAKES[mistake]
    spoiled = copy.deepcopy(of_kind(kind))
    spoil(spoiled)
    with pytest.raises(jsonschema.ValidationError):
        validate(spoiled)


def test_launcher_flags_are_the_command_lines() -> None:
    config = launcher_config()
    assert config.address == "auto"
    assert config.host == "0.0.0.0"
    (port,) = of_kind("Service")["spec"]["ports"]
    assert config.port == port["port"]


def test_every_worker_can_hold_a_gateway_and_an_instance() -> None:
    (group,) = of_kind("RayCluster")["spec"]["workerGroupSpecs"]
    config = launcher_config()
    assert config.instances == config.gateways == group["replicas"]


def worker() -> Document:
    (group,) = of_kind("RayCluster")["spec"]["workerGroupSpecs"]
    return dict(group["template"])


def test_workers_are_emptied_before_they_end() -> None:
    spec = worker()["spec"]
    (container,) = spec["containers"]
    shell, flag, script = container["lifecycle"]["preStop"]["exec"]["command"]
    assert (shell, flag) == ("/bin/sh", "-c")
    pause, *orders = re.split(r";|\|\|", script)
    assert orders.pop().strip() == "true"
    urls, patience = [], float(shlex.split(pause)[1])
    for order in orders:
        program, *arguments = shlex.split(order)
        assert program == "drover"
        given = build_parser().parse_args(arguments)
        assert (given.command, given.wait, given.until_restart) == ("drain", True, True)
        assert (given.instance_id, given.node) == (None, "$(hostname)")
        urls.append(given.url)
        patience += float(given.timeout)
    # Its own gateway, whose clients are waited for, then any.
    port = launcher_config().port
    service = of_kind("Service")["metadata"]["name"]
    assert urls == [f"http://127.0.0.1:{port}", f"http://{service}:{port}"]
    assert spec["terminationGracePeriodSeconds"] > patience + 10
    (key,) = [entry for entry in container["env"] if entry["name"] == "DROVER_ADMIN_KEY"]
    assert key in launcher()["env"]


def test_workers_are_scraped_where_the_gateway_listens() -> None:
    annotations = worker()["metadata"]["annotations"]
    assert annotations == {
        "prometheus.io/scrape": "true",
        "prometheus.io/port": str(launcher_config().port),
        "prometheus.io/path": "/metrics",
    }
    paths = [route.path for route in OperatorApi(*5 * [None]).routes()]  # type: ignore[list-item]
    assert {"/metrics", "/health"} <= set(paths)


def test_the_network_is_drovers_own_but_for_http() -> None:
    policy = of_kind("NetworkPolicy")["spec"]
    for document in DOCUMENTS.values():
        for template in pod_templates(document):
            labels = template["metadata"]["labels"]
            assert policy["podSelector"]["matchLabels"].items() <= labels.items()
    inside, outside = policy["ingress"]
    assert inside == {"from": [{"podSelector": policy["podSelector"]}]}
    (port,) = of_kind("Service")["spec"]["ports"]
    assert [one["port"] for one in outside["ports"]] == [port["targetPort"]]


def test_one_worker_at_a_time_is_taken_away() -> None:
    budget = of_kind("PodDisruptionBudget")["spec"]
    assert budget["maxUnavailable"] == 1
    labels = worker()["metadata"]["labels"]
    assert budget["selector"]["matchLabels"].items() <= labels.items()
    assert (
        not budget["selector"]["matchLabels"].items()
        <= {**of_kind("Deployment")["spec"]["template"]["metadata"]["labels"]}.items()
    )


def test_the_kustomization_has_every_manifest_and_image() -> None:
    (found,) = load(KUSTOMIZATION)
    assert sorted(found["resources"]) == [path.name for path in MANIFESTS]
    images = {one["image"].partition(":")[0] for one in containers()}
    assert images == {one["name"] for one in found["images"]}


def test_drover_variables_are_settings() -> None:
    named = {env["name"] for one in containers() for env in one.get("env", [])}
    named.update(re.findall(r"\b(DROVER_[A-Z_]+)=", CONTAINERFILE.read_text(encoding="utf-8")))
    settings = {f"DROVER_{name.upper()}" for name in flags_of(ServeConfig)}
    ours = {name for name in named if name.startswith("DROVER_")}
    assert ours
    assert ours <= settings


def test_secrets_come_from_secrets() -> None:
    secret = re.compile(r"TOKEN|KEY|REDIS_URL")
    env = [entry for one in containers() for entry in one.get("env", [])]
    secrets = [entry for entry in env if secret.search(entry["name"])]
    names = {entry["name"] for entry in secrets}
    assert names == {
        "DROVER_CLUSTER_TOKEN",
        "DROVER_ADMIN_KEY",
        "DROVER_API_KEY",
        "DROVER_REDIS_URL",
        "RAY_AUTH_TOKEN",
    }
    assert all("secretKeyRef" in entry["valueFrom"] for entry in secrets)
    assert not re.search(r"--(api|admin)-key|--cluster-token", launcher()["args"][0])


def test_running_requests_may_end_before_the_kill() -> None:
    patience = of_kind("Deployment")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    # The launcher waits 5 s more for the gateways and 5 s for the instances.
    assert patience > launcher_config().drain_grace + 10


def test_service_selects_the_workers_by_the_operators_labels() -> None:
    cluster, service = of_kind("RayCluster"), of_kind("Service")
    assert service["spec"]["selector"] == {
        "ray.io/cluster": cluster["metadata"]["name"],
        "ray.io/node-type": "worker",
    }
    (group,) = cluster["spec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    (port,) = container["ports"]
    assert port["name"] == service["spec"]["ports"][0]["targetPort"]
    assert port["containerPort"] == launcher_config().port
    assert container["readinessProbe"]["httpGet"] == {"path": "/health", "port": port["name"]}


def test_launcher_reaches_the_head_by_the_operators_names() -> None:
    name = of_kind("RayCluster")["metadata"]["name"]
    env = {entry["name"]: entry for entry in launcher()["env"]}
    assert env["RAY_HEAD"]["value"] == f"{name}-head-svc:6379"
    reference = env["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]
    assert reference == {"name": name, "key": "auth_token"}


def test_nothing_runs_as_root() -> None:
    for document in DOCUMENTS.values():
        for template in pod_templates(document):
            assert template["spec"]["securityContext"]["runAsNonRoot"] is True
    for container in containers():
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
    users = re.findall(r"^USER (\S+)", CONTAINERFILE.read_text(encoding="utf-8"), re.MULTILINE)
    assert users
    assert users[-1] not in ("0", "root")


def instructions(name: str) -> list[str]:
    text = CONTAINERFILE.read_text(encoding="utf-8").replace("\\\n", " ")
    return re.findall(rf"^{name} (.+)$", text, re.MULTILINE)


def test_container_starts_the_command_line() -> None:
    (entrypoint,), (command,) = instructions("ENTRYPOINT"), instructions("CMD")
    program, *arguments = [*json.loads(entrypoint), *json.loads(command)]
    assert program == "drover"
    assert build_parser().parse_args(arguments).command == "serve"


def test_container_copies_what_exists_and_is_not_ignored() -> None:
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    sources = [source for line in instructions("COPY") for source in line.split()[:-1]]
    assert {"protos", "instance", "cluster", "pyproject.toml"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists()
        assert f"!{source}" in ignore
