"""Everything that is read and written, on a real S3 server: whole, in spite of faults, and with nobody's secrets."""

from __future__ import annotations

from collections.abc import Iterator

import boto3
import botocore.config
import pytest
from botocore.exceptions import BotoCoreError, ClientError
from s3_server import KEY, REGION, SECRET, S3Server


@pytest.fixture(scope="module")
def running_server() -> Iterator[S3Server]:
    with S3Server() as server:
        yield server


@pytest.fixture
def server(running_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """A server without faults that this process and what it starts would use."""
    for name, value in running_server.environment.items():
        monkeypatch.setenv(name, value)
    running_server.forget()
    yield running_server
    running_server.fail(0)


# --- the server itself -----------------------------------------------------------------------


def test_the_server_fails_as_it_is_told(server: S3Server) -> None:
    client = boto3.client(
        "s3",
        endpoint_url=server.endpoint,
        aws_access_key_id=KEY,
        aws_secret_access_key=SECRET,
        region_name=REGION,
        config=botocore.config.Config(retries={"total_max_attempts": 1}),
    )

    def outcome() -> str:
        try:
            client.get_object(Bucket=server.bucket, Key="x")["Body"].read()
        except ClientError as error:
            return str(error.response["Error"]["Code"])
        except BotoCoreError as error:
            return type(error).__name__
        return "ok"

    client.put_object(Bucket=server.bucket, Key="x", Body=b"data")
    assert outcome() == "ok"
    kinds = {"slow_down": "SlowDown", "error": "InternalError", "reset": "ConnectionClosedError"}
    for fault, seen in kinds.items():
        server.fail(1, (fault,))
        assert outcome() == seen
    server.fail(1, only="put .*")
    assert outcome() == "ok"
    seen_twice = []
    for _ in range(2):
        server.forget()
        server.fail(0.5, ("slow_down", "error"))
        seen_twice.append([outcome() for _ in range(30)])
    assert seen_twice[0] == seen_twice[1]
    assert set(seen_twice[0]) == {"ok", "SlowDown", "InternalError"}
    counts = server.counts()
    assert (counts["get 200"], counts["get 503"]) == (seen_twice[1].count("ok"), seen_twice[1].count("SlowDown"))
    server.fail(0)
    server.cut(0.4)
    assert outcome() == "ConnectionClosedError"
