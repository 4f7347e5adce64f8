"""The published evaluation: ``python -m trainer.evaluate PEOPLE OUTPUT [setting=value …]``.

``people`` reads who is evaluated with which photos and prompts, ``drawing`` makes the pictures and ``elsewhere`` finds
those that were made elsewhere, ``looking`` finds and compares faces, ``judges`` are CLIP and ImageReward, ``measures``
makes numbers of it all, ``report`` and ``sheet`` write them down.
"""
