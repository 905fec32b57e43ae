"""conf/kubernetes: valid for Kubernetes, and in agreement with itself and with the server."""

import json
import re
import shutil
import subprocess

import kubernetes_validate
import pytest
import yaml
from deployments import CONF, RESERVE, SECRETS, SETTINGS, STOP, documents, variables

from lesson_server.http.routes import routes
from lesson_server.metrics import Metrics
from lesson_server.settings.schema import Settings
from lesson_server.settings.sources import load

FOLDER = CONF / "kubernetes"
KUSTOMIZATION = yaml.safe_load((FOLDER / "kustomization.yaml").read_text("utf-8"))
RESOURCES = [document for name in KUSTOMIZATION["resources"] for document in documents(FOLDER / name)]
SECRET = yaml.safe_load((FOLDER / "secret.example.yaml").read_text("utf-8"))
ENVIRONMENT = variables(FOLDER / "lesson-server.env")
# The oldest one that has `sleep` in preStop by default, and the newest one whose schema is known.
VERSIONS = ["1.30.0", kubernetes_validate.latest_version()]


def one(kind):
    [found] = [resource for resource in RESOURCES if resource["kind"] == kind]
    return found


DEPLOYMENT = one("Deployment")
POD = DEPLOYMENT["spec"]["template"]
[CONTAINER] = POD["spec"]["containers"]
LABELS = POD["metadata"]["labels"]


def valid(resource, version):
    kubernetes_validate.validate(resource, version, strict=True)


# The schema


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("resource", [*RESOURCES, SECRET], ids=lambda resource: resource["kind"])
def test_every_manifest_is_valid(resource, version):
    valid(resource, version)


def test_an_unknown_field_is_not_valid():
    with pytest.raises(kubernetes_validate.ValidationError):
        valid({**one("Service"), "specs": {}}, VERSIONS[-1])


def test_every_manifest_is_applied():
    others = {"kustomization.yaml", "secret.example.yaml", "secret.yaml", "prometheus-adapter.values.yaml"}
    assert {path.name for path in FOLDER.glob("*.yaml")} - others == set(KUSTOMIZATION["resources"])


