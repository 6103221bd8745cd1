"""No code of a model's is run, and there is no flag to allow it."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from tests.cli.command import Command

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "luthier"
FILES = sorted(PACKAGE.rglob("*.py"))
FORBIDDEN = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "imp"}
FORBIDDEN_CALLS = {
    *("exec", "eval", "compile", "__import__", "importlib.import_module", "os.system", "os.popen"),
    *("torch.load", "torch.save", "torch.hub.load", "np.load", "numpy.load"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.safe_load"),  # the last builds what aliases multiply
}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_the_source_opens_no_door(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & FORBIDDEN, ast.unparse(node)
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in FORBIDDEN, ast.unparse(node)
        elif isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in FORBIDDEN_CALLS, f"{file.name}:{node.lineno}: {ast.unparse(node)}"
            for keyword in node.keywords:
                if keyword.arg in ("trust_remote_code", "allow_pickle", "shell"):
                    assert isinstance(keyword.value, ast.Constant), f"{file.name}:{node.lineno}"
                    assert keyword.value.value is False, f"{file.name}:{node.lineno}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "trust_remote_code" in node.value:
            pytest.fail(f"{file.name}:{node.lineno}: speaks of trust_remote_code: there is no such option")


def test_every_tokenizer_of_transformers_is_asked_for_without_its_code() -> None:
    calls = [
        node
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".from_pretrained")
    ]
    assert calls
    for call in calls:
        said = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert said.get("trust_remote_code") == "False"
        assert said.get("local_files_only") == "True"


EVIL = "from pathlib import Path\nPath({marker!r}).touch()\nclass Evil:\n    pass\n"


def test_a_models_own_code_is_not_run(luthier: Command, model: Path, marker: Path) -> None:
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "setup.py", "__init__.py"):
        (model / name).write_text(EVIL.format(marker=str(marker)), encoding="utf-8")
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    maps = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    (model / "config.json").write_text(json.dumps({**config, "auto_map": maps}), encoding="utf-8")
    settings = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokenizers = {"AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"]}
    settings |= {"auto_map": tokenizers, "tokenizer_class": "EvilTokenizer"}
    (model / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    ended = luthier("plan", "recipe.yaml")
    assert ended.code in (0, 2), ended.err  # read without its code, or refused since it cannot be
    if ended.code:
        assert "a model's own code is not run" in ended.message
    assert "Traceback" not in ended.err
    assert not marker.exists()


def test_no_command_has_such_an_option(luthier: Command) -> None:
    for word in ("train", "plan", "run", "merge", "export", "generate", "eval"):
        shown = luthier(word, "--help")
        assert shown.code == 0
        assert "remote" not in shown.out.lower()
        assert "unsafe" not in shown.out.lower()
