"""The endpoints as tools of an MCP server: an agent trains and compares, where one person's machine lets it in."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from lora_studio import door
from lora_studio.errors import StudioError
from tests.browser import served
from tests.tiny import tiny_model

ROWS = "\n".join(json.dumps({"question": f"how many {n}", "answer": f"just {n}"}) for n in range(12))


def test_nobody_is_let_in_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORA_STUDIO_MCP", raising=False)
    assert door.agents_come() is False
    assert not any(known.fullmatch("/gradio_api/mcp/") for known in (door.READ, door.ACT))


@pytest.mark.parametrize("name", ["LORA_STUDIO_VISITORS", "SPACE_ID"])
def test_not_where_visitors_are_told_apart(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("LORA_STUDIO_MCP", "1")
    monkeypatch.setenv(name, "1")
    with pytest.raises(StudioError, match="cannot tell visitors apart"):
        door.agents_come()


def test_an_agent_trains_and_compares(tmp_path: Path) -> None:
    mcp = pytest.importorskip("mcp", reason="the package mcp is not installed")
    streamed = pytest.importorskip("mcp.client.streamable_http").streamablehttp_client
    tiny_model(tmp_path / "models" / "starter")

    async def act(url: str) -> None:
        async with streamed(f"{url}/gradio_api/mcp/") as (read, write, _), mcp.ClientSession(read, write) as session:
            await session.initialize()

            async def use(name: str, /, **given: Any) -> str:
                answer = await session.call_tool(name, given)
                return answer.content[0].text

            tools = {tool.name: tool for tool in (await session.list_tools()).tools}
            told = httpx.get(f"{url}/gradio_api/info").json()["named_endpoints"]
            assert {f"/{name}" for name in tools} == told.keys()
            assert set(tools["evaluate"].inputSchema["properties"]) == {"run", "dataset", "limit"}
            dataset = await use("add_dataset", text=ROWS, name="an agent's")
            run = await use("start_run", dataset=dataset, rank=2, steps=12, batch_size=2)
            while "'running'" in (said := await use("run_status", run=run)) or "queued" in said:
                pass
            assert "done" in said, said
            assert "loss" in await use("evaluate", run=run)  # waits in the queue, as people's calls do
            assert "E_RUN_NOT_FOUND" in await use("run_status", run="0" * 32)

    with served(tmp_path, LORA_STUDIO_MODELS=str(tmp_path / "models"), HF_HUB_OFFLINE="1", LORA_STUDIO_MCP="1") as url:
        asyncio.run(act(url))
        assert (
            httpx.post(f"{url}/gradio_api/mcp/", json={}, headers={"origin": "https://evil.example"}).status_code == 403
        )
        for path in ("sse", "messages/", "schema", "http"):
            assert httpx.get(f"{url}/gradio_api/mcp/{path}").status_code == 404
