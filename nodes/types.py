"""The sockets of this pack."""

from __future__ import annotations

from comfy_api.latest import io

Adapter = io.Custom("FEEDFACE_ADAPTER")
FaceSocket = io.Custom("FEEDFACE_FACE")
