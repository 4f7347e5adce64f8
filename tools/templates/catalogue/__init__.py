"""The list of features, in the order of learning; a file for each subject, with the notes."""

from __future__ import annotations

from tools.templates.catalogue import faces, first_steps, other_kinds, pictures, several_people

FEATURES = (*first_steps.FEATURES, *several_people.FEATURES, *faces.FEATURES, *pictures.FEATURES, *other_kinds.FEATURES)
