"""The shipped templates: every feature on the small model, on the released model and on Stable Diffusion.

A feature is one function that says what is connected to what (:mod:`.features`, :mod:`.people`), with a title and a
note (:mod:`.catalogue`); a base says which files it is made with (:mod:`.bases`). ``python -m tools.templates`` writes
them all.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tools.find_comfyui import ROOT
from tools.templates.bases import BASES, Base
from tools.templates.catalogue import FEATURES
from tools.templates.feature import Feature
from tools.templates.features import saved_face
from tools.templates.graph import Graph
from tools.workflow_format import ObjectInfo, Workflow

TEMPLATES, GRAPHS, API = ROOT / "example_workflows", ROOT / "workflows/graphs", ROOT / "workflows/api"
HELP = "\nSelect a node and click **i** above it for its help page.\n"


@dataclass(frozen=True)
class Template:
    """A feature on a base, as files.

    Args:
        number: in the order of learning.
    """

    number: int
    feature: Feature
    base: Base

    @property
    def title(self) -> str:
        return f"{self.number:02} {self.feature.title} ({self.base.title})"

    @property
    def key(self) -> str:
        """The name for the shell; those of the first release stay, so that scripts go on working."""
        old = {("compare", "small"): "feedface_small", ("portrait", "released"): "feedface_unidiffuser"}
        name = "_".join(filter(None, ("feedface", self.feature.key, self.base.suffix)))
        return old.get((self.feature.key, self.base.name), name)

    @property
    def file(self) -> Path:
        return TEMPLATES / f"{self.title}.json"

    @property
    def picture(self) -> Path:
        return self.file.with_suffix(".jpg")

    @property
    def graph(self) -> Path:
        """The same file under its name for the shell."""
        return GRAPHS / f"{self.key}.json"

    @property
    def api(self) -> Path:
        return API / f"{self.key}.json"

    def build(self, object_info: ObjectInfo) -> Workflow:
        note = self.feature.note.strip().replace("FACE", saved_face(self.base))
        text = f"## {self.feature.title}\n\n{note}\n\n{self.base.note_about(self.feature.kind)}\n{HELP}"
        text = re.sub(r"(?<=\*)\n(?=\w)", " ", text)  # the canvas draws no space for a line's end behind an emphasis
        graph = Graph(object_info, text, self.feature.columns)
        self.feature.build(graph, self.base)
        return graph.to_file()


LIST = [Template(number, feature, BASES[name]) for number, feature in enumerate(FEATURES, 1) for name in feature.bases]
