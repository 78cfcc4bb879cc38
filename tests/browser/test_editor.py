"""What a person does with the pack in ComfyUI's editor."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable

import pytest
from auraflow_gguf.devtools import locales, templates
from auraflow_gguf.devtools.browser import TIMEOUT_MS, Editor
from auraflow_gguf.devtools.random_models import cached_auraflow, cached_checkpoint, cached_text_encoder
from auraflow_gguf.devtools.server import ROOT, Server, Workflow, load_workflow
from auraflow_gguf.devtools.small_workflows import small
from playwright.sync_api import Locator, expect

from .conftest import BAD_FILE, FITTED_FILE

NODES = locales.read("en")
PACK = "auraflow-gguf"
IN_EVERY_FRONTEND = ("AuraFlowGGUFLoader", "AuraFlowGGUFInspect", "text_to_image")  # one of each kind


def in_every_frontend(values: Iterable[object], name: Callable[[object], str]) -> list:
    """As parameters: most of them for the newest frontend alone."""
    once = pytest.mark.host_independent
    return [
        pytest.param(value, id=name(value), marks=[] if name(value) in IN_EVERY_FRONTEND else [once])
        for value in values
    ]


def place(editor: Editor, class_type: str) -> None:
    """Find a node with the search box, by the name that it shows, and put it into the graph."""
    page, name = editor.page, NODES[class_type]["display_name"]
    page.evaluate("() => app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    page.locator("[role=combobox]:focus").fill(name)
    page.locator("[data-testid=result-item], [role=option]").filter(has_text=name).first.click()
    page.wait_for_function("type => app.graph.nodes.some((node) => node.type === type)", arg=class_type)


def open_help(editor: Editor, class_type: str) -> Locator:
    """Select the node, press the info button of its toolbox; gives the help panel."""
    editor.fit()
    editor.page.evaluate(
        "type => app.canvas.selectItems(app.graph.nodes.filter((node) => node.type === type))", class_type
    )
    editor.page.get_by_test_id("info-button").click()
    return editor.page.locator(".node-help-content").first


@pytest.mark.parametrize("class_type", in_every_frontend(NODES, str))
def test_a_node_is_found_placed_and_explained(same_editor: Editor, class_type: str) -> None:
    place(same_editor, class_type)
    page = open_help(same_editor, class_type)
    expect(page.locator("h1")).to_have_text(NODES[class_type]["display_name"])
    picture = page.locator("img")
    picture.scroll_into_view_if_needed()
    same_editor.page.wait_for_function(
        "image => image.complete && image.naturalWidth > 100", arg=picture.element_handle()
    )


def test_it_speaks_chinese(editor: Editor, server: Server) -> None:
    editor.open(server.url, Comfy_Locale="zh")
    chinese = locales.read("zh")["AuraFlowGGUFInspect"]
    editor.load(graph_of("AuraFlowGGUFInspect"))
    expect(open_help(editor, "AuraFlowGGUFInspect").locator("h1")).to_have_text(chinese["display_name"])
    expect(editor.page.locator(".aurainspect-panel")).to_have_text("运行工作流即可查看该文件。")
    shown = editor.page.evaluate("() => { const n = app.graph.nodes[0]; return [n.title, n.widgets[0].label]; }")
    assert shown == [chinese["display_name"], chinese["inputs"]["model_name"]["name"]]
    editor.open(server.url, Comfy_Locale="en")


def graph_of(class_type: str, *values: object) -> dict:
    node = {"id": 1, "type": class_type, "pos": [100, 100], "flags": {}, "mode": 0, "inputs": [], "outputs": []}
    if values:
        node["widgets_values"] = list(values)
    return {"nodes": [node], "links": [], "groups": [], "last_node_id": 1, "last_link_id": 0, "version": 0.4}


@pytest.mark.parametrize("template", in_every_frontend(templates.TEMPLATES, lambda template: template.case))
def test_a_template_opens_cleanly(editor: Editor, template: templates.Template) -> None:
    page = editor.page
    page.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.get_by_text(PACK, exact=True).first.click()
    card = page.get_by_test_id(f"template-workflow-{template.title}")
    thumbnail = card.locator("img").first
    page.wait_for_function("image => image.complete && image.naturalWidth > 100", arg=thumbnail.element_handle())
    card.click()
    expected = numbered(template.workflow)
    page.wait_for_function("count => app.graph.nodes.length === count", arg=len(expected) + 1)
    unknown = "() => app.graph.nodes.map((node) => node.type).filter((type) => !LiteGraph.registered_node_types[type])"
    assert page.evaluate(unknown) == []
    assert page.get_by_text(re.compile("missing node", re.IGNORECASE)).count() == 0
    prompt = editor.prompt()
    assert prompt.keys() == expected.keys()
    for number, node in prompt.items():
        known = {name: value for name, value in node["inputs"].items() if name in expected[number]["inputs"]}
        assert {"class_type": node["class_type"], "inputs": known} == expected[number]


def numbered(workflow: Workflow) -> Workflow:
    """A workflow whose nodes have the numbers of the template's, as texts."""
    numbers = {key: str(number) for number, key in enumerate(workflow, start=1)}
    return {
        numbers[key]: {
            "class_type": node["class_type"],
            "inputs": {
                name: [numbers[value[0]], value[1]] if isinstance(value, list) else value
                for name, value in node["inputs"].items()
            },
        }
        for key, node in workflow.items()
    }


