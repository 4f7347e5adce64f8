// Puts the small model's photos into the input folder when a graph that loads one of them is opened.
import { app } from "../../scripts/app.js";

const FOLDER = new URL("./examples/", import.meta.url);

// Names of the pictures that a graph loads, in its subgraphs too.
function loaded(graph) {
  const nodes = [...(graph?.nodes ?? []), ...(graph?.definitions?.subgraphs ?? []).flatMap((one) => one.nodes ?? [])];
  return nodes.filter((node) => node.type === "LoadImage").map((node) => String(node.widgets_values?.[0]));
}

async function listed() {
  const info = await (await app.api.fetchApi("/object_info/LoadImage")).json();
  const [kind, options] = info.LoadImage.input.required.image;
  return new Set(Array.isArray(kind) ? kind : options?.options);
}

async function upload(name) {
  const body = new FormData();
  body.append("image", await (await fetch(new URL(name, FOLDER))).blob(), name);
  const answer = await app.api.fetchApi("/upload/image", { method: "POST", body });
  if (!answer.ok) throw new Error(`${name}: ${answer.status} ${answer.statusText}`);
}

app.registerExtension({
  name: "FeedFace.Examples",
  async beforeConfigureGraph(graph) {
    const names = loaded(graph).filter((name) => name.startsWith("feedface_"));
    if (!names.length) return;
    try {
      const ours = await (await fetch(new URL("list.json", FOLDER))).json();
      if (!names.some((name) => ours.includes(name))) return;
      const there = await listed();
      const missing = ours.filter((name) => !there.has(name));
      if (!missing.length) return;
      await Promise.all(missing.map(upload));
      await app.refreshComboInNodes(); // so that the lists have them
    } catch (error) {
      console.warn("FeedFace: the photos of the small model were not put into the input folder:", error);
    }
  },
});
