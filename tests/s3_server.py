"""An S3 server in this process, for tests of remote data."""

import logging
import os
import uuid
from collections.abc import Iterator

import pytest

from library.io import remote


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of an S3 server on this machine."""
    server_module = pytest.importorskip("moto.server")
    pytest.importorskip("obstore")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = server_module.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_environment(s3_server, monkeypatch) -> Iterator[str]:
    """The same, with the environment that leads there and nowhere else, until the end of the test."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    # nor may a profile of the person who runs the tests
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    yield s3_server
    # the tests that follow open no buckets, so their loaders may fork again
    remote._open.cache_clear()
    remote._process_of_threads.cache_clear()


@pytest.fixture
def s3_bucket(s3_environment) -> str:
    """The URL of an empty bucket of its own, and the environment with which it can be used."""
    boto3 = pytest.importorskip("boto3")
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    boto3.client("s3", endpoint_url=s3_environment, region_name="us-east-1").create_bucket(Bucket=name)
    return f"s3://{name}"
