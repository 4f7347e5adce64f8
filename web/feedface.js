// Shows what a FeedFace node says about its run (the output "text") on the node itself.
import { app } from "../../scripts/app.js";
import { ComfyWidgets } from "../../scripts/widgets.js";

const NAME = "feedface_report";
const LINE = 14; // pixels
const CHARACTER = 6; // pixels
const MARGIN = 30; // pixels, around the text

function show(node, text) {
  let widget = node.widgets?.find((one) => one.name === NAME);
  if (!widget) {
    widget = ComfyWidgets.STRING(node, NAME, ["STRING", { multiline: true }], app).widget;
    widget.serialize = false; // neither in the workflow's file
    widget.options.serialize = false; // nor in what is queued
    const element = widget.inputEl ?? widget.element;
    element.readOnly = true;
    element.style.opacity = 0.7;
  }
  widget.value = text;
  const lines = text.split("\n");
  const width = Math.max(node.size[0], lines.length > 5 ? 480 : 240);
  const room = (width - MARGIN) / CHARACTER;
  const count = lines.reduce((sum, line) => sum + Math.max(1, Math.ceil(line.length / room)), 0);
  const height = LINE * Math.min(count, 18) + MARGIN;
  widget.options.getMinHeight = () => height;
  widget.options.getMaxHeight = () => height;
  node.setSize([width, Math.max(node.size[1], node.computeSize()[1])]);
  node.setDirtyCanvas(true, true);
}

app.registerExtension({
  name: "FeedFace.Report",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.name.startsWith("FeedFace")) return;
    const previous = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output, ...rest) {
      previous?.call(this, output, ...rest);
      if (output?.text) show(this, [].concat(output.text).join("\n"));
    };
  },
});
