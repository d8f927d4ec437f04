"""The recipes of clusters: Ray's own checks of them, and what each must say to be safe and reproducible."""

from __future__ import annotations

import copy
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.instance_manager.subscribers.cloud_resource_monitor import CloudResourceMonitor
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.instance_manager_pb2 import Instance, InstanceUpdateEvent

ROOT = Path(__file__).resolve().parents[1]
LAUNCHER = ("cluster.yaml", "examples/clusters/local.yaml")
KUBERNETES = ("examples/clusters/raycluster.yaml", "examples/clusters/rayjob.yaml")
# What EC2 says of the instance types in cluster.yaml; `ray up` asks it, as test_cluster_aws.py does.
SIZES = {"m7i.xlarge": {"CPU": 4}, "m7i.4xlarge": {"CPU": 16}, "g6.2xlarge": {"CPU": 8, "GPU": 1}}


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def documents(name: str) -> dict[str, Any]:
    """Kind -> document of a file of Kubernetes."""
    return {doc["kind"]: doc for doc in yaml.safe_load_all((ROOT / name).read_text(encoding="utf-8"))}


def pinned(name: str) -> str:
    found = re.search(rf"^{name}==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert found, name
    return found[1]


def cluster_specs() -> list[dict[str, Any]]:
    first, second = (documents(name) for name in KUBERNETES)
    return [first["RayCluster"]["spec"], second["RayJob"]["spec"]["rayClusterSpec"]]


# --- ray up -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAUNCHER)
def test_ray_accepts_the_config(name: str) -> None:
    validate_config(prepare_config(read(name)))
    broken = read(name) | {"idle_timeout": 5}
    with pytest.raises(Exception, match="'idle_timeout' was unexpected"):
        validate_config(prepare_config(broken))


@pytest.mark.parametrize("name", LAUNCHER)
def test_what_ray_start_is_told_keeps_strangers_out(name: str) -> None:
    config = prepare_config(read(name))
    heads, workers = (
        [command for command in config[f"{kind}_start_ray_commands"] if "ray start" in command]
        for kind in ("head", "worker")
    )
    assert len(heads) == len(workers) == 1
    for command in (*heads, *workers):
        assert "RAY_AUTH_MODE=token ray start" in command
    assert "--dashboard-host=127.0.0.1" in heads[0]
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert any("RAY_AUTH_MODE=token" in command and ".bashrc" in command for command in config["setup_commands"])


@pytest.mark.parametrize("name", LAUNCHER)
def test_what_is_mounted_is_what_pip_installs(name: str) -> None:
    """The packages and what pyproject.toml names, from paths that exist; no data, no environment, no history."""
    mounts = {remote: local for remote, local in read(name)["file_mounts"].items() if "auth_token" not in remote}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = set(project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])
    files = {"pyproject.toml", "constraints.txt", project["project"]["readme"], *project["project"]["license-files"]}
    assert mounts == {f"~/screening/{name}": name for name in packages | files}
    assert all((ROOT / local).exists() for local in mounts.values())
    commands = prepare_config(read(name))["setup_commands"]
    (install,) = (command for command in commands if "pip install" in command)
    extras = re.search(r"'\.\[(.*)\]'", install)
    assert extras
    assert "--constraint constraints.txt" in install
    assert set(extras[1].split(",")) <= set(project["project"]["optional-dependencies"])


def test_rays_defaults_add_no_command() -> None:
    """Its defaults for AWS install a Ray of their own and bind the dashboard to all addresses."""
    ours = read("cluster.yaml")
    for key, value in prepare_config(ours).items():
        if key in ours and key.endswith("commands") and not key.endswith("setup_commands"):
            assert value == ours[key], key
    assert prepare_config(ours)["head_setup_commands"] == ours["setup_commands"]
    assert prepare_config(ours)["worker_setup_commands"] == ours["setup_commands"]


def test_limits_of_the_aws_cluster_hold_together() -> None:
    config = read("cluster.yaml")
    types = config["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    assert types["head"]["max_workers"] == 0
    limits = {name: kind["max_workers"] for name, kind in types.items()}
    assert max(limits.values()) < config["max_workers"] <= sum(limits.values())
    assert config["provider"]["cache_stopped_nodes"] is False
    for name, kind in types.items():
        node = kind["node_config"]
        assert node["ImageId"].startswith("resolve:ssm:/aws/service/"), name
        assert node["IamInstanceProfile"] == {"Name": "screening-head" if name == "head" else "screening-worker"}
        assert node["MetadataOptions"]["HttpTokens"] == "required"
        assert all(disk["Ebs"]["Encrypted"] for disk in node["BlockDeviceMappings"])
        assert ("InstanceMarketOptions" in node) == (name == "cpu_spot")


# --- which node type is started ---------------------------------------------------------------


def started(needs: list[dict[str, float]], unavailable: CloudResourceMonitor | None = None) -> dict[str, int]:
    """Node type -> how many Ray's autoscaler would start for these needs on an idle cluster."""
    config = prepare_config(read("cluster.yaml"))
    for kind in config["available_node_types"].values():
        kind["resources"] = SIZES[kind["node_config"]["InstanceType"]] | kind["resources"]
    types = AutoscalingConfig(config).get_node_type_configs()
    monitor = unavailable or CloudResourceMonitor()
    reply = ResourceDemandScheduler(None).schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs={name: kind for name, kind in types.items() if name != "head"},
            max_num_nodes=config["max_workers"],
            resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make(need) for need in needs]),
            cloud_resource_availabilities=monitor.get_resource_availabilities(),
            recoverable_resource_availabilities=monitor.get_recoverable_resource_availabilities(),
        )
    )
    return {launch.instance_type: launch.count for launch in reply.to_launch}


