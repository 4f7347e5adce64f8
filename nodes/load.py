"""Nodes that bring adapters and say what they are."""

from __future__ import annotations

import folder_paths
from comfy_api.latest import io, ui

from . import folders
from .adapter import LoadedAdapter
from .checks import checked
from .types import Adapter, make_schema

_AUTO = "auto"


class LoadAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        encoders = [_AUTO, *folder_paths.get_filename_list("clip_vision")]
        return make_schema(
            "FeedFaceLoadAdapter",
            inputs=[
                io.Combo.Input("adapter_name", options=folders.choices(folders.ADAPTERS)),
                io.Combo.Input("face_encoder", options=encoders, default=_AUTO, optional=True),
            ],
            outputs=[Adapter.Output()],
            search_aliases=[
                "feedface",
                "load feedface",
                "face adapter",
                "identity adapter",
                "faceid",
                "face swap",
                "likeness",
            ],
            advanced=("face_encoder",),
        )

    @classmethod
    def validate_inputs(cls, adapter_name: str) -> bool | str:
        """Before the graph runs: a missing file, with the folders that were searched in the message.

        ComfyUI reports the message for each input named here; a missing ``face_encoder`` is found at execution.
        """
        return folders.found(folders.ADAPTERS, adapter_name)

    @classmethod
    @checked
    def execute(cls, adapter_name: str, face_encoder: str = _AUTO) -> io.NodeOutput:
        encoder = None if face_encoder == _AUTO else folders.find("clip_vision", face_encoder)
        return io.NodeOutput(LoadedAdapter(folders.find(folders.ADAPTERS, adapter_name), encoder))

    @classmethod
    def fingerprint_inputs(cls, adapter_name: str, face_encoder: str = _AUTO):
        """A file that was replaced is read again: the adapter, or the encoder that it leaves out."""
        encoders = folder_paths.get_filename_list("clip_vision") if face_encoder == _AUTO else [face_encoder]
        return folders.state(folders.ADAPTERS, [adapter_name]), folders.state("clip_vision", encoders)


class AdapterInfo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            "FeedFaceAdapterInfo",
            inputs=[Adapter.Input("adapter")],
            outputs=[io.String.Output()],
            search_aliases=["feedface info", "adapter metadata"],
            is_output_node=True,
        )

    @classmethod
    @checked
    def execute(cls, adapter: LoadedAdapter) -> io.NodeOutput:
        return io.NodeOutput(adapter.description, ui=ui.PreviewText(adapter.description))


NODES = [LoadAdapter, AdapterInfo]