def test_another_packs_loader_is_replaced(editor: Editor, server: Server) -> None:
    editor.open(server.url, Comfy_NodeReplacement_Enabled=True)
    graph = graph_of("UnetLoaderGGUF", cached_auraflow().name)
    (node,) = graph["nodes"]
    node["outputs"] = [{"name": "MODEL", "type": "MODEL", "links": []}]
    node["inputs"] = [{"name": "unet_name", "type": "COMBO", "widget": {"name": "unet_name"}, "link": None}]
    editor.load(graph)
    page = editor.page
    summary = page.get_by_test_id("error-overlay-see-errors")
    offer = page.get_by_role("button", name=re.compile("^Replace (Node|Selected)"))
    offer.or_(summary).first.wait_for()
    if summary.is_visible():
        summary.click()
    offer.first.click()
    page.wait_for_function("() => app.graph.nodes[0].type === 'AuraFlowGGUFLoader'")
    (made,) = editor.prompt().values()
    assert made["inputs"] == {
        "model_name": cached_auraflow().name,
        "compute_dtype": "auto",
        "modulation_cache": True,
        "matrix_mult": "exact",
    }


def template_graph(case: str) -> dict:
    (template,) = (template for template in templates.TEMPLATES if template.case == case)
    return json.loads((ROOT / "example_workflows" / f"{template.title}.json").read_text(encoding="utf-8"))


def choose_model(editor: Editor, name: str) -> None:
    """Pick a file in the loader's list, with the mouse."""
    editor.fit()
    editor.frame()
    left, top = editor.page.evaluate(
        """() => {
            const node = app.graph.nodes.find((node) => node.type === "AuraFlowGGUFLoader");
            const widget = node.widgets.find((widget) => widget.name === "model_name");
            const view = app.canvas.canvas.getBoundingClientRect();
            const { scale, offset } = app.canvas.ds;
            const x = node.pos[0] + node.size[0] / 2, y = node.pos[1] + widget.last_y + 10;
            return [(x + offset[0]) * scale + view.left, (y + offset[1]) * scale + view.top];
        }"""
    )
    editor.page.mouse.click(left, top)
    editor.page.locator(".litemenu-entry").filter(has_text=re.compile(f"^{re.escape(name)}$")).click()


def prepare(editor: Editor, case: str) -> None:
    """Show a template in the size of the tests, with our loader for the text encoder, a GGUF file, and with texts at
    their own length."""
    graph = template_graph(case)
    for node in graph["nodes"]:
        if node["type"] == "CLIPLoader":
            node |= {"type": "AuraFlowGGUFTextEncoderLoader", "widgets_values": [cached_text_encoder().name]}
    editor.load(graph)
    editor.page.evaluate(
        """() => {
            const texts = app.graph.nodes.filter((node) => node.type === "CLIPTextEncode");
            const options = LiteGraph.createNode("T5TokenizerOptions");
            options.pos = [0, 60 + Math.max(...app.graph.nodes.map((node) => node.pos[1] + node.size[1]))];
            app.graph.add(options);
            app.graph.nodes.find((node) => node.type === "AuraFlowGGUFTextEncoderLoader").connect(0, options, 0);
            for (const text of texts) options.connect(0, text, text.findInputSlot("clip"));
        }"""
    )
    editor.set_widgets("T5TokenizerOptions", min_padding=0, min_length=1)
    for node in small(load_workflow(case)).values():
        values = {name: value for name, value in node["inputs"].items() if not isinstance(value, list)}
        if node["class_type"] not in ("CLIPTextEncode", "AuraFlowGGUFLoader"):
            editor.set_widgets(node["class_type"], **values)


