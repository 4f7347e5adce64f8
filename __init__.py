"""FeedFace for ComfyUI: a real person's face in a generated picture.

Entry point only. ComfyUI loads this folder as a package and calls ``comfy_entrypoint``; a ``NODE_CLASS_MAPPINGS`` here,
even an empty one, would switch that off without a word.
"""

if __package__:  # imported as a package, by ComfyUI; tools that merely walk the tree get an empty module
    from .nodes import comfy_entrypoint

    WEB_DIRECTORY = "./web"  # the help pages, and the text that nodes show after a run
    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
