"""The list of features, in the order of learning; a file for each subject, with the notes."""

from __future__ import annotations

from tools.templates.catalogue import control, faces, first_steps, other_kinds, pictures, several_people

SUBJECTS = (first_steps, several_people, faces, pictures, control, other_kinds)
FEATURES = tuple(feature for subject in SUBJECTS for feature in subject.FEATURES)
