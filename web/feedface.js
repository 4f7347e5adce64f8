// Shows what a FeedFace node says about its run (the output "text") on the node itself.
import { app } from "../../scripts/app.js";

const NAME = "feedface_report";
const MARGIN = 10; // pixels on each side of a widget on the canvas
const NARROW = 240; // pixels, width of a node with a short report
const WIDE = 480; // and with one of more than MANY lines
const MANY = 10;
const STYLE = {
  boxSizing: "border-box",
  width: "100%",
  maxHeight: "270px",
  padding: "4px 6px",
  overflow: "auto",
  whiteSpace: "pre-wrap",
  overflowWrap: "anywhere",
  font: "10px/14px monospace",
  color: "var(--input-text)",
  background: "var(--comfy-input-bg)",
  borderRadius: "4px",
  opacity: "0.8",
  userSelect: "text",
};

// How high the text is at a width. Measured on a copy: on the canvas the frontend sets the height of the element.
function heightAt(element, width) {
  const copy = element.cloneNode(true);
  Object.assign(copy.style, { position: "fixed", visibility: "hidden", width: `${width}px`, height: "auto" });
  document.body.append(copy);
  const height = copy.offsetHeight;
  copy.remove();
  return height;
}

function addReport(node) {
  const element = document.createElement("div");
  Object.assign(element.style, STYLE);
  let measured = {};
  const height = () => {
    const [text, width] = [element.textContent, node.size[0] - 2 * MARGIN];
    if (measured.text !== text || measured.width !== width) {
      measured = { text, width, height: heightAt(element, width) + 2 * MARGIN };
    }
    return measured.height;
  };
  const widget = node.addDOMWidget(NAME, NAME, element, {
    getValue: () => element.textContent,
    setValue: (text) => {
      element.textContent = text;
    },
    getMinHeight: height,
    getMaxHeight: height,
    margin: MARGIN,
    serialize: false, // not in what is queued
  });
  widget.serialize = false; // nor in the workflow's file
  return widget;
}

function show(node, output) {
  if (!output?.text || !node?.comfyClass?.startsWith("FeedFace")) return;
  const text = [].concat(output.text).join("\n");
  const widget = node.widgets?.find((one) => one.name === NAME) ?? addReport(node);
  widget.value = text;
  const width = Math.max(node.size[0], text.split("\n").length > MANY ? WIDE : NARROW);
  node.setSize([width, node.size[1]]); // first the width, on which the height of the text depends
  node.setSize([width, Math.max(node.size[1], node.computeSize()[1])]);
  node.setDirtyCanvas(true, true);
}

// The node of a key of app.nodeOutputs: "3", or "<id of a subgraph or of its node>:3" for one inside.
function nodeOf(key) {
  const path = String(key).split(":");
  const id = path.pop();
  let graph = app.rootGraph ?? app.graph;
  for (const step of path) graph = graph?.subgraphs?.get(step) ?? graph?.getNodeById(step)?.subgraph;
  return graph?.getNodeById(id);
}

function showAll(outputs) {
  for (const [key, output] of Object.entries(outputs ?? {})) show(nodeOf(key), output);
}

app.registerExtension({
  name: "FeedFace.Report",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.name.startsWith("FeedFace")) return;
    const previous = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output, ...rest) {
      previous?.call(this, output, ...rest);
      show(this, output);
    };
  },
  // Another workflow's tab, or a job of the history: the graph is there first, its outputs follow.
  onNodeOutputsUpdated: showAll,
  // Undo makes new nodes and keeps the outputs.
  afterConfigureGraph: () => showAll(app.nodeOutputs),
});
