"""What the Comfy Registry would receive: what git and .comfyignore leave, and what must not be in it."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
AT_THE_TOP = {
    "CHANGELOG.md",
    "LICENSE",
    "README.md",
    "__init__.py",
    "cli.py",
    "example_workflows",
    "loader",
    "locales",
    "group_nodes.py",
    "migration.py",
    "nodes",
    "pyproject.toml",
    "quantizer",
    "requirements.txt",
    "web",
}
COMPILES = "loader/kernels/native/build.py"  # the one file that starts a program, and only the command line imports it
SUFFIXES = {".c", ".css", ".h", ".jpg", ".js", ".json", ".md", ".png", ".py", ".toml", ".txt", ""}


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The package in a folder of its own."""
    git, folder = tmp_path_factory.mktemp("git"), tmp_path_factory.mktemp("package")
    subprocess.run(["git", "init", "-q", "--bare", git], check=True)
    listing = ["git", f"--git-dir={git}", f"--work-tree={ROOT}", "ls-files", "-z", "--others"]
    listing += ["--exclude-per-directory=.gitignore", f"--exclude-from={ROOT / '.comfyignore'}"]
    listed = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=True).stdout
    for name in filter(None, listed.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def files(package: Path) -> list[Path]:
    return [path for path in package.rglob("*") if path.is_file()]


def test_it_has_what_it_needs_and_nothing_else(package):
    assert {path.name for path in package.iterdir()} == AT_THE_TOP
    assert {path.suffix for path in files(package)} <= SUFFIXES
    assert all(path.stat().st_size < 200_000 for path in files(package))
    assert sum(path.stat().st_size for path in files(package)) < 2_000_000


def test_it_has_no_code_that_the_registry_refuses(package):
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec", "compile", "__import__"), f"{path}:{node.lineno}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                roots = {module.split(".")[0] for module in modules}
                forbidden = {"subprocess", "pip", "socket", "urllib", "requests", "devtools", "tests"}
                if path == package / COMPILES:
                    forbidden.remove("subprocess")
                elif path.name != "cli.py":
                    names = [f"{module}.{alias.name}" for module in modules for alias in node.names]
                    assert not [name for name in names if "native.build" in name], f"{path}:{node.lineno}"
                assert not roots & forbidden, f"{path}:{node.lineno}"
    for path in package.rglob("*.js"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\beval\(|new Function|innerHTML|https?://", text), path


def test_it_names_no_persons_folders(package):
    for path in files(package):
        if path.suffix not in (".jpg", ".png"):
            assert not re.search(r"/(home|root)/|C:\\\\?Users", path.read_text(encoding="utf-8")), path


def test_it_works_by_itself(package, tmp_path):
    """The command runs from the package's folder, and imports every module that needs no ComfyUI."""
    script = "\n".join(
        [
            "import importlib, pathlib, cli",
            "cli._register_pack()",
            "for folder in ('loader', 'quantizer'):",
            "    for path in sorted(pathlib.Path(folder).rglob('*.py')):",
            "        name = '.'.join(path.with_suffix('').parts)",
            "        text = path.read_text(encoding='utf-8')",
            "        if 'import comfy.' not in text and 'from comfy.' not in text and 'triton' not in name:",
            "            try:",
            "                importlib.import_module(f'auraflow_gguf.{name}')",
            "            except ModuleNotFoundError as error:",
            "                assert error.name.split('.')[0] == 'comfy', error",
            "            print(name)",
        ]
    )
    # compiled code goes into no folder of the package
    environment = {"PYTHONPYCACHEPREFIX": str(tmp_path), **os.environ}
    ran = subprocess.run([sys.executable, "-c", script], cwd=package, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert {"loader.files.gguf_file", "quantizer.convert"} <= set(ran.stdout.split())


def test_the_registry_s_fields_are_those_of_the_project(package):
    settings = tomllib.loads((package / "pyproject.toml").read_text(encoding="utf-8"))
    project, comfy = settings["project"], settings["tool"]["comfy"]
    assert "comfyui" not in project["name"].lower()
    assert comfy["DisplayName"]
    assert comfy["PublisherId"]
    assert comfy["requires-comfyui"] == ">=0.16.0"
    assert comfy["includes"] == []
    assert f"## {project['version']}" in (package / "CHANGELOG.md").read_text(encoding="utf-8")
    packages = {name.removeprefix("auraflow_gguf").lstrip(".") for name in settings["tool"]["setuptools"]["packages"]}
    have = {path.parent.relative_to(package).as_posix().replace("/", ".") for path in package.rglob("__init__.py")}
    assert packages == {"" if name == "." else name for name in have}


def test_the_pictures_for_the_registry_have_its_sizes():
    from PIL import Image

    with Image.open(ROOT / "docs" / "icon.png") as icon, Image.open(ROOT / "docs" / "banner.png") as banner:
        assert icon.size == (400, 400)
        assert abs(banner.width / banner.height - 21 / 9) < 0.01