def told(status: int) -> CloudResourceMonitor:
    """What Ray remembers after a spot instance came to this end."""
    monitor = CloudResourceMonitor()
    monitor.notify([InstanceUpdateEvent(instance_type="cpu_spot", new_instance_status=status)])
    return monitor


def test_cpu_work_goes_to_spot_and_what_is_too_much_to_on_demand() -> None:
    assert started([{"CPU": 1}] * 20) == {"cpu_spot": 2}
    assert started([{"CPU": 1}] * 16 * 18) == {"cpu_spot": 16, "cpu_on_demand": 2}


def test_gpu_work_and_no_other_goes_to_gpu_nodes() -> None:
    assert started([{"CPU": 1, "GPU": 1}]) == {"gpu": 1}
    assert started([{"CPU": 1, "GPU": 1}, *[{"CPU": 1}] * 16]) == {"gpu": 1, "cpu_spot": 1}
    assert "gpu" not in started([{"CPU": 1}] * 1000)


def test_ray_turns_to_on_demand_where_spot_instances_do_not_start() -> None:
    assert started([{"CPU": 1}], told(Instance.ALLOCATION_TIMEOUT)) == {"cpu_on_demand": 1}


def test_ray_goes_on_asking_for_spot_that_was_refused() -> None:
    """A limit of Ray that cluster.yaml tells of: where this fails, Ray has learnt it and the comment may go."""
    assert started([{"CPU": 1}], told(Instance.ALLOCATION_FAILED)) == {"cpu_spot": 1}


# --- what the account must hold ---------------------------------------------------------------


def test_cloudformation_reads_the_template() -> None:
    """It refuses YAML's aliases, as the mock does not."""
    text = (ROOT / "examples/clusters/aws-account.yaml").read_text()
    assert not [token for token in yaml.scan(text) if isinstance(token, yaml.AliasToken | yaml.AnchorToken)]


def test_roles_may_do_only_what_their_nodes_must() -> None:
    resources = read("examples/clusters/aws-account.yaml")["Resources"]
    worker = resources["WorkerRole"]["Properties"]
    assert worker["AssumeRolePolicyDocument"] == resources["HeadRole"]["Properties"]["AssumeRolePolicyDocument"]
    assert worker.keys() == {"RoleName", "AssumeRolePolicyDocument", "ManagedPolicyArns"}
    storage = resources["Storage"]["Properties"]["PolicyDocument"]["Statement"]
    assert all(action.startswith("s3:") and "*" not in action for rule in storage for action in rule["Action"])
    assert all("${Bucket}" in rule["Resource"]["Fn::Sub"] for rule in storage)
    (policy,) = resources["HeadRole"]["Properties"]["Policies"]
    rules = {str(rule["Action"]): rule for rule in policy["PolicyDocument"]["Statement"]}
    assert rules["iam:PassRole"]["Resource"] == {"Fn::GetAtt": ["WorkerRole", "Arn"]}
    name = rules["ec2:TerminateInstances"]["Condition"]["StringEquals"]["aws:ResourceTag/ray-cluster-name"]
    assert name == read("cluster.yaml")["cluster_name"]
    assert (
        resources["Nodes"]["Properties"]["GroupName"] == read("cluster.yaml")["provider"]["security_group"]["GroupName"]
    )


# --- KubeRay ----------------------------------------------------------------------------------


def test_both_kubernetes_files_hold_the_same_cluster() -> None:
    first, second = cluster_specs()
    assert first == second
    assert documents(KUBERNETES[0])["NetworkPolicy"] == documents(KUBERNETES[1])["NetworkPolicy"]
    assert {doc["apiVersion"] for name in KUBERNETES for doc in documents(name).values()} == {
        "ray.io/v1",
        "networking.k8s.io/v1",
    }


def test_ray_can_autoscale_the_kubernetes_cluster() -> None:
    """Ray derives its own configuration from the RayCluster and checks it against its schema."""
    resource = copy.deepcopy(documents(KUBERNETES[0])["RayCluster"])
    resource["metadata"]["namespace"] = "default"
    types = _derive_autoscaling_config_from_ray_cr(resource)["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0
    assert types["cpu"]["resources"]["CPU"] == 8
    assert types["gpu"]["resources"]["GPU"] == 1
    assert (types["cpu"]["max_workers"], types["gpu"]["max_workers"]) == (16, 2)


def test_the_kubernetes_cluster_asks_for_a_token_and_the_pinned_versions() -> None:
    spec = cluster_specs()[0]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["rayVersion"] == pinned("ray")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    containers = [container for group in groups for container in group["template"]["spec"]["containers"]]
    assert {container["image"] for container in containers} == {f"screening:{project['version']}"}
    assert all(container["resources"]["limits"] == container["resources"]["requests"] for container in containers)
    dockerfile = (ROOT / "examples/clusters/Dockerfile").read_text(encoding="utf-8")
    assert re.search(rf"^FROM rayproject/ray:{re.escape(pinned('ray'))}-py311$", dockerfile, re.MULTILINE)
    copied = {path for line in re.findall(r"^COPY \S+ (.+) \S+$", dockerfile, re.MULTILINE) for path in line.split()}
    assert copied == set(read("cluster.yaml")["file_mounts"].values()) - {"~/.ray/auth_token"}


def test_the_kubernetes_job_runs_a_command_of_ours_and_cleans_up() -> None:
    spec = documents(KUBERNETES[1])["RayJob"]["spec"]
    assert spec["entrypoint"].startswith("screening run ")
    assert spec["shutdownAfterJobFinishes"] is True
