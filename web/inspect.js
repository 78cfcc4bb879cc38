// Draws the panel of the node Inspect AuraFlow GGUF from what nodes/inspect.py sends: of an AuraFlow transformer
// (architecture "aura") or its text encoder ("t5encoder").

import { app } from "../../scripts/app.js";
import { layerMaps } from "./layers.js";

const NODE = "AuraFlowGGUFInspect";
const PANEL_SIZE = [440, 720]; // of a new node, in the graph's pixels
const GROUP_COLORS = {
  attention: "#4c8dd6",
  MLP: "#3fa37c",
  modulation: "#d9903d",
  "embedders, output": "#9a7bd0",
  embedding: "#9a7bd0",
  norms: "#c4637e",
};

const STRINGS = {
  en: {
    empty: "Queue the graph to look into the file.",
    unusable: "This file cannot be used",
    found: "Found",
    expected: "Expected",
    advice: "What to do",
    kinds: {
      aura: (d) => `AuraFlow transformer, ${d.double_layers} double and ${d.single_layers} single layers`,
      t5encoder: (d) => `Pile-T5-XL text encoder, ${d["encoder.block"]} layers`,
    },
    bits: "bits per weight",
    shortBits: "Bits",
    size: "size",
    weights: "weights",
    group: "Group",
    types: "Types",
    gb: "GB",
    memory: "Memory on the GPU",
    withCache: "with modulation cache",
    withoutCache: "without",
    textEncoder: "of the text encoder",
    memoryNote: "The weights alone, fully loaded. Running takes some more.",
    about: "What the file says",
    spelling: "names",
    prefix: "prefix",
    notAnnotated: "No annotations: made by an older or another converter.",
    skipped: (n) => `${n} tensors of other parts are left out.`,
    sound: "No NaN and no infinity in any weight.",
    problems: "Problems",
    noProblem: "The structure is sound. The numbers were not checked.",
    byLayer: "Bits by layer",
    errorByLayer: "Error by layer",
    error: "error",
    errorNote: "of the output, by each alone; they add in squares",
    double: "double",
    single: "single layers",
    weightKinds: {},
    groups: {},
    total: "all",
  },
  zh: {
    empty: "运行工作流即可查看该文件。",
    unusable: "无法使用此文件",
    found: "发现",
    expected: "应为",
    advice: "处理办法",
    kinds: {
      aura: (d) => `AuraFlow Transformer，${d.double_layers} 个双流层，${d.single_layers} 个单流层`,
      t5encoder: (d) => `Pile-T5-XL 文本编码器，${d["encoder.block"]} 层`,
    },
    bits: "每权重位数",
    shortBits: "位数",
    size: "大小",
    weights: "权重数",
    group: "分组",
    types: "类型",
    gb: "GB",
    memory: "显存占用",
    withCache: "使用调制缓存",
    withoutCache: "不使用",
    textEncoder: "文本编码器",
    memoryNote: "仅为完全加载时的权重，运行还需要额外显存。",
    about: "文件自述",
    spelling: "命名",
    prefix: "前缀",
    notAnnotated: "没有注释：由旧版或其他转换器制作。",
    skipped: (n) => `忽略了 ${n} 个其他部分的张量。`,
    sound: "所有权重中都没有 NaN 或无穷大。",
    problems: "问题",
    noProblem: "结构正确，未检查数值。",
    byLayer: "各层的位数",
    errorByLayer: "各层的误差",
    error: "误差",
    errorNote: "每组单独造成的输出误差，按平方相加",
    double: "双流",
    single: "单流层",
    weightKinds: { modulation: "调制", "MLP in": "MLP 输入", "MLP out": "MLP 输出", others: "其他" },
    groups: {
      attention: "注意力",
      modulation: "调制",
      "embedders, output": "嵌入与输出",
      embedding: "词嵌入",
      norms: "归一化",
    },
    total: "全部",
  },
};

function strings() {
  const locale = app.ui?.settings?.getSettingValue?.("Comfy.Locale") ?? "en";
  return locale === "zh" ? STRINGS.zh : STRINGS.en;
}

// An element with a class of inspect.css's "aurainspect-" names; children are elements or text, never HTML.
function element(tag, name, ...children) {
  const made = document.createElement(tag);
  if (name) made.className = `aurainspect-${name}`;
  made.append(...children.filter((child) => child !== null));
  return made;
}

const gigabytes = (bytes) => (bytes < 5e6 ? "< 0.01" : (bytes / 1e9).toFixed(2));

function figure(value, label) {
  return element("div", "figure", element("b", "", value), element("span", "", label));
}

function swatch(group) {
  const made = element("i", "swatch");
  made.style.background = GROUP_COLORS[group] ?? "var(--descrip-text)";
  return made;
}

// Each type with its count on one line; the line breaks between them.
function typesOf(group) {
  const parts = Object.entries(group.types).map(([type, count]) => element("span", "type", `${type} × ${count}`));
  return element("td", "", ...parts.flatMap((part, index) => (index ? [" ", part] : [part])));
}

function bar(parts, whole) {
  const made = element("div", "bar");
  for (const part of parts) {
    const piece = element("span", "");
    piece.style.width = `${(100 * part.nbytes) / whole}%`;
    piece.style.background = GROUP_COLORS[part.name];
    piece.title = `${part.name}: ${gigabytes(part.nbytes)} GB`;
    made.append(piece);
  }
  return made;
}

