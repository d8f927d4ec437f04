"""`ray up cluster.yaml` against a mock of AWS: account, head, workers, and all gone after `ray down`.

EC2's instances are made up, so that `ssh` and `rsync` are stood in for by scripts that write down what they were told.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from moto.server import ThreadedMotoServer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
BUCKET, SSH_FROM = "plates", "198.51.100.7/32"

# Keeps what is copied to a node beside what is said to it.
STAND_IN = """#!{python}
import json, pathlib, shutil, sys
arguments, folder = sys.argv[1:], pathlib.Path({folder!r})
with (folder / "said.jsonl").open("a") as log:
    log.write(json.dumps([{name!r}, *arguments]) + "\\n")
if {name!r} == "rsync" and arguments[-1].endswith("ray_bootstrap_config.yaml"):
    shutil.copy(arguments[-2], folder / "bootstrap.yaml")
"""


@dataclass(frozen=True)
class Account:
    """An AWS account of the mock, and somebody's machine that uses it."""

    environment: dict[str, str]
    folder: Path

    def client(self, service: str) -> Any:
        return boto3.client(
            service,
            endpoint_url=self.environment["AWS_ENDPOINT_URL"],
            region_name="us-west-2",
            aws_access_key_id="nobody",
            aws_secret_access_key="nothing",
        )

    def instances(self) -> list[dict[str, Any]]:
        found = self.client("ec2").describe_instances()["Reservations"]
        return [instance for reservation in found for instance in reservation["Instances"]]

    def running(self) -> list[dict[str, Any]]:
        return [instance for instance in self.instances() if instance["State"]["Name"] == "running"]

    def said(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.folder / "said.jsonl").read_text().splitlines()]

    def ray(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", *arguments],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Account]:
    folder = tmp_path_factory.mktemp("aws")
    programs = folder / "bin"
    programs.mkdir()
    for name in ("ssh", "rsync"):
        program = programs / name
        program.write_text(STAND_IN.format(python=sys.executable, folder=str(folder), name=name))
        program.chmod(0o755)
    (folder / ".ray").mkdir()
    (folder / ".ray" / "auth_token").write_text("a token")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_"))}
    environment |= {
        "HOME": str(folder),
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "TMPDIR": str(folder),  # where Ray keeps the cluster's state
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_EC2_METADATA_DISABLED": "true",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    yield Account(environment, folder)
    server.stop()


@pytest.fixture(scope="module")
def deployed(account: Account) -> Account:
    """The account after examples/clusters/aws-account.yaml."""
    vpc = account.client("ec2").describe_vpcs()["Vpcs"][0]["VpcId"]
    values = {"Bucket": BUCKET, "Vpc": vpc, "SshFrom": SSH_FROM}
    account.client("cloudformation").create_stack(
        StackName="screening-cluster",
        TemplateBody=(ROOT / "examples/clusters/aws-account.yaml").read_text(),
        Parameters=[{"ParameterKey": key, "ParameterValue": value} for key, value in values.items()],
        Capabilities=["CAPABILITY_NAMED_IAM"],
    )
    return account


@pytest.fixture(scope="module")
def up(deployed: Account) -> Account:
    """The account after `ray up`."""
    deployed.ray("up", "--yes", "--no-config-cache", "cluster.yaml")
    return deployed


@pytest.fixture(scope="module")
def launch(up: Account) -> Callable[[str], dict[str, Any]]:
    """Has a worker launched as the head's autoscaler would, by Ray's code and the configuration that the head got."""
    program = """
import sys, yaml
from ray.autoscaler._private.providers import _get_node_provider
from ray.autoscaler.tags import TAG_RAY_LAUNCH_CONFIG, TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE
config = yaml.safe_load(open(sys.argv[1]))
kind = config["available_node_types"][sys.argv[2]]
tags = {TAG_RAY_NODE_KIND: "worker", TAG_RAY_USER_NODE_TYPE: sys.argv[2], TAG_RAY_LAUNCH_CONFIG: "x"}
_get_node_provider(config["provider"], config["cluster_name"]).create_node(kind["node_config"], tags, 1)
"""

    def launched(kind: str) -> dict[str, Any]:
        before = {instance["InstanceId"] for instance in up.instances()}
        command = [sys.executable, "-c", program, str(up.folder / "bootstrap.yaml"), kind]
        done = subprocess.run(command, env=up.environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        (new,) = (instance for instance in up.instances() if instance["InstanceId"] not in before)
        return new

    return launched


def tags(instance: dict[str, Any]) -> dict[str, str]:
    return {tag["Key"]: tag["Value"] for tag in instance["Tags"]}


def role(instance: dict[str, Any]) -> str:
    return str(instance["IamInstanceProfile"]["Arn"]).rpartition("/")[2]


def test_head_is_launched_as_written(up: Account) -> None:
    (head,) = up.running()
    assert head["InstanceType"] == "m7i.xlarge"
    assert head["ImageId"].startswith("resolve:ssm:/aws/service/canonical/ubuntu/server/24.04/")
    assert "InstanceLifecycle" not in head
    assert role(head) == "screening-head"
    assert tags(head)["ray-cluster-name"] == "screening"
    assert tags(head)["ray-node-type"] == "head"
    assert tags(head)["ray-user-node-type"] == "head"
    assert tags(head)["ray-node-status"] == "up-to-date"
    assert head["MetadataOptions"]["HttpTokens"] == "required"
    disks = up.client("ec2").describe_volumes()["Volumes"]
    assert [(disk["Size"], disk["Encrypted"], disk["VolumeType"]) for disk in disks] == [(100, True, "gp3")]


def test_nobody_but_ssh_from_one_network_gets_in(up: Account) -> None:
    ec2 = up.client("ec2")
    (head,) = up.running()
    (group,) = head["SecurityGroups"]
    assert group["GroupName"] == "screening-cluster"
    (found,) = ec2.describe_security_groups(GroupIds=[group["GroupId"]])["SecurityGroups"]
    rules = found["IpPermissions"]
    (ssh,) = (rule for rule in rules if rule["IpRanges"])
    assert (ssh["FromPort"], ssh["ToPort"], ssh["IpProtocol"]) == (22, 22, "tcp")
    assert [entry["CidrIp"] for entry in ssh["IpRanges"]] == [SSH_FROM]
    (among,) = (rule for rule in rules if not rule["IpRanges"])
    assert among["IpProtocol"] == "-1"
    assert [pair["GroupId"] for pair in among["UserIdGroupPairs"]] == [group["GroupId"]]
    assert not any(rule["Ipv6Ranges"] or rule["PrefixListIds"] for rule in rules)


def test_key_is_made_for_this_user_alone(up: Account) -> None:
    (head,) = up.running()
    key = up.folder / ".ssh" / f"{head['KeyName']}.pem"
    assert key.stat().st_mode & 0o777 == 0o600
    assert all(str(key) in line for line in up.said() if line[0] == "ssh")


def test_head_is_told_what_the_config_says_in_that_order(up: Account) -> None:
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    said = [line[-1] for line in up.said() if line[0] == "ssh"]
    wanted = [
        command.split("RAY_AUTH_MODE=token ray start")[-1].strip()
        for part in ("initialization_commands", "setup_commands", "head_start_ray_commands")
        for command in config[part]
    ]
    places = [next(place for place, line in enumerate(said) if shlex.quote(want)[1:-1] in line) for want in wanted]
    assert places == sorted(places)
    (start,) = (line for line in said if "ray start" in line)
    assert "RAY_AUTH_MODE=token ray start --head" in start
    assert "RAY_enable_autoscaler_v2" in start
    assert '"CPU":0' in start.replace(" ", "").replace("\\", "")
    copied = {line[-1].partition(":")[2].rstrip("/"): line[-2] for line in up.said() if line[0] == "rsync"}
    assert set(config["file_mounts"]) <= copied.keys()
    assert copied["~/.ray/auth_token"] == str(up.folder / ".ray" / "auth_token")


@pytest.mark.parametrize(
    ("kind", "instance", "spot", "image", "disk"),
    [
        ("cpu_spot", "m7i.4xlarge", True, "canonical", 100),
        ("cpu_on_demand", "m7i.4xlarge", False, "canonical", 100),
        ("gpu", "g6.2xlarge", False, "deeplearning", 150),
    ],
)
def test_workers_are_launched_as_written(
    up: Account, launch: Callable[[str], dict[str, Any]], kind: str, instance: str, spot: bool, image: str, disk: int
) -> None:
    (head,) = (node for node in up.running() if tags(node)["ray-node-type"] == "head")
    worker = launch(kind)
    assert worker["InstanceType"] == instance
    assert worker.get("InstanceLifecycle") == ("spot" if spot else None)
    assert worker["ImageId"].startswith(f"resolve:ssm:/aws/service/{image}/")
    assert role(worker) == "screening-worker"
    assert worker["SecurityGroups"] == head["SecurityGroups"]
    assert worker["VpcId"] == head["VpcId"]
    assert worker["KeyName"] == head["KeyName"]
    assert tags(worker)["ray-cluster-name"] == "screening"
    (volume,) = up.client("ec2").describe_volumes(
        Filters=[{"Name": "attachment.instance-id", "Values": [worker["InstanceId"]]}]
    )["Volumes"]
    assert (volume["Size"], volume["Encrypted"]) == (disk, True)


def test_ray_knows_what_the_instances_hold(up: Account) -> None:
    types = yaml.safe_load((up.folder / "bootstrap.yaml").read_text())["available_node_types"]
    assert types["head"]["resources"]["CPU"] == 0
    assert types["cpu_spot"]["resources"] == types["cpu_on_demand"]["resources"]
    assert types["cpu_spot"]["resources"]["CPU"] == 16
    assert types["gpu"]["resources"]["GPU"] == 1


def test_ray_down_leaves_nothing_running(up: Account, launch: Callable[[str], dict[str, Any]]) -> None:
    launch("cpu_spot")
    assert len(up.running()) >= 2
    up.ray("down", "--yes", "cluster.yaml")
    assert up.instances()
    assert not up.running()


def test_a_group_that_is_missing_is_made_by_ray_with_ssh_from_everywhere(deployed: Account) -> None:
    """What the comment beside security_group says."""
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    config["provider"]["security_group"]["GroupName"] = "another"
    config["cluster_name"] = "another"
    path = deployed.folder / "another.yaml"
    path.write_text(yaml.safe_dump(config))
    deployed.ray("up", "--yes", "--no-config-cache", str(path))
    groups = deployed.client("ec2").describe_security_groups(Filters=[{"Name": "group-name", "Values": ["another"]}])
    rules = groups["SecurityGroups"][0]["IpPermissions"]
    assert [rule["FromPort"] for rule in rules if rule["IpRanges"]] == [22]
    assert [entry["CidrIp"] for rule in rules for entry in rule["IpRanges"]] == ["0.0.0.0/0"]
    deployed.ray("down", "--yes", str(path))
