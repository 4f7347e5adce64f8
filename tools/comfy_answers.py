"""What a server answers, read with bounds and as the types that ComfyUI's API has.

A proxy's page, another program at the address or a broken pack gives other answers, or ones without an end.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Annotated, Any

import requests
from pydantic import ConfigDict, Field, TypeAdapter
from typing_extensions import NotRequired, TypedDict

from feedface_core.errors import shorten

READ_TIMEOUT = 60  # seconds without a byte
LONGEST_ANSWER = 600.0  # seconds for all of it
MOST_BYTES = 2**30
MOST_TEXT = 1000  # characters of what a server says


class _Status(TypedDict):
    messages: NotRequired[list[tuple[str, dict[str, Any]]] | None]


class _Ended(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow")
    outputs: dict[str, dict[str, Any]]
    status: NotRequired[_Status | None]


class _Stored(TypedDict):
    name: Annotated[str, Field(min_length=1)]
    subfolder: NotRequired[str]


_Item = Annotated[list[Any], Field(min_length=2)]


class _Queue(TypedDict):
    queue_running: list[_Item]
    queue_pending: list[_Item]


class _Queued(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow")
    node_errors: NotRequired[dict[str, Any] | list[Any] | None]


#: By what was asked for.
STORED, QUEUE, QUEUED = TypeAdapter(_Stored), TypeAdapter(_Queue), TypeAdapter(_Queued)
HISTORY, OBJECTS = TypeAdapter(dict[str, _Ended]), TypeAdapter(dict[str, Any])


@dataclass(frozen=True)
class Answer:
    """All of an answer."""

    status_code: int
    reason: str
    content: bytes

    @property
    def ok(self) -> bool:
        return self.status_code < 400

    @property
    def text(self) -> str:
        return self.content[: 4 * MOST_TEXT].decode("utf-8", "replace")[:MOST_TEXT]

    def json(self) -> Any:
        """Raises ``ValueError``."""
        try:
            return json.loads(self.content)
        except RecursionError as problem:
            raise ValueError("nested too deep") from problem


def receive(session: requests.Session, method: str, address: str, **options: Any) -> Answer:
    """The answer to a request, all of it.

    Raises:
        requests.RequestException, ValueError: there is none, or one that does not end.
    """
    until, content = time.monotonic() + LONGEST_ANSWER, bytearray()
    with session.request(method, address, timeout=READ_TIMEOUT, stream=True, **options) as answer:
        for part in answer.iter_content(1 << 16):
            content += part
            if len(content) > MOST_BYTES or time.monotonic() > until:
                raise ValueError(f"an answer of more than {MOST_BYTES / 1e9:.1f} GB or {LONGEST_ANSWER:.0f} s")
        return Answer(answer.status_code, answer.reason, bytes(content))


def refusal(answer: Answer) -> str:
    """What a server says in an answer whose status is an error: a line for each node of a workflow that it refuses."""
    try:
        said = answer.json()
        lines = [f"the server refused the workflow: {said['error']['message']} {said['error']['details']}"]
    except (ValueError, LookupError, TypeError):
        return answer.text
    return "\n".join([*lines, *wrong_nodes(said.get("node_errors"))])


def wrong_nodes(node_errors: Any) -> list[str]:
    """A line for each node that the server finds invalid."""
    if not isinstance(node_errors, dict):
        return []
    return [f"node {node} {_wrong(wrong)}" for node, wrong in node_errors.items()]


def _wrong(node: Any) -> str:
    try:
        told = [f"{error['message']}: {error['details']}" for error in node["errors"]]
        return f"({node['class_type']}): {'; '.join(told)}"
    except (LookupError, TypeError):
        return f"is wrong: {shorten(node)}"