def new_kubectl():
    """The kubectl of this machine, unless it is older than the manifests: Debian 12's, 1.20, has another kustomize."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        return None
    asked = subprocess.run([kubectl, "version", "--client", "--output", "json"], capture_output=True, check=True)
    version = json.loads(asked.stdout)["clientVersion"]["gitVersion"]
    major, minor = re.match(r"v(\d+)\.(\d+)\.", version).groups()
    return kubectl if (int(major), int(minor)) >= (1, 30) else None


def test_kustomize_builds_what_is_valid():
    kubectl = new_kubectl()
    if kubectl is None:
        pytest.skip("kubectl 1.30 or newer is not installed")
    built = subprocess.run([kubectl, "kustomize", FOLDER], capture_output=True, text=True, timeout=60, check=False)
    assert built.returncode == 0, built.stderr
    manifests = list(yaml.safe_load_all(built.stdout))
    assert sorted(manifest["kind"] for manifest in manifests) == sorted(
        ["ConfigMap", *(resource["kind"] for resource in RESOURCES)]
    )
    for manifest in manifests:
        valid(manifest, VERSIONS[-1])
        if manifest["kind"] != "Namespace":
            assert manifest["metadata"]["namespace"] == "lesson-server"
    [config] = [manifest for manifest in manifests if manifest["kind"] == "ConfigMap"]
    [deployment] = [manifest for manifest in manifests if manifest["kind"] == "Deployment"]
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    assert config["data"] == ENVIRONMENT
    assert container["envFrom"][0] == {"configMapRef": {"name": config["metadata"]["name"]}}
    [image] = KUSTOMIZATION["images"]
    assert container["image"] == f"{image['newName']}:{image['newTag']}"


# Settings


def test_the_environment_is_made_of_settings():
    assert set(ENVIRONMENT) <= SETTINGS
    assert set(SECRET["stringData"]) == SECRETS
    assert not set(ENVIRONMENT) & SECRETS
    load(CONF / "production.toml", environ=ENVIRONMENT)


def test_the_pod_gets_both():
    [config] = KUSTOMIZATION["configMapGenerator"]
    assert config["envs"] == ["lesson-server.env"]
    assert CONTAINER["envFrom"] == [
        {"configMapRef": {"name": config["name"]}},
        {"secretRef": {"name": SECRET["metadata"]["name"]}},
    ]
    assert POD["spec"]["enableServiceLinks"] is False


def test_the_example_holds_no_secret():
    assert set(SECRET["stringData"].values()) == {""}


def test_the_image_is_named_once():
    named = [line for path in FOLDER.iterdir() for line in re.findall(r"^ *-? *image: (.+)$", path.read_text(), re.M)]
    assert named == [CONTAINER["image"]]
    [image] = KUSTOMIZATION["images"]
    assert image["name"] == CONTAINER["image"]


# Start, stop, replacement


def drain():
    return load(CONF / "production.toml", environ=ENVIRONMENT).server.drain


def test_the_grace_is_longer_than_what_a_stop_takes():
    sleep = CONTAINER["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert POD["spec"]["terminationGracePeriodSeconds"] >= sleep + drain() + STOP + RESERVE


def test_the_clients_of_all_pods_can_move_to_as_many_new_ones_during_a_drain():
    server = load(CONF / "production.toml", environ=ENVIRONMENT).server
    assert drain() * server.connect_rate >= server.max_connections
    assert drain() * server.join_rate >= server.max_connections
    assert DEPLOYMENT["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": "100%", "maxUnavailable": 0}


@pytest.mark.parametrize(
    ("probe", "path"), [("startupProbe", "/healthz"), ("readinessProbe", "/readyz"), ("livenessProbe", "/healthz")]
)
def test_the_probes_ask_pages_that_exist(probe, path):
    request = CONTAINER[probe]["httpGet"]
    paths = [route[0] for route in routes(None, None)]
    assert request["path"] == path
    assert path in paths
    assert request["port"] in {port["name"] for port in CONTAINER["ports"]}


def test_prometheus_is_pointed_at_a_page_that_exists():
    annotations = POD["metadata"]["annotations"]
    assert annotations["prometheus.io/path"] in [route[0] for route in routes(None, None)]
    assert int(annotations["prometheus.io/port"]) == CONTAINER["ports"][0]["containerPort"] == Settings().server.port


# Labels and names


@pytest.mark.parametrize(
    "selector",
    [
        DEPLOYMENT["spec"]["selector"]["matchLabels"],
        one("Service")["spec"]["selector"],
        one("PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        one("NetworkPolicy")["spec"]["ingress"][0]["from"][0]["podSelector"]["matchLabels"],
        *(rule["labelSelector"]["matchLabels"] for rule in POD["spec"]["topologySpreadConstraints"]),
    ],
    ids=["Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy", "zone", "host"],
)
def test_every_selector_finds_the_pods(selector):
    assert selector
    assert selector.items() <= LABELS.items()


def test_the_policy_for_redis_lets_nobody_else_in():
    policy = one("NetworkPolicy")["spec"]
    [rule] = policy["ingress"]
    assert policy["policyTypes"] == ["Ingress"]
    assert policy["podSelector"]["matchLabels"] != LABELS
    servers, redis = rule["from"]
    assert servers == {"podSelector": {"matchLabels": {"app.kubernetes.io/name": LABELS["app.kubernetes.io/name"]}}}
    assert redis == {"podSelector": policy["podSelector"]}


def test_references_by_name():
    service, ingress, scaler = one("Service"), one("Ingress"), one("HorizontalPodAutoscaler")
    target = scaler["spec"]["scaleTargetRef"]
    assert (target["apiVersion"], target["kind"]) == (DEPLOYMENT["apiVersion"], DEPLOYMENT["kind"])
    assert target["name"] == DEPLOYMENT["metadata"]["name"]
    assert POD["spec"]["serviceAccountName"] == one("ServiceAccount")["metadata"]["name"]
    [rule] = ingress["spec"]["rules"]
    [path] = rule["http"]["paths"]
    assert rule["host"] in ingress["spec"]["tls"][0]["hosts"]
    assert path["backend"]["service"]["name"] == service["metadata"]["name"]
    assert path["backend"]["service"]["port"]["name"] in {port["name"] for port in service["spec"]["ports"]}
    assert ingress["metadata"]["annotations"]["nginx.org/websocket-services"] == service["metadata"]["name"]
    assert service["spec"]["ports"][0]["targetPort"] == CONTAINER["ports"][0]["name"]
    assert {KUSTOMIZATION["namespace"], SECRET["metadata"]["namespace"]} == {one("Namespace")["metadata"]["name"]}


# Affinity, as in nginx.conf


def test_the_ingress_says_what_nginx_conf_says():
    annotations = one("Ingress")["metadata"]["annotations"]
    nginx = (CONF / "nginx.conf").read_text("utf-8")
    assert annotations["nginx.org/lb-method"] == "ip_hash"
    assert re.search(r"^ *ip_hash;", nginx, re.MULTILINE)
    for name in ("proxy-read-timeout", "proxy-send-timeout", "proxy-connect-timeout", "client-max-body-size"):
        assert f" {name.replace('-', '_')} {annotations[f'nginx.org/{name}']};" in nginx
    for name in ("max-fails", "fail-timeout"):
        assert f"{name.replace('-', '_')}={annotations[f'nginx.org/{name}']}" in nginx


def test_the_service_has_affinity():
    assert one("Service")["spec"]["sessionAffinity"] == "ClientIP"


# Rights


def test_the_pod_has_no_rights():
    pod, container = POD["spec"]["securityContext"], CONTAINER["securityContext"]
    assert pod["runAsNonRoot"] is True
    assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert POD["spec"]["automountServiceAccountToken"] is False
    assert one("Namespace")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


# The number of pods


def test_it_scales_before_the_pods_are_full():
    [metric] = one("HorizontalPodAutoscaler")["spec"]["metrics"]
    assert "replicas" not in DEPLOYMENT["spec"]
    assert one("HorizontalPodAutoscaler")["spec"]["minReplicas"] >= 2
    target = int(metric["pods"]["target"]["averageValue"])
    assert target * 2 <= int(ENVIRONMENT["LESSON_SERVER_MAX_CONNECTIONS"])


def test_the_adapter_counts_each_connection_once():
    [rule] = yaml.safe_load((FOLDER / "prometheus-adapter.values.yaml").read_text("utf-8"))["rules"]["custom"]
    [metric] = one("HorizontalPodAutoscaler")["spec"]["metrics"]
    assert rule["name"]["as"] == metric["pods"]["metric"]["name"]
    name, event = re.match(r'(\w+)\{event="(\w+)",', rule["seriesQuery"]).groups()
    assert f'sum({name}{{event="{event}",' in rule["metricsQuery"]
    metrics = Metrics()
    metrics.count_connections([((event, "teacher", "connected"), 2), ((event, "participant", "seated"), 3)])
    metrics.count_connections([(("take_seat", "participant", "connected"), 3)])
    counted = re.findall(rf'^{name}\{{.*event="{event}".*\}} (.+)$', metrics.text().decode(), re.MULTILINE)
    assert sum(map(float, counted)) == 5
