"""compose.yaml: what Docker Compose makes of it, in agreement with the files that it mounts and with the server."""

import ipaddress
import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from cluster import ROOT
from commands import clean_environ
from deployments import CONF, RESERVE, SECRETS, SETTINGS, STOP, documents, program, seconds, variables
from promql import RULES, needs_promtool, promtool

from lesson_server.settings.sources import load

TEXT = (ROOT / "compose.yaml").read_text("utf-8")
EXAMPLE = variables(CONF / "compose.env.example")
REQUIRED = {"POSTGRES_PASSWORD", "VALKEY_PASSWORD", "LESSON_AUTH_KEY", "GRAFANA_PASSWORD"}
FILLED = {name: value or (f"{name}-" * 3 if name in REQUIRED else "") for name, value in EXAMPLE.items()}
NGINX = (CONF / "compose/nginx.conf").read_text("utf-8")
PAIR, SECOND_PAIR = ["server-1", "server-2"], ["server-3", "server-4"]
SERVERS = PAIR + SECOND_PAIR


def compose(variables, directory):
    """What `docker compose config` makes of the file; it needs no Docker."""
    file = directory / "variables"
    file.write_text("".join(f"{name}='{value}'\n" for name, value in variables.items()))
    options = ["--env-file", file, "--file", ROOT / "compose.yaml", "--profile", "*"]
    return subprocess.run(
        [program("docker-compose"), *options, "config", "--format", "json"],
        env={name: value for name, value in clean_environ().items() if name not in EXAMPLE},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    done = compose(FILLED, tmp_path_factory.mktemp("compose"))
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def services(config):
    return config["services"]


# Variables


@pytest.mark.parametrize("name", sorted(REQUIRED))
def test_a_secret_that_is_missing_is_named(name, tmp_path):
    done = compose({**FILLED, name: ""}, tmp_path)
    assert done.returncode != 0
    assert f"required variable {name} is missing a value: see conf/compose.env.example" in done.stderr


def test_the_example_has_every_variable_and_no_secret():
    assert set(re.findall(r"\$\{(\w+)", TEXT)) == set(EXAMPLE)
    for name in REQUIRED | SECRETS & set(EXAMPLE):
        assert EXAMPLE[name] == ""


def test_the_defaults_of_the_example_are_those_of_the_file():
    defaults = dict(re.findall(r"\$\{(\w+):-([^}]*)\}", TEXT))
    assert defaults == {name: value for name, value in EXAMPLE.items() if name not in REQUIRED}


@pytest.mark.parametrize("server", SERVERS)
def test_the_servers_get_settings_that_are_complete(services, server):
    environment = services[server]["environment"]
    assert set(environment) <= SETTINGS
    settings = load(CONF / "production.toml", environ=environment)
    settings.require_complete()
    assert settings.auth.key.get_secret_value() == FILLED["LESSON_AUTH_KEY"]
    assert f":{FILLED['POSTGRES_PASSWORD']}@postgres/" in settings.rds.dsn.get_secret_value()
    assert f":{FILLED['VALKEY_PASSWORD']}@valkey:" in settings.redis.url.get_secret_value()


def test_the_servers_are_alike(services):
    first, *others = [
        {key: value for key, value in services[server].items() if key not in ("networks", "profiles")}
        for server in SERVERS
    ]
    assert others == [first] * 3
    assert [services[server].get("profiles") for server in SERVERS] == [None, None, ["second-pair"], ["second-pair"]]


# Every service


def test_every_service_is_confined(services):
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["restart"] == "unless-stopped", name
        limits = service["deploy"]["resources"]["limits"]
        assert {"cpus", "memory", "pids"} <= set(limits), name


def test_every_service_has_a_health_check(services):
    assert "HEALTHCHECK" in (ROOT / "Dockerfile").read_text("utf-8")
    assert {name for name, service in services.items() if "healthcheck" not in service} == set(SERVERS)


def test_every_service_waits_until_what_it_needs_is_healthy(services):
    waited = {name: set(service.get("depends_on", {})) for name, service in services.items()}
    assert waited == {
        **{server: {"postgres", "valkey"} for server in SERVERS},
        "nginx": set(PAIR),
        "grafana": {"prometheus"},
        "postgres": set(),
        "valkey": set(),
        "prometheus": set(),
    }
    conditions = {need["condition"] for service in services.values() for need in service.get("depends_on", {}).values()}
    assert conditions == {"service_healthy"}


def test_every_image_has_a_version(services):
    for name, service in services.items():
        if name not in SERVERS:
            assert re.search(r":v?\d+(\.\d+)*(-alpine)?$", service["image"]), name


def test_only_nginx_and_grafana_are_published_and_to_this_machine_only(services):
    published = {
        (name, port["host_ip"], port["published"], port["target"])
        for name, service in services.items()
        for port in service.get("ports", [])
    }
    assert published == {
        ("nginx", "127.0.0.1", "8080", 8080),
        ("nginx", "127.0.0.1", "8081", 8081),
        ("grafana", "127.0.0.1", "3000", 3000),
    }


def test_the_stores_are_on_a_network_without_a_way_out(config, services):
    assert config["networks"]["stores"]["internal"] is True
    for store in ("postgres", "valkey"):
        assert set(services[store]["networks"]) == {"stores"}
    assert {name for name, service in services.items() if "stores" in service["networks"]} == {
        *SERVERS,
        "postgres",
        "valkey",
    }


def test_what_is_mounted_exists_and_is_not_writable(services):
    mounted = [
        mount for service in services.values() for mount in service.get("volumes", []) if mount["type"] == "bind"
    ]
    assert len(mounted) == 4
    for mount in mounted:
        assert Path(mount["source"]).exists(), mount["source"]
        assert mount["read_only"] is True


def test_the_grace_is_longer_than_what_a_stop_takes(services):
    drain = load(CONF / "production.toml", environ={}).server.drain
    for server in SERVERS:
        assert seconds(services[server]["stop_grace_period"]) >= drain + STOP + RESERVE


def test_postgresql_has_connections_for_all_servers(services):
    pool_size = load(CONF / "production.toml", environ={}).rds.pool_size
    assert len(SERVERS) * (pool_size + 1) < 100 - 3  # max_connections, and those kept for the superuser


# The files that are mounted


def test_nginx_knows_the_servers_and_their_addresses(services):
    addresses = {server: services[server]["networks"]["front"]["ipv4_address"] for server in SERVERS}
    assert dict(entry.split("=") for entry in services["nginx"]["extra_hosts"]) == addresses
    lines = re.findall(r"^ *(# )?server ([\w-]+)(:8080 .*)$", NGINX, re.MULTILINE)
    assert [(mark, server) for mark, server, _ in lines] == [("", s) for s in PAIR] + [("# ", s) for s in SECOND_PAIR]
    assert len({rest for _, _, rest in lines}) == 1


def test_the_addresses_of_the_servers_are_their_own(config, services):
    [subnet] = config["networks"]["front"]["ipam"]["config"]
    networks = [services[server]["networks"]["front"] for server in SERVERS]
    assert len({network["ipv4_address"] for network in networks}) == 4
    assert len({network["mac_address"] for network in networks}) == 4
    for network in networks:
        assert ipaddress.ip_address(network["ipv4_address"]) in ipaddress.ip_network(subnet["subnet"])
    assert re.findall(r"set_real_ip_from (\S+);", NGINX) == [subnet["gateway"]]


def test_nginx_reads_the_file_that_is_mounted(services):
    [mount] = services["nginx"]["volumes"]
    option, file = services["nginx"]["command"][1:3]
    assert option == "-c"
    assert Path(mount["source"]) / Path(file).relative_to(mount["target"]) == CONF / "compose/nginx.conf"


def test_nginx_may_open_the_files_that_it_wants(services):
    wanted = int(re.search(r"worker_rlimit_nofile (\d+);", NGINX)[1])
    connections = int(re.search(r"worker_connections (\d+);", NGINX)[1])
    assert services["nginx"]["ulimits"]["nofile"] == wanted >= 2 * connections


def test_nginx_listens_where_the_ports_and_the_health_check_lead(services):
    ports = {str(port["target"]) for port in services["nginx"]["ports"]}
    [checked] = re.findall(r"http://(\S+)/", " ".join(services["nginx"]["healthcheck"]["test"]))
    assert set(re.findall(r"listen (\S+);", NGINX)) == {*ports, checked}


def test_prometheus_asks_each_server_and_reads_the_alerts(services):
    command = " ".join(services["prometheus"]["command"])
    [mount] = [mount for mount in services["prometheus"]["volumes"] if mount["type"] == "bind"]
    file = re.search(r"--config\.file=(\S+)", command)[1]
    path = Path(mount["source"]) / Path(file).relative_to(mount["target"])
    [settings] = documents(path)
    [scrape] = settings["scrape_configs"]
    [target] = scrape["static_configs"]
    assert target["targets"] == [f"{server}:8080" for server in PAIR]
    assert [path.parent / name for name in settings["rule_files"]] == [RULES]


@needs_promtool
def test_prometheus_accepts_its_settings():
    promtool("check", "config", CONF / "prometheus/prometheus.yaml")


def test_grafana_finds_prometheus_and_the_dashboards(services):
    [mount] = [mount for mount in services["grafana"]["volumes"] if mount["type"] == "bind"]
    provisioning = Path(mount["source"]) / "provisioning"
    assert services["grafana"]["environment"]["GF_PATHS_PROVISIONING"] == f"{mount['target']}/provisioning"
    [source] = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text("utf-8"))["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert "monitoring" in set(services["grafana"]["networks"]) & set(services["prometheus"]["networks"])
    [provider] = yaml.safe_load((provisioning / "dashboards/lesson-server.yaml").read_text("utf-8"))["providers"]
    assert provider["options"]["path"] == mount["target"]
    assert Path(mount["source"]) == CONF / "grafana"
    assert (CONF / "grafana/lesson-server.json").exists()
