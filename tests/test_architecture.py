"""Layers go downward only, and a few calls are never made."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lora_studio"
# Each row may import the rows above it, and the lines above it in its own row.
HOUSE = [
    ["errors", "fields", "events", "hub", "limits", "owners", "sandbox", "ram"],
    ["core.spec", "core.layout", "core.upcast", "core.slot", "core.lora"],
    ["core.baselines", "core.analysis", "core.merge", "core.kernels"],
    ["core.functions", "core.attention", "core.flash", "core.together", "core.lean"],
    ["settings"],
    ["data.readers", "data.hub_rows", "data.formats", "data.library", "data.words", "data.batches", "data.health"],
    [
        "model_files",
        "models",
        "peft_format",
        "adapters",
        "generate",
        "general",
        "measure",
        "recorded",
        "step",
        "train",
        "doctor",
        "estimate",
        "evaluate",
        "prompts",
        "chat",
        "blind",
        "learned",
        "proof",
        "modelfile",
        "inside",
        "strength",
        "changes",
        "charts",
        "drawings",
    ],
    [
        "runs.config",
        "runs.disk",
        "runs.memory",
        "study",
        "at_hand",
        "results",
        "card",
        "export",
        "adoption",
        "push",
        "runs.checkpoints",
        "runs.store",
        "runs.executors",
        "runs.supervisor",
        "runs.attempt",
        "runs.spare",
        "runs.worker",
        "ballots",
    ],
    ["report", "studio", "visitors", "door"],
    ["cli", "ui"],
]
ORDER = {name: (row, place) for row, names in enumerate(HOUSE) for place, name in enumerate(names)}
FILES = sorted(PACKAGE.rglob("*.py"))


def house_name(module: str) -> str:
    """lora_studio.ui.live -> ui, lora_studio.core.lora -> core.lora"""
    name = module.removeprefix("lora_studio").lstrip(".")
    return "ui" if name.split(".")[0] == "ui" else name


def imports(path: Path) -> list[str]:
    """Every lora_studio module that a file imports, at its top or inside a function."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
    known = {".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts) for file in FILES}
    return [name for name in found if name in known]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_above(path: Path) -> None:
    name = house_name(".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts))
    if path.name in ("__init__.py", "__main__.py"):
        return
    assert name in ORDER, f"{name} has no place in the house"
    for imported in map(house_name, imports(path)):
        below = ORDER[imported] > ORDER[name] and imported != name
        assert not below, f"{name} imports {imported}, which stands below it"


def test_the_core_knows_tensors_only() -> None:
    allowed = {
        "torch",
        "triton",
        "transformers",
        "lora_studio",
        "inspect",
        "logging",
        "math",
        "threading",
        "types",
        "functools",
        "itertools",
        "weakref",
        "difflib",
        "collections",
        "contextlib",
        "copy",
        "dataclasses",
        "typing",
    }
    for path in (PACKAGE / "core").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in names} <= allowed, path


# ---- calls this project does not make --------------------------------------------------------------------------------

SOURCES = [*FILES, PACKAGE.parent / "app.py"]
NEVER_IMPORTED = {
    *("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "yaml"),
    *("peft", "trl", "accelerate", "kernels", "flash_attn", "xml", "telnetlib", "ftplib"),
}
NEVER_CALLED = {
    *("eval", "exec", "__import__", "torch.load", "np.load", "numpy.load", "os.system", "os.popen", "tempfile.mktemp"),
    *("shutil.unpack_archive", "subprocess.getoutput", "subprocess.getstatusoutput", "urllib.request.urlopen"),
    *("pandas.read_csv", "pd.read_csv", "pandas.read_parquet", "pd.read_parquet", "gr.load"),
}
NEVER_A_METHOD = {"extractall", "unpack_archive", "unsafe_load", "read_pickle"}
ONLY_IN = {"load_dataset": "hub_rows.py"}  # user text never reaches it elsewhere
EXPRESSIONS = {"compile", "match", "search", "fullmatch", "sub", "subn", "split", "findall", "finditer"}


def broken_rules(source: str, name: str) -> list[str]:
    """What a file does that none may do, each with its line."""
    tree = ast.parse(source)
    constants = {
        target.id
        for node in tree.body
        for target in (node.targets if isinstance(node, ast.Assign) else [])
        if isinstance(target, ast.Name) and target.id.isupper()
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"{node.lineno}: import of {one}" for one in names if one.split(".")[0] in NEVER_IMPORTED]
        elif isinstance(node, ast.Call):
            found += [f"{node.lineno}: {why}" for why in _wrong_call(node, name, constants)]
    return found


def _wrong_call(node: ast.Call, name: str, constants: set[str]) -> list[str]:
    called = ast.unparse(node.func)
    method = called.rpartition(".")[2]
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg}
    wrong = []
    if called in NEVER_CALLED or (method in NEVER_A_METHOD and "." in called):
        wrong.append(called)
    if ONLY_IN.get(method, name) != name:
        wrong.append(f"{method} outside {ONLY_IN[method]}")
    for keyword, right in {"shell": "False", "trust_remote_code": "False", "allow_pickle": "False"}.items():
        if given.get(keyword, right) != right:
            wrong.append(f"{keyword}={given[keyword]}")
    if "html" in given.get("datatype", ""):
        wrong.append("a table of HTML")
    if method == "from_pretrained" and "trust_remote_code" not in given:
        wrong.append("from_pretrained that does not say trust_remote_code=False")
    makes_a_model = "_kind(" in called or "AutoModel" in called
    if makes_a_model and method in ("from_pretrained", "from_config") and "attn_implementation" not in given:
        wrong.append(f"{called} that leaves attn_implementation to the model's config")
    if called in {f"re.{one}" for one in EXPRESSIONS} and not _is_ours(node.args[0], constants):
        wrong.append(f"{called} of what may be a user's text: {ast.unparse(node.args[0])[:60]}")
    return wrong


def _is_ours(pattern: ast.expr, constants: set[str]) -> bool:
    """A regular expression that stands in the file, or has only escaped text put into it."""
    if isinstance(pattern, ast.Constant) or (isinstance(pattern, ast.Name) and pattern.id in constants):
        return True
    if isinstance(pattern, ast.IfExp):
        return _is_ours(pattern.body, constants) and _is_ours(pattern.orelse, constants)
    if isinstance(pattern, ast.JoinedStr):
        holes = [part.value for part in pattern.values if isinstance(part, ast.FormattedValue)]
        return all("re.escape" in ast.unparse(hole) or _is_ours(hole, constants) for hole in holes)
    return False


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_calls_this_project_does_not_make(path: Path) -> None:
    assert broken_rules(path.read_text(), path.name) == []


def test_what_strangers_wrote_is_parsed_by_nobody_but_the_sandbox() -> None:
    parsers = {"read", "read_path", "read_text", "normalise", "READERS"}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "lora_studio.data.readers":
                assert not {alias.name for alias in node.names} & parsers, f"{path.name} parses files itself"
            if isinstance(node, ast.Attribute) and node.attr == "apply_chat_template":
                assert path.name == "words.py", f"{path.name} runs a model's template"
    library = (PACKAGE / "data" / "library.py").read_text()
    assert '"lora_studio.data.readers:normalise"' in library and '"lora_studio.data.hub_rows:fetch"' in library


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "torch.load('x', weights_only=True)",
        "eval('1')",
        "__import__('os')",
        "import os\nos.system('x')",
        "subprocess.run(line, shell=True)",
        "subprocess.run(line, shell=wanted)",
        "import yaml",
        "archive.extractall(to)",
        "AutoConfig.from_pretrained(x)",
        "AutoConfig.from_pretrained(x, trust_remote_code=True)",
        "AutoConfig.from_pretrained(x, trust_remote_code=wanted)",
        "AutoModelForCausalLM.from_config(x)",
        "_kind(2).from_pretrained(x, trust_remote_code=False)",
        "gr.Dataframe(datatype='html')",
        "datasets.load_dataset(name)",
        "pd.read_csv(url)",
        "np.load(x, allow_pickle=True)",
        "re.compile(text)",
        "re.search(f'a{text}', x)",
        "gr.load('x')",
    ],
)
def test_the_rules_can_be_broken(source: str) -> None:
    assert broken_rules(source, "x.py")


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "WORD = 'a'\nre.compile(WORD)",
        "re.sub('a', text, x)",
        "re.compile(f'(?={re.escape(text)})')",
        "AutoConfig.from_pretrained(x, trust_remote_code=False)",
        "text.split(other)",
        "subprocess.run([a, b])",
    ],
)
def test_what_is_no_breach_is_none(source: str) -> None:
    assert broken_rules(source, "x.py") == []


def test_bandit_finds_nothing_of_medium_weight_or_more() -> None:
    command = [sys.executable, "-m", "bandit", "-r", "-q", "-f", "json", "--severity-level", "medium"]
    command += ["-c", str(PACKAGE.parent / "pyproject.toml"), str(PACKAGE), str(PACKAGE.parent / "app.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)
    where = [f"{one['filename']}:{one['line_number']} {one['test_id']} {one['issue_text']}" for one in found["results"]]
    assert where == [] and found["errors"] == [] and len(found["metrics"]) > 50