def test_a_picture_is_made(editor: Editor) -> None:
    prepare(editor, "text_to_image")
    choose_model(editor, cached_auraflow().name)
    editor.page.evaluate(
        """() => {
            window.seen = [];
            app.api.addEventListener("progress", ({ detail }) => seen.push([detail.value, detail.max]));
        }"""
    )
    editor.page.get_by_test_id("queue-button").locator("button").or_(
        editor.page.locator("button[data-testid=queue-button]")
    ).first.click()
    editor.page.wait_for_function(
        """() => {
            const node = app.graph.nodes.find((node) => node.type === "SaveImage");
            return node.imgs?.[0]?.naturalWidth === 64;
        }""",
        timeout=5 * TIMEOUT_MS,  # the text encoder is of full size
    )
    assert editor.page.evaluate("() => window.seen") == [[1, 2], [2, 2]]


@pytest.mark.host_independent
def test_the_path_of_a_converted_file_is_shown_at_the_node(editor: Editor, server: Server) -> None:
    editor.load(graph_of("AuraFlowGGUFConvert"))
    name = cached_checkpoint().name
    editor.set_widgets(
        "AuraFlowGGUFConvert",
        source=f"diffusion_models/{name}",
        type="Q8_0",
        output_name="shown",
        overwrite=True,
    )
    editor.page.evaluate("() => app.queuePrompt(0)")
    made = server.base / "models" / "diffusion_models" / "shown.gguf"
    expect(editor.page.get_by_text(str(made)).first).to_be_visible()
    assert made.is_file()


def test_a_bad_file_makes_a_red_node_with_a_sentence(editor: Editor) -> None:
    prepare(editor, "text_to_image")
    choose_model(editor, BAD_FILE)
    editor.page.evaluate("() => app.queuePrompt(0)")
    # Newer frontends show a summary first, and the message when one asks for it.
    summary = editor.page.get_by_test_id("error-overlay-see-errors")
    editor.page.locator(".comfy-error-report").or_(summary).first.wait_for()
    if summary.is_visible():
        summary.click()
    expect(editor.page.get_by_text(f"{BAD_FILE}: found").filter(visible=True).first).to_be_visible()
    colour = editor.page.evaluate(
        """() => {
            const node = app.graph.nodes.find((node) => node.type === "AuraFlowGGUFLoader");
            return node.strokeStyles.executionError.call(node)?.color;
        }"""
    )
    assert colour


@pytest.mark.parametrize("theme", ["dark", pytest.param("light", marks=pytest.mark.host_independent)])
def test_the_inspector_shows_a_file(editor: Editor, server: Server, theme: str) -> None:
    editor.open(server.url, Comfy_ColorPalette=theme, Comfy_RightSidePanel_IsOpen=True)
    name = cached_auraflow().name
    editor.load(graph_of("AuraFlowGGUFInspect", name, theme == "dark"))
    editor.page.evaluate("() => app.queuePrompt(0)")
    panel = editor.page.locator(".aurainspect-panel")
    expect(panel.locator("h3")).to_have_text(name)
    expect(panel.locator("p").first).to_have_text("AuraFlow transformer, 1 double and 1 single layers")
    rows = panel.locator("tbody tr").all_inner_texts()
    assert [row.split("\t")[0].strip() for row in rows] == [
        "attention",
        "MLP",
        "modulation",
        "embedders, output",
        "all",
    ]
    assert "Q4_K" in rows[0]
    expect(panel.locator(".aurainspect-map .aurainspect-cell")).to_have_count(3 * 6 + 6)
    assert ("No NaN" in panel.inner_text()) == (theme == "dark")
    assert luminance(panel, "color") != luminance(panel, "background-color")
    assert (luminance(panel, "background-color") > 0.5) == (theme == "light")
    assert abs(luminance(panel, "color") - luminance(panel, "background-color")) > 0.5
    # the panel keeps its width beside the side panel of a selected node
    width = panel.evaluate("element => element.offsetWidth")
    assert width > 400
    editor.page.evaluate("() => app.canvas.selectItems(app.graph.nodes)")
    expect(editor.page.get_by_text("check_numbers").first).to_be_visible()
    editor.frame()
    assert panel.evaluate("element => element.offsetWidth") == width
    editor.open(server.url, Comfy_ColorPalette="dark", Comfy_RightSidePanel_IsOpen=False)


