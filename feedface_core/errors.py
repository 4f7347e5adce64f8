"""The error that those of this package derive from."""


class FeedFaceError(ValueError):
    """Something given to FeedFace cannot be used; the message says what, why, and what to do."""
