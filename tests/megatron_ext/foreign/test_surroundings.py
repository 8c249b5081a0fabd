"""What the environment says about the way to a server is told by its name where it cannot be used."""

import asyncio
import os

import pytest

from data_tools.mistake import UserMistake
from megatron_ext.foreign import openai_backend
from megatron_ext.foreign.client import Client
from megatron_ext.rollout.endpoint import Endpoint
from megatron_ext.rollout.settings import SamplingSettings
from tests.megatron_ext.foreign.server import serving

pytest.importorskip("openai")
SECRET = "pass-never-to-be-seen"


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """An environment without proxies and certificates of its own."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith("SSL"):
            monkeypatch.delenv(name)


def opened() -> None:
    settings = SamplingSettings(backend="openai", endpoint=Endpoint(url="http://127.0.0.1:1/v1", model="judge"))
    with openai_backend.opened(settings):
        pass


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("SSL_CERT_FILE", "/nowhere", "not a file that can be used (FileNotFoundError"),
        ("SSL_CERT_FILE", "/", "not a file that can be used (IsADirectoryError"),
        ("SSL_CERT_FILE", "/dev/null", "not a file that can be used (SSLError"),
        ("ALL_PROXY", f"socks9://me:{SECRET}@here:1", "names no proxy's address"),
        ("http_proxy", f"ftp://me:{SECRET}@here:1", "names no proxy's address"),
        ("HTTPS_PROXY", f"::::{SECRET}", "names no proxy's address"),
    ],
)
def test_certificates_and_proxies_that_cannot_be_used_are_told_by_their_variable(monkeypatch, name, value, said):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserMistake) as caught:
        opened()
    assert f"openai: {name}: {said}" in str(caught.value) and "unset it" in str(caught.value)
    assert SECRET not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_a_server_that_is_not_reached_by_a_proxy_is_told_with_the_variable_that_names_it(monkeypatch, name):
    async def models(url: str) -> None:
        async with Client(Endpoint(url=url, model="judge", timeout_s=5.0, retries=0), "") as client:
            await client.check_model()

    monkeypatch.setenv(name, f"http://me:{SECRET}@127.0.0.1:1")
    with serving() as server:
        with pytest.raises(UserMistake) as caught:
            asyncio.run(models(server.url))
        assert f"was asked by the proxy of {name} once" in str(caught.value)
        assert "or name its host in NO_PROXY" in str(caught.value) and SECRET not in str(caught.value)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        asyncio.run(models(server.url))