function table(found, text) {
  const head = element("tr", "");
  for (const title of [text.group, text.shortBits, text.gb, text.types]) head.append(element("th", "", title));
  const body = element("tbody", "");
  for (const group of found.groups) {
    const name = element("td", "", swatch(group.name), text.groups[group.name] ?? group.name);
    body.append(row(name, group, typesOf(group)));
  }
  body.append(row(element("td", "", text.total), found.total, element("td", "")));
  body.lastChild.className = "aurainspect-total";
  return element("table", "", element("thead", "", head), body);
}

function row(name, group, types) {
  const bits = element("td", "number", group.bits_per_weight.toFixed(2));
  const size = element("td", "number", gigabytes(group.nbytes));
  return element("tr", "", name, bits, size, types);
}

function memory(found, text) {
  const { with_cache: withCache, without_cache: without } = found.memory;
  const rest = found.groups.filter((group) => group.name !== "modulation");
  const cached = rest.length < found.groups.length;
  const line = (parts, bytes, label) =>
    element("div", "memory", bar(parts, without), element("b", "", `${gigabytes(bytes)} GB`), element("span", "", label));
  return element(
    "section",
    "",
    element("h4", "", text.memory),
    cached ? line(rest, withCache, text.withCache) : null,
    line(found.groups, without, cached ? text.withoutCache : text.textEncoder),
    element("p", "quiet", text.memoryNote),
  );
}

// A hash by its beginning; the whole of it shows when one points at it.
function shortened(value) {
  const hash = /^[0-9a-f]{64}$/.test(value);
  const made = element("dd", "", hash ? `${value.slice(0, 16)}…` : value);
  if (hash) made.title = value;
  return made;
}

function about(found, text) {
  const list = element("dl", "");
  const say = (key, value) => list.append(element("dt", "", key), shortened(value));
  say(text.spelling, found.spelling);
  if (found.prefix) say(text.prefix, found.prefix);
  for (const [key, value] of Object.entries(found.metadata)) say(key, value);
  return element(
    "section",
    "",
    element("h4", "", text.about),
    list,
    found.annotated ? null : element("p", "quiet", text.notAnnotated),
    found.skipped ? element("p", "quiet", text.skipped(found.skipped)) : null,
  );
}

function verdict(found, text) {
  if (found.problems.length) {
    const list = element("ul", "");
    for (const problem of found.problems) list.append(element("li", "", problem));
    return element("section", "bad", element("h4", "", text.problems), list);
  }
  return element("p", found.checked ? "good" : "quiet", found.checked ? `✓ ${text.sound}` : text.noProblem);
}

function refusal(found, text) {
  const list = element("dl", "");
  for (const part of ["found", "expected", "advice"]) {
    list.append(element("dt", "", text[part]), element("dd", "", found.refusal[part]));
  }
  return [element("h3", "", found.file), element("section", "bad", element("h4", "", text.unusable), list)];
}

function description(found, text) {
  return [
    element("h3", "", found.file),
    element("p", "quiet", text.kinds[found.architecture](found.dimensions)),
    element(
      "div",
      "figures",
      figure(found.total.bits_per_weight.toFixed(2), text.bits),
      figure(`${gigabytes(found.total.nbytes)} GB`, text.size),
      figure(`${(found.total.weights / 1e9).toFixed(2)} B`, text.weights),
    ),
    bar(found.groups, found.total.nbytes),
    table(found, text),
    ...(found.layers ? [layerMaps(found.layers, element, text)] : []),
    memory(found, text),
    about(found, text),
    verdict(found, text),
  ];
}

function draw(panel, found) {
  const text = strings();
  if (!found) panel.replaceChildren(element("p", "quiet", text.empty));
  else panel.replaceChildren(...(found.refusal ? refusal(found, text) : description(found, text)));
}

function addStyle() {
  const link = document.createElement("link");
  link.rel = "stylesheet";
  link.href = new URL("./inspect.css", import.meta.url).href;
  document.head.append(link);
}

app.registerExtension({
  name: "AuraFlowGGUF.Inspect",

  setup() {
    addStyle();
  },

  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    const panel = element("div", "panel");
    draw(panel, null);
    // The wheel scrolls the panel as long as there is something to scroll, and else zooms the graph.
    panel.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && panel.scrollHeight > panel.clientHeight) event.stopPropagation();
    });
    const widget = node.addDOMWidget("inspection", "aurainspect", panel, {
      serialize: false,
      hideOnZoom: false,
      hideInPanel: true, // the side panel of a selected node would narrow the one in the node
      getMinHeight: () => 160,
    });
    widget.serialize = false; // in the workflow's widgets_values; the option above is for the prompt
    node.setSize([Math.max(node.size[0], PANEL_SIZE[0]), Math.max(node.size[1], PANEL_SIZE[1])]);

    const before = node.onExecuted;
    node.onExecuted = function (output) {
      before?.apply(this, arguments);
      draw(panel, output?.inspection?.[0]);
    };
  },

  // Outputs that the frontend kept, such as those of a graph in another tab that is shown again.
  onNodeOutputsUpdated(outputs) {
    for (const [id, output] of Object.entries(outputs)) {
      if (output?.inspection) app.graph.getNodeById(Number(id))?.onExecuted?.(output);
    }
  },
});
