"""The error of the trainer's commands."""

from feedface_core.errors import FeedFaceError


class TrainerError(FeedFaceError):
    """Something given to the trainer cannot be used: settings, files, models. Commands print it and end with 1."""
