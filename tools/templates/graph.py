"""A workflow from a short description: nodes with their inputs, in columns, as the file that the frontend saves.

    graph = Graph(object_info, "What it shows, in Markdown")
    loader = graph.add("CheckpointLoaderSimple", column=0, ckpt_name="model.safetensors")
    text = graph.add("CLIPTextEncode", column=1, clip=loader[1], text="a portrait")
    json.dump(graph.to_file(), file)

Inputs that are not named keep the node's default. The server says which inputs a node has (``/object_info``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tools.workflow_format import ObjectInfo, Workflow, inputs_of, is_widget

COLUMN, GAP, TITLE = 285, 64, 30  # units; a node's title lies in the gap above its position
NOTE_WIDTH = 285
MARGIN, HEADING = 12, 45  # of the frame around a column
VIEW = [80, 210]  # units from the edges of a window to the graph: menus lie over the canvas, on the left and above
BARE, SLOT, WIDGET, TEXT, PREVIEW, BADGE = 18, 20, 28, 100, 316, 26  # heights that both ways of drawing need


@dataclass(frozen=True)
class Output:
    """An output of a node, to be given as another node's input."""

    node: Node
    slot: int


@dataclass(eq=False)
class Node:
    """A node of a graph: what :meth:`Graph.add` returns."""

    kind: str
    number: int
    column: int
    values: dict[str, Any]
    title: str | None = None
    height: int | None = None
    models: list[dict[str, str]] = field(default_factory=list)
    collapsed: bool = False

    def __getitem__(self, slot: int) -> Output:
        return Output(self, slot)


