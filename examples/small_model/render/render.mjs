// Draws synthetic people. Decides nothing: every choice is made in people.py and arrives as one JSON object a line.
//
//   node render.mjs --parts             the drawable parts and the genders they suit, as JSON
//   node render.mjs < scenes.jsonl      for each scene, to stdout: picture (S*S*3 bytes, RGB), then mask (M*M bytes)
//
// A scene: {canvas, size, mask_size, background (SVG), face (facesjs config), accessory_colors, mouth_scale, x, y, scale,
// angle}
import { createInterface } from "node:readline";
import { writeSync } from "node:fs";
import { Resvg } from "@resvg/resvg-js";
import { faceToSvgString, svgsIndex } from "facesjs";
import { svgsGenders } from "./node_modules/facesjs/build/svgs-index.js";

const PARTS = Object.keys(svgsIndex);
const BEHIND = ["hairBg"]; // drawn in this order: hair behind, body, head, accessories
const BODY = ["body", "jersey"];
const WORN = ["accessories"];
const HEAD = PARTS.filter((part) => ![...BEHIND, ...BODY, ...WORN].includes(part));

/** The SVG of some parts of a face, without the outer element. Hair depends on the hat, so a hat is always passed on. */
function draw(face, parts, colors) {
  const config = structuredClone(face);
  if (colors) config.teamColors = colors;
  const hat = config.accessories.id;
  for (const part of PARTS) if (!parts.includes(part) && part !== "accessories") config[part].id = "none";
  const svg = faceToSvgString(config);
  const inner = svg.slice(svg.indexOf(">") + 1, svg.lastIndexOf("</svg>"));
  if (parts.includes("accessories")) return inner;
  config.accessories.id = "none";
  return hat === "none" ? inner : withoutAccessory(config, hat);
}

/** Hair as it is under the hat, but not the hat: the hat is the last group of the drawing. */
function withoutAccessory(config, hat) {
  config.accessories.id = hat;
  const svg = faceToSvgString(config);
  const inner = svg.slice(svg.indexOf(">") + 1, svg.lastIndexOf("</svg>"));
  const bare = structuredClone(config);
  for (const part of PARTS) if (part !== "accessories") bare[part].id = "none";
  const only = faceToSvgString(bare);
  const worn = only.slice(only.indexOf(">") + 1, only.lastIndexOf("</svg>"));
  return inner.trimEnd().slice(0, inner.trimEnd().length - worn.trim().length);
}

/** The head, with the mouth enlarged about its middle, which facesjs puts at (200, 440). */
function drawHead(face, scale) {
  const head = draw(face, HEAD);
  if (scale === 1) return head;
  const bare = structuredClone(face);
  bare.accessories.id = "none";
  const mouth = draw(bare, ["mouth"]).trim();
  if (!head.includes(mouth)) throw new Error(`facesjs draws the mouth ${face.mouth.id} otherwise in a face than alone`);
  const larger = `<g transform="translate(200 440) scale(${scale}) translate(-200 -440)">${mouth}</g>`;
  return head.replace(mouth, () => larger);
}

function pixels(svg, size) {
  return new Resvg(svg, { font: { loadSystemFonts: false }, fitTo: { mode: "width", value: size } }).render().pixels;
}

const FLAT = (name, value) =>
  `<filter id="${name}" color-interpolation-filters="sRGB"><feColorMatrix values="0 0 0 0 ${value} 0 0 0 0 ${value} 0 0 0 0 ${value} 0 0 0 1 0"/></filter>`;

function render(scene) {
  const { canvas, size, mask_size, background, face, accessory_colors, mouth_scale, x, y, scale, angle } = scene;
  const behind = draw(face, BEHIND);
  const body = draw(face, BODY);
  const head = drawHead(face, mouth_scale);
  const worn = draw(face, WORN, accessory_colors);
  const open = `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${canvas} ${canvas}" width="${canvas}" height="${canvas}">`;
  // (x, y) is where the middle of the head goes; (200, 300) is the middle of the head in the drawing
  const place = `<g transform="translate(${x} ${y}) rotate(${angle}) scale(${scale}) translate(-200 -300)">`;
  const picture = `${open}${background}${place}${behind}${body}${head}${worn}</g></svg>`;
  // the mask: head and hair white, the body in front of long hair and what is worn on the head black
  const mask =
    `${open}<defs>${FLAT("white", 1)}${FLAT("black", 0)}</defs><rect width="${canvas}" height="${canvas}"/>${place}` +
    `<g filter="url(#white)">${behind}</g><g filter="url(#black)">${body}</g><g filter="url(#white)">${head}</g><g filter="url(#black)">${worn}</g></g></svg>`;
  const rgba = pixels(picture, size);
  const grey = pixels(mask, mask_size);
  const out = Buffer.alloc(size * size * 3 + mask_size * mask_size);
  for (let i = 0; i < size * size; i++) {
    out[3 * i] = rgba[4 * i];
    out[3 * i + 1] = rgba[4 * i + 1];
    out[3 * i + 2] = rgba[4 * i + 2];
  }
  for (let i = 0; i < mask_size * mask_size; i++) out[size * size * 3 + i] = grey[4 * i];
  return out;
}

function write(buffer) {
  for (let done = 0; done < buffer.length; ) {
    try {
      done += writeSync(1, buffer, done);
    } catch (error) {
      if (error.code !== "EAGAIN") throw error; // a full pipe: try again
    }
  }
}

if (process.argv[2] === "--parts") {
  write(Buffer.from(JSON.stringify({ ids: svgsIndex, genders: svgsGenders })));
} else {
  for await (const line of createInterface({ input: process.stdin })) if (line) write(render(JSON.parse(line)));
}
