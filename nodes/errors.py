"""How ComfyUI shows the errors of ``feedface_core``."""

from __future__ import annotations

from ..feedface_core.errors import FeedFaceError


def show_by_name(kind: type[Exception] = FeedFaceError) -> None:
    """Have ComfyUI show ``FaceError: no face …`` for a class of error and those derived from it.

    It writes the module of a class before the name unless the class is built in, and calls a pack's modules by their
    absolute path, which fills the pop-up in the place of the message. Only ComfyUI's copy of the classes changes: the
    trainer's keep their module, by which processes send errors to one another.
    """
    kind.__module__ = "builtins"
    for derived in kind.__subclasses__():
        show_by_name(derived)