@pytest.mark.host_independent
def test_the_inspector_shows_types_and_errors_by_layer(editor: Editor) -> None:
    editor.load(graph_of("AuraFlowGGUFInspect", FITTED_FILE, False))
    editor.page.evaluate("() => app.queuePrompt(0)")
    panel = editor.page.locator(".aurainspect-panel")
    expect(panel.locator("h3")).to_have_text(FITTED_FILE)
    expect(panel.locator(".aurainspect-map")).to_have_count(2)
    for name in ("bits", "error"):
        cells = panel.locator(f".aurainspect-{name} .aurainspect-cell")
        expect(cells).to_have_count((2 * 4 + 32) * 6 + 6)
        shown = cells.evaluate_all("cells => cells.map((cell) => [cell.title, cell.style.background])")
        colours = {}
        for title, colour in shown:
            colours.setdefault(re.search(r": (\w+), ", title)[1], set()).add(colour)
        if name == "bits":  # a colour for each type, and for each its own
            assert all(len(of_type) == 1 for of_type in colours.values())
            assert len(set.union(*colours.values())) == len(colours) > 4
            assert re.fullmatch(r"double_layers\.0 text q, k: \w+, \d\.\d+ bits per weight, error [\d.]+", shown[0][0])
    assert panel.locator(".aurainspect-legend").first.inner_text().split()[0] == "BF16"
    first, last = (cells.nth(place).bounding_box() for place in (0, 39))
    assert first["y"] == last["y"]  # a row has all layers, within the panel
    assert last["x"] + last["width"] < panel.bounding_box()["x"] + panel.bounding_box()["width"]
    assert cells.first.evaluate("cell => cell.offsetWidth") > 4


@pytest.mark.host_independent
def test_the_inspector_shows_a_text_encoder(editor: Editor) -> None:
    name = f"text_encoders/{cached_text_encoder().name}"
    editor.load(graph_of("AuraFlowGGUFInspect", name, False))
    editor.page.evaluate("() => app.queuePrompt(0)")
    panel = editor.page.locator(".aurainspect-panel")
    expect(panel.locator("h3")).to_have_text(name)
    expect(panel.locator("p").first).to_have_text("Pile-T5-XL text encoder, 24 layers")
    rows = panel.locator("tbody tr").all_inner_texts()
    assert [row.split("\t")[0].strip() for row in rows] == ["attention", "MLP", "embedding", "norms", "all"]
    assert "Q8_0" in rows[2]
    expect(panel.locator(".aurainspect-memory")).to_have_count(1)
    assert (
        panel.locator(".aurainspect-swatch").evaluate_all(
            "found => new Set(found.map((swatch) => swatch.style.background)).size"
        )
        == 4
    )


def luminance(element: Locator, name: str) -> float:
    """Of a colour in an element's style, from 0 to 1."""
    colour = element.evaluate("(element, name) => getComputedStyle(element).getPropertyValue(name)", name)
    red, green, blue = (int(value) for value in re.findall(r"\d+", colour)[:3])
    return (0.2126 * red + 0.7152 * green + 0.0722 * blue) / 255


@pytest.mark.host_independent
def test_the_inspector_says_what_is_wrong_with_a_file(editor: Editor) -> None:
    editor.load(graph_of("AuraFlowGGUFInspect", BAD_FILE, False))
    editor.page.evaluate("() => app.queuePrompt(0)")
    panel = editor.page.locator(".aurainspect-panel")
    expect(panel.locator("h4")).to_have_text("This file cannot be used")
    expect(panel.locator("dd").last).to_contain_text("The download is incomplete")
