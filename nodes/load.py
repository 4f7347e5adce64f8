"""Nodes that bring adapters and say what they are."""

from __future__ import annotations

import folder_paths
from comfy_api.latest import io, ui

from . import folders
from .adapter import LoadedAdapter
from .compat import make_schema
from .types import Adapter

_AUTO = "auto"


class LoadAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="FeedFaceLoadAdapter",
            display_name="FeedFace Load Adapter",
            search_aliases=["feedface", "load feedface", "face adapter", "identity adapter", "faceid"],
            description="Loads a FeedFace adapter from models/feedface. The file says which model it belongs to.",
            inputs=[
                io.Combo.Input(
                    "adapter_name",
                    options=folders.choices(folders.adapter_files(), "feedface"),
                    tooltip="A .safetensors adapter, or the released feed-4800000.pt, in models/feedface.",
                ),
                io.Combo.Input(
                    "face_encoder",
                    options=[_AUTO, *folder_paths.get_filename_list("clip_vision")],
                    default=_AUTO,
                    optional=True,
                    tooltip="Only for adapters without their encoder: a file in models/clip_vision. "
                    "auto uses the adapter's own, or finds the one it names.",
                ),
            ],
            outputs=[
                Adapter.Output(display_name="adapter", tooltip="For FeedFace Encode Faces and FeedFace Apply Adapter.")
            ],
        )

    @classmethod
    def validate_inputs(cls, adapter_name: str) -> bool | str:
        """Before the graph runs: a missing file, with the folders that were searched in the message.

        ComfyUI reports the message for each input named here; a missing ``face_encoder`` is found at execution.
        """
        try:
            folders.find(folders.ADAPTERS, adapter_name)
        except FileNotFoundError as error:
            return str(error)
        return True

    @classmethod
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
            node_id="FeedFaceAdapterInfo",
            display_name="FeedFace Adapter Info",
            search_aliases=["feedface info", "adapter metadata"],
            description="Shows what an adapter holds: its model family, sites, encoder, defaults and provenance.",
            inputs=[Adapter.Input("adapter", tooltip="From FeedFace Load Adapter.")],
            outputs=[io.String.Output(display_name="info", tooltip="The same text, for other nodes.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, adapter: LoadedAdapter) -> io.NodeOutput:
        return io.NodeOutput(adapter.description, ui=ui.PreviewText(adapter.description))


NODES = [LoadAdapter, AdapterInfo]
