"""FeedFace without a user interface: control branches, face tokens, hosts, adapter files, guidance, face crops.

Needs torch, safetensors and numpy; everything else is imported where it is used. Knows neither ComfyUI nor
diffusers: ``nodes`` and ``trainer`` both build on this package, and exchange only tensors and adapter files.
"""