class Graph:
    """A workflow under construction.

    Args:
        object_info: every node that the server knows.
        note: Markdown for the note in the first column; empty for none.
        columns: a heading for each column.

    Raises:
        KeyError: from :meth:`add`, for a node or an input that the server does not know.
    """

    def __init__(self, object_info: ObjectInfo, note: str = "", columns: Sequence[str] = ()) -> None:
        self.object_info, self.note, self.columns = object_info, note, columns
        self.nodes: list[Node] = []

    def add(
        self,
        kind: str,
        column: int,
        title: str | None = None,
        node_height: int | None = None,
        models: Iterable[dict[str, str]] = (),
        collapsed: bool = False,
        **values: Any,
    ) -> Node:
        """Append a node at the foot of a column.

        Args:
            column: from 0, behind the note.
            title: in place of the node's own.
            node_height: units, for a node with a preview; None computes it.
            models: name, url and directory of the files it loads, which the frontend offers to download.
            collapsed: only its title is shown, until it is opened.
            values: inputs by name: an :class:`Output`, or the value of a widget.
        """
        known = {name for name, *_ in inputs_of(self.object_info[kind])}
        if values.keys() - known:
            raise KeyError(f"{kind} has no input {', '.join(sorted(values.keys() - known))}; it has {sorted(known)}")
        node = Node(kind, len(self.nodes) + 2, column, values, title, node_height, list(models), collapsed)
        self.nodes.append(node)
        return node

    def height_of(self, node: Node) -> int:
        """Enough for its sockets and widgets on the canvas and in Nodes 2.0."""
        if node.collapsed:
            return 1  # the frontend makes it as high as its content when it is opened
        if node.height:
            return node.height
        info = self.object_info[node.kind]
        sockets, widgets = self.sockets(node), self.widgets(node)
        height = BARE + SLOT * max(len(sockets), len(info["output"])) + BADGE * node.kind.startswith("FeedFace")
        for _, _, options in widgets:
            height += TEXT if options.get("multiline") else WIDGET
            height += WIDGET * bool(options.get("control_after_generate"))
            height += PREVIEW * bool(options.get("image_upload"))
        return height

    def sockets(self, node: Node) -> list[tuple[str, Any, dict[str, Any], bool]]:
        """Its inputs with a socket: name, type, options and whether it is required."""
        return [
            (name, kind, options, required)
            for name, kind, options, required in inputs_of(self.object_info[node.kind])
            if not is_widget(kind, options) or isinstance(node.values.get(name), Output)
        ]

    def widgets(self, node: Node) -> list[tuple[str, Any, dict[str, Any]]]:
        return [
            (name, kind, options)
            for name, kind, options, _ in inputs_of(self.object_info[node.kind])
            if is_widget(kind, options)
        ]

    def widget_values(self, node: Node) -> list[Any]:
        values = []
        for name, kind, options in self.widgets(node):
            choices = (kind if isinstance(kind, list) else options.get("options")) or [None]
            value = node.values.get(name, options.get("default", choices[0]))
            values.append(options.get("default") if isinstance(value, Output) else value)
            if options.get("control_after_generate"):
                values.append("fixed")
            if options.get("image_upload"):
                values.append("image")
        return values

    def places(self, first: int = 0) -> dict[int, tuple[list[int], list[int]]]:
        """Position and size by the node's number: columns from left to right, each filled from the top."""
        foot: dict[int, int] = {}
        placed = {}
        for node in self.nodes:
            y = foot.get(node.column, TITLE)
            height = self.height_of(node)
            placed[node.number] = [first + node.column * (COLUMN + GAP), y], [COLUMN, height]
            foot[node.column] = y + height + GAP
        return placed

    def links(self) -> list[tuple[Output, Node, str]]:
        return [
            (value, node, name)
            for node in self.nodes
            for name, *_ in self.sockets(node)
            if isinstance(value := node.values.get(name), Output)
        ]

    def kind_of(self, source: Output) -> str:
        return self.object_info[source.node.kind]["output"][source.slot]

    def file_nodes(self, first: int) -> tuple[list[dict[str, Any]], list[list[Any]]]:
        """Nodes and links as the file has them."""
        placed, links, incoming, outgoing = self.places(first), [], {}, {}
        for number, (source, target, name) in enumerate(self.links(), 1):
            socket = [one[0] for one in self.sockets(target)].index(name)
            kind = self.kind_of(source)
            links.append([number, source.node.number, source.slot, target.number, socket, kind])
            incoming[target.number, name] = number
            outgoing.setdefault((source.node.number, source.slot), []).append(number)
        nodes = []
        for order, node in enumerate(self.nodes):
            info = self.object_info[node.kind]
            position, size = placed[node.number]
            inputs = []
            for name, kind, options, required in self.sockets(node):
                socket = {"name": name, "type": "COMBO" if isinstance(kind, list) else kind}
                socket |= {} if required else {"shape": 7}
                socket["link"] = incoming.get((node.number, name))
                if is_widget(kind, options):
                    socket["widget"] = {"name": name}
                inputs.append(socket)
            outputs = [
                {"name": name, "type": kind, "links": outgoing.get((node.number, slot)), "slot_index": slot}
                for slot, (name, kind) in enumerate(zip(info["output_name"], info["output"], strict=True))
            ]
            made = {"id": node.number, "type": node.kind, "pos": position, "size": size}
            made["flags"] = {"collapsed": True} if node.collapsed else {}
            made |= {"order": order, "mode": 0, "inputs": inputs, "outputs": outputs}
            if node.title:
                made["title"] = node.title
            made["properties"] = {"Node name for S&R": node.kind, **origin(node.kind)}
            if node.models:
                made["properties"]["models"] = node.models
            made["widgets_values"] = self.widget_values(node)
            nodes.append(made)
        return nodes, links

    def groups(self, nodes: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """A frame with a heading around each column."""
        made = []
        for column, heading in enumerate(self.columns):
            inside = {node.number for node in self.nodes if node.column == column}
            places = [(node["pos"], node["size"]) for node in nodes if node["id"] in inside]
            x, foot = places[0][0][0], max(y + height for (_, y), (_, height) in places)
            bounding = [x - MARGIN, -HEADING, COLUMN + 2 * MARGIN, foot + HEADING + MARGIN]
            made.append({"id": column + 1, "title": heading, "bounding": bounding, "color": "#3f789e", "flags": {}})
        return made

    def to_file(self) -> Workflow:
        """The workflow in the frontend's format."""
        nodes, links = self.file_nodes(NOTE_WIDTH + GAP if self.note else 0)
        if self.note:
            note = {"id": 1, "type": "MarkdownNote", "pos": [0, TITLE], "size": [NOTE_WIDTH, note_height(self.note)]}
            note |= {"flags": {}, "order": len(nodes), "mode": 0, "inputs": [], "outputs": [], "title": "Read me"}
            note |= {"properties": {}, "widgets_values": [self.note], "color": "#432", "bgcolor": "#653"}
            nodes.append(note)
        return {
            "last_node_id": len(self.nodes) + 1,
            "last_link_id": len(links),
            "nodes": nodes,
            "links": links,
            "groups": self.groups(nodes),
            "config": {},
            "extra": {"ds": {"scale": 0.8, "offset": VIEW}},
            "version": 0.4,
        }


def note_height(text: str) -> int:
    """Enough for the text in a note of :data:`NOTE_WIDTH`: headings, and lines of about 40 characters."""
    paragraphs = [line for line in text.split("\n\n") if line.strip()]
    lines = sum(-(-len(line) // 38) for paragraph in paragraphs for line in unwrapped(paragraph))
    return 60 + 19 * lines + 14 * len(paragraphs)


def unwrapped(paragraph: str) -> list[str]:
    """The lines of Markdown that are lines of their own: headings, points of a list."""
    lines: list[str] = []
    for line in paragraph.splitlines():
        if lines and line and not line.lstrip().startswith(("- ", "#", "1", "2", "3", "4")):
            lines[-1] += f" {line.strip()}"
        else:
            lines.append(line)
    return lines


def origin(kind: str) -> dict[str, str]:
    """What tells the frontend which pack a node is from, for a user who does not have it."""
    return {"cnr_id": "feedface"} if kind.startswith("FeedFace") else {"cnr_id": "comfy-core"}
