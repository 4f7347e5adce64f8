"""What the client says when a server does not answer, or answers that it will not."""

from __future__ import annotations

import time

import pytest
import websocket

from tools.comfy_client import ComfyClient, ServerError, messages
from tools.server import ComfyServer, free_port


@pytest.mark.parametrize("call", [ComfyClient.object_info, lambda client: client.run({})])
def test_no_server_is_an_error_with_its_address(call) -> None:
    client = ComfyClient(f"http://127.0.0.1:{free_port()}/")
    with pytest.raises(ServerError, match="no answer|closed the connection"):
        call(client)


def test_an_answer_that_is_an_error_is_named(server: ComfyServer) -> None:
    with pytest.raises(ServerError, match=r"/no/such/page: 404 Not Found"):
        server.get("/no/such/page")


def test_a_websocket_that_the_server_closes_is_no_message() -> None:
    """A server that ends of itself takes leave: the last thing to be read is empty."""

    class Closed:
        def settimeout(self, seconds: float) -> None:
            pass

        def recv(self) -> str:
            return ""

    with pytest.raises(websocket.WebSocketConnectionClosedException):
        list(messages(Closed(), "prompt", time.monotonic() + 1))
