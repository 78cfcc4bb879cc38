// The heat maps of the inspector: the weights of a transformer by layer, from left to right, and kind, from top to
// bottom; by bits, and by what each adds to the error where a fitted file says it.

const OTHERS = "others";

const BITS = ["#443983", "#31688e", "#21918c", "#35b779", "#90d743", "#fde725"]; // viridis

function all(layers) {
  return [...Object.values(layers.cells).flat(), ...layers.others].filter((cell) => cell !== null);
}

// The colour of a number of bits, by its rank among those of the file: they tell themselves apart however near they are.
function bitsColour(layers) {
  const ranks = [...new Set(all(layers).map((cell) => cell.bits))].sort((a, b) => a - b);
  return (cell) => {
    const place = ranks.length > 1 ? (ranks.indexOf(cell.bits) / (ranks.length - 1)) * (BITS.length - 1) : 2;
    const below = Math.min(Math.floor(place), BITS.length - 2);
    return `color-mix(in srgb, ${BITS[below + 1]} ${Math.round(100 * (place - below))}%, ${BITS[below]})`;
  };
}

function largestError(layers) {
  return Math.max(...all(layers).map((cell) => cell.error ?? 0));
}

function errorColour(layers) {
  const high = largestError(layers);
  return (cell) => `color-mix(in srgb, var(--error) ${high ? Math.round(100 * (cell.error / high)) : 0}%, var(--no-error))`;
}

function told(cell, text) {
  const error = cell.error === null ? "" : `, ${text.error} ${cell.error.toPrecision(2)}`;
  return `${cell.group}: ${cell.types.join(", ")}, ${cell.bits.toFixed(2)} ${text.bits}${error}`;
}

// Single layers follow double ones after a gap, whose columns are those of text and image.
function places(layers) {
  const doubles = layers.names.filter((name) => name.startsWith("double")).length;
  return layers.names.map((_, place) => place + 2 + (place >= doubles ? 1 : 0));
}

function map(layers, colour, name, element, text) {
  const columns = places(layers);
  const grid = element("div", `map aurainspect-${name}`);
  grid.style.setProperty("--columns", columns.at(-1) - 1);
  const put = (child, row, column) => {
    child.style.gridRow = row;
    child.style.gridColumn = column;
    grid.append(child);
  };
  const fill = (cell, row, column) => {
    const known = name !== "error" || cell.error !== null;
    const made = element("i", known ? "cell" : "cell aurainspect-unknown");
    if (known) made.style.background = colour(cell);
    made.title = told(cell, text);
    put(made, row, column);
  };
  const heading = (title, stack) => {
    const own = columns.filter((_, place) => layers.names[place].startsWith(stack));
    put(element("span", "stack", title), 1, `${own[0]} / span ${own.length}`);
  };
  heading(text.double, "double");
  heading(text.single, "single");
  Object.entries(layers.cells).forEach(([kind, cells], row) => {
    put(element("span", "kind", text.weightKinds[kind] ?? kind), row + 2, 1);
    cells.forEach((cell, place) => {
      if (cell) fill(cell, row + 2, columns[place]);
    });
  });
  const last = Object.keys(layers.cells).length + 2;
  put(element("span", "kind", text.weightKinds[OTHERS] ?? OTHERS), last, 1);
  layers.others.forEach((cell, place) => fill(cell, last, place + 2));
  return grid;
}

// The types in the file, from the most bits to the fewest.
function typesLegend(layers, colour, element) {
  const made = element("p", "legend");
  const types = new Map();
  for (const cell of all(layers)) if (cell.types.length === 1) types.set(cell.types[0], cell);
  for (const [type, cell] of [...types].sort(([, a], [, b]) => b.bits - a.bits)) {
    const sample = element("i", "cell");
    sample.style.background = colour(cell);
    made.append(element("span", "", sample, type));
  }
  return made;
}

function errorLegend(layers, element, text) {
  const high = largestError(layers).toPrecision(2);
  return element("p", "legend", "0", element("i", "ramp"), high, element("span", "", text.errorNote));
}

export function layerMaps(layers, element, text) {
  const colour = bitsColour(layers);
  const section = element(
    "section",
    "layers",
    element("h4", "", text.byLayer),
    map(layers, colour, "bits", element, text),
    typesLegend(layers, colour, element),
  );
  if (all(layers).some((cell) => cell.error !== null)) {
    section.append(
      element("h4", "", text.errorByLayer),
      map(layers, errorColour(layers), "error", element, text),
      errorLegend(layers, element, text),
    );
  }
  return section;
}
